"""What was not taken: counted by kind, a few examples of each recorded, the sender told as long as that is cheap."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from async_rl.buffer import effects as do
from async_rl.buffer.acceptance import Objection
from async_rl.wire import messages as msg

EXAMPLES = 3
"""of each kind that go into events.jsonl"""
LONGEST_REASON = 200
"""characters"""
ANSWERS_AT_ONCE = 256
ANSWERS_PER_S = 20.0
"""a peer that sends nonsense and never reads must not fill this process with answers"""


@dataclass(slots=True)
class Refusals:
    """Counters under a closed list of kinds (wire/refusal.py)."""

    counts: Counter[str] = field(default_factory=Counter)
    answers_left: float = ANSWERS_AT_ONCE
    answered_at: float = 0.0

    def may_answer(self, now: float) -> bool:
        """Takes one answer to a stranger out of the budget."""
        rested = max(0.0, now - self.answered_at)
        self.answers_left = min(ANSWERS_AT_ONCE, self.answers_left + ANSWERS_PER_S * rested)
        self.answered_at = now
        if self.answers_left < 1:
            return False
        self.answers_left -= 1
        return True

    def refuse(
        self, peer: bytes, what: str, objection: Objection, *, answer: bool, pairs: tuple[tuple[int, int], ...] = ()
    ) -> list[do.Effect]:
        """`pairs`: (group, sample) of the trajectories that are meant, if any; each counts."""
        before = self.counts[objection.kind]
        self.counts[objection.kind] += max(1, len(pairs))
        reason = objection.reason[:LONGEST_REASON]
        out: list[do.Effect] = []
        if before < EXAMPLES:
            out.append(do.RecordRefusal(peer=peer, what=what, kind=objection.kind, reason=reason))
        if answer:
            refused = msg.Refused(what=what, reason=reason, kind=objection.kind, pairs=pairs)
            out.append(do.Send(peer=peer, message=refused))
        return out
