"""`async-rl lab | rescore` on the command line. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from async_rl.errors import UserError
from async_rl.interrupt import Interrupted


def add_lab(commands: Any) -> None:
    """`commands`: the subparsers of the command line."""
    lab = commands.add_parser("lab", help="how far off policy? recipes x learning rates x exact lags x seeds")
    lab.add_argument("config", type=Path, help="YAML file of a lab, e.g. configs/lab/quick.yaml")
    lab.add_argument("overrides", nargs="*", help="name=value, e.g. lags=[0,32] seeds=[0,1,2]")
    lab.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the lab; a begun one goes on")
    lab.add_argument("--workers", type=int, default=0, help="cells side by side (default: one a core)")
    lab.set_defaults(work=_lab)

    score = commands.add_parser("rescore", help="what other recipes would have made of a run's stored batches")
    score.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    example = 'a recipe, e.g. vcpo or "tis trust.cap=4"; may be given several times'
    score.add_argument("--recipe", action="append", default=[], metavar="R", help=example)
    score.add_argument("--steps", default=":", metavar="A:B", help="steps A <= step < B (default: all)")
    score.add_argument("--out", type=Path, metavar="FILE", help="every number step by step, as JSON")
    score.set_defaults(work=_rescore)


def _lab(arguments: argparse.Namespace) -> int:
    from async_rl.lab.stability.lab import LabFolder, run_lab
    from async_rl.lab.stability.plan import load_plan
    from async_rl.lab.stability.terminal import Terminal

    if arguments.workers < 0:
        raise UserError(f"--workers is {arguments.workers}; it must be at least 1")
    plan = load_plan(arguments.config, arguments.overrides)
    folder = LabFolder(arguments.out)
    with Terminal() as terminal:
        for note in plan.notes:
            terminal.say(f"note: {note}")
        try:
            workers = arguments.workers or len(os.sched_getaffinity(0))
            _, merits = run_lab(plan, folder.path, workers=workers, show=terminal.show)
        except Interrupted as order:
            said = f"stopped by {order}; finished cells are kept, the same command goes on with the lab"
            print(f"async-rl: {said}", file=sys.stderr)
            return 130
    terminal.summary(merits)
    terminal.say(f"\n{folder.summary} has every cell; open {folder.page} for the plots")
    return 0


def _rescore(arguments: argparse.Namespace) -> int:
    from async_rl.launch.child import arithmetic_environment
    from async_rl.run_folder import RunFolder

    folder = RunFolder(arguments.run)
    if not folder.config.is_file():
        raise UserError(f"{folder.path} is not a run folder: there is no {folder.config.name} in it")
    # as the trainer was started: another number of threads may round differently
    os.environ.update(arithmetic_environment(folder.settings().trainer.threads))

    from async_rl.lab.rescore import in_words, rescore, write_json

    result = rescore(folder, arguments.recipe, steps=arguments.steps)
    for line in in_words(result, folder):
        print(line)
    if arguments.out is not None:
        write_json(arguments.out, result, folder)
    return 0
