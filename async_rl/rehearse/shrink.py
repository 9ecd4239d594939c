"""Which settings a rehearsal replaces, by what, and why. Pure: settings in, settings and a table out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.config import described, structured, with_overrides
from async_rl.settings import Settings, check
from async_rl.task.tools import CALL_CLOSE, CALL_OPEN

GROUPS, GROUP_SIZE, STEPS, EVERY = 4, 8, 6, 3
GENERATORS, SEQUENCES = 2, 64
TURN_TOKENS, MICRO_BATCH_TOKENS = 16, 4096
PROBLEMS = 4
LORA_RANK = 4

TIME, NO_GPU, HERE = "time", "no GPU", "this machine alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One row of the table."""

    path: str
    was: Any
    now: Any
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What is put in the place of files that are not here."""

    model: Path
    data: Mapping[str, Path]
    """argument of the task -> stand-in"""


Rule = tuple[Callable[[Any], Any], str]
"""(old value -> new value, why)"""


def at_most(limit: int) -> Callable[[int], int]:
    return lambda old: min(old, limit)


def always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


RULES: dict[str, Rule] = {
    "batch.group_size": (at_most(GROUP_SIZE), TIME),
    "trainer.steps": (at_most(STEPS), TIME),
    "trainer.micro_batch_tokens": (at_most(MICRO_BATCH_TOKENS), TIME),
    "trainer.device": (always("cpu"), NO_GPU),
    "trainer.dtype": (always("float32"), NO_GPU),
    "trainer.threads": (always(1), HERE),
    "trainer.attention": (always("auto"), NO_GPU),
    "trainer.compile": (always(False), TIME),
    "trainer.memory_share": (always(1.0), NO_GPU),
    "trainer.start": (always("launcher"), HERE),
    "trainer.start_timeout_s": (always(None), HERE),
    "pin_threads": (always(False), HERE),
    "generator.device": (always("cpu"), NO_GPU),
    "generator.dtype": (always("float32"), NO_GPU),
    "generator.threads": (always(1), HERE),
    "generator.engine": (always("embedded"), NO_GPU),
    "generator.count": (lambda old: min(max(old, 1), GENERATORS), HERE),
    "generator.max_sequences": (lambda old: max(min(old, SEQUENCES), GROUP_SIZE), TIME),
    "generator.max_context": (always(0), "tokens are bytes"),
    "optimizer.warmup_steps": (at_most(1), TIME),
    "critic.warmup_steps": (at_most(1), TIME),
    "lora.rank": (at_most(LORA_RANK), "a tiny model"),
    "evaluation.every": (at_most(EVERY), TIME),
    "evaluation.problems": (at_most(PROBLEMS), TIME),
    "evaluation.samples": (always(1), TIME),
    "checkpoint.every": (at_most(EVERY), TIME),
    "canary.tolerance": (always(0.0), "float32"),
    "wire.endpoint": (always("auto"), HERE),
    "wire.connect": (always(""), HERE),
    "wire.keys": (always(""), HERE),
    "weights.endpoint": (always("auto"), HERE),
    "weights.transport": (always("auto"), NO_GPU),
    "trackers": (always([]), "nothing to keep"),
}
"""setting -> rule; None is the setting's default"""
DEFAULTS = {"vllm.": "embedded engine", "generator.gpus": NO_GPU, "trainer.gpus": NO_GPU}
"""settings, or beginnings of their names, that go back to their defaults"""
NOT_BY_HAND = ("model.", "task.", *DEFAULTS)
"""what words on the command line cannot put back: it is not here, or would be refused"""


def shrink(settings: Settings, words: Sequence[str], files: Files) -> tuple[Settings, list[Change]]:
    """`words`: name=value as given for the run; those that can hold win over the rules. Raises UserError for
    words that make settings which contradict each other."""
    old = {path: value for path, value, _, _ in described(settings)}
    new = dict(old)
    default = {path: value for path, value, _, _ in described(Settings())}
    why = {"model.path": "a tiny random model", "name": "beside real runs"}
    for path, (rule, reason) in RULES.items():
        if path in old:
            found = rule(old[path])
            new[path] = default[path] if found is None else found
            why[path] = reason
    for path in old:
        if (reason := next((r for start, r in DEFAULTS.items() if path.startswith(start)), "")):
            new[path], why[path] = default[path], reason
    new["batch.groups_per_step"] = min(old["batch.groups_per_step"], max(GROUPS, int(old.get("trainer.ranks", 1))))
    why["batch.groups_per_step"] = TIME
    new["name"] = f"{settings.name}-fake"
    new["model.path"] = str(files.model)
    new["task.name"], new["task.args"] = "rehearsed", rehearsed(settings, files)
    why["task.name"] = f"turns of {TURN_TOKENS} tokens; rewards are coins, since random weights earn none"
    laid = [word for word in words if "=" in word and not word.startswith(NOT_BY_HAND) and not _names(word)]
    values = with_overrides(_nested(new), laid)
    made = structured(Settings, values, where="")
    check(made)
    now = {path: value for path, value, _, _ in described(made)}
    changes = [
        Change(path=path, was=old[path], now=now[path], why=why.get(path, "as asked"))
        for path in now
        if now[path] != old[path] and path != "task.args"
    ]
    return made, [*changes, *_of_data(settings, files)]


def rehearsed(settings: Settings, files: Files) -> dict[str, Any]:
    """Arguments of the task `rehearsed` around the run's own."""
    args = {**settings.task.args, **{name: str(path) for name, path in files.data.items()}}
    call = f"{CALL_OPEN}1+2{CALL_CLOSE}" if settings.task.name == "tools" else ""
    return {"name": settings.task.name, "args": args, "max_tokens": TURN_TOKENS, "call": call}


def _of_data(settings: Settings, files: Files) -> list[Change]:
    return [
        Change(path=f"task.args.{name}", was=settings.task.args[name], now=str(path), why="no such file here")
        for name, path in files.data.items()
    ]


def _names(word: str) -> bool:
    return word.partition("=")[0] in ("name", "task")


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    out: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        at = out
        for group in groups:
            at = at.setdefault(group, {})
        at[name] = value
    return out


def table(changes: Sequence[Change]) -> str:
    """`setting: was -> is (why)`, one a line."""
    width = max((len(change.path) for change in changes), default=0)
    return "\n".join(f"  {c.path:<{width}}  {_shown(c.was)} -> {_shown(c.now)}  ({c.why})" for c in changes)


def _shown(value: Any) -> str:
    return str(value) if value not in ("", [], None) else "none"
