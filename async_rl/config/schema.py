"""Settings as dataclasses: declared with meaning, unit and bounds; read from YAML and the command line; printed.

The only file that imports omegaconf. What can be set stands in config/settings.py, objective/recipe.py and task/.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from async_rl.errors import UserError, nearest

Made = TypeVar("Made")
Number = int | float

NAMED = ("task", "recipe")
"""groups of settings that are chosen by a name: `task=guess` is short for `task.name=guess`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The numbers that a setting may have; None: no limit on that side."""

    min: Number | None = None
    max: Number | None = None
    above: Number | None = None
    """like `min`, but this number itself is not allowed"""
    below: Number | None = None
    """like `max`, but this number itself is not allowed"""

    def refusal(self, value: Number) -> str:
        """What is wrong with `value`, as the end of a sentence; empty when it is allowed."""
        if isinstance(value, float) and not isfinite(value):
            return "it must be a finite number"
        low = self.min is not None and value < self.min
        high = self.below is not None and value >= self.below
        if self.min is not None and self.below is not None and (low or high):
            return f"it must be at least {self.min:g} and below {self.below:g}"
        if self.min is not None and low:
            return f"it must be at least {self.min:g}"
        if self.above is not None and value <= self.above:
            return f"it must be above {self.above:g}"
        if self.max is not None and value > self.max:
            return f"it must be at most {self.max:,}"
        if self.below is not None and high:
            return f"it must be below {self.below:g}"
        return ""

    def describe(self) -> str:
        """`at least 0, at most 1`; empty without limits."""
        words = (("at least", self.min), ("above", self.above), ("at most", self.max), ("below", self.below))
        return ", ".join(f"{word} {limit:,}" for word, limit in words if limit is not None)


UNLIMITED = Bounds()


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    min: Number | None = None,
    max: Number | None = None,
    above: Number | None = None,
    below: Number | None = None,
) -> Any:
    """A dataclass field that is a setting: its default, what it does, its unit and its bounds.

    A setting with choices is annotated with `Literal[...]`, which lists them.
    """
    bounds = Bounds(min=min, max=max, above=above, below=below)
    metadata = {"meaning": meaning, "unit": unit, "bounds": bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def structured(cls: type[Made], values: Mapping[str, Any], *, where: str) -> Made:
    """An instance of the settings dataclass `cls` from plain values.

    `where` is the path of the values in the config, for messages ("task.args"; "" at the top).
    Raises UserError for an unknown name (with the nearest known one), a wrong type or a number out of its bounds.
    """
    values = _without_nulls(cls, by_name(cls, values))
    _refuse_unknown(cls, values, where, (cls, where))
    try:
        base = OmegaConf.structured(cls)
        _unfreeze(base)
        made = OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.create(dict(values))))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, where)) from None
    assert isinstance(made, cls)
    check_bounds(made, f"{where}." if where else "")
    return made


def by_name(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` with `recipe: grpo` written out as `recipe: {name: grpo}`, where `cls` has such a group."""
    assert dataclasses.is_dataclass(cls)
    groups = {f.name for f in dataclasses.fields(cls)}.intersection(NAMED)
    return {k: {"name": v} if k in groups and isinstance(v, str) else v for k, v in values.items()}


def _without_nulls(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the entries that are null in mappings of names to numbers: null takes an entry out, or all."""
    out = dict(values)
    for name, kind in typing.get_type_hints(cls).items():
        given = out.get(name)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(given, Mapping):
            out[name] = _without_nulls(kind, given)
        elif name in out and typing.get_origin(kind) is dict and typing.get_args(kind)[1] in (int, float):
            entries = {} if given is None else given
            out[name] = {k: v for k, v in entries.items() if v is not None} if isinstance(entries, Mapping) else entries
    return out


def check_bounds(settings: object, prefix: str = "") -> None:
    """Refuse numbers out of their bounds, and numbers that are not finite. Raises UserError."""
    for info in describe(settings, prefix):
        if isinstance(info.value, int | float) and (refusal := info.bounds.refusal(info.value)):
            raise UserError(f"{info.path} is {info.value}; {refusal}")


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
    """`values` with `a.b=c` words laid over them.

    `recipe=NAME` is that recipe: the axes which `values` changed are dropped, those among `overrides` stay.
    `task=NAME` drops what `values` say of another task. A mapping is laid over the one that is there, `a.b={}` takes
    all of that out.
    """
    for word in overrides:
        if "=" not in word or word.startswith("="):
            raise UserError(f"'{word}' is not a setting; write name=value, e.g. trainer.steps=100")
    base = {**values}
    for group, name in named_in(overrides).items():
        given = base.get(group)
        given = {"name": given} if isinstance(given, str) else given
        if isinstance(given, Mapping):
            base[group] = given if group == "task" and given.get("name") == name else {}
    for word in overrides:
        name, value = word.split("=", 1)
        if value.strip() == "{}":
            _clear(base, name.split("."))
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


def _clear(values: dict[str, Any], path: Sequence[str]) -> None:
    """Make the mapping at `path` an empty one. The mappings around it are copied: they are the caller's."""
    first, *rest = path
    inner = values.get(first)
    if rest and isinstance(inner, Mapping):
        values[first] = dict(inner)
        _clear(values[first], rest)
    elif isinstance(inner, Mapping):
        values[first] = {}


def named_in(overrides: Sequence[str]) -> dict[str, str]:
    """Group -> the name that `overrides` choose for it: `recipe=grpo` and `recipe.name=grpo` alike."""
    pairs = [_named(word).split("=", 1) for word in overrides]
    return {path.removesuffix(".name"): name for path, name in pairs if path in [f"{group}.name" for group in NAMED]}


def _named(word: str) -> str:
    name, value = word.split("=", 1)
    return f"{name}.name={value}" if name in NAMED else word


def to_yaml(settings: object) -> str:
    """The settings as YAML that can be read back."""
    assert dataclasses.is_dataclass(settings)
    assert not isinstance(settings, type)
    plain = dataclasses.asdict(settings)
    return OmegaConf.to_yaml(OmegaConf.create(plain))


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingInfo:
    """One setting as `async-rl config` explains it."""

    path: str
    value: Any
    default: Any
    meaning: str
    unit: str
    choices: tuple[str, ...]
    bounds: Bounds

    def describe_range(self) -> str:
        """Choices, bounds and unit in short: `steps; at least 1`."""
        choices = " | ".join(self.choices)
        return "; ".join(part for part in (self.unit, choices, self.bounds.describe()) if part)


def describe(settings: object, prefix: str = "") -> Iterator[SettingInfo]:
    """Every setting of a settings dataclass, groups flattened."""
    assert dataclasses.is_dataclass(settings)
    hints = typing.get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        path = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            yield from describe(value, path + ".")
            continue
        yield SettingInfo(
            path=path,
            value=value,
            default=f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
            meaning=f.metadata.get("meaning", ""),
            unit=f.metadata.get("unit", ""),
            choices=_choices(hints[f.name]),
            bounds=f.metadata.get("bounds", UNLIMITED),
        )


def values_of(settings: object) -> dict[str, Any]:
    """Path -> value of every setting, groups flattened."""
    return {info.path: info.value for info in describe(settings)}


def _choices(hint: Any) -> tuple[str, ...]:
    return tuple(str(choice) for choice in typing.get_args(hint)) if typing.get_origin(hint) is Literal else ()


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
            raise UserError(f"{path} is {value!r}; choose one of {', '.join(_choices(hint))}")
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
    return f"{path} is a group of settings ({', '.join(inner) or 'name: value'}), not {_shown(value)}"


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
