"""What it costs to send trajectories through the wire. Prints one JSON object.

    python bench/wire.py [--batches N]

Two processes over ipc, 2,000-token trajectories, 16 a message, at most 4 messages under way (as permits
would keep it), each answered by the receiver. `codec`: encode + send + receive + decode. `raw`: the same
bytes, one frame a trajectory, sent by plain pyzmq. `lists`: tokens and log-probs as msgpack lists. The
three take turns in one run; the rates are medians.
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


def receive_plain(endpoint: str, unpack_lists: bool) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        while True:
            peer, *frames = router.recv_multipart(copy=unpack_lists)
            if len(frames[0]) == 0:
                return
            if unpack_lists:
                for tokens, log_behaviour in msgpack.unpackb(frames[0]):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=100, help="messages of one measurement")
    batches = parser.parse_args().batches
    sent = trajectories()
    blobs = [pack(t) for t in sent]
    num_bytes = sum(len(frame) for frame in encode(Finished(trajectories=sent)))
    lists = as_lists(sent)
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        ends = {name: f"ipc://{folder}/{name}" for name in ("codec", "raw", "lists")}
        receivers = [
            processes.Process(target=receive_codec, args=(ends["codec"],)),
            processes.Process(target=receive_plain, args=(ends["raw"], False)),
            processes.Process(target=receive_plain, args=(ends["lists"], True)),
        ]
        for receiver in receivers:
            receiver.start()
        dealer = Dealer(ends["codec"], "bench")
        raw, listed = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        raw.connect(ends["raw"])
        listed.connect(ends["lists"])
        ways: dict[str, tuple[int, Callable[[], None], Callable[[], Any]]] = {
            "codec": (
                batches,
                lambda: dealer.send(Finished(trajectories=sent)),
                lambda: dealer.receive(60, "an acknowledgement"),
            ),
            "raw": (batches, lambda: raw.send_multipart(blobs, copy=False), raw.recv),
            "lists": (max(UNDER_WAY, batches // 10), lambda: listed.send(as_lists(sent)), listed.recv),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for name, (_, send, receive) in ways.items():
            pumped(UNDER_WAY, send, receive)  # connections and first touches
            assert name in rates
        for _ in range(ROUNDS):
            for name, (count, send, receive) in ways.items():
                seconds = pumped(count, send, receive)
                rates[name].append(count * MESSAGE_TRAJECTORIES * TOKENS / seconds)
        dealer.send(Holds(version=0))
        raw.send(b"")
        listed.send(b"")
        for receiver in receivers:
            receiver.join()
        dealer.close()
        raw.close()
        listed.close()
    rate = {name: statistics.median(values) for name, values in rates.items()}
    bytes_per_token = num_bytes / (MESSAGE_TRAJECTORIES * TOKENS)
    small = short_step_ms()
    print(
        json.dumps(
            {
                "codec_over_raw": round(rate["codec"] / rate["raw"], 3),
                "target_codec_over_raw": 0.8,
                "bytes_per_token": round(bytes_per_token, 2),
                "target_bytes_per_token": 13,
                "codec_mtokens_per_s": round(rate["codec"] / 1e6, 2),
                "raw_mtokens_per_s": round(rate["raw"] / 1e6, 2),
                "lists_mtokens_per_s": round(rate["lists"] / 1e6, 2),
                "codec_mb_per_s": round(rate["codec"] * bytes_per_token / 1e6, 1),
                "lists_bytes_per_token": round(len(lists) / (MESSAGE_TRAJECTORIES * TOKENS), 2),
                "codec_over_raw_by_round": [
                    round(a / b, 3) for a, b in zip(rates["codec"], rates["raw"], strict=True)
                ],
                **small,
            }
        )
    )


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
