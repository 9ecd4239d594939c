"""The simulated world with an experience pool, and what must never happen in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from support_buffer import make_core
from support_world import FAULTS, Invariants, durable, some_policy
from support_world_store import FakeStore

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.ledger import SampleRecord
from async_rl.buffer.pool import KEY as POOL_KEY
from async_rl.buffer.pool import FreshGroup, Pool
from async_rl.buffer.store import TrajectoryRow
from async_rl.buffer.store_reader import BatchRow
from async_rl.config.pool import PoolSettings
from async_rl.instruments.world.clock import Network
from async_rl.instruments.world.decoding import TurnByTurn
from async_rl.instruments.world.world import World, WorldPlan
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack
from async_rl.trajectory.reuse import POOL_GROUPS, Drawn, fresh_of, has_no_effect, reuse_of, without_effect
from async_rl.wire import messages as msg

PROBLEMS = 3
"""of the world's prompt order, so that problems come again"""
SOME = (
    PoolSettings(source="groups", rows=2, max_age=3),
    PoolSettings(source="groups", share=0.4, size=8, max_uses=1),
    PoolSettings(source="successes", rows=3, max_age=2, per_problem=2),
    PoolSettings(source="best", place="join", rows=2),
    PoolSettings(source="successes", place="replace", when="failed", gate=0.5),
    PoolSettings(source="best", place="instead", when="no_signal", gate=0.0, max_uses=2),
    PoolSettings(source="priority", place="instead", when="no_signal", gate=1.0, rows=2, max_age=4),
    PoolSettings(source="priority", priority="recency", rows=2, size=5, until=4),
    PoolSettings(source="priority", priority="reward", place="join", max_uses=1),
    PoolSettings(source="successes", flush_at=4, max_uses=1),
)


@dataclass
class PoolStore(FakeStore):
    """The fake store, with a pool."""

    reused: dict[int, Drawn] = field(default_factory=dict)

    def has_pool(self) -> bool:
        return True

    def make_pool(self) -> None:
        pass

    def add_reused(self, step: int, drawn: Drawn) -> None:
        assert step == max(self.formed), "what comes back is stored with its batch"
        self._set(self.reused, step, drawn)

    def drawn(self, step: int) -> Drawn:
        return self.reused.get(step, Drawn())

    def demonstrations(self) -> list[Any]:
        return []

    def batches(self) -> Iterator[BatchRow]:
        for step, groups in self.formed.items():
            yield BatchRow(step=step, groups=groups, formed_at=0.0, trained_at=None)

    def rows_in_batches(self) -> Iterator[TrajectoryRow]:
        for group in sorted({group for group, _ in self.trajectories}):
            yield from (row for row in self.trajectories_of(group) if row.step is not None)

    def load_part(self, step: int, *, after: int, most_bytes: int) -> tuple[int, list[bytes]] | None:
        found = super().load_part(step, after=0, most_bytes=most_bytes)
        if found is None:
            return None
        drawn = self.drawn(step)
        names = sorted(pair for group in self.formed[step] for pair in self.trajectories if pair[0] == group)
        order = {group: place for place, group in enumerate(self.formed[step])}
        fresh = [self.trajectories[pair] for pair in sorted(names, key=lambda pair: (order[pair[0]], pair[1]))]
        out = [without_effect(t) if (t.group, t.sample) in drawn.out else t for t in fresh]
        rows = [row.put_on(self.trajectories[row.group, row.sample]) for row in drawn.rows]
        blobs = [pack(t) for t in (*out, *rows)]
        return len(blobs), blobs[after:]


