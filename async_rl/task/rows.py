"""Rows of one file, held as compactly as the file has them: JSON lines, JSON, CSV, and Arrow tables."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from async_rl.errors import UserError

Values = Mapping[str, Any]
"""a row: field -> value"""
ARROW_BATCH = 4096
"""rows of a table that are turned into Python objects together"""


BOM = b"\xef\xbb\xbf"


class BadRow(Exception):
    """Why a row cannot be used, without the row's place."""


class Rows(ABC):
    """The rows of a file by position. A row becomes Python objects when it is asked for."""

    unit = "row"
    """what messages count"""
    has_gaps = False
    """fields that an object of a list has not are None, because others of the list have them"""

    def __init__(self, name: str, numbers: Sequence[int]) -> None:
        """`numbers`: of each row in the file, from 1."""
        self.name = name
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, position: int) -> str:
        """File and line, for messages: `words.jsonl, line 3`."""
        return f"{self.name}, {self.unit} {self.numbers[position]}"

    @abstractmethod
    def values(self, position: int) -> Values:
        """All fields of a row. Raises BadRow."""

    @property
    def columns(self) -> frozenset[str] | None:
        """The fields of every row; None: each row has its own."""
        return None

    def each(self, fields: Iterable[str]) -> Iterator[Values | BadRow]:
        """All rows in their order, at least with `fields`; in the place of a bad one the reason."""
        for position in range(len(self)):
            try:
                yield self.values(position)
            except BadRow as bad:
                yield bad

    def keep(self, positions: Sequence[int]) -> None:
        """Forget all other rows."""
        self.numbers = array("Q", (self.numbers[position] for position in positions))


class Held(Rows):
    """Rows that lie in a list, one entry each."""

    def __init__(self, name: str, numbers: Sequence[int], held: Sequence[Any]) -> None:
        super().__init__(name, numbers)
        self._held = held

    def keep(self, positions: Sequence[int]) -> None:
        super().keep(positions)
        self._held = [self._held[position] for position in positions]


