"""One buffer process and up to 1,000 joined generators: real sockets (TCP on the loopback, CURVE), no engines.

    python bench/load.py [--generators N ...] [--tokens N ...] [--seconds S] [--rate TOKENS_PER_S] [--profile FILE]
    python bench/load.py --ingest [--tokens N ...]

The buffer is `python -m async_rl.buffer` with its store, as a run starts it. The generators are fakes, many in a
process: each has the two sockets of a real one, says Hello, asks for permits, sends trajectories of so many tokens in
messages as a real one cuts them, its status and its pulse once a second, and for each version of the weights
that it holds the evidence (of a model with 291 tensors). The trainer asks a batch ahead, takes it as fast as it comes
and publishes. A step has as many groups of 8 as there are generators, 64 at least.

Two rows of each case: `flat out`, every fake answers a permit at once, and `at RATE`, where sequences take as long as
that total of tokens a second wants (a third of the limit that was found, by default). Columns:

messages/s, tokens/s    that the buffer took, by the wall clock; what the machine gives the fakes bounds them
core, io                processor time of the buffer's main thread, and of ZeroMQ's thread (which decrypts), per second
store                   likewise of the thread beside, which stores and reads batches
limit, tokens/s         tokens/s at which the busiest thread would use one core up; with cores for all of them. Threads
                        share Python's lock, which is free inside SQLite and ZeroMQ alone: --ingest counts what is not
MB                      resident memory of the buffer's process, at its end; its peak
stored, ms              from sending trajectories to the word that they are stored, median and 99th percentile: what any
                        message waits behind those of others, and a commit
permits, s              from a request for permits to them: that, and the wait for the staleness rule, which gives
                        none before the batches ahead are taken
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import zmq
import zmq.asyncio

from async_rl.config import Settings
from async_rl.config.schema import structured
from async_rl.process_spec import BufferSpec
from async_rl.run_folder import RunFolder
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.types import sample_seed
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, _buffers, _connected
from async_rl.wire.endpoint import free_port
from async_rl.wire.frames import HARMLESS, decode, encode, portions
from async_rl.wire.keys import Keys, make_keys

GROUP_SIZE, MAX_STALENESS, PROMPT_SHARE, SEQUENCES = 8, 8, 8, 32
"""a trajectory's prompt is one in eight of its tokens; a generator takes four groups at once"""
STATUS_S, PULSE_S = 1.0, 1.0
TENSORS = 291
"""of a 7B model, whose evidence a generator shows"""
WARM_UP_S, START_S = 3.0, 600.0
LIMIT = 1 << 30
EVIDENCE = tuple((f"model.layers.{i // 9}.self_attn.projection_{i % 9}.weight", i * 2**40) for i in range(TENSORS))


