"""The sampler and starts for 30 steps on tasks where they have their point; real processes, one row a case.

    async-rl init-model models/guess --task guess --until 0.5
    python bench/sampler.py [--only band,prefixrl] [--model models/guess]

`Mixed`: of every three problems one is the guessing game, one counts whatever is said, one counts nothing. `Lock`: one
code of six digits, which the model never says by itself; its beginning stands in the data. max_staleness 1, 8 groups of
8. `signal` is the share of trained groups whose rewards differ, without which nothing is learned; `sound`: the audit
found nothing, and a replay gave the same weights bit for bit.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.buffer.store_reader import StoreReader
from async_rl.config import Settings, check
from async_rl.config.schema import setting, structured
from async_rl.instruments.replay import replay
from async_rl.observe.audit import audit_run
from async_rl.observe.console import Console
from async_rl.run.launcher import run_training
from async_rl.run_folder import RunFolder, read_rows
from async_rl.task.guess import Guess
from async_rl.task.order import PromptOrder
from async_rl.task.protocol import Problem, Session, Task
from async_rl.trajectory import Split

STEPS, ENDS = 30, 5
HERE = Path(__file__).resolve()
KINDS = ("game", "easy", "hopeless")


class Mixed(Guess):
    """The guessing game between problems that teach nothing."""

    def _make(self, order: PromptOrder, rounds: range) -> list[Problem]:
        made = super()._make(order, rounds)
        return [
            Problem(index=p.index, prompt=p.prompt, data={**p.data, "kind": KINDS[p.index % len(KINDS)]}) for p in made
        ]

    def judge(self, session: Session, *, consistent: bool) -> None:
        """A guess that contradicts the answers before it is an error."""
        session.note_turn("error", float(not consistent))

    async def rollout(self, problem: Problem, session: Session) -> float:
        found = await super().rollout(problem, session)
        kind = problem.data["kind"]
        return found if kind == "game" else float(kind == "easy")


@dataclass(frozen=True, slots=True, kw_only=True)
class LockSettings:
    code: str = setting("314159", "what opens it")
    problems: int = setting(64, "problems of each split", unit="problems")


class Lock(Task):
    """Says a code of digits, or gets nothing."""

    name = "lock"
    single_turn = True
    repeatable = True
    Settings = LockSettings

    def problems(self, split: Split) -> Sequence[Problem]:
        data = {"solution": self.settings.code}
        return [Problem(index=i, prompt="?", data=data) for i in range(self.settings.problems)]

    async def rollout(self, problem: Problem, session: Session) -> float:
        code = self.settings.code
        return float(await session.generate(max_tokens=len(code)) == code)


MIXED = {"name": f"{HERE}:Mixed", "args": {"rounds_train": 3}}
LOCK = {"name": f"{HERE}:Lock"}
GRPO = {"name": "grpo"}
STARTS = {"start": "field", "start_field": "solution", "start_min": 0.5, "start_max": 0.9}
CASES: dict[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], str]] = {
    # case: task, recipe, sampler, the metric that shows it
    "prompt order": (MIXED, GRPO, {}, ""),
    "band": (MIXED, GRPO, {"choose": "band"}, "sampler/in_band"),
    "variance": (MIXED, GRPO, {"choose": "thompson"}, "sampler/estimate"),
    "vade": (MIXED, GRPO, {"choose": "thompson", "value": "vade"}, "sampler/estimate"),
    "curriculum": (MIXED, GRPO, {"choose": "curriculum", "target_groups": 240}, "sampler/estimate"),
    "dump": (MIXED, GRPO, {"choose": "ucb", "source_field": "kind"}, "sampler/source/0"),
    "refilled band": (MIXED, {"name": "balanced_grpo"}, {"refuse_outside": True}, "groups/refused"),
    "gvm": (MIXED, {"name": "raft_pp"}, {"samples": "gvm"}, "sampler/samples"),
    "dart": (MIXED, {"name": "entropy_turns"}, {"samples": "adaptive", "turns": "adaptive"}, "sampler/samples"),
    "no start": (LOCK, GRPO, {}, ""),
    "prefixrl": (LOCK, GRPO, STARTS, "sampler/started"),
    "pope": (
        LOCK, GRPO, {**STARTS, "start_success": 0.0, "start_attempts": 8, "start_share": 0.5}, "sampler/started",
    ),
    "own successes": (MIXED, GRPO, {"start": "success"}, "sampler/started"),
    "own failures": (MIXED, GRPO, {"start": "failure"}, "sampler/started"),
}  # fmt: skip


def settings_of(case: str, model: str, rate: float) -> Settings:
    task, recipe, sampler, _ = CASES[case]
    values: dict[str, Any] = {
        "name": "sampler",
        "model": {"path": model},
        "task": dict(task),
        "recipe": dict(recipe),
        "sampler": dict(sampler),
        "batch": {"groups_per_step": 8, "group_size": 8},
        "trainer": {"steps": STEPS},
        "optimizer": {"learning_rate": rate, "warmup_steps": 5},
        "evaluation": {"problems": 32, "samples": 4, "every": 0},
        "generator": {"max_sequences": 128},
        "verify": {"share": 0.2},
        "wire": {"timeout_s": 240},
    }
    settings = structured(Settings, values, where="bench")
    check(settings)
    return settings


def signal(folder: RunFolder) -> float:
    """Share of the trained groups whose rewards differ."""
    with StoreReader(folder.store) as store:
        trained = [row.group for row in store.groups() if row.step is not None]
        mixed = 0
        for group in trained:
            mixed += len({t.reward for t in store.trajectories_of(group) if t.ended not in ("error", "aborted")}) > 1
    return mixed / len(trained)


def run(case: str, model: str, rate: float, path: Path) -> str:
    """One row of the table."""
    started = time.monotonic()
    run_training(settings_of(case, model, rate), path, console=Console(quiet=True))
    seconds = time.monotonic() - started
    folder = RunFolder(path)
    rows = list(read_rows(folder.metrics))
    rewards = [row["reward/mean"] for row in rows]
    sound = "yes" if not audit_run(folder).violations and replay(folder).difference is None else "NO"
    metric = CASES[case][3]
    seen = statistics.mean(row[metric] for row in rows if metric in row) if metric else 0.0
    shown = f"{metric} {seen:.3g}" if metric else "-"
    with StoreReader(folder.store) as store:
        held_out = [row.reward for row in store.evaluations()]
    first, last = statistics.mean(rewards[:ENDS]), statistics.mean(rewards[-ENDS:])
    cells = (
        case, path_of(CASES[case][0]), f"{first:.3f} -> {last:.3f}", f"{held_out[0]:.3f} -> {held_out[-1]:.3f}",
        f"{signal(folder):.2f}", shown, sound, f"{seconds:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def path_of(task: Mapping[str, Any]) -> str:
    return str(task["name"]).rpartition(":")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases, with commas")
    parser.add_argument("--model", default="models/guess")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    args = parser.parse_args()
    print("| case | task | reward: first 5 -> last 5 | held out: before -> after | signal | acts | sound | s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in args.only.split(",") if args.only else CASES:
            print(run(case, args.model, args.rate, Path(folder) / case.replace(" ", "_")), flush=True)


if __name__ == "__main__":
    main()
