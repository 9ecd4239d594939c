"""Relations between settings: what contradicts, or would do nothing, is refused before anything starts.

One function per relation. It returns what is wrong and the remedy, or an empty text. Bounds of a single setting stand
beside it in settings.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any

from async_rl.config.cluster_checks import CLUSTER_RELATIONS
from async_rl.config.generator import GeneratorSettings
from async_rl.config.gpu_checks import GPU_RELATIONS
from async_rl.config.node_checks import NODE_RELATIONS
from async_rl.config.pool_checks import POOL_RELATIONS
from async_rl.config.rollout_checks import ROLLOUT_RELATIONS
from async_rl.config.sampler_checks import SAMPLER_RELATIONS, largest_group
from async_rl.config.schema import check_bounds
from async_rl.config.settings import (
    CheckpointSettings,
    CriticSettings,
    GuardSettings,
    LoraSettings,
    Settings,
    StalenessSettings,
    TrainerSettings,
    VllmSettings,
    WeightsSettings,
)
from async_rl.config.updates import ReferenceSettings, UpdatesSettings
from async_rl.config.verify import VerifySettings
from async_rl.config.vllm_checks import VLLM_RELATIONS
from async_rl.errors import UserError, check_trackers

Relation = Callable[[Settings], str]


def check(settings: Settings, *, needs_model: bool = True) -> None:
    """Refuse values out of bounds and settings that contradict each other or would do nothing. Raises UserError.

    `needs_model`: False for a rehearsal, which replaces the model by one of its own."""
    check_bounds(settings)
    check_trackers(settings.trackers)
    for relation in RELATIONS:
        if (needs_model or relation is not model_is_named) and (problem := relation(settings)):
            raise UserError(problem)


TRUNCATED = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def refuse_truncated_sampling(values: Mapping[str, Any]) -> None:
    """Settings that other programs have and this one lacks for a reason. Raises UserError with it."""
    for group in ("generator", "vllm"):
        chosen = values.get(group)
        for name in TRUNCATED:
            if isinstance(chosen, Mapping) and name in chosen:
                raise UserError(
                    f"{group}.{name} does not exist: what is sampled from a changed distribution has other "
                    "probabilities than the trainer computes, which biases every ratio. Leave it out; "
                    "generator.temperature is known to both sides"
                )


# ------------------------------------------------------------------ what every run needs


def template_time_is_a_time(s: Settings) -> str:
    try:
        datetime.fromisoformat(s.model.template_time or "2026-01-31")
    except ValueError:
        return f"model.template_time is {s.model.template_time!r}; write it as 2026-01-31T12:00, or leave it out"
    return ""


def name_is_a_folder(s: Settings) -> str:
    if not s.name.strip() or "/" in s.name or "\0" in s.name:
        return f"name is {s.name!r}; it names a folder, so it must be text without '/'"
    return ""


def model_is_named(s: Settings) -> str:
    if not s.model.path:
        return "model.path is not set; name a model folder (`async-rl init-model` makes a small one)"
    return ""


def checkpoint_signals_are_known(s: Settings) -> str:
    known = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")
    for name in s.checkpoint.signals:
        if name not in known:
            return f"checkpoint.signals names '{name}'; a run can be told to end by {', '.join(known)}"
    return ""


def grace_needs_signals(s: Settings) -> str:
    if not s.checkpoint.signals and s.checkpoint.grace_s != CheckpointSettings().grace_s:
        return "checkpoint.grace_s does nothing with checkpoint.signals=[]; leave it out"
    return ""


def reward_weights_are_finite(s: Settings) -> str:
    for name, weight in s.task.reward_weights.items():
        if not math.isfinite(weight):
            return f"task.reward_weights.{name} is {weight}; a weight is a finite number"
    return ""


def temperature_is_sampled_at(s: Settings) -> str:
    from async_rl.trajectory.types import LOWEST_TEMPERATURE  # numpy with it, which the command line does without

    lowest, chosen = LOWEST_TEMPERATURE, s.evaluation.temperature
    if 0 < chosen < lowest:
        return f"evaluation.temperature is {chosen:g}; engines sample at {lowest:g} or above, or greedily with 0"
    return ""


def task_is_named(s: Settings) -> str:
    return "" if s.task.name else "task.name is not set; e.g. task.name=guess"


def recipe_is_named(s: Settings) -> str:
    if not isinstance(s.recipe.get("name"), str):
        return "recipe.name is not set; e.g. recipe.name=vcpo (`async-rl recipes` lists them)"
    return ""


# ------------------------------------------------------------------ staleness


def depth_lies_within_the_bound(s: Settings) -> str:
    depth, most = s.staleness.pipeline_depth, s.staleness.max_staleness + 1
    if depth and not 1 <= depth <= most:
        return (
            f"staleness.pipeline_depth is {depth:g}, but with staleness.max_staleness={most - 1} it must lie "
            f"between 1 and {most}: deeper batches would be too stale to train"
        )
    return ""


def target_ess_has_a_depth_to_move(s: Settings) -> str:
    if s.staleness.target_ess and s.staleness.max_staleness == 0:
        return (
            f"staleness.target_ess is {s.staleness.target_ess:g}, but with staleness.max_staleness=0 the pipeline is "
            "one batch deep whatever the ESS; raise staleness.max_staleness or leave staleness.target_ess out"
        )
    return ""


def window_belongs_to_pace(s: Settings) -> str:
    stale = s.staleness
    if stale.policy != "pace" and stale.window != StalenessSettings.window:
        return (
            f"staleness.window is {stale.window:g}, but staleness.policy={stale.policy} has no window: a batch takes "
            "whatever groups are finished. Leave staleness.window out"
        )
    return ""


# ------------------------------------------------------------------ buffer and wire


def keep_steps_needs_checkpoints(s: Settings) -> str:
    if s.buffer.keep_steps and not s.checkpoint.every:
        return (
            "buffer.keep_steps deletes nothing before the first checkpoint, and with checkpoint.every=0 that is the "
            "end of the run; set checkpoint.every"
        )
    return ""


def limits_end_before_the_timeout(s: Settings) -> str:
    for name in ("frozen_after_s", "stall_report_s"):
        if (seconds := getattr(s.wire, name)) >= (limit := s.wire.timeout_s):
            return f"wire.{name} is {seconds:g}, but a wait ends the run after wire.timeout_s={limit:g}; lower it"
    return ""


def _tcp(s: Settings) -> bool:
    return s.wire.endpoint.startswith("tcp://")


def tcp_is_served_with_keys(s: Settings) -> str:
    if _tcp(s) and not s.wire.keys:
        return (
            f"wire.endpoint is {s.wire.endpoint}, but wire.keys is not set: TCP is served with keys only; "
            "`async-rl keys DIR` makes them, then wire.keys=DIR"
        )
    return ""


def keys_need_tcp(s: Settings) -> str:
    if s.wire.keys and not _tcp(s):
        return (
            f"wire.keys is {s.wire.keys}, but wire.endpoint={s.wire.endpoint} is no tcp endpoint, and a Unix socket "
            "needs none; set wire.endpoint=tcp://HOST:PORT or leave wire.keys out"
        )
    return ""


def stream_needs_tcp(s: Settings) -> str:
    if s.weights.transport == "stream" and not _tcp(s):
        return (
            f"weights.transport is stream, but with wire.endpoint={s.wire.endpoint} no weight server runs: every "
            "generator is on this host; set wire.endpoint=tcp://HOST:PORT or leave weights.transport out"
        )
    return ""


def relays_need_tcp(s: Settings) -> str:
    if s.weights.fan_out != WeightsSettings.fan_out and not _tcp(s):
        return (
            f"weights.fan_out is {s.weights.fan_out}, but with wire.endpoint={s.wire.endpoint} no weight server runs "
            "that relays could fetch from; set wire.endpoint=tcp://HOST:PORT or leave weights.fan_out out"
        )
    if s.weights.relay and not s.weights.relay.startswith("tcp://"):
        return f"weights.relay is {s.weights.relay}; it must be tcp://HOST:PORT, as `async-rl relay` says it"
    if s.weights.relay and s.weights.transport not in ("auto", "stream"):
        return f"weights.relay does nothing with weights.transport={s.weights.transport}; leave one of them out"
    return ""


def weight_endpoint_needs_tcp(s: Settings) -> str:
    if s.weights.endpoint == "auto":
        return ""
    if not _tcp(s):
        return (
            f"weights.endpoint is {s.weights.endpoint}, but with wire.endpoint={s.wire.endpoint} no weight server "
            "runs; set wire.endpoint=tcp://HOST:PORT or leave weights.endpoint out"
        )
    if not s.weights.endpoint.startswith("tcp://"):
        return f"weights.endpoint is {s.weights.endpoint}; it must be auto or tcp://HOST:PORT"
    return ""


def connect_looks_like_the_endpoint(s: Settings) -> str:
    wire, tcp = s.wire, _tcp(s)
    if wire.connect and not wire.connect.startswith("tcp://" if tcp else "ipc://"):
        return (
            f"wire.connect is {wire.connect!r}; it must look like {'tcp://HOST:PORT' if tcp else 'ipc://PATH'}, as "
            f"what it leads to (wire.endpoint={wire.endpoint})"
        )
    return ""


# ------------------------------------------------------------------ generators and their engine


def a_group_fits_a_generator(s: Settings) -> str:
    if s.generator.max_sequences < s.batch.group_size:
        return (
            f"generator.max_sequences is {s.generator.max_sequences}, less than one group "
            f"(batch.group_size={s.batch.group_size}); raise it"
        )
    if s.generator.max_sequences < (most := largest_group(s)):
        return (
            f"generator.max_sequences is {s.generator.max_sequences}, less than the largest group ({most} samples with "
            f"sampler.samples={s.sampler.samples}); raise it, or lower sampler.max_samples"
        )
    return ""


def vllm_settings_need_vllm(s: Settings) -> str:
    if s.generator.engine != "vllm" and s.vllm != VllmSettings():
        return f"vllm.* does nothing with generator.engine={s.generator.engine}; set generator.engine=vllm"
    return ""


def vllm_has_its_own_cache(s: Settings) -> str:
    if s.generator.engine == "vllm" and s.generator.kv_cache_mb:
        return "generator.kv_cache_mb does nothing with generator.engine=vllm; set vllm.kv_cache_mb"
    return ""


def vllm_chooses_its_gpu_itself(s: Settings) -> str:
    if s.generator.engine == "vllm" and s.generator.device not in ("cpu", "cuda"):
        return (
            f"generator.device is '{s.generator.device}'; with generator.engine=vllm it is cpu or cuda "
            "(CUDA_VISIBLE_DEVICES says which GPU)"
        )
    return ""


def vllm_on_a_cpu_has_no_gpu_settings(s: Settings) -> str:
    if s.generator.engine != "vllm" or s.generator.device != "cpu":
        return ""
    if s.vllm.tensor_parallel != 1 or s.vllm.memory_share != VllmSettings.memory_share:
        return (
            "vllm.tensor_parallel and vllm.memory_share need GPUs, and generator.device is cpu; leave them out, or set "
            "generator.device=cuda"
        )
    return ""


def head_dtype_needs_half_precision(s: Settings) -> str:
    if s.vllm.head_dtype != VllmSettings.head_dtype and s.generator.dtype == "float32":
        return (
            f"vllm.head_dtype={s.vllm.head_dtype} does nothing with generator.dtype=float32, where all is float32; "
            "leave it out"
        )
    return ""


# ------------------------------------------------------------------ trainer


def external_trainer_is_placed_by_others(s: Settings) -> str:
    if s.trainer.start != "external":
        return ""
    for name in ("gpus", "memory_share"):
        if getattr(s.trainer, name) != getattr(TrainerSettings, name):
            return (
                f"trainer.{name} does nothing with trainer.start=external: whoever starts the trainer says where it "
                f"runs; leave trainer.{name} out"
            )
    return ""


def external_trainer_is_not_started_again(s: Settings) -> str:
    if s.trainer.start == "external" and s.guard.rollback:
        return (
            "guard.rollback starts the trainer again, which trainer.start=external leaves to others; leave one of the "
            "two out"
        )
    return ""


def start_timeout_needs_an_external_trainer(s: Settings) -> str:
    if s.trainer.start == "launcher" and s.trainer.start_timeout_s != TrainerSettings.start_timeout_s:
        return "trainer.start_timeout_s does nothing with trainer.start=launcher: nobody is waited for"
    return ""


def absent_generators_join_by_themselves(s: Settings) -> str:
    joins = s.generator.count == 0 or s.cluster.engine == "ray"
    if not joins and s.generator.start_timeout_s != GeneratorSettings.start_timeout_s:
        return (
            f"generator.start_timeout_s does nothing with generator.count={s.generator.count}: the run starts its "
            "generators itself"
        )
    return ""


def one_cuda_device_holds_one_rank(s: Settings) -> str:
    device, ranks = s.trainer.device, s.trainer.ranks
    if device.startswith("cuda") and device != "cuda" and ranks > 1:
        return (
            f"trainer.device is '{device}', but trainer.ranks is {ranks}, and NCCL takes one rank a GPU; "
            "set trainer.device=cuda, and trainer.gpus to choose"
        )
    return ""


def sharding_needs_ranks(s: Settings) -> str:
    if s.trainer.sharding != "none" and s.trainer.ranks == 1:
        return (
            f"trainer.sharding={s.trainer.sharding} does nothing with trainer.ranks=1: there is nobody to share the "
            "weights with; set trainer.ranks, or leave trainer.sharding out"
        )
    return ""


def sharding_excludes_adapters(s: Settings) -> str:
    if s.trainer.sharding != "none" and s.lora.rank:
        return (
            f"trainer.sharding={s.trainer.sharding} cannot be combined with lora.rank={s.lora.rank} yet: adapters are "
            "added to whole weights; set trainer.sharding=none, which needs no optimizer memory for frozen weights"
        )
    return ""


def memory_share_needs_a_gpu(s: Settings) -> str:
    if not s.trainer.device.startswith("cuda") and s.trainer.memory_share != TrainerSettings.memory_share:
        return f"trainer.memory_share does nothing with trainer.device={s.trainer.device}: it is about a GPU's memory"
    return ""


# ------------------------------------------------------------------ adapters


def adapters_are_trained(s: Settings) -> str:
    if s.lora.rank == 0 and s.lora != LoraSettings():
        return "lora.* does nothing with lora.rank=0, which trains all weights; set lora.rank, e.g. 16"
    return ""


def a_layer_has_one_adapter(s: Settings) -> str:
    if len(set(s.lora.targets)) < len(s.lora.targets):
        return f"lora.targets names a layer twice: {', '.join(s.lora.targets)}; once is enough"
    return ""


def adapters_are_added_by_generators(s: Settings) -> str:
    if s.lora.send == "adapter" and s.weights.transport not in ("auto", "shared_memory", "stream"):
        return (
            f"lora.send=adapter needs generators that add adapters to their own copy, and with weights.transport="
            f"{s.weights.transport} weights go straight into the engine; set lora.send=merged or leave "
            "weights.transport out"
        )
    return ""


# ------------------------------------------------------------------ updates of a batch


def a_frozen_critic_comes_from_somewhere(s: Settings) -> str:
    critic = s.critic
    if critic.learning_rate > 0:
        return ""
    if not critic.path:
        return (
            "critic.learning_rate=0 freezes a critic that is 0 everywhere; set critic.path to a checkpoint that has one"
        )
    if critic.kind == "head" or critic.warmup_steps or critic.target_average or critic.epochs > 1:
        return (
            "critic.learning_rate=0 freezes the critic, which needs critic.kind=model (a head reads the policy's "
            "features, which move), critic.warmup_steps=0, and neither critic.target_average nor critic.epochs"
        )
    return ""


def a_distribution_has_a_range(s: Settings) -> str:
    critic, usual = s.critic, CriticSettings()
    if critic.loss == "squared":
        for name in ("bins", "low", "high"):
            if getattr(critic, name) != getattr(usual, name):
                return f"critic.{name} does nothing with critic.loss=squared; set critic.loss=hl_gauss or two_hot"
        return ""
    if critic.low >= critic.high:
        return f"critic.low={critic.low:g} must lie below critic.high={critic.high:g}: returns lie between the two"
    return ""


def minibatches_are_whole_groups(s: Settings) -> str:
    parts, groups = s.updates.minibatches, s.batch.groups_per_step
    if parts > groups:
        return (
            f"updates.minibatches is {parts}, but a batch has {groups} groups (batch.groups_per_step), and a group is "
            "not cut; lower it"
        )
    return ""


def kl_target_needs_a_bound(s: Settings) -> str:
    if not s.updates.kl_stop and s.updates.kl_target != UpdatesSettings.kl_target:
        return "updates.kl_target does nothing with updates.kl_stop=0; set updates.kl_stop, e.g. 0.02"
    return ""


def reference_moves_one_way(s: Settings) -> str:
    if s.reference.every and s.reference.average:
        return (
            f"reference.every={s.reference.every} and reference.average={s.reference.average:g} are two ways for the "
            "reference to follow the policy; choose one"
        )
    return ""


def reference_without_adapters_stays(s: Settings) -> str:
    if s.lora.rank and s.reference != ReferenceSettings():
        return (
            "reference.* does nothing with lora.rank: the reference is then the model without its adapters, which "
            "stays as it is; leave it out"
        )
    return ""


# ------------------------------------------------------------------ alarms and rollback


def thresholds_need_alarms(s: Settings) -> str:
    if not s.guard.alarms and (name := _first_set(s.guard, "alarms")):
        return f"guard.{name} does nothing with guard.alarms=false; set guard.alarms=true"
    return ""


def _first_set(group: GuardSettings | VerifySettings, switch: str) -> str:
    """The first setting, other than the switch of its group, that has not its default; empty: there is none."""
    others = [one for one in fields(group) if one.name != switch]
    return next((one.name for one in others if getattr(group, one.name) != one.default), "")


def alarm_factors_are_above_one(s: Settings) -> str:
    for name in ("entropy", "gradient"):
        if 0 < (factor := getattr(s.guard, name)) <= 1:
            return f"guard.{name} is {factor:g}; it is a factor above 1, or 0 for never"
    return ""


def rollback_scale_needs_rollback(s: Settings) -> str:
    if not s.guard.rollback and s.guard.rollback_lr_scale != GuardSettings.rollback_lr_scale:
        return "guard.rollback_lr_scale does nothing with guard.rollback=false; set guard.rollback=true"
    return ""


def rollback_needs_an_alarm(s: Settings) -> str:
    guard = s.guard
    if guard.rollback and not any((guard.ess, guard.reference, guard.entropy, guard.gradient, guard.reward)):
        return "guard.rollback=true, but every alarm is off (guard.ess, guard.entropy, ... are 0); set one"
    return ""


def rollback_needs_checkpoints(s: Settings) -> str:
    if s.guard.rollback and not s.checkpoint.every:
        return (
            "guard.rollback=true, but with checkpoint.every=0 there is no checkpoint to go back to before the end of "
            "the run; set checkpoint.every"
        )
    return ""


def rollback_needs_generators(s: Settings) -> str:
    if s.guard.rollback and not s.generator.count:
        return (
            "guard.rollback=true, but with generator.count=0 nobody would generate behind it: going back starts all "
            "processes anew, and generators that joined by themselves are told to end; set generator.count=1 or more, "
            "or guard.rollback=false"
        )
    return ""


def what_is_verified_needs_a_share(s: Settings) -> str:
    if not s.verify.share and (name := _first_set(s.verify, "share")):
        return f"verify.{name} does nothing with verify.share=0; set verify.share, e.g. 0.01"
    return ""


RELATIONS: tuple[Relation, ...] = (
    template_time_is_a_time,
    tcp_is_served_with_keys,
    keys_need_tcp,
    stream_needs_tcp,
    weight_endpoint_needs_tcp,
    relays_need_tcp,
    connect_looks_like_the_endpoint,
    adapters_are_trained,
    a_layer_has_one_adapter,
    adapters_are_added_by_generators,
    a_frozen_critic_comes_from_somewhere,
    a_distribution_has_a_range,
    minibatches_are_whole_groups,
    kl_target_needs_a_bound,
    reference_moves_one_way,
    reference_without_adapters_stays,
    thresholds_need_alarms,
    alarm_factors_are_above_one,
    rollback_scale_needs_rollback,
    rollback_needs_an_alarm,
    rollback_needs_checkpoints,
    rollback_needs_generators,
    what_is_verified_needs_a_share,
    name_is_a_folder,
    model_is_named,
    task_is_named,
    temperature_is_sampled_at,
    reward_weights_are_finite,
    checkpoint_signals_are_known,
    grace_needs_signals,
    recipe_is_named,
    depth_lies_within_the_bound,
    target_ess_has_a_depth_to_move,
    window_belongs_to_pace,
    keep_steps_needs_checkpoints,
    limits_end_before_the_timeout,
    *POOL_RELATIONS,
    *SAMPLER_RELATIONS,
    *ROLLOUT_RELATIONS,
    a_group_fits_a_generator,
    vllm_settings_need_vllm,
    vllm_has_its_own_cache,
    vllm_chooses_its_gpu_itself,
    vllm_on_a_cpu_has_no_gpu_settings,
    *VLLM_RELATIONS,
    head_dtype_needs_half_precision,
    *GPU_RELATIONS,
    *CLUSTER_RELATIONS,
    external_trainer_is_placed_by_others,
    external_trainer_is_not_started_again,
    start_timeout_needs_an_external_trainer,
    absent_generators_join_by_themselves,
    *NODE_RELATIONS,
    one_cuda_device_holds_one_rank,
    sharding_needs_ranks,
    sharding_excludes_adapters,
    memory_share_needs_a_gpu,
)
"""In the order they are reported in: the first that is broken is the one the user reads."""