class Lines(Held):
    """JSON lines: the bytes of each line."""

    unit = "line"

    def __init__(self, name: str, content: bytes) -> None:
        # Cut as bytes, so that a bad character is reported with its line. Lines end with \n only: a JSON text may hold
        # U+2028, at which str.splitlines would cut.
        lines = content.removeprefix(BOM).split(b"\n")
        blank = [is_blank(line) for line in lines]
        if not any(blank[:-1]):
            numbers: Sequence[int] = range(1, len(lines) + 1 - blank[-1])
        else:
            numbers = array("Q", (number for number, empty in enumerate(blank, start=1) if not empty))
        super().__init__(name, numbers, [line for line, empty in zip(lines, blank, strict=True) if not empty])

    def values(self, position: int) -> Values:
        try:
            found = json.loads(self._held[position].decode().strip())
        except UnicodeDecodeError as error:
            raise BadRow(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
        except (ValueError, RecursionError) as error:
            raise BadRow(f"not valid JSON ({error}); each line must hold one object") from None
        return with_fields(found)


def with_fields(found: Any) -> Values:
    """A row that JSON says. Raises BadRow unless it is an object."""
    if not isinstance(found, dict):
        raise BadRow(f"a {type(found).__name__}, not an object with named fields")
    return found


def is_blank(line: bytes) -> bool:
    """Nothing but white space, that of Unicode included."""
    return not line or line.isspace() or (line[0] >= 0x80 and not line.decode(errors="replace").strip())


class Entries(Held):
    """Objects of a JSON list."""

    unit = "entry"

    def __init__(self, name: str, entries: Sequence[Any]) -> None:
        super().__init__(name, range(1, len(entries) + 1), entries)

    def values(self, position: int) -> Values:
        return with_fields(self._held[position])


class Cells(Held):
    """CSV: the texts of each row, beside one header. Every value is text."""

    unit = "line"

    def __init__(self, name: str, header: Sequence[str], cells: Sequence[Sequence[str]], numbers: Sequence[int]):
        super().__init__(name, numbers, cells)
        self._header = list(header)

    def values(self, position: int) -> Values:
        cells = self._held[position]
        if len(cells) != len(self._header):
            raise BadRow(f"{len(cells)} values, but the header names {len(self._header)} fields")
        return dict(zip(self._header, cells, strict=True))


class ArrowRows(Rows):
    """An Arrow table, as Parquet and Hugging Face's `datasets` give it."""

    has_gaps = True

    def __init__(self, name: str, table: Any, first: int = 1) -> None:
        """`first`: number of the table's first row in the file."""
        super().__init__(name, range(first, first + table.num_rows))
        self._table = table

    def values(self, position: int) -> Values:
        found: list[Values] = self._table.slice(position, 1).to_pylist()
        return found[0]

    @property
    def columns(self) -> frozenset[str]:
        return frozenset(self._table.column_names)

    def each(self, fields: Iterable[str]) -> Iterator[Values | BadRow]:
        names = [name for name in dict.fromkeys(fields) if name in self._table.column_names]
        if not names:  # what is wrong is said with all fields at hand
            yield from super().each(fields)
            return
        for batch in self._table.select(names).to_batches(max_chunksize=ARROW_BATCH):
            yield from batch.to_pylist()

    def keep(self, positions: Sequence[int]) -> None:
        super().keep(positions)
        self._table = self._table.take(np.asarray(positions)).combine_chunks()


# ------------------------------------------------------------------------------------------------ text files


def json_rows(name: str, content: bytes) -> Rows:
    """Rows of a `.json` file: a list of objects, an object with one such list, or in truth JSON lines.

    Raises UserError."""
    try:
        found = json.loads(decoded(name, content))
    except RecursionError:
        raise UserError(f"{name}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        if content.removeprefix(BOM).lstrip()[:1] == b"{" and "Extra data" in str(error):
            return Lines(name, content)  # one object a line, as many a file of this ending has them
        raise UserError(f"{name}: not valid JSON ({error})") from None
    if isinstance(found, list):
        return Entries(name, found)
    lists = [key for key, value in found.items() if is_table(value)] if isinstance(found, dict) else []
    if len(lists) == 1:
        return Entries(name, found[lists[0]])
    if isinstance(found, dict) and len(content.strip().splitlines()) == 1:
        return Entries(name, [found])  # JSON lines with a single line
    what = f"an object with {len(lists)} lists of objects" if isinstance(found, dict) else f"a {type(found).__name__}"
    raise UserError(f"{name}: {what}; it must hold a list of objects, or an object with one such list in it")


def decoded(name: str, content: bytes) -> str:
    """The text of a file. Raises UserError."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def is_table(value: object) -> bool:
    """A list of objects."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def csv_rows(name: str, content: bytes, delimiter: str) -> Rows:
    """Rows of a CSV file with a header. `delimiter`: empty: a comma, or, where the header has none, `;` or a tab.

    Raises UserError."""
    text = decoded(name, content)
    if not delimiter:
        head = text.partition("\n")[0]
        delimiter = next((mark for mark in (",", ";", "\t") if mark in head), ",")
    cells: list[list[str]] = []
    numbers = array("Q")
    begun = 0
    before = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for row in reader:
            if row:
                cells.append(row)
                numbers.append(begun + 1)
            begun = reader.line_num
    except csv.Error as error:
        raise UserError(f"{name}, line {begun + 1}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(before)
    if not cells:
        return Cells(name, [], [], [])
    header = [field.strip() for field in cells[0]]
    twice = sorted({field for field in header if header.count(field) > 1})
    if twice:
        raise UserError(f"{name}: the header names the field '{twice[0]}' twice")
    return Cells(name, header, cells[1:], numbers[1:])
