"""The buffer without sockets: processor time of each trajectory, by part (`python bench/load.py --ingest`)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from load import GROUP_SIZE, Context, settings_of

from async_rl.wire import messages as msg
from async_rl.wire.frames import decode, encode, portions

STEPS, GROUPS_A_ROUND = 4, 8


@dataclass
class Sent:
    """Where the buffer's answers go: encoded, and kept."""

    messages: list[msg.Message] = field(default_factory=list)

    def send(self, peer: bytes, message: msg.Message) -> bool:
        encode(message)
        self.messages.append(message)
        return True

    def take(self, kind: type) -> list[Any]:
        found = [message for message in self.messages if isinstance(message, kind)]
        self.messages.clear()
        return found


@dataclass
class Timed:
    """A connection to SQLite that sums the processor time inside its calls, in which Python's lock is free."""

    connection: Any
    seconds: float = 0.0

    def execute(self, *given: Any) -> Any:
        began = time.thread_time()
        cursor = self.connection.execute(*given)
        self.seconds += time.thread_time() - began
        return cursor

    @property
    def in_transaction(self) -> bool:
        return bool(self.connection.in_transaction)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


def ingest(folder: Path, tokens: int, groups: int) -> str:
    """Processor time for each trajectory, by part, of the rule's thread (decode, handle) and of the store's: carried
    out in turn in one thread, which nothing else of the machine can hold up between two clocks."""
    from async_rl.buffer.build import make_core
    from async_rl.buffer.loop import MOST_PART_BYTES, execute
    from async_rl.buffer.store import Store
    from async_rl.wire.channel import _keep_freed_memory

    _keep_freed_memory()  # as every process with a socket does
    settings = settings_of(groups, "", "")
    core = make_core(settings, train_problems=100_000, vocabulary=32_000)
    core.rules = core.admission.rules = replace(core.rules, max_permits=STEPS * groups)
    core.acceptance.rules = core.rules
    wire, clock, spent = Sent(), time.process_time, {"decode": 0.0, "handle": 0.0, "store": 0.0, "batch": 0.0}
    path, recent = folder / "trajectories.sqlite", 1 << 30
    with Store(path, durability="process", create=True, cache_bytes=16 << 20, recent_bytes=recent) as store:
        store._connection = timed = Timed(store._connection)  # type: ignore[assignment]

        def say(peer: bytes, messages: Sequence[list[Any]], *parts: str) -> None:
            """A round of the buffer."""
            effects: list[Any] = []
            for frames in messages:
                times = [clock()]
                message = decode(frames)
                times.append(clock())
                effects += core.handle(peer, message, time.monotonic())
                times.append(clock())
                for part, (begun, ended) in zip(parts, itertools.pairwise(times), strict=False):
                    spent[part] += ended - begun
            began = clock()
            execute(effects, store, wire, lambda _: None, MOST_PART_BYTES)
            if parts:
                spent[parts[-1]] += clock() - began

        say(b"trainer", [encode(msg.Hello(role="trainer", name="trainer", pid=1))])
        say(b"g", [encode(msg.Hello(role="generator", name="g", pid=2))])
        context, taken = Context(None), 0
        for step in range(STEPS):
            if step == 1:  # the first one grows the process
                taken, timed.seconds = 0, 0.0
                spent = dict.fromkeys(spent, 0.0)
            say(b"g", [encode(msg.Want(limit=(step + 1) * groups, version=0))])
            permits = [permit for message in wire.take(msg.Permits) for permit in message.permits]
            for first in range(0, len(permits), GROUPS_A_ROUND):
                some = permits[first : first + GROUPS_A_ROUND]
                made = (context.trajectory(permit, sample, 0, tokens) for permit in some for sample in permit.samples)
                sent = [encode(msg.Finished(trajectories=trajectories)) for trajectories in portions(made)]
                frames = [[bytes(frame) for frame in message] for message in sent]
                say(b"g", frames, "decode", "handle", "store")
            wire.messages.clear()
            have, total = 0, 1
            while have < total:
                say(b"trainer", [encode(msg.NextBatch(step=step, after=have))], "batch", "batch", "batch")
                for batch in wire.take(msg.Batch):
                    have, total = have + len(batch.blobs), batch.total
            taken += len(permits) * GROUP_SIZE
    each = {part: 1e6 * seconds / taken for part, seconds in spent.items()}
    free = 1e6 * timed.seconds / taken
    rule, stored = each["decode"] + each["handle"], each["store"] + each["batch"]
    shown = ", ".join(f"{part} {cost:.0f}" for part, cost in each.items())
    return (
        f"{tokens:6} tokens: us a trajectory: {shown}; the rule's thread {rule:.0f}, the store's {stored:.0f}, of "
        f"which {free:.0f} inside SQLite; under Python's lock {rule + stored - free:.0f}: "
        f"{tokens / max(stored, rule + stored - free):.1f} M tokens/s"
    )
