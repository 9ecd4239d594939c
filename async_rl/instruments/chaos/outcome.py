"""What came of a run under chaos: `chaos.json`, a table, and what went wrong with the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from async_rl.instruments.chaos.plan import COUNTERS
from async_rl.observe.audit import Audit, audit_rows, describe_violations


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Counted while the run goes on; `audit` and `replay_identical` come at its end."""

    seed: int
    planned: int
    """faults"""
    kills: int = 0
    freezes: int = 0
    slows: int = 0
    disconnects: int = 0
    lies: int = 0
    """generators that joined and lied"""
    raises: int = 0
    cancels: int = 0
    poisons: int = 0
    disks: int = 0
    resumes: int = 0
    hangs: int = 0
    seconds: float = 0.0
    max_stall_seconds: float = 0.0
    stalled_where: str = ""
    problems: list[str] = field(default_factory=list)
    """what must not be, beside the audit's findings"""
    audit: Audit | None = None
    replay_identical: bool | None = None
    """None: not tried, the run did not come to its end"""
    replayed_from: int = 0
    """version; above 0 where the batches before are deleted (buffer.keep_steps)"""
    replay: str = ""
    """what the replay came to, as a text"""

    @property
    def done(self) -> int:
        return sum(getattr(self, counter) for counter in COUNTERS.values())

    @property
    def clean(self) -> bool:
        audited = self.audit is not None and not self.audit.violations
        return not self.problems and audited and bool(self.replay_identical)

    def to_dict(self) -> Mapping[str, Any]:
        """For chaos.json."""
        a = self.audit
        return {
            "seed": self.seed,
            "faults_planned": self.planned,
            **{counter: getattr(self, counter) for counter in COUNTERS.values()},
            "liars_quarantined": len(a.fabricated) if a else None,
            "lies_trained_on": a.count("fabricated") if a else None,
            "resumes": self.resumes,
            "groups_admitted": a.groups_admitted if a else None,
            "groups_trained": a.groups_trained if a else None,
            "groups_refused": a.groups_refused if a else None,
            "lost": a.count("lost") if a else None,
            "duplicated": a.count("duplicated") if a else None,
            "hangs": self.hangs,
            "max_stall_seconds": round(self.max_stall_seconds, 2),
            "max_stall_where": self.stalled_where,
            "lag_max": a.lag_max if a else None,
            "replay_identical": self.replay_identical,
            "replayed_from_version": self.replayed_from,
            "seconds": round(self.seconds, 1),
            "clean": self.clean,
            "problems": [*self.problems, *(describe_violations(a.violations) if a else [])],
        }


def outcome_rows(outcome: Outcome) -> list[str]:
    """A table for the terminal."""
    rows = [
        ("faults", f"{outcome.kills} kills, {outcome.freezes} freezes, {outcome.slows} slowed, "
                   f"{outcome.disconnects} disconnected, {outcome.lies} lies, {outcome.raises} raised, "
                   f"{outcome.cancels} cancelled, {outcome.poisons} poisoned, {outcome.disks} full disks; "
                   f"{outcome.done} of {outcome.planned} planned"),
        ("resumed", f"{outcome.resumes} times, {outcome.seconds:.0f} s in all"),
        ("hangs", str(outcome.hangs)),
        ("longest stall", f"{outcome.max_stall_seconds:.1f} s, {outcome.stalled_where}"),
    ]  # fmt: skip
    if outcome.audit is not None:
        rows += audit_rows(outcome.audit)
        if outcome.lies:
            rows.append(("lies trained on", f"{outcome.audit.count('fabricated')} groups after their quarantine"))
    identical = {True: "identical weights", False: "NOT identical", None: "not tried"}
    begun = f", from version {outcome.replayed_from} on" if outcome.replayed_from else ""
    rows.append(("replay", identical[outcome.replay_identical] + begun))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def problem_lines(outcome: Outcome) -> list[str]:
    """What is wrong, with the evidence; or that nothing is."""
    if outcome.clean:
        return ["Nothing was lost, nothing was trained twice, nothing hung."]
    lines = [*outcome.problems, *(describe_violations(outcome.audit.violations) if outcome.audit is not None else [])]
    if outcome.replay_identical is False:
        lines.append(f"replay: {outcome.replay}")
    return [f"WRONG: {line}" for line in lines]
