"""How episodes of a simulated generator take their time: turn by turn at random, or side by side as in an engine."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from async_rl.instruments.world.generator import Pair, SimulatedGenerator
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.given import GIVEN, OPEN, Given
from async_rl.trajectory.types import sample_seed
from async_rl.wire import messages as msg

NO_TOKENS, NO_LOG_PROBS = np.zeros(0, np.int32), np.zeros(0, np.float32)


def answer(permit: msg.Permit, sample: int, **values: Any) -> Trajectory:
    """A trajectory of a permit's group."""
    if permit.start is not None:
        values["info"] = {GIVEN: "", **values.get("info", {})}  # it did not fit
    return Trajectory(
        group=permit.group,
        sample=sample,
        problem=permit.problem,
        split=permit.split,
        seed=sample_seed(permit.seed, sample),
        temperature=permit.temperature,
        **values,
    )


# -------------------- turn by turn


@dataclass(slots=True)
class SimulatedEpisode:
    """A prompt token, then one token a turn."""

    permit: msg.Permit
    sample: int
    num_turns: int
    """it will have"""
    pause_s: float
    """mean of a turn"""
    versions: list[int] = field(default_factory=list)
    """of the turns it has"""
    version: int = 0
    """of the turn that is sampled: the weights at its begin"""

    @property
    def given(self) -> tuple[tuple[int, int], ...]:
        """Turns of its earlier pieces."""
        start = self.permit.start
        return start.turns if start is not None and start.source == "window" else ()

    def trajectory(self, **end: Any) -> Trajectory:
        many, first = len(self.versions), 1 + len(self.given)
        if self.given:
            end["info"] = {**end.get("info", {}), GIVEN: Given(stretches=self.given).write()}
        reward = (31 * self.permit.group + self.sample) * 0x9E3779B9 >> 16 & 1
        return answer(
            self.permit,
            self.sample,
            tokens=np.arange(many + first, dtype=np.int32),
            log_behaviour=np.array([0.0] * first + [-1.0] * many, np.float32),
            turns=tuple(Turn(start=first + i, length=1) for i in range(many)),
            versions=tuple(
                VersionSpan(version=v, start=first + i, end=first + 1 + i) for i, v in enumerate(self.versions)
            ),
            **{"reward": float(reward), **end},
        )


