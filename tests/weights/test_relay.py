"""Relays of weights: on a simulated wire that loses, damages and cuts, in a tree, and as real sockets."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support_weights import CHUNK, SOON_S, Segment, content, same, served, tensors

from async_rl.weights import WeightPublisher
from async_rl.weights.relay import MOST_HELD, Relay, RelayProcess
from async_rl.weights.relay_tree import GONE_S, RelayTree
from async_rl.weights.stream import Shelf, Transfer, WeightStream
from async_rl.wire import messages as msg
from async_rl.wire.keys import Keys, RelayKeys, make_keys


@dataclass
class Chain:
    """A server, relays behind one another, and a reader behind the last. Every hop is two queues."""

    segment: Segment
    length: int
    now: float = 0.0
    shelf: Shelf = field(init=False)
    relays: list[Relay] = field(init=False)
    reader: Transfer = field(init=False)
    up: list[list[msg.Message]] = field(init=False)
    """up[i]: what the reader or relay behind place i has sent to it; place 0 is the server"""
    down: list[list[msg.Message]] = field(init=False)

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.segment.latest, self.segment.take, chunk_bytes=CHUNK)
        self.relays = [Relay() for _ in range(self.length)]
        self.up, self.down = [[] for _ in range(self.length + 1)], [[] for _ in range(self.length + 1)]
        self.fetch(-1)

    def fetch(self, after: int) -> None:
        self.reader = Transfer(after)
        self.up[-1] += self.reader.begin(self.now)

    def deliver_up(self, hop: int) -> None:
        if not self.up[hop]:
            return
        message = self.up[hop].pop(0)
        if hop == 0:
            self.down[0] += self.shelf.handle(b"below", message, self.now)
        else:
            self.relays[hop - 1].from_reader(b"below", message, self.now)
            self.collect()

    def deliver_down(self, hop: int) -> None:
        if not self.down[hop]:
            return
        message = self.down[hop].pop(0)
        if hop == self.length:
            self.up[hop] += self.reader.receive(message, self.now)
        else:
            self.relays[hop].from_parent(message, self.now)
            self.collect()

    def collect(self) -> None:
        for place, relay in enumerate(self.relays):
            assert len(relay.held) <= MOST_HELD
            self.up[place] += relay.to_parent
            self.down[place + 1] += [message for _, message in relay.to_readers]
            relay.to_parent.clear()
            relay.to_readers.clear()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.shelf.tick(self.now)
        for relay in self.relays:
            relay.tick(self.now)
        self.collect()
        self.up[-1] += self.reader.tick(self.now)

    def to_the_end(self) -> None:
        """The wire is good from here on."""
        for _ in range(20_000):
            if self.reader.whole:
                return
            if any(self.up) or any(self.down):
                for hop in range(self.length + 1):
                    self.deliver_up(hop)
                    self.deliver_down(hop)
            else:
                self.wait(0.3)
        pytest.fail(f"never whole: {self.reader.waits_for}")


ACTIONS = st.tuples(
    st.sampled_from(["up", "up", "down", "down", "lose_up", "lose_down", "double", "damage", "publish", "wait", "new"]),
    st.integers(0, 3),
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(actions=st.lists(ACTIONS, max_size=120), size=st.integers(1, 20 * CHUNK), length=st.integers(1, 3))
def test_one_whole_version_arrives_behind_any_relays_whatever_the_wire_does(
    actions: list[tuple[str, int]], size: int, length: int
) -> None:
    chain = Chain(Segment(size, newest=0), length)
    for action, number in actions:
        hop = number % (length + 1)
        match action:
            case "up":
                chain.deliver_up(hop)
            case "down":
                chain.deliver_down(hop)
            case "lose_up" if chain.up[hop]:
                chain.up[hop].pop()
            case "lose_down" if chain.down[hop]:
                chain.down[hop].pop()
            case "double" if chain.down[hop]:
                chain.down[hop].append(chain.down[hop][0])
            case "damage" if chain.down[hop] and isinstance(chain.down[hop][0], msg.Chunk):
                wrong = bytearray(chain.down[hop][0].content)
                wrong[0] ^= 1
                chain.down[hop][0] = replace(chain.down[hop][0], content=bytes(wrong))
            case "publish":
                chain.segment.newest += 1
            case "wait":
                chain.wait(4.0 * number)
            case "new":  # a relay starts anew: what it held is gone
                place = number % length
                chain.relays[place] = Relay()
                chain.up[place].clear()
                chain.down[place].clear()
    chain.to_the_end()
    offer = chain.reader.offer
    assert offer is not None
    assert 0 <= offer.version <= chain.segment.newest
    assert chain.reader.content.tobytes() == content(offer.version, size).tobytes()


def test_a_chunk_goes_on_before_the_version_is_whole() -> None:
    chain = Chain(Segment(40 * CHUNK, newest=0), 1)
    while len(chain.reader.missing) == 0 or len(chain.reader.missing) == 40:
        for hop in (0, 1):
            chain.deliver_up(hop)
            chain.deliver_down(hop)
    held = chain.relays[0].held[0]
    assert not held.transfer.whole
    assert chain.reader.offer == held.offer


def test_readers_of_one_relay_cost_its_parent_one_copy() -> None:
    segment = Segment(30 * CHUNK, newest=0)
    shelf, relay = Shelf(segment.latest, segment.take, chunk_bytes=CHUNK), Relay()
    readers = {b"%d" % number: Transfer(-1) for number in range(8)}
    sent = 0
    for peer, reader in readers.items():
        for message in reader.begin(0.0):
            relay.from_reader(peer, message, 0.0)
    while not all(reader.whole for reader in readers.values()):
        asked, relay.to_parent = relay.to_parent, []
        for message in asked:
            for answer in shelf.handle(b"relay", message, 0.0):
                sent += isinstance(answer, msg.Chunk)
                relay.from_parent(answer, 0.0)
        given, relay.to_readers = relay.to_readers, []
        for peer, message in given:
            for ask in readers[peer].receive(message, 0.0):
                relay.from_reader(peer, ask, 0.0)
    assert sent == 30
    assert all(reader.content.tobytes() == content(0, 30 * CHUNK).tobytes() for reader in readers.values())


def test_another_parent_goes_on_where_the_last_one_stopped() -> None:
    """The relay's parent dies in the middle; the next one fetches the same version, and nothing comes twice."""
    segment = Segment(40 * CHUNK, newest=0)
    shelf, relay = Shelf(segment.latest, segment.take, chunk_bytes=CHUNK), Relay()
    relay.from_reader(b"reader", msg.AskWeights(after=-1), 0.0)

    def serve(most: int) -> int:
        sent = 0
        while relay.to_parent and sent < most:
            asked, relay.to_parent = relay.to_parent, []
            for message in asked:
                for answer in shelf.handle(b"relay", message, 0.0):
                    sent += isinstance(answer, msg.Chunk)
                    relay.from_parent(answer, 0.0)
        return sent

    first = serve(16)
    assert first < 40
    relay.to_parent.clear()  # what was asked for is lost with the parent
    relay.from_parent(msg.Withdrawn(version=0), 1.0)  # the next one does not hold it yet
    relay.new_parent(1.0)
    second = serve(1000)
    assert first + second <= 40 + 8  # what was under way, at most
    assert relay.held[0].transfer.whole


