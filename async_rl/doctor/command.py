"""`async-rl doctor` on the command line. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from async_rl.errors import UserError


def add_doctor(commands: Any) -> None:
    """`commands`: argparse's subparsers."""
    doctor = commands.add_parser("doctor", help="look at this machine, and at what a run would ask of it")
    doctor.add_argument("config", nargs="?", help="YAML file of settings (without one: the machine alone)")
    doctor.add_argument("overrides", nargs="*", help="name=value, as for run")
    doctor.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs would be (default: runs)")
    doctor.add_argument("--json", action="store_true", help="a JSON list of findings")
    doctor.set_defaults(work=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    """0 unless a finding is an error."""
    from async_rl.launch.child import arithmetic_environment

    if arguments.config is not None and "=" in arguments.config and not Path(arguments.config).exists():
        raise UserError(f"name a YAML file of settings before {arguments.config}")
    os.environ.update(arithmetic_environment(1))  # before torch is imported

    from async_rl.doctor.examine import examine

    config = Path(arguments.config) if arguments.config is not None else None
    found = []
    for finding in examine(config, arguments.overrides, run_folder=arguments.run_dir):
        found.append(finding)
        if not arguments.json:
            print(finding, flush=True)
    count = {level: sum(finding.level == level for finding in found) for level in ("error", "warning")}
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        print(", ".join(f"{number} {level}{'s' * (number != 1)}" for level, number in count.items()))
    return 1 if count["error"] else 0
