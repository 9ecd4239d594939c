"""Which way weights take to each generator that the launcher starts."""

from __future__ import annotations

from importlib.util import find_spec

from async_rl.errors import UserError
from async_rl.launch.placement import Placement
from async_rl.settings import Settings
from async_rl.settings.wire import WeightsSettings
from async_rl.vllm_release import IPC_WITHOUT_RAY, installed_release
from async_rl.weights.way import LINKS, Sides, Way, choose


def ways_of(settings: Settings, placement: Placement) -> tuple[Way, ...]:
    """Raises UserError for a `weights.transport` that does not lead to one of them."""
    engine = settings.generator.engine
    ipc = engine == "vllm" and (installed_release() >= IPC_WITHOUT_RAY or find_spec("ray") is not None)
    return choose_all(settings, placement, ipc_works=ipc)


def choose_all(settings: Settings, placement: Placement, *, ipc_works: bool) -> tuple[Way, ...]:
    """Pure. A trainer that somebody else starts is on a GPU that is not known here."""
    names = placement.machine.gpus
    sender = placement.ranks[0].gpus if placement.ranks and settings.trainer.device.startswith("cuda") else ()
    found = []
    for spot in placement.generators or ():
        sides = Sides(
            same_host=True,
            engine=settings.generator.engine,
            trainer_gpu=names[sender[0]] if sender else "",
            generator_gpus=tuple(names[gpu] for gpu in spot.gpus) if settings.generator.device != "cpu" else (),
            ipc_works=ipc_works,
            adapters_alone=bool(settings.lora.rank) and settings.lora.send == "adapter",
        )
        found.append(choose(settings.weights.transport, sides))
    if not set(found) & set(LINKS) and settings.weights.timeout_s != WeightsSettings.timeout_s:
        raise UserError(
            "weights.timeout_s does nothing here: it is for weights over nccl or ipc, and no generator of this run "
            "gets them so; leave weights.timeout_s out"
        )
    return tuple(found)


def in_words(ways: tuple[Way, ...]) -> list[str]:
    """What is worth saying of them: links between GPUs."""
    linked = {way: [i for i, taken in enumerate(ways) if taken == way] for way in LINKS}
    return [
        f"weights go over {way} into vLLM of generator{'s' * (len(some) > 1)} {', '.join(map(str, some))}"
        for way, some in linked.items()
        if some
    ]
