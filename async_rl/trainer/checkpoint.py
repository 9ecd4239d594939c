"""The model of a step as a Hugging Face folder, written aside and renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from async_rl.model.folder import save_folder

if TYPE_CHECKING:
    from async_rl.trainer.learner import Learner


def checkpoint_path(folder: Path, version: int) -> Path:
    return folder / f"step_{version:06d}"


def save_checkpoint(folder: Path, learner: Learner, *, source: Path, keep: int) -> Path:
    """Write the policy beside config and tokenizer from `source`, the critic and the objective's running
    state beside it; keep the newest `keep`."""
    version = learner.version
    final = checkpoint_path(folder, version)
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_folder(partial, learner.model, source=source)
    if learner.critic is not None:
        save_file(learner.critic.state_dict(), partial / "critic.safetensors")
    state = {"version": version, "objective": learner.state.to_dict()}
    (partial / "learner.json").write_text(json.dumps(state, indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())
