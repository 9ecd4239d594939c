"""Commands that check: `async-rl doctor | audit | replay | keys`. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from async_rl.cli.commands import FOLDER, Commands, add_config, add_run, complete
from async_rl.errors import UserError


def add_commands(commands: Commands) -> None:
    """Register the group."""
    commands.group("check")
    doctor = commands.add(
        "doctor",
        "look at this machine, and at what a run would ask of it",
        about="Exit code 1 when something is found that would stop the run.",
        example="async-rl doctor\nasync-rl doctor configs/quickstart.yaml generator.count=4",
        work=_doctor,
    )
    add_config(doctor, nargs="?", help="YAML file of settings (without one: the machine alone)")
    folder = doctor.add_argument(
        "--run-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs would be (default: runs)"
    )
    complete(folder, FOLDER)
    doctor.add_argument("--json", action="store_true", help="a JSON list of findings")
    doctor.add_argument("--fake-model", action="store_true", help="look at what `run --fake-model` would do")

    attempt = commands.add(
        "try",
        "play a few episodes of the present model and show them",
        about="Prompts, answers in the colour of each token's log-prob, every part of the reward, how it ended; "
        "nothing is trained. Exit code 1 when every episode failed.",
        example="async-rl try configs/quickstart.yaml\n"
        "async-rl try configs/quickstart.yaml --episodes 2 model.path=runs/x/checkpoints/step_000400",
        work=_try,
    )
    add_config(attempt)
    attempt.add_argument("--episodes", type=int, default=8, metavar="N", help="episodes in all (default 8)")
    attempt.add_argument(
        "--samples", type=int, default=0, metavar="N",
        help="episodes of each problem (default 1; a whole group where the task judges groups)",
    )  # fmt: skip
    attempt.add_argument(
        "--split", choices=("train", "eval"), default="train",
        help="problems of training, with the first of which a run begins, or held-out ones (default train)",
    )  # fmt: skip
    attempt.add_argument("--whole", action="store_true", help="long episodes are not cut in the middle")

    audit = commands.add(
        "audit",
        "was anything of a run lost, trained twice or too old?",
        about="Reads the store, the metrics and the checkpoints of a run that has ended. Exit code 1 when something is "
        "wrong.",
        example="async-rl audit runs/x",
        work=_audit,
    )
    add_run(audit, "folder of a run that has ended")

    replay = commands.add(
        "replay",
        "train again on the batches a run stored and compare the weights",
        about="On a CPU the weights must come out bit for bit. Exit code 1 when they differ.",
        example="async-rl replay runs/x --until 50",
        work=_replay,
    )
    add_run(replay)
    replay.add_argument("--until", type=int, metavar="N", help="stop at version N, that is after N steps")

    keys = commands.add(
        "keys",
        "make the keys a run needs to be reached over TCP",
        example="async-rl keys keys\nasync-rl run config.yaml wire.keys=keys wire.endpoint=tcp://0.0.0.0:5555",
        work=_keys,
    )
    complete(keys.add_argument("folder", type=Path, metavar="DIR", help="folder to make"), FOLDER)


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
    from async_rl.instruments.rehearsal import prepare_rehearsal

    if config is None:
        raise UserError("--fake-model needs a YAML file of settings")
    file = folder / "config.yaml"
    settings = load_settings(config, words, needs_model=False)
    file.write_text(to_yaml(prepare_rehearsal(settings, words, folder).settings))
    return file


def _try(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from async_rl.config import load_with_notes

    for name, least in (("episodes", 1), ("samples", 0)):
        if (given := getattr(arguments, name)) < least:
            raise UserError(f"--{name} is {given}; it must be at least {least}")
    loaded = load_with_notes(arguments.config, arguments.overrides)

    from async_rl.observe.episode import EpisodePrinter
    from async_rl.run.trying import plan_trial, play_trial

    trial = plan_trial(loaded.settings, episodes=arguments.episodes, samples=arguments.samples, split=arguments.split)
    printer = EpisodePrinter(
        out=Console(highlight=False),
        tokenizer=trial.tokenizer,
        total=trial.episodes,
        weights=trial.settings.task.reward_weights,
        whole=arguments.whole,
    )
    for note in (*loaded.notes, *trial.notes):
        print(f"note: {note}")
    print(f"{trial.episodes} episodes of {trial.settings.model.path}, task {trial.settings.task.name}", flush=True)
    printer.legend()
    episodes = play_trial(trial, printer.show)
    printer.end(episodes)
    return int(all(episode.failed for episode in episodes))


def _audit(arguments: argparse.Namespace) -> int:
    from async_rl.observe.audit import audit_rows, audit_run, describe_violations
    from async_rl.run_folder import RunFolder

    audit = audit_run(RunFolder(arguments.run))
    for name, value in audit_rows(audit):
        print(f"{name:<10}  {value}")
    for line in describe_violations(audit.violations):
        print(f"WRONG: {line}")
    if not audit.violations:
        print("Nothing was lost, nothing was trained twice, nothing is missing.")
    return 1 if audit.violations else 0


def _replay(arguments: argparse.Namespace) -> int:
    from async_rl.run.child import arithmetic_environment
    from async_rl.run_folder import RunFolder

    folder = RunFolder.open(arguments.run)
    # as the trainer was started: another number of threads may round differently
    os.environ.update(arithmetic_environment(folder.settings().trainer.threads))

    from async_rl.instruments.replay import describe_replay, replay

    result = replay(folder, until=arguments.until)
    print(describe_replay(result, folder))
    return 0 if result.difference is None else 1


def _keys(arguments: argparse.Namespace) -> int:
    from async_rl.wire.keys import make_keys

    folder = make_keys(arguments.folder).folder
    print(
        f"{folder}: run with wire.keys={folder} wire.endpoint=tcp://HOST:PORT. A host of more generators needs "
        "server.key, client.key and client.key_secret; server.key_secret stays here"
    )
    return 0
