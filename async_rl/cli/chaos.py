"""`async-rl chaos`: plan the faults, run under them, audit and replay the run, print the verdict."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from async_rl.buffer.store_reader import StoreReader
from async_rl.config import Settings, load_settings
from async_rl.config.schema import to_yaml
from async_rl.config.settings import TaskSettings
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.chaos.chaos import ChaosRun
from async_rl.instruments.chaos.evidence import StoreEvidence, taken_back
from async_rl.instruments.chaos.injector import Injector
from async_rl.instruments.chaos.launch import LaunchedRun
from async_rl.instruments.chaos.outcome import Outcome, outcome_rows, problem_lines
from async_rl.instruments.chaos.plan import Counts, make_plan
from async_rl.instruments.chaos.progress import RunProgress
from async_rl.instruments.chaos.proxy import Proxy
from async_rl.instruments.chaos.sabotage import NAME
from async_rl.observe.audit import audit_run
from async_rl.run.child import arithmetic_environment
from async_rl.run_folder import RunFolder, replace_text
from async_rl.weights.shared_memory import segment_path
from async_rl.wire.channel import ipc_endpoint

MOST = 10_000
"""most faults of one kind"""


def counts_of(asked: Mapping[str, int | None]) -> Counts:
    """The number of faults of each kind, from the options; a kind that is not given gets a quarter of the kills.

    Raises UserError for a number out of bounds.
    """
    for name, number in asked.items():
        if number is not None and not 0 <= number <= MOST:
            raise UserError(f"--{name} is {number}; it must be at least 0 and at most {MOST:,}")
    quarter = -(-(asked["kills"] or 0) // 4)
    return Counts(**{name: quarter if number is None else number for name, number in asked.items()})


def run_chaos(
    config: Path, overrides: Sequence[str], path: Path, counts: Counts, *, seed: int, say: Callable[[str], None]
) -> Outcome:
    """Run in the new folder `path` under the planned faults, then audit and replay the run.

    The record is written into the folder; `say` prints a line. Raises UserError, and Interrupted with every process
    gone.
    """
    settings = load_settings(config, overrides)
    if settings.trainer.ranks > 1 or settings.trainer.start != "launcher":
        raise UserError(
            "chaos needs trainer.ranks=1 and trainer.start=launcher: it ends with a replay, which is exact for steps "
            "that one rank took"
        )
    plan = make_plan(counts, seed=seed)
    path = path.absolute()  # as a resumed run has it: processes are known by it
    folder = RunFolder(path)
    if path.exists() and (
        not path.is_dir() or any(path.iterdir())
    ):  # never inject faults into a folder of somebody else
        raise UserError(f"{path} exists already; choose another --run-dir or remove it")
    outcome = Outcome(seed=seed, planned=len(plan))
    with ExitStack() as stack:
        proxy: Proxy | None = None
        words = list(overrides)
        orders: Path | None = None
        if counts.of_the_task:
            orders = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="async-rl-orders-")))
            words = sabotaged(words, settings.task, orders)
        if counts.disconnects:
            target = _socket_of(settings, folder)
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="async-rl-chaos-")))
            proxy = stack.enter_context(Proxy(place / "wire.sock", target))
            words.append(f"wire.connect=ipc://{proxy.path}")
        started = time.monotonic()
        launched = LaunchedRun(folder=folder)
        run = ChaosRun(
            run=launched,
            injector=Injector(
                plan=plan,
                steps=settings.trainer.steps,
                proxy=proxy,
                record=path / "chaos.jsonl",
                started=started,
                start_liar=launched.start_liar,
                orders=orders,
            ),
            progress=RunProgress(folder, started),
            outcome=outcome,
            report=say,
        )
        try:
            run.play(config, words)
        except RunFailed as error:
            outcome.problems.append(str(error))
        finally:
            if proxy is not None:
                _without_tunnel(folder)
    _examine(folder, run.evidence, outcome, say)
    record = folder.path / "chaos.json"
    replace_text(record, json.dumps(outcome.to_dict(), indent=2) + "\n")
    for line in (*outcome_rows(outcome), *problem_lines(outcome), f"The record is in {record} and chaos.jsonl."):
        say(line)
    return outcome


def sabotaged(words: Sequence[str], task: TaskSettings, orders: Path) -> list[str]:
    """The overrides `words` of a run of this task, with the task that obeys orders in its place."""
    args = {"name": task.name, "args": task.args, "orders": str(orders)}
    kept = [word for word in words if not word.startswith("task")]
    weights = json.dumps(task.reward_weights)
    return [*kept, f"task.name={NAME}", f"task.args={json.dumps(args)}", f"task.reward_weights={weights}"]


def _examine(
    folder: RunFolder, evidence: Sequence[StoreEvidence], outcome: Outcome, say: Callable[[str], None]
) -> None:
    """Check what the run left: no shared memory or socket, a whole store, weights that a replay reproduces."""
    segment = segment_path(folder.path)
    for left in (*segment.parent.glob(f"{segment.name}*"), *folder.path.glob("*.sock")):
        outcome.problems.append(f"{left} was left behind")
    try:
        audit = audit_run(folder)
        with StoreReader(folder.store) as store:
            lost = [violation for one in evidence for violation in taken_back(one, store)]
        outcome.audit = dataclasses.replace(audit, violations=(*audit.violations, *dict.fromkeys(lost)))
    except UserError as error:
        outcome.problems.append(f"no audit: {error}")
    if not folder.summary.exists():
        return
    steps = folder.settings().trainer.steps
    say("replaying the steps that are stored")
    os.environ.update(arithmetic_environment(folder.settings().trainer.threads))  # before torch is imported

    from async_rl.instruments.replay import describe_replay, replay

    try:
        again = replay(folder)
    except UserError as error:
        outcome.replay_identical, outcome.replay = False, str(error)
        return
    whole = again.version == steps and again.compared > 0
    outcome.replay_identical = again.difference is None and whole
    outcome.replay, outcome.replayed_from = describe_replay(again, folder), again.begun


def _socket_of(settings: Settings, folder: RunFolder) -> Path:
    """The Unix socket of the buffer. Raises UserError where the proxy cannot be put in front of it."""
    if settings.wire.connect:
        raise UserError("wire.connect is given, but disconnects need it: leave it out, or say --disconnects 0")
    endpoint = settings.wire.endpoint
    endpoint = ipc_endpoint(folder.path) if endpoint == "auto" else endpoint
    if not endpoint.startswith("ipc://"):
        raise UserError(
            f"wire.endpoint is {endpoint}: connections are cut on Unix sockets only; leave it at auto, or say "
            "--disconnects 0"
        )
    return Path(endpoint.removeprefix("ipc://"))


def _without_tunnel(folder: RunFolder) -> None:
    """Take the proxy out of the run's settings: it ends with this command, and a resumed run would wait for it."""
    if folder.config.is_file():
        settings = folder.settings()
        settings = dataclasses.replace(settings, wire=dataclasses.replace(settings.wire, connect=""))
        replace_text(folder.config, to_yaml(settings))
