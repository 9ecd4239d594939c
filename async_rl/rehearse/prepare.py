"""From settings for GPUs to a rehearsal that can be run here."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.errors import UserError
from async_rl.rehearse.shrink import Change, Files, shrink, table
from async_rl.rehearse.stand_in import write_data, write_tiny_model
from async_rl.settings import Settings

DATA = ("path", "eval_path")
"""arguments of tasks that name a file"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    settings: Settings
    changes: tuple[Change, ...]
    model: str
    """what was made, in words"""

    def in_words(self) -> str:
        return (
            f"A rehearsal on {self.model}: nothing is learned, what runs is the program.\n"
            f"Replaced (setting: was -> is), everything else is as configured:\n{table(self.changes)}"
        )


def prepare(settings: Settings, words: Sequence[str], folder: Path) -> Rehearsal:
    """Make the model and missing data in `folder`, anew. Raises UserError."""
    if settings.task.name == "rehearsed":
        raise UserError("these are settings of a rehearsal already; leave --fake-model out")
    model = folder / "model"
    try:
        shutil.rmtree(model, ignore_errors=True)
        config = write_tiny_model(model, settings.model.path, seed=settings.seed)
        data = {name: folder / f"{name}.jsonl" for name in missing(settings.task.args)}
        for number, path in enumerate(data.values()):
            write_data(path, settings.task.args, seed=settings.seed + number)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another --run-dir") from None
    made, changes = shrink(settings, words, Files(model=model, data=data))
    said = f"a random {config.family} of {config.layers} layers, {config.hidden} wide, on CPU"
    return Rehearsal(settings=made, changes=tuple(changes), model=said)


def missing(args: Mapping[str, Any]) -> list[str]:
    """The arguments that name a file which is not here."""
    return [name for name in DATA if args.get(name) and not Path(args[name]).expanduser().exists()]
