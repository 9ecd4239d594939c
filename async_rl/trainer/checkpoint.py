"""The model of a step as a Hugging Face folder, written aside and renamed when it is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from async_rl.model.folder import save_folder

if TYPE_CHECKING:
    from async_rl.trainer.forward import Model


def checkpoint_path(folder: Path, version: int) -> Path:
    return folder / f"step_{version:06d}"


def save_checkpoint(folder: Path, model: Model, *, version: int, source: Path, keep: int) -> Path:
    """Write the weights of `version` beside config and tokenizer from `source`; keep the newest `keep`."""
    final = checkpoint_path(folder, version)
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_folder(partial, model, source=source)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())
