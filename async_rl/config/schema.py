"""Settings from YAML files and the command line: read, checked, printed. The only file that imports
omegaconf; what can be set stands in settings/, task/ and objective/recipe.py."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from async_rl.errors import UserError, nearest

Made = TypeVar("Made")

NAMED = ("task", "recipe")
"""groups of settings that are chosen by a name: `task=guess` is short for `task.name=guess`"""


def setting(default: Any, meaning: str, *, unit: str = "") -> Any:
    """A dataclass field that is a setting: default, what it does, and in which unit."""
    metadata = {"meaning": meaning, "unit": unit}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def structured(cls: type[Made], values: Mapping[str, Any], *, where: str) -> Made:
    """An instance of the settings dataclass `cls` from plain values.

    `where` is the path of the values in the config, for messages ("task.args"; "" at the top).
    Raises UserError for an unknown name (with the nearest known one) or a wrong type.
    """
    _refuse_unknown(cls, values, where, (cls, where))
    try:
        base = OmegaConf.structured(cls)
        _unfreeze(base)
        made = OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.create(dict(values))))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, where)) from None
    assert isinstance(made, cls)
    return made


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, interpolations resolved. Raises UserError naming file and line."""
    try:
        loaded = OmegaConf.load(path)
        values = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a YAML file") from None
    except OSError as error:  # omegaconf also raises it for a file that holds a number
        raise UserError(f"{path} cannot be read as settings: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_explain(error, '')}") from None
    if values in ([], None):
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings (name: value), not a {type(values).__name__}")
    return {str(k): v for k, v in values.items()}


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with `a.b=c` words laid over them. `task=X` and `recipe=X` name one by itself."""
    for word in overrides:
        if "=" not in word or word.startswith("="):
            raise UserError(f"'{word}' is not a setting; write name=value, e.g. trainer.steps=100")
    base = dict(values)
    for word in overrides:
        name, value = word.split("=", 1)
        if name in NAMED and isinstance(base.get(name), Mapping) and base[name].get("name") != value:
            base[name] = {}  # another task or recipe: what the file says of its own does not apply
    try:
        laid = OmegaConf.from_dotlist([_named(word) for word in overrides])
        merged = OmegaConf.merge(OmegaConf.create(base), laid)
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, "")) from None
    except yaml.YAMLError as error:
        raise UserError(f"a value on the command line is not valid YAML: {' '.join(str(error).split())}") from None
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def _named(word: str) -> str:
    name, value = word.split("=", 1)
    return f"{name}.name={value}" if name in NAMED else word


def to_yaml(settings: object) -> str:
    """The settings as YAML that can be read back."""
    assert dataclasses.is_dataclass(settings)
    assert not isinstance(settings, type)
    plain = dataclasses.asdict(settings)
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def described(settings: object, prefix: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """(path, value, meaning, unit) of every setting in a settings dataclass, groups flattened."""
    assert dataclasses.is_dataclass(settings)
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        path = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            yield from described(value, path + ".")
        else:
            yield path, value, f.metadata.get("meaning", ""), f.metadata.get("unit", "")


def _unfreeze(node: DictConfig) -> None:
    """Frozen dataclasses come as read-only nodes; values are still to be laid over them."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _unfreeze(child)


def _refuse_unknown(cls: type, values: Mapping[str, Any], where: str, top: tuple[type, str]) -> None:
    """`top`: the outermost settings and where they stand, among which a misplaced name is looked for."""
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name, value in values.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in names:
            raise UserError(f"{path} is not a setting; {_nearest(cls, str(name), where, top)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UserError(_not_a_group(path, value, [f.name for f in dataclasses.fields(hint)]))
            _refuse_unknown(typing.cast(type, hint), value, path, top)
        elif typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            choices = [str(c) for c in typing.get_args(hint)]
            raise UserError(f"{path} is {value!r}; choose one of {', '.join(choices)}")
        elif typing.get_origin(hint) is dict and not isinstance(value, Mapping):
            raise UserError(_not_a_group(path, value, []))
        elif typing.get_origin(hint) is list and not isinstance(value, list):
            raise UserError(f"{path} is {_shown(value)}; it must be a list, e.g. {path}=[{value if value else ''}]")
        elif hint in WANTED and not _fits(value, hint):
            raise UserError(f"{path} is {_shown(value)}; it must be {WANTED[hint]}")


WANTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}
"""Plain types of settings in a user's words."""


def _fits(value: object, hint: object) -> bool:
    """Whether omegaconf would take `value` for a setting of the plain type `hint`."""
    if hint is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no", "on", "off", "0", "1")
    if hint is str:  # a name such as 2024 arrives as a number
        return isinstance(value, str | int | float | bool)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    if hint is int and isinstance(value, float):
        return False
    try:
        int(value) if hint is int else float(value)
    except ValueError:
        return False
    return True


def _shown(value: object) -> str:
    return "empty" if value is None else repr(value)


def _not_a_group(path: str, value: object, inner: Sequence[str]) -> str:
    what = f"a group of settings ({', '.join(inner) or 'name: value'})"
    if isinstance(value, str) and path in NAMED:
        return f"{path} is {what}; write {path}: {{name: {value}}}"
    return f"{path} is {what}, not {_shown(value)}"


def _nearest(cls: type, name: str, where: str, top: tuple[type, str]) -> str:
    """A sentence that helps with a misspelt or misplaced setting, in whole paths."""
    prefix = f"{where}." if where else ""
    names = [f.name for f in dataclasses.fields(cls)]
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean '{prefix}{close[0]}'?"
    outermost, at = top
    elsewhere = [path for path in _paths(outermost, f"{at}." if at else "") if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(repr(path) for path in elsewhere)}?"
    return nearest(name, names)


def _paths(cls: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield prefix + f.name
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _paths(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")


def _explain(error: OmegaConfBaseException, where: str) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or ""
    path = ".".join(part for part in (where, str(key)) if part)
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{path}: {message}" if path else message
