"""The trainer's side of the canary: does every generator sample from the weights that the trainer published?

Who waits for whom: nobody. Evidence is compared when the trainer reads its messages; a difference ends the run there,
before a later version is published. A generator that sends no evidence is reported, because silence proves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.events import CanaryFailed, CanarySilent, RecordEvent
from async_rl.model.tokenizer import Tokenizer
from async_rl.trainer.lanes import one_lane
from async_rl.trainer.ranks import is_sharded
from async_rl.trainer.team import Team
from async_rl.weights.canary import Comparison, Evidence, compare, fingerprint, in_bunches, probe_tokens, tolerance_of
from async_rl.wire import messages as msg

if TYPE_CHECKING:
    from async_rl.task.protocol import Task
    from async_rl.trainer.learner import Learner

REMEMBERED = 16
"""versions whose evidence is kept; what comes later for an older one is counted only"""
WIDENED = 3.0
"""a generator's tolerance grows to so many times its first difference: as answers get sharper, equal weights differ by
more, and where the checksums of all tensors agree the difference is arithmetic"""
NAMED = 8
"""tensors that a report names"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryOptions:
    """What the settings say to the watch."""

    probe: tuple[int, ...]
    """tokens, the same as those of the generators"""
    dtype: torch.dtype
    """of the weights in the generators"""
    tolerance: float
    """of `Comparison.mean_difference`, nats"""
    widens: bool = False
    """the tolerance grows with what a generator shows first; not where the user chose it"""
    silent_steps: int
    """steps after which a generator without evidence is reported; 0: never"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanarySummary:
    """The comparisons of a whole run."""

    checked: int
    max_difference: float
    """nats"""
    late: int
    """evidence of versions that were no longer remembered, which was not compared"""
    unchecked: tuple[str, ...]
    """generators whose weights were never compared"""


@dataclass(slots=True)
class Watched:
    """One generator."""

    since: int
    """step at which it was first seen, or sent evidence last"""
    checked: int = 0
    reported: bool = False
    first: float = 0.0
    """mean difference that it showed first, with every tensor compared; nats"""
    away: bool = False
    """it has left; when it comes back its time starts anew"""


@dataclass(slots=True)
class CanaryWatch:
    """The evidence expected of each version, and which generators have sent it."""

    learner: Learner
    options: CanaryOptions
    record: RecordEvent
    """writes an event of the run"""
    team: Team
    """the trainer's other ranks"""
    expected: dict[int, Evidence] = field(default_factory=dict)
    generators: dict[str, Watched] = field(default_factory=dict)
    step: int = 0
    late: int = 0
    max_difference: float = 0.0
    found: list[Comparison] = field(default_factory=list)
    """since the last row"""
    seconds: float = 0.0
    """spent on evidence since the last row"""

    def expect(self) -> None:
        """Make the evidence of the learner's present weights; call it after they were published."""
        started = time.monotonic()
        version = self.learner.version
        with one_lane(self.learner.options.arithmetic.lanes):
            self.expected[version] = Evidence(
                version=version,
                digests=self._digests(version),
                log_probs=self.team.probe(self.learner, self.options.probe),
            )
        while len(self.expected) > REMEMBERED:
            del self.expected[next(iter(self.expected))]
        self.seconds += time.monotonic() - started

    def _digests(self, version: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for some in in_bunches(self.team.weights(self.learner)):
            found |= fingerprint(some, version, self.options.dtype)
        return found

    def receive(self, canary: msg.Canary) -> None:
        """Compare a generator's evidence with the expected. Raises RunFailed with both numbers and the tensors that
        differ."""
        expected = self.expected.get(canary.version)
        if expected is None:
            self.late += 1
            return
        found = Evidence(
            version=canary.version, digests=dict(canary.digests), split=canary.split, log_probs=canary.log_probs
        )
        comparison = compare(expected, found)
        watched = self.generators.setdefault(canary.name, Watched(since=self.step))
        if comparison.wrong(self._tolerance(watched)):
            self.record(
                CanaryFailed(
                    name=canary.name,
                    version=canary.version,
                    tensors=tuple(comparison.tensors),
                    max_difference=comparison.max_difference,
                    mean_difference=comparison.mean_difference,
                )
            )
            raise RunFailed(self._explain(canary, comparison))
        self.found.append(comparison)
        self.max_difference = max(self.max_difference, comparison.max_difference)
        watched.since, watched.reported = self.step, False
        if not watched.checked and self.options.widens and not canary.split:
            watched.first = comparison.mean_difference
        watched.checked += 1

    def _tolerance(self, watched: Watched) -> float:
        """Of the mean difference of this generator, nats."""
        return max(self.options.tolerance, WIDENED * watched.first)

    def report_silent(self, step: int, connected: Mapping[str, int]) -> None:
        """Report the generators that have been connected for long and showed nothing. `connected`: generator ->
        version of the weights it holds, when the batch of this step was sent."""
        self.step = step
        for name, watched in self.generators.items():
            watched.away |= name not in connected
        for name, held in connected.items():
            watched = self.generators.setdefault(name, Watched(since=step))
            if watched.away:
                watched.since, watched.reported, watched.away = step, False, False
            if not 0 < self.options.silent_steps <= step - watched.since or watched.reported:
                continue
            watched.reported = True
            self.record(CanarySilent(name=name, since_step=watched.since, step=step, holds=int(held)))

    def row(self) -> dict[str, float]:
        """The columns canary/* of the step's metric row: what was compared since the last."""
        row = {"canary/checked": float(len(self.found)), "canary/late": float(self.late), "time/canary": self.seconds}
        if self.found:
            row["canary/max_difference"] = max(c.max_difference for c in self.found)
            row["canary/mean_difference"] = max(c.mean_difference for c in self.found)
        self.found.clear()
        self.seconds = 0.0
        return row

    def summary(self) -> CanarySummary:
        return CanarySummary(
            checked=sum(w.checked for w in self.generators.values()),
            max_difference=self.max_difference,
            late=self.late,
            unchecked=tuple(sorted(name for name, w in self.generators.items() if w.checked == 0)),
        )

    def _explain(self, canary: msg.Canary, comparison: Comparison) -> str:
        c = comparison
        probe = (
            f"it gives log-prob {c.worst + 1} of the probe as {c.found:.6g}, the trainer as {c.expected:.6g} "
            f"(difference {c.max_difference:.3g} nats, mean {c.mean_difference:.3g}, tolerance of the mean "
            f"{self._tolerance(self.generators[canary.name]):g})"
        )
        if not c.tensors:
            return (
                f"{canary.name} holds the weights of version {canary.version} but computes other log-probs with "
                f"them: {probe}; if its arithmetic explains that, raise canary.tolerance"
            )
        named = ", ".join(c.tensors[:NAMED])
        more = f" and {len(c.tensors) - NAMED} more" if len(c.tensors) > NAMED else ""
        return (
            f"{canary.name} does not hold the weights of version {canary.version}: {len(c.tensors)} of "
            f"{c.num_tensors} tensors differ ({named}{more}); {probe}{self._nearest(canary)}"
        )

    def _nearest(self, canary: msg.Canary) -> str:
        """Which version the generator's log-probs look like, where that is another one."""
        means = {
            v: compare(e, Evidence(version=v, digests=e.digests, log_probs=canary.log_probs)).mean_difference
            for v, e in self.expected.items()
        }
        nearest = min(means, key=means.__getitem__)
        if means[nearest] >= means[canary.version]:
            return ""
        return f"; its log-probs are nearest to those of version {nearest}"


def make_canary(settings: Settings, learner: Learner, task: Task, record: RecordEvent, team: Team) -> CanaryWatch:
    """The canary watch of a run."""
    chosen = settings.generator
    # a sharded model computes in the trainer's dtype, a whole one in that of its weights
    computed = settings.trainer.dtype if is_sharded(learner.model) and chosen.dtype == "float32" else chosen.dtype
    options = CanaryOptions(
        probe=probe_tokens(task, Tokenizer.of(settings.model), chosen.max_context or learner.model.config.max_context),
        dtype=getattr(torch, chosen.dtype),
        tolerance=settings.canary.tolerance or tolerance_of(computed, chosen.quantization),
        widens=not settings.canary.tolerance,
        silent_steps=settings.canary.silent_steps,
    )
    return CanaryWatch(learner, options, record, team, step=learner.version)
