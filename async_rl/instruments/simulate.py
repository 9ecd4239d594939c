"""A run without a model: the buffer's real state machine, and generators and a trainer that only take time.

Everything happens on a virtual clock. A generator decodes its sequences side by side, all at the speed that their
number allows; a trainer asks for the next batch when it begins to train one. Permits, staleness, batches and
refusals are decided by the same code as in a run (async_rl/buffer/core.py), so what it says of staleness is exact
for these timings. Evaluations are left out, and so is what shares a processor: see `lab/workload.py`.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, log, sqrt
from random import Random
from statistics import fmean, median

import numpy as np

from async_rl.buffer import effects as do
from async_rl.buffer.build import make_core
from async_rl.buffer.core import Core
from async_rl.buffer.store_reader import GroupRow, StoreReader, TrajectoryRow
from async_rl.config import Settings
from async_rl.errors import RunFailed, UserError
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.types import sample_seed
from async_rl.wire import messages as msg

# -------------------- workload
# What a run consists of, in seconds and tokens: given by hand, or read off a run that was made.

FEWEST_STEPS = 10
"""a run that is to be copied has at least so many"""
SKIPPED = 0.1
"""share of a run's steps at its start that are left out: everything is new then"""
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
        groups.append(tuple(max(1, round(np.exp(centre + random.gauss(0, spread)))) for _ in range(size)))
    return groups


def workload_of(folder: RunFolder) -> Workload:
    """Read off a run: lengths, decoding speed by concurrency, training time. Raises UserError."""
    rows = list(read_rows(folder.metrics))
    if len(rows) < FEWEST_STEPS:
        raise UserError(f"{folder.path} has trained {len(rows)} steps; copying a run needs {FEWEST_STEPS} at least")
    rows = rows[int(len(rows) * SKIPPED) :]
    with StoreReader(folder.store) as store:
        groups = {row.group: row for row in store.groups()}
        trained_at = {batch.step + 1: batch.trained_at for batch in store.batches()}
        trajectories = [row for row in store.trajectories() if row.ended not in ("error", "aborted")]
    lengths: dict[int, list[int]] = defaultdict(list)
    for row in trajectories:
        if row.split == "train" and row.policy_length:
            lengths[row.group].append(row.policy_length)
    between = [b["time"] - a["time"] - b["time/wait_for_batch"] for a, b in pairwise(rows)]
    fixed, per_step, per_sequence = decoding(trajectories, groups)
    return Workload(
        groups=[tuple(found) for found in lengths.values()],
        decode_s=per_step,
        decode_s_per_sequence=per_sequence,
        episode_s=fixed,
        train_s=between,
        update_s=max(0.0, update_delay(groups.values(), trained_at) - 2 * MESSAGE_S) or UPDATE_S,
        message_s=MESSAGE_S,
    )


def update_delay(groups: Iterable[GroupRow], trained_at: Mapping[int, float | None]) -> float:
    """From the buffer's hearing of new weights until a generator was given a group under them, the median over
    versions. Where generators are held back for other reasons this is longer than the update takes, and the
    simulation errs on the slow side; 0 when nothing is known."""
    first: dict[int, float] = {}
    for row in groups:
        if row.split == "train" and row.attempt == 0:
            version = row.admitted_version
            first[version] = min(row.admitted_at, first.get(version, inf))
    delays = [first[version] - at for version, at in trained_at.items() if at is not None and version in first]
    return max(0.0, median(delays)) if delays else 0.0


def decoding(trajectories: Sequence[TrajectoryRow], groups: dict[int, GroupRow]) -> tuple[float, float, float]:
    """(seconds of an episode without tokens, of a decoding step, of it for each sequence), the least squares of

        duration = fixed + tokens * (step + sequence * mean number of sequences beside it)

    over all episodes, the mean over the time of the episode on its generator."""
    by_generator: dict[str, list[TrajectoryRow]] = defaultdict(list)
    for row in trajectories:
        if row.policy_length and row.finished_at > row.started_at:
            by_generator[groups[row.group].generator].append(row)
    table, durations = [], []
    for rows in by_generator.values():
        concurrency = Concurrency(rows)
        for row in rows:
            duration = row.finished_at - row.started_at
            beside = concurrency.mean(row.started_at, row.finished_at)
            table.append((1.0, row.policy_length, row.policy_length * beside))
            durations.append(duration)
    if not table:
        raise UserError("the run has no finished episode to measure decoding by")
    return _not_negative(np.array(table), np.array(durations))


