"""Which process sees which GPUs and uses which cores, and which way weights take to each generator.

Everything but the last section is pure: what this machine has is passed in. A process sees its own GPUs only
(CUDA_VISIBLE_DEVICES), so inside it they count from 0: a generator's first is `cuda`, rank r of the trainer's is
`cuda:LOCAL_RANK`. With `generator.device=cuda:1` the user has placed the generators: visibility stays as it is.

Threads of the CPU (`with_threads`). Every process of a run waits passively (run/child.py): a thread without work gives
its core away at once. So trainer and generators may each have a thread for every core, and the one that has work gets
them; where both have, the system shares. What a second thread costs is waking it for every operation: 40 % more
processor time in a trainer's step at 0.4 M parameters, 12 % at 3 M, 7 % at 135 M; a decoding step is smaller. The
trainer of a small model therefore computes parts of the batch side by side, in lanes (trainer/lanes.py), which cost 6 %
at 0.9 M and are woken twice a step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path

from async_rl.config import Settings
from async_rl.config.derived import generators_fit, gpus_named, shares_gpus, tensor_parallel
from async_rl.config.gpu_checks import check_shared
from async_rl.config.settings import WeightsSettings
from async_rl.errors import UserError
from async_rl.model.folder import CONFIG, existing, read_headers, read_json
from async_rl.weights.vllm_release import IPC_WITHOUT_RAY, installed_release
from async_rl.weights.way import LINKS, Sides, Way, choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What processes of this run may use."""

    gpus: tuple[str, ...] = ()
    """by the name that CUDA_VISIBLE_DEVICES knows them under; settings count them from 0"""
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Heads of the model's attention."""

    query: int
    key_value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """Where one process runs."""

    gpus: tuple[int, ...] = ()
    """as settings count them; empty: none"""
    cores: tuple[int, ...] = ()
    """empty: any"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Example: `place(settings, Machine(gpus=("0", "1"), cores=tuple(range(8))), None)`."""

    machine: Machine
    generators: tuple[Spot, ...]
    ranks: tuple[Spot, ...]
    """of the trainer; none when somebody else starts it"""
    generators_hidden: bool
    """generators see their own GPUs only"""
    ranks_hidden: bool

    @property
    def shared(self) -> bool:
        """Whether a GPU holds both a generator and a rank of the trainer."""
        return bool(_gpus(self.generators) & _gpus(self.ranks))

    def generator_environment(self, number: int) -> dict[str, str]:
        """Environment variables of generator `number`."""
        return self._environment([self.generators[number]], self.generators_hidden)

    def trainer_environment(self) -> dict[str, str]:
        """Environment variables of the trainer: all its ranks have the same."""
        return self._environment(self.ranks, self.ranks_hidden)

    def generator_cores(self, number: int) -> tuple[tuple[int, ...], ...]:
        """Cores of generator `number`, for its spec; empty: any."""
        return _cores_of([self.generators[number]])

    def trainer_cores(self) -> tuple[tuple[int, ...], ...]:
        """Cores of each rank of the trainer, for its spec; empty: any."""
        return _cores_of(self.ranks)

    def _environment(self, spots: Sequence[Spot], hidden: bool) -> dict[str, str]:
        if not hidden:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.machine.gpus[gpu] for spot in spots for gpu in spot.gpus)}

    def describe(self) -> str:
        """Example: `generator-0 on GPU 0,1; trainer rank 0 on GPU 2, rank 1 on GPU 3`."""
        named = [(f"generator-{i}", spot) for i, spot in enumerate(self.generators)]
        one = len(self.ranks) == 1
        named += [("trainer" if one else f"trainer rank {i}", spot) for i, spot in enumerate(self.ranks)]
        said = [f"{name} on {where}" for name, spot in named if (where := _where(spot))]
        if not said:
            return ANYWHERE
        return "; ".join(said) + (" (shared by both)" if self.shared else "")


ANYWHERE = "every process on the CPU, on any core"
TRAINER_GAINS, GENERATOR_GAINS = 2_000_000, 20_000_000
"""parameters of a model from which on a second thread is worth its waking, in a trainer and in a generator"""
MOST_LANES = 4
"""of the trainer: with more, Python's lock holds them up"""
LANES_OF_LARGE, TOO_LARGE = 2, 500_000_000
"""lanes of a model of TRAINER_GAINS parameters or more; one of TOO_LARGE has none: each lane holds a gradient"""


