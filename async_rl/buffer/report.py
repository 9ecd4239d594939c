"""What the buffer tells of itself: whom the trainer waits for, and the counters of every batch."""

from __future__ import annotations

from collections import Counter

from async_rl.buffer.admission import Admission
from async_rl.buffer.ledger import Ledger
from async_rl.wire.messages import HOLDS

SILENT_S = 5.0
"""a generator sends its counters twice a second"""


def wait_reason(ledger: Ledger, admission: Admission, *, published: int, now: float) -> str:
    """Who the trainer is waiting for, since when."""
    text = f"{ledger.line.num_ready} of {ledger.policy.groups_per_step} groups finished"
    generators = admission.generators
    open_groups = [g for g in ledger.groups.values() if not g.complete]
    if open_groups:
        oldest = min(open_groups, key=lambda g: g.group)
        holder = generators.get(oldest.holder or b"")
        who = holder.name if holder is not None else "no generator"
        silent = ""
        if holder is not None and now - holder.last_heard > SILENT_S:
            silent = f"; {who} is silent (a reward or tool function that blocks stops it)"
        return (
            f"{text}; oldest is group {oldest.group} on {who}, {now - oldest.admitted_at:.1f} s, "
            f"{len(oldest.samples)}/{oldest.size} samples{silent}"
        )
    if not generators:
        return f"{text}; no generator is connected"
    behind = [f"{g.name} holds version {g.version}" for g in generators.values()]
    return f"{text}; no group is running, newest weights are version {published}, {', '.join(behind)}"


def counters(
    ledger: Ledger, admission: Admission, counts: Counter[str], *, refused: int, published: int
) -> dict[str, float]:
    """What goes to the trainer with every batch."""
    generators = admission.generators.values()
    oldest = min((g.version for g in generators), default=published)
    return {
        "slots_used": ledger.policy.used(ledger.line, step=ledger.step, version=oldest, published=published),
        "slots": ledger.policy.slots,
        "generators": len(generators),
        "generator_busy_seconds": admission.busy_seconds,
        "tokens_generated": admission.tokens_generated,
        "groups_admitted": counts["groups_admitted"],
        "groups_trained": counts["groups_trained"],
        "groups_refused": counts["groups_refused"],
        "trajectories_failed": counts["trajectories_failed"],
        "wire_refused": refused,
        **{f"{HOLDS}{g.name}": g.version for g in generators},
    }
