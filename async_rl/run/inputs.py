"""What a run was begun with besides its settings (`Inputs`): data, code of the user's own, tokenizer and chat template,
and the working directory in which its relative paths begin.

The store speaks of problems by index, so a resumed run over other rows would speak of others. A resume compares, and
refuses by name what differs, unless the user accepts it (`--accept-changed`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from async_rl.config.sources import Source, changed_sources
from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer
from async_rl.run_folder import replace_text
from async_rl.task.protocol import Task
from async_rl.version import __version__

KINDS = ("data", "code", "tokenizer", "problems")
"""what `--accept-changed` may name"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPrints:
    """A number for each row of a table, in the rows' order."""

    numbers: NDArray[np.uint64]  # [rows]
    where: Callable[[int], str] = str
    """file and line of a row"""

    def first_change(self, now: RowPrints) -> str:
        """The first row that is another one, or is there no more, in words; empty: there is none."""
        both = min(len(self.numbers), len(now.numbers))
        differ = np.flatnonzero(self.numbers[:both] != now.numbers[:both])
        if len(differ):
            return now.where(int(differ[0]))
        if both < len(now.numbers):
            return f"{now.where(both)}, which is new"
        return f"row {both + 1} is there no more" if both < len(self.numbers) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Digests, in hex; an empty one was not taken."""

    data: str = ""
    """of the rows of a data set"""
    rows: int = 0
    """of it that are trained"""
    tokenizer: str = ""
    """of tokenizer.json, the tokens that end a turn, and the chat templates"""
    problems: str = ""
    """of some problems of both splits, as the model and the reward get them (`preflight.task_digest`)"""
    directory: str = ""
    """in which the run was begun"""
    program: str = ""
    """version of async_rl that began the run; empty: 0.3.0 or older"""
    prints: tuple[RowPrints, ...] = field(default=(), compare=False)
    """of each table of rows"""


def inputs_of(task: Task, tokenizer: Tokenizer, problems: str) -> Inputs:
    """What this process would begin a run with. `problems`: the digest that preflight took."""
    digest = getattr(task, "digest", None)
    return Inputs(
        data=str(digest()) if callable(digest) else "",
        rows=len(task.problems("train")),
        tokenizer=tokenizer_digest(tokenizer),
        problems=problems,
        directory=os.getcwd(),
        program=__version__,
        prints=tuple(
            RowPrints(numbers=np.array(table.prints, np.uint64), where=table.where)
            for table in getattr(task, "tables", ())
        ),
    )


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """blake2b over everything that turns messages into tokens, and ends a turn."""
    digest = blake2b((tokenizer.folder / "tokenizer.json").read_bytes(), digest_size=16)
    digest.update(f"{sorted(tokenizer.end_ids)}{tokenizer.template_text}".encode())
    return digest.hexdigest()


def write_inputs(path: Path, inputs: Inputs) -> None:
    """Record them. `path`: the run's `inputs.json`; the prints of rows stand beside it, 8 bytes a row."""
    if inputs.prints:
        tables = {f"table_{number}": prints.numbers for number, prints in enumerate(inputs.prints)}
        partial = path.with_name(f".{path.stem}.partial.npz")
        np.savez(partial, **tables)  # type: ignore[arg-type]
        os.replace(partial, _prints_beside(path))
    values = asdict(replace(inputs, prints=()))
    del values["prints"]
    replace_text(path, json.dumps(values, indent=1) + "\n")


def read_inputs(path: Path) -> Inputs | None:
    """What was recorded; None for a run of a version that recorded nothing."""
    if not path.is_file():
        return None
    prints: list[RowPrints] = []
    try:
        if _prints_beside(path).is_file():
            with np.load(_prints_beside(path)) as tables:
                prints = [RowPrints(numbers=tables[name]) for name in sorted(tables.files)]
        return Inputs(**json.loads(path.read_text()), prints=tuple(prints))
    except (ValueError, TypeError, EOFError, BadZipFile):
        files = f"{path} and {_prints_beside(path).name}"
        raise UserError(f"{files} are damaged; remove them, and the inputs are recorded anew") from None


def _prints_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_rows.npz")


def compare(
    before: Inputs | None, now: Inputs, recorded: Sequence[Source], found: Sequence[Source]
) -> dict[str, tuple[str, str]]:
    """Kind -> (what it was, what it is), in words, of every kind that differs. `recorded`, `found`: files of the user's
    own code."""
    out: dict[str, tuple[str, str]] = {}
    code = changed_sources(recorded, found)
    if code:
        there = {source.setting: source for source in found}
        out["code"] = (_named(code), _named([there[source.setting] for source in code if source.setting in there]))
    if before is None:
        return out
    if before.data != now.data:
        out["data"] = (_rows(before), _rows(now) + _first_change(before, now))
    if before.tokenizer != now.tokenizer:
        out["tokenizer"] = (before.tokenizer[:12], now.tokenizer[:12])
    if before.problems != now.problems and not out.keys() & {"data", "tokenizer"}:
        out["problems"] = (_problems(before), _problems(now))
    return out


def _named(sources: Sequence[Source]) -> str:
    return ", ".join(f"{source.file} ({source.digest[:12]})" for source in sources) or "not there"


def _problems(inputs: Inputs) -> str:
    return f"{inputs.rows} training problems ({inputs.problems[:12]})"


def _rows(inputs: Inputs) -> str:
    return f"{inputs.rows} training rows ({inputs.data[:12]})" if inputs.data else "no data set"


def _first_change(before: Inputs, now: Inputs) -> str:
    if not before.prints or len(before.prints) != len(now.prints):
        return ""
    found = [text for old, new in zip(before.prints, now.prints, strict=True) if (text := old.first_change(new))]
    if not found:
        return ", prompts and answers as they were: other fields differ, or how the files are written"
    return f", the first that differs: {found[0]}"


def accept(changes: dict[str, tuple[str, str]], accepted: Sequence[str], run: Path) -> None:
    """Raises UserError unless every change is accepted, and every kind that is accepted has changed."""
    for kind in accepted:
        if kind not in KINDS:
            raise UserError(f"--accept-changed {kind}: choose of {', '.join(KINDS)}")
    refused = [kind for kind in changes if kind not in accepted]
    if refused:
        lines = [f"  {kind}: {before}; now {after}" for kind, (before, after) in changes.items() if kind in refused]
        raise UserError(
            f"{run}: what the run was begun with has changed:\n"
            + "\n".join(lines)
            + "\nPut it back, or go on with it as it is now: --accept-changed "
            + ",".join(refused)
        )
    idle = [kind for kind in accepted if kind not in changes]
    if idle:
        raise UserError(
            f"--accept-changed {','.join(idle)}: nothing of that has changed since the run began; leave it out"
        )


@contextmanager
def in_directory_of(inputs: Inputs | None) -> Iterator[None]:
    """Inside, relative paths begin where they began when the run was made, if that folder is still there."""
    here = os.getcwd()
    if inputs is not None and inputs.directory and Path(inputs.directory).is_dir():
        os.chdir(inputs.directory)
    try:
        yield
    finally:
        os.chdir(here)


def updated(before: Inputs | None, now: Inputs) -> Inputs:
    """What is recorded after a resume: the present state, and the directory in which the run was begun."""
    return now if before is None or not before.directory else replace(now, directory=before.directory)


def as_changes(changes: dict[str, tuple[str, str]]) -> dict[str, tuple[Any, Any]]:
    """As the event of the resume has them, beside changed settings."""
    return {f"({kind})": change for kind, change in changes.items()}
