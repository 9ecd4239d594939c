"""Weights in chunks over a wire that loses, doubles, reorders and damages: one whole version arrives, or none."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support_weights import CHUNK, Segment, content

from async_rl.weights import WeightsError
from async_rl.weights.stream import CREDIT, HOLD_S, MOST_COPIES, RETRY_S, Shelf, Transfer
from async_rl.wire import messages as msg


@dataclass
class Link:
    """A reader, the server and two queues between them."""

    segment: Segment
    after: int = -1
    now: float = 0.0
    shelf: Shelf = field(init=False)
    reader: Transfer = field(init=False)
    up: list[msg.Message] = field(default_factory=list)
    down: list[msg.Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.segment.latest, self.segment.take, chunk_bytes=CHUNK)
        self.reader = Transfer(self.after)
        self.up += self.reader.begin(self.now)

    def to_server(self, place: int = 0) -> None:
        if self.up:
            message = self.up.pop(place % len(self.up))
            self.down += self.shelf.handle(b"reader", message, self.now)
            assert len(self.shelf.copies) <= MOST_COPIES

    def to_reader(self, place: int = 0) -> None:
        if self.down:
            self.up += self.reader.receive(self.down.pop(place % len(self.down)), self.now)
            assert len(self.reader.requested) <= CREDIT

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.shelf.tick(self.now)
        self.up += self.reader.tick(self.now)

    def to_the_end(self) -> None:
        """The wire is good from here on."""
        for _ in range(10_000):
            if self.reader.whole:
                return
            if self.up or self.down:
                self.to_server()
                self.to_reader()
            else:
                self.wait(RETRY_S / 10)
        pytest.fail(f"never whole: {self.reader}")


def damaged(message: msg.Message) -> msg.Message:
    if isinstance(message, msg.Chunk) and len(message.content):
        wrong = bytearray(message.content)
        wrong[len(wrong) // 2] ^= 1
        return replace(message, content=bytes(wrong))
    return message


ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["to_server", "to_reader"]), st.integers(0, 20)),
    st.tuples(st.sampled_from(["lose_up", "lose_down", "double_up", "double_down", "damage"]), st.integers(0, 20)),
    st.tuples(st.just("publish"), st.integers(1, 3)),
    st.tuples(st.just("busy"), st.integers(0, 2)),
    st.tuples(st.just("stranger"), st.integers(-1, 10)),
    st.tuples(st.just("wait"), st.integers(0, int(2 * HOLD_S))),
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(actions=st.lists(ACTIONS, max_size=80), size=st.integers(1, 20 * CHUNK), first=st.integers(-1, 5))
def test_one_whole_version_arrives_whatever_the_wire_does(
    actions: list[tuple[str, int]], size: int, first: int
) -> None:
    link = Link(Segment(size, newest=first), after=max(-1, first - 1))
    for action, number in actions:
        match action:
            case "to_server":
                link.to_server(number)
            case "to_reader":
                link.to_reader(number)
            case "lose_up" | "lose_down" if queue := (link.up if action == "lose_up" else link.down):
                queue.pop(number % len(queue))
            case "double_up" | "double_down" if queue := (link.up if action == "double_up" else link.down):
                queue.append(queue[number % len(queue)])
            case "damage" if link.down:
                place = number % len(link.down)
                link.down[place] = damaged(link.down[place])
            case "publish":
                link.segment.newest += number
            case "busy":
                link.segment.busy = number
            case "stranger":  # another reader begins a fetch and is not heard of again
                link.shelf.handle(b"other %d" % number, msg.AskWeights(after=number), link.now)
            case "wait":
                link.wait(float(number))
    link.segment.newest = max(link.segment.newest, link.after + 1)
    link.segment.busy = 0
    link.to_the_end()
    offer = link.reader.offer
    assert offer is not None
    assert link.after < offer.version <= link.segment.newest
    assert link.reader.content.tobytes() == content(offer.version, size).tobytes()


def test_a_version_that_is_being_fetched_stays_while_newer_ones_are_published() -> None:
    """Else a slow wire would begin again for ever."""
    link = Link(Segment(40 * CHUNK, newest=0))
    while not link.reader.whole:
        link.to_server()
        link.to_reader()
        link.segment.newest += 1
        link.wait(HOLD_S / 20)
    assert link.reader.restarts == 0
    assert link.reader.offer is not None
    assert link.reader.offer.version == 0


def test_a_line_that_is_slow_is_not_filled_with_what_is_asked_for_twice() -> None:
    """Readers share the server's line, and a chunk takes longer than the time after which it is asked for again."""
    link, came = Link(Segment(100 * CHUNK, newest=0)), 0
    while not link.reader.whole:
        while link.up:
            link.to_server()
        for _ in range(8):
            link.wait(RETRY_S / 3)
            link.shelf.handle(b"another reader", msg.AskChunks(version=0, chunks=(0,)), link.now)
        came += 1
        link.to_reader()
        assert came <= 100 + 3 * CREDIT
    assert link.reader.restarts == 0


