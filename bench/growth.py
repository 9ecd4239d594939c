"""How the cost around the model grows with the size of a run. Prints a table for each axis and the fitted exponent.

    python bench/growth.py [--axis NAME ...] [--most N] [--folder DIR]

trajectories   a step of so many (groups of 16, 64 tokens): permits, arrival, store, batch, its sending, packing
tokens         16 trajectories of so many tokens each, the same way
generators     so many clients with sockets of their own at one buffer process, each an answer a step; groups of 4
problems       a JSONL file of so many rows: loading it, memory held, an epoch's order
rows           so many rows of metrics: the report (without a model), the first and the next look of top

Each size is a process of its own. `s`: processor seconds a step (of the buffer's process for generators, of the whole
load for problems, of one report for rows). `MB`: what the process gained in peak memory. The exponent is the slope of
the logarithms over the upper half of the sizes: 1 is linear growth.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from support_buffer import TRAINER, make_core

from async_rl.buffer.loop import execute, receive
from async_rl.buffer.staleness import PacePolicy
from async_rl.buffer.store import Store
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.types import sample_seed
from async_rl.wire import messages as msg
from async_rl.wire.frames import decode, encode, portions

SIZES = {
    "trajectories": (64, 256, 1024, 4096, 16_384, 65_536),
    "tokens": (64, 512, 4096, 32_768, 131_072),
    "generators": (1, 10, 100, 300, 1000),
    "problems": (1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    "rows": (100, 1_000, 10_000, 100_000, 1_000_000),
}
Cost = dict[str, float]


def held_mb() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---------------------------------------------------------------- a step


def episode(permit: msg.Permit, sample: int, tokens: int) -> Trajectory:
    """Half of it is the prompt of its group."""
    prompt = tokens // 2
    random = np.random.default_rng(permit.group)
    log = np.zeros(tokens, np.float32)
    log[prompt:] = -0.5
    own = np.full(tokens - prompt, sample + 1, np.int32)
    return Trajectory(
        group=permit.group,
        sample=sample,
        problem=permit.problem,
        split=permit.split,
        seed=sample_seed(permit.seed, sample),
        tokens=np.concatenate((random.integers(0, 1000, prompt, dtype=np.int32), own)),
        log_behaviour=log,
        turns=(Turn(start=prompt, length=tokens - prompt),),
        versions=(VersionSpan(version=0, start=prompt, end=tokens),),
        reward=float(sample % 2),
        ended="finished",
        temperature=permit.temperature,
    )


@dataclass
class Wire:
    """Where the buffer's answers go."""

    sent: list[tuple[bytes, msg.Message]] = field(default_factory=list)

    def send(self, peer: bytes, message: msg.Message) -> bool:
        self.sent.append((peer, decode(encode(message))))
        return True

    def take(self) -> list[tuple[bytes, msg.Message]]:
        taken, self.sent = self.sent, []
        return taken


def step(folder: Path, trajectories: int, tokens: int) -> Cost:
    """One step from the permits to the packed batch; the trainer's part in the same process."""
    from async_rl.trainer.packing import pack_batch  # torch

    groups = trajectories // 16
    policy = PacePolicy(groups_per_step=groups, max_staleness=0, pipeline_depth=1.0, window=1)
    core, wire = make_core(policy, group_size=16, max_permits=groups, drop_zero_signal=False), Wire()
    with Store(folder / "trajectories.sqlite", durability="process", create=True) as store:
        before, begun = held_mb(), time.process_time()

        def say(peer: bytes, message: msg.Message) -> None:
            effects = core.handle(peer, decode(encode(message)), time.monotonic())
            execute(effects, store, wire, lambda _: None, 64 << 20)  # type: ignore[arg-type]

        say(b"g", msg.Hello(role="generator", name="g", pid=1))
        say(b"g", msg.Want(limit=groups, version=0))
        permits = [p for _, m in wire.take() if isinstance(m, msg.Permits) for p in m.permits]
        arrived: list[Trajectory] = []
        made_s = 0.0
        for permit in permits:
            making = time.process_time()
            made = [episode(permit, sample, tokens) for sample in permit.samples]
            made_s += time.process_time() - making
            for some in portions(made):
                say(b"g", msg.Finished(trajectories=some))
        wire.take()
        total = 1
        while len(arrived) < total:
            say(TRAINER, msg.NextBatch(step=0, after=len(arrived)))
            for _, message in wire.take():
                if isinstance(message, msg.Batch):
                    arrived += message.trajectories
                    total = message.total
        packed = pack_batch(arrived, micro_batch_tokens=max(16_384, 2 * tokens), shared=True)
        assert packed.num_trajectories == trajectories
        seconds = time.process_time() - begun - made_s
    return {"s": seconds, "MB": held_mb() - before}


