"""Checkpoint folders as files: written aside, made durable, renamed; checked byte by byte before use.

Does not import torch, so that the launcher finds the point from which a run resumes without it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from async_rl.run_folder import to_disk

MANIFEST = "manifest.json"
SCHEMA = 1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A checkpoint that cannot be used."""

    path: Path
    reason: str


def checkpoint_path(folder: Path, version: int) -> Path:
    return folder / f"step_{version:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first; whether they are whole, `damage_of` tells."""
    return sorted((p for p in folder.glob("step_*") if p.is_dir()), key=lambda p: (len(p.name), p.name))


def write_whole(final: Path, write: Callable[[Path], None], keepalive: Callable[[], None] = lambda: None) -> None:
    """Let `write` fill a folder; it appears at `final` with all its bytes on the disk, or not at all.

    `keepalive` is called often while files are read back and made durable.

    Raises OSError, for example when the disk is full."""
    partial = final.parent / f".{final.name}.partial"
    for left in final.parent.glob(".*.partial"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    inside = sorted(partial.rglob("*"))
    files = {
        p.relative_to(partial).as_posix(): {"bytes": p.stat().st_size, "blake2b": _digest(p, keepalive)}
        for p in inside
        if p.is_file()
    }
    (partial / MANIFEST).write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=1) + "\n")
    for path in (*inside, partial / MANIFEST, partial):
        keepalive()
        to_disk(path)
    # An older folder of this name belongs to a life of the run that was given up.
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    to_disk(final.parent)


def damage_of(path: Path) -> str | None:
    """Why the checkpoint cannot be used, or None when every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["schema"] != SCHEMA:
            return f"{MANIFEST} has schema {manifest['schema']}, this program reads {SCHEMA}"
        expected = manifest["files"]
        for name, entry in expected.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if _digest(file) != entry["blake2b"]:
                return f"{name} is not what was written (checksum)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def newest_whole(folder: Path, but: Callable[[int], bool] = lambda version: False) -> tuple[Path | None, list[Damage]]:
    """The newest checkpoint that is as it was written, and the newer ones that are not. `but`: versions that are
    passed over."""
    damaged: list[Damage] = []
    for path in reversed([path for path in list_checkpoints(folder) if not but(version_of(path))]):
        reason = damage_of(path)
        if reason is None:
            return path, damaged
        damaged.append(Damage(path=path, reason=reason))
    return None, damaged


def version_of(path: Path) -> int:
    """The version a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


def _digest(path: Path, keepalive: Callable[[], None] = lambda: None) -> str:
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        for chunk in _chunks(file.read):
            digest.update(chunk)
            keepalive()
    return digest.hexdigest()


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while chunk := read(_CHUNK_BYTES):
        yield chunk
