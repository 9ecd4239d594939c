"""Complete groups become batches, or are refused: here a group's way through the buffer ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from async_rl.buffer import effects as do
from async_rl.buffer.admission import Admission
from async_rl.buffer.group import Group
from async_rl.buffer.ledger import Ledger, untrainable
from async_rl.buffer.rules import Rules


@dataclass(slots=True, kw_only=True)
class Batching:
    """What becomes of admitted groups."""

    rules: Rules
    ledger: Ledger
    admission: Admission
    counts: Counter[str]
    refusals_in_row: int = 0
    hopeless: str = ""
    """why the run has to end: too many groups in a row were refused; else empty"""

    def close(self, group: Group) -> list[do.Effect]:
        """A training group is complete: it waits for a batch, or is refused now."""
        reason = untrainable(group, drop_zero_signal=self.rules.drop_zero_signal)
        if reason is not None:
            return self.refuse(group.group, reason)
        self.refusals_in_row = 0
        self.ledger.finish(group.group)
        return []

    def form(self, step: int, now: float) -> tuple[list[do.Effect], tuple[int, ...]]:
        """The batch of `step`, if it can be filled: what follows, and its groups (none: not yet)."""
        out: list[do.Effect] = []
        for group, reason in self.ledger.overdue():
            out += self.refuse(group, reason)
        chosen = self.ledger.choose()
        while chosen is not None and (stale := self.ledger.too_stale(chosen)):
            for group, reason in stale:
                out += self.refuse(group, reason)
            chosen = self.ledger.choose()
        if chosen is None:
            return out, ()
        self.ledger.form_batch(chosen)
        self.counts["groups_trained"] += len(chosen)
        out.append(do.FormBatch(step=step, groups=tuple(chosen), formed_at=now))
        return out, tuple(chosen)

    def refuse(self, group: int, reason: str) -> list[do.Effect]:
        """It will not be trained; it stays in the store with the reason."""
        self.ledger.refuse(group)
        self.counts["groups_refused"] += 1
        self.counts[f"refused_{reason.split(':')[0]}"] += 1
        self.refusals_in_row += 1
        if self.refusals_in_row >= self.rules.max_refusals:
            self.hopeless = f"{self.refusals_in_row} groups in a row were refused, the last because: {reason}"
        return [do.RefuseGroup(group=group, reason=reason)]
