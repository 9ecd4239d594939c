"""A whole run in the test process's children, small and fast."""

from __future__ import annotations

from pathlib import Path

from async_rl.config import Settings, check
from async_rl.config.schema import structured, with_overrides
from async_rl.observe.console import Console
from async_rl.run.launcher import run_training
from async_rl.run_folder import RunFolder


def quick_settings(model: Path, *overrides: str) -> Settings:
    """A few steps of the guess task."""
    base = {
        "name": "test",
        "model": {"path": str(model)},
        "task": {"name": "guess", "args": {"num_secrets": 8, "max_turns": 3}},
        "batch": {"groups_per_step": 4, "group_size": 4},
        "trainer": {"steps": 4},
        "optimizer": {"warmup_steps": 2, "learning_rate": 1e-3},
        "evaluation": {"problems": 4, "samples": 1},
        "verify": {"rewards": "none"},  # no process for each of many runs
        "wire": {"timeout_s": 60},
    }
    settings = structured(Settings, with_overrides(base, overrides), where="")
    check(settings)
    return settings


def train(settings: Settings, path: Path) -> RunFolder:
    """Run the processes to the end."""
    run_training(settings, path, console=Console(quiet=True))
    return RunFolder(path)
