"""The buffer process: sockets and the store around the state machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from msgspec.structs import replace

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.restore import read_standing, restore
from async_rl.buffer.store import Store, store_begun
from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.events import BufferReady, MessageRefused, PeersTurnedAway, RecordEvent
from async_rl.run_folder import RunFolder, read_rollback
from async_rl.trajectory.codec import WireError, unpack
from async_rl.wire import messages as msg
from async_rl.wire.channel import UNREAD_IN, Router
from async_rl.wire.endpoint import this_host
from async_rl.wire.frames import PORTION_BYTES
from async_rl.wire.heartbeat import Activity
from async_rl.wire.keys import Gate, keys_in

# -------------------- memory
# How the buffer's memory budget is divided. What does not fit is in the store alone.
#
# Everything else the process keeps is small and bounded: a record of some 100 bytes for each trajectory of the
# groups that hold a slot, the results of a few evaluations, counters by reason.

FEWEST_MESSAGES = 16
"""of a peer that may wait in the process: fewer would stop senders without need"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Example: `divide(256 << 20, peers=2)`."""

    cache_bytes: int
    """pages of the store"""
    handled_bytes: int
    """trajectories received and not yet committed"""
    queued_messages: int
    """of each peer, received by the socket's thread and not yet looked at; generators send at most
    PORTION_BYTES in one, or a single trajectory. Beyond it the sender keeps them"""
    part_bytes: int
    """of a batch that is being sent; three copies of it exist for a moment (stored, framed, on its way)"""


