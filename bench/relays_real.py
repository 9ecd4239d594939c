"""Weights to many machines over lines of limited bandwidth: the real server, relays and readers, in real processes.

    python bench/relays_real.py [--machines N] [--megabytes X] [--megabits X] [--fan-out F ...] [--chunk-kb N]

Each machine is a network namespace of the kernel with one cable (veth) to a switch (bridge); both ends of the cable let
so many megabits a second through (tc tbf), so a machine sends and receives at that rate. On machine 0 the weight
server's loop serves a published segment; on each other one run a relay (what `async-rl relay` runs) and, beside it, a
reader (what a generator reads weights with); over TCP with keys. Machines are two forked processes each, and no more is
simulated. Only root, or a user who may make user namespaces, can run it; the namespaces end with their processes.

Printed, for each fan-out: seconds from the readers' first question until the last machine has the version whole (the
program checks each chunk and the whole; so does this script, once more), against

- the bound: bytes / line, plus what a chunk takes over each further hop of the chain (as bench/relays.py counts it, but
  without the 20 KB of it that tc lets through an idle line at once)
- one server: what the machines take that fetch from the server without relays, measured with few machines and a part of
  the bytes, times what was left out: the server's line is full all the time, so the time is proportional to both

and how many copies left the server, and how busy the processors were: all machines share the ones that are here, and
near 100 % the result is theirs and not the line's. What scales: time with bytes / line, and the share of the chain's
filling with machines x chunk / bytes. So that few bytes fill the chain as many do, the chunks are shorter than the
program's (1 MiB): 500 by default, where 1 GB has 954. The default takes 100 s on two cores, which it keeps busy.

Target: at most 1.3 x the bound for 64 machines.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from async_rl.weights.relay import RelayProcess
from async_rl.weights.relay_tree import RelayTree
from async_rl.weights.shared_memory import WeightPublisher, WeightReader, shared_folder
from async_rl.weights.stream import Relays, Shelf, WeightStream, answer
from async_rl.wire.channel import Router
from async_rl.wire.keys import Keys, RelayKeys, make_keys

NEW_USERS, NEW_NETWORK, DIE_WITH_PARENT = 0x10000000, 0x40000000, 1
LIBC = ctypes.CDLL(None, use_errno=True)
SERVER_PORT, RELAY_PORT = 5556, 6000
BURST_BYTES, QUEUE_MS = 20_480, 400
"""what an idle line lets through at once, and what waits for it at most"""
LONGEST_SEGMENT = 16_384
"""bytes that the kernel hands to a line as one: within the burst, or tc cuts it into packets at some cost"""
PATIENCE = 6
"""a measurement is given up after so many times its bound"""
START_S = 120.0
"""time the processes have to start"""
FEW, PART = 4, 16
"""without relays: so many machines, and one of so many parts of the bytes"""

Work = Callable[[Connection], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measurement."""

    machines: int
    num_bytes: int
    line: float
    """bytes a second, in and out"""
    chunk_bytes: int
    fan_out: int
    """0: without relays"""

    @property
    def once(self) -> float:
        return self.num_bytes / self.line

    @property
    def bound(self) -> float:
        if self.fan_out == 0:
            return self.machines * self.once
        return self.once + (self.machines - 1) * max(0, self.chunk_bytes - BURST_BYTES) / self.line


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    seconds: float
    copies: float
    """bytes that left the server / bytes of the version"""
    busy: float
    """share of the processors that worked"""


@dataclass(slots=True)
class Running:
    """Forked processes and the pipes to them."""

    processes: list[tuple[BaseProcess, Connection]] = field(default_factory=list)

    def start(self, work: Work) -> BaseProcess:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=_live, args=(work, there), daemon=True)
        process.start()
        self.processes.append((process, here))
        return process

    def hear(self, count: int, seconds: float, what: str) -> list[Any]:
        """What `count` of them say. Ends this program when one ends first, or it takes longer than `seconds`."""
        heard: list[Any] = []
        deadline = time.monotonic() + seconds
        while len(heard) < count:
            ends: list[Any] = [pipe for _, pipe in self.processes] + [process.sentinel for process, _ in self.processes]
            ready = wait(ends, max(0.0, deadline - time.monotonic()))
            if not ready:
                sys.exit(f"after {seconds:.0f} s {len(heard)} of {count} {what}")
            for end in ready:
                if not isinstance(end, Connection):
                    sys.exit("a process of a machine has ended; its message is above")
                heard.append(end.recv())
        return heard

    def end(self) -> None:
        for process, _ in self.processes:
            process.kill()  # nothing of theirs is wanted any more
        for process, pipe in self.processes:
            process.join()
            pipe.close()


