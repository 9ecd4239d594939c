"""A problem whose code ends a generator that joined by itself, or that ends one from a thread, is refused as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support_command import Run
from support_poison import begin, refused

THREADS = """
import asyncio, ctypes, os, threading

async def leave(completion, answer, problem):
    await asyncio.to_thread(_leave, answer)
    return float(len(completion) % 2)

def _leave(answer):
    if answer == "3":
        os._exit(7)

async def crash(completion, answer, problem):
    await asyncio.to_thread(_crash, answer)
    return float(len(completion) % 2)

def _crash(answer):
    if answer == "3":
        ctypes.string_at(0)

async def own(completion, answer, problem):
    done = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()

    def work():
        if answer == "3":
            ctypes.string_at(0)
        loop.call_soon_threadsafe(done.set_result, None)

    threading.Thread(target=work).start()
    await done
    return float(len(completion) % 2)

async def freeze(completion, answer, problem):
    await asyncio.to_thread(_freeze, answer)
    return float(len(completion) % 2)

def _freeze(answer):
    if answer == "3":
        sum(range(10**13))
"""


def join(run: Run, name: str) -> tuple[int, str]:
    """`async-rl generate`, to its end."""
    words = [sys.executable, "-m", "async_rl", "generate", "--run", str(run.folder.path), "--name", name]
    ended = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False)
    return ended.returncode, ended.stdout


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("reward", "cause", "place"),
    [
        ("leave", "ended with code 7", ""),
        ("crash", "crashed (SIGSEGV)", "in poison_rewards.py:6 crash"),
        ("freeze", "no sign of life", "in poison_rewards.py:16 freeze"),
    ],
)
def test_two_joined_generators_die_of_it_and_the_third_trains_on(
    tmp_path: Path, tiny_model: Path, reward: str, cause: str, place: str
) -> None:
    run = begin(tmp_path, tiny_model, reward, "generator.count=0", "wire.frozen_after_s=2", "trainer.steps=4")
    try:
        run.wait_for_event("buffer_ready")
        for name in ("first", "second"):
            code, said = join(run, name)
            assert code == (7 if reward == "leave" else 1), said
            assert f"{name} " in said
            assert cause in said
            assert place in said
            assert "the run was told, and goes on" in said
        assert join(run, "third")[0] == 0
        said = run.said()
        assert run.process.returncode == 0, said
        (event,) = refused(run)
        assert (event.split, event.problem) == ("train", 3)
        told = f"poison: problem 3 of the train split ended its generator 2 times{place and ', ' + place}"
        assert event.reason.startswith(f"{told}; the last time: second ")
        assert cause in event.reason
    finally:
        if run.process.poll() is None:
            run.press_ctrl_c()


@pytest.mark.nightly
@pytest.mark.parametrize("reward", ["leave", "crash", "own", "freeze"])
def test_code_in_a_thread_is_found(tmp_path: Path, tiny_model: Path, reward: str) -> None:
    (tmp_path / "in_threads.py").write_text(THREADS)
    words = [f"task.args.reward={tmp_path}/in_threads.py:{reward}", "wire.frozen_after_s=2", "generator.max_restarts=8"]
    run = begin(tmp_path, tiny_model, reward if reward != "own" else "crash", *words, "trainer.steps=6")
    said = run.said()
    assert run.process.returncode == 0, said
    found = refused(run)
    assert [(event.split, event.problem) for event in found] == [("train", 3)]
    if reward != "leave":
        assert "in in_threads.py:" in found[0].reason