def test_readers_of_the_same_version_share_a_copy_and_what_is_fetched_is_dropped() -> None:
    segment = Segment(4 * CHUNK, newest=3)
    shelf = Shelf(segment.latest, segment.take, chunk_bytes=CHUNK)
    for peer in (b"a", b"b", b"c"):
        assert isinstance(shelf.handle(peer, msg.AskWeights(after=-1), 0.0)[0], msg.Offer)
    assert list(shelf.copies) == [3]
    for peer in (b"a", b"b", b"c"):
        assert isinstance(shelf.handle(peer, msg.AskWeights(after=3), 1.0)[0], msg.Waiting)
    shelf.tick(1.0)
    assert not shelf.copies


def test_a_withdrawn_version_is_begun_again() -> None:
    link = Link(Segment(4 * CHUNK, newest=0))
    link.to_server()
    link.to_reader()
    link.shelf.copies.clear()
    link.segment.newest = 5
    link.to_the_end()
    assert link.reader.restarts == 1
    assert link.reader.content.tobytes() == content(5, 4 * CHUNK).tobytes()


@pytest.mark.parametrize(
    "offer",
    [
        {"num_bytes": 0},
        {"chunk_bytes": 0},
        {"chunk_bytes": 1 << 40},
        {"layout": "no json"},
        {"layout": '[["w", "uint8", [-1], 0]]'},
        {"layout": '[["w", "uint8", [99], 0]]'},
        {"layout": '[["w", "object", [1], 0]]'},
    ],
)
def test_an_offer_that_cannot_be_is_refused(offer: dict[str, object]) -> None:
    good = msg.Offer(version=1, num_bytes=8, chunk_bytes=8, checksum=0, layout='[["w", "uint8", [8], 0]]')
    with pytest.raises(WeightsError):
        Transfer(0).receive(replace(good, **offer), 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunks", [(-1,), (4,), tuple(range(CREDIT + 1)), (2**63 - 1,)])
def test_chunks_that_cannot_be_are_refused(chunks: tuple[int, ...]) -> None:
    segment = Segment(4 * CHUNK, newest=0)
    shelf = Shelf(segment.latest, segment.take, chunk_bytes=CHUNK)
    shelf.handle(b"a", msg.AskWeights(after=-1), 0.0)
    assert isinstance(shelf.handle(b"a", msg.AskChunks(version=0, chunks=chunks), 0.0)[0], msg.Refused)
    assert isinstance(shelf.handle(b"a", msg.NextBatch(step=0), 0.0)[0], msg.Refused)


def test_what_is_damaged_as_a_whole_is_fetched_anew() -> None:
    """Each chunk agrees with its checksum, but they are not those of the offer."""
    link = Link(Segment(2 * CHUNK, newest=0))
    link.to_server()
    link.to_reader()
    assert link.reader.offer is not None
    for index in range(2):
        wrong = bytes([7]) * CHUNK
        link.up += link.reader.receive(
            msg.Chunk(version=0, index=index, checksum=zlib.crc32(wrong), content=wrong), link.now
        )
    assert not link.reader.whole
    assert link.reader.damaged == 1
    link.up = [message for message in link.up if isinstance(message, msg.AskWeights)]
    link.to_the_end()
    assert link.reader.content.tobytes() == content(0, 2 * CHUNK).tobytes()
