"""The usable rows of a data set, each prompt once, and problems made of them when they are asked for."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from zlib import crc32

from async_rl.errors import UserError
from async_rl.task.generated import stable_hash
from async_rl.task.layout import Layout, ends_open
from async_rl.task.problems import ProblemsOnDemand
from async_rl.task.protocol import Problem
from async_rl.task.rows import BadRow, Rows, Values

MOST_NAMED = 10
"""bad rows that a message names"""
_HALF = re.compile("[\ud800-\udfff]")
"""half of a character, which JSON can hold and no tokenizer takes"""


FirstRow = tuple[Rows, int, Any]
"""of a prompt the first row: its file, its number there, its answer"""


@dataclass(slots=True, kw_only=True)
class Table:
    """Rows that have been checked. They stay as the files have them; a row is one of many thousands, and only a few of
    them are at work at any time."""

    path: str
    parts: list[Rows] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """number of each part's first row"""
    count: int = 0
    prompts: Mapping[str, FirstRow] = field(default_factory=dict)
    """each prompt as text, while the splits are made"""
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    """stable_hash of each prompt"""
    prints: array[int] = field(default_factory=lambda: array("Q"))
    """of each row's prompt and answer, by which a later launch finds the first row that has changed"""
    sizes: array[int] = field(default_factory=lambda: array("I"))
    """bytes of each prompt, tools and template arguments as JSON"""
    forms: dict[Hashable, int] = field(default_factory=dict)
    """form of a prompt -> the first row of it"""
    fields: frozenset[str] = frozenset()
    """that every row has"""
    notes: list[str] = field(default_factory=list)
    """for the user"""

    def where(self, number: int) -> str:
        """File and line of a row."""
        part = bisect_right(self.starts, number) - 1
        return self.parts[part].where(number - self.starts[part])

    def row(self, number: int) -> tuple[Values, Rows]:
        """A row, and the file it is of."""
        part = bisect_right(self.starts, number) - 1
        rows = self.parts[part]
        return rows.values(number - self.starts[part]), rows


