"""What generators are believed (`Trust`): a sample of what they send goes to the trainer. One that was proven to lie
loses its permits; what it sent and was not trained is refused, and its problems are asked again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from async_rl.buffer import effects as do
from async_rl.buffer.pool import KEY as POOL_KEY
from async_rl.buffer.verification import FABRICATED, IMPOSSIBLE, KEY, Life, Quarantine, Sampling, Touched
from async_rl.events import GeneratorQuarantined
from async_rl.trajectory import Trajectory
from async_rl.wire import messages as msg

if TYPE_CHECKING:
    from async_rl.buffer.admission import Admission
    from async_rl.buffer.batching import Batching
    from async_rl.buffer.ledger import Group, Ledger
    from async_rl.buffer.presence import Attendance

OF_A_SESSION = (msg.Hello, msg.Want, msg.Status, msg.Leave, msg.Finished, msg.Turns, msg.Holds, msg.Canary)
"""which say of which session of a generator they are"""
MOST_REASON = 500
"""characters kept of what was found"""


@dataclass(slots=True, kw_only=True)
class Trust:
    """Chooses what is verified and carries out what is proven."""

    sampling: Sampling
    ledger: Ledger
    admission: Admission
    attendance: Attendance
    batching: Batching
    quarantine: Quarantine = field(default_factory=Quarantine)

    def session(self, peer: bytes, message: msg.Message | None) -> int:
        """Of the generator that has sent this: as the message says, else its last one. 0: it is no generator."""
        if isinstance(message, OF_A_SESSION) and message.session:
            return message.session
        last = self.admission.life(peer)
        return 0 if last is None else last[1]

    def barred(self, peer: bytes, message: msg.Message) -> str:
        """Why a message of a generator is not taken; empty: it is. What a liar had sent may arrive after the Hello of
        the next process of its name, and what that sends before its own Hello."""
        if not self.quarantine.known:
            return ""
        last = self.admission.life(peer)
        if last is None:
            return ""
        why = self.quarantine.reason((last[0], self.session(peer, message)))
        if not why and isinstance(message, msg.Finished | msg.Turns):
            why = self.quarantine.reason(last)  # no life can send these under a number that it makes up
        return why

    def forget(self, life: Life) -> None:
        """This life is over, and nothing comes of it any more. That it lied is known on."""
        self.sampling.forget(life)
        self.quarantine.impossible.pop(life, None)

    def told(self) -> str:
        """Behind "no generator is connected": those that lied; empty where none did."""
        names = dict.fromkeys(name for name, _ in self.quarantine.lives)
        return f" ({', '.join(names)} quarantined: {next(iter(self.quarantine.lives.values()))})" if names else ""

    def named(self, peer: bytes) -> str:
        """The generator's name as this buffer knows it, whatever its trajectories say; empty: it knows none."""
        life = self.admission.life(peer)
        return "" if life is None else life[0]

    def sample(
        self, peer: bytes, message: msg.Message, fresh: Sequence[tuple[Trajectory, Group]], trainer: bytes
    ) -> list[do.Effect]:
        """Those of the trajectories that have just arrived in `message` which the trainer is to verify: also all that
        come from an earlier life. What a lost generator began is no evidence against the one that ended it."""
        last = self.admission.life(peer)
        if last is None or not trainer or not self.sampling.share:
            return []
        name, session = last[0], self.session(peer, message)
        chosen = tuple(
            trajectory
            for trajectory, group in fresh
            if self.sampling.can_verify(trajectory)
            and (session != last[1] or self.sampling.choose(last, trajectory))
            and group.senders <= {name}
            and not group.restored
        )
        if not chosen:
            return []
        return [do.Send(peer=trainer, message=msg.Verify(name=name, session=session, trajectories=chosen))]

    def impossible(self, peer: bytes, message: msg.Message, now: float) -> list[do.Effect]:
        """A message held trajectories with versions or tokens that cannot be."""
        life = self.admission.life(peer)
        if life is None or life[1] != self.session(peer, message):
            return []
        if not self.sampling.share or not self.quarantine.count_impossible(life):
            return []
        reason = f"{IMPOSSIBLE} of its messages named weights that its permits exclude, or tokens that do not exist"
        return self.prove(life, "versions", reason, now)

    def verdict(self, verdict: msg.Verdict, now: float) -> list[do.Effect]:
        """The trainer has found a trajectory that is not what it says."""
        life = (verdict.name, verdict.session)
        if self.quarantine.reason(life):
            return []
        if not verdict.proven:
            self.sampling.suspect(life)
            return []
        return self.prove(life, verdict.lie, verdict.reason[:MOST_REASON], now)

    def prove(self, life: Life, lie: str, reason: str, now: float) -> list[do.Effect]:
        """This generator lied: it is quarantined."""
        name = life[0]
        alike = [(peer, g) for peer, g in self.admission.generators.items() if g.name == name]
        pid = next((g.pid for _, g in alike if g.session == life[1]), 0)
        why = f"{name} reported {lie} that are not what it did: {reason}"
        self.quarantine.add(life, pid, why)
        self.sampling.forget(life)
        out: list[do.Effect] = []
        for peer, generator in alike:
            if self.quarantine.reason((name, generator.session)):  # else it is the next process of that name
                self.attendance.remove(peer)
                told = msg.Refused(
                    what="what it sent", reason=f"quarantined: {why}", kind="quarantine", session=generator.session
                )
                out.append(do.Send(peer=peer, message=told))
        refused = [g for g in self.ledger.groups.values() if name in g.senders]
        for group in refused:
            out += self.batching.refuse(group.group, f"{FABRICATED}: by {name} ({lie})")
            self.admission.ask_again(group)
        touched = self.quarantine.touched.get(name, Touched())
        self.admission.counts["generators_quarantined"] += 1
        quarantined = GeneratorQuarantined(
            name=name,
            pid=pid,
            lie=lie,
            reason=reason,
            step=self.ledger.step,
            groups_refused=len(refused),
            groups_trained=touched.groups,
            first_step=touched.first_step,
            last_step=touched.last_step,
        )
        out.append(do.Remember(key=KEY, value=self.quarantine.remembered()))
        if self.batching.pool.on:
            out.append(do.Remember(key=POOL_KEY, value=self.batching.pool.forget(name, self.ledger.step)))
        return [*out, do.Note(event=quarantined)]

    def trained(self, groups: Iterable[Group], step: int) -> None:
        """These groups are the batch of `step`."""
        for group in groups:
            for name in group.senders:
                self.quarantine.trained(name, step)
