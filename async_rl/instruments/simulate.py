"""A run without a model: the buffer's real state machine, and generators and a trainer that only take time.

Everything happens on the virtual clock of one simulated world (instruments/world), in which nothing goes wrong. A
generator decodes its sequences side by side, all at the speed that their number allows; the trainer asks for the next
batch when it begins to train one. Permits, staleness, batches and refusals are decided by the same code as in a run
(async_rl/buffer/core.py), so the staleness that is forecast is exact for these times. Evaluations are left out, and so
is the sharing of processors: processes are as fast as they were measured side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log, sqrt
from random import Random
from statistics import fmean

from async_rl.buffer import effects as do
from async_rl.buffer.build import make_core
from async_rl.buffer.core import Core
from async_rl.config import Settings
from async_rl.config.sampler import SamplerSettings
from async_rl.errors import RunFailed
from async_rl.instruments.world.buffer import WorldWatch
from async_rl.instruments.world.clock import Network
from async_rl.instruments.world.decoding import SideBySide
from async_rl.instruments.world.generator import Pair, SimulatedGenerator
from async_rl.instruments.world.world import World, WorldPlan
from async_rl.trajectory import VersionSpan
from async_rl.wire import messages as msg

UPDATE_S, MESSAGE_S = 0.02, 0.003
"""taken where a run does not show them"""
MADE_GROUPS = 512
"""of a length distribution that is given by hand"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Example: `Workload(groups=((40, 55), (31, 90)), decode_s=0.002, decode_s_per_sequence=1e-4, episode_s=0.01,
    train_s=(0.15,), update_s=0.02, message_s=0.002)`."""

    groups: Sequence[Sequence[int]]
    """policy tokens of the trajectories of groups, from which the simulated ones are drawn"""
    decode_s: float
    """one decoding step with hardly a sequence"""
    decode_s_per_sequence: float
    """more of it for each running sequence"""
    episode_s: float
    """of an episode apart from its tokens: prompt, environment, reward"""
    train_s: Sequence[float]
    """of training steps, with everything the trainer does for them but waiting for data; simulated ones are drawn
    from these"""
    update_s: float
    """from the publication of weights until a generator samples from them"""
    message_s: float
    """a message on its way"""

    def token_s(self, running: int) -> float:
        """Seconds for one token of each of `running` sequences."""
        return self.decode_s + self.decode_s_per_sequence * running

    @property
    def mean_length(self) -> float:
        return fmean(length for group in self.groups for length in group)


def lognormal_groups(*, mean: float, variation: float, size: int, seed: int) -> list[tuple[int, ...]]:
    """Lengths with this mean and coefficient of variation, tokens; half of their spread lies between groups."""
    random = Random(seed)
    variance = log(1 + variation**2)
    spread = sqrt(variance / 2)
    groups = []
    for _ in range(MADE_GROUPS):
        centre = log(mean) - variance / 2 + random.gauss(0, spread)
        groups.append(tuple(max(1, round(exp(centre + random.gauss(0, spread)))) for _ in range(size)))
    return groups


SETTLING = 0.2
"""share of the steps at the start that are left out of the result"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a simulated run came to, without its first steps."""

    step_s: float
    tokens_per_s: float
    """trained"""
    lag_mean: float
    """staleness of trained tokens, steps"""
    lag_share: dict[int, float]
    """share of the trained tokens by staleness"""
    trainer_idle: float
    """share of the time it waited for data"""
    generator_idle: float
    """share of the time without a running sequence, mean over generators"""
    running: float
    """sequences decoded side by side, mean over generators and the time they were busy"""
    groups_dropped: int
    length_bias: float | None
    """mean length of dropped over trained trajectories"""
    held_up: int
    """batches that waited for running groups although enough others were finished"""

    @property
    def lag_max(self) -> int:
        return max(self.lag_share, default=0)


@dataclass(frozen=True, slots=True)
class WorkTimes:
    """The times of a workload. What is no part of it takes none."""

    work: Workload
    random: Random

    def start(self) -> float:
        return 0.0

    def load(self) -> float:
        return self.work.update_s

    def hand_in(self) -> float:
        return 0.0

    def train(self) -> float:
        return self.random.choice(self.work.train_s)

    def publish(self) -> float:
        return 0.0

    def save(self) -> float:
        return 0.0


@dataclass(slots=True)
class Tally(WorldWatch):
    """Counts staleness as batches are formed, and notices the steps."""

    settled: int
    """the first step that counts"""
    group_size: int
    clocks: Callable[[], tuple[float, float, float, float]]
    arrived: dict[Pair, tuple[VersionSpan, ...]] = field(default_factory=dict)
    """versions of the tokens of trajectories in no batch"""
    lags: Counter[int] = field(default_factory=Counter)
    """staleness -> trained tokens, of the steps that count"""
    steps: int = 0
    """training steps done"""
    before: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """the clocks when the steps that count began"""

    def written(self, effects: Sequence[do.Effect]) -> None:
        for effect in effects:
            match effect:
                case do.AddTrajectories(trajectories=trajectories):
                    self.arrived.update(((t.group, t.sample), t.versions) for t in trajectories)
                case do.RefuseGroup(group=group):
                    for sample in range(self.group_size):
                        self.arrived.pop((group, sample), None)
                case do.FormBatch(step=step, groups=groups):
                    self._count(step, groups)

    def trained(self, step: int, batch: msg.Batch) -> None:
        self.steps = step + 1
        if self.steps == self.settled:
            self.before = self.clocks()

    def _count(self, step: int, groups: Iterable[int]) -> None:
        for group in groups:
            for sample in range(self.group_size):
                for span in self.arrived.pop((group, sample)):
                    if step >= self.settled:
                        self.lags[step - span.version] += span.end - span.start


@dataclass(slots=True)
class Simulation:
    """One run of `steps` steps in a world in which nothing goes wrong."""

    settings: Settings
    work: Workload
    steps: int
    random: Random
    tally: Tally = field(init=False)
    world: World = field(init=False)
    decoders: list[SideBySide] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)
    """of episodes that were cut (`SideBySide.left`)"""

    def __post_init__(self) -> None:
        chosen = self.settings.generator
        plan = WorldPlan(
            seed=0,
            steps=self.steps,
            generators=chosen.count,
            sequences=chosen.max_sequences,
            decoder=self._decoder,
            network=Network(delay_s=self.work.message_s, exact=True),
            reports=False,
        )
        plain = replace(self.settings, sampler=SamplerSettings())  # here no problem is harder than another
        self.tally = Tally(int(self.steps * SETTLING), self.settings.batch.group_size, self._clocks)
        self.world = World(
            plan,
            # which problem stands at a position says nothing here, and to shuffle them would take the most time
            lambda: Core(make_core(plain, train_problems=1, vocabulary=0).rules, problem_at=int),
            watch=self.tally,
            new_times=lambda clock: WorkTimes(self.work, self.random),
        )

    def run(self) -> Forecast:
        """Raises RunFailed when the buffer would end the run."""
        world = self.world
        while self.tally.steps < self.steps:
            if not world.clock.events or world.failure:
                reason = world.failure or world.buffer.core.wait_reason(world.clock.now)
                raise RunFailed(f"simulated run: {reason}")
            world.clock.step()
        return self._forecast()

    def _decoder(self, generator: SimulatedGenerator) -> SideBySide:
        decoder = SideBySide(
            generator=generator,
            lengths=lambda permit: self.random.choice(self.work.groups),
            token_s=self.work.token_s,
            episode_s=self.work.episode_s,
            reward=self.random.random,
            window=self.settings.rollout.window,
            left=self.left,
        )
        self.decoders.append(decoder)
        return decoder

    def _clocks(self) -> tuple[float, float, float, float]:
        """Now, and seconds so far: of the trainer's waiting, of decoding, of decoding summed over sequences."""
        for decoder in self.decoders:
            decoder.advance()
        busy = sum(decoder.busy_s for decoder in self.decoders)
        sequences = sum(decoder.sequence_s for decoder in self.decoders)
        return self.world.clock.now, self.world.trainer.waited_s, busy, sequences

    def _forecast(self) -> Forecast:
        seconds, waited, busy, sequences = (b - a for a, b in zip(self.tally.before, self._clocks(), strict=True))
        lags = self.tally.lags
        tokens = lags.total()
        counters = self.world.buffer.core.counters()
        dropped = counters.dropped.metrics() if counters.dropped is not None else {}
        return Forecast(
            step_s=seconds / (self.steps - self.tally.settled),
            tokens_per_s=tokens / seconds,
            lag_mean=sum(lag * count for lag, count in lags.items()) / max(1, tokens),
            lag_share={lag: lags[lag] / tokens for lag in sorted(lags)},
            trainer_idle=waited / seconds,
            generator_idle=1 - busy / seconds / len(self.decoders),
            running=sequences / busy if busy else 0.0,
            groups_dropped=counters.dropped.groups if counters.dropped is not None else 0,
            length_bias=dropped.get("drop/len_bias"),
            held_up=counters.batches_held_up,
        )
