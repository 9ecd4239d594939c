"""Settings that a Python program gives: a mapping or `Settings` in place of a file, keywords in place of words, and
classes and functions in place of their names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from async_rl.config.imports import import_name
from async_rl.config.load import load_with_notes, make_settings
from async_rl.config.settings import Settings
from async_rl.errors import UserError

Config = str | Path | Mapping[str, Any] | Settings
"""settings: a YAML file, the values such a file holds, or `ar.Settings`"""
YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")
"""text that YAML takes for something else"""


def settings_from(config: Config, words: Iterable[str] = ()) -> tuple[Settings, tuple[str, ...]]:
    """Checked settings, and what the words took out of the config, in sentences. Raises UserError.

    Example:
        >>> values = {"model": {"path": "models/tiny"}, "task": "guess", "recipe": "grpo"}
        >>> settings_from(values, ["trainer.steps=10"])[0].trainer.steps
        10
    """
    if isinstance(config, str | Path):
        loaded = load_with_notes(Path(config), list(words))
    elif isinstance(config, Settings):
        loaded = make_settings(asdict(config), list(words))
    elif isinstance(config, Mapping):
        loaded = make_settings(_values(config), list(words))
    else:
        raise UserError(f"config is a {type(config).__name__}; give a YAML file, a mapping or ar.Settings")
    return loaded.settings, loaded.notes


def override_words(overrides: Mapping[str, Any]) -> list[str]:
    """Settings as the words of a command line.

    Example:
        >>> override_words({"trainer": {"steps": 5}, "recipe": {"name": "vcpo", "ess": {"scale": "none"}}})
        ['trainer.steps=5', 'recipe=vcpo', 'recipe.ess.scale=none']
        >>> override_words({"staleness.max_staleness": 0, "trackers": ["wandb"]})
        ['staleness.max_staleness=0', 'trackers=["wandb"]']
    """
    words: list[str] = []
    for name, value in overrides.items():
        match name:
            case "task":
                task, args = task_of(value)
                words += [f"task={task}", *_words("task.args", args)]
            case "reward":
                words.append(f"task.args.reward={_name(value)}")
            case "recipe":
                recipe, axes = _recipe_of(value)
                words += [f"recipe={recipe}"] if recipe else []
                words += _words("recipe", axes)
            case _:
                words += _words(name, value)
    return words


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config given as a mapping as a YAML file would hold it: dotted names nested, classes and functions by name.

    Example:
        >>> _values({"task": "dataset", "reward": "numeric", "recipe": "grpo", "trainer.steps": 3, "name": "mine"})
        ... # doctest: +NORMALIZE_WHITESPACE
        {'trainer': {'steps': 3}, 'name': 'mine', 'task': {'name': 'dataset', 'args': {'reward': 'numeric'}},
         'recipe': {'name': 'grpo'}}
    """
    made = _nested({name: value for name, value in config.items() if name not in ("task", "recipe", "reward")})
    if "task" in config:
        name, args = task_of(config["task"])
        given = made.get("task", {})
        made["task"] = {"name": name, "args": {**args, **given.get("args", {})}}
    if "reward" in config:
        made.setdefault("task", {}).setdefault("args", {})["reward"] = _name(config["reward"])
    if "recipe" in config:
        name, axes = _recipe_of(config["recipe"])
        made["recipe"] = {**({"name": name} if name else {}), **made.get("recipe", {}), **_nested(axes)}
    return made


def _name(given: Any) -> str:
    return given if isinstance(given, str) else import_name(given)


def task_of(task: Any) -> tuple[str, Mapping[str, Any]]:
    """(name, settings) of a task that is given by name, as a class, as an instance or as a mapping."""
    if isinstance(task, Mapping):
        if "name" not in task or task.keys() - {"name", "args"}:
            raise UserError(f"task is {dict(task)!r:.80}; as a mapping it holds name and args, nothing else")
        return task_of(task["name"])[0], task.get("args") or {}
    if isinstance(task, str | type):
        return _name(task), {}
    settings = getattr(task, "settings", None)
    known = dataclasses.is_dataclass(settings) and not isinstance(settings, type)
    return import_name(type(task)), asdict(settings) if known else {}  # type: ignore[arg-type]


def _recipe_of(recipe: Any) -> tuple[str, Mapping[str, Any]]:
    """(name, axes) of a recipe that is given by name, as a function or as a mapping; the name may be empty."""
    if not isinstance(recipe, Mapping):
        return _name(recipe), {}
    axes = {name: value for name, value in recipe.items() if name != "name"}
    return _name(recipe["name"]) if "name" in recipe else "", axes


def _words(name: str, value: Any) -> Iterator[str]:
    """`value` as words, a mapping as one word a leaf."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        for inner, leaf in value.items():
            yield from _words(f"{name}.{inner}", leaf)
    else:
        yield f"{name}={_yaml(name, value)}"


def _yaml(name: str, value: Any) -> str:
    """A value as YAML on one line; plain text without quotes."""
    if isinstance(value, Path):
        value = str(value)
    if (
        isinstance(value, str)
        and value.replace("_", "a").replace("/", "a").isalpha()
        and value.lower() not in YAML_WORDS
    ):
        return value
    try:
        return json.dumps(value)
    except TypeError:
        what = "a setting is a number, text, true or false, or a list of these"
        raise UserError(f"{name} is {value!r:.60}; {what}") from None


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with dotted names as mappings within mappings. Raises UserError for a value that is no setting.

    Example:
        >>> _nested({"trainer.steps": 3, "trainer": {"ranks": 1}, "name": "mine"})
        {'trainer': {'steps': 3, 'ranks': 1}, 'name': 'mine'}
    """
    made: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = str(name).split(".")
        inner = made
        for group in groups:
            inner = inner.setdefault(group, {})
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping):
            inner[last] = {**inner.get(last, {}), **_nested(value)}
        else:
            inner[last] = str(value) if isinstance(value, Path) else value
    return made
