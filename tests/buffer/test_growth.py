"""What the buffer keeps in memory is bounded by what is live: it is as much after 2 n steps as after n."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from support_buffer import TRAINER, answer, make_core

from async_rl.buffer.loop import execute
from async_rl.buffer.staleness import DropPolicy, PacePolicy, Policy
from async_rl.buffer.store import Store
from async_rl.wire import messages as msg

STEPS = 60
RESTART_EVERY = 4
"""steps after which a generator ends and another process of its name begins"""
EVALUATE_EVERY = 5
POLICIES = {
    "pace": PacePolicy(groups_per_step=3, max_staleness=1, pipeline_depth=2.0, window=2),
    "drop": DropPolicy(groups_per_step=3, max_staleness=1, pipeline_depth=2.0),
}


class Run:
    """A state machine, its store, two generators and a trainer. Everything that is said is answered in turn."""

    def __init__(self, policy: Policy, store: Store) -> None:
        self.core = make_core(policy, verify_share=0.05, vocabulary=100, max_permits=4)
        self.store, self.waiting = store, deque[tuple[bytes, msg.Message]]()
        self.now, self.step, self.finished = 0.0, 0, 0
        self.sessions, self.limits = Counter[bytes](), Counter[bytes]()
        for name in (b"generator-0", b"generator-1"):
            self.begin(name)
        self.say(TRAINER, msg.NextBatch(step=0))

    def send(self, peer: bytes, message: msg.Message) -> bool:
        self.waiting.append((peer, message))
        return True

    def say(self, peer: bytes, message: msg.Message) -> None:
        self.now += 0.01
        effects = self.core.handle(peer, message, self.now) + self.core.tick(self.now)
        execute(effects, self.store, self, lambda event: None, 1 << 20)  # type: ignore[arg-type]

    def begin(self, name: bytes) -> None:
        """The next process of this name."""
        self.sessions[name] += 1
        session = self.sessions[name]
        self.say(name, msg.Hello(role="generator", name=name.decode(), pid=session, session=session))
        self.limits[name] = 0
        self.want(name, 2)

    def want(self, name: bytes, more: int) -> None:
        self.limits[name] += more
        version = self.core.published
        self.say(name, msg.Want(limit=self.limits[name], version=version, session=self.sessions[name]))

    def play(self, steps: int) -> None:
        """Until so many steps are trained."""
        while self.step < steps:
            peer, message = self.waiting.popleft()
            match message:
                case msg.Permits(permits=permits, session=session) if session == self.sessions[peer]:
                    version = self.core.admission.generators[peer].version
                    for permit in permits:
                        made = tuple(answer(permit, sample, version) for sample in permit.samples)
                        self.say(peer, msg.Turns(trajectories=made[:1], session=session))
                        self.say(peer, msg.Finished(trajectories=made, session=session))
                        self.finished += len(made)
                    self.want(peer, len(permits))
                case msg.Batch(step=step):
                    self.train(step + 1)
                case msg.NewWeights(version=version):
                    self.say(peer, msg.Holds(version=version))

    def train(self, version: int) -> None:
        self.step = version
        self.say(TRAINER, msg.Published(version=version))
        self.say(TRAINER, msg.Checkpointed(version=version, oldest=version - 1))
        if version % EVALUATE_EVERY == 0:
            number = version // EVALUATE_EVERY
            ask = msg.Evaluate(evaluation=number, problems=(0, 1), samples=1, version=version, temperature=1.0)
            self.say(TRAINER, ask)
        elif version > EVALUATE_EVERY:
            self.say(TRAINER, msg.FetchEvaluation(evaluation=version // EVALUATE_EVERY, waits=False))
        if version % RESTART_EVERY == 0:
            name = b"generator-%d" % (version // RESTART_EVERY % 2)
            pid = self.sessions[name]
            self.say(b"launcher", msg.Gone(name=name.decode(), pid=pid, reason="died"))
            self.begin(name)
        self.say(TRAINER, msg.NextBatch(step=version))


def sizes(thing: Any, path: str, found: Counter[str], seen: set[int]) -> Counter[str]:
    """Entries of every container that can be reached, by the names that lead there."""
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | type) or callable(thing):
        return found
    seen.add(id(thing))
    if isinstance(thing, Collection):
        found[path] += len(thing)
        for entry in [*thing, *(thing.values() if isinstance(thing, Mapping) else ())]:
            sizes(entry, f"{path}[]", found, seen)
        return found
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    for name in [*slots, *getattr(thing, "__dict__", ()), *getattr(thing, "__struct_fields__", ())]:
        sizes(getattr(thing, name, None), f"{path}.{name}", found, seen)
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_twice_as_many_trajectories_leave_no_more_in_memory(policy: str, tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite", durability="process", create=True) as store:
        run = Run(POLICIES[policy], store)
        kept = []
        for steps in (STEPS, 2 * STEPS):
            run.play(steps)
            kept.append(sizes(run.core, "core", Counter(), set()))
        assert run.finished >= 2 * STEPS * 6
        assert run.core.counts["trajectories_eval"] > STEPS // EVALUATE_EVERY
        assert run.core.counts["generators_lost"] >= 2 * STEPS // RESTART_EVERY
    before, after = kept
    more = {path: (before[path], size) for path, size in after.items() if size > before[path] + 6}
    assert not more, "containers that grow with the trajectories: (after n steps, after 2 n)"