@dataclass(slots=True, eq=False, kw_only=True)
class TurnByTurn:
    """Episodes of one to three turns, each of a random time; some save their turns on the way, some fail."""

    generator: SimulatedGenerator
    turn_s: float
    """mean time of a turn in a fast episode"""
    spread: float
    """ratio of slow to fast episodes"""
    failure: float
    """chance that an episode fails"""
    saving: float
    """chance that a turn is saved before the next one begins"""
    window: int = 0
    """turns behind which an episode is cut; 0: it is whole"""
    episodes: dict[Pair, SimulatedEpisode] = field(default_factory=dict)

    @property
    def running(self) -> Collection[Pair]:
        return self.episodes.keys()

    @property
    def occupied(self) -> int:
        return len(self.episodes)

    def start(self, permit: msg.Permit, sample: int, record: Trajectory | None) -> None:
        random = self.generator.clock.random
        pause_s = self.turn_s * self.spread ** random.random()
        episode = SimulatedEpisode(permit, sample, num_turns=random.randint(1, self._longest(permit)), pause_s=pause_s)
        if record is not None:
            episode.versions = [span.version for span in record.versions]
            episode.num_turns = max(episode.num_turns, len(episode.versions))
        self.episodes[permit.group, sample] = episode
        self._go_on(episode)

    def _is_cut(self, episode: SimulatedEpisode) -> bool:
        return episode.permit.split == "train" and len(episode.versions) == self.window > 0

    def _longest(self, permit: msg.Permit) -> int:
        """Turns of the longest episode, or piece of one."""
        return self.window if self.window and permit.split == "train" else permit.max_turns or 3

    def swap(self, version: int) -> None:
        pass

    def abandon(self, groups: Collection[int]) -> None:
        for pair in [pair for pair in self.episodes if pair[0] in groups]:
            self._end(pair, ended="aborted", reason=msg.ABANDONED)

    def turns(self, pairs: Collection[Pair]) -> list[Trajectory]:
        found = [self.episodes[pair] for pair in pairs if pair in self.episodes]
        return [
            episode.trajectory(ended="aborted", info={"turns_stopped": "1"})
            for episode in found
            if episode.versions and episode.permit.split == "train"
        ]

    def clear(self) -> None:
        self.episodes.clear()

    def poll(self) -> None:
        pass

    def _go_on(self, episode: SimulatedEpisode) -> None:
        episode.version = self.generator.version
        pause = self.generator.clock.about(episode.pause_s)
        self.generator.after(pause, lambda: self._turn(episode))

    def _turn(self, episode: SimulatedEpisode) -> None:
        pair = episode.permit.group, episode.sample
        if self.episodes.get(pair) is not episode:
            return
        clock = self.generator.clock
        if len(episode.versions) < episode.num_turns:
            episode.versions.append(episode.version)
        if len(episode.versions) < episode.num_turns:
            if clock.chance(self.saving):
                self.generator.send_turns([pair])
            self._go_on(episode)
        elif self._is_cut(episode) and clock.chance(0.7):
            self._end(pair, ended="window", reward=0.0, info={OPEN: "between"})
        elif clock.chance(self.failure):
            self._end(pair, ended="error", reason="RewardError: no")
        else:
            self._end(pair, ended="finished")

    def _end(self, pair: Pair, **end: Any) -> None:
        self.generator.ended(self.episodes.pop(pair).trajectory(**end))


# -------------------- side by side


