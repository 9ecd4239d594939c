"""What a run on a Ray cluster may be told. As in checks.py: a function a relation."""

from __future__ import annotations

from dataclasses import fields

from async_rl.config.cluster import ClusterSettings, bounds_of
from async_rl.config.derived import tensor_parallel
from async_rl.config.generator import GeneratorSettings
from async_rl.config.settings import Settings
from async_rl.errors import UserError

RESERVED = ("CPU", "GPU", "memory", "object_store_memory")
"""resources of Ray that have settings of their own"""


def _on_ray(s: Settings) -> bool:
    return s.cluster.engine == "ray"


def cluster_settings_need_ray(s: Settings) -> str:
    usual = ClusterSettings()
    if _on_ray(s):
        return ""
    for one in fields(usual):
        if getattr(s.cluster, one.name) != getattr(usual, one.name):
            return f"cluster.{one.name} does nothing with cluster.engine=local; set cluster.engine=ray, or leave it out"
    return ""


def ray_takes_the_place_of_settings(s: Settings) -> str:
    """What the launcher does for processes that it starts itself."""
    if not _on_ray(s):
        return ""
    if s.guard.rollback:
        return (
            "guard.rollback starts the trainer again, whose ranks are actors of Ray with cluster.engine=ray; leave one "
            "of the two out"
        )
    if s.pin_threads:
        return "pin_threads does nothing with cluster.engine=ray: Ray says which machine a process gets; leave it out"
    if s.generator.restart_window_s != GeneratorSettings.restart_window_s:
        return (
            "generator.restart_window_s does nothing with cluster.engine=ray, which counts the restarts of a generator "
            "over the whole run (generator.max_restarts); leave it out"
        )
    if s.wire.connect or s.weights.relay:
        name = "wire.connect" if s.wire.connect else "weights.relay"
        return f"{name} does nothing with cluster.engine=ray: generators reach the buffer's node itself; leave it out"
    for name in ("generator", "trainer"):
        if ":" in (device := getattr(s, name).device):
            return (
                f"{name}.device is {device}: with cluster.engine=ray Ray says which GPU a process gets; set "
                f"{name}.device=cuda"
            )
    return ""


def generators_on_ray_have_a_number(s: Settings) -> str:
    if not _on_ray(s):
        return ""
    try:
        low, high = bounds_of(s.cluster, s.generator.count)
    except UserError as error:
        return str(error)
    if low < 1:
        return "generator.count is 0, and with cluster.engine=ray nobody would generate; set cluster.generators"
    if s.cluster.generators and s.generator.count > 1:
        return (
            f"generator.count={s.generator.count} and cluster.generators={s.cluster.generators} both say how many; "
            "leave generator.count out"
        )
    if low == high and s.cluster.scale_s != ClusterSettings.scale_s:
        return (
            f"cluster.scale_s does nothing with {low} generators for good; set bounds, e.g. cluster.generators="
            f"{low}..{4 * low}"
        )
    return ""


def resources_of_ray_can_be_used(s: Settings) -> str:
    chosen, gpus = s.cluster, s.cluster.generator_gpus
    if not _on_ray(s):
        return ""
    if chosen.address.startswith("ray://"):
        return (
            f"cluster.address is {chosen.address}, which is Ray Client; give the command on a node of the cluster "
            "(cluster.address=auto), or submit it with `ray job submit`"
        )
    if gpus and not s.generator.device.startswith("cuda"):
        return f"cluster.generator_gpus does nothing with generator.device={s.generator.device}; leave it out"
    if gpus > tensor_parallel(s) or (gpus and gpus != tensor_parallel(s) and (gpus > 1 or tensor_parallel(s) > 1)):
        return (
            f"cluster.generator_gpus is {gpus:g}, but a generator uses {tensor_parallel(s)} "
            "(vllm.tensor_parallel; the embedded engine uses one); make them equal, or leave it out"
        )
    if chosen.ranks_per_node and s.trainer.ranks % chosen.ranks_per_node:
        return (
            f"cluster.ranks_per_node is {chosen.ranks_per_node}, which does not divide trainer.ranks={s.trainer.ranks}"
        )
    for setting in ("generator_resources", "trainer_resources"):
        for name, amount in getattr(chosen, setting).items():
            if name in RESERVED:
                return f"cluster.{setting} names {name}, which has settings of its own; leave it out there"
            if not 0 < amount < float("inf") or (amount > 1 and amount != int(amount)):
                return f"cluster.{setting}.{name} is {amount:g}; Ray takes whole numbers, or a share below 1"
    return ""


CLUSTER_RELATIONS = (
    cluster_settings_need_ray,
    ray_takes_the_place_of_settings,
    generators_on_ray_have_a_number,
    resources_of_ray_can_be_used,
)
