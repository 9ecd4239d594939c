"""A worker process of the lab: it trains one cell after the other with one BLAS thread.

Jobs come as JSON lines on standard input, messages go as JSON lines to the descriptor given on the command line. The
end of the input means that the lab is over, or dead: the worker ends at once, whatever it is doing (what it writes
appears whole or not at all).
"""

from __future__ import annotations

import gc
import json
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_rl.config import Settings
from async_rl.config.schema import structured
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.lab.record import CellRecord, write_record
from async_rl.run_folder import replace_text
from async_rl.tidying import trim_heap

if TYPE_CHECKING:
    from async_rl.instruments.lab.exact_lag import FirstBatches

Send = Callable[..., None]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the lab decides what Ctrl-C means
    messages = os.fdopen(int(sys.argv[1]), "w", buffering=1)

    def send(kind: str, **detail: Any) -> None:
        messages.write(json.dumps({"kind": kind, **detail}) + "\n")

    import torch

    from async_rl.instruments.lab.exact_lag import FirstBatches

    torch.set_num_threads(1)
    first = FirstBatches()
    gc.freeze()  # what has been imported stays: collections need not look at it
    for job in _jobs():
        failed = ""
        try:
            if job["kind"] == "cell":
                _cell(job, send, first)
            else:
                _model(job, send)
        except (UserError, RunFailed) as error:
            failed = str(error)
        except Exception as error:  # a process boundary: reported, and it ends this cell
            traceback.print_exc()
            failed = f"{type(error).__name__}: {error}"
        trim_heap()  # blocks of one cell rarely fit the next, which adds up to gigabytes
        send("done", name=job["name"], failed=failed)


def _jobs() -> Iterator[dict[str, Any]]:
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            waiting.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, name="jobs", daemon=True).start()
    while True:
        yield waiting.get()


def _cell(job: dict[str, Any], send: Send, first: FirstBatches) -> None:
    """Train one cell and write its record."""
    from async_rl.instruments.lab.cell import run_cell

    numbers, curves = run_cell(
        structured(Settings, job["settings"], where="run"),
        reward_first=job["reward_first"],
        each_step=lambda step: send("step", name=job["name"], step=step),
        first=first,
    )
    write_record(Path(job["path"]), replace(CellRecord(**job["record"]), **numbers), curves)


def _model(job: dict[str, Any], send: Send) -> None:
    """Make an initial model, unless it is the user's, and measure it."""
    import torch

    from async_rl.instruments.lab.cell import measure_first
    from async_rl.run.init_model import Shape, WarmupOptions, init_model
    from async_rl.task import make_task

    settings = structured(Settings, job["settings"], where="run")
    folder = Path(settings.model.path)
    if job["make"] is not None:
        made = job["make"]
        shutil.rmtree(folder, ignore_errors=True)  # of other settings, or not measured
        torch.manual_seed(made["options"]["seed"])
        options = WarmupOptions(**made["options"])
        task = make_task(settings.task.name, settings.task.args)
        result = init_model(folder, task, Shape(**made["shape"]), options, print)
        if result.success < options.target:
            send("note", text=f"{folder}: success rate {result.success:.2f}, {options.target:g} was not reached")
    replace_text(Path(job["path"]), json.dumps({"reward_first": measure_first(settings), "digest": job["digest"]}))


if __name__ == "__main__":
    main()
