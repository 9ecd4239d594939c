"""What it costs to send trajectories through the wire. Prints one JSON object.

    python bench/wire.py [--batches N] [--rounds N] [--pin]

Two processes over ipc, 2,000-token trajectories, 16 in a go, each go answered by the receiver, at most 4
goes under way (as permits would keep it). Every way has its own two processes and the ways take turns;
rates are medians over the rounds. `--pin` ties each sender to one core and each receiver to another.

codec          encode + send + receive + decode and check, one message a go
raw            the same bytes by plain pyzmq, one message a trajectory
raw_multipart  the same bytes by plain pyzmq, one multipart message a go, a frame a trajectory
lists          tokens and log-probs as msgpack lists of numbers, one message a go

`cpu_us`: processor time of all threads, microseconds a trajectory. Of the codec's, `encode` and `decode`
are measured alone; `send` and `receive` are the rest of each process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgpack
import numpy as np
import zmq
from msgspec.structs import replace

from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import pack
from async_rl.wire.channel import Dealer, Router
from async_rl.wire.frames import decode, encode
from async_rl.wire.messages import Accepted, Finished, Holds

TOKENS, PROMPT, MESSAGE_TRAJECTORIES, UNDER_WAY = 2000, 100, 16, 4


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


def receive_codec(endpoint: str) -> Iterator[None]:
    with Router(endpoint) as router:
        while True:
            received = router.receive(60)
            assert received is not None
            yield
            peer, message = received
            if isinstance(message, Holds):
                return
            assert isinstance(message, Finished)
            router.send(peer, Accepted(pairs=tuple((t.group, t.sample) for t in message.trajectories)))


def receive_raw(endpoint: str) -> Iterator[None]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        while True:
            for _ in range(MESSAGE_TRAJECTORIES):
                peer, frame = router.recv_multipart()
                if not frame:
                    return
            yield
            router.send_multipart([peer, b"ok"])


def receive_multipart(endpoint: str) -> Iterator[None]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        while True:
            peer, *frames = router.recv_multipart(copy=False)
            if len(frames) < MESSAGE_TRAJECTORIES:
                return
            yield
            router.send_multipart([peer, b"ok"])


def receive_lists(endpoint: str) -> Iterator[None]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        while True:
            peer, frame = router.recv_multipart()
            if not frame:
                return
            yield
            for tokens, log_behaviour in msgpack.unpackb(frame):
                np.array(tokens, dtype=np.int32)
                np.array(log_behaviour, dtype=np.float32)
            router.send_multipart([peer, b"ok"])


RECEIVERS = {
    "codec": receive_codec,
    "raw": receive_raw,
    "raw_multipart": receive_multipart,
    "lists": receive_lists,
}


def receiver(name: str, endpoint: str, core: int | None, told: Connection) -> None:
    """Tells the processor seconds from the first message on, over the number of the others."""
    pin(core)
    first, count = 0.0, 0
    for _ in RECEIVERS[name](endpoint):
        first = first or time.process_time()
        count += 1
    told.send((time.process_time() - first) / (count - 1))


def sender(name: str, endpoint: str, core: int | None, asked: Connection) -> None:
    """Sends as many goes as it is asked for and tells wall and processor seconds; 0: the end."""
    pin(core)
    sent = trajectories()
    blobs = [pack(t) for t in sent]
    with zmq.Context() as context:
        dealer: Any = Dealer(endpoint, "bench") if name == "codec" else context.socket(zmq.DEALER)
        if name == "codec":
            ways: tuple[Callable[[], Any], Callable[[], Any]] = (
                lambda: dealer.send(Finished(trajectories=sent)),
                lambda: dealer.receive(60, "an acknowledgement"),
            )
        else:
            dealer.connect(endpoint)
            send = {
                "raw": lambda: [dealer.send(blob) for blob in blobs],
                "raw_multipart": lambda: dealer.send_multipart(blobs, copy=False),
                "lists": lambda: dealer.send(as_lists(sent)),
            }
            ways = (send[name], dealer.recv)
        while goes := asked.recv():
            cpu = time.process_time()
            seconds = pumped(goes, *ways)
            asked.send((seconds, time.process_time() - cpu))
        dealer.send(Holds(version=0) if name == "codec" else b"")
        dealer.close()


def pumped(goes: int, send: Callable[[], Any], receive: Callable[[], Any]) -> float:
    """Seconds for so many goes, with a window of answers outstanding."""
    started = time.perf_counter()
    for number in range(goes):
        send()
        if number >= UNDER_WAY - 1:
            receive()
    for _ in range(min(UNDER_WAY - 1, goes)):
        receive()
    return time.perf_counter() - started


def pin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})


def measure(
    goes: int, rounds: int, cores: tuple[int | None, int | None]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Tokens per second of each way, round by round; processor seconds a trajectory of its two ends."""
    spawn = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {name: [] for name in RECEIVERS}
    spent: dict[str, list[float]] = {name: [] for name in RECEIVERS}
    senders: dict[str, Connection] = {}
    receivers: dict[str, Connection] = {}
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for name in RECEIVERS:
            for role, ends, core in ((receiver, receivers, cores[1]), (sender, senders, cores[0])):
                ends[name], theirs = spawn.Pipe()
                processes.append(spawn.Process(target=role, args=(name, f"ipc://{folder}/{name}", core, theirs)))
        for process in processes:
            process.start()
        for number in range(rounds + 1):
            for name, end in senders.items():
                count = max(UNDER_WAY, goes // 10) if name == "lists" else goes
                end.send(count)
                seconds, cpu = end.recv()
                if number > 0:  # the first round: connections and first touches
                    rates[name].append(count * MESSAGE_TRAJECTORIES * TOKENS / seconds)
                    spent[name].append(cpu / count)
        for end in senders.values():
            end.send(0)
        each = {
            name: {
                "sender": statistics.mean(spent[name]) / MESSAGE_TRAJECTORIES,
                "receiver": receivers[name].recv() / MESSAGE_TRAJECTORIES,
            }
            for name in RECEIVERS
        }
        for process in processes:
            process.join()
    return rates, each


def alone(message: Finished, rounds: int = 40) -> tuple[float, float]:
    """Processor seconds of one `encode` and one `decode` of the message."""
    frames = encode(message)
    encoding, decoding = [], []
    for _ in range(rounds):
        started = time.process_time()
        encode(message)
        middle = time.process_time()
        decode(frames)
        encoding.append(middle - started)
        decoding.append(time.process_time() - middle)
    return statistics.median(encoding), statistics.median(decoding)


def short_step() -> Finished:
    """256 trajectories of 17 tokens in 5 turns, as the quickstart's task makes them."""
    one = trajectories()[0]
    log_behaviour = np.zeros(17, dtype=np.float32)
    log_behaviour[2::3] = -0.5
    short = replace(
        one,
        tokens=one.tokens[:17].copy(),
        log_behaviour=log_behaviour,
        turns=tuple(Turn(start=start, length=1) for start in range(2, 17, 3)),
        versions=(VersionSpan(version=1, start=2, end=17),),
        info={"secret": 3.0},
    )
    return Finished(trajectories=tuple(replace(short, sample=i) for i in range(256)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60, help="goes of one measurement")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pin", action="store_true", help="senders on one core, receivers on another")
    arguments = parser.parse_args()
    cores: list[int | None] = [None, None]
    if arguments.pin:
        cores = sorted(os.sched_getaffinity(0))[:2]  # type: ignore[assignment]
    rates, spent = measure(arguments.batches, arguments.rounds, (cores[0], cores[-1]))
    sent = trajectories()
    with tempfile.TemporaryDirectory() as folder, Dealer(f"ipc://{folder}/nobody", "bench"):
        encode_go, decode_go = alone(Finished(trajectories=sent))
        encode_short, decode_short = alone(short_step())
    encode_s, decode_s = encode_go / MESSAGE_TRAJECTORIES, decode_go / MESSAGE_TRAJECTORIES
    spent["codec"] |= {
        "encode": encode_s,
        "send": spent["codec"]["sender"] - encode_s,
        "receive": spent["codec"]["receiver"] - decode_s,
        "decode": decode_s,
    }
    rate = {name: statistics.median(values) for name, values in rates.items()}
    num_tokens = MESSAGE_TRAJECTORIES * TOKENS
    bytes_per_token = sum(len(frame) for frame in encode(Finished(trajectories=sent))) / num_tokens
    by_round = [codec / raw for codec, raw in zip(rates["codec"], rates["raw"], strict=True)]
    found: dict[str, Any] = {
        "codec_over_raw": round(statistics.median(by_round), 3),
        "target_codec_over_raw": 0.8,
        "codec_over_raw_of_medians": round(rate["codec"] / rate["raw"], 3),
        "codec_over_raw_multipart": round(rate["codec"] / rate["raw_multipart"], 3),
        "codec_over_lists": round(rate["codec"] / rate["lists"], 1),
        "bytes_per_token": round(bytes_per_token, 2),
        "target_bytes_per_token": 13,
        "lists_bytes_per_token": round(len(as_lists(sent)) / num_tokens, 2),
        "codec_mb_per_s": round(rate["codec"] * bytes_per_token / 1e6, 1),
        "pinned": arguments.pin,
        "load_average": round(os.getloadavg()[0], 1),
    }
    found |= {f"{name}_mtokens_per_s": round(value / 1e6, 2) for name, value in rate.items()}
    found["codec_over_raw_by_round"] = [round(ratio, 2) for ratio in by_round]
    found["cpu_us"] = {
        name: {part: round(1e6 * seconds, 1) for part, seconds in parts.items()} for name, parts in spent.items()
    }
    found["encode_256_short_ms"] = round(1e3 * encode_short, 2)
    found["decode_256_short_ms"] = round(1e3 * decode_short, 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