@given(
    fan_out=st.integers(1, 3),
    events=st.lists(st.tuples(st.sampled_from(["here", "lost", "later"]), st.integers(0, 9)), max_size=60),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_every_relay_hangs_on_the_server_and_nobody_sends_to_more_than_the_fan_out(
    fan_out: int, events: list[tuple[str, int]]
) -> None:
    tree, now, heard = RelayTree(fan_out), 0.0, dict[str, float]()
    for event, number in events:
        name = f"tcp://{number}:1"
        if event == "later":
            now += number
        elif event == "here" or not tree.places:
            tree.parent_of(name, now)
            heard[name] = now
        else:
            lost = tree.places[number % len(tree.places)]
            tree.parent_of(name, now, lost)
            heard[name] = now
            if lost != name:
                heard.pop(lost, None)
        heard = {one: at for one, at in heard.items() if now - at <= GONE_S}
    tree.tick(now)
    assert set(tree.places) == set(heard)
    parents = {name: tree.parent_of(name, now) for name in list(tree.places)}
    for name in parents:
        way = [name]
        while way[-1]:
            way.append(parents[way[-1]])
            assert len(way) <= len(parents) + 1, "a circle"
    for sender in ("", *parents):
        assert sum(parent == sender for parent in parents.values()) <= fan_out


# ------------------------------------------------------------------------------------------------ real sockets


@dataclass
class Running:
    """A relay on a thread."""

    process: RelayProcess
    thread: threading.Thread

    def end(self) -> None:
        self.process.ended = "told to"
        self.thread.join(SOON_S)
        assert not self.thread.is_alive()


def start_relay(server: str, keys: Keys) -> Running:
    process = RelayProcess(
        server=server, listen="tcp://127.0.0.1:*", reached="", keys=keys, timeout_s=SOON_S, log=print
    )
    thread = threading.Thread(target=process.run)
    thread.start()
    until(lambda: process.placed)
    return Running(process, thread)


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(SOON_S / 0.05)):
        if condition():
            return
        pause.wait(0.05)
    pytest.fail("it never came so far")