def _live(work: Work, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    LIBC.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    work(pipe)


# ------------------------------------------------------------------------------------------------ the network


def _checked(result: int, what: str) -> None:
    if result != 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}; only root, or who may make user namespaces, can run this")


def _commands(program: str, lines: list[str]) -> None:
    subprocess.run([program, "-batch", "-"], input="\n".join(lines), text=True, check=True, stdout=subprocess.DEVNULL)


def _address(number: int) -> str:
    return f"10.77.{number // 250}.{number % 250 + 1}"


def _shaped(device: str, line: float) -> str:
    return f"qdisc add dev {device} root tbf rate {line * 8:.0f}bit burst {BURST_BYTES}b latency {QUEUE_MS}ms"


def may_make_networks() -> None:
    """Let this process make networks: root may, others in a user namespace of their own."""
    user, group = os.getuid(), os.getgid()
    if user != 0:
        _checked(LIBC.unshare(NEW_USERS), "no user namespace can be made")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def new_network() -> None:
    """Give this process a network of its own. One without processes is gone, its cables with it."""
    _checked(LIBC.unshare(NEW_NETWORK), "no network namespace can be made")


def as_machine(number: int, line: float, work: Work) -> Work:
    """The first process of a machine: gets a network, waits for the cable, works."""

    def live(pipe: Connection) -> None:
        new_network()
        pipe.send("unplugged")
        pipe.recv()
        address = f"address add {_address(number)}/16 dev cable"
        _commands("ip", ["link set lo up", address, f"link set cable gso_max_size {LONGEST_SEGMENT} up"])
        _commands("tc", [_shaped("cable", line)])
        pipe.send("plugged in")
        work(pipe)

    return live


def beside(first: int, work: Work) -> Work:
    """A further process of the machine whose first process has this number."""

    def live(pipe: Connection) -> None:
        with Path(f"/proc/{first}/ns/net").open() as network:
            _checked(LIBC.setns(network.fileno(), NEW_NETWORK), "the machine's network cannot be entered")
        work(pipe)

    return live


def plug_in(running: Running, line: float) -> None:
    """Make the switch, in this process's network, and lay a cable from it to each machine."""
    count = len(running.processes)
    running.hear(count, START_S, "machines were made")
    lines = ["link add switch type bridge", "link set switch addrgenmode none", "link set switch up"]
    for number, (process, _) in enumerate(running.processes):
        lines += [
            f"link add port{number} type veth peer name cable netns {process.pid}",
            f"link set port{number} addrgenmode none",
            f"link set port{number} master switch up",
        ]
    _commands("ip", lines)
    _commands("tc", [_shaped(f"port{number}", line) for number in range(count)])
    for _, pipe in running.processes:
        pipe.send("the cable is there")
    running.hear(count, START_S, "machines got a cable")


def from_server() -> int:
    """Bytes that machine 0 has sent."""
    told = subprocess.run(["ip", "-j", "-s", "link", "show", "port0"], check=True, capture_output=True, text=True)
    return int(json.loads(told.stdout)[0]["stats64"]["rx"]["bytes"])


# ------------------------------------------------------------------------------------------------ the processes


def as_server(path: Path, weights: torch.Tensor, keys: Keys, case: Case) -> Work:
    def work(pipe: Connection) -> None:
        with (
            WeightPublisher(path, {"weights": weights}) as publisher,
            Router(f"tcp://{_address(0)}:{SERVER_PORT}", keys=keys) as router,
            WeightReader(path) as reader,
        ):
            publisher.publish({"weights": weights}, 0)
            shelf = Shelf(reader.latest, reader.copy, chunk_bytes=case.chunk_bytes)
            relays = Relays(RelayTree(max(1, case.fan_out)))
            pipe.send("serves")
            while True:
                answer(router, shelf, relays)
                shelf.tick(time.monotonic())

    return work


def as_relay(number: int, keys: Keys) -> Work:
    def work(pipe: Connection) -> None:
        def log(line: str) -> None:
            if "silent" in line:
                print(f"machine {number}: {line}", file=sys.stderr)
            elif line.startswith("fetches from"):
                pipe.send(line)

        RelayProcess(
            server=f"tcp://{_address(0)}:{SERVER_PORT}",
            listen=f"tcp://0.0.0.0:{RELAY_PORT}",
            reached=f"tcp://{_address(number)}:{RELAY_PORT}",
            keys=keys,
            timeout_s=START_S,
            log=log,
        ).run()

    return work


