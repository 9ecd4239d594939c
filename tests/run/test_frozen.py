"""Stopped processes on real runs: named, ended, replaced; and left alone when they are only slow."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support_command import Run, starter, wait_for

from async_rl.run_folder import read_rows

FROZEN_S = 3.0


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Callable[..., Run]:
    return starter(tmp_path, tiny_model, f"wire.frozen_after_s={FROZEN_S}")


def steps(run: Run) -> int:
    return sum(1 for _ in read_rows(run.folder.metrics))


def doing(run: Run, name: str) -> str:
    """What a process does, as live.json has it."""
    processes = json.loads(run.folder.live.read_text())["processes"] if run.folder.live.exists() else []
    return "".join(str(row["doing"]) for row in processes if row["name"] == name)


def rows(run: Run, event: str) -> list[dict]:  # type: ignore[type-arg]
    return [row for row in read_rows(run.folder.events) if row["event"] == event]


def test_a_stopped_generator_is_ended_and_started_anew_and_the_run_finishes(start: Callable[..., Run]) -> None:
    run = start("trainer.steps=80")  # one generator: without it the run cannot end
    run.wait_for_training()
    stopped = run.pid("generator-0")
    os.kill(stopped, signal.SIGSTOP)
    run.wait_for_event("generator_died")
    assert steps(run) < 80, "its permits were needed"
    said = run.said()
    assert run.process.returncode == 0, said
    frozen = rows(run, "process_frozen")
    assert [(row["name"], row["pid"]) for row in frozen] == [("generator-0", stopped)]
    assert "it is frozen" in frozen[0]["reason"]
    assert steps(run) == 80
    assert "generator-0 is started again" in said
    assert run.left_behind() == []


@pytest.mark.parametrize(
    "name", ["trainer", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("buffer", "generator-0"))]
)
def test_without_buffer_or_trainer_or_restarts_the_run_ends_and_names_it(start: Callable[..., Run], name: str) -> None:
    run = start("trainer.steps=100000", "generator.max_restarts=0")
    run.wait_for_training()
    os.kill(run.pid(name), signal.SIGSTOP)
    stopped = time.monotonic()
    said = run.said()
    assert time.monotonic() - stopped < 30
    assert run.process.returncode == 1
    budget = "generator-0 died 1 times within 300 s (generator.max_restarts=0); the first cause: "
    assert f"async-rl: {budget * (name == 'generator-0')}{name} gave no sign of life for " in said
    assert f"(wire.frozen_after_s={FROZEN_S:g}): it is frozen" in said
    assert "last heard: " in said
    assert "Traceback" not in said
    assert run.left_behind() == []


def test_a_generator_stopped_for_a_moment_is_left_alone(start: Callable[..., Run]) -> None:
    run = start("trainer.steps=40", "wire.frozen_after_s=20")
    run.wait_for(lambda: any(row["generators"] == 1 for row in read_rows(run.folder.metrics)), "a generator")
    before = steps(run)
    stopped = run.pid("generator-0")
    os.kill(stopped, signal.SIGSTOP)
    wait_for(lambda: doing(run, "trainer").startswith("waiting for the batch"), "the trainer to miss it")
    os.kill(stopped, signal.SIGCONT)
    said = run.said()
    assert run.process.returncode == 0, said
    assert before < steps(run) == 40
    assert not run.events() & {"process_frozen", "generator_died", "generator_lost", "generator_rejoined"}
    assert json.loads(run.folder.live.read_text())["state"] == "ended"


@pytest.mark.nightly
def test_a_generator_told_to_end_leaves_and_its_next_life_goes_on(start: Callable[..., Run]) -> None:
    run = start("trainer.steps=80")
    run.wait_for_training()
    os.kill(run.pid("generator-0"), signal.SIGTERM)
    said = run.said()
    assert run.process.returncode == 0, said
    (left,) = rows(run, "generator_left")
    assert (left["name"], left["reason"]) == ("generator-0", "told to end")
    assert "generator-0 was told to end from outside (SIGTERM)" in rows(run, "generator_died")[0]["reason"]
    assert rows(run, "generator_lost") == []


def test_a_reward_that_blocks_is_named_and_the_run_goes_on(start: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "slow_rewards.py").write_text(
        "import time\nfrom pathlib import Path\ncalls = 0\n\ndef sleepy(completion, answer, problem):\n"
        "    global calls\n    calls += 1\n    until = time.monotonic() + 50 * (calls == 60)\n"
        # until it was reported, however slow this machine is: a report waits for two steps of the run
        f"    events = Path({str(tmp_path / 'run' / 'events.jsonl')!r})\n"
        "    while time.monotonic() < until and 'slow_rewards.py' not in events.read_text():\n"
        "        time.sleep(0.1)\n    return float(len(completion) % 2)\n"
    )
    table = "".join(json.dumps({"prompt": f"{i}<", "answer": f"{i}"}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(table)
    args = {"path": tmp_path / "rows.jsonl", "as_chat": "false", "max_tokens": 3, "eval_share": 0.3}
    words = [f"task.args.{name}={value}" for name, value in args.items()]
    run = start(
        *("task=dataset", *words, "task.args.reward=slow_rewards:sleepy"),
        *("wire.stall_report_s=1", "wire.frozen_after_s=40", "trainer.steps=10"),
        PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])),
    )
    said = run.said()
    assert run.process.returncode == 0, said
    stalls = [row["text"] for row in rows(run, "stall") if row["waits"] == "trainer"]
    assert any("in slow_rewards.py:11 sleepy" in text for text in stalls), stalls
    assert any(text in said for text in stalls)
    assert "stall_over" in run.events()


def test_a_reward_that_holds_the_interpreter_is_named_with_its_place(start: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "holding_rewards.py").write_text(
        "from collections import deque\nfrom itertools import repeat\ncalls = 0\n\n"
        "def holds(completion, answer, problem):\n    global calls\n    calls += 1\n    if calls == 60:\n"
        "        deque(repeat(0), maxlen=0)  # in C: no signal ends it\n    return float(len(completion) % 2)\n"
    )
    table = "".join(json.dumps({"prompt": f"{i}<", "answer": f"{i}"}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(table)
    args = {"path": tmp_path / "rows.jsonl", "as_chat": "false", "max_tokens": 3, "eval_share": 0.3}
    words = [f"task.args.{name}={value}" for name, value in args.items()]
    run = start(
        *("task=dataset", *words, "task.args.reward=holding_rewards:holds", "trainer.steps=100000"),
        "generator.max_restarts=0",
        PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])),
    )
    said = run.said()
    assert run.process.returncode == 1, said
    assert "its code stands in holding_rewards.py:9 holds (stacks: " in said
    assert "in holds" in (run.folder.logs / "generator-0.stacks").read_text()
    assert "holding_rewards.py:9 holds" in rows(run, "process_frozen")[0]["reason"]