def test_weights_go_through_a_chain_of_relays_bit_for_bit_and_past_one_that_dies(tmp_path: Path) -> None:
    keys, path = make_keys(tmp_path / "keys"), tmp_path / "weights"
    with WeightPublisher(path, tensors(0)) as publisher, served(path, keys) as server:
        publisher.publish(tensors(1), 1)
        relays = [start_relay(server, keys)]
        for _ in range(2):
            relays.append(start_relay(server, keys))
            until(lambda: relays[-1].process.parent == relays[-2].process.reached)
        last = relays[-1].process.reached
        with WeightStream(last, "generator/weights", keys=RelayKeys(keys.folder), timeout_s=SOON_S) as stream:
            got, weights = stream.read()
            assert got == 1
            assert same(weights, tensors(1))
            relays[1].end()  # the middle one
            publisher.publish(tensors(2), 2)
            got, weights = stream.read()
            assert got == 2
            assert same(weights, tensors(2))
        assert relays[2].process.parent == relays[0].process.reached
        relays[0].end()
        relays[2].end()


def test_who_does_not_know_the_client_key_is_turned_away(tmp_path: Path) -> None:
    keys, strange = make_keys(tmp_path / "keys"), make_keys(tmp_path / "strange")
    with WeightPublisher(tmp_path / "weights", tensors(0)), served(tmp_path / "weights", keys) as server:
        relay = start_relay(server, keys)
        with (
            WeightStream(relay.process.reached, "x", keys=RelayKeys(strange.folder), timeout_s=0.5) as stream,
            pytest.raises(Exception, match="weights newer than version -1"),
        ):
            stream.read()
        relay.end()


def test_a_large_segment_is_whole_behind_a_relay_while_the_trainer_publishes_on() -> None:
    """The version being fetched is held while newer ones come; random order of deliveries."""
    pick = random.Random(0)
    chain = Chain(Segment(200 * CHUNK, newest=0), 2)
    while not chain.reader.whole:
        hop = pick.randrange(3)
        pick.choice((chain.deliver_up, chain.deliver_down))(hop)
        if pick.random() < 0.05:
            chain.segment.newest += 1
        if not any(chain.up) and not any(chain.down):
            chain.wait(0.3)
    offer = chain.reader.offer
    assert offer is not None
    assert np.array_equal(chain.reader.content, content(offer.version, 200 * CHUNK))
