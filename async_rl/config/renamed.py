"""Settings that have another name now: values under the old one are taken as they were meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from async_rl.errors import UserError

RENAMED = {"trainer.updates_per_batch": "updates.epochs"}
"""old name: new name"""


def renamed(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`values` under today's names, and a sentence for each that had an old one. Raises UserError where both names
    are given."""
    found, notes = dict(values), []
    for old, new in RENAMED.items():
        (group, name), (into, called) = old.split("."), new.split(".")
        given = found.get(group)
        if not isinstance(given, Mapping) or name not in given:
            continue
        there = found.get(into) or {}
        if not isinstance(there, Mapping) or called in there:
            raise UserError(f"{old} is called {new} now, and both are given; leave {old} out")
        found[group] = {key: value for key, value in given.items() if key != name}
        found[into] = {**there, called: given[name]}
        notes.append(f"{old} is called {new} now, and was taken as that")
    return found, notes