def more_files() -> None:
    """1,000 generators have 2,000 sockets."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---------------------------------------------------------------- generators


@dataclass(slots=True)
class Fake:
    """A generator without an engine."""

    number: int
    socket: Any
    pulse: Any
    tokens: int
    delay_s: float
    context: Context
    version: int = 0
    limit: int = 0
    received: int = 0
    running: int = 0
    asked: float = 0.0
    groups: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"load-{self.number}"

    @property
    def session(self) -> int:
        return self.number + 1

    async def send(self, message: msg.Message) -> None:
        self.context.sent += 1
        await self.socket.send_multipart(encode(message), copy=False)

    async def run(self) -> None:
        await self.evidence()
        await self.want()
        while True:
            message = decode(_buffers(await self.socket.recv_multipart(copy=False)))
            match message:
                case msg.Permits(permits=permits, granted=granted):
                    if self.asked:
                        self.context.waits.append(time.monotonic() - self.asked)
                        self.asked = 0.0
                    self.received = max(self.received, granted)
                    due = time.monotonic() + self.delay_s
                    for permit in permits:
                        self.running += len(permit.samples)
                        self.groups.add(permit.group)
                        heapq.heappush(self.context.due, (due, permit.group, self.number, permit))
                    self.context.news.set()
                case msg.NewWeights(version=version) if version > self.version:
                    self.version = version
                    await self.evidence()
                    await self.send(msg.Holds(version=version, session=self.session))
                case msg.Accepted(pairs=pairs):
                    self.context.accepted += len(pairs)
                    now = time.monotonic()
                    sent = [self.context.sent_at.pop(pair, 0.0) for pair in pairs]
                    self.context.stored += [now - at for at in sent if at]
                case msg.Unknown():  # a connection broke, and the Hello was lost with it
                    self.context.rejoined += 1
                    self.groups.clear()
                    self.received = self.limit = self.running = 0
                    await self.say_hello()
                    await self.evidence()
                    await self.want()
                case msg.Refused(what=what, reason=reason, kind=kind) if kind not in HARMLESS:
                    raise RuntimeError(f"{self.name}: the buffer refused {what}: {reason}")
                case msg.Stop():
                    return
                case _:
                    pass

    async def say_hello(self) -> None:
        hello = msg.Hello(role="generator", name=self.name, pid=self.session, session=self.session, joined=True)
        await self.send(hello)

    async def finish(self, permit: msg.Permit) -> None:
        """Send all samples of a group, as a real generator cuts them into messages, and ask for another one."""
        made = tuple(self.context.trajectory(permit, sample, self.version, self.tokens) for sample in permit.samples)
        for some in portions(made):
            self.context.sent_at[some[-1].group, some[-1].sample] = time.monotonic()
            await self.send(msg.Finished(trajectories=some, session=self.session))
        self.running = max(0, self.running - len(made))
        self.groups.discard(permit.group)
        await self.want()

    async def want(self) -> None:
        limit = self.received + (SEQUENCES - self.running) // GROUP_SIZE
        if limit > self.limit:
            self.limit = limit
            self.asked = self.asked or time.monotonic()
            await self.send(msg.Want(limit=limit, version=self.version, session=self.session))

    async def evidence(self) -> None:
        shown = msg.Canary(
            name=self.name, version=self.version, digests=EVIDENCE, log_probs=(-1.0,) * 64, session=self.session
        )
        await self.send(shown)

    def status(self) -> msg.Status:
        return msg.Status(
            name=self.name,
            session=self.session,
            version=self.version,
            limit=self.limit,
            groups=tuple(self.groups),
            busy_seconds=1.0,
            wall_seconds=1.0,
            tokens_generated=self.context.accepted * self.tokens,
            running=self.running,
            waiting=0,
        )


@dataclass
class Context:
    """The generators of one process."""

    shared: Any
    fakes: list[Fake] = field(default_factory=list)
    due: list[tuple[float, int, int, msg.Permit]] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    waits: list[float] = field(default_factory=list)
    """for permits"""
    sent_at: dict[tuple[int, int], float] = field(default_factory=dict)
    """when a message left, by its last trajectory"""
    stored: list[float] = field(default_factory=list)
    """from there to the word that it is stored"""
    sent: int = 0
    accepted: int = 0
    rejoined: int = 0
    columns: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def trajectory(self, permit: msg.Permit, sample: int, version: int, tokens: int) -> Trajectory:
        if tokens not in self.columns:
            random = np.random.default_rng(0)
            log = np.full(tokens, -0.5, np.float32)
            log[: tokens // PROMPT_SHARE] = 0.0
            self.columns[tokens] = (random.integers(1000, 30_000, tokens, np.int32), log)
        own, log = self.columns[tokens]
        prompt = tokens // PROMPT_SHARE
        return Trajectory(
            group=permit.group,
            sample=sample,
            problem=permit.problem,
            split=permit.split,
            seed=sample_seed(permit.seed, sample),
            tokens=own,
            log_behaviour=log,
            turns=(Turn(start=prompt, length=tokens - prompt),),
            versions=(VersionSpan(version=version, start=prompt, end=tokens),),
            reward=float(sample % 2),
            ended="finished",
            temperature=permit.temperature,
        )

    async def work(self) -> None:
        """Finish groups when they are due."""
        by_number = {fake.number: fake for fake in self.fakes}
        while True:
            self.news.clear()
            while self.due and self.due[0][0] <= time.monotonic():
                _, _, number, permit = heapq.heappop(self.due)
                await by_number[number].finish(permit)
                await asyncio.sleep(0)
            wait = max(0.0, self.due[0][0] - time.monotonic()) if self.due else 1.0
            with suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), min(wait, 1.0) or 1e-4)

    async def report(self) -> None:
        """Status and pulses, spread over their interval."""
        rounds = 0
        while True:
            began, rounds = time.monotonic(), rounds + 1
            for place, fake in enumerate(self.fakes):
                await fake.send(fake.status())
                if (rounds + place) % round(PULSE_S / STATUS_S) == 0:
                    pulse = msg.Pulse(name=fake.name, pid=fake.session, role="generator", doing="decoding", since_s=1.0)
                    self.sent += 1
                    await fake.pulse.send_multipart(encode(pulse), copy=False)
                    while await fake.pulse.poll(0):
                        await fake.pulse.recv_multipart()
                if place % 10 == 9:
                    await asyncio.sleep(max(0.0, began + STATUS_S * place / len(self.fakes) - time.monotonic()))
            await asyncio.sleep(max(0.0, began + STATUS_S - time.monotonic()))


def generators(endpoint: str, keys: str, numbers: Sequence[int], tokens: int, delay_s: float, pipe: Any) -> None:
    """A process of fakes. Answers each word on the pipe with (messages sent, trajectories accepted, waits for
    permits and for what is stored since the last word, Hellos said anew)."""
    more_files()
    shared = zmq.asyncio.Context()
    shared.set(zmq.MAX_SOCKETS, 1 << 16)

    async def every() -> None:
        context = Context(shared)
        for number in numbers:
            ends = [
                _connected(shared, endpoint, f"load-{number}{end}", LIMIT, Keys(Path(keys))) for end in ("", msg.PULSE)
            ]
            context.fakes.append(Fake(number, ends[0], ends[1], tokens, delay_s, context))
        loop = asyncio.get_running_loop()

        def tell() -> None:
            pipe.recv()
            pipe.send((context.sent, context.accepted, context.waits, context.stored, context.rejoined))
            context.waits, context.stored = [], []

        loop.add_reader(pipe.fileno(), tell)
        for fake in context.fakes:
            await fake.say_hello()
        tasks = [context.work(), context.report(), *(fake.run() for fake in context.fakes)]
        done, _ = await asyncio.wait([*map(asyncio.create_task, tasks)], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    try:
        asyncio.run(every())
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


# ---------------------------------------------------------------- trainer and buffer


@dataclass
class Trainer:
    """Takes batches as fast as they come."""

    endpoint: str
    keys: Keys
    steps: int = 0
    sent: int = 0
    over: bool = False

    def run(self) -> None:
        with Dealer(self.endpoint, "trainer", keys=self.keys) as dealer:
            dealer.send(msg.Hello(role="trainer", name="trainer", pid=os.getpid()))
            dealer.send(msg.Published(version=0))
            dealer.send(msg.NextBatch(step=0))
            have = 0
            while not self.over:
                try:
                    message = dealer.receive(0.5, "a batch")
                except Exception:
                    continue
                match message:
                    case msg.Batch(step=step) if step == self.steps:
                        have += len(message.trajectories)
                        if have < message.total:
                            dealer.send(msg.NextBatch(step=step, after=have))
                            self.sent += 1
                        else:
                            have, self.steps = 0, step + 1
                            dealer.send(msg.NextBatch(step=self.steps))
                            dealer.send(msg.Published(version=self.steps))
                            self.sent += 2
                    case msg.Refused(what=what, reason=reason):
                        print(f"trainer: {what} was refused: {reason}", file=sys.stderr)
                    case _:
                        pass
            dealer.send(msg.Done())


def thread_seconds(pid: int) -> dict[str, float]:
    """Processor seconds of each thread of a process, by its number and name."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name, _, rest = (task / "stat").read_text().partition(" (")[2].rpartition(") ")
        fields = rest.split()
        found[f"{task.name} {name}"] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def memory_mb(pid: int) -> tuple[float, float]:
    """(resident, peak)."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def settings_of(count: int, keys: str, endpoint: str) -> Settings:
    values = {
        "name": "load",
        "generator": {"count": 0, "max_sequences": SEQUENCES},
        "batch": {"groups_per_step": max(64, count), "group_size": GROUP_SIZE},
        "staleness": {"max_staleness": MAX_STALENESS, "policy": "wait"},
        "buffer": {"drop_zero_signal": False},
        "wire": {"endpoint": endpoint, "keys": keys, "frozen_after_s": 600},  # the machine may be busy
    }
    return structured(Settings, values, where="")


def case(folder: Path, count: int, tokens: int, rate: float, seconds: float, profile: str, processes: int) -> dict:
    """One row. `rate`: tokens a second that all generators offer together; 0: as many as they can."""
    keys, endpoint = make_keys(folder / "keys"), f"tcp://127.0.0.1:{free_port()}"
    run = RunFolder(folder / "run")
    with run.created(settings_of(count, str(keys.folder), endpoint)):
        pass
    spec = BufferSpec(
        run=str(run.path), name="buffer", endpoint=endpoint, train_problems=100_000, vocabulary=32_000, version=0
    )
    words = [__file__, "--as-buffer", profile, spec.to_json()] if profile else ["-m", "async_rl.buffer", spec.to_json()]
    log = (folder / "buffer.log").open("w")
    buffer = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)
    trainer = Trainer(endpoint, keys)
    thread = threading.Thread(target=trainer.run)
    delay_s = count * SEQUENCES * tokens / rate if rate else 0.0
    spawn = multiprocessing.get_context("spawn")
    pipes, others = [], []
    for part in range(min(processes, count)):
        ours, theirs = spawn.Pipe()
        numbers = range(part, count, processes)
        chosen = (endpoint, str(keys.folder), numbers, tokens, delay_s, theirs)
        others.append(spawn.Process(target=generators, args=chosen, daemon=True))
        pipes.append(ours)

    def ask() -> list[tuple[int, int, list[float], list[float], int]]:
        for pipe in pipes:
            pipe.send("")
        return [pipe.recv() for pipe in pipes]

    try:
        thread.start()
        for other in others:
            other.start()
        deadline = time.monotonic() + START_S
        while trainer.steps < 2:
            assert buffer.poll() is None, run.failure("buffer").read_text()
            assert all(other.is_alive() for other in others), "a process of fakes has ended"
            assert time.monotonic() < deadline, "no two steps were formed"
            time.sleep(0.1)
        time.sleep(max(WARM_UP_S, min(delay_s, seconds)))
        before, sent, began = thread_seconds(buffer.pid), ask(), time.monotonic()
        steps, told = trainer.steps, trainer.sent
        time.sleep(seconds)
        after, now, took = thread_seconds(buffer.pid), ask(), time.monotonic() - began
        memory = memory_mb(buffer.pid)
        trained = trainer.steps - steps
    finally:
        trainer.over = True
        thread.join(10)
        try:
            buffer.wait(10)
        except subprocess.TimeoutExpired:
            buffer.kill()
        for other in others:
            other.join(5)
            if other.is_alive():
                other.kill()
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    core = spent[next(name for name in spent if name.startswith(f"{buffer.pid} "))]
    io = max(value for name, value in spent.items() if "IO" in name)
    store = sum(value for name, value in spent.items() if "ZMQ" not in name) - core
    accepted = sum(b[1] - a[1] for a, b in zip(sent, now, strict=True))
    messages = sum(b[0] - a[0] for a, b in zip(sent, now, strict=True)) + trainer.sent - told
    waits = [wait for _, _, some, *_ in now for wait in some]
    stored = [wait for *_, some, _ in now for wait in some]
    return {
        "generators": count,
        "tokens": tokens,
        "rate": rate,
        "messages_per_s": messages / took,
        "trajectories_per_s": accepted / took,
        "tokens_per_s": accepted * tokens / took,
        "steps": trained,
        "core": core / took,
        "io": io / took,
        "us_a_message": 1e6 * core / messages,
        "store": store / took,
        "limit_tokens_per_s": accepted * tokens / max(core, io, store),
        "resident_mb": memory[0],
        "peak_mb": memory[1],
        "permit_s": quantiles(waits),
        "permits": len(waits),
        "stored_s": quantiles(stored),
        "rejoined": sum(rejoined for *_, rejoined in now),
        "threads": {name: round(value / took, 3) for name, value in spent.items() if value},
    }


def as_buffer(profile: str, text: str) -> None:
    """The buffer's process under cProfile."""
    import cProfile

    import async_rl.buffer.__main__ as buffer
    from async_rl.process_spec import parse_spec

    profiler = cProfile.Profile()
    serve = buffer.run_buffer

    def profiled(*values: Any) -> None:
        profiler.enable()
        try:
            serve(*values)
        finally:
            profiler.disable()
            profiler.dump_stats(profile)

    buffer.run_buffer = profiled
    buffer.main(parse_spec(BufferSpec, [text]))