class Concurrency:
    """How many episodes ran on one generator, integrated over time."""

    def __init__(self, rows: Sequence[TrajectoryRow]) -> None:
        changes = sorted([(row.started_at, 1) for row in rows] + [(row.finished_at, -1) for row in rows])
        self.times = [changes[0][0]]
        self.integral = [0.0]
        self.running = [0]
        for at, change in changes:
            self.integral.append(self.integral[-1] + self.running[-1] * (at - self.times[-1]))
            self.times.append(at)
            self.running.append(self.running[-1] + change)

    def mean(self, start: float, end: float) -> float:
        return (self._until(end) - self._until(start)) / (end - start)

    def _until(self, at: float) -> float:
        place = bisect_right(self.times, at) - 1
        return self.integral[place] + self.running[place] * (at - self.times[place])


def _not_negative(table: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float]:
    """Least squares over the columns; one that comes out negative is left out."""
    columns = list(range(table.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(table[:, columns], wanted, rcond=None)
        bad = [column for column, value in zip(columns, found, strict=True) if value < 0]
        if not bad:
            values = dict(zip(columns, found.tolist(), strict=True))
            return values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0)
        columns.remove(bad[-1])


TRAINER = b"trainer"
SETTLING = 0.2
"""share of the steps at the start that are left out of the result"""
NO_TOKENS, NO_LOG_PROBS = np.zeros(0, np.int32), np.zeros(0, np.float32)
Key = tuple[int, int]
"""(group, sample)"""


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


@dataclass(slots=True, kw_only=True)
class Generator:
    """Sequences decoded side by side: each has decoded `done` tokens more than when the generator began."""

    peer: bytes
    work: Workload
    done: float = 0.0
    at: float = 0.0
    """when `done` was so much"""
    ends: list[tuple[float, Key]] = field(default_factory=list)
    """heap: value of `done` at which a sequence is finished"""
    running: dict[Key, tuple[msg.Permit, float]] = field(default_factory=dict)
    """its permit, and `done` at its begin"""
    waiting: deque[tuple[Key, msg.Permit, int]] = field(default_factory=deque)
    """sequences without a place, with their lengths"""
    changes: list[float] = field(default_factory=lambda: [0.0])
    versions: list[int] = field(default_factory=lambda: [0])
    """from `done` of `changes` on"""
    received: int = 0
    told: int = -1
    occupied: int = 0
    """episodes that are not over: running, waiting, or busy with what is no token"""
    plans: int = 0
    """of its next end; only the newest counts"""
    busy_s: float = 0.0
    sequence_s: float = 0.0

    def advance(self, now: float) -> None:
        """Decode until now."""
        passed, count = now - self.at, len(self.running)
        self.at = now
        if count:
            self.done += passed / self.work.token_s(count)
            self.busy_s += passed
            self.sequence_s += passed * count

    def next_end(self) -> float | None:
        """When the next sequence is finished if nothing changes."""
        while self.ends and self.ends[0][1] not in self.running:
            heapq.heappop(self.ends)
        if not self.ends:
            return None
        return self.at + max(0.0, self.ends[0][0] - self.done) * self.work.token_s(len(self.running))

    def spans(self, begun: float) -> tuple[VersionSpan, ...]:
        """Versions of the tokens that a sequence has decoded since `begun`."""
        first = bisect_right(self.changes, begun) - 1
        total = max(1, round(self.done - begun))
        edges = [0, *(min(total, max(0, round(change - begun))) for change in self.changes[first + 1 :]), total]
        pairs = zip(self.versions[first:], itertools.pairwise(edges), strict=True)
        return tuple(VersionSpan(version=v, start=a, end=b) for v, (a, b) in pairs if b > a)


@dataclass(slots=True)
class Simulation:
    """One run of `steps` steps on a virtual clock."""

    settings: Settings
    work: Workload
    steps: int
    random: Random
    core: Core = field(init=False)
    now: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    serial: itertools.count[int] = field(default_factory=itertools.count)
    generators: dict[bytes, Generator] = field(default_factory=dict)
    arrived: dict[Key, tuple[VersionSpan, ...]] = field(default_factory=dict)
    lags: Counter[int] = field(default_factory=Counter)
    """staleness -> trained tokens, of the steps that count"""
    step: int = 0
    """training steps done"""
    ready: int = -1
    """the newest step whose batch the trainer has"""
    training: bool = False
    waited: float = 0.0
    idle_since: float = 0.0
    before: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """the clocks when the steps that count began"""
    end: str = ""

    def __post_init__(self) -> None:
        self.core = make_core(self.settings, train_problems=1 << 20, vocabulary=0)

    def run(self) -> Forecast:
        """Raises RunFailed when the buffer would end the run."""
        self.tell(TRAINER, msg.Hello(role="trainer", name="trainer", pid=0))
        for number in range(self.settings.generator.count):
            peer = b"generator-%d" % number
            self.generators[peer] = Generator(peer=peer, work=self.work)
            self.tell(peer, msg.Hello(role="generator", name=peer.decode(), pid=0))
        for generator in self.generators.values():
            self.ask(generator)
        self.tell(TRAINER, msg.NextBatch(step=0))
        while self.step < self.steps:
            if not self.events or self.end:
                raise RunFailed(f"simulated run: {self.end or self.core.wait_reason(self.now)}")
            self.now, _, action = heapq.heappop(self.events)
            action()
        return self.forecast()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.serial), action))

    def tell(self, peer: bytes, message: msg.Message) -> None:
        """A message reaches the buffer now."""
        for effect in self.core.handle(peer, message, self.now):
            match effect:
                case do.Send(peer=to, message=heard) if to in self.generators:
                    generator = self.generators[to]
                    self.after(self.work.message_s, lambda g=generator, m=heard: self.hear(g, m))  # type: ignore[misc]
                case do.FormBatch(step=step, groups=groups):
                    self.count(step, groups)
                case do.RefuseGroup(group=group):
                    for sample in range(self.settings.batch.group_size):
                        self.arrived.pop((group, sample), None)
                case do.SendBatch(step=step):
                    self.after(self.work.message_s, lambda s=step: self.train(s))  # type: ignore[misc]
                case do.EndRun(reason=reason):
                    self.end = reason

    def send(self, peer: bytes, message: msg.Message) -> None:
        self.after(self.work.message_s, lambda: self.tell(peer, message))

    # ------------------------------------------------------------- generators

    def hear(self, generator: Generator, message: msg.Message) -> None:
        generator.advance(self.now)
        match message:
            case msg.Permits(permits=permits):
                for permit in permits:
                    generator.received += 1
                    lengths = self.random.choice(self.work.groups)
                    for sample in permit.samples:
                        generator.occupied += 1
                        length = lengths[sample % len(lengths)]
                        generator.waiting.append(((permit.group, sample), permit, length))
            case msg.Abandon(groups=groups):
                for key in [key for key in generator.running if key[0] in groups]:
                    self.finish(generator, key, "aborted")
            case msg.NewWeights(version=version) if version > generator.versions[-1]:
                self.after(self.work.update_s, lambda: self.swap(generator, version))
        self.go_on(generator)

    def swap(self, generator: Generator, version: int) -> None:
        generator.advance(self.now)
        generator.changes.append(generator.done)
        generator.versions.append(version)
        self.send(generator.peer, msg.Holds(version=version))

    def go_on(self, generator: Generator) -> None:
        """Begin what waits, as places are free, and plan the next end."""
        while generator.waiting and len(generator.running) < self.settings.generator.max_sequences:
            key, permit, length = generator.waiting.popleft()
            generator.running[key] = (permit, generator.done)
            heapq.heappush(generator.ends, (generator.done + length, key))
        generator.plans += 1
        if (at := generator.next_end()) is not None:
            plan = generator.plans
            self.after(at - self.now, lambda: self.reach(generator, plan))

    def reach(self, generator: Generator, plan: int) -> None:
        """The planned end, if nothing came between."""
        if plan != generator.plans:
            return
        generator.advance(self.now)
        end, key = heapq.heappop(generator.ends)
        generator.done = max(generator.done, end)
        if key in generator.running:
            self.finish(generator, key, "finished")
        self.go_on(generator)

    def finish(self, generator: Generator, key: Key, ended: str) -> None:
        """The last token is sampled; the environment and the reward take their time."""
        permit, begun = generator.running.pop(key)
        spans = generator.spans(begun)
        made = Trajectory(
            group=key[0],
            sample=key[1],
            problem=permit.problem,
            split="train",
            seed=sample_seed(permit.seed, key[1]),
            tokens=NO_TOKENS,
            log_behaviour=NO_LOG_PROBS,
            turns=(Turn(start=0, length=spans[-1].end),),
            versions=spans,
            reward=self.random.random(),
            ended=ended,  # type: ignore[arg-type]
            reason=msg.ABANDONED if ended == "aborted" else "",
            temperature=permit.temperature,
        )
        self.after(self.work.episode_s if ended == "finished" else 0.0, lambda: self.hand_in(generator, made))

    def hand_in(self, generator: Generator, made: Trajectory) -> None:
        generator.occupied -= 1
        self.arrived[made.group, made.sample] = made.versions
        self.send(generator.peer, msg.Finished(trajectories=(made,)))
        self.ask(generator)

    def ask(self, generator: Generator) -> None:
        free = max(0, self.settings.generator.max_sequences - generator.occupied) // self.settings.batch.group_size
        limit = generator.received + free
        if limit > generator.told:
            generator.told = limit
            self.send(generator.peer, msg.Want(limit=limit, version=generator.versions[-1]))

    # ---------------------------------------------------------------- trainer

    def train(self, step: int) -> None:
        """The batch is there; the trainer begins with it when it is done with the one before."""
        self.ready = step
        self.begin()

    def begin(self) -> None:
        if self.training or self.ready != self.step:
            return
        self.training = True
        self.waited += self.now - self.idle_since
        if self.step + 1 < self.steps:
            self.send(TRAINER, msg.NextBatch(step=self.step + 1))
        self.after(self.random.choice(self.work.train_s), self.trained)

    def trained(self) -> None:
        self.training = False
        self.idle_since = self.now
        self.step += 1
        if self.step == self.settled:
            self.before = self.clocks()
        self.send(TRAINER, msg.Published(version=self.step))
        self.begin()

    # ----------------------------------------------------------------- result

    @property
    def settled(self) -> int:
        """The first step that counts."""
        return int(self.steps * SETTLING)

    def clocks(self) -> tuple[float, float, float, float]:
        """Now, and seconds so far: of waiting, of decoding, of decoding summed over sequences."""
        for generator in self.generators.values():
            generator.advance(self.now)
        busy = sum(g.busy_s for g in self.generators.values())
        return self.now, self.waited, busy, sum(g.sequence_s for g in self.generators.values())

    def count(self, step: int, groups: Iterable[int]) -> None:
        """The staleness of a batch that was formed."""
        for group in groups:
            for sample in range(self.settings.batch.group_size):
                for span in self.arrived.pop((group, sample)):
                    if step >= self.settled:
                        self.lags[step - span.version] += span.end - span.start

    def forecast(self) -> Forecast:
        seconds, waited, busy, sequences = (b - a for a, b in zip(self.before, self.clocks(), strict=True))
        tokens = self.lags.total()
        numbers = self.core.batching.numbers()
        return Forecast(
            step_s=seconds / (self.steps - self.settled),
            tokens_per_s=tokens / seconds,
            lag_mean=sum(lag * count for lag, count in self.lags.items()) / max(1, tokens),
            lag_share={lag: self.lags[lag] / tokens for lag in sorted(self.lags)},
            trainer_idle=waited / seconds,
            generator_idle=1 - busy / seconds / len(self.generators),
            running=sequences / busy if busy else 0.0,
            groups_dropped=int(numbers.get("drop/groups", 0)),
            length_bias=numbers.get("drop/len_bias"),
            held_up=int(numbers["held_up/batches"]),
        )
