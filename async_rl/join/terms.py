"""What a joining generator is told, and what it may decide itself. Pure, but for looking whether a file is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from async_rl.config import described, structured, with_overrides
from async_rl.errors import UserError, nearest
from async_rl.settings import Settings, check

MAY_DIFFER = (
    "generator.device",
    "generator.threads",
    "generator.max_sequences",
    "generator.save_turns_after_s",
    "generator.episode_timeout_s",
    "vllm.tensor_parallel",
    "vllm.memory_share",
    "vllm.kv_cache_mb",
    "model.path",
    "weights.transport",
    "wire.timeout_s",
)
"""what this host can do, and where things lie on it; everything else says what a trajectory is"""
NOTHING_HERE = ("generator.count", "generator.gpus", "generator.max_restarts", "generator.restart_window_s")
FILES = "task.args."


def local_settings(told: Mapping[str, Any], words: Sequence[str], keys: str, here: Path) -> Settings:
    """The run's settings with `name=value` words laid over them. `keys`: folder of this host's keys; `here`: where
    relative paths in words begin. Raises UserError for a word that would make this another run."""
    base = structured(Settings, _with_keys(told, keys), where="")
    values = {path: value for path, value, _, _ in described(base)}
    laid = [_allowed(word, base, values, here) for word in words]
    settings = structured(Settings, with_overrides(_with_keys(told, keys), laid), where="")
    if settings.generator.max_sequences > base.generator.max_sequences:
        raise UserError(
            f"generator.max_sequences is {settings.generator.max_sequences}, but the run's generators decode at most "
            f"{base.generator.max_sequences} each; start a second one here instead"
        )
    check(settings)
    return settings


def _with_keys(told: Mapping[str, Any], keys: str) -> dict[str, Any]:
    """With them, and without what is of the run's own generators only."""
    generator = {**told.get("generator", {}), "gpus": ""}
    return {**told, "generator": generator, "wire": {**told.get("wire", {}), "keys": keys}}


def _allowed(word: str, base: Settings, values: Mapping[str, Any], here: Path) -> str:
    """The word, its path made absolute. Raises UserError."""
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise UserError(f"'{word}' is not a setting; write name=value, e.g. generator.threads=2")
    if name.startswith(FILES):
        return _file(name, value, base.task.args, here)
    if name in NOTHING_HERE:
        raise UserError(f"{name} does nothing here: it is for the generators that the launcher starts; leave it out")
    if name in MAY_DIFFER:
        there = name == "model.path" and (here / value).exists()
        return f"{name}={(here / value).resolve()}" if there else word
    if name not in values and name.partition(".")[0] not in ("task", "recipe"):
        raise UserError(f"{name} is not a setting; {nearest(name, MAY_DIFFER)}")
    raise UserError(
        f"{name} is the run's ({values.get(name, 'chosen there')!r}): it says what is generated, so it cannot differ "
        f"here. What may: {', '.join(MAY_DIFFER)}, and files in {FILES}*"
    )


def _file(name: str, value: str, args: Mapping[str, Any], here: Path) -> str:
    """A setting of the task may say where a file lies on this host, and nothing else."""
    if not isinstance(args.get(name.removeprefix(FILES)), str):
        raise UserError(f"{name} is the run's: of the task's settings only those that name a file may differ here")
    path = here / Path(value).expanduser()
    if not path.exists():
        raise UserError(f"{name}: there is no file {path}; of the task's settings only those that name one may differ")
    return f"{name}={path.resolve()}"
