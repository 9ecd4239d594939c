"""From settings for GPUs to a rehearsal that can be run here."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.errors import UserError
from async_rl.rehearse.shrink import Change, Files, shrink, table
from async_rl.rehearse.stand_in import family_of, write_data, write_tiny_model
from async_rl.settings import Settings

DATA = ("path", "eval_path")
"""arguments of tasks that name a file"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    settings: Settings
    changes: tuple[Change, ...]
    model: str
    """what it is played with, in words"""

    def in_words(self) -> str:
        return (
            f"A rehearsal with {self.model}: nothing is learned, what runs is the program.\n"
            f"Replaced (setting: was -> is), everything else is as configured:\n{table(self.changes)}"
        )


def plan(settings: Settings, words: Sequence[str], folder: Path) -> Rehearsal:
    """What would be replaced when model and missing data lay in `folder`. Raises UserError."""
    if settings.task.name == "rehearsed":
        raise UserError("these are settings of a rehearsal already; leave --fake-model out")
    data = {name: folder / f"{name}.jsonl" for name in missing(settings.task.args)}
    made, changes = shrink(settings, words, Files(model=folder / "model", data=data))
    family, _ = family_of(settings.model.path)
    return Rehearsal(settings=made, changes=tuple(changes), model=f"a tiny random {family} on CPU")


def prepare(settings: Settings, words: Sequence[str], folder: Path) -> Rehearsal:
    """`plan`, and the model and missing data made in `folder`, anew. Raises UserError."""
    planned = plan(settings, words, folder)
    model = folder / "model"
    try:
        shutil.rmtree(model, ignore_errors=True)
        write_tiny_model(model, settings.model.path, seed=settings.seed)
        for number, name in enumerate(missing(settings.task.args)):
            write_data(folder / f"{name}.jsonl", settings.task.args, seed=settings.seed + number)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another --run-dir") from None
    return planned


def missing(args: Mapping[str, Any]) -> list[str]:
    """The arguments that name a file which is not here."""
    return [name for name in DATA if args.get(name) and not Path(args[name]).expanduser().exists()]
