"""Which problems of a data set are trained on, which are held out, and which the context has no room for."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from async_rl.errors import UserError
from async_rl.task.data_files import Seen, SplitFiles, find_source
from async_rl.task.dataset_settings import DatasetSettings
from async_rl.task.layout import Layout
from async_rl.task.protocol import Measure, Problem
from async_rl.task.table import Loader, Problems, Table, longest_message, shortened
from async_rl.trajectory import Split

SPLIT_BUCKETS = 10_000
"""resolution of eval_share"""
SPLITS: tuple[Split, ...] = ("train", "eval")
TOOLS_GROW = 3
"""a template may write a tool's JSON with indentation"""
SLACK = 64
"""bytes"""
COUNTED = 8192
"""prompts that are tokenised together"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Both splits of a data set."""

    train: Problems
    eval: Problems
    notes: tuple[str, ...]
    digest: str
    """of the files' bytes"""
    tables: tuple[Table, ...]
    """one, or that of the rows to train on and that of the held-out ones"""


def read_splits(settings: DatasetSettings, layout: Layout) -> Splits:
    """Read and check all rows. Raises UserError for a file, row or field that is wrong."""
    source, held_out = find_source(settings.path, "train", setting="task.args.path")
    if settings.eval_path:
        held_out, _ = find_source(settings.eval_path, "eval", setting="task.args.eval_path")
    digest = hashlib.blake2b(digest_size=16)
    if held_out is None:
        table = _load(settings, layout, source, digest.update)
        train, evaluated = _by_hash(table, settings)
        tables = (table, table)
    else:
        of_eval = _load(settings, layout, held_out, digest.update)
        of_train = _load(settings, layout, source, digest.update, of_eval)
        train, evaluated = (array("Q", range(t.count)) for t in (of_train, of_eval))
        tables = (of_train, of_eval)
    if not train:
        raise UserError(f"no row of {settings.path} is left to train on; lower task.args.eval_share or add rows")
    notes = [source.note] if source.note and not settings.eval_path else []
    notes += dict.fromkeys(note for table in tables for note in table.notes)
    found = [Problems(table, layout, numbers) for table, numbers in zip(tables, (train, evaluated), strict=True)]
    for table in tables:  # they were for the splits only
        table.prompts, table.hashes = {}, array("Q")
    distinct = tables if held_out is not None else tables[:1]
    return Splits(train=found[0], eval=found[1], notes=tuple(notes), digest=digest.hexdigest(), tables=distinct)


def _load(
    settings: DatasetSettings, layout: Layout, source: SplitFiles, seen: Seen, held_out: Table | None = None
) -> Table:
    loader = Loader(
        layout=layout,
        path=str(source.path),
        duplicates=settings.duplicates,
        bad_rows=settings.bad_rows,
        held_out=held_out.prompts if held_out is not None else {},
        held_out_path=held_out.path if held_out is not None else "",
    )
    return loader.load(source.parts(seen))


def _by_hash(table: Table, settings: DatasetSettings) -> tuple[Sequence[int], Sequence[int]]:
    """Rows of both splits: the hash of a prompt decides."""
    bound = settings.eval_share * SPLIT_BUCKETS
    train, evaluated = array("Q"), array("Q")
    for number, hashed in enumerate(table.hashes):
        (train if hashed % SPLIT_BUCKETS >= bound else evaluated).append(number)
    if settings.eval_share and not evaluated:
        raise UserError(
            f"none of the {table.count} rows of {table.path} falls into the held-out share of "
            f"{settings.eval_share}; raise task.args.eval_share, name an eval_path, or set it to 0"
        )
    return train, evaluated


# ------------------------------------------------------------------------------------------------ too long