def trajectories_axis(folder: Path, size: int) -> Cost:
    return step(folder, size, 64)


def tokens_axis(folder: Path, size: int) -> Cost:
    return step(folder, 16, size)


# ---------------------------------------------------------------- generators


STEPS, GROUP_SIZE, TOKENS = 5, 4, 64


def clients(endpoint: str, count: int, ready: Any) -> None:
    """Generators without engines, each with a socket of its own: want, finish at once, report."""
    import asyncio

    from async_rl.wire.channel import AsyncDealer

    async def one(number: int) -> None:
        name = f"g{number}"
        dealer = AsyncDealer(endpoint, name)
        await dealer.send(msg.Hello(role="generator", name=name, pid=number + 1, session=number + 1))
        granted, version = 1, 0
        await dealer.send(msg.Want(limit=granted, version=version, session=number + 1))
        while True:
            message = await dealer.receive()
            match message:
                case msg.Permits(permits=permits):
                    for permit in permits:
                        made = tuple(episode(permit, sample, TOKENS) for sample in permit.samples)
                        spans = tuple(VersionSpan(version=version, start=t.turns[0].start, end=TOKENS) for t in made)
                        made = tuple(_with_version(t, span) for t, span in zip(made, spans, strict=True))
                        await dealer.send(msg.Finished(trajectories=made, session=number + 1))
                    granted += len(permits)
                    await dealer.send(msg.Want(limit=granted, version=version, session=number + 1))
                    await dealer.send(_status(name, number + 1, version, granted))
                case msg.NewWeights(version=new):
                    version = max(version, new)
                    await dealer.send(msg.Holds(version=version))
                case msg.Stop():
                    break
                case _:
                    pass
        dealer.close(linger_s=0)

    async def every() -> None:
        ready.set()
        await asyncio.gather(*(one(number) for number in range(count)))

    asyncio.run(every())


def _with_version(t: Trajectory, span: VersionSpan) -> Trajectory:
    from msgspec.structs import replace

    return replace(t, versions=(span,))


def _status(name: str, session: int, version: int, limit: int) -> msg.Status:
    return msg.Status(
        name=name,
        session=session,
        version=version,
        limit=limit,
        busy_seconds=0.0,
        wall_seconds=1.0,
        tokens_generated=0,
        running=0,
        waiting=0,
    )


def generators_axis(folder: Path, size: int) -> Cost:
    """Each step takes one group of each generator; the trainer is a thread that asks, waits and publishes."""
    from async_rl.wire.channel import Dealer, Router

    endpoint = f"ipc://{folder}/s"
    policy = PacePolicy(groups_per_step=size, max_staleness=1, pipeline_depth=2.0, window=1)
    core = make_core(policy, group_size=GROUP_SIZE, max_permits=4, drop_zero_signal=False)
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    others = spawn.Process(target=clients, args=(endpoint, size, ready), daemon=True)
    done: list[int] = []

    def train() -> None:
        with Dealer(endpoint, TRAINER.decode()) as dealer:
            for number in range(STEPS):
                got, total = 0, 1
                while got < total:
                    dealer.send(msg.NextBatch(step=number, after=got))
                    while not isinstance(message := dealer.receive(300, "the batch"), msg.Batch):
                        pass
                    got, total = got + len(message.trajectories), message.total
                dealer.send(msg.Published(version=number + 1))
                done.append(number)

    with (
        Store(folder / "trajectories.sqlite", durability="process", create=True) as store,
        Router(endpoint) as router,
    ):
        others.start()
        ready.wait()
        before, handled = held_mb(), 0
        while len(core.admission.generators) < size:
            execute(receive(router, core, 64 << 20), store, router, lambda _: None, 64 << 20)
        trainer = threading.Thread(target=train, daemon=True)
        trainer.start()
        begun = time.thread_time()
        while len(done) < STEPS:
            effects = receive(router, core, 64 << 20)
            handled += len(effects)
            execute(effects, store, router, lambda _: None, 64 << 20)
        spent = time.thread_time() - begun
        for peer in core.admission.generators:
            router.send(peer, msg.Stop(reason="done"))
        others.join(20)
    return {"s": spent / STEPS, "MB": held_mb() - before, "us an effect": 1e6 * spent / max(handled, 1)}


