"""The package from Python: train, evaluate, and read what a run has left in its folder.

    import async_rl as ar

    run = ar.train("config.yaml", reward=my_reward, trainer={"steps": 100})
    print(run.summary["reward_eval_last"], run.checkpoints[-1])
    run.metrics.to_pandas().plot(x="step", y="reward/mean")

Everything here is also a command: `train` is `async-rl run`, `evaluate` is `async-rl eval`, the methods of `Run` are
`async-rl report`, `audit` and `run --resume`. Importing this module loads no torch.

Tasks, rewards and recipes of one's own are loaded by the processes of a run, so they are passed on by name: a class or
function must stand in a file. A script may hold its task and train with it; no `if __name__ == "__main__":` is needed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from async_rl.config import Settings
from async_rl.config.from_python import Config, override_words, settings_from, task_of
from async_rl.config.imports import stop_import
from async_rl.errors import RunFailed, UserError
from async_rl.observe.console import Console
from async_rl.process import Interrupted
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trajectory import Trajectory
from async_rl.trajectory.parts import part_means, parts_in

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from async_rl.objective.state import ObjectiveState
    from async_rl.objective.tokens import Coefficients
    from async_rl.observe.audit import Audit
    from async_rl.task.protocol import Task

RewardFunction = Callable[..., Any]
"""takes any of completion, answer, problem, ... by name (docs/howto/rewards.md) and returns a number or named parts"""
OwnRecipe = Callable[..., "Coefficients | tuple[Coefficients, ObjectiveState]"]
"""(columns) or (columns, recipe, state) -> coefficients: see `ar.RecipeFunction`"""

P = ParamSpec("P")
R = TypeVar("R")


def _plain_errors(function: Callable[P, R]) -> Callable[P, R]:
    """UserError, RunFailed and KeyboardInterrupt leave `function` without frames of this package in their traceback."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (UserError, RunFailed) as error:
            raise error.with_traceback(None) from None
        except Interrupted as order:
            raise KeyboardInterrupt(str(order)) from None

    return called


# ---------------------------------------------------------------------- train


