"""Links from the trainer into engines: order of calls, versions, deadlines and deaths, with a fake that keeps vLLM's
contract on both ends and moves the tensors over gloo. vLLM itself: tests/generator/test_vllm_link.py."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support_gloo import FakeEngine, FakeTrainerSide

from async_rl.errors import RunFailed
from async_rl.generator.pull import LinkSource
from async_rl.weights.canary import fingerprint
from async_rl.weights.link import Control, LinkServer, Staged, WeightLink
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer

SHAPES: dict[str, tuple[int, ...]] = {"embed": (7, 4), "layers.0.weight": (4, 4), "layers.1.weight": (4, 4)}
SHAPES |= {"norm": (4,)}


def tensors(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Trained:
    """The trainer's side."""

    def __init__(self, folder: Path, timeout_s: float = 20.0, copies: int = 1) -> None:
        self.events: list[dict[str, Any]] = []
        self.links: list[FakeTrainerSide] = []
        self.prepare: Callable[[FakeTrainerSide], None] = lambda _: None
        self.staged = Staged(SHAPES, torch.float32, "cpu", copies=copies)
        self.endpoint = f"ipc://{folder}/links.sock"
        self.server = LinkServer(
            self.endpoint,
            self.staged,
            self._link,
            timeout_s=timeout_s,
            closing_s=0.5,
            record=lambda event: self.events.append({"event": event.event, **event.detail()}),
        )

    def _link(self, asked: msg.AskLink, control: Control) -> WeightLink:
        link = FakeTrainerSide(control, self.staged, workers=asked.workers)
        self.prepare(link)
        self.links.append(link)
        return link

    def publish(self, version: int) -> None:
        self.server.publish(tensors(version), version)

    def lost(self, seconds: float = 20.0) -> str:
        """Why the first link was given up."""
        wait_until(lambda: bool(self.events), seconds)
        return str(self.events[0]["reason"])


def wait_until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[Trained]:
    trained = Trained(tmp_path)
    yield trained
    trained.server.close()


def bring(trained: Trained, engine: FakeEngine, *, first: bool, timeout_s: float = 20.0) -> None:
    """In a life of its own."""

    async def work() -> None:
        limits = {"first_s": timeout_s, "timeout_s": timeout_s}
        link = LinkSource(trained.endpoint, "generator-0", way="nccl", workers=1, **limits)
        try:
            await link.pull_into(engine, first=first)  # type: ignore[arg-type]
        finally:
            link.close()

    asyncio.run(work())


def test_versions_arrive_whole_and_in_vllms_order_of_calls(trained: Trained) -> None:
    engine = FakeEngine(tensors(99))

    async def work() -> None:
        link = LinkSource(trained.endpoint, "generator-0", way="nccl", workers=1, first_s=20.0, timeout_s=20.0)
        trained.publish(0)
        await link.pull_into(engine, first=True)  # type: ignore[arg-type]
        assert engine.version == 0
        await link.pull_into(engine, first=False)  # type: ignore[arg-type]
        assert engine.version == 0  # nothing newer: it comes back
        for version in (1, 4):
            trained.publish(version)
            await link.pull_into(engine, first=False)  # type: ignore[arg-type]
            assert engine.version == version
            assert await engine.fingerprint() == fingerprint(tensors(version), version)
        link.close()

    asyncio.run(work())
    assert engine.worker.calls == ["init", *["start", "update", "finish"] * 3]
    assert not trained.events


def test_a_generator_that_comes_before_the_first_weights_waits_for_them(trained: Trained) -> None:
    engine = FakeEngine(tensors(99))
    waiting = threading.Thread(target=bring, args=(trained, engine), kwargs={"first": True})
    waiting.start()
    wait_until(lambda: bool(trained.server._peers))
    trained.publish(3)
    waiting.join(20.0)
    assert engine.version == 3


GENERATOR = """
import asyncio, sys
from support_gloo import FakeEngine
from async_rl.generator.pull import LinkSource
import torch

endpoint, stop_at = sys.argv[1], int(sys.argv[2])
engine = FakeEngine({name: torch.zeros(shape) for name, shape in SHAPES.items()})

def between(number):
    if number == stop_at:
        print("midway", flush=True)
        asyncio.run(asyncio.sleep(3600))

engine.worker.between = between

async def work():
    link = LinkSource(endpoint, "generator-0", way="nccl", workers=1, first_s=60.0, timeout_s=60.0)
    await link.pull_into(engine, first=True)
    print("holds", engine.version, *sorted((await engine.fingerprint()).values()), flush=True)

asyncio.run(work())
"""


