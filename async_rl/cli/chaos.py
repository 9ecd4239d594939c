"""`async-rl chaos`: plan, hurt, audit, replay, report."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from async_rl.buffer.store_reader import StoreReader
from async_rl.config import Settings, load_settings
from async_rl.config.schema import to_yaml
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.chaos.chaos import ChaosRun
from async_rl.instruments.chaos.plan import Counts, make_plan
from async_rl.instruments.chaos.proxy import Proxy
from async_rl.instruments.chaos.watch import Memory, Outcome, forgotten, table, verdict
from async_rl.observe.audit import audit_run
from async_rl.run.child import arithmetic_environment
from async_rl.run_folder import RunFolder, replace_text
from async_rl.weights.shared_memory import segment_path
from async_rl.wire.channel import ipc_endpoint

MOST = 10_000
"""faults of a kind"""


def counts_of(asked: Mapping[str, int | None]) -> Counts:
    """By the options' names; what is not given is a quarter of the kills. Raises UserError."""
    for name, number in asked.items():
        if number is not None and not 0 <= number <= MOST:
            raise UserError(f"--{name} is {number}; it must be at least 0 and at most {MOST:,}")
    quarter = -(-(asked["kills"] or 0) // 4)
    return Counts(**{name: quarter if number is None else number for name, number in asked.items()})


def run_chaos(
    config: Path, overrides: Sequence[str], path: Path, counts: Counts, *, seed: int, say: Callable[[str], None]
) -> Outcome:
    """A run in the new folder `path`, hurt as planned, audited and replayed; its record is there, and `say` is told
    what came of it. Raises UserError, and Interrupted with every process gone."""
    settings = load_settings(config, overrides)
    if settings.trainer.ranks > 1 or settings.trainer.start != "launcher":
        raise UserError(
            "chaos needs trainer.ranks=1 and trainer.start=launcher: it ends with a replay, which is exact for steps "
            "that one rank took"
        )
    plan = make_plan(counts, seed=seed)
    folder = RunFolder(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):  # whatever it is, it is not to be hurt
        raise UserError(f"{path} exists already; choose another --run-dir or remove it")
    outcome = Outcome(seed=seed, planned=len(plan))
    with ExitStack() as stack:
        proxy: Proxy | None = None
        words = list(overrides)
        if counts.disconnects:
            target = _socket_of(settings, folder)
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="async-rl-chaos-")))
            proxy = stack.enter_context(Proxy(place / "wire.sock", target))
            words.append(f"wire.connect=ipc://{proxy.path}")
        run = ChaosRun(
            config=config,
            overrides=words,
            folder=folder,
            plan=plan,
            steps=settings.trainer.steps,
            outcome=outcome,
            proxy=proxy,
            say=say,
        )
        try:
            run.run()
        except RunFailed as error:
            outcome.problems.append(str(error))
        finally:
            if proxy is not None:
                _without_tunnel(folder)
    _examine(folder, run.memories, outcome, say)
    record = folder.path / "chaos.json"
    replace_text(record, json.dumps(outcome.to_dict(), indent=2) + "\n")
    for line in (*table(outcome), *verdict(outcome), f"The record is in {record} and chaos.jsonl."):
        say(line)
    return outcome


def _examine(folder: RunFolder, memories: Sequence[Memory], outcome: Outcome, say: Callable[[str], None]) -> None:
    """What the run left: nothing in memory, a whole store, weights that can be had again."""
    segment = segment_path(folder.path)
    for left in (*segment.parent.glob(f"{segment.name}*"), *folder.path.glob("*.sock")):
        outcome.problems.append(f"{left} was left behind")
    try:
        audit = audit_run(folder)
        with StoreReader(folder.store) as store:
            lost = [finding for memory in memories for finding in forgotten(memory, store)]
        outcome.audit = dataclasses.replace(audit, violations=(*audit.violations, *dict.fromkeys(lost)))
    except UserError as error:
        outcome.problems.append(f"no audit: {error}")
    if not folder.summary.exists():
        return
    steps = folder.settings().trainer.steps
    say("replaying the steps that are stored")
    os.environ.update(arithmetic_environment(folder.settings().trainer.threads))  # before torch is imported

    from async_rl.instruments.replay import in_words, replay

    try:
        again = replay(folder)
    except UserError as error:
        outcome.replay_identical, outcome.replay = False, str(error)
        return
    whole = again.version == steps and again.compared > 0
    outcome.replay_identical = again.difference is None and whole
    outcome.replay, outcome.replayed_from = in_words(again, folder), again.begun


def _socket_of(settings: Settings, folder: RunFolder) -> Path:
    """Where the buffer will listen. Raises UserError where the proxy cannot stand before it."""
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
    """The proxy ends with chaos: whoever goes on with the run shall not look for it."""
    if folder.config.is_file():
        settings = folder.settings()
        settings = dataclasses.replace(settings, wire=dataclasses.replace(settings.wire, connect=""))
        replace_text(folder.config, to_yaml(settings))
