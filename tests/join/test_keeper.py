"""The process beside a joined generator tells how that ended: real processes, a router as the buffer."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from async_rl.generator.step_mark import EPISODE, StepMark
from async_rl.process import dump_stacks_on_signal
from async_rl.run.join import JoinTarget, Traces
from async_rl.run.keeper import Keeper
from async_rl.wire import messages as msg
from async_rl.wire.channel import Router
from async_rl.wire.heartbeat import Activity, Heartbeat

LIMIT_S = 3.0  # a crash writes its stacks first


def generator(end: Callable[[], None], *, in_task: bool) -> Callable[[Traces], int]:
    """A process that beats, runs code of group 7, if so, and ends as `end` does."""

    def generate(traces: Traces) -> int:
        mark = StepMark.create(traces.marks)
        dump_stacks_on_signal(traces.stacks)
        activity = Activity()
        activity.now("in tasks")
        with Heartbeat(name="guest", role="generator", activity=activity, dealer=None, every_s=0.05, pipe=traces.pulse):
            if in_task:
                EPISODE.set((7, 2))
                mark.set()
            time.sleep(0.3)  # it lives, and beats
            end()
            traces.marks.unlink()
        return 0

    return generate


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hold_the_lock() -> None:
    sum(range(10**13))


def inside(function: Callable[[], None]) -> str:
    """The place of its only line."""
    return f"test_keeper.py:{function.__code__.co_firstlineno + 1} {function.__name__}"


def kept(tmp_path: Path, generate: Callable[[Traces], int], *, tells: bool) -> tuple[int, list[tuple[bytes, msg.Gone]]]:
    """Exit code, and what the buffer was told by whom."""
    endpoint = f"ipc://{tmp_path}/buffer.sock"
    keeper = Keeper(
        target=JoinTarget(endpoint=endpoint, keys=None, timeout_s=10.0),
        name="guest",
        identity="guest/1",
        frozen_after_s=LIMIT_S,
    )
    told: list[tuple[bytes, msg.Gone]] = []
    over = threading.Event()

    def listen() -> None:
        with Router(endpoint) as router:
            while not over.is_set():
                received = router.receive(0.05)
                if received is not None and isinstance(received[1], msg.Gone):
                    told.append((received[0], received[1]))
                    over.set()

    thread = threading.Thread(target=listen)
    thread.start()
    code = keeper.run(generate)
    over.wait(10 if tells else 0.5)
    over.set()
    thread.join()
    return code, told


@pytest.mark.parametrize(
    ("end", "in_task", "code", "groups", "said"),
    [
        (crash, True, 1, (7,), f"guest crashed (SIGSEGV), in {inside(crash)}"),
        (crash, False, 1, (), "guest crashed (SIGSEGV)"),
        (lambda: os._exit(7), True, 7, (7,), "guest ended with code 7"),
        (hold_the_lock, True, 1, (7,), f"its code stands in {inside(hold_the_lock)}"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), True, 1, (), "guest was killed from outside (SIGKILL)"),
        (lambda: None, False, 0, None, ""),
    ],
)
def test_how_it_ended_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], end: Callable[[], None], in_task: bool, code: int,
    groups: tuple[int, ...] | None, said: str,
) -> None:  # fmt: skip
    ended, told = kept(tmp_path, generator(end, in_task=in_task), tells=groups is not None)
    assert ended == code
    if groups is None:
        assert told == []
        return
    ((peer, gone),) = told
    assert peer == b"guest/1/keeper"
    assert (gone.name, gone.groups) == ("guest", groups)
    assert said in gone.reason
    assert said in capfd.readouterr().err


def test_a_crash_leaves_its_stacks_where_a_library_took_its_handler_over(tmp_path: Path) -> None:
    """As tvm_ffi does, which vLLM loads."""
    if (pid := os.fork()) == 0:
        dump_stacks_on_signal(tmp_path / "stacks")
        ctypes.CDLL(None).signal(int(signal.SIGSEGV), None)
        dump_stacks_on_signal()
        crash()
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV
    assert inside(crash).split()[1] in (tmp_path / "stacks").read_text()


def test_a_signal_for_the_keeper_goes_to_the_generator(tmp_path: Path) -> None:
    def generate(_: Traces) -> int:
        came: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
        os.kill(os.getppid(), signal.SIGTERM)
        while not came:
            signal.pause()
        return 128 + came[0]

    assert kept(tmp_path, generate, tells=False)[0] == 128 + signal.SIGTERM


def test_one_that_was_stopped_is_left_alone(tmp_path: Path) -> None:
    """Ctrl-Z, or a laptop that sleeps: it goes on later."""

    def generate(traces: Traces) -> int:
        pid = os.getpid()
        if os.fork() == 0:  # continues it after several times the limit
            time.sleep(4 * LIMIT_S)
            os.kill(pid, signal.SIGCONT)
            os._exit(0)
        return generator(lambda: os.kill(pid, signal.SIGSTOP), in_task=True)(traces)

    code, told = kept(tmp_path, generate, tells=False)
    assert (code, told) == (0, [])
