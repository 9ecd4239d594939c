"""A rehearsal: settings made for GPUs and large models, shrunk so that the whole program runs on CPU in a minute.

A tiny random model stands in for the model, made-up sums for data files that are not here; nothing is learned.
`shrink` is pure: settings in, settings and a table of what was replaced out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from async_rl.config import Settings, check
from async_rl.config.schema import structured, values_of, with_overrides
from async_rl.errors import UserError
from async_rl.model.architecture import FAMILIES, DecoderConfig, Family
from async_rl.model.create import write_byte_tokenizer, write_random_weights
from async_rl.model.folder import read_config
from async_rl.task import task_class
from async_rl.task.data_files import glob
from async_rl.task.presets import with_preset

DATA = ("path", "eval_path")
"""arguments of tasks that name a file"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Settings that run here, and what was replaced for that."""

    settings: Settings
    changes: tuple[ReplacedSetting, ...]
    model: str
    """what stands in for the model, for the terminal"""

    def describe(self) -> str:
        return (
            f"A rehearsal with {self.model}: nothing is learned, what runs is the program.\n"
            f"Replaced (setting: was -> is), everything else is as configured:\n{changes_table(self.changes)}"
        )


def plan_rehearsal(settings: Settings, words: Sequence[str], folder: Path) -> Rehearsal:
    """Find what must be replaced, with the model and missing data in `folder`. Raises UserError."""
    if settings.task.name == "rehearsed":
        raise UserError("these are settings of a rehearsal already; leave --fake-model out")
    data = {name: folder / f"{name}.jsonl" for name in missing(settings.task.args)}
    made, changes = shrink(settings, words, StandIns(model=folder / "model", data=data))
    family, _ = family_of(settings.model.path)
    return Rehearsal(settings=made, changes=tuple(changes), model=f"a tiny random {family} on CPU")


def prepare_rehearsal(settings: Settings, words: Sequence[str], folder: Path) -> Rehearsal:
    """Like `plan_rehearsal`, and make the model and missing data anew in `folder`. Raises UserError."""
    planned = plan_rehearsal(settings, words, folder)
    model = folder / "model"
    try:
        shutil.rmtree(model, ignore_errors=True)
        write_tiny_model(model, settings.model.path, seed=settings.seed)
        for number, name in enumerate(missing(settings.task.args)):
            write_data(folder / f"{name}.jsonl", settings.task.args, seed=settings.seed + number)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another --run-dir") from None
    return planned


def missing(args: Mapping[str, Any]) -> list[str]:
    """Arguments of the task that name a file which is not here."""
    return [name for name in DATA if args.get(name) and not is_there(str(args[name]))]


def is_there(path: str) -> bool:
    """Whether a path, or a pattern of paths, leads to anything."""
    named = Path(path).expanduser()
    return named.exists() or (any(mark in path for mark in "*?[") and bool(glob(named)))


CONTEXT = 16_384
"""tokens, which are bytes"""
ROWS = 64
UNKNOWN: Family = "qwen3"


def family_of(path: str) -> tuple[Family, bool]:
    """(family, whether the head is tied) of the model folder, or, when it is not here, by its name. Models of other
    families are rehearsed with a Qwen3."""
    if Path(path).is_dir():
        try:
            config = read_config(path)
        except UserError:
            config = None
        return (config.family, config.tied) if config is not None else (UNKNOWN, True)
    name = Path(path).name.lower().replace(".", "").replace("-", "").replace("_", "")
    starts = {"qwen25": "qwen2", **{family: family for family in FAMILIES}}
    found = next((family for start, family in starts.items() if start in name), UNKNOWN)
    return found, False  # type: ignore[return-value]


def tiny_config(family: Family, *, tied: bool, vocabulary: int) -> DecoderConfig:
    """Two layers, a hundred thousand parameters."""
    return DecoderConfig(
        family=family,
        vocabulary=vocabulary,
        hidden=64,
        intermediate=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        max_context=CONTEXT,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=tied,
    )


def write_tiny_model(folder: Path, like: str, *, seed: int) -> DecoderConfig:
    """A random model of the family of `like`, whose tokens are bytes."""
    family, tied = family_of(like)
    config = tiny_config(family, tied=tied, vocabulary=write_byte_tokenizer(folder))
    write_random_weights(folder, config, seed=seed)
    return config