@dataclass(slots=True, eq=False, kw_only=True)
class SideBySide:
    """Sequences decoded side by side, all at the speed that their number allows.

    Progress is one number for all of them: `done`, the tokens that a sequence has decoded which has run from the
    start. A sequence begun at `done = b` with `n` tokens is finished at `done = b + n`.
    """

    generator: SimulatedGenerator
    lengths: Callable[[msg.Permit], Collection[int]]
    """tokens of the samples of a group"""
    token_s: Callable[[int], float]
    """seconds for one token of each of so many sequences"""
    episode_s: float
    """of an episode apart from its tokens"""
    reward: Callable[[], float]
    window: int = 0
    """tokens behind which an episode is cut; 0: it is whole"""
    left: dict[int, int] = field(default_factory=dict)
    """seed of an episode that was cut -> tokens that it still has; of all generators"""
    cut: set[Pair] = field(default_factory=set)
    """sequences that end with the window"""
    done: float = 0.0
    at: float = 0.0
    """when `done` was so much"""
    ends: list[tuple[float, Pair]] = field(default_factory=list)
    """heap: value of `done` at which a sequence is finished"""
    decoding: dict[Pair, tuple[msg.Permit, float]] = field(default_factory=dict)
    """its permit, and `done` at its begin"""
    waiting: deque[tuple[Pair, msg.Permit, int]] = field(default_factory=deque)
    """sequences without a place, with their lengths"""
    changes: list[float] = field(default_factory=lambda: [0.0])
    versions: list[int] = field(default_factory=lambda: [0])
    """from `done` of `changes` on"""
    occupied: int = 0
    """episodes that are not over: decoding, waiting, or busy with what is no token"""
    plans: int = 0
    """of its next end; only the newest counts"""
    busy_s: float = 0.0
    sequence_s: float = 0.0
    """seconds of decoding, summed over sequences"""
    group: tuple[msg.Permit, list[int]] | None = None
    """the newest group and its lengths"""

    @property
    def running(self) -> Collection[Pair]:
        return {*self.decoding, *(pair for pair, _, _ in self.waiting)}

    def start(self, permit: msg.Permit, sample: int, record: Trajectory | None) -> None:
        if self.group is None or self.group[0] is not permit:
            self.group = permit, list(self.lengths(permit))
        lengths = self.group[1]
        length = self.left.pop(permit.seed, 0) or lengths[sample % len(lengths)]
        pair = permit.group, sample
        if self.window and length > self.window:
            self.left[permit.seed] = length - self.window
            self.cut.add(pair)
            length = self.window
        self.occupied += 1
        self.waiting.append((pair, permit, length))

    def swap(self, version: int) -> None:
        self.advance()
        if version > self.versions[-1]:
            self.changes.append(self.done)
            self.versions.append(version)

    def abandon(self, groups: Collection[int]) -> None:
        self.advance()
        for pair in [pair for pair in self.decoding if pair[0] in groups]:
            self._end(pair, "aborted")

    def turns(self, pairs: Collection[Pair]) -> list[Trajectory]:
        return []

    def clear(self) -> None:
        self.decoding.clear()
        self.waiting.clear()
        self.occupied = 0

    def advance(self) -> None:
        """Decode until now."""
        now = self.generator.clock.now
        passed, count = now - self.at, len(self.decoding)
        self.at = now
        if count:
            self.done += passed / self.token_s(count)
            self.busy_s += passed
            self.sequence_s += passed * count

    def poll(self) -> None:
        """Begin what waits, as places are free, and plan the next end."""
        self.advance()
        while self.waiting and len(self.decoding) < self.generator.sequences:
            pair, permit, length = self.waiting.popleft()
            self.decoding[pair] = (permit, self.done)
            heapq.heappush(self.ends, (self.done + length, pair))
        self.plans += 1
        if (pause := self._next_end()) is not None:
            plan = self.plans
            self.generator.after(pause, lambda: self._reach(plan))

    def _next_end(self) -> float | None:
        """Seconds until the next sequence is finished if nothing changes."""
        while self.ends and self.ends[0][1] not in self.decoding:
            heapq.heappop(self.ends)
        if not self.ends:
            return None
        return max(0.0, self.ends[0][0] - self.done) * self.token_s(len(self.decoding))

    def _reach(self, plan: int) -> None:
        """The planned end, if nothing came between."""
        if plan != self.plans:
            return
        self.advance()
        end, pair = heapq.heappop(self.ends)
        self.done = max(self.done, end)
        if pair in self.decoding:
            self._end(pair, "finished")
        self.poll()

    def _end(self, pair: Pair, ended: str) -> None:
        """The last token is sampled; environment and reward take their time."""
        permit, begun = self.decoding.pop(pair)
        spans = self._spans(begun)
        is_cut = pair in self.cut
        self.cut.discard(pair)
        made = answer(
            permit,
            pair[1],
            tokens=NO_TOKENS,
            log_behaviour=NO_LOG_PROBS,
            turns=(Turn(start=1, length=spans[-1].end),),
            versions=spans,
            reward=0.0 if is_cut else self.reward(),
            ended="window" if is_cut and ended == "finished" else ended,
            info={OPEN: "between"} if is_cut else {},
            reason=msg.ABANDONED if ended == "aborted" else "",
        )
        self.generator.after(self.episode_s if ended == "finished" else 0.0, lambda: self._hand_in(made))

    def _hand_in(self, made: Trajectory) -> None:
        self.occupied -= 1
        self.generator.ended(made)

    def _spans(self, begun: float) -> tuple[VersionSpan, ...]:
        """Versions of the tokens that a sequence has decoded since `done` was `begun`."""
        first = bisect_right(self.changes, begun) - 1
        total = max(1, round(self.done - begun))
        edges = [0, *(min(total, max(0, round(change - begun))) for change in self.changes[first + 1 :]), total]
        pairs = zip(self.versions[first:], pairwise(edges), strict=True)
        return tuple(VersionSpan(version=v, start=a, end=b) for v, (a, b) in pairs if b > a)
