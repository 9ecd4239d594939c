"""A run on Ray, planned: what its actors take, which settings follow from being spread, and how many generators there
should be. Pure: Ray is not imported here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from async_rl.config import Settings
from async_rl.config.cluster import ClusterSettings, bounds_of
from async_rl.config.derived import shares_gpus, tensor_parallel
from async_rl.config.generator import GeneratorSettings

RUN_CPUS = 1.0
"""of the launcher, the buffer and the weight server together"""
GPU_CPUS, CPU_CPUS = 4.0, 1.0
"""CPUs of a process that has a GPU, and of one that has none, where the settings say nothing"""
GIGABYTE = 1 << 30

Resources = Mapping[str, float]
"""of a node or of what is to be placed, by the names that Ray gives them: CPU, GPU, memory (bytes), custom ones"""

# ------------------------------------------------------------------------------------------------ resources


@dataclass(frozen=True, slots=True, kw_only=True)
class RayPlan:
    """What a run asks of a Ray cluster. Example: `plan(settings)`."""

    trainer: tuple[Resources, ...]
    """a bundle for each node of the trainer; the first one also holds launcher, buffer and weight server"""
    rank: Resources
    """of each trainer rank, within its node's bundle"""
    ranks_per_node: int
    generator: Resources
    """a bundle of its own for each generator"""
    fewest: int
    most: int
    """generators"""

    @property
    def strategy(self) -> str:
        """Of the trainer's placement group: nodes of it are different ones."""
        return "STRICT_SPREAD" if len(self.trainer) > 1 else "STRICT_PACK"


