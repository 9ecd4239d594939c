"""Is a trajectory what its generator says? (`Verifier`, on the trainer's side.)

The buffer sends a sample of what every generator reports. The tokens are scored under the versions they name, while
the trainer waits or between two steps; episodes are played again in a process of their own (replays.py). What is found
becomes a proof, or not, in suspicion.py; the buffer carries it out (buffer/trust.py).

Who waits for whom: nobody waits for the verifier, and permits and batches go on meanwhile.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from async_rl.config import Settings
from async_rl.events import RecordEvent, RewardsNotRepeatable, TrajectoryDoubted
from async_rl.trainer.held_versions import HeldOverRanks, HeldVersions
from async_rl.trainer.lanes import one_lane
from async_rl.trainer.ranks import is_sharded
from async_rl.trainer.replays import Replays
from async_rl.trainer.rescoring import (
    EDGE,
    FAR,
    IMPLAUSIBLE,
    OUTSIDE,
    TILTS,
    Mismatch,
    Numbers,
    Scored,
    Wanted,
    implausibility,
    mismatch,
    outside,
    sampled,
    temperatures,
)
from async_rl.trainer.suspicion import CHECKS, Suspicion
from async_rl.trajectory import Trajectory
from async_rl.weights.canary import tolerance_of
from async_rl.wire import messages as msg

if TYPE_CHECKING:
    from async_rl.trainer.learner import Learner
    from async_rl.trainer.publication import Publication
    from async_rl.trainer.publish import Publisher
    from async_rl.trainer.replays import Played
    from async_rl.trainer.team import Team

SETTLE_S = 2.0
"""longest wait for episodes that are being played again, between two steps"""
MOST_BEHIND = 8
"""episodes that are waited for while START_S lasts"""
START_S = 10.0
"""in all, of a whole run"""
MOST_PENDING = 512
"""trajectories that wait to be scored; older ones are given up"""

Life = tuple[str, int]
"""(name, session) of a generator"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What the settings say to the verifier."""

    dtype: str
    """of the engine"""
    tolerance: float
    """of the mismatch of a trajectory's log-probs, nats"""
    seeded: bool
    """the engine draws tokens by the uniforms that seeds prescribe"""
    mixes: bool
    """tokens behind an update are sampled from a mixture of two versions (kv_on_update=keep)"""
    most_tokens: int
    """of one forward"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A trajectory that is to be scored."""

    life: Life
    trajectory: Trajectory


@dataclass(slots=True)
class Scores:
    """What was found of the policy tokens [t] of one trajectory, each under the version it names."""

    positions: NDArray[np.int64]  # [t]
    versions: NDArray[np.int64]  # [t]
    known: NDArray[np.bool_]
    """[t] whether it was scored"""
    scored: Scored

    @classmethod
    def empty(cls, trajectory: Trajectory) -> Scores:
        positions, versions = trajectory.policy_positions(), trajectory.policy_versions()
        n = len(positions)
        nothing = Scored(log_prob=np.zeros(n), below=np.zeros(n), upto=np.ones(n), tilted=np.zeros((n, len(TILTS))))
        return cls(positions, versions, np.zeros(n, bool), nothing)

    def put(self, at: NDArray[np.bool_], found: Scored) -> None:
        """The scores of the tokens `at` [t]."""
        self.known |= at
        for name in ("log_prob", "below", "upto", "tilted"):
            getattr(self.scored, name)[at] = getattr(found, name)

    def of(self, at: NDArray[np.bool_]) -> Scored:
        """Of the tokens `at` [t] only."""
        one = self.scored
        return Scored(log_prob=one.log_prob[at], below=one.below[at], upto=one.upto[at], tilted=one.tilted[at])


