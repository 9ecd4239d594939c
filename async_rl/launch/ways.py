"""Which way weights take to each generator that the launcher starts."""

from __future__ import annotations

from importlib.util import find_spec

from async_rl.launch.placement import Placement
from async_rl.settings import Settings
from async_rl.vllm_release import IPC_WITHOUT_RAY, installed_release
from async_rl.weights.way import Sides, Way, choose


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
    return tuple(found)