@dataclass(slots=True, kw_only=True)
class Overlong:
    """Problems whose prompts leave no room for an answer, in each split: index -> characters that are to be taken
    away, 0: all of the problem.

    Example: `Overlong.read("train 3 17:250 eval 5").found["train"] == {3: 0, 17: 250}`.
    """

    found: dict[str, dict[int, int]] = field(default_factory=dict)

    def write(self) -> str:
        """As the setting `overlong_rows` has it."""
        return " ".join(
            word
            for split, cuts in self.found.items()
            if cuts
            for word in (split, *(f"{index}:{cut}" if cut else str(index) for index, cut in sorted(cuts.items())))
        )

    @classmethod
    def read(cls, text: str) -> Overlong:
        """Raises UserError."""
        found: dict[str, dict[int, int]] = {}
        at: dict[int, int] | None = None
        for word in text.split():
            if word in SPLITS:
                at = found.setdefault(word, {})
            elif at is None or not re.fullmatch(r"\d+(:\d+)?", word):
                raise UserError(f"task.args.overlong_rows is {text!r:.60}; a run writes it itself: leave it out")
            else:
                index, _, cut = word.partition(":")
                at[int(index)] = int(cut or 0)
        return cls(found=found)

    def left_of(self, problems: Problems, split: Split) -> Problems:
        """What is left of a split's problems."""
        cuts = self.found.get(split, {})
        if not cuts:
            return problems
        if max(cuts) >= len(problems):
            raise UserError(
                f"task.args.overlong_rows names problem {max(cuts)} of {len(problems)}: the rows are not those that "
                "the run began with; give it the same files"
            )
        numbers = problems.numbers
        kept = array("Q", (n for index, n in enumerate(numbers) if cuts.get(index, 1)))
        return problems.of(kept, {numbers[index]: cut for index, cut in cuts.items() if cut})


def find_overlong(
    splits: Mapping[Split, Problems], measure: Measure, limit: int, settings: DatasetSettings
) -> tuple[Overlong, list[str]]:
    """Prompts of more than `limit` tokens, and what is to become of them; notes for the user.

    A token is at least a byte of text, so most prompts need not be tokenised to be known to be short enough.
    Raises UserError for prompts that are refused, or that cannot be shortened.
    """
    found, notes, places = Overlong(), [], []
    longest = count = 0
    grown, around = _growth(splits.values(), measure)
    for split, problems in splits.items():
        indices = [i for i in range(len(problems)) if grown * problems.size(i) + around > limit]
        over: dict[int, int] = {}
        for start in range(0, len(indices), COUNTED):
            some = indices[start : start + COUNTED]
            counts = zip(some, measure.tokens([problems[i] for i in some]), strict=True)
            over |= {index: tokens for index, tokens in counts if tokens > limit}
        places += [problems[index].data["where"] for index in over][:1]
        longest, count = max([longest, *over.values()]), count + len(over)
        if settings.overlong == "truncate_left":
            found.found[split] = {i: _cut(problems[i], n, measure, limit) for i, n in over.items()}
        else:
            found.found[split] = dict.fromkeys(over, 0)
        if over and len(over) == len(problems) and settings.overlong == "drop":
            raise UserError(f"every prompt of the {split} split has more than {limit} tokens; {ROOM}")
    if not count:
        return found, []
    said = f"{count:,} prompts have more than {limit:,} tokens (the longest {longest:,}; first: {places[0]})"
    if settings.overlong == "refuse":
        raise UserError(
            f"{said}, which leaves no room in the context for an answer of task.args.max_tokens={settings.max_tokens}; "
            f"{ROOM}, or set task.args.overlong to drop or truncate_left"
        )
    done = "are left out" if settings.overlong == "drop" else "lose the beginning of their longest message"
    notes.append(f"{said} and {done} (task.args.overlong={settings.overlong})")
    return found, notes


ROOM = "lower task.args.max_tokens, raise generator.max_context"


def _growth(splits: Iterable[Problems], measure: Measure) -> tuple[int, int]:
    """(g, b): a prompt has at most g x its bytes + b tokens, by what the template makes of one prompt of each form."""
    grown, around = 1, 0
    for problems in splits:
        for index in problems.one_of_each_form:
            problem = problems[index]
            grows = TOOLS_GROW if problem.tools or problem.template_args else 1
            grown = max(grown, grows)
            around = max(around, len(measure.text(problem).encode()) - grows * problems.size(index))
    return grown, around + SLACK


def _cut(problem: Problem, tokens: int, measure: Measure, limit: int) -> int:
    """Characters that the longest message must lose."""
    prompt = problem.prompt
    text = prompt if isinstance(prompt, str) else prompt[longest_message(prompt)]["content"]
    cut = 0
    while tokens > limit:
        cut += max(1, (tokens - limit) * len(text) // max(1, tokens))
        if cut >= len(text):
            raise UserError(
                f"{problem.data['where']}: the prompt has more than {limit} tokens without its longest message; "
                f"{ROOM}, or set task.args.overlong=drop"
            )
        (tokens,) = measure.tokens([replace(problem, prompt=shortened(prompt, cut))])
    return cut
