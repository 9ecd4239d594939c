"""Settings of a run from a YAML file and `a.b=c` words of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.config.checks import check, refuse_truncated_sampling
from async_rl.config.imports import locate_all
from async_rl.config.renamed import renamed
from async_rl.config.schema import by_name, load_yaml, named_in, structured, with_overrides
from async_rl.config.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Settings, and what the command line took out of the file to make them, in sentences for the user."""

    settings: Settings
    notes: tuple[str, ...]


def load_settings(path: Path, overrides: Sequence[str] = (), *, needs_model: bool = True) -> Settings:
    """Settings from a YAML file and `a.b=c` words, checked. Raises UserError. `needs_model`: see `check`."""
    return load_with_notes(path, overrides, needs_model=needs_model).settings


def load_with_notes(path: Path, overrides: Sequence[str] = (), *, needs_model: bool = True) -> Loaded:
    """The same, with what was dropped from the file. Raises UserError."""
    return make_settings(load_yaml(path), overrides, folder=path.parent, needs_model=needs_model)


def make_settings(
    given: Mapping[str, Any], overrides: Sequence[str] = (), *, folder: Path = Path(), needs_model: bool = True
) -> Loaded:
    """Settings from plain values, as a YAML file holds them, and `a.b=c` words, checked. Raises UserError.

    `folder`: where files of the user's own are looked for besides the working directory."""
    file = by_name(Settings, given)
    values, notes = renamed(with_overrides(file, overrides))
    locate_all(values, folder)
    notes += _replaced_recipe(file, overrides)
    if depth := implied_depth(file, overrides, values):
        values["staleness"]["pipeline_depth"] = 0.0
        notes.append(depth)
    refuse_truncated_sampling(values)
    settings = structured(Settings, values, where="")
    check(settings, needs_model=needs_model)
    return Loaded(settings=settings, notes=tuple(notes))


def _replaced_recipe(file: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """`recipe=NAME` drops the axes that the file changed."""
    name, given = named_in(overrides).get("recipe"), file.get("recipe")
    if name is None or not isinstance(given, Mapping):
        return
    dropped = [f"{path}={value}" for path, value in _leaves(given) if path != "name"]
    if dropped:
        yield (
            f"recipe={name} is that recipe as it is: what the file changed of {given.get('name', 'its recipe')} is "
            f"dropped ({', '.join(dropped)}); to keep one, give it too, e.g. recipe.{dropped[0]}"
        )


def implied_depth(file: Mapping[str, Any], overrides: Sequence[str], values: Mapping[str, Any]) -> str:
    """A bound given on the command line sets the depth it implies where the file's pipeline is deeper. Two that are
    both on the command line, or both in the file, are left to contradict each other. Empty: nothing to set."""
    given = {word.partition("=")[0] for word in overrides}
    if "staleness.max_staleness" not in given or "staleness.pipeline_depth" in given:
        return ""
    stale = values.get("staleness")
    if not isinstance(stale, Mapping) or "pipeline_depth" not in stale:
        return ""
    bound, depth = stale.get("max_staleness"), stale["pipeline_depth"]
    if not isinstance(bound, int) or not isinstance(depth, int | float) or not depth > bound + 1 >= 1:
        return ""
    return (
        f"staleness.max_staleness={bound} implies staleness.pipeline_depth={bound + 1}; the file's "
        f"staleness.pipeline_depth={depth:g} is dropped"
    )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
