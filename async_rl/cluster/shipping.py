"""What generators on other machines need of the user's files: copied into one folder, which Ray carries to every node.

The folder mirrors the working folder: a generator starts in its copy, and the relative paths of the config lead to the
same files there. What lies outside, or is given by an absolute path, gets a place of its own and a `name=value` word
that says so. A joining generator compares all of it with the run's, as everywhere (run/join.py).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from async_rl.config import Settings
from async_rl.config.imports import DATA_FILES, NAMING_SETTINGS
from async_rl.config.sources import Source, sources_of
from async_rl.errors import UserError

LARGEST_MODEL = 100 << 20
"""bytes of a model's folder that is carried; a larger one is on every node already, or on storage that all see"""
LARGEST_DATA = 100 << 20
"""bytes of a file or folder of data that is carried unasked"""
LARGEST = 400 << 20
"""bytes of everything: Ray takes packages of up to 500 MB"""
MOST_CODE = 5_000
"""files of Python beside the user's own"""
SKIPPED = ("runs", "node_modules", "site-packages", "__pycache__")
"""folders in which no code of a task is looked for, besides hidden ones and environments"""
HERE = "{here}"
"""stands in words for the folder's place on a node"""
OUTSIDE = "outside"


@dataclass(slots=True)
class Shipment:
    """The folder, and what a generator is told of it."""

    folder: Path
    """on this machine; a node has a copy elsewhere"""
    base: Path
    """the working folder that it mirrors"""
    words: list[str] = field(default_factory=list)
    """`name=value` for `async-rl generate`; HERE stands for the copy"""
    notes: list[str] = field(default_factory=list)
    """for the user: what every node must have by itself"""
    outside: int = 0

    def words_at(self, place: str) -> list[str]:
        """The words on a node where the copy is in `place`."""
        return [word.replace(HERE, place) for word in self.words]

    # ------------------------------------------------------------------ one file or folder

    def put(self, file: Path) -> str:
        """Copy a file or folder; where it is then, as words have it. Example: `{here}/data/train.jsonl`."""
        file = file.absolute()
        if file.is_relative_to(self.base):
            there = file.relative_to(self.base)
        else:
            there = Path(OUTSIDE, str(self.outside), file.name)
            self.outside += 1
        _copy(file, self.folder / there)
        return f"{HERE}/{there}"

    def size(self) -> int:
        return _size(self.folder)


def ship(settings: Settings, folder: Path) -> Shipment:
    """Copy what the run's settings name into the empty `folder`. Raises UserError for what is not there, or too much of
    it. Large models and data stay where they are: a word says their whole path."""
    out = Shipment(folder, Path.cwd())
    for source in sources_of(settings):
        _ship_code(out, source)
    _ship_model(out, settings)
    for name, value in settings.task.args.items():
        if isinstance(value, str) and f"task.args.{name}" not in NAMING_SETTINGS:
            _ship_data(out, f"task.args.{name}", value)
    for name in settings.cluster.ship:
        path = out.base / name
        if not path.exists() or not path.resolve().is_relative_to(out.base.resolve()):
            raise UserError(f"cluster.ship names '{name}', which is no file or folder below {out.base}")
        out.put(path)
    if (size := out.size()) > LARGEST:
        raise UserError(
            f"what the config names for generators to get a copy of is {size >> 20} MB, and Ray carries "
            f"{LARGEST >> 20} MB at most; put large files on storage that all nodes see, named by absolute paths"
        )
    return out


def _ship_code(out: Shipment, source: Source) -> None:
    """The file of the user's own, and the Python files beside and below it, which it may import."""
    file, name = Path(source.file), source.name
    by_path = name.endswith(DATA_FILES) or name.rpartition(":")[0].endswith(".py")
    inside = file.is_relative_to(out.base.resolve())
    if not by_path and not inside:
        return  # a module that is installed: every node has it, or says that it is missing
    if not by_path:
        top = file.relative_to(out.base.resolve()).parts[0]
        for found in _code(out.base / top, source.setting):
            out.put(found)
        return
    given = Path(name.rpartition(":")[0] if not name.endswith(DATA_FILES) else name).expanduser()
    where = file.parent if inside or given.is_absolute() else None
    files = [file] if where is None or name.endswith(DATA_FILES) else list(_code(where, source.setting))
    if inside and not given.is_absolute():
        base = out.base.resolve()
        for found in files:
            _copy(found, out.folder / found.relative_to(base))
        return
    place = Path(OUTSIDE, str(out.outside))
    out.outside += 1
    for found in files:
        _copy(found, out.folder / place / found.relative_to(file.parent))
    found_object = "" if name.endswith(DATA_FILES) else f":{name.rpartition(':')[2]}"
    out.words.append(f"{source.setting}={HERE}/{place}/{file.name}{found_object}")


def _code(top: Path, setting: str) -> Iterator[Path]:
    """Python files below `top`, without environments and hidden folders."""
    if top.is_file():
        yield top
        return
    number = 0
    for here, folders, files in os.walk(top):
        folders[:] = sorted(
            name
            for name in folders
            if name not in SKIPPED and not name.startswith(".") and not Path(here, name, "pyvenv.cfg").exists()
        )
        for name in sorted(files):
            if name.endswith(".py"):
                number += 1
                if number > MOST_CODE:
                    raise UserError(
                        f"{setting}: beside its file are more than {MOST_CODE:,} files of Python below {top}, which "
                        "generators would get a copy of; put the task into a folder of its own"
                    )
                yield Path(here, name)


def _ship_model(out: Shipment, settings: Settings) -> None:
    path = Path(settings.model.path).expanduser()
    whole = (out.base / path).absolute()
    if not whole.is_dir():
        return  # preflight says what is wrong with it
    if (size := _size(whole)) > LARGEST_MODEL:
        out.words.append(f"model.path={whole}")
        out.notes.append(
            f"generators look for the model ({size >> 20} MB, not carried to them) in {whole} of their node"
        )
        return
    place = out.put(whole)
    if path.is_absolute() or not whole.is_relative_to(out.base):
        out.words.append(f"model.path={place}")


def _ship_data(out: Shipment, setting: str, value: str) -> None:
    """A setting of the task that names a file or folder; others are left alone."""
    path = Path(value).expanduser()
    whole = (out.base / path).absolute()
    if not value or len(value) > 1024 or not whole.exists() or whole == out.base:
        return
    if _size(whole) > LARGEST_DATA:
        if not path.is_absolute():
            out.words.append(f"{setting}={whole}")
        out.notes.append(f"generators look for {setting} (too large to be carried to them) in {whole} of their node")
        return
    place = out.put(whole)
    if path.is_absolute() or not whole.is_relative_to(out.base):
        out.words.append(f"{setting}={place}")


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _copy(file: Path, there: Path) -> None:
    if there.exists() and there.is_file():
        return
    there.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        shutil.copytree(file, there, dirs_exist_ok=True)
    else:
        shutil.copy2(file, there)