@dataclass(slots=True, kw_only=True)
class Loader:
    """Reads rows into a table. Raises UserError for rows that cannot be used, all of them counted."""

    layout: Layout
    path: str
    duplicates: Literal["keep_first", "keep_all", "error"]
    bad_rows: Literal["refuse", "drop"]
    held_out: Mapping[str, FirstRow] = field(default_factory=dict)
    """prompts that are left out, since they are evaluated"""
    held_out_path: str = ""
    table: Table = field(init=False)
    _first: dict[str, FirstRow] = field(default_factory=dict)
    _reasons: list[str] = field(default_factory=list)
    _reason: str = ""
    """the first of them without its place"""
    _kinds: set[str] = field(default_factory=set)
    """reasons without places, while they are few"""
    _bad: int = 0
    _seen: int = 0
    _repeated: int = 0
    _left_out: int = 0
    _open: int = 0
    _floats: int = 0

    def __post_init__(self) -> None:
        self.table = Table(path=self.path)

    def load(self, parts: Iterable[Rows]) -> Table:
        """The table of all rows that can be used."""
        for rows in parts:
            self._take(rows)
        if self._bad and self.bad_rows == "refuse":
            raise UserError(self._refusal())
        if not self._seen:
            raise UserError(f"{self.path} holds no rows")
        if not self.table.count and not self._left_out:
            raise UserError(f"none of the {self._seen:,} rows of {self.path} can be used: {self._reasons[0]}")
        self.table.prompts = self._first
        self._note()
        return self.table

    def _take(self, rows: Rows) -> None:
        """One part: check its rows, keep those that count."""
        table, layout = self.table, self.layout
        kept = array("Q")
        usual = layout.usual(rows)
        columns: Any = rows.columns
        for position, values in enumerate(rows.each(layout.columns)):
            found = usual(values) if type(values) is dict else None
            if found is None:
                found = self._read(values, rows, position)
                if found is None:
                    continue
            key, answer, form = found
            if not key.isascii() and _HALF.search(key):
                self._refuse(rows, position, BadRow("the prompt holds half of a character (a lone surrogate)"))
                continue
            if not self._counts(key, answer, rows, position):
                continue
            number = table.count + len(kept)
            kept.append(position)
            hashed = stable_hash(key)
            table.hashes.append(hashed)
            said = answer if type(answer) is str else repr(answer)
            table.prints.append(hashed ^ crc32(said.encode(errors="replace")))
            table.sizes.append(len(key) if key.isascii() else len(key.encode(errors="replace")))
            table.forms.setdefault(form, number)
            assert not isinstance(values, BadRow)  # of one nothing was read
            if columns is None:
                columns = set(values)
            elif columns != values.keys() and rows.columns is None:
                columns &= values.keys()
        self._seen += len(rows)
        if kept:
            table.fields = frozenset(columns) & table.fields if table.count else frozenset(columns)
            table.starts.append(table.count)
            table.parts.append(rows)
            table.count += len(kept)
            if len(kept) < len(rows):
                rows.keep(kept)

    def _read(self, values: Values | BadRow, rows: Rows, position: int) -> tuple[str, Any, Hashable] | None:
        """(key, answer, form) of a row; None for a bad one, which is noted."""
        layout = self.layout
        try:
            if isinstance(values, BadRow):
                raise values
            read = layout.read(values, rows)
        except BadRow as bad:
            self._refuse(rows, position, bad)
            return None
        self._open += ends_open(read)
        self._floats += layout.counts_floats and layout.is_whole_float(values)
        return layout.key(read), read.answer, layout.form(read)

    def _counts(self, key: str, answer: Any, rows: Rows, position: int) -> bool:
        """Whether the row is a problem of its own."""
        if key in self.held_out:
            self._left_out += 1
            if self.duplicates == "error":
                raise UserError(
                    f"{rows.where(position)}: the same prompt as {_place(self.held_out[key])}, which is held out; "
                    "remove it, or set task.args.duplicates=keep_first"
                )
            return False
        this = (rows, rows.numbers[position], answer)
        before = self._first.setdefault(key, this)
        if before is this or self.duplicates == "keep_all":
            return True
        there = _place(before)
        if before[2] != answer:
            self._refuse(
                rows, position, BadRow(f"the prompt of {there} with another answer; mend one, or set "
                                       "task.args.duplicates=keep_all"),
            )  # fmt: skip
        elif self.duplicates == "error":
            raise UserError(
                f"{rows.where(position)}: the same prompt as {there}; remove it, or set task.args.duplicates=keep_first"
            )
        else:
            self._repeated += 1
        return False

    def _refuse(self, rows: Rows, position: int, bad: BadRow) -> None:
        self._bad += 1
        if len(self._kinds) < 2:
            self._kinds.add(str(bad))
        if len(self._reasons) >= MOST_NAMED:
            return
        reason = str(bad)
        if rows.has_gaps:  # it was looked at with some of its fields only
            try:
                self.layout.read(rows.values(position), rows)
            except BadRow as whole:
                reason = str(whole)
        self._reason = self._reason or reason
        self._reasons.append(f"{rows.where(position)}: {reason}")

    def _refusal(self) -> str:
        if self._bad == 1:
            return f"{self._reasons[0]} (task.args.bad_rows=drop leaves such rows out)"
        if self._bad == self._seen and len(self._kinds) == 1:  # a setting is wrong, not the rows
            return f"{self.path}, all {self._seen:,} rows: {self._reason}"
        first = f", the first {MOST_NAMED}" if self._bad > MOST_NAMED else ""
        return (
            f"{self._bad:,} of {self._seen:,} rows of {self.path} cannot be used{first}:\n  "
            + "\n  ".join(self._reasons)
            + "\ncorrect them, or leave such rows out with task.args.bad_rows=drop"
        )

    def _note(self) -> None:
        notes = self.table.notes
        if self._bad:
            more = ", ..." if self._bad > 1 else ""
            rows = f"{self._bad:,} of {self._seen:,} rows"
            notes.append(f"{self.path}: {rows} cannot be used and are left out ({self._reasons[0]}{more})")
        if self._repeated:
            notes.append(f"{self.path}: {self._repeated:,} rows repeat a prompt and are left out")
        if self._left_out:
            notes.append(
                f"{self.path}: {self._left_out:,} rows also stand in {self.held_out_path} and are left out of training"
            )
        if self._open and not self.layout.continues:
            notes.append(
                f"{self.path}: {self._open:,} prompts end with a message of the assistant, behind which a new turn "
                "begins; task.args.continue_assistant=true has the model go on with it"
            )
        if self._floats:
            notes.append(
                f"{self.path}: {self._floats:,} answers are numbers like 3.0, and reward 'exact' wants just that text; "
                "store them as whole numbers or text, or use reward 'numeric'"
            )


