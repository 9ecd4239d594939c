"""`async-rl doctor` on the command line. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from async_rl.errors import UserError


def add_doctor(commands: Any) -> None:
    """`commands`: argparse's subparsers."""
    doctor = commands.add_parser("doctor", help="look at this machine, and at what a run would ask of it")
    doctor.add_argument("config", nargs="?", help="YAML file of settings (without one: the machine alone)")
    doctor.add_argument("overrides", nargs="*", help="name=value, as for run")
    doctor.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs would be (default: runs)")
    doctor.add_argument("--json", action="store_true", help="a JSON list of findings")
    doctor.add_argument("--fake-model", action="store_true", help="look at what `run --fake-model` would do")
    doctor.set_defaults(work=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    """0 unless a finding is an error."""
    from async_rl.run.child import arithmetic_environment

    if arguments.config is not None and "=" in arguments.config and not Path(arguments.config).exists():
        raise UserError(f"name a YAML file of settings before {arguments.config}")
    os.environ.update(arithmetic_environment(1))  # before torch is imported

    from async_rl.doctor.examine import examine

    config = Path(arguments.config) if arguments.config is not None else None
    words = arguments.overrides
    found = []
    with TemporaryDirectory(prefix="async-rl-doctor-") as made:
        if arguments.fake_model:
            config, words = _rehearsed(config, words, Path(made)), []
        for finding in examine(config, words, run_folder=arguments.run_dir):
            found.append(finding)
            if not arguments.json:
                print(finding, flush=True)
    count = {level: sum(finding.level == level for finding in found) for level in ("error", "warning")}
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        print(", ".join(f"{number} {level}{'s' * (number != 1)}" for level, number in count.items()))
    return 1 if count["error"] else 0


def _rehearsed(config: Path | None, words: Sequence[str], folder: Path) -> Path:
    """A file with the settings of the rehearsal, whose model and data lie beside it."""
    from async_rl.config import load_settings
    from async_rl.config.schema import to_yaml
    from async_rl.instruments.rehearsal import prepare

    if config is None:
        raise UserError("--fake-model needs a YAML file of settings")
    file = folder / "config.yaml"
    file.write_text(to_yaml(prepare(load_settings(config, words), words, folder).settings))
    return file
