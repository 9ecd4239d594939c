"""What a weight server may be sent, and a reader be offered, by somebody who means no good."""

from __future__ import annotations

from random import Random

import numpy as np
from msgspec.structs import replace
from support_hostile import KINDS, some_message

from async_rl.weights.shared_memory import WeightCopy, WeightsError
from async_rl.weights.stream import CREDIT, MOST_COPIES, Shelf, Transfer
from async_rl.wire import messages as msg
from async_rl.wire.frames import decode, encode

WEIGHTS = WeightCopy(version=3, layout='[["w", "float32", [3], 0]]', content=np.arange(12, dtype=np.uint8))
ASKS = (msg.AskWeights, msg.AskChunks)
OFFERS = (msg.Offer, msg.Chunk, msg.Withdrawn, msg.Waiting)


def test_whatever_is_asked_of_the_weight_server_it_answers_little_and_goes_on() -> None:
    random = Random(1)
    shelf = Shelf(latest=lambda: 3, take=lambda: WEIGHTS, chunk_bytes=5)
    for number in range(20_000):
        kind = random.choice(ASKS if random.random() < 0.7 else KINDS)
        message = some_message(random, kind)
        if isinstance(message, msg.AskChunks) and random.random() < 0.5:
            message = replace(message, version=3)
        answers = shelf.handle(b"peer-%d" % random.randrange(50), message, 0.01 * number)
        assert len(answers) <= CREDIT
        assert all(decode(encode(answer)) for answer in answers)
        shelf.tick(0.01 * number)
        assert len(shelf.copies) <= MOST_COPIES
        assert all(len(copy.readers) <= 50 for copy in shelf.copies.values())
    offer = shelf.handle(b"sound", msg.AskWeights(after=2), 300.0)[0]
    assert isinstance(offer, msg.Offer)
    chunks = shelf.handle(b"sound", msg.AskChunks(version=3, chunks=(0, 1, 2)), 300.0)
    assert b"".join(bytes(c.content) for c in chunks if isinstance(c, msg.Chunk)) == WEIGHTS.content.tobytes()


def test_whatever_is_offered_a_reader_takes_only_what_its_checksums_say() -> None:
    random = Random(2)
    refused = 0
    for number in range(2_000):
        transfer = Transfer(after=2)
        transfer.begin(0.0)
        try:
            for _ in range(10):
                kind = random.choice(OFFERS if random.random() < 0.9 else KINDS)
                transfer.receive(some_message(random, kind), 1.0)
                transfer.tick(float(number))
        except WeightsError:
            refused += 1
        assert not transfer.whole
    assert refused > 100
