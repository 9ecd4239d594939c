"""`async-rl init-model` on the command line. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from async_rl.errors import RunFailed, UserError
from async_rl.process import Interrupted

# -------------------- command
# `async-rl lab | rescore` on the command line. Each imports what it needs when it runs.


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
    from async_rl.instruments.lab.lab import LabFolder, Terminal, run_lab
    from async_rl.instruments.lab.plan import load_plan

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
    from async_rl.run.child import arithmetic_environment
    from async_rl.run_folder import RunFolder

    folder = RunFolder(arguments.run)
    if not folder.config.is_file():
        raise UserError(f"{folder.path} is not a run folder: there is no {folder.config.name} in it")
    # as the trainer was started: another number of threads may round differently
    os.environ.update(arithmetic_environment(folder.settings().trainer.threads))

    from async_rl.instruments.rescore import in_words, rescore, write_json

    result = rescore(folder, arguments.recipe, steps=arguments.steps)
    for line in in_words(result, folder):
        print(line)
    if arguments.out is not None:
        write_json(arguments.out, result, folder)
    return 0


COUNTS = ("max-steps", "batch", "hidden", "layers", "heads", "kv-heads", "head-dim", "intermediate", "max-context")
"""options of init-model that must be at least 1"""


def add_init_model(commands: Any) -> None:
    """`commands`: argparse's subparsers."""
    init = commands.add_parser("init-model", help="make a small model that a task's demonstrations warmed up")
    init.add_argument("path", type=Path, help="folder to make")
    init.add_argument("--task", default="guess")
    init.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="setting of the task")
    init.add_argument("--until", type=float, default=0.4, help="success rate at which to stop (default 0.4)")
    init.add_argument("--max-steps", type=int, default=1000, help="supervised steps at most (default 1000)")
    init.add_argument("--batch", type=int, default=64, help="demonstrations a step (default 64)")
    init.add_argument("--learning-rate", type=float, default=1e-3)
    init.add_argument("--seed", type=int, default=0)
    for name, default in (("hidden", 128), ("layers", 2), ("heads", 4), ("kv-heads", 2), ("head-dim", 32)):
        init.add_argument(f"--{name}", type=int, default=default)
    init.add_argument("--intermediate", type=int, default=384)
    init.add_argument("--max-context", type=int, default=256, help="longest sequence in tokens (default 256)")
    init.set_defaults(work=_init_model)


def _check_init(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers no model can be made with."""
    if not 0 < arguments.until <= 1:
        raise UserError(f"--until is {arguments.until}; it is a success rate, above 0 and at most 1")
    if not 0 < arguments.learning_rate < math.inf:
        raise UserError(f"--learning-rate is {arguments.learning_rate}; it must be above 0")
    for name in COUNTS:
        if (value := getattr(arguments, name.replace("-", "_"))) < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}; it must be at least 0 and below 2^63")
    if arguments.heads % arguments.kv_heads or arguments.head_dim % 2:
        raise UserError(
            f"--heads {arguments.heads} must be a multiple of --kv-heads {arguments.kv_heads}, and --head-dim "
            f"{arguments.head_dim} an even number"
        )


def _init_model(arguments: argparse.Namespace) -> int:
    from async_rl.config.schema import with_overrides
    from async_rl.task import make_task

    task = make_task(arguments.task, with_overrides({}, arguments.arg))
    _check_init(arguments)

    import torch

    from async_rl.run.init_model import Shape, WarmupOptions, init_model

    torch.manual_seed(arguments.seed)
    shape = Shape(
        hidden=arguments.hidden,
        layers=arguments.layers,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        intermediate=arguments.intermediate,
        max_context=arguments.max_context,
    )
    options = WarmupOptions(
        target=arguments.until,
        max_steps=arguments.max_steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        check_every=25,
        seed=arguments.seed,
    )
    result = init_model(arguments.path, task, shape, options, print)
    print(f"{arguments.path}: success rate {result.success:.2f} after {result.steps} steps, {result.seconds:.0f} s")
    if result.success < arguments.until:
        raise RunFailed(f"{arguments.until:.2f} was not reached in {arguments.max_steps} steps; the folder was kept")
    return 0
