"""Commands that experiment: `async-rl simulate | rescore | lab | chaos`. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from async_rl.cli.commands import FILE, FOLDER, Commands, add_config, add_run, complete
from async_rl.errors import UserError
from async_rl.process import Interrupted


def add_commands(commands: Commands) -> None:
    """Register the group."""
    commands.group("experiment")
    _add_simulate(commands)
    _add_rescore(commands)
    _add_lab(commands)
    _add_chaos(commands)


def _add_simulate(commands: Commands) -> None:
    simulate = commands.add(
        "simulate",
        "speed and staleness of a configuration, without a model",
        about="Plays the buffer with the times of an earlier run, or with numbers you give, and recommends a depth.",
        example="async-rl simulate configs/quickstart.yaml --from runs/x\n"
        "async-rl simulate configs/quickstart.yaml --length 200,0.8 --decode-s 0.02,0.001 --train-s 3",
        work=_simulate,
    )
    add_config(simulate)
    run = simulate.add_argument("--from", dest="run", type=Path, metavar="RUN", help="lengths and times of this run")
    complete(run, FOLDER)
    simulate.add_argument(
        "--length", metavar="MEAN,VARIATION", help="policy tokens of an episode: mean, deviation/mean"
    )
    simulate.add_argument(
        "--decode-s", metavar="STEP,SEQUENCE", help="seconds of a decoding step, and more for each sequence"
    )
    simulate.add_argument("--train-s", type=float, metavar="S", help="seconds of a training step")
    simulate.add_argument("--update-s", type=float, metavar="S", help="seconds until generators hold new weights")
    simulate.add_argument("--generators", type=int, metavar="N", help="also more than a run may have (10,000 at most)")
    simulate.add_argument("--steps", type=int, default=50, help="training steps simulated of each setting (default 50)")
    simulate.add_argument("--seed", type=int, default=0, help="of the simulated episodes (default 0)")
    simulate.add_argument("--one", action="store_true", help="this configuration only, no sweeps")
    simulate.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def _add_rescore(commands: Commands) -> None:
    rescore = commands.add(
        "rescore",
        "what other recipes would have made of a run's stored batches",
        example='async-rl rescore runs/x --recipe vcpo --recipe "tis trust.cap=4"',
        work=_rescore,
    )
    add_run(rescore)
    example = 'a recipe, e.g. vcpo or "tis trust.cap=4"; may be given several times'
    rescore.add_argument("--recipe", action="append", default=[], metavar="R", help=example)
    rescore.add_argument("--steps", default=":", metavar="A:B", help="steps A <= step < B (default: all)")
    out = rescore.add_argument("--out", type=Path, metavar="FILE", help="every number step by step, as JSON")
    complete(out, FILE)


def _add_lab(commands: Commands) -> None:
    lab = commands.add(
        "lab",
        "how far off policy? recipes x learning rates x exact lags x seeds",
        about="Finished cells are kept; the same command goes on with a lab that was stopped.",
        example="async-rl lab configs/lab/quick.yaml --out runs/lab seeds=[0,1,2]",
        work=_lab,
    )
    complete(lab.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of a lab"), FILE)
    lab.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="e.g. lags=[0,32] seeds=[0,1,2]")
    out = lab.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the lab; a begun one goes on"
    )
    complete(out, FOLDER)
    lab.add_argument("--workers", type=int, default=0, help="cells side by side (default: one a core)")


def _add_chaos(commands: Commands) -> None:
    chaos = commands.add(
        "chaos",
        "a run whose processes are killed, frozen and lied to, then audited and replayed",
        example="async-rl chaos configs/quickstart.yaml trainer.steps=100 --kills 8",
        work=_chaos,
    )
    add_config(chaos)
    chaos.add_argument("--kills", type=int, default=8, metavar="N", help="processes killed (default 8)")
    for name in ("freezes", "slows", "disconnects"):
        chaos.add_argument(f"--{name}", type=int, metavar="N", help="default: a quarter of --kills")
    for name, what in (
        ("lies", "generators that join and report what they did not do"),
        ("raises", "rewards that raise what is no Exception"),
        ("cancels", "rewards that cancel whoever awaits them"),
        ("poisons", "problems whose code crashes the generator"),
        ("disks", "times that the disk of buffer or trainer is full"),
    ):
        chaos.add_argument(f"--{name}", type=int, default=0, metavar="N", help=f"{what} (default 0)")
    chaos.add_argument("--seed", type=int, default=0, help="of the plan: which process, how and when (default 0)")
    folder = chaos.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="folder of this run (default: runs/NAME-chaos-TIME)"
    )
    complete(folder, FOLDER)


def _simulate(arguments: argparse.Namespace) -> int:
    from async_rl.cli.simulate import simulate

    return simulate(arguments)


def _rescore(arguments: argparse.Namespace) -> int:
    from async_rl.run.child import arithmetic_environment
    from async_rl.run_folder import RunFolder

    folder = RunFolder.open(arguments.run)
    # as the trainer was started: another number of threads may round differently
    os.environ.update(arithmetic_environment(folder.settings().trainer.threads))

    from async_rl.instruments.rescore import describe_scores, rescore, write_json

    result = rescore(folder, arguments.recipe, steps=arguments.steps)
    for line in describe_scores(result, folder):
        print(line)
    if arguments.out is not None:
        write_json(arguments.out, result, folder)
    return 0


def _lab(arguments: argparse.Namespace) -> int:
    from async_rl.instruments.lab.lab import LabFolder, Terminal, run_lab
    from async_rl.instruments.lab.plan import load_plan

    if arguments.workers < 0:
        raise UserError(f"--workers is {arguments.workers}; it must be at least 1")
    plan = load_plan(arguments.config, arguments.overrides)
    folder = LabFolder(arguments.out)
    with Terminal() as terminal:
        for note in plan.notes:
            terminal.print(f"note: {note}")
        try:
            workers = arguments.workers or len(os.sched_getaffinity(0))
            _, merits = run_lab(plan, folder.path, workers=workers, show=terminal.show)
        except Interrupted as order:
            said = f"stopped by {order}; finished cells are kept, the same command goes on with the lab"
            print(f"async-rl: {said}", file=sys.stderr)
            return order.exit_code
    terminal.summary(merits)
    terminal.print(f"\n{folder.summary} has every cell; open {folder.page} for the plots")
    return 0


def _chaos(arguments: argparse.Namespace) -> int:
    from async_rl.cli.chaos import counts_of, run_chaos
    from async_rl.instruments.chaos.plan import COUNTERS

    counts = counts_of({name: getattr(arguments, name) for name in COUNTERS.values()})
    path = arguments.run_dir or Path("runs") / f"{arguments.config.stem}-chaos-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        outcome = run_chaos(arguments.config, arguments.overrides, path, counts, seed=arguments.seed, say=_print)
    except Interrupted as order:
        if not path.is_dir():
            raise  # before anything was there
        stopped = f"stopped by {order}; everything is down, the record of the run is in {path}"
        print(f"async-rl: {stopped}", file=sys.stderr)
        return order.exit_code
    return 0 if outcome.clean else 1


def _print(text: str) -> None:
    print(text, flush=True)
