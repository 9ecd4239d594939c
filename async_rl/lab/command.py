"""`async-rl lab` on the command line. Imports what it needs only when it is called."""

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
