"""Options of `async-rl simulate`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_simulate(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    parser = commands.add_parser("simulate", help="speed and staleness of a configuration, without a model")
    parser.add_argument("config", type=Path, help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", help="name=value, e.g. staleness.max_staleness=4")
    parser.add_argument("--from", dest="run", type=Path, metavar="RUN", help="lengths and times of this run")
    parser.add_argument("--length", metavar="MEAN,VARIATION", help="policy tokens of an episode: mean, deviation/mean")
    parser.add_argument(
        "--decode-s", metavar="STEP,SEQUENCE", help="seconds of a decoding step, and more for each sequence"
    )
    parser.add_argument("--train-s", type=float, metavar="S", help="seconds of a training step")
    parser.add_argument("--update-s", type=float, metavar="S", help="seconds until generators hold new weights")
    parser.add_argument("--generators", type=int, metavar="N", help="also more than a run may have (10,000 at most)")
    parser.add_argument("--steps", type=int, default=50, help="training steps simulated of each setting (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help="this configuration only, no sweeps")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(work=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    from async_rl.simulate.command import simulate

    return simulate(arguments)
