"""Rows of the user's own file, JSONL or Parquet, each with where it stands for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row. Example: `Row(where="words.jsonl, line 3", values={"prompt": "1+1?", "answer": "2"})`."""

    where: str
    values: Mapping[str, Any]


def read_rows(path: str | Path, *, setting: str) -> list[Row]:
    """All rows of `path` (relative to the working directory), read by its ending `.jsonl` or `.parquet`.

    `setting` is the setting that named the file, for messages. Raises UserError for a missing, empty,
    unreadable or malformed file, naming the file and, for JSONL, the line.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{setting}: {file} is a folder; name a .jsonl or .parquet file in it")
    if not file.is_file():
        raise UserError(f"{setting}: there is no file {file} (relative paths start at {Path.cwd()})")
    match file.suffix.lower():
        case ".jsonl" | ".ndjson":
            rows = list(_jsonl(file))
        case ".parquet":
            rows = list(_parquet(file))
        case other:
            raise UserError(f"{setting}: {file} ends in '{other}'; it must be a .jsonl or .parquet file")
    if not rows:
        raise UserError(f"{setting}: {file} holds no rows")
    return rows


def _jsonl(file: Path) -> Iterator[Row]:
    # In bytes, so that a bad character is reported with its line; lines end with \n only (a JSON text may
    # hold U+2028, at which str.splitlines would cut).
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            if not line:
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON ({error}); each line must hold one object") from None
            if not isinstance(values, dict):
                raise UserError(f"{where}: a {type(values).__name__}, not an object with named fields")
            yield Row(where=where, values=values)


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file}: reading Parquet needs pyarrow: pip install 'async-rl[parquet]'") from None
    try:
        table = parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from None
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(where=f"{file}, row {number}", values=values)
