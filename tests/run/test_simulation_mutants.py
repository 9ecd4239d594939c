"""The schedules see what they are there to see: each rule, broken on purpose, makes some schedule fail soon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from support_world import FAULTS, ON_ITS_OWN, make_world, play, some_policy, some_world

from async_rl.buffer import effects as do
from async_rl.buffer.acceptance import Acceptance
from async_rl.buffer.admission import Admission
from async_rl.buffer.batching import Batching
from async_rl.buffer.core import Core
from async_rl.buffer.ledger import Group, Ledger
from async_rl.buffer.loop import execute, write
from async_rl.buffer.poison import Poison
from async_rl.buffer.presence import Attendance, Presence
from async_rl.buffer.restore import restore
from async_rl.buffer.staleness import DropPolicy, PacePolicy, WaitPolicy
from async_rl.buffer.trust import Trust
from async_rl.buffer.verification import Quarantine
from async_rl.wire import messages as msg

SCHEDULES = 400
Patch = pytest.MonkeyPatch


def one_step_more(policy: type) -> Callable[[Patch], None]:
    def mutate(patch: Patch) -> None:
        admit, reissue = policy.admit, policy.reissue

        def looser(self: Any) -> Any:
            return replace(self, max_staleness=self.max_staleness + 1)

        patch.setattr(policy, "admit", lambda self, *given, **named: admit(looser(self), *given, **named))
        patch.setattr(policy, "reissue", lambda self, *given, **named: reissue(looser(self), *given, **named))
        patch.setattr(policy, "refuse", lambda self, **named: None)

    return mutate


def one_slot_more(patch: Patch) -> None:
    for policy in (PacePolicy, WaitPolicy, DropPolicy):
        slots = policy.slots
        patch.setattr(policy, "used", lambda self, line, *, used=policy.used, **named: used(self, line, **named) - 1)
        assert slots is policy.slots


def window_not_taken_off(patch: Patch) -> None:
    patch.setattr(PacePolicy, "latest_step", lambda self, *, ahead, step: step + ahead // self.groups_per_step)
    patch.setattr(PacePolicy, "slots", property(lambda self: int(self.pipeline_depth * self.groups_per_step)))


def window_too_wide(patch: Patch) -> None:
    select = PacePolicy.select
    patch.setattr(
        PacePolicy, "select", lambda self, *given, **named: select(replace(self, window=10**6), *given, **named)
    )
    patch.setattr(PacePolicy, "__post_init__", lambda self: None)


def drop_keeps_what_is_too_old(patch: Patch) -> None:
    patch.setattr(DropPolicy, "overdue", lambda self, line, *, step: [])
    patch.setattr(DropPolicy, "refuse", lambda self, **named: None)


def answered_before_committed(patch: Patch) -> None:
    def hasty(effects: Any, store: Any, router: Any, record: Any, part_bytes: int) -> None:
        execute([e for e in effects if not isinstance(e, do.Write)], store, router, record, part_bytes)
        execute([e for e in effects if isinstance(e, do.Write)], store, router, record, part_bytes)

    patch.setattr("async_rl.buffer.loop.execute", hasty)


def batch_not_stored(patch: Patch) -> None:
    def forgetful(effects: Any, *rest: Any, **named: Any) -> None:
        execute([e for e in effects if not isinstance(e, do.FormBatch)], *rest, **named)

    patch.setattr("async_rl.buffer.loop.execute", forgetful)


def orphans_forgotten(patch: Patch) -> None:
    remove = Admission.remove

    def mutant(self: Admission, peer: bytes) -> bool:
        found = remove(self, peer)
        self.orphans.clear()
        return found

    patch.setattr(Admission, "remove", mutant)


def orphans_forgotten_by_restore(patch: Patch) -> None:
    def mutant(core: Core, *given: Any, **named: Any) -> None:
        restore(core, *given, **named)
        core.admission.orphans.clear()

    patch.setattr("async_rl.buffer.restore.restore", mutant)


def position_forgotten_by_restore(patch: Patch) -> None:
    def mutant(core: Core, *given: Any, **named: Any) -> None:
        restore(core, *given, **named)
        core.admission.position += 1

    patch.setattr("async_rl.buffer.restore.restore", mutant)


def samples_taken_twice(patch: Patch) -> None:
    arrive = Group.arrive

    def mutant(self: Group, *given: Any) -> bool:
        arrive(self, *given)
        return True

    patch.setattr(Group, "arrive", mutant)


def trained_groups_stay(patch: Patch) -> None:
    def mutant(self: Ledger, chosen: Any) -> None:
        for group in chosen:
            self.line.entry(group).finished = True
        self.step += 1

    patch.setattr(Ledger, "form_batch", mutant)


def dropped_problems_forgotten(patch: Patch) -> None:
    refuse = Batching.refuse

    def mutant(self: Batching, number: int, reason: str) -> Any:
        before = list(self.admission.refill)
        found = refuse(self, number, reason)
        self.admission.refill[:] = before
        return found

    patch.setattr(Batching, "refuse", mutant)


def lost_permits_not_sent_again(patch: Patch) -> None:
    patch.setattr(Admission, "resend", lambda self, peer, in_hand, now: [])


def lost_news_of_weights_not_sent_again(patch: Patch) -> None:
    status = Attendance.status

    def mutant(self: Attendance, *given: Any, **named: Any) -> Any:
        return [
            e
            for e in status(self, *given, **named)
            if not (isinstance(e, do.Send) and isinstance(e.message, msg.NewWeights))
        ]

    patch.setattr(Attendance, "status", mutant)


def silent_generators_keep_their_groups(patch: Patch) -> None:
    patch.setattr(Presence, "frozen", lambda self, now: [])


def weights_not_heard_of_yet_refused(patch: Patch) -> None:
    version = Acceptance._version

    def mutant(self: Acceptance, number: int, lowest: int) -> Any:
        return version(self, number if number <= self.ledger.published else 1 << 40, lowest)

    patch.setattr(Acceptance, "_version", mutant)


def turns_of_lost_generators_refused(patch: Patch) -> None:
    sampled = Acceptance._sampled

    def mutant(self: Acceptance, trajectory: Any, group: Group) -> Any:
        begun, group.begun = group.begun, set()
        restored, group.restored = group.restored, False
        try:
            group.oldest_held = max(group.oldest_held, group.admitted_version)
            return sampled(self, trajectory, group)
        finally:
            group.begun, group.restored = begun, restored

    patch.setattr(Acceptance, "_sampled", mutant)


def saved_turns_not_written(patch: Patch) -> None:
    patch.setattr(
        "async_rl.buffer.loop.write",
        lambda effect, store: not isinstance(effect, do.SaveTurns) and write(effect, store),
    )


def deaths_not_blamed(patch: Patch) -> None:
    patch.setattr(Poison, "add", lambda self, *given, **named: [])


def poison_forgotten_by_restore(patch: Patch) -> None:
    patch.setattr(Poison, "restore", lambda self, remembered: None)


def poison_asked_again(patch: Patch) -> None:
    patch.setattr(Core, "_refuse_poisoned", lambda self, now: [])


def weights_of_a_former_life_believed(patch: Patch) -> None:
    """That a process held newer weights is taken for the next one of its name."""
    patch.setattr("async_rl.buffer.acceptance.OF_A_LIFE", ())


def lies_kept(patch: Patch) -> None:
    """The liar is expelled, and what it sent is trained."""
    prove = Trust.prove

    def mutant(self: Trust, *given: Any) -> Any:
        for group in self.ledger.groups.values():
            group.senders.clear()
        return prove(self, *given)

    patch.setattr(Trust, "prove", mutant)


def lies_not_asked_again(patch: Patch) -> None:
    prove = Trust.prove

    def mutant(self: Trust, *given: Any) -> Any:
        before = list(self.admission.refill)
        found = prove(self, *given)
        self.admission.refill[:] = before
        return found

    patch.setattr(Trust, "prove", mutant)


def lies_believed_of_the_next_life(patch: Patch) -> None:
    """Everybody is taken for a liar whose name a liar had."""
    patch.setattr(Quarantine, "keeps_out", lambda self, name, pid: next(iter(self.lives.values()), ""))


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "deaths are not blamed on a problem": deaths_not_blamed,
    "poison is forgotten by restore": poison_forgotten_by_restore,
    "poison is asked again": poison_asked_again,
    "weights of a former life are believed of the next": weights_of_a_former_life_believed,
    "what a liar sent is kept": lies_kept,
    "what a liar was asked is not asked again": lies_not_asked_again,
    "the honest are kept out with a liar": lies_believed_of_the_next_life,
    "pace admits one step too much": one_step_more(PacePolicy),
    "wait admits one step too much": one_step_more(WaitPolicy),
    "one slot more": one_slot_more,
    "the window is not taken off": window_not_taken_off,
    "the window is too wide": window_too_wide,
    "drop keeps what is too old": drop_keeps_what_is_too_old,
    "answered before it is committed": answered_before_committed,
    "a batch is not stored": batch_not_stored,
    "orphans are forgotten": orphans_forgotten,
    "orphans are forgotten by restore": orphans_forgotten_by_restore,
    "the position is forgotten by restore": position_forgotten_by_restore,
    "samples are taken twice": samples_taken_twice,
    "trained groups stay": trained_groups_stay,
    "dropped problems are forgotten": dropped_problems_forgotten,
    "lost permits are not sent again": lost_permits_not_sent_again,
    "lost news of weights is not sent again": lost_news_of_weights_not_sent_again,
    "silent generators keep their groups": silent_generators_keep_their_groups,
    "weights not heard of yet are refused": weights_not_heard_of_yet_refused,
    "turns of lost generators are refused": turns_of_lost_generators_refused,
    "saved turns are not written": saved_turns_not_written,
}


KINDS = {
    "lost permits are not sent again": ("cut generator",),
    "lost news of weights is not sent again": ("cut generator",),
    "saved turns are not written": ("kill generator",),
    "deaths are not blamed on a problem": ("poison generator",),
    "poison is forgotten by restore": ("poison generator", "kill buffer"),
    "poison is asked again": ("poison generator",),
    "weights of a former life are believed of the next": (
        *("slow", "slow", "kill generator", "kill generator", "freeze buffer", "cut generator"),
    ),
    "what a liar sent is kept": ("lie generator",),
    "what a liar was asked is not asked again": ("lie generator",),
    "the honest are kept out with a liar": ("lie generator", "kill generator"),
}
"""what goes wrong in the schedules that are to see it; else anything"""
FIRST = {"weights of a former life are believed of the next": 187}
"""first schedule that is tried: what is seldom seen need not be looked for each time"""
STREAMS = ("weights of a former life are believed of the next",)
"""seen only where the first weights of a process may be older than those of the one before"""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_rule_makes_a_schedule_fail(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    first = FIRST.get(mutant, 0)
    for seed in range(first, first + SCHEDULES):
        try:
            play(some_world(seed, KINDS.get(mutant, FAULTS), streams=mutant in STREAMS))
        except Exception as error:
            print(f"{mutant}: seed {seed}: {type(error).__name__}: {error}"[:300])
            return
    pytest.fail(f"{SCHEDULES} schedules did not see that {mutant}")


def without(inner: str, method: str) -> Callable[[Patch], None]:
    """A handler of the state machine that leaves something out: `inner`, called by it, does nothing."""

    def mutate(patch: Patch) -> None:
        handler, left_out = getattr(Core, method), getattr(Core, inner)

        def mutant(self: Core, *given: Any, **named: Any) -> Any:
            patch.setattr(Core, inner, lambda self, *given, **named: [])
            try:
                return handler(self, *given, **named)
            finally:
                patch.setattr(Core, inner, left_out)

        patch.setattr(Core, method, mutant)

    return mutate


FORGETFUL = {
    "nothing is granted when weights are loaded": without("_grant", "_holds"),
    "nothing is granted when a group is finished": without("_grant", "_finished"),
    "no batch is tried when a group is finished": without("_try_batch", "_finished"),
}


@pytest.mark.parametrize("mutant", FORGETFUL)
def test_what_is_not_done_at_the_first_chance_stops_a_world_in_which_nothing_is_repeated(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORGETFUL[mutant](monkeypatch)

    def play_some() -> None:
        for seed in range(SCHEDULES):
            policy = some_policy(Random(seed))
            play(make_world(policy, seed=seed, steps=6, generators=2, drop_zero_signal=True, spread=30.0, **ON_ITS_OWN))

    with pytest.raises(AssertionError, match="deadlock"):
        play_some()