@_plain_errors
def train(
    config: Config | None = None,
    *,
    task: str | type[Task] | Task | Mapping[str, Any] | None = None,
    reward: str | RewardFunction | None = None,
    recipe: str | Mapping[str, Any] | OwnRecipe | None = None,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    accept_changed: str | Sequence[str] = (),
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Train to the end and return the run. All processes are gone when this returns or raises.

    Args:
        config: settings: a YAML file, a mapping with what such a file holds, or `ar.Settings`. Left out with `resume`.
        task: a task's name, a class derived from `ar.Task`, or `{"name": ..., "args": {...}}`.
        reward: a function for tasks that read a data set, or the name of one: of any of `completion, answer, problem,
            ...` (docs/howto/rewards.md) to a number or a mapping of named parts.
        recipe: a recipe's name, `{"name": ..., AXIS: VALUE}`, or a function that maps columns to coefficients.
        run_dir: the new folder of the run; default `runs/NAME-TIME`.
        resume: a run folder; the run in it goes on from its newest checkpoint.
        accept_changed: with `resume`: go on although these are not what the run was begun with: data, code, tokenizer
            or problems; one name, or several in a list.
        quiet: no line for every step.
        overrides: settings laid over the config, `trainer={"steps": 100}` or `**{"trainer.steps": 100}`.

    Raises:
        UserError: a setting or file is wrong; the message names it and the remedy.
        RunFailed: the run had started and could not go on; the message is the first cause.
        KeyboardInterrupt: Ctrl-C; the record of the run is whole, and `resume` goes on with it.

    Example:
        >>> import async_rl as ar
        >>> run = ar.train("configs/quickstart.yaml", trainer={"steps": 50})  # doctest: +SKIP
        >>> run.summary["reward_eval_last"]  # doctest: +SKIP
        0.71
    """
    stop_import("train")
    chosen = {"task": task, "reward": reward, "recipe": recipe}
    words = override_words({name: value for name, value in chosen.items() if value is not None} | overrides)
    console = Console(quiet=quiet)
    if resume is not None:
        if config is not None or run_dir is not None:
            raise UserError("resume takes settings and folder of the run it names; leave config and run_dir out")
        accepted = accept_changed.split(",") if isinstance(accept_changed, str) else accept_changed
        return _trained(Path(resume), console, lambda path: _resume(path, words, console, [*filter(None, accepted)]))
    if accept_changed:
        raise UserError("accept_changed is for resume: a new run has nothing to differ from; leave it out")
    if config is None:
        raise UserError("name a config (a YAML file, a mapping or ar.Settings), or resume=RUN to go on with a run")
    settings, notes = settings_from(config, words)
    path = Path(run_dir) if run_dir is not None else Path("runs") / f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for note in notes:
        console.print(f"note: {note}")
    return _trained(path, console, lambda path: _start(settings, path, console))


def _trained(path: Path, console: Console, work: Callable[[Path], Mapping[str, Any]]) -> Run:
    """Run `work`, which trains in `path` and returns the summary; what goes wrong says how to go on."""
    remedy = f"ar.Run({str(path)!r}).resume() goes on with the run"
    try:
        console.summary(work(path))
    except RunFailed as error:
        raise RunFailed(f"{error}\n{remedy}") from None
    except Interrupted as order:
        there = RunFolder(path).config.is_file()
        raise KeyboardInterrupt(f"{order}; everything is down{'; ' + remedy if there else ''}") from None
    return Run(path)


def _start(settings: Settings, path: Path, console: Console) -> Mapping[str, Any]:
    from async_rl.cluster.engines import train
    from async_rl.run.preflight import check_idle

    check_idle(settings)
    return train(settings, path, console=console)


def _resume(path: Path, words: list[str], console: Console, accepted: Sequence[str]) -> Mapping[str, Any]:
    from async_rl.cluster.engines import resume

    try:
        return resume(path, words, console=console, accepted=accepted)
    except UserError as error:  # as a call in Python has it
        raise UserError(re.sub(r"--accept-changed (\S+?)(?=[:\n]|$)", r'accept_changed="\1"', str(error))) from None


# ------------------------------------------------------------------- evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Episodes of a model on held-out problems.

    Example:
        >>> Evaluation(model="models/quickstart", episodes=()).reward
        nan
    """

    model: str
    """folder of the model"""
    episodes: tuple[Trajectory, ...]
    """all of them, in the order of problems and samples"""

    @property
    def reward(self) -> float:
        """Mean reward of the episodes that were judged; NaN when there is none."""
        return _mean([episode.reward for episode in self.episodes if not episode.failed])

    @property
    def parts(self) -> dict[str, float]:
        """Named parts of the reward: mean over the episodes that have the part, unweighted."""
        return part_means(parts_in(episode.info) for episode in self.episodes if not episode.failed)

    @property
    def failed(self) -> tuple[Trajectory, ...]:
        """Episodes that broke; each says why in `reason`."""
        return tuple(episode for episode in self.episodes if episode.failed)

    @property
    def policy_tokens_mean(self) -> float:
        """Tokens that the model sampled, on average over the episodes."""
        return _mean([float(episode.num_policy_tokens) for episode in self.episodes])

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"Evaluation({self.model!r}: reward {self.reward:.3f}, {len(self.episodes)} episodes{failed})"


@_plain_errors
def evaluate(
    config: Config,
    model: str | Path | None = None,
    *,
    task: str | type[Task] | Task | Mapping[str, Any] | None = None,
    reward: str | RewardFunction | None = None,
    **overrides: Any,
) -> Evaluation:
    """Held-out reward of a model folder, sampled in this process by the embedded engine.

    Of the settings `task`, `model`, `evaluation`, `seed` and `generator.max_*` count.

    Args:
        config: settings, as in `train`.
        model: folder of the model; default `model.path` of the settings.
        task: as in `train`.
        reward: as in `train`.
        overrides: settings laid over the config, e.g. `evaluation={"problems": 256, "temperature": 0.0}`.

    Raises UserError.

    Example:
        >>> import async_rl as ar
        >>> ar.evaluate("configs/quickstart.yaml", evaluation={"problems": 32})  # doctest: +SKIP
        Evaluation('models/quickstart': reward 0.430, 64 episodes)
    """
    stop_import("evaluate")
    chosen = {"task": task, "reward": reward, "model.path": None if model is None else str(model)}
    words = override_words({name: value for name, value in chosen.items() if value is not None} | overrides)
    settings, _ = settings_from(config, words)
    return _outside_of_a_loop(lambda: evaluate_settings(settings))


def evaluate_settings(settings: Settings) -> Evaluation:
    """Check the settings and sample the episodes they ask for. Raises UserError."""
    from async_rl.run.preflight import preflight

    settings = preflight(settings).settings

    from async_rl.model.folder import load_model
    from async_rl.model.tokenizer import Tokenizer
    from async_rl.run.evaluate import evaluate, limits_of
    from async_rl.task import make_task

    chosen = settings.evaluation
    episodes = evaluate(
        load_model(settings.model.path),
        make_task(settings.task.name, settings.task.args),
        Tokenizer.of(settings.model),
        problems=chosen.problems,
        samples=chosen.samples,
        choice=chosen.choice,
        temperature=chosen.temperature,
        seed=settings.seed,
        limits=limits_of(settings),
        max_context=settings.generator.max_context or None,
    )
    return Evaluation(model=settings.model.path, episodes=tuple(episodes))


def _outside_of_a_loop(work: Callable[[], R]) -> R:
    """Run `work`, which starts an event loop, where one may be running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(max_workers=1) as threads:
        return threads.submit(work).result()


@_plain_errors
def init_model(
    path: str | Path,
    task: str | type[Task] | Mapping[str, Any] = "guess",
    *,
    until: float = 0.4,
    max_steps: int = 1000,
    seed: int = 0,
    quiet: bool = False,
    **shape: int,
) -> Path:
    """Make the folder `path` with a small model, warmed up on demonstrations of `task`. On a CPU, seconds to minutes.

    Args:
        task: one with demonstrations: `guess`, `sort`, `reverse`, `arithmetic`, `countdown`, `calculator`, or your own.
        until: success rate on held-out problems at which the warm-up stops.
        max_steps: supervised steps at most.
        shape: size of the model: hidden, layers, heads, kv_heads, head_dim, intermediate, max_context.

    Raises UserError.

    Example:
        >>> import async_rl as ar
        >>> ar.init_model("models/quickstart", "guess", until=0.55)  # doctest: +SKIP
    """
    stop_import("init_model")
    name, args = task_of(task)

    import torch

    from async_rl.run.init_model import Shape, WarmupOptions, init_model
    from async_rl.task import make_task

    known = [field.name for field in dataclasses.fields(Shape)]
    for wrong in sorted(shape.keys() - set(known)):
        raise UserError(f"init_model: {wrong} is no size of the model; known: {', '.join(known)}")
    torch.manual_seed(seed)
    options = WarmupOptions(target=until, max_steps=max_steps, batch=64, learning_rate=1e-3, check_every=25, seed=seed)
    say: Callable[[str], None] = (lambda _: None) if quiet else print
    made = make_task(name, args)
    _outside_of_a_loop(lambda: init_model(Path(path), made, Shape(**shape), options, say))
    return Path(path)


# ----------------------------------------------------------------------- rows


class Rows(list[dict[str, Any]]):
    """Rows of a record, as a list of mappings that turns into a table.

    Example:
        >>> rows = Rows([{"step": 0, "reward/mean": 0.25}, {"step": 1, "reward/mean": 0.5, "clip/frac": 0.1}])
        >>> rows.column("clip/frac")
        [None, 0.1]
        >>> len(rows), rows[-1]["reward/mean"]
        (2, 0.5)
        >>> list(rows.to_pandas().columns)
        ['step', 'reward/mean', 'clip/frac']
    """

    @property
    def names(self) -> list[str]:
        """Every key that some row has, in the order of first appearance."""
        return list(dict.fromkeys(name for row in self for name in row))

    def column(self, name: str) -> list[Any]:
        """The values of one key, None where a row lacks it."""
        return [row.get(name) for row in self]

    def to_pandas(self) -> pandas.DataFrame:
        """A table with one column a key. Raises UserError without pandas."""
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(list(self), columns=self.names)

    def to_arrow(self) -> pyarrow.Table:
        """A table with one column a key; values of mixed types become JSON text. Raises UserError without pyarrow."""
        try:
            import pyarrow
        except ImportError:
            raise UserError("to_arrow needs pyarrow: pip install pyarrow") from None
        made = {}
        for name in self.names:
            values = self.column(name)
            try:
                made[name] = pyarrow.array(values)
            except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
                made[name] = pyarrow.array([None if value is None else json.dumps(value) for value in values])
        return pyarrow.table(made)


# ------------------------------------------------------------------------ run


class Run:
    """A run as its folder holds it: finished, still going on, or broken off. Reading disturbs nothing.

    Raises UserError when `path` is no run folder.

    Example:
        >>> import async_rl as ar
        >>> run = ar.Run("runs/quickstart-20260101-120000")  # doctest: +SKIP
        >>> run  # doctest: +SKIP
        Run('runs/quickstart-20260101-120000': finished: 400 of 400 steps)
        >>> run.metrics.column("reward/mean")[-1]  # doctest: +SKIP
        0.93
    """

    def __init__(self, path: str | Path) -> None:
        self._folder = RunFolder.open(Path(path))

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def settings(self) -> Settings:
        """The settings the run was started with, or resumed with last."""
        return self._folder.settings()

    @property
    def state(self) -> str:
        """How the run stands, in words, e.g. "finished: 400 of 400 steps"."""
        from async_rl.observe.record import read_run

        return read_run(self.path).state()[1]

    @property
    def finished(self) -> bool:
        return self._folder.summary.is_file()

    @property
    def summary(self) -> Mapping[str, Any]:
        """What the run came to: `reward_eval_first`, `reward_eval_last`, `lag_mean`, `seconds`, `model`, ...

        Raises UserError when the run is not finished."""
        if not self.finished:
            raise UserError(f"{self.path} has no summary: {self.state}; resume() goes on with a run that has ended")
        found: dict[str, Any] = json.loads(self._folder.summary.read_text())
        return found

    @property
    def metrics(self) -> Rows:
        """One row a step; docs/metrics.md says what each key means."""
        return Rows(read_rows(self._folder.metrics))

    @property
    def events(self) -> Rows:
        """What happened, in order: each row has `event` (its name), `time` (seconds since the epoch) and details."""
        return Rows(read_rows(self._folder.events))

    @property
    def trajectories(self) -> Rows:
        """One row a trajectory, without tokens: group, sample, split, problem, step (the batch it was trained in),
        versions, reward, lengths, how it ended, why it was refused. Raises UserError when there is no store."""
        from async_rl.buffer.store_reader import StoreReader

        with StoreReader(self._folder.store) as store:
            return Rows(asdict(row) for row in store.trajectories())

    def group(self, group: int) -> tuple[Trajectory, ...]:
        """The trajectories of one group with their tokens, log-probs and versions; empty when they are not stored.

        Raises UserError when there is no store."""
        from async_rl.buffer.store_reader import StoreReader
        from async_rl.trajectory.codec import unpack

        with StoreReader(self._folder.store) as store:
            return tuple(unpack(blob) for blob in store.load_groups([group]))

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """Folders of the checkpoints that are there, oldest first. Each is a Hugging Face model folder."""
        from async_rl.trainer.manifest import list_checkpoints

        return tuple(list_checkpoints(self._folder.checkpoints))

    @_plain_errors
    def evaluate(self, checkpoint: str | Path | None = None, **overrides: Any) -> Evaluation:
        """Held-out reward of a checkpoint; default the newest, else the model the run began with. Raises UserError.

        Example:
            >>> import async_rl as ar
            >>> ar.Run("runs/mine").evaluate(evaluation={"temperature": 0.0}).reward  # doctest: +SKIP
            0.97
        """
        stop_import("Run.evaluate")
        newest = self.checkpoints[-1] if self.checkpoints else None
        return evaluate(self.settings, checkpoint if checkpoint is not None else newest, **overrides)

    @_plain_errors
    def report(self, out: str | Path | None = None) -> Path:
        """Write one self-contained HTML page with everything about the run; default `report.html` in its folder.

        Raises UserError."""
        from async_rl.observe.report import write_report

        path = Path(out) if out is not None else self.path / "report.html"
        write_report([self.path], path)
        return path

    @_plain_errors
    def audit(self) -> Audit:
        """Check the record of a run that has ended: nothing lost, nothing trained twice, nothing too old. What is wrong
        stands in the audit's `violations`. Raises UserError."""
        from async_rl.observe.audit import audit_run

        return audit_run(self._folder)

    @_plain_errors
    def resume(self, *, accept_changed: str | Sequence[str] = (), quiet: bool = False, **overrides: Any) -> Run:
        """Go on with the run from its newest whole checkpoint, to the end. Arguments and errors are those of `train`.

        Example:
            >>> import async_rl as ar
            >>> ar.Run("runs/mine").resume(trainer={"steps": 800})  # doctest: +SKIP
        """
        stop_import("Run.resume")
        return train(resume=self.path, accept_changed=accept_changed, quiet=quiet, **overrides)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.state})"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
