"""Every setting, its meaning, unit and default. The only file that imports omegaconf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from async_rl.errors import UserError, nearest

Settings = TypeVar("Settings")


def setting(default: Any, meaning: str, *, unit: str = "") -> Any:
    """A dataclass field that is a setting: default, what it does, and in which unit."""
    metadata = {"meaning": meaning, "unit": unit}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def structured(cls: type[Settings], values: Mapping[str, Any], *, where: str) -> Settings:
    """An instance of the settings dataclass `cls` from plain values.

    `where` is the path of the values in the config, for messages ("task.args").
    Raises UserError for an unknown name (with the nearest known one) or a wrong type.
    """
    _refuse_unknown(cls, values, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(dict(values)))
        made = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, where)) from None
    assert isinstance(made, cls)
    return made


def _refuse_unknown(cls: type, values: Mapping[str, Any], where: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in fields:
            raise UserError(f"{path} is not a setting; {nearest(str(name), fields)}")
        inner = _settings_class(cls, name)
        if inner is not None:
            if not isinstance(value, Mapping):
                raise UserError(f"{path} is a group of settings ({', '.join(_names(inner))}), not {value!r}")
            _refuse_unknown(inner, value, path)


def _settings_class(cls: type, name: str) -> type | None:
    """The dataclass of field `name`, when that field is a group of settings."""
    import typing

    hint = typing.get_type_hints(cls)[name]
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _explain(error: OmegaConfBaseException, where: str) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or ""
    path = ".".join(part for part in (where, str(key)) if part)
    message = str(error).strip().splitlines()[0]
    return f"{path}: {message}"
