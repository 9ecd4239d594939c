"""Commands that look: `async-rl config | recipes | tasks | top | report | trace`.

Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from async_rl.cli.commands import FILE, FOLDER, Commands, add_config, add_run, complete
from async_rl.errors import UserError


def add_commands(commands: Commands) -> None:
    """Register the group."""
    commands.group("look")
    top = commands.add(
        "top",
        "a run at a glance in the terminal, until it ends or Ctrl-C",
        example="async-rl top runs/x",
        work=_top,
    )
    add_run(top)
    top.add_argument("--once", action="store_true", help="print once and end")

    report = commands.add(
        "report",
        "one HTML page of everything about one run, or several side by side",
        about="The page needs no network; a run that is still going on can be reported too.",
        example="async-rl report runs/x && open runs/x/report.html\nasync-rl report runs/x runs/y --out both.html",
        work=_report,
    )
    runs = report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    complete(runs, FOLDER)
    out = report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the run's folder")
    complete(out, FILE)
    report.add_argument("--no-ratios", action="store_true", help="no importance ratios (loads no checkpoint)")

    trace = commands.add(
        "trace",
        "a Chrome trace (Perfetto) of who did what when, and of every group's way",
        about="Open the file at ui.perfetto.dev.",
        example="async-rl trace runs/x --steps 100:200",
        work=_trace,
    )
    add_run(trace)
    out = trace.add_argument("--out", type=Path, metavar="FILE", help="default: trace.json in the run's folder")
    complete(out, FILE)
    trace.add_argument("--steps", metavar="FIRST:LAST", help="both included; default: the newest 500")

    config = commands.add(
        "config",
        "print every setting, resolved, with meaning, choices, bounds, unit and default",
        about="Ends with the placement of the processes and the memory they need, once the model is there.",
        example="async-rl config configs/quickstart.yaml recipe=vcpo\n"
        "async-rl config configs/quickstart.yaml --yaml > mine.yaml",
        work=_config,
    )
    add_config(config)
    config.add_argument("--yaml", action="store_true", help="as YAML that `run` reads, without explanations")
    config.add_argument("--fake-model", action="store_true", help="what `run --fake-model` would replace, and the rest")

    recipes = commands.add(
        "recipes",
        "list the objectives, or explain one",
        example="async-rl recipes\nasync-rl recipes vcpo trust.cap=4",
        work=_recipes,
    )
    recipes.add_argument("name", nargs="?", metavar="NAME", help="a recipe; without one: the list")
    recipes.add_argument("overrides", nargs="*", metavar="AXIS=VALUE", help="changed axes, e.g. trust.cap=4")

    tasks = commands.add(
        "tasks",
        "list the tasks and environments, or show one: settings, problems, an episode",
        about="NAME is a task, file.py:Class of your own, or a YAML file of settings, whose task is shown. No model is "
        "needed: a script speaks for the policy.",
        example="async-rl tasks\nasync-rl tasks calculator digits=2\nasync-rl tasks configs/quickstart.yaml",
        work=_tasks,
    )
    complete(
        tasks.add_argument("name", nargs="?", metavar="NAME", help="a task or a config; without one: the list"), FILE
    )
    tasks.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="settings of the task, e.g. digits=2")


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


def _config(arguments: argparse.Namespace) -> int:
    from async_rl.config import load_with_notes
    from async_rl.config.schema import describe, structured, to_yaml
    from async_rl.objective.library import load_recipe
    from async_rl.task.build import settings_of, task_class

    loaded = load_with_notes(arguments.config, arguments.overrides, needs_model=not arguments.fake_model)
    settings = loaded.settings
    if arguments.fake_model:
        from async_rl.instruments.rehearsal import plan_rehearsal

        rehearsal = plan_rehearsal(settings, arguments.overrides, Path("runs") / f"{settings.name}-fake.files")
        settings = rehearsal.settings
        if not arguments.yaml:
            print(f"{rehearsal.describe()}\n")
    if arguments.yaml:
        print(to_yaml(settings), end="")
        return 0
    for note in loaded.notes:
        print(f"note: {note}")
    rows = [info for info in describe(settings) if info.path not in ("task.args", "recipe")]
    args = task_class(settings.task.name).complete(settings.task.args)
    task: Any = structured(settings_of(settings.task.name), args, where="task.args")
    rows += describe(task, "task.args.")
    rows += describe(load_recipe(settings.recipe), "recipe.")
    for info in rows:
        allowed = info.describe_range()
        if info.value != info.default:
            allowed += f"{'; ' if allowed else ''}default {_shown(info.default)}"
        print(f"{info.path} = {_shown(info.value)}" + (f"  [{allowed}]" if allowed else ""))
        print(f"    {info.meaning}")
    if Path(settings.model.path).is_dir():
        from async_rl.run.memory import describe_estimate, estimate
        from async_rl.run.placement import describe_threads, place_here, read_cores, threads_here

        settings = threads_here(settings)
        try:
            print(f"\nplacement: {place_here(settings).describe()}; {describe_threads(settings, read_cores())}")
        except UserError as error:
            print(f"\nplacement, on this machine impossible: {error}")
        print(f"\n{describe_estimate(estimate(settings))}")
    elif not arguments.fake_model:
        print(f"\nplacement and memory: once the model is in {settings.model.path}")
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    from async_rl.config.load import make_settings
    from async_rl.config.schema import load_yaml, with_overrides
    from async_rl.doctor.tasks import list_tasks, show_task
    from async_rl.task import make_task

    name, words = arguments.name, arguments.overrides
    if name is None:
        print("\n".join(list_tasks()))
        return 0
    if name.endswith((".yaml", ".yml")):
        file = Path(name)
        chosen = [word if word.startswith("task.") else f"task.args.{word}" for word in words]
        task = make_settings(load_yaml(file), chosen, folder=file.parent, needs_model=False).settings.task
        name, args = task.name, task.args
    else:
        args = with_overrides({}, [word.removeprefix("task.args.") for word in words])
    for line in show_task(name, make_task(name, args)):
        print(line)
    return 0


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _recipes(arguments: argparse.Namespace) -> int:
    from async_rl.config.schema import with_overrides
    from async_rl.objective.library import explain, list_recipes, load_recipe
    from async_rl.objective.methods import describe_methods

    if arguments.name is None:
        found = list_recipes()
        width = max(map(len, found))
        for name, line in found.items():
            print(f"{name:<{width}}  {line}")
        print("\nPublished methods, what of them is here and what is not:")
        for line in describe_methods():
            print(line)
        return 0
    print(explain(load_recipe(with_overrides({"name": arguments.name}, arguments.overrides))), end="")
    return 0