def quantiles(waits: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    if not waits:
        return float("nan"), float("nan")
    return statistics.median(waits), sorted(waits)[int(0.99 * (len(waits) - 1))]


HEAD = (
    "generators  tokens         load  messages/s   tokens/s   core store    io  us/message  limit, tokens/s   MB (peak)"
    "  stored, ms p50   p99  permits, s p50   p99"
)


def show(row: dict) -> str:
    load = f"at {row['rate'] / 1e6:.3g} M/s" if row["rate"] else "flat out"
    stored, permits = row["stored_s"], row["permit_s"]
    return (
        f"{row['generators']:10}  {row['tokens']:6}  {load:>11}  {row['messages_per_s']:10.0f}  "
        f"{row['tokens_per_s'] / 1e6:7.2f} M  {row['core']:5.2f} {row['store']:5.2f} {row['io']:5.2f}  "
        f"{row['us_a_message']:10.1f}  {row['limit_tokens_per_s'] / 1e6:13.2f} M  "
        f"{row['resident_mb']:4.0f} ({row['peak_mb']:4.0f})  "
        f"{1e3 * stored[0]:14.1f} {1e3 * stored[1]:5.0f}  {permits[0]:14.2f} {permits[1]:5.2f}"
    )


def main() -> None:
    if sys.argv[1:2] == ["--as-buffer"]:
        as_buffer(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 2048, 16384], help="of a trajectory")
    parser.add_argument("--seconds", type=float, default=8.0, help="measured of each case, behind a warm-up")
    parser.add_argument("--rate", type=float, default=-1.0, help="tokens/s of the second row; 0: leave it out")
    parser.add_argument("--processes", type=int, default=2, help="that the fakes are divided over")
    parser.add_argument("--folder", type=Path, help="where the stores are written (default: a temporary one)")
    parser.add_argument("--profile", default="", metavar="FILE", help="write a cProfile of the last case's buffer")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--ingest", action="store_true", help="without sockets: processor time by part")
    args = parser.parse_args()
    if args.ingest:
        from ingest import ingest  # beside this file

        for tokens in args.tokens:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                print(ingest(Path(folder), tokens, max(16, min(512, (64 << 20) // (64 * tokens)))), flush=True)
        return
    more_files()
    print("" if args.json else HEAD, flush=True)
    for tokens in args.tokens:
        for count in args.generators:
            limit = 0.0
            for paced in (False, True):
                rate = 0.0 if not paced else args.rate if args.rate >= 0 else limit / 3
                if paced and not rate:
                    continue
                with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                    row = case(Path(folder), count, tokens, rate, args.seconds, args.profile, args.processes)
                limit = row["limit_tokens_per_s"]
                print(json.dumps(row) if args.json else show(row), flush=True)


if __name__ == "__main__":
    main()
