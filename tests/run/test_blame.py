"""Whose code ended a generator, read from the marks and stacks that a real process leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from async_rl.generator.step_mark import Marks
from async_rl.run.blame import Blame, blame

PROCESS = """
import asyncio, ctypes, faulthandler, os, signal, sys, time
from pathlib import Path
from async_rl.generator.step_mark import EPISODE, MarkedThreads, StepMark
from async_rl.generator.task_code import TaskGuard, run_to_end

place, how = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(place))
import a_reward

mark = StepMark.create(place / "marks")
mark.watch_exit()
stacks = open(place / "stacks", "ab")
faulthandler.enable(file=stacks)
faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)

async def episode(guard, group, work):
    EPISODE.set((group, 0))
    await guard.steps(work)

async def main():
    asyncio.get_running_loop().set_default_executor(MarkedThreads(8, mark))
    guard = TaskGuard(mark=mark)
    all_of = [episode(guard, group, a_reward.waits()) for group in (4, 5)]
    await asyncio.gather(*all_of, episode(guard, 7, getattr(a_reward, how)()))

run_to_end(main())
"""
REWARD = """
import asyncio, ctypes, os, signal, threading

async def waits():
    await asyncio.sleep(60)

async def step():
    await asyncio.sleep(0)
    os._exit(3)

async def thread_leaves():
    await asyncio.to_thread(leave, asyncio.get_running_loop())

def leave(loop):
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()  # its step is over, all others wait
    os._exit(3)

async def own_thread_leaves():
    threading.Thread(target=leave, args=(asyncio.get_running_loop(),)).start()
    await asyncio.sleep(60)

async def forked_child_leaves():
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), 11)
    await asyncio.sleep(60)

async def thread_crashes():
    await asyncio.to_thread(crash, asyncio.get_running_loop())

def crash(loop):
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
    ctypes.string_at(0)

async def thread_freezes():
    await asyncio.to_thread(freeze, asyncio.get_running_loop())

def freeze(loop):
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
    os.kill(os.getpid(), signal.SIGUSR2); ctypes.PyDLL(None).sleep(60)

async def callback_crashes():
    asyncio.get_running_loop().call_later(0.1, strike)
    await asyncio.sleep(60)

def strike():
    ctypes.string_at(0)

async def loop_crashes():
    asyncio.get_running_loop().call_soon(ctypes.string_at, 0)  # nobody's: not in any episode's step
    await asyncio.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("step", Blame(groups=(7,))),
        ("thread_leaves", Blame(groups=(7,))),
        ("own_thread_leaves", Blame(groups=(4, 5, 7))),
        ("forked_child_leaves", Blame(groups=())),
        ("thread_crashes", Blame(groups=(7,), place="a_reward.py:34 crash")),
        ("thread_freezes", Blame(groups=(7,), place="a_reward.py:41 freeze")),
        ("callback_crashes", Blame(groups=(4, 5, 7), place="a_reward.py:48 strike")),
        ("loop_crashes", Blame()),
    ],
)
def test_marks_and_stacks_name_the_group(tmp_path: Path, how: str, wanted: Blame) -> None:
    (tmp_path / "a_reward.py").write_text(REWARD)
    process = subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), how])
    frozen = None
    try:
        if how == "thread_freezes":
            while not (tmp_path / "stacks").exists() or "freeze" not in (tmp_path / "stacks").read_text():
                assert process.poll() is None
            frozen = (tmp_path / "stacks").read_text()
        else:
            process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (3, -signal.SIGSEGV, -signal.SIGKILL)
    stacks = (tmp_path / "stacks").read_text()
    marks = Marks.read(tmp_path / "marks")
    assert blame(marks, frozen=frozen, stacks=stacks if frozen is None else "") == wanted
    if how == "own_thread_leaves":
        assert blame(marks, recorded=True) == Blame()  # our own code ended it, and said why