def place(settings: Settings, machine: Machine, heads: Heads | None) -> Placement:
    """GPUs and cores for every process of a run. `heads`: None when the model's are not known. Raises UserError naming
    the setting that cannot be followed."""
    check_heads(settings, heads)
    generators, ranks = _choose(settings, machine)
    cores = _cores(settings, machine, len(generators), len(ranks))
    return Placement(
        machine=machine,
        generators=tuple(Spot(gpus=g, cores=c) for g, c in zip(generators, cores, strict=False)),
        ranks=tuple(Spot(gpus=g, cores=c) for g, c in zip(ranks, cores[len(generators) :], strict=True)),
        generators_hidden=settings.generator.device == "cuda" and bool(generators),
        ranks_hidden=settings.trainer.device == "cuda" and bool(ranks),
    )


def check_heads(settings: Settings, heads: Heads | None) -> None:
    """vLLM splits attention by heads; key-value heads may be repeated instead. Raises UserError."""
    split = tensor_parallel(settings)
    if heads is None or split == 1:
        return
    said = f"vllm.tensor_parallel is {split}, but the model of {settings.model.path} has"
    if heads.query % split:
        raise UserError(f"{said} {heads.query} attention heads, which {split} does not divide; choose one that does")
    if heads.key_value % split and split % heads.key_value:
        raise UserError(f"{said} {heads.key_value} key-value heads: neither divides the other; choose another")


Gpus = list[tuple[int, ...]]
"""of each process"""


def _choose(settings: Settings, machine: Machine) -> tuple[Gpus, Gpus]:
    """GPUs of each generator and of each rank."""
    count = settings.generator.count
    ranks = settings.trainer.ranks if settings.trainer.start == "launcher" else 0
    for side, needed, device in (
        ("generator", count, settings.generator.device), ("trainer", ranks, settings.trainer.device)
    ):  # fmt: skip
        if needed and device.startswith("cuda") and not machine.gpus:
            raise UserError(f"{side}.device is {device}, but this machine shows no GPU; set {side}.device=cpu")
    generator_gpus = _asked(settings, machine, "generator")
    trainer_gpus = _asked(settings, machine, "trainer") if ranks else ()
    if settings.generator.device == "cuda" and count and not generator_gpus:
        taken = ranks if settings.trainer.device == "cuda" and not trainer_gpus else 0
        generator_gpus = _free_for_generators(settings, machine, trainer_gpus, taken)
    if settings.trainer.device == "cuda" and ranks and not trainer_gpus:
        trainer_gpus = _free_for_trainer(settings, machine, generator_gpus)
    check_shared(settings, generator_gpus, trainer_gpus)
    each = len(generator_gpus) / count if count else 0
    if each >= 1:
        size = int(each)
        generators = [generator_gpus[i * size : (i + 1) * size] for i in range(count)]
    else:
        generators = [generator_gpus[int(i * each) :][:1] for i in range(count)]
    if settings.trainer.device == "cuda":
        return generators, [(gpu,) for gpu in trainer_gpus]
    return generators, [trainer_gpus[:1] for _ in range(ranks)]


def _asked(settings: Settings, machine: Machine, side: str) -> tuple[int, ...]:
    """The GPUs that settings name, if they are there."""
    chosen = settings.generator if side == "generator" else settings.trainer
    device = chosen.device
    setting, text = f"{side}.gpus", chosen.gpus
    if device.startswith("cuda:"):
        setting, text = f"{side}.device", device.removeprefix("cuda:")
    gpus = gpus_named(text, setting)
    absent = [gpu for gpu in gpus if gpu >= len(machine.gpus)]
    if absent:
        raise UserError(f"{setting} names GPU {absent[0]}, but {_there(machine)}; choose among those")
    if device.startswith("cuda:") and side == "generator" and settings.generator.count == 0:
        return ()
    return gpus


def _free_for_generators(settings: Settings, machine: Machine, ranks: tuple[int, ...], more: int) -> tuple[int, ...]:
    """The first GPUs, without `ranks` and with `more` left over where the trainer does not share."""
    present = range(len(machine.gpus))
    wanted = settings.generator.count * tensor_parallel(settings)
    free = [gpu for gpu in present if gpu not in ranks]
    free = free[: len(free) - more] if len(free) > more else []
    if len(free) < wanted and shares_gpus(settings):
        free = list(present)
    if settings.generator.engine == "embedded":  # several small ones may be on one GPU
        wanted = next((n for n in range(min(wanted, len(free)), 0, -1) if not generators_fit(settings, n)), wanted)
    if not free or len(free) < wanted:
        raise UserError(
            f"the generators need {wanted} GPU{'s' * (wanted != 1)} (generator.count={settings.generator.count}, "
            f"vllm.tensor_parallel={tensor_parallel(settings)}) and the trainer {more or len(ranks)}, but "
            f"{_there(machine)}; lower one of them, or let both share with trainer.memory_share=0.5"
            + (" vllm.memory_share=0.4" if settings.generator.engine == "vllm" else "")
        )
    return tuple(free[:wanted])


