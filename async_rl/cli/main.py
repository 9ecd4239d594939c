"""The command line. `async-rl --help` lists the commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from async_rl.cli.doctor import add_doctor
from async_rl.cli.experiments import add_init_model, add_lab
from async_rl.cli.join import add_joining
from async_rl.cli.observe import add_watching
from async_rl.cli.simulate import add_simulate
from async_rl.errors import RunFailed, UserError
from async_rl.process import Interrupted, ignore_interrupts, interruptible
from async_rl.version import __version__

FAKE_MODEL = "rehearse: a tiny random model on CPU, few steps; recipe, staleness, ranks and task as in the config"


def main(argv: Sequence[str] | None = None) -> None:
    """Exit codes: 0 done, 1 a run failed, 2 a wrong setting or file, 130 stopped by Ctrl-C."""
    parser = _parser()
    # settings may stand before and behind options, which argparse alone does not allow
    arguments, more = parser.parse_known_args(argv)
    dashed = [word for word in more if word.startswith("-")]
    if more and (not hasattr(arguments, "overrides") or dashed):
        hint = " (settings are written without dashes)" if any("=" in word for word in dashed) else ""
        parser.error(f"unrecognized arguments: {' '.join(dashed or more)}{hint}")
    if more:
        arguments.overrides = [*arguments.overrides, *more]
    try:
        with interruptible():
            code = _work(arguments)
    except UserError as error:
        _complain(str(error))
        code = 2
    except RunFailed as error:
        _complain(str(error))
        code = 1
    except BrokenPipeError:  # whoever read our output has gone
        _drop_output()
        code = 1
    except OSError as error:  # a full disk
        _drop_output()
        _complain(str(error))
        code = 1
    sys.exit(code)


def _work(arguments: argparse.Namespace) -> int:
    """The exit code; once interrupted, nothing interrupts any more."""
    try:
        code: int = arguments.work(arguments)
    except Interrupted as order:
        _complain(f"stopped by {order}")
        code = 130
    if code == 130:
        ignore_interrupts(to_the_end=True)
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="async-rl", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"async-rl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train: start generators, buffer and trainer")
    run.add_argument("config", nargs="?", help="YAML file of settings (not with --resume)")
    run.add_argument("overrides", nargs="*", help="name=value, e.g. trainer.steps=100 recipe=vcpo")
    run.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder from its newest checkpoint"
    )
    run.add_argument("--run-dir", type=Path, help="folder of this run (default: runs/<name>-<time>)")
    run.add_argument("--quiet", action="store_true", help="no line for every step")
    run.add_argument("--fake-model", action="store_true", help=FAKE_MODEL)
    run.set_defaults(work=_run)

    add_doctor(commands)

    config = commands.add_parser("config", help="print every setting, resolved, with meaning and unit")
    config.add_argument("config", type=Path)
    config.add_argument("overrides", nargs="*")
    config.add_argument("--yaml", action="store_true", help="as YAML that `run` reads, without explanations")
    config.add_argument("--fake-model", action="store_true", help="what `run --fake-model` would replace, and the rest")
    config.set_defaults(work=_config)

    recipes = commands.add_parser("recipes", help="list the objectives, or explain one")
    recipes.add_argument("name", nargs="?")
    recipes.add_argument("overrides", nargs="*", help="axis=value, e.g. trust.cap=4")
    recipes.set_defaults(work=_recipes)

    replay = commands.add_parser("replay", help="train again on the batches a run stored and compare the weights")
    replay.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    replay.add_argument("--until", type=int, metavar="N", help="stop at version N, that is after N steps")
    replay.set_defaults(work=_replay)

    audit = commands.add_parser("audit", help="was anything of a run lost, trained twice or too old?")
    audit.add_argument("run", type=Path, metavar="RUN", help="folder of a run that has ended")
    audit.set_defaults(work=_audit)

    chaos = commands.add_parser("chaos", help="a run whose processes are killed and frozen, then audited and replayed")
    chaos.add_argument("config", type=Path, help="YAML file of settings")
    chaos.add_argument("overrides", nargs="*", help="name=value, e.g. trainer.steps=100")
    chaos.add_argument("--kills", type=int, default=8, metavar="N", help="processes killed (default 8)")
    for name in ("freezes", "slows", "disconnects"):
        chaos.add_argument(f"--{name}", type=int, metavar="N", help="default: a quarter of --kills")
    chaos.add_argument("--seed", type=int, default=0, help="of the plan: which process, how and when (default 0)")
    chaos.add_argument("--run-dir", type=Path, help="folder of this run (default: runs/<name>-chaos-<time>)")
    chaos.set_defaults(work=_chaos)

    add_simulate(commands)

    add_init_model(commands)

    add_joining(commands)

    evaluate = commands.add_parser("eval", help="held-out reward of a model folder")
    evaluate.add_argument("config", type=Path, help="settings: task and evaluation are used")
    evaluate.add_argument("overrides", nargs="*", help="e.g. model.path=runs/x/checkpoints/step_000400")
    evaluate.set_defaults(work=_eval)
    add_watching(commands)
    add_lab(commands)
    return parser


def _drop_output() -> None:
    """Nothing more can be written: what is still buffered must not fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str) -> None:
    print(f"async-rl: {message}", file=sys.stderr)


