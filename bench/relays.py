"""Weights to many machines: one server for all, against relays. A simulation of the real state machines; real processes
and sockets, over slower lines: bench/relays_real.py.

    python bench/relays.py [--machines N ...] [--gigabytes X] [--gigabits X] [--fan-out F ...] [--latency-ms X]

Each machine has one line, as fast in as out; a message takes its bytes over the sender's line, one after another, and
the latency. The server (weights/stream.py `Shelf`), relays (weights/relay.py) and readers are those of the product;
only their chunks are short, and count as 1 MB each. Printed: seconds until the last machine has the version, against

- one server: machines x bytes / line
- the bound: bytes / line, plus what a chunk takes over each hop of the chain: no way of sending is faster than one copy
  at each machine's own line

Target: at most 1.3 x the bound for 64 machines and 1 GB.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from dataclasses import dataclass, field

import numpy as np

from async_rl.weights.relay import Relay
from async_rl.weights.relay_tree import RelayTree
from async_rl.weights.shared_memory import TensorPlace, WeightCopy, layout_to_json
from async_rl.weights.stream import Shelf, Transfer
from async_rl.wire import messages as msg

MEGABYTE = 1_000_000
CHUNK = 16
"""bytes that stand for a megabyte"""
TICK_S = 0.1


@dataclass(slots=True)
class Machine:
    """A relay and the generator beside it, which costs no line."""

    name: bytes
    parent: int
    relay: Relay = field(default_factory=Relay)
    reader: Transfer = field(default_factory=lambda: Transfer(-1))
    whole_at: float = -1.0


@dataclass(slots=True)
class World:
    """Machines 1 to n, and the server as number 0."""

    chunks: int
    line: float
    """bytes a second"""
    latency_s: float
    machines: dict[int, Machine]
    shelf: Shelf
    now: float = 0.0
    free_at: dict[int, float] = field(default_factory=dict)
    """sender -> time when its line is free"""
    queue: list[tuple[float, int, int, int, msg.Message]] = field(default_factory=list)
    """(time, order, from, to, message)"""
    order: itertools.count[int] = field(default_factory=itertools.count)

    def send(self, sender: int, to: int, message: msg.Message) -> None:
        begin = max(self.now, self.free_at.get(sender, 0.0))
        sent = begin + (MEGABYTE / self.line if isinstance(message, msg.Chunk) else 0.0)
        if isinstance(message, msg.Chunk):
            self.free_at[sender] = sent
        heapq.heappush(self.queue, (sent + self.latency_s, next(self.order), sender, to, message))

    def collect(self, number: int) -> None:
        """Send what a relay has to say; its own reader hears it at once."""
        machine = self.machines[number]
        while machine.relay.to_readers or machine.relay.to_parent:
            replies, machine.relay.to_readers = machine.relay.to_readers, []
            asks, machine.relay.to_parent = machine.relay.to_parent, []
            for ask in asks:
                self.send(number, machine.parent, ask)
            for peer, message in replies:
                if peer != b"own":
                    self.send(number, int(peer), message)
                    continue
                for ask in machine.reader.receive(message, self.now):
                    machine.relay.from_reader(b"own", ask, self.now)
                if machine.reader.whole and machine.whole_at < 0:
                    machine.whole_at = self.now

    def run(self) -> float:
        """Seconds until the last machine has everything."""
        for number, machine in self.machines.items():
            for ask in machine.reader.begin(0.0):
                machine.relay.from_reader(b"own", ask, 0.0)
            self.collect(number)
        next_tick = TICK_S
        while any(machine.whole_at < 0 for machine in self.machines.values()):
            if not self.queue or self.queue[0][0] > next_tick:
                self.now, next_tick = next_tick, next_tick + TICK_S
                for number, machine in self.machines.items():
                    machine.relay.tick(self.now)
                    for ask in machine.reader.tick(self.now):
                        machine.relay.from_reader(b"own", ask, self.now)
                    self.collect(number)
                continue
            self.now, _, sender, to, message = heapq.heappop(self.queue)
            if to == 0:
                for reply in self.shelf.handle(b"%d" % sender, message, self.now):
                    self.send(0, sender, reply)
            elif sender == self.machines[to].parent:
                self.machines[to].relay.from_parent(message, self.now)
                self.collect(to)
            else:
                self.machines[to].relay.from_reader(b"%d" % sender, message, self.now)
                self.collect(to)
        return max(machine.whole_at for machine in self.machines.values())


def simulate(machines: int, chunks: int, line: float, latency_s: float, fan_out: int) -> float:
    """Seconds until the last of `machines` has `chunks` megabytes."""
    content = np.random.default_rng(0).integers(0, 256, chunks * CHUNK, dtype=np.uint8)
    layout = layout_to_json([TensorPlace(name="w", dtype="uint8", shape=(chunks * CHUNK,), offset=0)])
    shelf = Shelf(lambda: 0, lambda: WeightCopy(version=0, layout=layout, content=content), chunk_bytes=CHUNK)
    tree = RelayTree(fan_out)
    found = {}
    for number in range(1, machines + 1):
        above = tree.parent_of(str(number), 0.0)
        found[number] = Machine(name=b"%d" % number, parent=int(above or 0))
    world = World(chunks=chunks, line=line, latency_s=latency_s, machines=found, shelf=shelf)
    return world.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--gigabits", type=float, default=1.0, help="of each machine's line (default 1)")
    parser.add_argument("--fan-out", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--latency-ms", type=float, default=0.5)
    args = parser.parse_args()
    chunks, line = round(args.gigabytes * 1000), args.gigabits * 1e9 / 8
    once = chunks * MEGABYTE / line
    print("machines  fan-out  to the last, s  of the bound  one server, s")
    for machines in args.machines:
        bound = once + (machines - 1) * (MEGABYTE / line)
        for fan_out in args.fan_out:
            seconds = simulate(machines, chunks, line, args.latency_ms / 1e3, fan_out)
            print(
                f"{machines:8}  {fan_out:7}  {seconds:14.2f}  {seconds / bound:10.2f} x  {machines * once:13.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
