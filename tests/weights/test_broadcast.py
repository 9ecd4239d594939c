"""One broadcast to several generators: real processes over gloo, each with the part that runs in vLLM's workers. vLLM
itself: tests/generator/test_vllm_engine.py."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support_broadcast import STOPS_AT, Engine, generate

from async_rl.weights import broadcast, receiver
from async_rl.weights.broadcast import Broadcast
from async_rl.weights.canary import fingerprint
from async_rl.weights.communicator import GroupEnded, Meeting, plan_buffers, room_for, used, views
from async_rl.weights.link import LinkServer, Staged

SUPPORT = Path(__file__).parents[1] / "support_broadcast.py"
SHAPES: dict[str, tuple[int, ...]] = {"embed": (70, 4), "layers.0.weight": (4, 4), "layers.1.weight": (4, 4)}
SHAPES |= {"norm": (4,), "scalar": (), "large": (1_500_000,)}
PACKED = 600
"""bytes: four buffers, of which the first and the last hold one larger tensor; the last does not fit into a socket's
memory"""


def tensors(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_buffers_hold_every_tensor_once_in_order_and_give_the_same_bytes_back() -> None:
    given = {name: tensor.to(torch.bfloat16) for name, tensor in tensors(1).items()}
    sent = [(name, "bfloat16", list(tensor.shape)) for name, tensor in given.items()]
    for packed in (1, 300, 600, 10_000_000):
        planned = plan_buffers(sent, packed)
        assert [one for buffer in planned for one, _ in buffer] == sent
        room = torch.zeros(room_for(planned), dtype=torch.uint8)
        for buffer in planned:
            assert used(buffer) <= packed or len(buffer) == 1
            for name, place in views(room, buffer):
                place.copy_(given[name])
            for name, place in views(room, buffer):
                assert torch.equal(place, given[name])
    assert (len(plan_buffers(sent, 1)), len(plan_buffers(sent, 10_000_000))) == (len(sent), 1)


class Trained:
    """The trainer's side, and its generators."""

    def __init__(self, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.staged = Staged(SHAPES, torch.float32, "cpu", copies=2)
        self.broadcast = Broadcast(self.staged, packed_bytes=PACKED)
        self.endpoint = f"ipc://{folder}/links.sock"
        self.server = LinkServer(
            self.endpoint,
            self.staged,
            self.broadcast.member,
            timeout_s=300.0,
            closing_s=0.5,
            in_turns=False,
            record=lambda event: self.events.append({"event": event.event, **event.detail()}),
        )
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, stop: str = "") -> subprocess.Popen[str]:
        """A generator process."""
        path = os.pathsep.join([str(SUPPORT.parent), *sys.path])
        name = f"generator-{len(self.processes)}"
        self.processes.append(
            subprocess.Popen(
                [sys.executable, str(SUPPORT), self.endpoint, name, stop, json.dumps(SHAPES)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        )
        return self.processes[-1]

    def publish(self, version: int) -> None:
        self.server.publish(tensors(version), version)

    def members(self) -> int:
        return len(self.broadcast._members)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trained]:
    # however slow this machine is, nobody who is known is left out or given up
    for name in ("GATHER_S", "OPEN_S", "ANSWER_S"):
        monkeypatch.setattr(broadcast, name, 300.0)
    monkeypatch.setattr(receiver, "MEET_S", 300.0)
    monkeypatch.setattr(broadcast, "FIRST_S", 0.2)
    monkeypatch.setattr(broadcast, "STALL_S", 300.0)
    trained = Trained(tmp_path)
    yield trained
    for process in trained.processes:
        process.kill()
        process.wait()
    trained.server.close()


def said(process: subprocess.Popen[str] | InThread) -> list[str]:
    if isinstance(process, InThread):
        return process.said.get(timeout=120.0)
    assert process.stdout is not None
    return process.stdout.readline().split()


def holds(version: int) -> list[str]:
    return ["holds", str(version), *map(str, sorted(fingerprint(tensors(version), version).values()))]


def wait_until(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def skip_meetings(process: subprocess.Popen[str] | InThread) -> tuple[list[str], list[str]]:
    """What it says next but for groups that it joins, and the sizes of those."""
    sizes = []
    while (words := said(process))[:1] == ["joins"]:
        sizes.append(words[1])
    return words, sizes


class InThread:
    """A generator in a thread, as a process is otherwise."""

    def __init__(self, trained: Trained, number: int) -> None:
        self.said: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self._over = threading.Event()

        def say(*words: object) -> None:
            self.said.put([str(word) for word in words])

        work = generate(Engine(SHAPES, say), trained.endpoint, f"generator-{number}", say, self._over.is_set)
        self._thread = threading.Thread(target=asyncio.run, args=(work,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join(120.0)


def test_a_version_goes_to_all_at_once_and_one_that_joins_later_is_in_the_next_group(trained: Trained) -> None:
    first = [InThread(trained, 0), InThread(trained, 1)]
    trained.publish(1)
    joined = [skip_meetings(one) for one in first]
    assert [words for words, _ in joined] == [holds(1)] * 2
    trained.publish(2)
    for one, (_, before) in zip(first, joined, strict=True):
        words, sizes = skip_meetings(one)
        assert (words, [*before, *sizes][-1]) == (holds(2), "3")
    trained.publish(3)
    for one in first:
        assert skip_meetings(one) == (holds(3), [])  # the same members, the same group
    late = InThread(trained, 2)
    assert skip_meetings(late) == (holds(3), ["2"])  # with the trainer alone: the others hold this version
    trained.publish(4)
    for one in (*first, late):
        assert skip_meetings(one) == (holds(4), ["4"])
    assert not trained.events
    for one in (*first, late):
        one.end()


@pytest.mark.nightly
@pytest.mark.parametrize("stop", ["dies", "freezes"])
def test_one_that_stops_on_the_way_costs_the_others_a_second_broadcast_and_nothing_else(
    trained: Trained, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stop == "freezes":
        for name in ("STALL_S", "ANSWER_S"):
            monkeypatch.setattr(broadcast, name, 20.0)
    processes = [trained.start(word) for word in (stop, "", "")]
    trained.publish(1)
    for process in processes:
        assert skip_meetings(process)[0] == holds(1)
    trained.publish(STOPS_AT)
    assert skip_meetings(processes[0])[0] == [stop]
    for process in processes[1:]:
        words, sizes = skip_meetings(process)
        assert words == holds(STOPS_AT)
        assert sizes[-1:] != ["4"] or len(sizes) == 1  # never again with the one that stopped
    wait_until(lambda: bool(trained.events))
    assert "generator-0" in trained.events[0]["reason"]
    trained.publish(3)
    for process in processes[1:]:
        assert skip_meetings(process)[0] == holds(3)
    trained.publish(4)
    for process in processes[1:]:
        assert skip_meetings(process) == (holds(4), [])
    wait_until(lambda: not trained.staged.readers)
    assert len(trained.events) == 1
    assert all(process.poll() is None for process in processes[1:])


@pytest.mark.nightly
def test_one_that_does_not_come_is_waited_for_once(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [trained.start(), trained.start()]
    for version in (1, 2):  # the second one in one group
        trained.publish(version)
        for process in first:
            assert skip_meetings(process)[0] == holds(version)
    wait_until(lambda: not trained.staged.readers)
    monkeypatch.setattr(broadcast, "GATHER_S", 0.2)
    os.kill(first[0].pid, signal.SIGSTOP)
    trained.publish(3)
    assert skip_meetings(first[1]) == (holds(3), ["2"])
    missed = {member.name: member.missed for member in trained.broadcast._members}
    assert missed == {"generator-0": True, "generator-1": False}
    monkeypatch.setattr(broadcast, "GATHER_S", 1e6)
    trained.publish(4)
    assert skip_meetings(first[1]) == (holds(4), [])
    os.kill(first[0].pid, signal.SIGCONT)
    assert skip_meetings(first[0])[0] == holds(4)
    trained.publish(5)
    for process in first:
        assert skip_meetings(process)[0] == holds(5)
    assert not trained.events


@pytest.mark.nightly
def test_a_broadcast_ends_when_the_trainer_dies(tmp_path: Path) -> None:
    """A worker waits in a collective call whose sender is gone: the connection that it keeps ends, and so does its
    wait."""
    from async_rl.weights.receiver import Receiver

    script = (
        "import socket, sys, torch\n"
        "from async_rl.weights.communicator import Meeting\n"
        "from async_rl.weights.receiver import connect, open_store\n"
        "store, line = open_store(0, here=True), socket.create_server(('127.0.0.1', 0))\n"
        "ports = dict(store=store.port, lifeline=line.getsockname()[1], opened=0)\n"
        "print(ports['store'], ports['lifeline'], flush=True)\n"
        "group = connect(torch.device('cpu'), store, Meeting(**ports, rank=0, size=2))\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    sender = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        store, lifeline = map(int, said(sender))
        receiver = Receiver(torch.device("cpu"))
        assert receiver.join(Meeting(store=store, lifeline=lifeline, opened=0, rank=1, size=2))
        assert said(sender) == ["open"]
        answers: list[bool] = []
        loaded: list[Any] = []
        waiting = threading.Thread(
            target=lambda: answers.append(receiver.receive([("x", "float32", [4])], loaded.append, packed_bytes=100))
        )
        waiting.start()
        sender.kill()
        waiting.join(120.0)
        assert (answers, loaded) == ([False], [])
        assert not receiver.receive([("x", "float32", [4])], loaded.append, packed_bytes=100)
    finally:
        sender.kill()
        sender.wait()


@pytest.mark.xdist_group("vllm")
def test_nccl_is_asked_in_order_and_an_abort_is_noticed_before_what_arrived_is_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: vLLM's wrapper with a library that counts, and events that are done when they are told so."""
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import nccl_common

    from async_rl.weights import vllm_nccl

    calls: list[Any] = []
    event = SimpleNamespace(query=lambda: reached[0])
    reached = [False]
    stream = SimpleNamespace(record_event=lambda: event, cuda_stream=7)

    def init(address: str, port: int, rank: int, world_size: int, device: torch.device) -> Any:
        made = object.__new__(pynccl.PyNcclCommunicator)
        made.rank, made.device, made.available, made.disabled = rank, device, True, False
        made.nccl = SimpleNamespace(  # type: ignore[assignment]
            ncclBroadcast=lambda send, receive, count, kind, src, comm, where: calls.append((count, kind, src)),
            ncclCommAbort=lambda comm: calls.append("abort"),
        )
        made.comm = None
        return made

    monkeypatch.setattr(nccl_common, "stateless_init_process_group", init)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: nullcontext())
    meeting = Meeting(store=1, lifeline=2, opened=3, rank=1, size=3)
    communicator = vllm_nccl.NcclCommunicator(torch.device("cpu"), meeting)
    communicator.begin(torch.zeros(600, dtype=torch.uint8))
    assert calls == [(600, pynccl.ncclDataTypeEnum.ncclUint8, 0)]
    assert not communicator.done()
    reached[0] = True
    assert communicator.done()
    communicator.abort()  # the kernel ends, and its event with it
    with pytest.raises(GroupEnded):
        communicator.done()
    with pytest.raises(GroupEnded):
        communicator.begin(torch.zeros(600, dtype=torch.uint8))
    communicator.abort()
    assert calls[1:] == ["abort"]
