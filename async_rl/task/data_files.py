"""From the path of a data set to its files, and their rows: one file, a folder of files of one kind, or a folder that
Hugging Face's `datasets` saved."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.errors import UserError
from async_rl.task.rows import ArrowRows, Lines, Rows, csv_rows, json_rows
from async_rl.trajectory import Split

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
"""ending of a file -> kind; those of text may end in .gz, too"""
TEXT_KINDS = ("jsonl", "json", "csv", "tsv")
ENDINGS = ".jsonl, .json, .csv, .tsv, .parquet or .arrow"
ABOUT_OTHERS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json")
"""files beside the rows that hold none"""
TRAIN_WORDS = ("train", "training")
EVAL_WORDS = ("validation", "valid", "val", "dev", "evaluation", "eval", "test")
"""what a split is called, those to be preferred first"""
SPLIT_WORD = re.compile(rf"({'|'.join((*TRAIN_WORDS, *EVAL_WORDS))})(?![a-z])", re.IGNORECASE)
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""by which a folder of `save_to_disk` is known: of a Dataset, of a DatasetDict"""

Seen = Callable[[bytes], Any]
"""is called with the bytes of each file, in order"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFiles:
    """Files that are read one after the other."""

    path: Path
    """that was named"""
    files: tuple[tuple[Path, str], ...]
    """(file, kind)"""
    note: str = ""
    """for the user"""

    def parts(self, seen: Seen) -> Iterator[Rows]:
        """The rows of each file, or of each part of a large one. Raises UserError for a file that cannot be read."""
        for file, kind in self.files:
            content = read_bytes(file)
            seen(content)
            match kind:
                case "jsonl":
                    yield Lines(str(file), content)
                case "json":
                    yield json_rows(str(file), content)
                case "csv" | "tsv":
                    yield csv_rows(str(file), content, "\t" if kind == "tsv" else "")
                case "parquet":
                    yield from parquet_parts(file, content)
                case _:
                    yield from arrow_parts(file, content)


def find_source(path: str, split: Split, *, setting: str) -> tuple[SplitFiles, SplitFiles | None]:
    """The rows of `path` that `split` is made of, and, when the path itself holds both splits and `split` is train,
    those of eval. `setting`: that named the path, for messages.

    Raises UserError for a path that is not there, or whose files are of several kinds or splits nobody can tell apart.
    """
    named = Path(path).expanduser()
    if any(mark in path for mark in "*?[") and not named.exists():
        files = [file for file in glob(named) if file.is_file()]
        if not files:
            raise UserError(f"{setting}: no file matches {path} (relative paths start at {Path.cwd()})")
        return SplitFiles(path=named, files=_of_one_kind(named, files, setting)), None
    if not named.is_dir():
        if not named.is_file():
            raise UserError(f"{setting}: there is no file {named} (relative paths start at {Path.cwd()})")
        return SplitFiles(path=named, files=((named, _kind(named, setting)),)), None
    found = saved_splits(named) or saved(named) or of_folder(named, setting)
    if len(found) == 1:
        return next(iter(found.values())), None
    return _chosen(named, found, split, setting)


def glob(pattern: Path) -> list[Path]:
    """Files of a pattern such as `data/train-*.parquet`, sorted."""
    fixed = Path(pattern.anchor) if pattern.is_absolute() else Path()
    return sorted(fixed.glob(str(pattern.relative_to(fixed)) if pattern.is_absolute() else str(pattern)))


def of_folder(folder: Path, setting: str) -> dict[str, SplitFiles]:
    """Files of a folder and its subfolders, sorted by name, by the split that their names (or their folder's) begin
    with. Raises UserError where some names tell and others do not."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ABOUT_OTHERS and _kind_by_name(file)
        and not any(part[0] in "._" for part in file.relative_to(folder).parts)
    ]  # fmt: skip
    if not files:
        raise UserError(f"{setting}: the folder {folder} holds no file that ends in {ENDINGS}")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    evaluated = [word for word in by_split if word in EVAL_WORDS]
    if "" in by_split and evaluated:
        raise UserError(
            f"{setting}: {by_split[evaluated[0]][0]} seems to be held out, and {by_split[''][0]} does not say what it "
            "is; name the files: task.args.path and task.args.eval_path"
        )
    if not evaluated:
        by_split = {"": files}
    return {
        word: SplitFiles(path=folder, files=_of_one_kind(folder, those, setting)) for word, those in by_split.items()
    }


def saved(folder: Path) -> dict[str, SplitFiles]:
    """What `Dataset.save_to_disk` wrote; nothing when the folder is none of its."""
    state = _json(folder / SAVED)
    names = state.get("_data_files")
    if not isinstance(names, list):
        return {}
    files = [folder / str(entry.get("filename")) for entry in names if isinstance(entry, Mapping)]
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: it was saved with a selection of rows beside the rows; save it again with flatten_indices()"
        )
    lost = next((file for file in files if not file.is_file()), None)
    if lost is not None:
        raise UserError(f"{folder}: {SAVED} names {lost.name}, which is not there; copy the whole folder")
    return {"": SplitFiles(path=folder, files=tuple((file, "arrow") for file in files))}


