"""A run from Python, and a picture of it.

    python 05_run_and_plot.py          # 80 steps, about a minute on a laptop
    python 05_run_and_plot.py 3        # a look at it

Trains, then reads the run's record: metric rows, trajectories, events. With matplotlib installed the curves are drawn
into curves.png; without it the report of the run is written, which has all curves and needs nothing.
"""

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

import async_rl as ar

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 80
SORT = {"name": "sort", "args": {"length": 3, "alphabet_size": 6}}


def picture(run: ar.Run, path: Path) -> Path:
    """Reward, staleness and effective sample size, step by step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    steps = run.metrics.column("step")
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), constrained_layout=True)
    for axis, key in zip(axes, ("reward/mean", "lag/mean", "ess/ratio"), strict=True):
        axis.plot(steps, run.metrics.column(key))
        axis.set(title=key, xlabel="step")
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    if not Path("models/letters").exists():  # a small model that has seen some sorting
        ar.init_model("models/letters", SORT, until=0.2, max_steps=5 * STEPS)
    run = ar.train(
        {"name": "plot", "model": {"path": "models/letters"}, "task": SORT, "recipe": "vcpo"},
        batch={"groups_per_step": 8, "group_size": 16},
        trainer={"steps": STEPS},
        optimizer={"learning_rate": 3e-4, "warmup_steps": 5, "schedule": "linear"},
        evaluation={"problems": 32},
        quiet=True,
    )
    rewards = defaultdict(list)
    for row in run.trajectories:
        if row["step"] is not None:  # it was trained
            rewards[row["step"] * 4 // STEPS].append(row["reward"])
    for quarter, found in sorted(rewards.items()):
        print(f"quarter {quarter + 1} of the run: {sum(found) / len(found):.0%} of {len(found)} answers right")
    drawn = importlib.util.find_spec("matplotlib") is not None
    print("curves:", picture(run, Path("curves.png")) if drawn else run.report())
