"""The simulated world with episodes that are trained in pieces, and what must never happen in it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from support_buffer import make_core
from support_world import ASKED_AGAIN, FAULTS, Invariants, some_policy
from support_world_store import FakeStore

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.sampler import Decision
from async_rl.config.rollout import RolloutSettings
from async_rl.instruments.world.clock import Network
from async_rl.instruments.world.decoding import TurnByTurn
from async_rl.instruments.world.world import World, WorldPlan
from async_rl.trajectory import Trajectory
from async_rl.trajectory.given import given_in
from async_rl.wire import messages as msg


@dataclass(eq=False, kw_only=True)
class WindowInvariants(Invariants):
    """Knows each episode by the chain of its pieces, from what was written alone."""

    window: int
    before: dict[int, int] = field(default_factory=dict)
    """group -> that in which its episode went on from"""
    after: dict[int, int] = field(default_factory=dict)
    """the other way round"""
    arrived: dict[int, Trajectory] = field(default_factory=dict)
    """trajectory of each training group"""
    decided: dict[int, Decision] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def written(self, effects: Sequence[do.Effect]) -> None:
        for effect in effects:  # in the order in which they are written
            match effect:
                case do.AddDecision(group=group, decision=decision):
                    start = decision.start
                    assert start is not None
                    assert start.source == "window"
                    assert start.group not in self.after, "an episode goes on once"
                    assert start.group in self.arrived, "what goes on was stored before"
                    assert self.arrived[start.group].ended == "window"
                    self.before[group], self.after[start.group] = start.group, group
                    self.decided[group] = decision
                case do.AddTrajectories(trajectories=many):
                    for t in many:
                        if t.split == "train":
                            self.arrived[t.group] = t
                            self.check_piece(t)
        super().written(effects)

    def check_order(self, admitted: do.AddGroup) -> None:
        """A group goes on where another was cut, or asks the next problem, or one anew whose episode is given up."""
        position, attempt = admitted.position, admitted.attempt
        assert admitted.group not in self.asked
        self.check_problem(admitted)
        if admitted.group in self.before:
            assert self.asked[self.before[admitted.group]] == (position, attempt)
            self.seen["went on"] += 1
        elif attempt == 0:
            assert position == 1 + max((p for p, _ in self.asked.values()), default=-1)
        else:
            last = max(group for group, place in self.asked.items() if place[0] == position)
            assert self.asked[last] == (position, attempt - 1)
            assert self.refused[last].startswith(ASKED_AGAIN), "only what was given up is asked again"
        self.asked[admitted.group] = position, attempt

    def check_piece(self, t: Trajectory) -> None:
        """It begins with all that the episode said, and samples what nobody sampled."""
        given = given_in(t)
        earlier = self.before.get(t.group)
        assert (given is not None) == (earlier is not None) or t.failed
        if earlier is None or t.failed:
            return
        piece = self.arrived[earlier]
        said = [(turn.start, turn.length) for turn in piece.turns]
        assert given is not None
        before = given_in(piece)
        assert given.stretches == (*(before.stretches if before is not None else ()), *said)
        assert t.turns[0].start == piece.turns[-1].start + 1
        self.seen["continued"] += 1

    def sent(self, message: msg.Message) -> None:
        super().sent(message)
        if isinstance(message, msg.Permits):
            for permit in message.permits:
                start = permit.start
                assert (start is not None) == (permit.group in self.decided), "that it goes on is stored first"
                if start is not None:
                    piece = self.arrived[self.before[permit.group]]
                    assert start.tokens == piece.tokens[: 4 * len(piece.tokens)].astype("<i4").tobytes()
                    assert permit.seed == self.seed_of(piece)

    def seed_of(self, piece: Trajectory) -> int:
        """The seed of the permit that the piece had."""
        return self.permits[piece.group]

    permits: dict[int, int] = field(default_factory=dict)

    def round(self, core: Core) -> None:
        for group in core.groups.values():
            self.permits.setdefault(group.group, group.permit.seed)
        super().round(core)

    def trained(self, step: int, batch: msg.Batch) -> None:
        super().trained(step, batch)
        for t in batch.trajectories:
            assert t.failed or t.num_policy_tokens <= self.window
            self.seen["cut"] += t.ended == "window"
            self.seen["over"] += t.ended == "finished"

    def restored(self, core: Core, before: Core | None) -> None:
        super().restored(core, before)
        if before is not None:
            found, known = core.admission.windows.waiting, before.admission.windows.waiting
            assert [(p.group, p.generator) for p in found] == [(p.group, p.generator) for p in known]

    def check_prompts(self, core: Core) -> None:
        """Each position has one newest group: it is trained, live, given up for good, to be asked again, or waits to
        go on; and no token of any episode is trained twice."""
        newest: dict[int, int] = {}
        for group, (position, _) in self.asked.items():
            newest[position] = max(group, newest.get(position, -1))
        assert sorted(newest) == list(range(len(newest)))
        again = {position for position, _ in core.admission.refill}
        waiting = {piece.group for piece in core.admission.windows.waiting}
        for position, group in newest.items():
            cut = group in self.arrived and self.arrived[group].ended == "window"
            given_up = group in self.refused and self.refused[group].startswith(ASKED_AGAIN)
            assert (position in again) == given_up, (group, "asked again")
            assert (group in waiting) == (cut and group not in self.refused), (group, "goes on")
        assert len(waiting) == len(core.admission.windows.waiting)
        tokens: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        for group in self.batched:
            t = self.arrived[group]
            tokens[self.asked[group]].update(t.policy_positions().tolist() if not t.failed else [])
        assert all(max(count.values(), default=1) == 1 for count in tokens.values()), "each token is trained once"


def window_world(seed: int, kinds: Sequence[str] = FAULTS, store: Any = None) -> World:
    """A schedule drawn at random, with windows of one to three turns."""
    random = Random(seed)
    policy, window = some_policy(random), random.randint(1, 3)
    faults = sorted((random.uniform(0, 16), random.choice(kinds)) for _ in range(random.choice((0, 3, 6, 12))))
    at_once = random.randint(1, 4)

    def new_core() -> Core:
        plan = RolloutSettings(window=window)
        core = make_core(policy, group_size=1, vocabulary=100, max_permits=at_once, rollout=plan, verify_share=0.2)
        core.trainer = b""
        return core

    return World(
        WorldPlan(
            seed=seed,
            steps=random.randint(5, 10),
            generators=random.randint(1, 3),
            sequences=at_once,
            decoder=lambda generator: TurnByTurn(
                generator=generator,
                turn_s=0.4,
                spread=random.choice((1.0, 30.0)),
                failure=0.05,
                saving=0.5,
                window=window,
            ),
            network=Network(delay_s=0.01, loss=random.choice((0.0, 0.0, 0.03)), ordered=random.random() < 0.8),
            save_every=random.randint(1, 3),
            evaluate_every=random.choice((0, 2)),
            faults=tuple(faults),
        ),
        new_core,
        watch=WindowInvariants(policy=policy, window=window),
        store=FakeStore() if store is None else store,
    )