def as_reader(endpoint: str, keys: Keys) -> Work:
    def work(pipe: Connection) -> None:
        pipe.send("wants weights")
        pipe.recv()
        with WeightStream(endpoint, f"generator-{os.getpid()}/weights", keys=keys, timeout_s=START_S) as stream:
            _, tensors = stream.read()
            whole_at = time.monotonic()
            pipe.send((whole_at, zlib.crc32(tensors["weights"].numpy().data)))
            pipe.recv()  # its relay goes on serving until everybody has everything

    return work


@contextmanager
def set_up(case: Case, weights: torch.Tensor, folder: Path) -> Iterator[Running]:
    """Server, relays and readers, ready to begin. The readers are the last of the processes."""
    keys, running = Keys(folder / "keys"), Running()
    server = f"tcp://{_address(0)}:{SERVER_PORT}"
    numbers = range(1, case.machines + 1)
    new_network()
    try:
        running.start(as_machine(0, case.line, as_server(folder / f"weights-{case.fan_out}", weights, keys, case)))
        for number in numbers:
            work = as_relay(number, keys) if case.fan_out else as_reader(server, keys)
            running.start(as_machine(number, case.line, work))
        machines = list(running.processes)
        plug_in(running, case.line)
        running.hear(1 + case.machines, START_S, "servers and relays had their place")
        if case.fan_out:
            own = as_reader(f"tcp://127.0.0.1:{RELAY_PORT}", RelayKeys(keys.folder))
            for process, _ in machines[1:]:
                assert process.pid is not None
                running.start(beside(process.pid, own))
            running.hear(case.machines, START_S, "readers were ready")
        yield running
    finally:
        running.end()


# ------------------------------------------------------------------------------------------------ measuring


def processors() -> tuple[float, float]:
    """(at work, all), seconds of all processors since the system began."""
    spent = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(spent) - spent[3] - spent[4], sum(spent)


def measure(case: Case, folder: Path) -> Result:
    weights = torch.randn(case.num_bytes // 4, generator=torch.Generator().manual_seed(0))
    with set_up(case, weights, folder) as running:
        worked, passed, sent = *processors(), from_server()
        begin = time.monotonic()
        for _, pipe in running.processes[-case.machines :]:
            pipe.send("begin")
        heard = running.hear(case.machines, 10 + PATIENCE * case.bound, "machines had the version")
        now_worked, now_passed = processors()
        copies = (from_server() - sent) / weights.nbytes
    expected = zlib.crc32(weights.numpy().data)
    assert all(checksum == expected for _, checksum in heard), "a machine has other weights than were published"
    busy = (now_worked - worked) / max(1.0, now_passed - passed)
    return Result(seconds=max(at for at, _ in heard) - begin, copies=copies, busy=busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=64)
    parser.add_argument("--megabytes", type=float, default=32.0)
    parser.add_argument("--megabits", type=float, default=4.0, help="a second, of each machine's line (default 4)")
    parser.add_argument("--fan-out", type=int, nargs="+", default=[1])
    parser.add_argument("--chunk-kb", type=int, default=0, help="default: a five hundredth of the bytes, 1 KB at least")
    args = parser.parse_args()
    num_bytes, line = round(args.megabytes * 250_000) * 4, args.megabits * 1e6 / 8
    chunk = args.chunk_kb * 1000 or max(1000, num_bytes // 500)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    may_make_networks()
    print(f"{num_bytes / 1e6:g} MB in chunks of {chunk / 1e3:g} KB, {args.megabits:g} Mbit/s")
    print(
        "machines  fan-out    MB  to the last, s  bound, s  of the bound  server sent, copies  processors", flush=True
    )
    with tempfile.TemporaryDirectory(dir=shared_folder()) as made:
        folder = Path(made)
        make_keys(folder / "keys")
        for fan_out in (*args.fan_out, 0):
            few = min(FEW, args.machines) if fan_out == 0 else args.machines
            some = num_bytes // 4 // PART * 4 if fan_out == 0 else num_bytes
            case = Case(machines=few, num_bytes=some, line=line, chunk_bytes=chunk, fan_out=fan_out)
            found = measure(case, folder)
            print(
                f"{few:8}  {fan_out or 'none':>7}  {some / 1e6:4.0f}  {found.seconds:14.1f}  {case.bound:8.1f}"
                f"  {found.seconds / case.bound:10.2f} x  {found.copies:19.2f}  {found.busy:9.0%}",
                flush=True,
            )
        whole = found.seconds * args.machines / few * num_bytes / some
        print(f"one server, {args.machines} machines and {num_bytes / 1e6:g} MB, by proportion: {whole:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
