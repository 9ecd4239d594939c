"""A whole lab: makes the initial models, trains the cells, and writes what they came to.

DIR/config.yaml    what the lab was told
DIR/models/        initial models it made
DIR/cells/         NAME.json, one record a finished or failed cell
DIR/curves/        NAME.json, what a finished cell did step by step
DIR/lab.json       everything: definitions, cells, figures of merit
DIR/lab.html       the same as plots
DIR/logs/          what workers said
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from async_rl.config import ModelSettings, Settings
from async_rl.config.schema import to_yaml
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.lab.crew import Job, WorkerMessage, WorkerPool
from async_rl.instruments.lab.merit import HOLDS, Merit, merits
from async_rl.instruments.lab.page import page_text
from async_rl.instruments.lab.plan import Cell, InitialModel, LabPlan, digest_of
from async_rl.instruments.lab.record import COLLAPSED, CellRecord, read_record, write_record
from async_rl.instruments.lab.tables import cell_line, merit_lines, rate_lines
from async_rl.model.folder import existing, weight_files
from async_rl.observe.console import progress_bar
from async_rl.run.preflight import preflight
from async_rl.run_folder import replace_text, take_lock
from async_rl.version import __version__


@dataclass(frozen=True, slots=True)
class LabFolder:
    """Paths of one lab."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def cells(self) -> Path:
        return self.path / "cells"

    @property
    def curves(self) -> Path:
        return self.path / "curves"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def summary(self) -> Path:
        return self.path / "lab.json"

    @property
    def page(self) -> Path:
        return self.path / "lab.html"

    def record(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A step of the lab, given to whoever shows it."""

    kind: str
    """models | skipped | started | step | finished | failed | note"""
    name: str = ""
    text: str = ""
    done: int = 0
    """cells finished or failed, those of earlier calls included"""
    total: int = 0
    record: CellRecord | None = None


Show = Callable[[Progress], None]


def run_lab(plan: LabPlan, path: Path, *, workers: int, show: Show) -> tuple[list[CellRecord], list[Merit]]:
    """Run every cell that is not finished yet; all records of the plan and their figures of merit.

    Raises UserError for a folder that cannot be used, RunFailed when no cell at all could be finished.
    """
    folder = LabFolder(path)
    with _held(folder):
        replace_text(folder.config, to_yaml(plan.settings))
        with WorkerPool(workers, folder.logs, plan.settings.cell_timeout_s) as crew:
            starts = _prepare_models(plan, folder, crew, show)
            _check_models(plan, folder)
            records = _run_cells(plan, folder, crew, starts, show)
        found = merits(records)
        write_summary(plan, folder, records, found)
        replace_text(folder.page, page_text(plan, folder.cells, records, found))
    if all(record.failed for record in records):
        raise RunFailed(f"every cell failed; the first: {records[0].failed}")
    return records, found


@contextmanager
def _held(folder: LabFolder) -> Iterator[None]:
    try:
        if folder.path.is_dir() and any(folder.path.iterdir()) and not folder.config.is_file():
            raise UserError(f"{folder.path} is no lab's folder: there is no {folder.config.name} in it; choose another")
        for inner in (folder.path, folder.models, folder.cells, folder.curves, folder.logs):
            inner.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder.path} cannot be written: {error.strerror}; choose another --out") from None
    lock = take_lock(folder.path / "lab.lock", 0.0)
    try:
        yield
    finally:
        os.close(lock)


def _prepare_models(plan: LabPlan, folder: LabFolder, crew: WorkerPool, show: Show) -> dict[str, float]:
    """Make and measure the initial models; reward of each. Raises RunFailed."""
    jobs = []
    for model in plan.models.values():
        job = _model_job(plan, folder, model)
        if _known_start(Path(job["path"]), job["digest"]) is None:
            jobs.append(job)
    if jobs:
        models = "1 initial model is" if len(jobs) == 1 else f"{len(jobs)} initial models are"
        show(Progress(kind="models", text=f"{models} made and measured"))
    for answer in crew.run(jobs):
        if answer.kind == "note":
            show(Progress(kind="note", text=answer.text))
        elif answer.kind == "done" and answer.failed:
            raise RunFailed(f"the initial model {answer.name}: {answer.failed}")
    starts = {}
    for name, model in plan.models.items():
        job = _model_job(plan, folder, model)
        start = _known_start(Path(job["path"]), job["digest"])
        assert start is not None, f"{name} was made"
        starts[name] = start
    return starts


def _model_job(plan: LabPlan, folder: LabFolder, model: InitialModel) -> Job:
    task, size = plan.tasks[model.task], plan.settings.model
    any_cell = next(c for c in plan.cells if plan.model_of(c) == model)
    options = {
        "target": task.until,
        "max_steps": size.warmup_steps,
        "batch": size.warmup_batch,
        "learning_rate": size.warmup_learning_rate,
        "check_every": 25,
        "seed": model.seed,
    }
    shape = {
        name: getattr(size, name)
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "max_context")
    }
    made = None if model.folder is not None else {"shape": shape, "options": options}
    given = plan.run_settings(any_cell, model_folder(folder, model))
    settings = replace(Settings(), model=given.model, task=given.task, generator=given.generator)
    return {
        "kind": "model",
        "name": model.name,
        "settings": asdict(settings),
        "make": made,
        "path": str(folder.models / f"{model.name}.json"),
        "digest": digest_of(settings, json.dumps(made) if made else bytes_of(model.folder)),
    }


def bytes_of(folder: Path | None) -> str:
    """A hash of the weights in a model folder."""
    assert folder is not None
    digest = hashlib.blake2b(digest_size=8)
    for file in weight_files(existing(folder)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _known_start(path: Path, digest: str) -> float | None:
    try:
        known = json.loads(path.read_text())
        return float(known["reward_first"]) if known["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def model_folder(folder: LabFolder, model: InitialModel) -> Path:
    return model.folder if model.folder is not None else folder.models / model.name


def _check_models(plan: LabPlan, folder: LabFolder) -> None:
    """What a run would be refused for before its start, once for every initial model."""
    for model in plan.models.values():
        cell = next(c for c in plan.cells if plan.model_of(c) == model)
        preflight(plan.run_settings(cell, model_folder(folder, model)))


def _run_cells(
    plan: LabPlan, folder: LabFolder, crew: WorkerPool, starts: dict[str, float], show: Show
) -> list[CellRecord]:
    done: dict[str, CellRecord] = {}
    jobs: dict[str, Job] = {}
    blank: dict[str, CellRecord] = {}
    model_digests = {name: _model_job(plan, folder, model)["digest"] for name, model in plan.models.items()}
    for cell in plan.cells:
        model = plan.model_of(cell)
        settings = plan.run_settings(cell, model_folder(folder, model))
        blank[cell.name] = record = CellRecord(
            name=cell.name,
            **asdict(cell),
            digest=digest_of(replace(settings, model=ModelSettings()), model_digests[model.name]),
            curves=f"curves/{cell.name}.json",
        )
        known = read_record(folder.record(cell))
        if known is not None and not known.failed and known.digest == record.digest:
            done[cell.name] = known
        else:
            jobs[cell.name] = {
                "kind": "cell",
                "name": cell.name,
                "settings": asdict(settings),
                "record": asdict(record),
                "reward_first": starts[model.name],
                "path": str(folder.record(cell)),
            }
    total = len(plan.cells)
    if done:
        show(Progress(kind="skipped", text=f"{len(done)} of {total} cells are finished already", done=len(done),
                      total=total))  # fmt: skip
    for answer in crew.run(jobs.values()):
        if answer.kind == "done":
            done[answer.name] = _finished(folder, blank[answer.name], answer)
            kind = "failed" if answer.failed else "finished"
            show(Progress(kind=kind, name=answer.name, done=len(done), total=total, record=done[answer.name]))
        else:
            text = answer.text or str(answer.step)
            show(Progress(kind=answer.kind, name=answer.name, text=text, done=len(done), total=total))
    return [done[cell.name] for cell in plan.cells]


def _finished(folder: LabFolder, blank: CellRecord, answer: WorkerMessage) -> CellRecord:
    """The record of a cell that was answered; a failed one's is written here."""
    path = folder.cells / f"{answer.name}.json"
    if not answer.failed:
        record = read_record(path)
        assert record is not None, f"{path} was written"
        return record
    record = replace(blank, failed=answer.failed, curves="")
    write_record(path, record)
    return record


def write_summary(plan: LabPlan, folder: LabFolder, records: Iterable[CellRecord], found: Iterable[Merit]) -> None:
    """lab.json."""
    summary: dict[str, Any] = {
        "name": plan.settings.name,
        "async_rl": __version__,
        "definitions": {
            "collapsed": COLLAPSED,
            "holds": f"a learning rate holds when its mean final reward is >= {HOLDS} of the task's synchronous best",
        },
        "settings": asdict(plan.settings),
        "cells": [asdict(record) for record in records],
        "merits": [asdict(merit) for merit in found],
    }
    replace_text(folder.summary, json.dumps(summary, indent=1) + "\n")


class Terminal:
    """Shows a lab: one line a finished cell, a bar, the tables at the end. Give its `show` to `run_lab`; use it in a
    `with`."""

    def __init__(self) -> None:
        self._out = RichConsole(highlight=False)
        self._bar = progress_bar(self._out)
        self._task = self._bar.add_task("initial models", total=None)
        self._steps: dict[str, str] = {}
        """running cells and the steps they have done"""

    def print(self, text: str) -> None:
        self._out.print(text, markup=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        match progress.kind:
            case "finished" | "failed":
                assert progress.record is not None
                self._steps.pop(progress.name, None)
                self.print(f"[{progress.done}/{progress.total}] {cell_line(progress.record)}")
            case "models" | "skipped" | "note":
                self.print(progress.text)
            case "started":
                self._steps[progress.name] = "0"
            case "step":
                self._steps[progress.name] = progress.text
        if progress.total:
            running = ", ".join(sorted(f"step {step}" for step in self._steps.values()))
            self._bar.update(
                self._task, completed=progress.done, total=progress.total, description=f"cells ({running})"
            )

    def summary(self, merits: Iterable[Merit]) -> None:
        found = list(merits)
        for line in [*rate_lines(found), *merit_lines(found)]:
            self.print(line)

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
