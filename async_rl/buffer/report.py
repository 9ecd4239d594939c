"""What the buffer tells of itself: whom the trainer waits for, and the counters of every batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from async_rl.buffer.admission import Admission
from async_rl.buffer.evaluation import Evaluation
from async_rl.buffer.group import Group
from async_rl.buffer.ledger import Ledger
from async_rl.buffer.presence import Presence
from async_rl.wire.messages import HOLDS

if TYPE_CHECKING:
    from async_rl.buffer.core import Core


def wait_reason(ledger: Ledger, admission: Admission, presence: Presence, *, now: float) -> str:
    """Who the trainer is waiting for, since when."""
    text = f"{ledger.line.num_ready} of {ledger.policy.groups_per_step} groups finished"
    open_groups = [g for g in ledger.groups.values() if not g.complete]
    if open_groups:
        return f"{text}; {_oldest(open_groups, admission, presence, now)}"
    if not admission.generators:
        return f"{text}; no generator is connected{admission.rules.how_to_join}"
    behind = [f"{g.name} holds version {g.version}" for g in admission.generators.values()]
    words = [presence.last_word(peer, now) for peer in admission.generators]
    text = f"{text}; no group is running, newest weights are version {ledger.published}, {', '.join(behind)}"
    return "; ".join([text, *words])


def evaluation_reason(evaluation: Evaluation, admission: Admission, presence: Presence, now: float) -> str:
    """Who an evaluation waits for, since when."""
    open_groups = [g for g in evaluation.groups if not g.complete]
    if not open_groups:
        return "all of its episodes are there"  # the trainer has not looked since
    text = f"{sum(len(g.missing) for g in open_groups)} of its episodes are missing"
    if not admission.generators:
        return f"{text}; no generator is connected{admission.rules.how_to_join}"
    return f"{text}; {_oldest(open_groups, admission, presence, now)}"


def permit_reason(
    peer: bytes, ledger: Ledger, admission: Admission, presence: Presence, trainer: bytes, now: float
) -> str:
    """Why a generator that wants permits gets none."""
    generator = admission.generators[peer]
    if not trainer:
        return "no trainer has come yet"
    word = presence.last_word(trainer, now)
    if generator.version < ledger.published:
        held = f"it holds version {generator.version}, the newest is {ledger.published}"
        return f"{held}; {presence.last_word(peer, now)}; {word}"
    used = ledger.policy.used(ledger.line, step=ledger.step, version=generator.version, published=ledger.published)
    text = (
        f"{used} of {ledger.policy.slots} slots are in use; the trainer has published version {ledger.published} and "
        f"{ledger.line.num_ready} finished groups wait for it; {word}"
    )
    running = [g for g in ledger.groups.values() if not g.complete]
    return f"{text}; {_oldest(running, admission, presence, now)}" if running else text


def snapshot(core: Core, now: float) -> dict[str, object]:
    """State in plain values, for a person or a monitor."""
    return {
        "step": core.step,
        "published": core.published,
        "consumed": core.consumed,
        "live": len(core.groups),
        "waits": core.waits.rows(now),
        "standing": [
            {"name": g.name, "version": g.version, "held": g.held, "running": g.running}
            for g in core.admission.generators.values()
        ],
        "processes": core.presence.table(now),
        "counts": dict(core.counts),
        "refused": dict(core.refusals.counts),
        **core.counters(),
    }


def _oldest(groups: Sequence[Group], admission: Admission, presence: Presence, now: float) -> str:
    """The open group that waits longest, on whom, and the last thing heard of it."""
    oldest = min(groups, key=lambda g: g.group)
    holder = oldest.holder or b""
    generator = admission.generators.get(holder)
    text = (
        f"oldest is group {oldest.group} on {generator.name if generator is not None else 'no generator'}, "
        f"{now - oldest.admitted_at:.1f} s, {len(oldest.samples)}/{oldest.size} samples"
    )
    return f"{text}; {presence.last_word(holder, now)}" if generator is not None else text


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
