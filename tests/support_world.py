"""The simulated world (async_rl/instruments/world) for tests: random runs, and what must never happen in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from support_buffer import make_core
from support_world_store import FakeStore

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.sampler import SamplerRules
from async_rl.buffer.staleness import DropPolicy, PacePolicy, Policy, WaitPolicy
from async_rl.buffer.verification import FABRICATED
from async_rl.config.rollout import RolloutSettings
from async_rl.events import Event, GeneratorQuarantined, ProblemRefused
from async_rl.instruments.world.buffer import WorldWatch
from async_rl.instruments.world.clock import Network
from async_rl.instruments.world.decoding import TurnByTurn
from async_rl.instruments.world.generator import SimulatedDecoder
from async_rl.instruments.world.world import World, WorldPlan
from async_rl.trajectory import Trajectory
from async_rl.wire import messages as msg

FAULTS = (
    "kill buffer",
    "kill buffer",
    "kill trainer",
    "kill launcher",
    "kill generator",
    "kill generator",
    "freeze generator",
    "freeze trainer",
    "freeze buffer",
    "leave generator",
    "vanish generator",
    "join generator",
    "cut generator",
    "cut generator",
    "cut trainer",
    "slow",
    "lie generator",
    "poison generator",
)
REPAIRS = ("permits_again", "groups_reissued", "episodes_resumed", "trajectories_ignored", "refused_stale")
"""counters of the state machine that tell of a repair"""
ASKED_AGAIN = ("stale", "rollback", FABRICATED)
"""why a group is refused whose problem is asked again"""


def make_world(
    policy: Policy,
    *,
    seed: int,
    steps: int,
    generators: int,
    store: Any = None,
    watch: Invariants | None = None,
    kind: type[World] = World,
    group_size: int = 2,
    groups_at_once: int = 3,
    drop_zero_signal: bool = False,
    failure: float = 0.0,
    spread: float = 1.0,
    turn_s: float = 0.4,
    network: Network | None = None,
    sampler: SamplerRules | None = None,
    rollout: RolloutSettings | None = None,
    decoder: Callable[..., SimulatedDecoder] = TurnByTurn,
    **plan: Any,
) -> World:
    """A world around a real state machine, watched. Without `store` what is written is kept in memory."""
    return kind(
        WorldPlan(
            seed=seed,
            steps=steps,
            generators=generators,
            sequences=groups_at_once * group_size,
            decoder=lambda generator: decoder(
                generator=generator, turn_s=turn_s, spread=spread, failure=failure, saving=0.5
            ),
            network=network or Network(),
            **plan,
        ),
        lambda: fresh_core(policy, group_size, drop_zero_signal, groups_at_once, sampler, rollout),
        watch=watch or Invariants(policy=policy),
        store=store if store is not None else FakeStore(),
    )


def fresh_core(
    policy: Policy,
    group_size: int,
    drop_zero_signal: bool,
    groups_at_once: int,
    sampler: SamplerRules | None = None,
    rollout: RolloutSettings | None = None,
) -> Core:
    core = make_core(
        policy,
        group_size=group_size,
        drop_zero_signal=drop_zero_signal,
        vocabulary=100,
        max_permits=groups_at_once,
        verify_share=0.2,
        sampler=sampler,
        rollout=rollout or RolloutSettings(),
    )
    core.trainer = b""  # it comes by itself
    return core


def play(world: World) -> Invariants:
    """To the end of the run, and look back on it."""
    try:
        world.play()
        world.buffer.finish()
        assert isinstance(world.watch, Invariants)
        world.watch.audit(world)
    except Exception as error:
        error.add_note(f"{world.plan}; {world.story}; at {world.clock.now:.3f}")
        raise
    return world.watch


ON_ITS_OWN: dict[str, Any] = {"reports": False, "asks_ahead": True, "network": Network(delay_s=0.05, double=0.1)}
"""no message makes up for another: everything that is due must follow from the first one that allows it"""


def deaths(kind: str, number: int, seed: int, *, until_s: float = 12.0) -> tuple[tuple[float, str], ...]:
    """So many faults of one kind at random moments."""
    random = Random(seed)
    return tuple((random.uniform(0, until_s), kind) for _ in range(number))


def some_policy(random: Random) -> Policy:
    p, k = random.randint(1, 3), random.randint(0, 3)
    depth = random.uniform(1, k + 1)
    match random.randrange(3):
        case 0:
            window = random.randint(1, k * p + 1)
            return PacePolicy(groups_per_step=p, max_staleness=k, pipeline_depth=depth, window=window)
        case 1:
            return WaitPolicy(groups_per_step=p, max_staleness=k, pipeline_depth=depth)
        case _:
            return DropPolicy(groups_per_step=p, max_staleness=k, pipeline_depth=depth)


def some_world(seed: int, kinds: Sequence[str] = FAULTS, *, store: Any = None, **more: Any) -> World:
    """A schedule drawn at random. `kinds`: what may go wrong; `more`: of `make_world`."""
    random = Random(seed)
    several = random.choice((0, 3, 6, 12))
    faults = sorted((random.uniform(0, 16), random.choice(kinds)) for _ in range(several))
    return make_world(
        some_policy(random),
        seed=seed,
        store=store,
        group_size=random.randint(1, 3),
        generators=random.randint(1, 3),
        groups_at_once=random.randint(1, 3),
        steps=random.randint(3, 7),
        save_every=random.randint(1, 3),
        evaluate_every=random.choice((0, 0, 2)),
        drop_zero_signal=random.random() < 0.3,
        failure=random.choice((0.0, 0.0, 0.1)),
        spread=random.choice((1.0, 30.0)),
        network=Network(
            delay_s=random.choice((0.01, 0.1)), loss=random.choice((0.0, 0.0, 0.0, 0.03)), ordered=random.random() < 0.8
        ),
        faults=tuple(faults),
        **more,
    )


@dataclass(eq=False, kw_only=True)
class Invariants(WorldWatch):
    """Knows what must never happen. It reads writes, answers and steps, never the state machine's own books."""

    policy: Policy
    slots: int = -1
    """most groups that may hold a slot; -1: the policy's"""
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)
    """training group -> (position, attempt)"""
    refused: dict[int, str] = field(default_factory=dict)
    refused_now: set[int] = field(default_factory=set)
    """groups refused in this round"""
    formed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    answered: dict[int, list[Any]] = field(default_factory=dict)
    """batch of each step as it was first sent"""
    stored: set[tuple[int, int]] = field(default_factory=set)
    senders: dict[int, set[str]] = field(default_factory=dict)
    """training group -> names of the generators whose trajectories of it are stored"""
    poison: set[tuple[str, int]] = field(default_factory=set)
    """(split, problem) that are refused"""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def batched(self) -> list[int]:
        """Groups in batches, in their order."""
        return [group for step in sorted(self.formed) for group in self.formed[step]]

    def written(self, effects: Sequence[do.Effect]) -> None:
        self.refused_now = {effect.group for effect in effects if isinstance(effect, do.RefuseGroup)}
        for effect in effects:
            match effect:
                case do.AddGroup(split="train"):
                    self.check_order(effect)
                case do.AddTrajectories(trajectories=many) | do.AddDropped(trajectories=many):
                    for t in many:
                        assert (t.group, t.sample) not in self.stored, "a trajectory is stored once"
                        self.stored.add((t.group, t.sample))
                        if t.split == "train":
                            self.senders.setdefault(t.group, set()).add(t.generator)
                case do.RefuseGroup(group=group, reason=reason):
                    assert group not in self.refused
                    self.refused[group] = reason
                    stale = reason.startswith("stale")
                    assert self.policy.refills or not stale, "nothing admitted gets too old"
                case do.FormBatch(step=step, groups=groups):
                    assert step == len(self.formed)
                    assert len(set(groups)) == self.policy.groups_per_step
                    assert not set(groups) & set(self.refused)
                    assert not set(groups) & set(self.batched)
                    self.formed[step] = groups

    def recorded(self, event: Event) -> None:
        self.counts[event.event] += 1
        match event:
            case GeneratorQuarantined(name=name):
                kept = {group for group, names in self.senders.items() if name in names}
                assert kept <= {*self.refused, *self.batched}, "what a liar sent and was not in a batch is refused"
            case ProblemRefused(split=split, problem=problem):
                self.poison.add((split, problem))

    def check_order(self, admitted: do.AddGroup) -> None:
        """The prompt order without gap or repeat, or what was dropped, as a further attempt."""
        position, attempt = admitted.position, admitted.attempt
        assert admitted.group not in self.asked
        self.check_problem(admitted)
        assert (position, attempt) not in self.asked.values()
        if attempt == 0:
            assert position == 1 + max((p for p, _ in self.asked.values()), default=-1)
        else:
            before = [group for group, place in self.asked.items() if place == (position, attempt - 1)]
            assert [self.refused[group].split(":")[0] for group in before] in ([why] for why in ASKED_AGAIN)
        self.asked[admitted.group] = position, attempt

    def check_problem(self, admitted: do.AddGroup) -> None:
        assert admitted.problem == admitted.position

    def sent(self, message: msg.Message) -> None:
        """Nothing is acknowledged that is not in the store, unless its group is given up or of an evaluation; a batch
        is the same whenever it is sent."""
        match message:
            case msg.Accepted(pairs=pairs):
                for group, sample in pairs:
                    known = (group, sample) in self.stored
                    assert known or group in self.refused or group not in self.asked, (group, sample)
            case msg.Permits(permits=permits):
                self.counts["permits"] += len(permits)
                asked = {(permit.split, permit.problem) for permit in permits}
                assert not asked & self.poison, "a problem that was refused is not asked again"
            case msg.Batch(step=step, trajectories=batch):
                seen = [(t.group, t.sample, t.versions, t.ended) for t in batch]
                assert self.answered.setdefault(step, seen) == seen, "a batch is answered identically whenever asked"

    def loaded(self, pairs: Sequence[tuple[int, int]], found: Sequence[bytes]) -> None:
        over = {pair for pair in pairs if pair in self.stored or pair[0] in self.refused_now}
        assert len(found) == len(pairs) or over.issuperset(pairs), "turns that were begun are in the store"

    def round(self, core: Core) -> None:
        self.refused_now.clear()
        ended = len(self.refused) + sum(map(len, self.formed.values()))
        slots = self.policy.slots if self.slots < 0 else self.slots
        assert len(self.asked) - ended <= slots, "permits stay within the slots"
        held = [group for g in core.admission.generators.values() for group in g.groups]
        assert len(held) == len(set(held)), "a group is in one generator's hands"

    def trained(self, step: int, batch: msg.Batch) -> None:
        trajectories: Sequence[Trajectory] = batch.trajectories
        assert list(dict.fromkeys(t.group for t in trajectories)) == list(self.formed[step])
        for t in trajectories:
            lag = step - t.version_min if t.version_min >= 0 and not t.failed else 0
            assert lag <= self.policy.max_staleness, f"group {t.group} trained {lag} steps after its weights"
            assert t.version_max <= step, "sampled by weights that did not exist when the batch was formed"
        self.counts["steps"] += 1

    def restored(self, core: Core, before: Core | None) -> None:
        """What the store has is what the state machine goes on with."""
        assert set(core.groups) == set(self.asked) - set(self.batched) - set(self.refused)
        assert core.step == len(self.formed)
        if before is not None:
            assert durable(core) == durable(before)

    def audit(self, world: World) -> None:
        """What must be so at the end."""
        learned, core = world.learned, world.buffer.core
        assert len(learned) == len(set(learned)), "no group is in the weights twice"
        assert learned == [group for step in range(world.plan.steps) for group in self.formed[step]]
        live, batched = set(core.groups), set(self.batched)
        assert set(self.asked) == batched | set(self.refused) | live
        assert not batched & set(self.refused)
        assert not live & (batched | set(self.refused))
        self.check_prompts(core)
        refusals = core.refusals.counts
        assert refusals.keys() <= {"group", "stranger", "number", "quarantine"}, refusals

    def check_prompts(self, core: Core) -> None:
        """Every position of the prompt order is trained, live, waiting to be asked again, or refused for another
        reason than its age; in exactly one of these."""
        for_good = [group for group, reason in self.refused.items() if not reason.startswith(ASKED_AGAIN)]
        places = [self.asked[group][0] for group in (*core.groups, *self.batched, *for_good)]
        places += [position for position, _ in core.admission.refill]
        assert sorted(places) == list(range(1 + max(position for position, _ in self.asked.values())))


