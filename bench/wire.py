"""What it costs to send trajectories through the wire. Prints one JSON object.

    python bench/wire.py [--batches N]

Two processes over ipc, 2,000-token trajectories, 16 in a go, each go answered by the receiver, at most 4
goes under way (as permits would keep it). The ways take turns in one run; the rates are medians.

codec          encode + send + receive + decode and check, one message a go
raw            the same bytes by plain pyzmq, one message a trajectory
raw_multipart  the same bytes by plain pyzmq, one multipart message a go, a frame a trajectory
lists          tokens and log-probs as msgpack lists of numbers, one message a go
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import zmq

from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import pack
from async_rl.wire.channel import Dealer, Router
from async_rl.wire.messages import Accepted, Finished, Holds, decode, encode

TOKENS, PROMPT, MESSAGE_TRAJECTORIES, UNDER_WAY, ROUNDS = 2000, 100, 16, 4, 7


def trajectories() -> tuple[Trajectory, ...]:
    random = np.random.default_rng(0)
    log_behaviour = -random.exponential(size=TOKENS).astype(np.float32)
    log_behaviour[:PROMPT] = 0.0
    one = Trajectory(
        group=1,
        sample=0,
        problem=1,
        split="train",
        seed=1,
        tokens=random.integers(0, 150_000, TOKENS, dtype=np.int32),
        log_behaviour=log_behaviour,
        turns=(Turn(start=PROMPT, length=TOKENS - PROMPT),),
        versions=(VersionSpan(version=1, start=PROMPT, end=TOKENS),),
        reward=1.0,
        ended="finished",
        generator="generator-0",
    )
    return tuple(replace(one, sample=sample) for sample in range(MESSAGE_TRAJECTORIES))


def as_lists(sent: tuple[Trajectory, ...]) -> bytes:
    return msgpack.packb([[t.tokens.tolist(), t.log_behaviour.tolist()] for t in sent])


def receive_codec(endpoint: str) -> None:
    with Router(endpoint) as router:
        while True:
            received = router.receive(60)
            assert received is not None
            peer, message = received
            if isinstance(message, Holds):
                return
            assert isinstance(message, Finished)
            router.send(peer, Accepted(pairs=tuple((t.group, t.sample) for t in message.trajectories)))


def receive_raw(endpoint: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        while True:
            for _ in range(MESSAGE_TRAJECTORIES):
                peer, frame = router.recv_multipart()
                if not frame:
                    return
            router.send_multipart([peer, b"ok"])


def receive_multipart(endpoint: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        while True:
            peer, *frames = router.recv_multipart(copy=False)
            if len(frames) < MESSAGE_TRAJECTORIES:
                return
            router.send_multipart([peer, b"ok"])


def receive_lists(endpoint: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        while True:
            peer, frame = router.recv_multipart()
            if not frame:
                return
            for tokens, log_behaviour in msgpack.unpackb(frame):
                np.array(tokens, dtype=np.int32)
                np.array(log_behaviour, dtype=np.float32)
            router.send_multipart([peer, b"ok"])


def pumped(batches: int, send: Callable[[], None], receive: Callable[[], Any]) -> float:
    """Seconds for so many messages, with a window of answers outstanding."""
    started = time.perf_counter()
    for number in range(batches):
        send()
        if number >= UNDER_WAY - 1:
            receive()
    for _ in range(min(UNDER_WAY - 1, batches)):
        receive()
    return time.perf_counter() - started


def measure(sent: tuple[Trajectory, ...], batches: int) -> dict[str, list[float]]:
    """Tokens per second of each way, round by round."""
    blobs = [pack(t) for t in sent]
    receivers = {
        "codec": receive_codec,
        "raw": receive_raw,
        "raw_multipart": receive_multipart,
        "lists": receive_lists,
    }
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        ends = {name: f"ipc://{folder}/{name}" for name in receivers}
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=f, args=(ends[name],)) for name, f in receivers.items()]
        for process in processes:
            process.start()
        dealer = Dealer(ends["codec"], "bench")
        raw, multipart, lists = (context.socket(zmq.DEALER) for _ in range(3))
        for name, plain in (("raw", raw), ("raw_multipart", multipart), ("lists", lists)):
            plain.connect(ends[name])

        def send_raw() -> None:
            for blob in blobs:
                raw.send(blob)

        ways: dict[str, tuple[int, Callable[[], Any], Callable[[], Any]]] = {
            "codec": (
                batches,
                lambda: dealer.send(Finished(trajectories=sent)),
                lambda: dealer.receive(60, "an acknowledgement"),
            ),
            "raw": (batches, send_raw, lambda: raw.recv()),
            "raw_multipart": (
                batches,
                lambda: multipart.send_multipart(blobs, copy=False),
                lambda: multipart.recv(),
            ),
            "lists": (
                max(UNDER_WAY, batches // 10),
                lambda: lists.send(as_lists(sent)),
                lambda: lists.recv(),
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _, send, receive in ways.values():
            pumped(UNDER_WAY, send, receive)  # connections and first touches
        for _ in range(ROUNDS):
            for name, (count, send, receive) in ways.items():
                seconds = pumped(count, send, receive)
                rates[name].append(count * MESSAGE_TRAJECTORIES * TOKENS / seconds)
        dealer.send(Holds(version=0))
        for plain in (raw, multipart, lists):
            plain.send(b"")
        for process in processes:
            process.join()
        for end in (dealer, raw, multipart, lists):
            end.close()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=100, help="goes of one measurement")
    batches = parser.parse_args().batches
    sent = trajectories()
    rates = measure(sent, batches)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    num_tokens = MESSAGE_TRAJECTORIES * TOKENS
    bytes_per_token = sum(len(frame) for frame in encode(Finished(trajectories=sent))) / num_tokens
    found: dict[str, Any] = {
        "codec_over_raw": round(rate["codec"] / rate["raw"], 3),
        "target_codec_over_raw": 0.8,
        "codec_over_raw_multipart": round(rate["codec"] / rate["raw_multipart"], 3),
        "codec_over_lists": round(rate["codec"] / rate["lists"], 1),
        "bytes_per_token": round(bytes_per_token, 2),
        "target_bytes_per_token": 13,
        "lists_bytes_per_token": round(len(as_lists(sent)) / num_tokens, 2),
        "codec_mb_per_s": round(rate["codec"] * bytes_per_token / 1e6, 1),
    }
    found |= {f"{name}_mtokens_per_s": round(value / 1e6, 2) for name, value in rate.items()}
    by_round = zip(rates["codec"], rates["raw"], strict=True)
    found["codec_over_raw_by_round"] = [round(codec / raw, 3) for codec, raw in by_round]
    print(json.dumps(found | short_step_ms()))


def short_step_ms() -> dict[str, float]:
    """Cost of the Python side for one step of 256 trajectories of 20 tokens, milliseconds."""
    one = trajectories()[0]
    log_behaviour = one.log_behaviour[PROMPT : PROMPT + 20].copy()
    log_behaviour[:5] = 0.0
    short = replace(
        one,
        tokens=one.tokens[:20].copy(),
        log_behaviour=log_behaviour,
        turns=(Turn(start=5, length=15),),
        versions=(VersionSpan(version=1, start=5, end=20),),
    )
    message = Finished(trajectories=tuple(replace(short, sample=i) for i in range(256)))
    frames = encode(message)
    encoding, decoding = [], []
    for _ in range(20):
        started = time.perf_counter()
        encode(message)
        middle = time.perf_counter()
        decode(frames)
        encoding.append(middle - started)
        decoding.append(time.perf_counter() - middle)
    return {
        "encode_256_short_ms": round(1e3 * statistics.median(encoding), 2),
        "decode_256_short_ms": round(1e3 * statistics.median(decoding), 2),
    }


if __name__ == "__main__":
    main()