def _run(arguments: argparse.Namespace) -> int:
    from async_rl.config import load_settings
    from async_rl.observe.console import Console
    from async_rl.run_folder import RunFolder

    console = Console(quiet=arguments.quiet)
    path: Path | None = None
    try:
        if arguments.resume is not None:
            from async_rl.run.launcher import resume_training

            path = arguments.resume
            summary = resume_training(path, _resume_words(arguments), console=console)
        else:
            if arguments.config is None:
                raise UserError("name a YAML file of settings, or --resume RUN to go on with a run")
            settings = load_settings(Path(arguments.config), arguments.overrides)
            from async_rl.run.launcher import run_training  # after the settings: a misspelt one is said at once
            from async_rl.run.preflight import check_idle

            check_idle(settings)

            fake = "-fake" if arguments.fake_model else ""
            path = arguments.run_dir or Path("runs") / f"{settings.name}{fake}-{time.strftime('%Y%m%d-%H%M%S')}"
            if arguments.fake_model:
                from async_rl.instruments.rehearsal import prepare

                rehearsal = prepare(settings, arguments.overrides, path.with_name(f"{path.name}.files"))
                console.say(rehearsal.in_words())
                settings = rehearsal.settings
            summary = run_training(settings, path, console=console)
    except Interrupted as order:
        if path is None or not RunFolder(path).config.is_file():
            raise  # before anything was there
        _complain(
            f"stopped by {order}; everything is down, the record of the run is in {path}. "
            f"`async-rl run --resume {path}` goes on with it"
        )
        return 130
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


def _replay(arguments: argparse.Namespace) -> int:
    from async_rl.run.child import arithmetic_environment
    from async_rl.run_folder import RunFolder

    folder = RunFolder(arguments.run)
    if not folder.config.is_file():
        raise UserError(f"{folder.path} is not a run folder: there is no {folder.config.name} in it")
    # as the trainer was started: another number of threads may round differently
    os.environ.update(arithmetic_environment(folder.settings().trainer.threads))

    from async_rl.instruments.replay import in_words, replay

    result = replay(folder, until=arguments.until)
    print(in_words(result, folder))
    return 0 if result.difference is None else 1


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


def _chaos(arguments: argparse.Namespace) -> int:
    from async_rl.cli.chaos import counts_of, run_chaos

    counts = counts_of({name: getattr(arguments, name) for name in ("kills", "freezes", "slows", "disconnects")})
    path = arguments.run_dir or Path("runs") / f"{arguments.config.stem}-chaos-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        outcome = run_chaos(arguments.config, arguments.overrides, path, counts, seed=arguments.seed, say=_say)
    except Interrupted as order:
        if not path.is_dir():
            raise  # before anything was there
        _complain(f"stopped by {order}; everything is down, the record of the run is in {path}")
        return 130
    return 0 if outcome.clean else 1


def _say(text: str) -> None:
    print(text, flush=True)


def _config(arguments: argparse.Namespace) -> int:
    from async_rl.config import load_settings
    from async_rl.config.schema import describe, structured, to_yaml
    from async_rl.objective.library import load_recipe
    from async_rl.task.build import settings_of

    settings = load_settings(arguments.config, arguments.overrides)
    if arguments.fake_model:
        from async_rl.instruments.rehearsal import plan

        rehearsal = plan(settings, arguments.overrides, Path("runs") / f"{settings.name}-fake.files")
        settings = rehearsal.settings
        if not arguments.yaml:
            print(f"{rehearsal.in_words()}\n")
    if arguments.yaml:
        print(to_yaml(settings), end="")
        return 0
    rows = [info for info in describe(settings) if info.path not in ("task.args", "recipe")]
    task: Any = structured(settings_of(settings.task.name), settings.task.args, where="task.args")
    rows += describe(task, "task.args.")
    rows += describe(load_recipe(settings.recipe), "recipe.")
    for info in rows:
        allowed = info.describe_range()
        if info.value != info.default:
            allowed += f"{'; ' if allowed else ''}default {_shown(info.default)}"
        print(f"{info.path} = {_shown(info.value)}" + (f"  [{allowed}]" if allowed else ""))
        print(f"    {info.meaning}")
    if Path(settings.model.path).is_dir():
        from async_rl.run.memory import estimate, in_words
        from async_rl.run.placement import placed

        try:
            print(f"\nplacement: {placed(settings).in_words()}")
        except UserError as error:
            print(f"\nplacement, on this machine impossible: {error}")
        print(f"\n{in_words(estimate(settings))}")
    elif not arguments.fake_model:
        print(f"\nplacement and memory: once the model is in {settings.model.path}")
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from async_rl.config.schema import with_overrides
    from async_rl.objective.library import explain, list_recipes, load_recipe

    if arguments.name is None:
        found = list_recipes()
        width = max(map(len, found))
        for name, line in found.items():
            print(f"{name:<{width}}  {line}")
        return 0
    print(explain(load_recipe(with_overrides({"name": arguments.name}, arguments.overrides))), end="")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from async_rl.config import load_settings
    from async_rl.run.preflight import preflight
    from async_rl.task import make_task

    settings = load_settings(arguments.config, arguments.overrides)
    preflight(settings)

    from async_rl.model.folder import load_model
    from async_rl.model.tokenizer import Tokenizer
    from async_rl.run.evaluate import evaluate, limits_of

    chosen = settings.evaluation
    episodes = evaluate(
        load_model(settings.model.path),
        make_task(settings.task.name, settings.task.args),
        Tokenizer(settings.model.path),
        problems=chosen.problems,
        samples=chosen.samples,
        temperature=chosen.temperature,
        seed=settings.seed,
        limits=limits_of(settings),
        max_context=settings.generator.max_context or None,
    )
    failed = [t for t in episodes if t.failed]
    print(
        json.dumps(
            {
                "model": settings.model.path,
                "reward": sum(t.reward for t in episodes if not t.failed) / len(episodes),
                "trajectories": len(episodes),
                "failed": len(failed),
                "first_failure": failed[0].reason if failed else "",
                "policy_tokens_mean": sum(t.num_policy_tokens for t in episodes) / len(episodes),
            }
        )
    )
    return 0


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