@pytest.fixture
def generator(trained: Trained) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """A generator process; the argument: the tensor before which it stops for good (-1: never)."""
    started: list[subprocess.Popen[str]] = []
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])

    def start(stop_at: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", f"SHAPES = {SHAPES!r}\n{GENERATOR}", trained.endpoint, str(stop_at)]
        environment = {**os.environ, "PYTHONPATH": path}
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_a_generator_that_dies_on_the_way_holds_nobody_up_and_its_next_life_meets_anew(
    trained: Trained, generator: Callable[[int], subprocess.Popen[str]]
) -> None:
    trained.publish(1)
    first = generator(2)
    assert said(first) == ["midway"]
    first.send_signal(signal.SIGKILL)
    trained.publish(2)  # would wait for the transfer of version 1
    assert "has ended" in trained.lost()
    second = generator(-1)
    expected = map(str, sorted(fingerprint(tensors(2), 2).values()))
    assert said(second) == ["holds", "2", *expected]
    assert len(trained.links) == 2


FREEZES = """
import asyncio, os, signal, sys
from support_gloo import FakeEngine
from async_rl.generator.pull import LinkSource
import torch

endpoint, name, freeze = sys.argv[1:]
engine = FakeEngine({name: torch.zeros(shape) for name, shape in SHAPES.items()})

def stop():
    print("frozen", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

if freeze == "midway":
    engine.worker.between = lambda number: stop() if number == 2 else None

async def work():
    link = LinkSource(endpoint, name, way="nccl", workers=1, first_s=60.0, timeout_s=60.0)
    if freeze == "asked":
        ask = link._ask
        async def asked(after):
            await ask(after)
            await asyncio.sleep(0.05)  # its socket's thread has sent it
            stop()
        link._ask = asked
    held = -1
    while True:
        await link.pull_into(engine, first=held < 0)
        if engine.version != held or held < 0:
            held = engine.version
            print("holds", held, *sorted((await engine.fingerprint()).values()), flush=True)
        await asyncio.sleep(0.01)

asyncio.run(work())
"""


@pytest.mark.parametrize("freeze", ["midway", pytest.param("asked", marks=pytest.mark.nightly)])
def test_of_three_generators_one_is_frozen_and_the_others_get_every_version_at_once(
    tmp_path: Path, freeze: str
) -> None:
    """Real processes over gloo. The frozen one holds one copy of the weights at most, and a link that can be closed."""
    trained = Trained(tmp_path, timeout_s=8.0, copies=2)
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    words = [sys.executable, "-c", f"SHAPES = {SHAPES!r}\n{FREEZES}", trained.endpoint]
    processes = [
        subprocess.Popen(
            [*words, f"generator-{number}", freeze if number == 0 else ""],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for number in range(3)
    ]
    try:
        trained.publish(1)
        assert said(processes[0]) == ["frozen"]
        frozen_at = time.monotonic()
        for version in (1, 2, 3, 4):
            if version > 1:
                trained.publish(version)
            expected = ["holds", str(version), *map(str, sorted(fingerprint(tensors(version), version).values()))]
            for process in processes[1:]:
                assert said(process) == expected
        assert time.monotonic() - frozen_at < 6.0, "not after the deadline of the frozen one"
        assert not trained.events, "it has time left"
        # the others have answered; their transfers end a moment later
        wait_until(lambda: trained.staged.readers == (["generator-0"] if freeze == "midway" else []))
        assert len(trained.staged._copies) == (2 if freeze == "midway" else 1)
        assert "generator-0" in trained.lost()
        wait_until(lambda: not any(thread.name == "link generator-0" for thread in threading.enumerate()))
        wait_until(lambda: not trained.staged.readers)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        trained.server.close()


def test_a_generator_that_stands_still_on_the_way_is_given_up_by_the_deadline(tmp_path: Path) -> None:
    trained = Trained(tmp_path, timeout_s=1.0)
    held = threading.Event()
    engine = FakeEngine(tensors(99))
    engine.worker.between = lambda number: number < 2 or held.wait()
    trained.publish(1)
    stuck = threading.Thread(target=bring_quietly, args=(trained, engine), daemon=True)
    stuck.start()
    wait_until(lambda: engine.worker.calls[-1:] == ["update"])
    trained.publish(2)
    assert trained.lost() == ("generator-0 did not take weights version 1 over nccl within 1 s (weights.timeout_s)")
    held.set()
    stuck.join(20.0)
    bring(trained, FakeEngine(tensors(99)), first=True)
    trained.server.close()


def test_links_send_one_after_another_and_one_that_stands_still_stops_no_other(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each packs as much as the largest tensor takes on the sending GPU."""
    monkeypatch.setattr("async_rl.weights.link.TURN_S", 60.0)
    sending: set[int] = set()
    together: list[int] = []

    def watch(link: FakeTrainerSide) -> None:
        def between(number: int) -> None:
            sending.add(id(link))
            together.append(len(sending))
            time.sleep(0.005)
            if number == len(SHAPES) - 1:
                sending.discard(id(link))

        link.between = between

    def pull(name: str, engine: FakeEngine) -> None:
        async def work() -> None:
            link = LinkSource(trained.endpoint, name, way="nccl", workers=1, first_s=20.0, timeout_s=20.0)
            try:
                await link.pull_into(engine, first=True)  # type: ignore[arg-type]
            finally:
                link.close()

        asyncio.run(work())

    trained.prepare = watch
    trained.publish(1)
    engines = [FakeEngine(tensors(99)) for _ in range(4)]
    pulls = [threading.Thread(target=pull, args=(f"generator-{i}", engine)) for i, engine in enumerate(engines)]
    for thread in pulls:
        thread.start()
    for thread in pulls:
        thread.join(20.0)
    assert [engine.version for engine in engines] == [1] * 4
    assert set(together) == {1}

    monkeypatch.setattr("async_rl.weights.link.TURN_S", 0.1)
    held = threading.Event()
    stuck = FakeEngine(tensors(99))
    stuck.worker.between = lambda _: (held.wait(), None)[1]
    waiting = threading.Thread(target=pull, args=("generator-4", stuck), daemon=True)
    waiting.start()
    wait_until(lambda: stuck.worker.calls[-1:] == ["update"])
    other = FakeEngine(tensors(99))
    pull("generator-5", other)
    assert (other.version, stuck.version) == (1, 0)
    held.set()
    waiting.join(20.0)
    assert stuck.version == 1


def test_a_link_that_stands_still_while_it_connects_holds_up_neither_others_nor_publications(tmp_path: Path) -> None:
    """Nor can it be closed: its thread is left behind."""
    trained, for_ever, stuck = Trained(tmp_path, timeout_s=0.5), threading.Event(), []

    def prepare(link: FakeTrainerSide) -> None:
        if not stuck:
            stuck.append(link)
            link.offer = lambda: (for_ever.wait(), None)[1]  # type: ignore[method-assign]
            link.close = lambda: (for_ever.wait(), None)[1]  # type: ignore[method-assign]

    trained.prepare = prepare
    trained.publish(1)
    waiting = threading.Thread(target=bring_quietly, args=(trained, FakeEngine(tensors(99))), daemon=True)
    waiting.start()
    wait_until(lambda: bool(stuck))
    began = time.monotonic()
    trained.publish(2)
    assert trained.lost() == "generator-0 did not take weights version -1 over nccl within 0.5 s (weights.timeout_s)"
    waiting.join(20.0)
    engine = FakeEngine(tensors(99))
    bring(trained, engine, first=True)
    trained.publish(3)
    assert engine.version == 2
    trained.server.close()
    assert time.monotonic() - began < 15.0
    for_ever.set()


def bring_quietly(trained: Trained, engine: FakeEngine) -> None:
    with pytest.raises(RunFailed):
        bring(trained, engine, first=True, timeout_s=2.0)


def test_a_link_that_cannot_be_ended_ends_the_trainer_by_name(tmp_path: Path) -> None:
    trained = Trained(tmp_path, timeout_s=0.5)
    for_ever = threading.Event()

    def unclosable(link: FakeTrainerSide) -> None:
        link.between = lambda _: (for_ever.wait(), None)[1]
        link.close = lambda: None  # type: ignore[method-assign]

    trained.prepare = unclosable
    trained.publish(1)
    stuck = threading.Thread(target=bring_quietly, args=(trained, FakeEngine(tensors(99))), daemon=True)
    stuck.start()
    wait_until(lambda: bool(trained.links) and bool(trained.staged.readers))
    with pytest.raises(RunFailed, match=r"waited 1 s for generator-0 to take weights version 1.*resume the run"):
        trained.publish(2)
    for_ever.set()
    stuck.join(20.0)
    trained.server.close()


def test_a_trainer_that_sends_nothing_is_named_by_the_generators_deadline(trained: Trained) -> None:
    with pytest.raises(RunFailed, match=r"generator-0 waited 0\.5 s .* for the trainer to send weights newer than"):
        bring(trained, FakeEngine(tensors(99)), first=True, timeout_s=0.5)
    held = threading.Event()
    trained.prepare = lambda link: setattr(link, "between", lambda number: number < 1 or held.wait())
    trained.publish(1)
    with pytest.raises(RunFailed, match=r"version 1 over nccl: its part of 'update' did not come from the trainer"):
        bring(trained, FakeEngine(tensors(99)), first=True, timeout_s=1.0)
    held.set()


def test_an_engine_with_another_model_refuses_and_both_sides_say_why(trained: Trained) -> None:
    trained.publish(1)
    other = {**tensors(99), "layers.1.weight": torch.zeros(4, 5)}
    with pytest.raises(RunFailed, match=r"Attempted to load weight layers\.1\.weight \[4, 4\]"):
        bring(trained, FakeEngine(other), first=True, timeout_s=5.0)
    assert "Attempted to load weight layers.1.weight" in trained.lost()
    trained.publish(2)


@pytest.mark.parametrize(
    ("version", "held", "reason"),
    [(1, 1, "holds version 1"), (0, 3, "holds version 3")],
)
def test_a_version_that_is_not_newer_is_refused_by_the_generator(
    trained: Trained, version: int, held: int, reason: str
) -> None:
    """A trainer that sends it all the same: the server itself would not."""
    engine = FakeEngine(tensors(99))
    engine.version = held
    trained.publish(held + 1)

    def lying(link: FakeTrainerSide) -> None:
        link.control.start_weight_update = lambda: link.control._call("start", {}, version)  # type: ignore[method-assign]

    trained.prepare = lying
    with pytest.raises(RunFailed, match=reason):
        bring(trained, engine, first=False)
    assert reason in trained.lost()
    assert engine.version == held


def test_a_call_for_another_version_than_was_begun_is_refused(trained: Trained) -> None:
    trained.publish(2)

    def lying(link: FakeTrainerSide) -> None:
        link.control.finish_weight_update = lambda _="": link.control._call("finish", {}, 3)  # type: ignore[method-assign]

    trained.prepare = lying
    engine = FakeEngine(tensors(99))
    with pytest.raises(RunFailed, match=r"'finish' is for weights version 3, but the transfer under way is of ver.* 2"):
        bring(trained, engine, first=True)
    assert engine.version == 0


def test_a_server_that_cannot_go_on_ends_the_trainer(tmp_path: Path) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise RunFailed("events.jsonl cannot be written")

    staged = Staged(SHAPES, torch.float32, "cpu")
    endpoint = f"ipc://{tmp_path}/links.sock"
    with (
        LinkServer(
            endpoint,
            staged,
            lambda _, __: 1 / 0,
            timeout_s=5.0,
            closing_s=0.5,
            record=full_disk,  # type: ignore[arg-type,return-value]
        ) as server,
        Dealer(endpoint, "g") as dealer,
    ):
        server.publish(tensors(0), 0)
        dealer.send(msg.AskLink(name="g", pid=os.getpid(), session=1, way="nccl", workers=1, after=-1))
        wait_until(lambda: server._failure is not None)
        with pytest.raises(RunFailed, match=r"events\.jsonl cannot be written"):
            server.publish(tensors(1), 1)


def test_strangers_change_nothing(trained: Trained) -> None:
    trained.publish(1)
    with Dealer(trained.endpoint, "stranger") as stranger:
        stranger.send(msg.LinkAnswer(session=1, number=1))
        ask = msg.AskLink(name="x", pid=2**22 + 1, session=1, way="nccl", workers=1, after=-1)
        stranger.send(ask)
        answer = stranger.receive(10.0, "a refusal")
        assert isinstance(answer, msg.Refused)
        assert "there is no process" in answer.reason
        stranger.send(msg.Done())
        answer = stranger.receive(10.0, "a refusal")
        assert isinstance(answer, msg.Refused)
        stranger._socket.send(b"\x00nonsense")
        answer = stranger.receive(10.0, "a refusal")
        assert isinstance(answer, msg.Refused)
    engine = FakeEngine(tensors(99))
    bring(trained, engine, first=True)
    assert engine.version == 1
    assert not [event for event in trained.events if event["name"] != "generator-0"]


def test_staged_weights_are_never_seen_half_written() -> None:
    staged = Staged(SHAPES, torch.float32, "cpu")
    torn: list[int] = []
    ending = threading.Event()

    def read() -> None:
        while not ending.is_set():
            with staged.held("reader", 10.0) as version:
                if version >= 0:
                    expected = tensors(version)
                    torn.extend(version for n, t in staged.named_parameters() if not torch.equal(t, expected[n]))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for version in range(50):
        staged.write(tensors(version).items(), version, 10.0)
    ending.set()
    for reader in readers:
        reader.join(10.0)
    assert not torn


def test_staged_weights_refuse_what_was_not_announced() -> None:
    staged = Staged(SHAPES, torch.bfloat16, "cpu")
    staged.write(tensors(1).items(), 1, 1.0)
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in staged.named_parameters())
    with pytest.raises(ValueError, match="not newer"):
        staged.write(tensors(1).items(), 1, 1.0)
    with pytest.raises(ValueError, match="not among the tensors announced"):
        staged.write({**tensors(2), "more": torch.zeros(1)}.items(), 2, 1.0)
    with pytest.raises(ValueError, match="norm"):
        staged.write([(n, t) for n, t in tensors(2).items() if n != "norm"], 2, 1.0)
