"""A buffer with a real store, a trainer and generators that all die now and then, on a virtual clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from support_buffer_world import TRAINER, World, make_core, trajectory

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.loop import write
from async_rl.buffer.restore import read_standing, restore
from async_rl.buffer.store import Store
from async_rl.trajectory.codec import unpack
from async_rl.wire import messages as msg

STEPS = 8


@dataclass
class MortalWorld(World):
    """A world with a real store, in which everything dies now and then and resumes at a checkpoint."""

    path: Path = Path()
    every: int = 2
    """steps between two checkpoints"""
    deaths: int = 0
    """that are still to come"""
    store: Store = None  # type: ignore[assignment]
    saved: list[int] = field(default_factory=lambda: [0])
    """versions a trainer may go on from"""
    kept: dict[tuple[int, int], int] = field(default_factory=dict)
    """(group, sample) of running episodes whose turns are saved -> oldest version in them"""
    resumed: Counter[bytes] = field(default_factory=Counter)
    sent: dict[int, list[bytes]] = field(default_factory=dict)
    """batch of each step as it was first answered"""

    def __post_init__(self) -> None:
        self.store = Store(self.path, durability="process", create=True)

    def to_buffer(self, peer: bytes, message: msg.Message) -> None:
        self.send(peer, b"", lambda: self.receive(peer, message))

    def receive(self, peer: bytes, message: msg.Message) -> None:
        effects = self.core.handle(peer, message, self.now)
        if self.deaths == 0 or self.random.random() > 0.03:
            self.obey(effects)
            return
        self.deaths -= 1
        if self.random.random() < 0.5:
            for effect in effects[: self.random.randint(0, len(effects))]:
                write(effect, self.store)  # written and not committed: nobody was told
            self.die(None)
        else:
            self.commit(effects)
            World.obey(self, [e for e in effects if not isinstance(e, do.Send | do.SendBatch)])
            self.die(self.core)

    def obey(self, effects: list[do.Effect]) -> None:
        self.commit(effects)
        super().obey(effects)
        for effect in effects:
            if isinstance(effect, do.SendTurns):
                found = [unpack(blob) for blob in self.store.load_turns(effect.pairs)]
                assert [(t.group, t.sample) for t in found] == list(effect.pairs)
                self.kept |= {(t.group, t.sample): t.version_min for t in found}
                self.resumed[effect.peer] += len(found)
            if isinstance(effect, do.SendBatch):
                blobs = self.store.load_batch(effect.step)
                assert blobs is not None
                assert self.sent.setdefault(effect.step, blobs) == blobs, "a batch is answered identically"

    def generator(self, peer: bytes, message: msg.Message, life: int) -> None:
        """Some episodes save a turn on their way; a generator goes on with what it is sent."""
        if isinstance(message, msg.Permits) and life == self.lives[peer]:
            for permit in message.permits:
                for sample in permit.samples:
                    if permit.split == "train" and self.random.random() < 0.4:
                        seconds, version = self.random.expovariate(2.0), self.versions[peer]
                        self.at(seconds, lambda p=permit, s=sample, v=version: self.save(peer, p.group, s, v, life))
        super().generator(peer, message, life)

    def save(self, peer: bytes, group: int, sample: int, version: int, life: int) -> None:
        if life == self.lives[peer]:
            oldest = min(version, self.kept.get((group, sample), version))
            self.to_buffer(peer, msg.Turns(trajectories=(trajectory(group, sample, oldest),)))

    def finish(self, peer: bytes, permit: msg.Permit, sample: int, version: int, life: int) -> None:
        oldest = min(version, self.kept.get((permit.group, sample), version))
        super().finish(peer, permit, sample, oldest, life)

    def commit(self, effects: list[do.Effect]) -> None:
        for effect in effects:
            write(effect, self.store)
        self.store.commit()

    def publish(self, version: int) -> None:
        super().publish(version)
        if version % self.every == 0:
            self.saved.append(version)
            self.to_buffer(TRAINER, msg.Checkpointed(version=version))

    def opened(self) -> None:
        """The store that was left behind is gone on with."""

    def die(self, whole: Core | None) -> None:
        """Every process dies; the run resumes at one of the last checkpoints. `whole`: the state machine,
        when all its effects were committed."""
        self.store.close()
        self.events.clear()
        self.last_arrival.clear()
        self.store = Store(self.path, durability="process", create=False)
        version = self.random.choice(self.saved[-2:])
        self.saved = [v for v in self.saved if v <= version]
        self.store.rewind(version=version, now=self.now)
        self.opened()
        self.store.commit()
        self.core = make_core(self.core.rules.policy, drop_zero_signal=self.core.rules.drop_zero_signal)
        restore(self.core, read_standing(self.store), version=version)
        if whole is not None:
            assert durable(self.core) == durable(whole)
        self.trained_to = version
        for peer in self.versions:
            self.join(peer)
        self.ask(version)


def durable(core: Core) -> object:
    """What a buffer must know again."""
    counts = ("groups_admitted", "groups_trained", "groups_refused", "trajectories_train", "trajectories_failed")
    counts += ("refused_stale",)
    return (
        (core.ledger.step, core.ledger.next_group, core.admission.position),
        [(e.group, e.finished, e.trained) for e in core.ledger.line.entries],
        {g.group: (g.problem, g.seed, g.admitted_version) for g in core.groups.values()},
        {g.group: (dict(sorted(g.samples.items())), g.begun) for g in core.groups.values()},
        core.admission.refill,
        (core.batching.discarded.dropped, core.batching.discarded.refused, core.batching.discarded.trained),
        {name: core.counts[name] for name in counts},
    )


def audit(world: MortalWorld) -> None:
    policy = world.core.rules.policy
    assert len(world.trained) == len(set(world.trained)) == STEPS * policy.groups_per_step
    assert world.admitted == set(world.trained) | set(world.refused) | set(world.core.groups)
    assert not set(world.trained) & set(world.refused)
    assert policy.refills or not any(reason.startswith("stale") for reason in world.refused.values())
    world.check_prompts()
    with world.store as store:
        rows = [row for row in store.groups() if row.split == "train"]
        assert [(row.position, row.attempt) for row in rows] == list(world.asked.values())
        assert [row.problem for row in rows] == [row.position for row in rows]
        assert {row.group for row in rows if row.step is not None} == set(world.trained)
        assert {row.group for row in rows if row.refused_because is not None} == set(world.refused)
        batches = list(store.batches())
        assert [batch.step for batch in batches] == list(range(STEPS))
        assert all(len(set(batch.groups)) == policy.groups_per_step for batch in batches)
        # the world ends when the trainer has published the last version
        assert all(batch.trained_at is not None for batch in batches[: STEPS - 1])
        assert store.consumed_step() <= STEPS - 1
        live = {(g.group, s) for g in world.core.groups.values() for s in g.begun}
        assert set(store.begun()) == live, "saved turns go when their episode is finished"