def durable(core: Core) -> object:
    """What a buffer must know again after its death."""
    counts = ("groups_admitted", "groups_trained", "groups_refused", "trajectories_train", "trajectories_failed")
    counts += ("refused_stale",)
    return (
        (core.ledger.step, core.ledger.next_group, core.admission.position),
        [(e.group, e.finished, e.trained) for e in core.ledger.queue.entries],
        {g.group: (g.permit, g.admitted_version) for g in core.groups.values()},
        {g.group: (dict(sorted(g.samples.items())), g.begun) for g in core.groups.values()},
        core.admission.refill,
        (core.batching.discarded.dropped, core.batching.discarded.refused, core.batching.discarded.trained),
        {name: core.counts[name] for name in counts},
        None if core.admission.feedback is None else core.admission.feedback.known,
    )


def audit_store(world: World) -> None:
    """What must be so in the store of a run that is over."""
    seen, core, store = world.watch, world.buffer.core, world.store
    assert isinstance(seen, Invariants)
    policy, steps = seen.policy, world.plan.steps
    assert len(seen.batched) == len(set(seen.batched)) == steps * policy.groups_per_step
    assert policy.refills or not any(reason.startswith("stale") for reason in seen.refused.values())
    rows = [row for row in store.groups() if row.split == "train"]
    assert [(row.position, row.attempt) for row in rows] == list(seen.asked.values())
    assert [row.problem for row in rows] == [row.position for row in rows]
    assert {row.group for row in rows if row.step is not None} == set(seen.batched)
    assert {row.group for row in rows if row.refused_because is not None} == set(seen.refused)
    batches = list(store.batches())
    assert [batch.step for batch in batches] == list(range(steps))
    assert all(len(set(batch.groups)) == policy.groups_per_step for batch in batches)
    assert all(batch.trained_at is not None for batch in batches)
    assert store.consumed_step() == steps - 1
    live = {(g.group, s) for g in core.groups.values() for s in g.begun}
    assert set(store.begun()) == live, "saved turns go when their episode is finished"
    store.close()