def _free_for_trainer(settings: Settings, machine: Machine, generators: tuple[int, ...]) -> tuple[int, ...]:
    """Those the generators do not have; with sharing also theirs."""
    present, wanted = range(len(machine.gpus)), settings.trainer.ranks
    free = [gpu for gpu in present if gpu not in generators]
    if len(free) < wanted and shares_gpus(settings):
        free = list(present)
    if len(free) < wanted:
        taken = f", and generators have {len(set(generators))} of them" if generators else ""
        share = "" if len(machine.gpus) < wanted else ", or let both share GPUs with trainer.memory_share=0.5"
        raise UserError(
            f"trainer.ranks={wanted} needs {wanted} GPU{'s' * (wanted != 1)} (NCCL takes one rank a GPU), but "
            f"{_there(machine)}{taken}; lower trainer.ranks{share}"
        )
    return tuple(free[:wanted])


def _cores(settings: Settings, machine: Machine, generators: int, ranks: int) -> list[tuple[int, ...]]:
    """Of each generator, then of each rank; empty where threads are not bound."""
    if not settings.pin_threads:
        return [()] * (generators + ranks)
    sizes = [max(1, settings.generator.threads)] * generators + [
        max(1, settings.trainer.threads, settings.trainer.lanes)
    ] * ranks
    if sum(sizes) > len(machine.cores):
        raise UserError(
            f"pin_threads needs a core for each thread: {generators} generators x generator.threads="
            f"{settings.generator.threads} and {ranks} trainer ranks x trainer.threads={settings.trainer.threads} are "
            f"{sum(sizes)}, but {len(machine.cores)} cores are there; lower one of them, or leave pin_threads out"
        )
    found, start = [], 0
    for size in sizes:
        found.append(machine.cores[start : start + size])
        start += size
    return found


def _cores_of(spots: Sequence[Spot]) -> tuple[tuple[int, ...], ...]:
    return tuple(spot.cores for spot in spots) if any(spot.cores for spot in spots) else ()


def _gpus(spots: Sequence[Spot]) -> set[int]:
    return {gpu for spot in spots for gpu in spot.gpus}


def _where(spot: Spot) -> str:
    parts = [f"{what} {','.join(map(str, some))}" for what, some in (("GPU", spot.gpus), ("core", spot.cores)) if some]
    return ", ".join(parts)


def _there(machine: Machine) -> str:
    count = len(machine.gpus)
    return f"this machine shows {count} (0{f' to {count - 1}' if count > 1 else ''})"


# ------------------------------------------------------------------------------------------------ ways of weights


def ways_here(settings: Settings, placement: Placement) -> tuple[Way, ...]:
    """The way that weights take to each generator that the launcher starts, with the vLLM that is installed here.
    Raises UserError for a `weights.transport` that does not lead to one of them."""
    engine = settings.generator.engine
    ipc = engine == "vllm" and (installed_release() >= IPC_WITHOUT_RAY or find_spec("ray") is not None)
    return choose_ways(settings, placement, ipc_works=ipc)


def choose_ways(settings: Settings, placement: Placement, *, ipc_works: bool) -> tuple[Way, ...]:
    """The same, pure. `ipc_works`: see `Sides`. For a trainer that somebody else starts, its GPU is not known here."""
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
    if settings.weights.broadcast and found.count("nccl") < 2:
        raise UserError(
            f"weights.broadcast is for several generators that get weights over nccl, and here {found.count('nccl')} "
            "do; leave weights.broadcast out"
        )
    if settings.weights.relay:
        raise UserError(
            "weights.relay does nothing here: the generators that the launcher starts are on the trainer's host; give "
            "it to `async-rl generate`, and leave it out"
        )
    return tuple(found)


def describe_links(ways: tuple[Way, ...]) -> list[str]:
    """A line for each kind of link between GPUs."""
    linked = {way: [i for i, taken in enumerate(ways) if taken == way] for way in LINKS}
    return [
        f"weights go over {way} into vLLM of generator{'s' * (len(some) > 1)} {', '.join(map(str, some))}"
        for way, some in linked.items()
        if some
    ]


# ------------------------------------------------------------------------------------------------ threads


