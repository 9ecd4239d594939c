"""The buffer process: sockets and the store around the state machine (`run_buffer`).

A round receives messages, lets the state machine handle them, writes and commits what follows, and only then answers.
Large rounds are written by a thread beside (store_thread.py), while the next messages are handled.
"""

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
from async_rl.buffer.pool_restore import open_pool
from async_rl.buffer.restore import read_state, restore
from async_rl.buffer.starts import read_start, with_starts
from async_rl.buffer.store import Store, store_begun
from async_rl.buffer.store_thread import Sender, StoreThread
from async_rl.config import Settings
from async_rl.config.sources import read_sources
from async_rl.errors import RunFailed
from async_rl.events import BufferReady, MessageRefused, PeersTurnedAway, RecordEvent
from async_rl.run_folder import RunFolder, read_rollback
from async_rl.steady_clock import steady_time
from async_rl.tidying import Tidying, freeze_set_up
from async_rl.trajectory.codec import WireError, unpack
from async_rl.wire import messages as msg
from async_rl.wire.channel import UNREAD_IN, Router
from async_rl.wire.endpoint import is_tcp, this_host
from async_rl.wire.frames import PORTION_BYTES
from async_rl.wire.heartbeat import Activity
from async_rl.wire.keys import Gate, keys_in

POLL_S = 0.05
"""longest wait for a message; then time passes for the state machine without one"""
TICK_S = 0.02
"""least time that passes for it at once: it looks at every generator then"""
MESSAGES_A_ROUND = 256
"""messages handled before one commit"""
ROUND_S = 0.02
"""seconds that a round takes before its answers leave, but for a last message"""
MOST_PART_BYTES = 8 << 20
"""of a batch that is sent at once: memory of a larger one is given back to the system, and is paid for again"""
STRANGERS_S = 1.0
"""seconds between two reports of peers that were turned away"""
FEWEST_MESSAGES = 16
"""messages of one peer that may wait in the process: fewer would stop senders without need"""
FEWEST_IN_ALL = 1024
"""messages of all peers that may wait, whatever the budget"""
MAY_JOIN = 63
"""generators that may join over TCP, for the share of each in what may wait: how many will come is not known, and a
socket's limits are set once"""


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
        sources=tuple(asdict(source) for source in read_sources(folder.sources)),
    )