def saved_splits(folder: Path) -> dict[str, SplitFiles]:
    """What `DatasetDict.save_to_disk` wrote, by split; nothing when the folder is none of its."""
    names = _json(folder / SAVED_SPLITS).get("splits")
    if not isinstance(names, list):
        return {}
    return {str(name): source for name in names for source in saved(folder / str(name)).values()}


def _chosen(
    folder: Path, found: Mapping[str, SplitFiles], split: Split, setting: str
) -> tuple[SplitFiles, SplitFiles | None]:
    """Of several splits those that are used."""
    train = next((found[word] for word in TRAIN_WORDS if word in found), None)
    word = next((word for word in EVAL_WORDS if word in found), None)
    if train is None or word is None:
        if split == "eval" and word is not None:
            return found[word], None
        raise UserError(
            f"{setting}: {folder} has the splits {', '.join(found)}; name the one that is meant ({folder}/...)"
        )
    unused = [other for other in found if other not in (*TRAIN_WORDS, word)]
    less = f"; {', '.join(unused)} is not used" if unused else ""
    note = f"{folder} has splits: train is trained on, {word} is held out{less}"
    evaluated = SplitFiles(path=folder, files=found[word].files)
    return (evaluated, None) if split == "eval" else (SplitFiles(path=folder, files=train.files, note=note), evaluated)


def _split_of(inside: Path) -> str:
    """The split word that a file's name, or that of a folder around it, begins with; empty: none."""
    for part in inside.parts:
        match = SPLIT_WORD.match(part)
        if match:
            word = match[1].lower()
            return "train" if word in TRAIN_WORDS else word
    return ""


def _kind_by_name(file: Path) -> str:
    """Empty for a file that holds no rows."""
    return KINDS.get(Path(file.name.lower().removesuffix(".gz")).suffix, "")


def _kind(file: Path, setting: str) -> str:
    kind = _kind_by_name(file)
    if not kind or (file.name.lower().endswith(".gz") and kind not in TEXT_KINDS):
        raise UserError(
            f"{setting}: {file} ends in '{file.suffix}'; it must be a {ENDINGS} file, or a folder of them (those of "
            "text may be packed: .jsonl.gz)"
        )
    return kind


def _of_one_kind(path: Path, files: Sequence[Path], setting: str) -> tuple[tuple[Path, str], ...]:
    """Raises UserError for files of several kinds: as a rule the same rows in two forms."""
    kinds = [(file, _kind(file, setting)) for file in files]
    first, kind = kinds[0]
    other = next((file for file, found in kinds if found != kind), None)
    if other is not None:
        raise UserError(
            f"{setting}: {path} holds files of several kinds, {first.name} and {other.name}; name the file, or "
            f"those of one kind ({path if path.is_dir() else path.parent}/*{first.suffix})"
        )
    return tuple(kinds)


def read_bytes(file: Path) -> bytes:
    """All of a file, unpacked. Raises UserError."""
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix.lower() == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _json(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ------------------------------------------------------------------------------------------------ Arrow


PART_ROWS = 65_536
"""rows of an Arrow file that are looked at together"""


def parquet_parts(file: Path, content: bytes) -> Iterator[Rows]:
    """The row groups of a Parquet file."""
    pyarrow = _pyarrow(file, "Parquet")
    from pyarrow import parquet

    first = 1
    try:
        opened = parquet.ParquetFile(pyarrow.BufferReader(content))
        for number in range(opened.num_row_groups):
            table = opened.read_row_group(number)
            yield ArrowRows(str(file), table, first)
            first += table.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from None


def arrow_parts(file: Path, content: bytes) -> Iterator[Rows]:
    """The batches of an Arrow file, a stream (as `datasets` writes it) or one with an index."""
    pyarrow = _pyarrow(file, "Arrow files")
    first = 1
    held: list[Any] = []
    try:
        for batch in _batches(pyarrow, content):
            held.append(batch)
            if sum(b.num_rows for b in held) >= PART_ROWS:
                table, held = pyarrow.Table.from_batches(held), []
                yield ArrowRows(str(file), table, first)
                first += table.num_rows
        if held:
            yield ArrowRows(str(file), pyarrow.Table.from_batches(held), first)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Arrow: {error}") from None


def _batches(pyarrow: Any, content: bytes) -> Iterator[Any]:
    if content[:6] == b"ARROW1":
        opened = pyarrow.ipc.open_file(pyarrow.BufferReader(content))
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
        return
    yield from pyarrow.ipc.open_stream(pyarrow.BufferReader(content))


def _pyarrow(file: Path, what: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(f"{file}: reading {what} needs pyarrow: pip install pyarrow") from None
    return pyarrow
