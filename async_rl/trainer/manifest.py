"""Checkpoint folders as files: written aside, made durable, renamed; checked byte by byte before use.

Does not import torch, so that the launcher finds the point from which a run resumes without it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from blake3 import blake3

from async_rl.run_folder import to_disk

MANIFEST = "manifest.json"
SCHEMA = 1
_CHUNK_BYTES = 4 << 20
_FILES_AT_ONCE = 4
"""read and summed side by side; each in a thread, since neither holds the interpreter"""
_KEEPALIVE_S = 1.0
_HASHES: Mapping[str, Callable[[], Any]] = {"blake3": blake3, "blake2b": lambda: blake2b(digest_size=16)}
"""by the name that a manifest gives its sums; blake2b up to 0.4.0, at a sixth of the speed"""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A folder whose files are written, under a name that nobody takes for a checkpoint."""

    folder: Path
    final: Path

    def finish(self, keepalive: Callable[[], None] = lambda: None) -> None:
        """Make it appear at `final` with all its bytes on the disk, and their sums. Until then the checkpoint before is
        the newest. May be called in any thread.

        `keepalive` is called often while files are read back and made durable. Raises OSError."""
        inside = sorted(self.folder.rglob("*"))
        files = [path for path in inside if path.is_file()]
        sums = _digests(files, "blake3", keepalive, durable=True)
        entries = {
            path.relative_to(self.folder).as_posix(): {"bytes": path.stat().st_size, "blake3": digest}
            for path, digest in zip(files, sums, strict=True)
        }
        (self.folder / MANIFEST).write_text(json.dumps({"schema": SCHEMA, "files": entries}, indent=1) + "\n")
        for path in (*(path for path in inside if path.is_dir()), self.folder / MANIFEST, self.folder):
            keepalive()
            to_disk(path)
        # An older folder of this name belongs to a life of the run that was given up.
        shutil.rmtree(self.final, ignore_errors=True)
        os.replace(self.folder, self.final)
        to_disk(self.final.parent)


def write_partial(final: Path, write: Callable[[Path], None]) -> Partial:
    """Let `write` fill a folder that is to be `final`. One at a time. Raises OSError, for example when the disk is
    full."""
    partial = final.parent / f".{final.name}.partial"
    for left in final.parent.glob(".*.partial"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    return Partial(folder=partial, final=final)


def write_whole(final: Path, write: Callable[[Path], None], keepalive: Callable[[], None] = lambda: None) -> None:
    """Let `write` fill a folder; it appears at `final` with all its bytes on the disk, or not at all.

    `keepalive` is called often while files are read back and made durable. Raises OSError."""
    write_partial(final, write).finish(keepalive)


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
        for kind in _HASHES:
            names = [name for name, entry in expected.items() if _kind(entry) == kind]
            for name, digest in zip(names, _digests([path / name for name in names], kind), strict=True):
                if digest != expected[name][kind]:
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


def _kind(entry: Mapping[str, Any]) -> str:
    """Which hash an entry has. Raises KeyError when it has none that is known."""
    for kind in _HASHES:
        if kind in entry:
            return kind
    raise KeyError("hash")


def _digests(
    files: Iterable[Path], kind: str, keepalive: Callable[[], None] = lambda: None, *, durable: bool = False
) -> list[str]:
    """The sums of files, some of them side by side. `durable`: each is on the disk then. Raises OSError."""

    def digest(path: Path) -> str:
        found = _digest(path, kind)
        if durable:
            to_disk(path)
        return found

    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="checksums") as pool:
        running = [pool.submit(digest, path) for path in files]
        try:
            while (left := wait(running, _KEEPALIVE_S, FIRST_EXCEPTION)).not_done:
                keepalive()
                if any(future.exception() is not None for future in left.done):
                    break
            keepalive()
            return [future.result() for future in running]
        finally:
            for future in running:
                future.cancel()


def _digest(path: Path, kind: str) -> str:
    digest = _HASHES[kind]()
    with path.open("rb") as file:
        for chunk in _chunks(file.read):
            digest.update(chunk)
    found: str = digest.hexdigest()
    return found


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while chunk := read(_CHUNK_BYTES):
        yield chunk