def divide(budget_bytes: int, *, peers: int) -> Memory:
    """A quarter for pages, an eighth each for what is handled and queued, three for a batch under way."""
    eighth = budget_bytes // 8
    return Memory(
        cache_bytes=2 * eighth,
        handled_bytes=eighth,
        queued_messages=min(UNREAD_IN, max(FEWEST_MESSAGES, eighth // PORTION_BYTES // max(1, peers))),
        part_bytes=eighth,
    )


POLL_S = 0.05
DRAIN = 256
"""messages handled before one commit"""
STRANGERS_S = 1.0
"""at most so often is said how many were turned away"""


def make_welcome(folder: RunFolder, settings: Settings, *, task_digest: str, segment: str, weights: str) -> msg.Welcome:
    """What a generator that joins this run is told. `segment`: file of the weights on this host; `weights`: where the
    weight server listens, if there is one."""
    return msg.Welcome(
        run=str(folder.path),
        settings=asdict(settings),
        task_digest=task_digest,
        host=this_host(),
        folder=os.getcwd(),
        segment=segment,
        weights=weights,
    )


def run_buffer(
    folder: RunFolder, settings: Settings, core: Core, endpoint: str, version: int, activity: Activity
) -> None:
    """Serve until the trainer is done or something ends the run. Raises RunFailed with the cause.

    A store that is there already is gone on with, for a trainer that begins at `version`."""
    limit = settings.wire.max_message_mb << 20
    chosen = settings.buffer
    memory = divide(chosen.memory_mb << 20, peers=settings.generator.count + 1)
    part_bytes = min(memory.part_bytes, limit // 2)
    begun = store_begun(folder.store)
    with (
        Store(
            folder.store,
            durability=chosen.durability,
            create=not begun,
            cache_bytes=memory.cache_bytes,
            max_bytes=chosen.max_store_mb << 20,
        ) as store,
        Router(
            endpoint,
            max_message_bytes=limit,
            queued_messages=memory.queued_messages,
            keys=keys_in(settings.wire.keys),
        ) as router,
        farewell(core, router),
    ):
        if begun:
            activity.now("reading the store")
            store.rewind(version=version, now=time.time())
            if (back := read_rollback(folder)) is not None and version >= back.at:
                reason = f"rollback: begun under weights that were given up at step {back.at - 1}"
                store.give_up(version=back.at, reason=reason)
            store.commit()
            restore(core, read_standing(store), version=version)
        folder.record(BufferReady(endpoint=endpoint))
        strangers = Strangers(router.gate)
        pruning = chosen.keep_steps > 0
        activity.now("serving")
        activity.looping = True
        while not core.ended:
            activity.still("serving")
            effects = receive(router, core, memory.handled_bytes)
            activity.still("storing and answering" if effects else "serving")
            carry_out(effects, store, router, folder.record, part_bytes)
            strangers.report(core, folder, time.monotonic())
            if chosen.keep_steps and (pruning or any(isinstance(effect, do.MarkConsumed) for effect in effects)):
                pruning = store.prune(keep_steps=chosen.keep_steps, oldest_live=core.oldest_live())
                store.commit()


@contextmanager
def farewell(core: Core, router: Router) -> Iterator[None]:
    """Where this process ends before the run does, generators that joined by themselves hear it from nobody else."""
    try:
        yield
    finally:
        if not core.ended:
            for peer in core.admission.generators:
                router.send(peer, msg.Stop(reason="its launcher or its buffer was stopped"))


@dataclass(slots=True)
class Strangers:
    """Tells of the peers that were turned away because they showed no known key."""

    gate: Gate | None
    """None: a Unix socket, which the file system guards"""
    told: int = 0
    seen: int = 0
    """at the last look"""
    told_at: float = 0.0

    def report(self, core: Core, folder: RunFolder, now: float) -> None:
        """`now`: seconds, monotonic."""
        if self.gate is None or now - self.told_at < STRANGERS_S:
            return
        # one that was being greeted a moment ago is no stranger yet
        settled, self.seen, self.told_at = min(self.seen, self.gate.turned_away), self.gate.turned_away, now
        if settled <= self.told:
            return
        self.told = settled
        core.counts["peers_turned_away"] = self.told
        folder.record(PeersTurnedAway(count=self.told, reasons=self.gate.reasons))


def receive(router: Router, core: Core, most_bytes: int) -> list[do.Effect]:
    """Wait a moment for messages, handle those that are there, as many as `most_bytes` of trajectories allow."""
    out: list[do.Effect] = []
    received = router.receive(POLL_S)
    for _ in range(DRAIN):
        if received is None:
            break
        peer, message = received
        if isinstance(message, WireError):
            out += core.malformed(peer, message, time.time())
        else:
            out += core.handle(peer, message, time.time())
            most_bytes -= trajectory_bytes(message)
        if most_bytes <= 0:
            break
        received = router.receive(0.0)
    return out + core.tick(time.time())


def trajectory_bytes(message: msg.Message) -> int:
    """Of the columns it carries."""
    if not isinstance(message, msg.Finished | msg.Turns):
        return 0
    return sum(t.tokens.nbytes + t.log_behaviour.nbytes for t in message.trajectories)


def carry_out(effects: Sequence[do.Effect], store: Store, router: Router, record: RecordEvent, part_bytes: int) -> None:
    """Write everything, commit, and only then tell anybody. `record` writes into events.jsonl.
    `part_bytes`: of a batch, sent at once."""
    if not effects:
        return
    started, processor = time.perf_counter(), time.thread_time()
    wrote = False
    for effect in effects:
        wrote |= write(effect, store)
    if wrote:
        store.commit()
        store.seconds_writing += time.perf_counter() - started
        store.processor_seconds += time.thread_time() - processor
    for effect in effects:
        match effect:
            case do.Send(peer=peer, message=message):
                router.send(peer, message)
            case do.SendTurns(peer=peer, pairs=pairs):
                for pair in pairs:  # one by one: each may be long
                    found = tuple(unpack(blob) for blob in store.load_turns([pair]))
                    if found:  # else the episode's last words came in this round
                        router.send(peer, msg.Turns(trajectories=found))
            case do.SendBatch():
                send_batch(effect, store, router, part_bytes)
            case do.RecordRefusal():
                record(MessageRefused(peer=effect.peer.hex(), what=effect.what, kind=effect.kind, reason=effect.reason))
            case do.Note(event=event):
                record(event)
            case do.EndRun(reason=reason, failed=True):
                raise RunFailed(reason)


def send_batch(effect: do.SendBatch, store: Store, router: Router, part_bytes: int) -> None:
    """The batch, or so much of it that its memory is bounded; the trainer asks for the rest."""
    if effect.step < store.first_step():
        raise RunFailed(
            f"{store.path}: the trajectories of step {effect.step} are deleted (buffer.keep_steps), those from step "
            f"{store.first_step()} on are there; go on from a checkpoint of that version or a later one"
        )
    part = store.load_part(effect.step, after=effect.after, most_bytes=part_bytes)
    assert part is not None, "a batch is stored before it is sent"
    total, blobs = part
    counters = replace(
        effect.counters,
        store_seconds=store.seconds_writing,
        store_processor_seconds=store.processor_seconds,
        store_commits=store.commits,
    )
    views = tuple(memoryview(blob) for blob in blobs)
    message = msg.Batch(step=effect.step, blobs=views, after=effect.after, total=total, counters=counters)
    router.send(effect.peer, message)


def write(effect: do.Effect, store: Store) -> bool:
    """Put one effect into the store; False when it is not a write."""
    match effect:
        case do.AddGroup():
            store.add_group(
                group=effect.group,
                problem=effect.problem,
                split=effect.split,
                admitted_version=effect.admitted_version,
                admitted_at=effect.admitted_at,
                generator=effect.generator,
                position=effect.position,
                attempt=effect.attempt,
            )
        case do.AddTrajectories(trajectories=trajectories, blobs=blobs):
            store.add_trajectories(trajectories, blobs)
        case do.AddDropped(trajectories=trajectories):
            store.add_dropped(trajectories)
        case do.SaveTurns(trajectories=trajectories):
            store.save_turns(trajectories)
        case do.DropTurns(pairs=pairs):
            store.drop_turns(pairs)
        case do.RefuseGroup(group=group, reason=reason):
            store.refuse_group(group, reason)
        case do.FormBatch(step=step, groups=groups, formed_at=at):
            store.form_batch(step=step, groups=groups, formed_at=at)
        case do.MarkTrained(step=step):
            store.mark_trained(step=step, trained_at=time.time())
        case do.MarkConsumed(step=step, oldest=oldest):
            store.mark_consumed(step=step, oldest=oldest)
        case do.Remember(key=key, value=value):
            store.set_meta(key, json.dumps(value))
        case do.AddEvaluation(result=result, finished_at=at):
            store.add_evaluation(
                evaluation=result.evaluation,
                rewards=result.rewards,
                version_min=result.version_min,
                version_max=result.version_max,
                finished_at=at,
            )
        case _:
            return False
    return True
