"""`async-rl values`: the value of every problem under the first model, as a column of the data set."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from async_rl.cli.commands import FILE, Commands, add_config, complete
from async_rl.errors import UserError


def add_values(commands: Commands) -> None:
    """Declare the command."""
    values = commands.add(
        "values",
        "estimate the value of every problem of a data set under the first model (A*-PO)",
        about="Samples a few answers of each training problem and writes the rows with a column beta log mean "
        "exp(reward / beta), which task.args.note_fields gives to recipe a_star_po.",
        example="async-rl values configs/mine.yaml --out rows_with_values.jsonl",
        work=_values,
    )
    add_config(values)
    out = values.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines to write")
    complete(out, FILE)
    values.add_argument("--samples", type=int, default=8, help="answers of each problem (default 8)")
    values.add_argument("--beta", type=float, default=0.5, help="price of a nat of KL in rewards (default 0.5)")
    values.add_argument("--column", default="v_star", metavar="NAME", help="of the values (default v_star)")


def _values(arguments: argparse.Namespace) -> int:
    from async_rl.config import load_settings

    settings = load_settings(arguments.config, arguments.overrides)
    if arguments.samples < 1:
        raise UserError(f"--samples is {arguments.samples}; it must be at least 1")
    if not 0 < arguments.beta < math.inf:
        raise UserError(f"--beta is {arguments.beta}; it must be above 0")
    if arguments.out.exists():
        raise UserError(f"--out is {arguments.out}, which exists; name another file")

    from async_rl.run.values import check_rows, first_values, write_values

    check_rows(settings)

    def show(done: int, number: int) -> None:
        print(f"  {done} of {number} problems", file=sys.stderr)

    found = first_values(settings, samples=arguments.samples, beta=arguments.beta, on_progress=show)
    write_values(settings, found, arguments.out, arguments.column)
    known = [v for v in found if v is not None]
    print(f"{arguments.out}: {len(known)} problems with {arguments.column}, mean {sum(known) / max(1, len(known)):.3f}")
    if len(known) < len(found):
        print(f"  {len(found) - len(known)} without: all of their episodes failed")
    return 0
