"""The process beside an actor of Ray: one part of a run, the same as anywhere else.

An actor starts `python -m async_rl.cluster.ray_process JSON`. That stays a small process, which starts another one for
the work: Ray kills the processes of an actor that ends at once, and then the second one still ends in good order, as on
SIGTERM. In words: the run with its launcher, buffer and weight server (`RunOrder`), a rank of its trainer (`RankOrder`)
or a generator (`GeneratorOrder`).

Who waits for whom: the first process for the second; the second ends when the first is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from async_rl.errors import RunFailed, UserError
from async_rl.process import Interrupted, exit_with, ignore_interrupts, interruptible, state_of

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LEAVE_S = 10.0
"""time a generator or a rank has to end when its actor is gone"""
END_S = 15.0
"""time beyond checkpoint.grace_s that a run has for it"""
NAME_POLL_S = 1.0
"""between two tries of a generator whose earlier life is not forgotten yet"""
TAKEN = "there is a generator of the name"
"""in the buffer's answer to a generator whose earlier life is still counted as connected"""


class Order(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What every process beside an actor is told."""

    parent: int
    """process number of the actor"""
    directory: str
    """in which it works"""
    keys: str
    """folder of the keys on this node; removed at the end"""
    outcome: str
    """file for how it ended"""


class RunOrder(Order, frozen=True, kw_only=True):
    """The run with its launcher, buffer and weight server."""

    path: str
    """folder of the run, as the user named it"""
    settings: Mapping[str, Any] | None = None
    """of a new run; None: the run in the folder is resumed"""
    words: tuple[str, ...] = ()
    """`name=value`, laid over the settings"""
    accepted: tuple[str, ...] = ()
    """kinds of inputs that a resumed run may find changed"""
    quiet: bool = False
    listens: bool = True
    """on the node's own address, at a free port, with the keys that the actor got"""
    grace_s: float = 0.0
    """time to end when the actor is gone"""


class RankOrder(Order, frozen=True, kw_only=True):
    """A rank of the trainer."""

    path: str
    environment: Mapping[str, str] = {}
    """as torchrun sets it; empty for the only rank"""


class GeneratorOrder(Order, frozen=True, kw_only=True):
    """A generator that joins the run."""

    name: str
    endpoint: str
    """of the buffer"""
    words: tuple[str, ...] = ()


AnyOrder = RunOrder | RankOrder | GeneratorOrder


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended."""

    kind: str
    """done, user, failed or interrupted"""
    message: str = ""
    summary: Mapping[str, Any] = {}
    """of a run that is done"""


# ------------------------------------------------------------------------------------------------ two processes


def main() -> None:
    """Be the first process; ends it with the exit code of the second."""
    order = msgspec.json.decode(sys.argv[1], type=AnyOrder)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN)  # until there is somebody to pass it on to
    here = os.getpid()
    pid = os.fork()
    if pid == 0:
        _second(order, here)
    code = _watch(pid, order)
    _leave_nothing(order, order.parent)
    os._exit(code if code >= 0 else 128 - code)


def _watch(pid: int, order: Order) -> int:
    def pass_on(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    exit_with(order.parent)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _second(order: AnyOrder, first: int) -> None:
    """Do the work, and end this process."""
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    exit_with(first, order.grace_s + END_S if isinstance(order, RunOrder) else LEAVE_S)
    code = 1
    try:
        os.chdir(order.directory)
        work = {RunOrder: _run, RankOrder: _train, GeneratorOrder: _generate}[type(order)]
        with interruptible():
            code = _recorded(order, lambda: work(order))  # type: ignore[operator]
    finally:
        _leave_nothing(order, first)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _leave_nothing(order: Order, reader: int) -> None:
    """Remove the keys, and where nobody (process number `reader`) is left to read the outcome, that as well."""
    there = state_of(reader) not in ("", "Z")
    shutil.rmtree(order.keys if there else Path(order.keys).parent, ignore_errors=True)


def _recorded(order: Order, work: Callable[[], Mapping[str, Any] | int]) -> int:
    """Leave the outcome of `work` for the actor; the exit code."""
    code = 0
    try:
        found = work()
        code = found if isinstance(found, int) else 0
        outcome = Outcome(kind="failed" if code else "done", summary={} if isinstance(found, int) else found)
    except UserError as error:
        code, outcome = 2, Outcome(kind="user", message=str(error))
    except RunFailed as error:
        code, outcome = 1, Outcome(kind="failed", message=str(error))
    except Interrupted as order_to_end:
        code, outcome = order_to_end.exit_code, Outcome(kind="interrupted", message=str(order_to_end))
        ignore_interrupts()
    except OSError as error:
        code, outcome = 1, Outcome(kind="failed", message=str(error))
    if outcome.message and not isinstance(order, RunOrder):
        print(f"async-rl: {outcome.message}", file=sys.stderr)
    with suppress(OSError):
        partial = Path(f"{order.outcome}.partial")
        partial.write_bytes(msgspec.json.encode(outcome))
        os.replace(partial, order.outcome)
    return code


# ------------------------------------------------------------------------------------------------ what they do


def _run(order: RunOrder) -> Mapping[str, Any]:
    from async_rl.cluster.ray_console import RayConsole
    from async_rl.config import Settings, check
    from async_rl.config.schema import structured, with_overrides
    from async_rl.run.launcher import resume_training, run_training

    console, path = RayConsole(quiet=order.quiet), Path(order.path)
    if order.settings is None:
        summary = resume_training(path, order.words, console=console, accepted=order.accepted)
    else:
        settings = structured(Settings, with_overrides(order.settings, order.words), where="")
        check(settings)
        summary = run_training(settings, path, console=console)
    return dict(json.loads(json.dumps(summary)))


def _train(order: RankOrder) -> int:
    from async_rl.process import process_name
    from async_rl.run.join_trainer import train_for
    from async_rl.run_folder import RunFolder
    from async_rl.trainer.__main__ import own_log

    os.environ.update(order.environment)
    folder = RunFolder.open(Path(order.path))
    name = process_name(int(order.environment.get("RANK", "0")))
    own_log(folder.logs / f"{name}.log")
    train_for(folder.path)  # ends this process
    return 1


def _generate(order: GeneratorOrder) -> int:
    from async_rl.run.join import Traces, admitted, find_target, generate_for
    from async_rl.run.keeper import Keeper

    target = find_target(order.endpoint, None, Path(order.keys))
    deadline = time.monotonic() + target.timeout_s
    while True:
        try:
            found = admitted(target, order.name, order.words)
            break
        except UserError as error:
            if TAKEN not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(NAME_POLL_S)  # its node died a moment ago, and the buffer still waits for it

    def generate(traces: Traces) -> int:
        return _recorded(order, lambda: _generated(generate_for, found, traces))

    keeper = Keeper(
        target=target, name=found.name, identity=found.identity, frozen_after_s=found.settings.wire.frozen_after_s
    )
    code = keeper.run(generate)
    left = Path(order.outcome)
    if left.is_file():  # of the process beneath
        outcome = msgspec.json.decode(left.read_bytes(), type=Outcome)
        if outcome.kind == "user":
            raise UserError(outcome.message)
    return code


def _generated(generate: Callable[..., None], found: Any, traces: Any) -> int:
    generate(found, lambda line: print(line, flush=True), traces)
    return 0


if __name__ == "__main__":
    main()
