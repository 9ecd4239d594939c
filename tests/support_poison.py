"""Runs in which one problem's reward ends the process that calls it."""

from __future__ import annotations

import json
from pathlib import Path

from support_command import Run, write_config

from async_rl.events import ProblemRefused
from async_rl.run_folder import RunFolder

LONGEST_S = 240.0
"""each death costs a start of a process"""
REWARDS = """
import os, signal

def crash(completion, answer, problem):
    if answer == "3":
        os.kill(os.getpid(), signal.SIGSEGV)
    return float(len(completion) % 2)

def leave(completion, answer, problem):
    if answer == "3":
        os._exit(7)
    return float(len(completion) % 2)

def freeze(completion, answer, problem):
    if answer == "3":
        sum(range(10**13))  # one call into C that never looks for signals
    return float(len(completion) % 2)

def always(completion, answer, problem):
    os._exit(9)
"""


def begin(tmp_path: Path, model: Path, reward: str, *words: str, held_out: tuple[int, ...] = (20, 21)) -> Run:
    (tmp_path / "poison_rewards.py").write_text(REWARDS)
    for name, numbers in (("train", range(12)), ("eval", held_out)):
        rows = (json.dumps({"prompt": f"{i}<", "answer": f"{i}"}) for i in numbers)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    args = {
        "path": tmp_path / "train.jsonl", "eval_path": tmp_path / "eval.jsonl", "as_chat": "false", "max_tokens": 3,
        "reward": f"{tmp_path}/poison_rewards.py:{reward}",
    }  # fmt: skip
    config = write_config(
        tmp_path, model, "task=dataset", *(f"task.args.{name}={value}" for name, value in args.items()),
        "wire.timeout_s=200", "evaluation.problems=2", "evaluation.samples=2", "trainer.steps=10", *words,
    )  # fmt: skip
    return Run(config, RunFolder(tmp_path / "run"), longest_s=LONGEST_S)


def refused(run: Run) -> list[ProblemRefused]:
    return [row.event for row in run.folder.read_events() if isinstance(row.event, ProblemRefused)]
