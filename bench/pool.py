"""Every method with an experience pool for 30 steps, on a task on which nearly all groups fail, and what came out.

    async-rl init-model models/sort --task sort --until 0.02
    async-rl init-model models/quickstart --task guess --until 0.55
    python bench/pool.py [--model models/sort] [--guess-model models/quickstart] [--only LUFFY,HPT] [--steps 30]

Real runs (`async-rl run`), each audited and replayed: 24 problems of the task `sort`, of which the model solves about
one in twenty, so that a group of four mostly has four zeros. Cases "on guess" play the game of the quickstart, which
its model wins half of the time: there is something to keep. `reward` is that of fresh episodes, the mean over the first
and the last five steps; `held-out` that of 64 held-out episodes before and after. One model, one seed: a row says
that the method trains, acts and keeps its bounds here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from async_rl.task import make_task

BASE = {
    "task": {"name": "sort", "args": {"num_train": 24, "length": 6}},
    "batch": {"groups_per_step": 8, "group_size": 4},
    "staleness": {"max_staleness": 2},
    "optimizer": {"learning_rate": 2e-4, "warmup_steps": 1},
    "evaluation": {"problems": 64, "samples": 1},
    "verify": {"rewards": "none"},
    "guard": {"alarms": False},
}
GUESS = {
    **BASE,
    "task": {"name": "guess", "args": {"rounds_train": 1}},
    "batch": {"groups_per_step": 8, "group_size": 8},
}
ON_GUESS = " on guess"
SHOWN = ("pool.source=demonstrations", "pool.file=shown.jsonl")
SHORT = "recipe.aggregate.constant=7"
CASES: dict[str, tuple[str, Sequence[str]]] = {
    "no pool": ("grpo", ()),
    "RLinf-USER": ("vcpo", ("pool.source=groups", "pool.share=0.4", "pool.max_uses=4")),
    "ReMix": (
        "remix",
        (
            "pool.source=groups", "pool.share=0.4", "pool.max_age=4", "pool.until=15", "updates.epochs=2",
            "reference.every=15",
            "recipe.schedule=[{number: kl.recent, start: 0, end: 0.5, since: 5, until: 15, every: 2}]",
        ),
    ),
    "ARPO (replay)": (
        "arpo_replay", ("pool.source=successes", "pool.place=replace", "pool.when=no_signal", "pool.gate=0.2"),
    ),
    "SPEAR": (
        "spear",
        (
            "pool.source=priority", "pool.priority=advantage", "pool.above=1", "pool.max_age=10", "pool.flush_at=2",
            "pool.max_uses=1", "recipe.schedule=[{number: reuse.weight, start: 0, end: 1, until: 20, course: cosine}]",
        ),
    ),
    "SSB": (
        "ssb", ("pool.source=priority", "pool.place=instead", "pool.when=no_signal", "pool.gate=1", "pool.rows=4"),
    ),
    "RL-PLUS": ("rl_plus", (*SHOWN, "pool.place=join")),
    "LUFFY": ("luffy", (*SHOWN, "pool.place=join", SHORT)),
    "no pool on guess": ("grpo", ()),
    "RLinf-USER on guess": ("vcpo", ("pool.source=groups", "pool.share=0.4", "pool.max_uses=4")),
    "SPEAR on guess": (
        "spear",
        (
            "pool.source=priority", "pool.priority=advantage", "pool.above=1", "pool.max_age=10", "pool.flush_at=16",
            "pool.max_uses=1", "recipe.schedule=[{number: reuse.weight, start: 0, end: 1, until: 20, course: cosine}]",
        ),
    ),
    "DART on guess": (
        "entropy_turns",
        (
            "pool.source=successes", "pool.place=replace", "pool.when=failed", "pool.gate=0.2",
            "sampler.samples=adaptive", "sampler.turns=adaptive", "generator.task_processes=2",
            "optimizer.learning_rate=5e-5",
        ),
    ),
    "HPT": ("hpt", (*SHOWN, "pool.place=instead", "pool.when=failed", SHORT)),
    "SRFT": ("srft", (*SHOWN, "pool.place=join", "optimizer.learning_rate=5e-5")),
    "CHORD": (
        "chord",
        (
            *SHOWN, "pool.place=extra", "pool.rows=4",
            "recipe.schedule=[{number: reuse.nll, start: 0.9, end: 0.05, until: 25, course: cosine}, "
            "{number: policy_weight, start: 0.1, end: 0.95, until: 25, course: cosine}]",
        ),
    ),
    "RLEP on guess": ("dapo", ("pool.source=successes", "pool.place=join", "pool.rows=2")),
}  # fmt: skip


def command(*words: str) -> str:
    """The output of an `async-rl` command."""
    done = subprocess.run(
        [sys.executable, "-m", "async_rl", *words], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"async-rl {' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


def write_demonstrations(path: Path) -> None:
    """The right answer to every training problem."""
    task = make_task("sort", {"num_train": 24, "length": 6})
    rows = [{"problem": p.index, "answer": p.data["answer"] + ".", "end": False} for p in task.problems("train")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def play(name: str, models: tuple[str, str], steps: int) -> str:
    """One run; its row of the table. `models`: for the sorting task, for the game."""
    recipe, changes = CASES[name]
    folder = Path(f"run_{name.replace(' ', '_')}")
    guessed = name.endswith(ON_GUESS)
    base, model = ("guess.yaml", models[1]) if guessed else ("base.yaml", models[0])
    started = time.monotonic()
    command(
        "run", base, f"name={recipe}", f"model.path={model}", f"trainer.steps={steps}", f"recipe={recipe}",
        *changes, "--run-dir", str(folder), "--quiet",
    )  # fmt: skip
    seconds = time.monotonic() - started
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = ([row["reward/mean"] for row in part] for part in (rows[:5], rows[-5:]))
    said = json.loads((folder / "summary.json").read_text())
    audit = command("audit", str(folder))
    pool = next((line.split(maxsplit=1)[1] for line in audit.splitlines() if line.startswith("pool")), "-")
    sound = "Nothing was lost" in audit
    same = "identical to the run at all" in command("replay", str(folder))
    idle = sum("skipped" in row for row in rows)
    return (
        f"| {name} | {recipe} | {statistics.mean(first):.3f} -> {statistics.mean(last):.3f} | "
        f"{said['reward_eval_first']:.3f} -> {said['reward_eval_last']:.3f} | {pool} | {idle} | "
        f"{'sound' if sound else 'NOT SOUND'}, {'identical' if same else 'NOT IDENTICAL'} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/sort")
    parser.add_argument("--guess-model", default="models/quickstart")
    parser.add_argument("--only", default="", help="methods, with commas")
    parser.add_argument("--steps", type=int, default=30)
    chosen = parser.parse_args()
    models = str(Path(chosen.model).resolve()), str(Path(chosen.guess_model).resolve())
    names = [name for name in CASES if not chosen.only or name in chosen.only.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("base.yaml").write_text(json.dumps(BASE))  # which is YAML
        Path("guess.yaml").write_text(json.dumps(GUESS))
        write_demonstrations(Path("shown.jsonl"))
        print(
            "| method | recipe | reward: first 5 -> last 5 | held-out | what came back | skipped | audit, replay | s |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name in names:
            print(play(name, models, chosen.steps), flush=True)


if __name__ == "__main__":
    main()