@dataclass(slots=True)
class Counted:
    """Of a step's row."""

    checked: int = 0
    skipped: int = 0
    replayed: int = 0
    wrong: int = 0
    mismatches: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Verifier:
    """Scores what the buffer sends. One of a run, on the leader."""

    learner: Learner
    held: HeldVersions | HeldOverRanks
    options: VerifyOptions
    send: Callable[[msg.Message], None]
    record: RecordEvent
    replays: Replays
    pending: deque[Pending] = field(default_factory=deque)
    limit: Mismatch = field(init=False)
    suspicions: dict[tuple[Life, str], Suspicion] = field(default_factory=dict)
    """(life, kind of check) -> its statistic"""
    doubted: set[tuple[Life, str]] = field(default_factory=set)
    """(life, lie) that was reported"""
    unrepeatable: set[tuple[Life, str, int]] = field(default_factory=set)
    """(life, split, problem) whose replay came out otherwise: it counts once"""
    random: np.random.Generator = field(default_factory=np.random.default_rng)
    counted: Counted = field(default_factory=Counted)
    start_s: float = START_S
    """left of START_S"""

    def __post_init__(self) -> None:
        self.limit = Mismatch(dtype=self.options.dtype, tolerance=self.options.tolerance)

    def receive(self, message: msg.Verify) -> None:
        """Take in what the buffer sends; nothing is computed yet."""
        for trajectory in message.trajectories:
            life = (message.name, message.session)
            self.pending.append(Pending(life=life, trajectory=trajectory))
            self.replays.ask(life, trajectory)
        while len(self.pending) > MOST_PENDING:
            self.pending.popleft()
            self.counted.skipped += 1

    def work(self) -> None:
        """Score what has come. The learner must be between two steps."""
        for played in self.replays.settle(self._patience()):
            self._judge_replay(played)
        if not self.pending:
            return
        started = time.monotonic()
        # what names weights that do not exist yet waits for them: it cannot be theirs
        taken = [one for one in self.pending if one.trajectory.version_max <= self.learner.version]
        self.pending = deque(one for one in self.pending if one.trajectory.version_max > self.learner.version)
        for one, scores in zip(taken, self._scored(taken), strict=True):
            if scores is None or not scores.known.any():
                self.counted.skipped += 1
                continue
            self.counted.checked += 1
            self._judge(one, scores)
        self.counted.seconds += time.monotonic() - started

    def _patience(self) -> float:
        """Seconds to wait for episodes that are being played again: some where somebody's rewards are in doubt, so that
        less is trained on them, and at the start, when the child is still reading its data."""
        doubt = any(suspicion.level > 1.5 for (_, check), suspicion in self.suspicions.items() if check == "rewards")
        if doubt or self.replays.confirming:
            return SETTLE_S
        if self.replays.pending < MOST_BEHIND or self.start_s <= 0:
            return 0.0
        self.start_s -= SETTLE_S
        return SETTLE_S

    def row(self) -> dict[str, float]:
        """The columns verify/* of the step's metric row: what was verified since the last."""
        found, self.counted = self.counted, Counted()
        row = {
            "verify/checked": float(found.checked),
            "verify/skipped": float(found.skipped),
            "verify/replayed": float(found.replayed),
            "verify/wrong": float(found.wrong),
            "time/verify": found.seconds,
        }
        if found.mismatches:
            row["verify/mismatch"] = max(found.mismatches)
            row["verify/limit"] = self.limit.limit
        return row

    def close(self) -> None:
        self.replays.close()

    # ------------------------------------------------------------------ scoring

    def _scored(self, taken: Sequence[Pending]) -> Iterable[Scores | None]:
        """The scores of each trajectory, as far as its versions are held."""
        found = [Scores.empty(one.trajectory) for one in taken]
        held = self.held.versions()
        of_version: dict[int, list[int]] = defaultdict(list)
        for number, scores in enumerate(found):
            for version in set(scores.versions.tolist()) & held:
                if not self.options.mixes or version == scores.versions[0]:
                    of_version[version].append(number)
        for version, numbers in of_version.items():
            at = [found[n].versions == version for n in numbers]
            wanted = [
                Wanted(trajectory=taken[n].trajectory, positions=found[n].positions[rows])
                for n, rows in zip(numbers, at, strict=True)
            ]
            for number, rows, scored in zip(numbers, at, self._under(version, wanted), strict=True):
                found[number].put(rows, scored)
        return found

    def _under(self, version: int, wanted: Sequence[Wanted]) -> list[Scored]:
        with one_lane(self.learner.options.arithmetic.lanes):
            return self.held.score(version, wanted, most_tokens=self.options.most_tokens)

    # ------------------------------------------------------------------ judging

    def _judge(self, one: Pending, scores: Scores) -> None:
        """Compare a trajectory with its scores."""
        trajectory, known = one.trajectory, scores.known
        positions, scored = scores.positions[known], scores.of(known)
        found = mismatch(trajectory, positions, scored.log_prob)
        slack = self._slack(one, scores)
        mean, limit = float(found.mean()), self.limit.limit
        far = self.options.dtype == "float32" and bool((found > FAR * (limit + slack)).any())
        wrong = mean > limit + slack.mean() or far
        self.counted.mismatches.append(mean)
        if mean <= limit:
            self.limit.seen.append(mean)
        lie, reason = "log-probs", ""
        if wrong:
            lie, reason = self._explain(one, scores, mean, limit)
        drawn = sampled(trajectory)[positions]
        false_tokens = self._false_tokens(trajectory, positions[drawn], scores.of(_within(known, drawn)), slack[drawn])
        if false_tokens and not (wrong and lie == "versions"):  # log-probs of other tokens differ, too
            self._add(one, "tokens", "tokens", false_tokens)
            self._add(one, "log-probs", "tokens", false_tokens if wrong else "")
            return
        if not false_tokens:
            self._add(one, "tokens", "tokens", "")
        self._add(one, "log-probs", lie, reason)

    def _slack(self, one: Pending, scores: Scores) -> Numbers:  # [known tokens]
        """How far tokens may be from the version they name because part of what they saw was computed under the one
        before (kv_on_update=keep, a prompt that an update fell into): twice what lies between the two versions. Where
        that one is not held, everything is possible."""
        known = scores.known
        if not self.options.mixes:
            return np.zeros(int(known.sum()))
        before = int(scores.versions[0]) - 1
        if before < 0:
            return np.zeros(int(known.sum()))
        if before not in self.held.versions():
            return np.full(int(known.sum()), np.inf)
        wanted = Wanted(trajectory=one.trajectory, positions=scores.positions[known])
        other = self._under(before, [wanted])[0]
        return 2 * np.abs(other.log_prob - scores.scored.log_prob[known])

    def _explain(self, one: Pending, scores: Scores, mean: float, limit: float) -> tuple[str, str]:
        """(lie, in words): log-probs that are not those of the version named may be those of another one."""
        trajectory, known = one.trajectory, scores.known
        named = f"version {_spans(scores.versions[known])}"
        said = f"its log-probs differ from those of {named} by {mean:.3g} nats a token (limit {limit:.1g})"
        for version in sorted(self.held.versions() - set(scores.versions[known].tolist()), reverse=True):
            wanted = Wanted(trajectory=trajectory, positions=scores.positions[known])
            other = self._under(version, [wanted])[0]
            if float(mismatch(trajectory, wanted.positions, other.log_prob).mean()) <= limit:
                return "versions", f"it names {named}, and its log-probs are those of version {version}"
        return "log-probs", said

    def _false_tokens(
        self, trajectory: Trajectory, positions: NDArray[np.int64], scored: Scored, slack: Numbers
    ) -> str:
        """Why its tokens were not sampled from the policy; empty: they may have been."""
        n = len(positions)
        if n == 0:
            return ""
        if not self.options.seeded:
            bits = implausibility(scored, slack=self.limit.limit + float(slack.mean()), random=self.random)
            if bits <= IMPLAUSIBLE:
                return ""
            return f"its {n} tokens are e^{bits:.0f} times likelier from elsewhere than from the policy"
        edge = EDGE[self.options.dtype] / np.minimum(1.0, temperatures(trajectory)[positions]) + slack
        wrong = int(outside(trajectory, positions, scored, edge).sum())
        if wrong <= OUTSIDE[self.options.dtype] * n:
            return ""
        return f"{wrong} of its {n} tokens are not those that its seed prescribes"

    def _judge_replay(self, played: Played) -> None:
        """Take in what came of an episode that was played again."""
        self.counted.replayed += played.whole
        if played.unlike:
            self.record(RewardsNotRepeatable(step=self.learner.version, reason=played.reason))
            return
        one = Pending(life=played.ticket, trajectory=played.trajectory)
        problem = (one.life, played.trajectory.split, played.trajectory.problem)
        self._add(one, "prompts", "prompts", played.reason if played.lie == "prompts" else "")
        if not played.whole:
            return
        reason = played.reason if played.lie == "rewards" else ""
        if reason and problem in self.unrepeatable:
            if self.suspicions[one.life, "rewards"].proves and self.replays.sure:
                self._tell(one, "rewards", reason, proven=True)
            return
        if reason:
            self.unrepeatable.add(problem)
        self._add(one, "rewards", "rewards", reason, sure=self.replays.sure)

    def _add(self, one: Pending, check: str, lie: str, reason: str, *, sure: bool = True) -> None:
        """One more finding about a generator; an empty reason: all is well. `sure`: it may prove something."""
        assert check in CHECKS
        suspicion = self.suspicions.setdefault((one.life, check), Suspicion())
        proven = suspicion.add(bool(reason))
        if reason:
            self._tell(one, lie, reason, proven=proven and sure)

    def _tell(self, one: Pending, lie: str, reason: str, *, proven: bool) -> None:
        """Record a finding, and tell the buffer what it is to do."""
        self.counted.wrong += 1
        trajectory = one.trajectory
        where = f"sample {trajectory.sample} of group {trajectory.group}: {reason}"
        if (one.life, lie) not in self.doubted:
            self.doubted.add((one.life, lie))
            self.record(
                TrajectoryDoubted(
                    name=one.life[0],
                    lie=lie,
                    step=self.learner.version,
                    group=trajectory.group,
                    sample=trajectory.sample,
                    reason=reason,
                )
            )
        self.send(msg.Verdict(name=one.life[0], session=one.life[1], lie=lie, reason=where, proven=proven))