def plan(settings: Settings) -> RayPlan:
    """What the run takes. Raises UserError for a number of generators that is none."""
    chosen, ranks = settings.cluster, settings.trainer.ranks
    fewest, most = bounds_of(chosen, settings.generator.count)
    per_node = chosen.ranks_per_node or ranks
    rank = _resources(
        cpus=chosen.trainer_cpus or _cpus(settings.trainer.threads, settings.trainer.device),
        gpus=float(settings.trainer.device.startswith("cuda")),
    )
    node = {name: amount * per_node for name, amount in rank.items()} | chosen.trainer_resources
    first = {**node, "CPU": node["CPU"] + RUN_CPUS}
    generator = _resources(cpus=generator_cpus(settings), gpus=generator_gpus(settings)) | chosen.generator_resources
    if chosen.generator_memory_gb:
        generator["memory"] = float(int(chosen.generator_memory_gb * GIGABYTE))
    return RayPlan(
        trainer=(first, *[dict(node) for _ in range(ranks // per_node - 1)]),
        rank=rank,
        ranks_per_node=per_node,
        generator=generator,
        fewest=fewest,
        most=most,
    )


def generator_gpus(settings: Settings) -> float:
    """GPUs that Ray counts for a generator."""
    on_gpus = settings.generator.device.startswith("cuda")
    return settings.cluster.generator_gpus or float(tensor_parallel(settings)) * on_gpus


def generator_cpus(settings: Settings) -> float:
    """CPUs that Ray counts for a generator."""
    chosen = settings.generator
    asked = _cpus(chosen.threads, chosen.device) + chosen.task_processes
    return settings.cluster.generator_cpus or asked


def _cpus(threads: int, device: str) -> float:
    return float(threads) or (GPU_CPUS if device.startswith("cuda") else CPU_CPUS)


def _resources(*, cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def misfit(what: str, bundles: Sequence[Resources], nodes: Sequence[Resources], remedy: str) -> str:
    """Why no nodes of these sizes can ever hold the bundles, each on a node of its own; empty: they can. `what` the
    bundles are for and the `remedy` stand in the sentence."""
    free = list(range(len(nodes)))
    for bundle in sorted(bundles, key=lambda one: -sum(one.values())):
        place = next((n for n in free if fits(bundle, nodes[n])), None)
        if place is None:
            best = max(nodes, key=lambda node: len(bundle) - len(_lacking(bundle, node)), default={})
            lacking = _lacking(bundle, best)
            if not lacking:
                return f"{what} needs {len(bundles)} nodes, one with {written(bundle)}, and there are fewer; {remedy}"
            why = ", ".join(f"{name} {amount:g}" for name, amount in lacking.items())
            return f"{what} needs {written(bundle)} on one node, and none has that (the nearest has {why}); {remedy}"
        free.remove(place)
    return ""


def fits(bundle: Resources, node: Resources) -> bool:
    """Whether an empty node of this size holds the bundle."""
    return not _lacking(bundle, node)


def _lacking(bundle: Resources, node: Resources) -> dict[str, float]:
    return {name: node.get(name, 0.0) for name, amount in bundle.items() if node.get(name, 0.0) < amount}


def written(bundle: Resources) -> str:
    """Example: `2 CPU, 1 GPU, 8 GB memory`."""
    parts = [
        f"{amount / GIGABYTE:g} GB memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in bundle.items()
    ]
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------ settings


def spread_words(settings: Settings, *, resumed: bool) -> tuple[list[str], list[str]]:
    """(`name=value` words that follow from being spread, notes about them for the user). `resumed`: what a run has
    begun with stays."""
    fewest, most = bounds_of(settings.cluster, settings.generator.count)
    number = f"{fewest}..{most}" if most > fewest else str(fewest)
    words, notes = ["generator.count=0", f"cluster.generators={number}", "trainer.start=external"], []
    for name in ("generator", "trainer"):
        if gpus := getattr(settings, name).gpus:
            words.append(f"{name}.gpus=''")
            notes.append(f"{name}.gpus={gpus} is left out: Ray chooses GPUs")
    if shares_gpus(settings):
        words.append("trainer.memory_share=1")
        notes.append(
            f"trainer.memory_share={settings.trainer.memory_share:g} becomes 1: no generator gets a GPU of the trainer"
        )
    if settings.weights.transport not in ("auto", "stream"):
        words.append("weights.transport=auto")
        notes.append(f"weights.transport={settings.weights.transport} becomes auto: weights go over the network")
    if not resumed and not settings.trainer.threads and settings.trainer.device == "cpu":
        words.append(f"trainer.threads={max(1, int(plan(settings).rank['CPU']))}")
    return words, notes


def generator_words(settings: Settings) -> list[str]:
    """What each generator sets for its host: it computes with as many threads as Ray counts CPUs for it."""
    if settings.generator.device != "cpu":
        return []
    own = int(generator_cpus(settings)) - settings.generator.task_processes
    return [f"generator.threads={max(1, own)}"]


def back_to_local(recorded: Settings, words: Sequence[str]) -> list[str]:
    """Words for resuming a run of Ray on this machine alone: what Ray's words changed is taken back, `words` come last.
    Empty where the run is not one of Ray, or stays with it."""
    if recorded.cluster.engine != "ray" or "cluster.engine=local" not in words:
        return []
    usual = ClusterSettings()
    fewest, _ = bounds_of(recorded.cluster, recorded.generator.count)
    back = [
        f"generator.count={fewest}",
        f"generator.start_timeout_s={GeneratorSettings.start_timeout_s}",
        "trainer.start=launcher",
        "wire.endpoint=auto",
        "wire.keys=''",
        "weights.endpoint=auto",
        "weights.transport=auto",
    ]
    for name in ("generator_resources", "trainer_resources"):
        back += [f"cluster.{name}={{}}"] if getattr(recorded.cluster, name) else []
    for name in ("address", "generators", "scale_s", "generator_gpus", "generator_cpus", "generator_memory_gb"):
        back.append(f"cluster.{name}={getattr(usual, name)!r}")
    back += ["cluster.trainer_cpus=0", "cluster.ranks_per_node=0", "cluster.run_on=here", "cluster.grows=false"]
    return [*back, "cluster.ship=[]", *words]


def restarts(settings: Settings) -> int:
    """How often Ray starts a generator again, over the whole run."""
    chosen: GeneratorSettings = settings.generator
    return chosen.max_restarts


# ------------------------------------------------------------------------------------------------ how many generators

SLOW, QUICK = 0.15, 0.05
"""share of the time that the trainer waits for data: above the first there are too few generators, and only below the
second one may be taken away"""
IDLE = 0.3
"""share of the generators, on average over the time, that have nothing to do because they wait for permits: above it
some are too many"""
FEWEST_STEPS = 3
"""training steps of which a share is read"""
FORGET = 20.0
"""a number of generators with which the trainer waited is not gone back to for so many times `scale_s`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Who waited for whom over a stretch of a run."""

    steps: int
    """training steps that ended in it"""
    seconds: float
    """that it lasted"""
    trainer_waited_s: float
    """of those, seconds in which the trainer waited for data"""
    generators_idle: float
    """share of the connected generators that waited for permits, on average"""
    connected: int
    """generators at its end"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How many generators there should be from now on."""

    wanted: int
    reason: str = ""
    """empty: nothing changes"""


@dataclass(slots=True, kw_only=True)
class Scaler:
    """Decides how many generators a run should have, with hysteresis.

    The trainer's waits say that there are too few: if it waits a share w of its time, generation must be 1 / (1 - w)
    times as fast. Generators without permits say that there are too many. Between the two thresholds nothing changes.
    After a change it waits until the generators that were asked for are there, and then for a whole stretch. A number
    with which the trainer had to wait is remembered, so that generators are not taken away and added in turns.
    """

    fewest: int
    most: int
    scale_s: float
    wanted: int
    too_few: int = 0
    """largest number of generators with which the trainer waited; 0: none known"""
    too_few_at: float = field(default=-math.inf)
    """when that was"""

    def is_over(self, read: Reading) -> bool:
        """Whether the stretch is long enough to decide by; where steps take longer, it lasts longer."""
        return read.seconds >= self.scale_s and read.steps >= FEWEST_STEPS

    def decide(self, read: Reading, now: float) -> Decision:
        """The number after a stretch of at least `scale_s` that began when the last change was carried out. `now`:
        seconds of any clock."""
        if not self.is_over(read):
            return Decision(wanted=self.wanted)
        if now - self.too_few_at > FORGET * self.scale_s:
            self.too_few = 0
        waits = min(0.9, read.trainer_waited_s / read.seconds)
        if waits > SLOW:
            return self._more(read, waits, now)
        if waits < QUICK and read.generators_idle > IDLE and read.connected >= self.wanted:
            return self._fewer(read)
        return Decision(wanted=self.wanted)

    def _more(self, read: Reading, waits: float, now: float) -> Decision:
        self.too_few, self.too_few_at = max(self.too_few, min(read.connected, self.wanted)), now
        if read.connected < self.wanted:
            return Decision(wanted=self.wanted)  # some that were asked for have not come yet: they may be enough
        wanted = min(self.most, 2 * self.wanted, max(self.wanted + 1, math.ceil(self.wanted / (1 - waits))))
        return self._changed(wanted, f"the trainer waited for data {waits:.0%} of the last {read.seconds:.0f} s")

    def _fewer(self, read: Reading) -> Decision:
        # half of what is idle: the rest have more to do then, and the next stretch shows how much
        wanted = self.wanted - max(1, int(self.wanted * read.generators_idle / 2))
        wanted = max(self.fewest, self.too_few + 1, wanted)
        idle = f"generators waited for permits {read.generators_idle:.0%} of the last {read.seconds:.0f} s"
        return self._changed(min(wanted, self.wanted), idle)

    def _changed(self, wanted: int, reason: str) -> Decision:
        if wanted == self.wanted:
            return Decision(wanted=wanted)
        self.wanted = wanted
        return Decision(wanted=wanted, reason=reason)


Clock = Callable[[], float]
