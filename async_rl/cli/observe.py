"""Commands that look at run folders: `async-rl top | report | trace`. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from async_rl.errors import UserError


def add_watching(commands: Any) -> None:
    """`commands`: the subparsers of the command line."""
    top = commands.add_parser("top", help="a run at a glance in the terminal, until it ends or Ctrl-C")
    top.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    top.add_argument("--once", action="store_true", help="print once and end")
    top.set_defaults(work=_top)

    report = commands.add_parser("report", help="one HTML page of everything about one run, or several side by side")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, also one that goes on")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the run's folder")
    report.add_argument("--no-ratios", action="store_true", help="no importance ratios (loads no checkpoint)")
    report.set_defaults(work=_report)

    trace = commands.add_parser(
        "trace", help="a Chrome trace (Perfetto) of who did what when, and of every group's way"
    )
    trace.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    trace.add_argument("--out", type=Path, metavar="FILE", help="default: trace.json in the run's folder")
    trace.add_argument("--steps", metavar="FIRST:LAST", help="both included; default: the newest 500")
    trace.set_defaults(work=_trace)


def _top(arguments: argparse.Namespace) -> int:
    from async_rl.observe.top import top

    top(arguments.run, once=arguments.once)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from async_rl.observe.report import write_report

    runs = arguments.runs
    out = arguments.out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    write_report(runs, out, with_ratios=not arguments.no_ratios)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0


def _trace(arguments: argparse.Namespace) -> int:
    from async_rl.observe.trace import write_trace

    steps = None
    if arguments.steps is not None:
        first, colon, last = arguments.steps.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--steps is {arguments.steps!r}; write FIRST:LAST, e.g. --steps 100:200")
        steps = int(first), int(last)
    out = arguments.out or arguments.run / "trace.json"
    events = write_trace(arguments.run, out, steps)
    print(f"{out}: {events} events, {out.stat().st_size / 1e6:.1f} MB; open it at ui.perfetto.dev")
    return 0