# ---------------------------------------------------------------- problems


def problems_axis(folder: Path, size: int) -> Cost:
    from async_rl.task import make_task
    from async_rl.task.order import PromptOrder

    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for first in range(0, size, 10_000):
            file.writelines(
                f'{{"prompt": "What is {i} + {i % 97}? Answer with the number alone.", "answer": "{i + i % 97}"}}\n'
                for i in range(first, min(size, first + 10_000))
            )
    before, begun = held_mb(), time.process_time()
    task = make_task("dataset", {"path": str(path), "reward": "numeric", "eval_share": 0.01})
    loaded = time.process_time() - begun
    problems = task.problems("train")
    kept = _resident_mb()
    begun = time.process_time()
    order = PromptOrder(len(problems), 0)
    order(0)
    ordering = time.process_time() - begun
    begun = time.process_time()
    for position in range(1000):
        problems[order(position)]
    asked = time.process_time() - begun
    return {
        "s": loaded,
        "MB": held_mb() - before,
        "MB kept": kept - before,
        "s an epoch's order": ordering,
        "us a problem": 1e3 * asked,
    }


def _resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


# ---------------------------------------------------------------- rows of metrics


def rows_axis(folder: Path, size: int) -> Cost:
    from rich.console import Console

    from async_rl.observe.report import write_report
    from async_rl.observe.top import RunPoller, render

    row = {f"some/{i}": 0.123456789 + i for i in range(80)} | {"reward/mean": 0.5, "tokens/trained": 1000.0}
    text = json.dumps(row)[1:]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(size):
            file.write(f'{{"step": {step}, "time": {1e9 + step}, "ess/ratio": {math.sin(step) ** 2}, {text}\n')
    before = held_mb()

    def spent(do: Callable[[], object]) -> float:
        begun = time.process_time()
        do()
        return time.process_time() - begun

    report = spent(lambda: write_report([folder], folder / "report.html", with_ratios=False))
    poller = RunPoller(folder)
    first = spent(poller.poll)
    console = Console(file=open(os.devnull, "w"), width=150)  # noqa: SIM115
    look = spent(lambda: console.print(render(poller.poll(), 150, time.time())))
    megabytes = (folder / "metrics.jsonl").stat().st_size / 1e6
    return {"s": report, "MB": held_mb() - before, "s top first": first, "s top": look, "MB file": megabytes}


AXES: dict[str, Callable[[Path, int], Cost]] = {
    "trajectories": trajectories_axis,
    "tokens": tokens_axis,
    "generators": generators_axis,
    "problems": problems_axis,
    "rows": rows_axis,
}


# ---------------------------------------------------------------- table


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size), upper half of the sizes."""
    half = max(2, (len(sizes) + 1) // 2)
    pairs = [(math.log(n), math.log(v)) for n, v in zip(sizes, values, strict=True) if v > 0][-half:]
    if len(pairs) < 2:
        return math.nan
    return float(np.polyfit(*zip(*pairs, strict=True), 1)[0])


def in_a_process(axis: str, size: int, folder: Path | None) -> Cost:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, __file__, "--one", axis, str(size), place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{axis} {size}: {done.stderr[-2000:]}")
    found: Cost = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--most", type=int, default=10**9, help="largest size")
    parser.add_argument("--folder", type=Path, help="for files, on a disk with room")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        axis, size, place = arguments.one
        print(json.dumps(AXES[axis](Path(place), int(size))))
        return
    for axis in arguments.axis:
        sizes = [size for size in SIZES[axis] if size <= arguments.most]
        costs = []
        for size in sizes:
            costs.append(in_a_process(axis, size, arguments.folder))
            print(f"{axis} {size:>10,}  " + "  ".join(f"{k} {v:.4g}" for k, v in costs[-1].items()), flush=True)
        fitted = {name: round(exponent(sizes, [cost[name] for cost in costs]), 2) for name in costs[0]}
        print(f"{axis}: exponents {fitted}, up to {sizes[-1]:,}", flush=True)


if __name__ == "__main__":
    main()