def with_threads(settings: Settings, cores: int, parameters: int) -> Settings:
    """`settings` with a number in place of `threads=0` and `lanes=0`, for a model of so many parameters.

    On a CPU a process gets its part of all cores, which processes of its kind share, if the model is large enough to
    gain from it; with `pin_threads` its part of the cores that all share. The number goes into the run's folder: the
    last bits of a step may depend on it, and a replay takes the same.
    """
    trainer, generator = settings.trainer, settings.generator
    ranks = trainer.ranks if trainer.start == "launcher" else 1

    def chosen(threads: int, device: str, alike: int, gains: int) -> int:
        if threads:
            return threads
        beside = generator.count + ranks if settings.pin_threads else alike
        return max(1, cores // max(1, beside)) if device == "cpu" and parameters >= gains else 1

    lanes = trainer.lanes or 1
    if not trainer.lanes and not trainer.threads and trainer.device == "cpu" and parameters < TOO_LARGE:
        most = MOST_LANES if parameters < TRAINER_GAINS else LANES_OF_LARGE
        lanes = 1 if settings.pin_threads else max(1, min(most, cores // max(1, ranks)))
    threads = chosen(trainer.threads, trainer.device, ranks, TRAINER_GAINS)
    return replace(
        settings,
        trainer=replace(trainer, threads=threads, lanes=lanes),
        generator=replace(
            generator, threads=chosen(generator.threads, generator.device, generator.count, GENERATOR_GAINS)
        ),
    )


def threads_here(settings: Settings) -> Settings:
    """The same on this machine, with the model of `model.path`. Raises UserError without one, and for lanes on a
    GPU."""
    if settings.trainer.lanes > 1 and settings.trainer.device != "cpu":
        raise UserError(
            f"trainer.lanes is {settings.trainer.lanes}, but lanes are threads of a CPU and trainer.device is "
            f"{settings.trainer.device}; leave trainer.lanes out"
        )
    if settings.trainer.threads and settings.generator.threads:
        return with_threads(settings, 1, 0)  # there is nothing left to choose
    shapes = read_headers(Path(settings.model.path))
    return with_threads(settings, read_cores(), sum(map(prod, shapes.values())))


def describe_threads(settings: Settings, cores: int) -> str:
    """Example: `threads for 2 cores: 2 of the trainer, 1 of each generator`."""
    trainer, generator = settings.trainer, settings.generator
    whose = "the trainer" if trainer.ranks == 1 else "each trainer rank"
    lanes = f" in {trainer.lanes} lanes" if trainer.lanes > 1 else ""
    return f"threads for {cores} cores: {trainer.threads} of {whose}{lanes}, {generator.threads} of each generator"


# ------------------------------------------------------------------------------------------------ this machine


def read_cores() -> int:
    """Cores that this process may use: its affinity, within its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        most, _, period = quota.read_text().strip().partition(" ")
        if most.isdecimal() and period.isdecimal():
            cores = min(cores, max(1, round(int(most) / int(period))))
    return cores


def read_machine(settings: Settings) -> Machine:
    """The GPUs that torch can use here, in the order settings count them, and the cores. Imports torch only when
    `settings` ask for a GPU."""
    asked = any(device.startswith("cuda") for device in (settings.generator.device, settings.trainer.device))
    return Machine(gpus=visible_gpus() if asked else (), cores=tuple(sorted(os.sched_getaffinity(0))))


def place_here(settings: Settings) -> Placement:
    """Where a run's processes are on this machine; `settings`: those of `threads_here`. Raises UserError when they
    cannot be."""
    return place(settings, read_machine(settings), read_heads(settings))


def visible_gpus() -> tuple[str, ...]:
    """The name of each GPU in CUDA_VISIBLE_DEVICES, so that a process can be given some of them."""
    import torch

    # by NVML where it is there: no CUDA context is made in this process
    count = torch.cuda.device_count()
    return names_of(count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def names_of(count: int, visible: str | None) -> tuple[str, ...]:
    """The names of `count` GPUs. `visible`: those that the user has chosen, numbers or names like GPU-8932f937; None:
    all."""
    if visible is None:
        return tuple(map(str, range(count)))
    return tuple(name.strip() for name in visible.split(",") if name.strip())[:count]


def read_heads(settings: Settings) -> Heads | None:
    """From the model's config.json; None when it does not say. Raises UserError without a model."""
    values = read_json(existing(settings.model.path) / CONFIG)
    values = values.get("text_config") or values
    query = values.get("num_attention_heads")
    if not isinstance(query, int):
        return None
    return Heads(query=query, key_value=int(values.get("num_key_value_heads") or query))