def _place(first: FirstRow) -> str:
    rows, number, _ = first
    return f"{rows.name}, {rows.unit} {number}"


class Problems(ProblemsOnDemand):
    """The problems of one split. Each is made of its row when it is asked for."""

    def __init__(self, table: Table, layout: Layout, numbers: Sequence[int], cuts: Mapping[int, int] | None = None):
        """`numbers`: of its rows in the table. `cuts`: row -> characters that its longest message loses."""
        self._table = table
        self._layout = layout
        self._numbers = numbers
        self._cuts = cuts or {}
        self.adapt: Callable[[Problem, str], Problem] | None = None
        """`Problem.adapt` of all of them"""

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def numbers(self) -> Sequence[int]:
        """Of each problem, its row in the table."""
        return self._numbers

    @property
    def fields(self) -> frozenset[str]:
        """Fields that every row has."""
        return self._table.fields

    def row(self, index: int) -> Values:
        """A problem's row as its file has it."""
        return self._table.row(self._numbers[index])[0]

    def size(self, index: int) -> int:
        """Bytes of a problem's prompt, tools and template arguments."""
        return self._table.sizes[self._numbers[index]]

    def of(self, numbers: Sequence[int], cuts: Mapping[int, int]) -> Problems:
        """Those of some rows of the same table."""
        made = Problems(self._table, self._layout, numbers, cuts)
        made.adapt = self.adapt
        return made

    @property
    def one_of_each_form(self) -> list[int]:
        """Problems, of each form that a chat template may take differently the first; those of the other split are
        not among them."""
        wanted = set(self._table.forms.values())
        return [index for index, number in enumerate(self._numbers) if number in wanted]

    def make(self, index: int) -> Problem:
        number = self._numbers[index]
        values, rows = self._table.row(number)
        read = self._layout.read(values, rows)
        prompt = shortened(read.prompt, self._cuts[number]) if number in self._cuts else read.prompt
        return Problem(
            index=index,
            prompt=prompt,
            data={"answer": read.answer, "row": self._layout.rest(values), "where": self._table.where(number)},
            tools=read.tools,
            template_args=self._layout.args(read),
            adapt=self.adapt,
        )


def shortened(prompt: str | Sequence[Mapping[str, Any]], cut: int) -> str | Sequence[Mapping[str, Any]]:
    """A prompt without the first `cut` characters of its text, or of its longest message."""
    if isinstance(prompt, str):
        return prompt[cut:]
    longest = longest_message(prompt)
    return [{**m, "content": m["content"][cut:]} if n == longest else m for n, m in enumerate(prompt)]


def longest_message(prompt: Sequence[Mapping[str, Any]]) -> int:
    """Number of the message with the longest text."""
    lengths = [len(m["content"]) if isinstance(m.get("content"), str) else 0 for m in prompt]
    return lengths.index(max(lengths))