@dataclass(eq=False, kw_only=True)
class PoolInvariants(Invariants):
    """What comes back keeps its own bounds, and leaves those of fresh groups alone. Read from writes and answers."""

    pool: PoolSettings
    drawn: dict[int, Drawn] = field(default_factory=dict)
    kept: dict[tuple[int, int], Trajectory] = field(default_factory=dict)
    """every trajectory as it was stored"""
    uses: Counter[tuple[int, int]] = field(default_factory=Counter)
    remembered: Mapping[str, Any] = field(default_factory=lambda: {"forgotten": ()})
    """which generators the pool forgot, and before which step"""
    seen: Counter[str] = field(default_factory=Counter)

    def written(self, effects: Sequence[do.Effect]) -> None:
        super().written(effects)
        for effect in effects:
            match effect:
                case do.AddTrajectories(trajectories=many):
                    self.kept.update({(t.group, t.sample): t for t in many})
                case do.Remember(key=key, value=value) if key == POOL_KEY:
                    self.remembered = value
                case do.FormBatch(step=step, drawn=drawn):
                    self.drawn[step] = drawn
                    for row in drawn.rows:
                        self.uses[row.group, row.sample] += 1
                        assert row.uses == self.uses[row.group, row.sample]

    def check_order(self, admitted: do.AddGroup) -> None:
        assert admitted.problem == admitted.position % PROBLEMS
        super().check_order(replace(admitted, problem=admitted.position))

    def trained(self, step: int, batch: msg.Batch) -> None:
        fresh = fresh_of(batch.trajectories)
        super().trained(step, msg.Batch(step=step, trajectories=tuple(fresh)))
        assert all(t.group not in self.formed[step] or t.sample < 100 for t in fresh)
        drawn, back = self.drawn[step], batch.trajectories[len(fresh) :]
        assert [reuse_of(t) for t in back] == list(drawn.rows)
        assert {(t.group, t.sample) for t in fresh if has_no_effect(t)} == set(drawn.out)
        assert len({(t.group, t.sample) for t in batch.trajectories}) == len(batch.trajectories)
        for t, row in zip(back, drawn.rows, strict=True):
            stored = self.kept[row.group, row.sample]
            before = [s for s, groups in self.formed.items() if row.group in groups]
            assert before[:1] < [step], "nothing comes back before it was trained"
            assert before
            assert t.tokens.tolist() == stored.tokens.tolist()
            assert t.log_behaviour.tolist() == stored.log_behaviour.tolist(), "the old log-probs stay"
            assert (t.versions, t.reward) == (stored.versions, stored.reward)
            age = step - stored.version_min
            oldest = min(o.version_min for (g, _), o in self.kept.items() if g == row.group and o.version_min >= 0)
            assert row.age == (step - oldest if self.pool.source == "groups" else age)
            assert not self.pool.max_age or age <= self.pool.max_age
            assert not self.pool.max_uses or row.uses <= self.pool.max_uses
            if self.pool.place in ("join", "replace"):
                assert t.group in self.formed[step]
                assert stored.problem == next(o.problem for o in fresh if o.group == t.group)
            self.seen["rows"] += 1
        self.seen["out"] += len(drawn.out)

    def restored(self, core: Core, before: Core | None) -> None:
        super().restored(core, before)
        if before is not None:
            assert durable(core) == durable(before)
            assert core.batching.pool == before.batching.pool, "the pool is what it was"
            self.seen["restored"] += 1

    def audit(self, world: World) -> None:
        world.learned = [group for group in world.learned if group < POOL_GROUPS]
        super().audit(world)
        self.draw_again()

    def draw_again(self) -> None:
        """What came back follows from the seed, the step, the batches before, and who was forgotten when."""
        pool = Pool(settings=self.pool, seed=0)
        pool.restore(self.remembered)
        for step in range(len(self.formed)):
            fresh = [self.fresh(group) for group in self.formed[step]]
            pool.expire(step)
            assert pool.draw(step, fresh) == self.drawn[step]
            pool.use(self.drawn[step].rows)
            pool.add(fresh)

    def fresh(self, group: int) -> FreshGroup:
        of_group = {sample: t for (g, sample), t in self.kept.items() if g == group}
        samples = {
            sample: SampleRecord(
                reward=t.reward,
                version_min=t.version_min,
                version_max=t.version_max,
                length=len(t.tokens),
                policy_length=t.num_policy_tokens,
                failed=False,
                generator=t.generator,
                num_turns=len(t.turns),
            )
            for sample, t in sorted(of_group.items())
            if not t.failed
        }
        problem = next(iter(of_group.values())).problem
        return FreshGroup(group=group, problem=problem, size=len(of_group), samples=samples)


def pool_world(seed: int, pool: PoolSettings, kinds: Sequence[str] = FAULTS, store: Any = None) -> World:
    """A schedule drawn at random, with this pool."""
    random = Random(seed)
    policy = some_policy(random)
    faults = sorted((random.uniform(0, 16), random.choice(kinds)) for _ in range(random.choice((0, 3, 6))))
    group_size, at_once = random.randint(2, 3), random.randint(1, 3)

    def new_core() -> Core:
        core = make_core(
            policy, group_size=group_size, vocabulary=100, max_permits=at_once, verify_share=0.2, pool=pool
        )
        core.trainer = b""
        core.problem_at = core.admission.problem_at = lambda position: position % PROBLEMS
        return core

    return World(
        WorldPlan(
            seed=seed,
            steps=random.randint(5, 9),
            generators=random.randint(1, 3),
            sequences=at_once * group_size,
            decoder=lambda generator: TurnByTurn(
                generator=generator, turn_s=0.4, spread=random.choice((1.0, 30.0)), failure=0.05, saving=0.5
            ),
            network=Network(delay_s=0.01, loss=random.choice((0.0, 0.0, 0.03)), ordered=random.random() < 0.8),
            save_every=random.randint(1, 3),
            evaluate_every=random.choice((0, 2)),
            faults=tuple(faults),
        ),
        new_core,
        watch=PoolInvariants(policy=policy, pool=pool),
        store=PoolStore() if store is None else store,
    )