def run_buffer(
    folder: RunFolder, settings: Settings, core: Core, endpoint: str, version: int, activity: Activity
) -> None:
    """Serve until the trainer is done or something ends the run. Raises RunFailed with the cause.

    A store that exists is continued, for a trainer that begins at `version`."""
    limit = settings.wire.max_message_mb << 20
    chosen = settings.buffer
    joining = MAY_JOIN if is_tcp(endpoint) else 0
    memory = divide_memory(chosen.memory_mb << 20, peers=1 + settings.generator.count + joining)
    part_bytes = min(memory.part_bytes, MOST_PART_BYTES, limit // 2)
    begun = store_begun(folder.store)
    with (
        Store(
            folder.store,
            durability=chosen.durability,
            create=not begun,
            cache_bytes=memory.cache_bytes,
            recent_bytes=memory.recent_bytes,
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
        open_pool(store, core.batching.pool, folder.demonstrations)
        if begun:
            activity.now("reading the store")
            store.rewind(version=version, now=steady_time())
            if (back := read_rollback(folder)) is not None and version >= back.at:
                reason = f"rollback: begun under weights that were given up at step {back.at - 1}"
                store.give_up(version=back.at, reason=reason)
            store.commit()
            restore(core, read_state(store), version=version)
        folder.record(BufferReady(endpoint=endpoint))
        strangers, tidying, ticks = Strangers(router.gate), Tidying(), Ticks()
        freeze_set_up()

        def carry_out(effects: Sequence[do.Effect], sender: Sender) -> None:
            execute(effects, store, sender, folder.record, part_bytes)

        activity.now("serving")
        activity.looping = True
        with StoreThread(carry_out) as storing:
            router.watch(storing.fileno())
            try:
                while not core.ended:
                    if not storing.stuck:
                        activity.keepalive("storing and answering" if storing.waiting_bytes else "serving")
                    effects = receive_beside(storing, router, core, memory.handled_bytes, ticks)
                    if chosen.keep_steps and (store.pruning or any(isinstance(e, do.MarkConsumed) for e in effects)):
                        effects.append(prune(core, chosen.keep_steps))
                    storing.put(effects)
                    deliver(storing, router)
                    strangers.report(core, folder, time.monotonic())
                    tidying.round(time.monotonic())
                storing.finish()
            finally:
                deliver(storing, router)


def receive_beside(storing: StoreThread, router: Router, core: Core, most_bytes: int, ticks: Ticks) -> list[do.Effect]:
    """As `receive`; nothing is received while as much as may be handled waits for the store."""
    room = most_bytes - storing.waiting_bytes
    if room > 0:
        return receive(router, core, room, ticks)
    storing.wait(POLL_S)
    return []


def prune(core: Core, keep_steps: int) -> do.Prune:
    """What may be deleted as things stand: all of it may be at any later time."""
    return do.Prune(keep_steps=keep_steps, oldest_live=core.oldest_live(), pool=frozenset(core.batching.pool.members))


def deliver(storing: StoreThread, router: Router) -> None:
    """Send what is answered."""
    for peer, message, frames in storing.answers():
        router.send_frames(peer, message, frames)


@contextmanager
def farewell(core: Core, router: Router) -> Iterator[None]:
    """When this process ends before the run does, tell the generators, and the ranks on other machines: nobody else
    tells those that were started from outside."""
    try:
        yield
    finally:
        if not core.ended:
            stop = msg.Stop(reason="its launcher or its buffer was stopped")
            for peer in [*core.admission.generators, *core.presence.started_outside()]:
                router.send(peer, stop)


@dataclass(slots=True)
class Strangers:
    """Records how many peers were turned away because they showed no known key."""

    gate: Gate | None
    """None: a Unix socket, which the file system guards"""
    reported: int = 0
    """peers"""
    counted: int = 0
    """peers, when they were last counted"""
    counted_at: float = 0.0

    def report(self, core: Core, folder: RunFolder, now: float) -> None:
        """Count the peers turned away and record them if there are more. `now`: seconds, monotonic."""
        if self.gate is None or now - self.counted_at < STRANGERS_S:
            return
        # a connection in its handshake counts as turned away: only those that still count the next time are reported
        settled, self.counted, self.counted_at = min(self.counted, self.gate.turned_away), self.gate.turned_away, now
        if settled <= self.reported:
            return
        self.reported = settled
        core.counts["peers_turned_away"] = self.reported
        folder.record(PeersTurnedAway(count=self.reported, reasons=self.gate.reasons))


@dataclass(slots=True)
class Ticks:
    """When time passed for the state machine last."""

    last: float = float("-inf")

    def tick(self, core: Core, now: float) -> list[do.Effect]:
        """Let time pass, unless it did just now."""
        if now - self.last < TICK_S:
            return []
        self.last = now
        return core.tick(now)


def receive(router: Router, core: Core, most_bytes: int, ticks: Ticks | None = None) -> list[do.Effect]:
    """Wait a moment for messages and handle those that are there, as many as `most_bytes` of trajectories allow."""
    out: list[do.Effect] = []
    received = router.receive(POLL_S)
    begun = time.monotonic()
    for _ in range(MESSAGES_A_ROUND):
        if received is None:
            break
        peer, message = received
        if isinstance(message, WireError):
            out += core.malformed(peer, message, steady_time())
        else:
            out += core.handle(peer, message, steady_time())
            most_bytes -= trajectory_bytes(message)
        if most_bytes <= 0 or time.monotonic() - begun > ROUND_S:
            break
        received = router.receive(0.0)
    return out + (ticks or Ticks()).tick(core, steady_time())


def trajectory_bytes(message: msg.Message) -> int:
    """Bytes of the columns that a message carries."""
    if not isinstance(message, msg.Finished | msg.Turns):
        return 0
    return sum(t.tokens.nbytes + t.log_behaviour.nbytes for t in message.trajectories)


def execute(effects: Sequence[do.Effect], store: Store, router: Sender, record: RecordEvent, part_bytes: int) -> None:
    """Write everything, commit, and only then answer. `record` writes an event into the run's record; `part_bytes`: of
    a batch, sent at once. Raises RunFailed when the effects end the run with an error."""
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
                for part in with_starts(message, store) if isinstance(message, msg.Permits) else (message,):
                    router.send(peer, part)
            case do.SendTurns(peer=peer, pairs=pairs):
                for pair in pairs:  # one message each: they may be long
                    found = tuple(unpack(blob) for blob in store.load_turns([pair]))
                    if found:  # else the episode was finished, or its group refused, in this round
                        router.send(peer, msg.Turns(trajectories=found))
            case do.SendBatch():
                send_batch(effect, store, router, part_bytes)
            case do.RecordRefusal():
                record(MessageRefused(peer=effect.peer.hex(), what=effect.what, kind=effect.kind, reason=effect.reason))
            case do.Note(event=event):
                record(event)
            case do.EndRun(reason=reason, failed=True):
                raise RunFailed(reason)


def send_batch(effect: do.SendBatch, store: Store, router: Sender, part_bytes: int) -> None:
    """Send the batch, or a part of it of bounded size; the trainer asks for the rest."""
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
    views = tuple([memoryview(blob) for blob in blobs])
    message = msg.Batch(step=effect.step, blobs=views, after=effect.after, total=total, counters=counters)
    router.send(effect.peer, message)


def write(effect: do.Effect, store: Store) -> bool:
    """Apply one effect to the store; False when it is no write."""
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
        case do.AddDecision(group=group, decision=decision):
            store.add_decision(group, decision, read_start(store, decision.start))
        case do.AddOutcome(outcome=outcome):
            store.add_outcome(outcome)
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
        case do.FormBatch(step=step, groups=groups, formed_at=at, drawn=drawn):
            store.form_batch(step=step, groups=groups, formed_at=at)
            if drawn:
                store.add_reused(step, drawn)
        case do.MarkTrained(step=step):
            store.mark_trained(step=step, trained_at=steady_time())
        case do.MarkConsumed(step=step, oldest=oldest):
            store.mark_consumed(step=step, oldest=oldest)
        case do.Remember(key=key, value=value):
            store.set_meta(key, json.dumps(value))
        case do.Prune(keep_steps=keep_steps, oldest_live=oldest_live, pool=pool):
            store.prune(keep_steps=keep_steps, oldest_live=oldest_live, pool=pool)
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


# ---------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShares:
    """How the buffer's memory budget is divided; what does not fit is in the store alone.

    Everything else that the process keeps is small and bounded: a record of some 100 bytes for each trajectory of the
    groups that hold a slot, the results of a few evaluations, counters by name.
    """

    cache_bytes: int
    """pages of the store"""
    recent_bytes: int
    """trajectories of groups that are in no batch yet: what fits is not read back"""
    handled_bytes: int
    """trajectories received and not yet committed"""
    queued_messages: int
    """messages of each peer, received by the socket's thread and not yet handled; beyond it the sender keeps them.
    Generators send at most PORTION_BYTES in one, or a single trajectory"""
    part_bytes: int
    """of a batch that is being sent; three copies of it exist for a moment (stored, framed, on its way)"""


def divide_memory(budget_bytes: int, *, peers: int) -> MemoryShares:
    """A quarter for pages and recent trajectories, an eighth each for what is handled and queued, three eighths for a
    batch being sent."""
    eighth = budget_bytes // 8
    return MemoryShares(
        cache_bytes=eighth // 2,
        recent_bytes=eighth + eighth // 2,
        handled_bytes=eighth,
        queued_messages=queued_messages(budget_bytes, peers=peers),
        part_bytes=eighth,
    )


def queued_messages(budget_bytes: int, *, peers: int) -> int:
    """Messages of each of so many peers that may wait to be handled. Of many peers few of each: they do not all send at
    once."""
    fewest = max(1, min(FEWEST_MESSAGES, FEWEST_IN_ALL // max(1, peers)))
    return min(UNREAD_IN, max(fewest, budget_bytes // 8 // PORTION_BYTES // max(1, peers)))