def _within(known: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of the known tokens, [t] with k of them, those that are drawn [k]: [t]."""
    found = known.copy()
    found[known] = drawn
    return found


def _spans(versions: NDArray[np.int64]) -> str:
    low, high = int(versions.min()), int(versions.max())
    return str(low) if low == high else f"{low} to {high}"


def make_verifier(
    settings: Settings,
    learner: Learner,
    publisher: Publisher | Publication,
    *,
    team: Team,
    run: str,
    send: Callable[[msg.Message], None],
    record: RecordEvent,
) -> Verifier:
    """The verifier of a run with a `verify.share`. `run`: its folder."""
    chosen = settings.generator
    replays = Replays(run, over=settings.verify.rewards == "none")
    replays.start()
    most, budget = settings.staleness.max_staleness, settings.verify.memory_mb << 20
    held: HeldVersions | HeldOverRanks
    if is_sharded(learner.model):
        held = HeldOverRanks(learner=learner, team=team, most=most, budget_bytes=budget)
    else:
        held = HeldVersions(learner=learner, publisher=publisher, most=most, budget_bytes=budget)
    return Verifier(
        learner=learner,
        held=held,
        options=VerifyOptions(
            dtype=chosen.dtype,
            tolerance=settings.canary.tolerance or tolerance_of(chosen.dtype, chosen.quantization),
            seeded=chosen.engine == "embedded",
            mixes=chosen.kv_on_update == "keep",
            most_tokens=settings.trainer.micro_batch_tokens,
        ),
        send=send,
        record=record,
        replays=replays,
    )
