"""Before it generates anything, a joining generator finds the run, is let in, and has the same problems."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from support_run import quick_settings

from async_rl.cli.main import main
from async_rl.config.schema import to_yaml
from async_rl.events import BufferReady, ProcessStarted
from async_rl.model.folder import load_model
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.preflight import task_digest
from async_rl.run_folder import RunFolder
from async_rl.task import make_task
from async_rl.trajectory.codec import WireError
from async_rl.weights import WeightPublisher
from async_rl.weights.canary import fingerprint
from async_rl.wire import messages as msg
from async_rl.wire.channel import Router
from async_rl.wire.endpoint import this_host

Answer = Callable[[msg.Message], msg.Message | None]


@contextmanager
def buffer(endpoint: str, answer: Answer) -> Iterator[list[msg.Message]]:
    """A buffer that says what it is told to; what it heard."""
    over, heard = threading.Event(), []

    def serve() -> None:
        with Router(endpoint) as router:
            while not over.is_set():
                received = router.receive(0.05)
                if received is None or isinstance(received[1], WireError):
                    continue
                heard.append(received[1])
                if (reply := answer(received[1])) is not None:
                    router.send(received[0], reply)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield heard
    finally:
        over.set()
        thread.join()


@pytest.fixture
def told(tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and stderr of `async-rl generate ...`."""

    def attempt(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["generate", *words])
        return int(end.value.code or 0), capfd.readouterr().err.removeprefix("async-rl: ")

    return attempt


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> RunFolder:
    """Of a run that this test's process runs."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text(to_yaml(quick_settings(tiny_model)))
    folder.lock.write_text(f"{os.getpid()}\n")
    folder.record(ProcessStarted(process="buffer", pid=1))
    folder.record(BufferReady(endpoint=f"ipc://{folder.path}/buffer.sock"))
    return folder


def welcome(model: Path, digest: str, *overrides: str, **here: str) -> msg.Welcome:
    settings = asdict(quick_settings(model, *overrides))
    place = {"host": "h", "folder": "f", "segment": "s", **here}
    return msg.Welcome(run="r", settings=settings, task_digest=digest, weights="", **place)


def test_other_problems_than_the_runs_are_refused_before_hello(
    told: Callable[..., tuple[int, str]], folder: RunFolder, tiny_model: Path
) -> None:
    endpoint = f"ipc://{folder.path}/buffer.sock"
    with buffer(endpoint, lambda heard: welcome(tiny_model, "other")) as heard:
        code, said = told("--run", str(folder.path))
    assert code == 2
    assert "the problems of task 'guess' or their tokens are not those of the run" in said
    assert [type(message) for message in heard] == [msg.Join]


def test_the_buffers_reason_is_passed_on(told: Callable[..., tuple[int, str]], folder: RunFolder) -> None:
    refused = msg.Refused(what="Join", reason="it is async-rl 0.0.1, this run is 9; both need the same")
    with buffer(f"ipc://{folder.path}/buffer.sock", lambda heard: refused):
        code, said = told("--connect", f"ipc://{folder.path}/buffer.sock")
    assert (code, said.count("\n")) == (2, 1)
    assert said.endswith("refused this generator: it is async-rl 0.0.1, this run is 9; both need the same\n")


def test_where_nobody_answers_is_said(
    told: Callable[..., tuple[int, str]], folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_rl.run.join.ANSWER_S", 0.5)
    code, said = told("--run", str(folder.path))
    assert code == 1
    assert "for 0.5 s: is a run there, and can it be reached?" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "name the run to join: --run RUN"),
        (("--run", "nowhere"), "nowhere is not a run folder"),
        (("--connect", "tcp://127.0.0.1:5555"), "tcp://127.0.0.1:5555 is served with keys only; name their folder"),
        (("--connect", "ipc://x", "--keys", "k"), "--keys does nothing with ipc://x"),
        (("--connect", "tcp://127.0.0.1:5555", "--keys", "none"), "client.key_secret cannot be read"),
        (("--connect", "nonsense"), "it must look like ipc://PATH or tcp://HOST:PORT"),
    ],
)
def test_what_is_wrong_with_the_words_is_said(
    told: Callable[..., tuple[int, str]], words: tuple[str, ...], reason: str
) -> None:
    code, said = told(*words)
    assert code == 2
    assert reason in said


def test_a_run_that_is_over_or_that_nobody_runs_is_not_waited_for(
    told: Callable[..., tuple[int, str]], folder: RunFolder
) -> None:
    folder.lock.write_text("999999999\n")
    code, said = told("--run", str(folder.path))
    assert code == 2
    assert f"nobody runs it now; `async-rl run --resume {folder.path}` goes on with it" in said
    folder.summary.write_text("{}")
    code, said = told("--run", str(folder.path))
    assert code == 2
    assert "this run is finished; there is nothing to join" in said


def test_a_buffer_that_is_gone_ends_it_with_the_cause(
    told: Callable[..., tuple[int, str]], folder: RunFolder, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says welcome, hears the Hello, and is never heard of again."""
    monkeypatch.setattr("async_rl.run.join.arithmetic_environment", lambda threads: {})
    settings = quick_settings(tiny_model)
    task = make_task(settings.task.name, settings.task.args)
    answer = welcome(
        tiny_model, task_digest(task, Tokenizer(tiny_model)),
        "wire.frozen_after_s=1", "wire.stall_report_s=1", "wire.timeout_s=3",
        host=this_host(), folder=os.getcwd(), segment=str(folder.path / "weights"),
    )  # fmt: skip
    weights = dict(load_model(tiny_model).named_parameters())
    with (
        WeightPublisher(folder.path / "weights", weights) as publisher,
        buffer(
            f"ipc://{folder.path}/buffer.sock", lambda heard: answer if isinstance(heard, msg.Join) else None
        ) as heard,
    ):
        publisher.publish(weights, 7)
        code, said = told("--run", str(folder.path), "--name", "mine")
    assert code == 1
    assert re.search(r"mine has heard nothing of the buffer for \d+ s \(wire.timeout_s=3\)", said)
    hello = next(message for message in heard if isinstance(message, msg.Hello))
    assert (hello.name, hello.joined) == ("mine", True)
    canary = next(message for message in heard if isinstance(message, msg.Canary))
    assert canary.version == 7
    assert dict(canary.digests) == fingerprint(weights, 7)