def write_data(path: Path, args: Mapping[str, Any], *, seed: int) -> None:
    """JSON lines in the form that the task's `args` name: sums of two numbers."""
    random = Random(seed)
    args = with_preset(args)
    answer_field, mark = args.get("answer_field", "answer"), args.get("answer_after", "")
    lines = []
    for number in range(ROWS):
        left, right = random.randrange(10, 100), random.randrange(10, 100)
        asked, answer = f"Problem {number}: what is {left} plus {right}?", f"{mark} {left + right}".strip()
        row: dict[str, Any] = {}
        _put(row, args.get("prompt_field", "prompt"), _chat(asked, answer, args))
        if answer_field:
            _put(row, answer_field, answer)
        lines.append(json.dumps(row) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


def _chat(asked: str, answer: str, args: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """A prompt, as chat messages where the answer is one of them."""
    if not args.get("answer_in_prompt"):
        return asked
    if args.get("messages") == "from_value":
        return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _put(row: dict[str, Any], name: str, value: Any) -> None:
    """`value` into the field of a row with a dotted name."""
    *around, last = name.split(".")
    for step in around:
        row = row.setdefault(step, {})
    row[last] = value


GROUPS, GROUP_SIZE, STEPS, EVERY = 4, 8, 6, 3
GENERATORS, SEQUENCES = 2, 64
TURN_TOKENS, MICRO_BATCH_TOKENS = 16, 4096
PROBLEMS = 4
LORA_RANK = 4

TIME, NO_GPU, HERE = "time", "no GPU", "this machine alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacedSetting:
    """One row of the table."""

    path: str
    was: Any
    now: Any
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIns:
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
    "task.reward_weights": (lambda _: {}, "rewards are coins"),
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
    "generator.start_timeout_s": (always(None), HERE),
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
    "weights.broadcast": (always(False), NO_GPU),
    "trackers": (always([]), "nothing to keep"),
}
"""setting -> rule; None is the setting's default"""
DEFAULTS = {"vllm.": "embedded engine", "generator.gpus": NO_GPU, "trainer.gpus": NO_GPU, "cluster.": HERE}
"""settings, or beginnings of their names, that go back to their defaults"""
NOT_BY_HAND = ("model.", "task.", *DEFAULTS)
"""what words on the command line cannot put back: it is not here, or would be refused"""


def shrink(settings: Settings, words: Sequence[str], files: StandIns) -> tuple[Settings, list[ReplacedSetting]]:
    """`words`: name=value as given for the run; those that can hold win over the rules. Raises UserError for
    words that make settings which contradict each other."""
    old = values_of(settings)
    new = dict(old)
    default = values_of(Settings())
    why = {"model.path": "a tiny random model", "name": "beside real runs"}
    for path, (rule, reason) in RULES.items():
        if path in old:
            found = rule(old[path])
            new[path] = default[path] if found is None else found
            why[path] = reason
    for path in old:
        if reason := next((r for start, r in DEFAULTS.items() if path.startswith(start)), ""):
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
    now = values_of(made)
    changes = [
        ReplacedSetting(path=path, was=old[path], now=now[path], why=why.get(path, "as asked"))
        for path in now
        if now[path] != old[path] and path != "task.args"
    ]
    return made, [*changes, *_of_data(settings, files)]


def rehearsed(settings: Settings, files: StandIns) -> dict[str, Any]:
    """Arguments of the task `rehearsed` around the run's own."""
    args = {**settings.task.args, **{name: str(path) for name, path in files.data.items()}}
    call = task_class(settings.task.name).example_call
    return {"name": settings.task.name, "args": args, "max_tokens": TURN_TOKENS, "call": call}


def _of_data(settings: Settings, files: StandIns) -> list[ReplacedSetting]:
    return [
        ReplacedSetting(path=f"task.args.{name}", was=settings.task.args[name], now=str(path), why="no such file here")
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


def changes_table(changes: Sequence[ReplacedSetting]) -> str:
    """`setting: was -> is (why)`, one a line."""
    width = max((len(change.path) for change in changes), default=0)
    return "\n".join(f"  {c.path:<{width}}  {_shown(c.was)} -> {_shown(c.now)}  ({c.why})" for c in changes)


def _shown(value: Any) -> str:
    return str(value) if value not in ("", [], None) else "none"
