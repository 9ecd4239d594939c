"""`async-rl new DIR`: a small project to start from, one file for each thing that one makes one's own."""

from __future__ import annotations

import shlex
from pathlib import Path

from async_rl.errors import UserError

TEMPLATE = Path(__file__).parent / "project"
"""its files; Python files end in .txt there, since they are no part of this package"""
NAME = "{name}"
"""stands in the template for the project's name"""


def write_project(folder: Path) -> Path:
    """Write the project into the new or empty folder `folder` and return its path. Raises UserError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; remove it or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(TEMPLATE.iterdir()):
            text = file.read_text(encoding="utf-8").replace(NAME, folder.resolve().name)
            (folder / file.name.removesuffix(".txt")).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}; choose another folder") from None
    return folder


def next_steps(folder: Path) -> str:
    """What to type next."""
    return (
        f"{folder}: a project of its own; README.md says what each file is for. Next:\n"
        f"  cd {shlex.quote(str(folder))}\n"
        "  async-rl init-model model --task my_task.py:Rhyme --until 0.3   # a small model to start from, seconds\n"
        "  async-rl try config.yaml                                        # eight of its answers, and what they earn\n"
        "  async-rl run config.yaml                                        # train it, half a minute"
    )
