"""A value within a row by its dotted name: `reward_model.ground_truth`, `choices.0.text`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from async_rl.errors import nearest
from async_rl.task.rows import BadRow, Values


class Field:
    """Example: `Field("extra_info.split", setting="prompt_field").of({"extra_info": {"split": "a"}}) == "a"`.

    A field whose own name has dots comes first. Objects and lists may be stored as JSON text.
    """

    def __init__(self, name: str, *, setting: str) -> None:
        """`setting`: names the field; for messages."""
        self.name = name
        self.setting = setting
        self._path = name.split(".")

    @property
    def column(self) -> str:
        """The field of the row that it lies in."""
        return self._path[0]

    def of(self, values: Values) -> Any:
        """The value. Raises BadRow when there is none."""
        if self.name in values:
            return values[self.name]
        at: Any = values
        for step in self._path:
            at = parsed(at)
            if isinstance(at, list) and step.isdecimal() and int(step) < len(at):
                at = at[int(step)]
            elif isinstance(at, Mapping) and step in at:
                at = at[step]
            else:
                raise BadRow(self._missing(step, at))
        return at

    def get(self, values: Values) -> Any:
        """The value; None when there is none."""
        if not self.name:
            return None
        if len(self._path) == 1:
            return values.get(self.name)
        try:
            return self.of(values)
        except BadRow:
            return None

    def _missing(self, step: str, at: Any) -> str:
        said = f"no field '{self.name}' (task.args.{self.setting})"
        if isinstance(at, Mapping):
            inside = "" if len(self._path) == 1 else f"'{step}': "
            return f"{said}; {inside}{nearest(step, map(str, at))}"
        if isinstance(at, list):
            return f"{said}; there are {len(at)} entries where '{step}' is looked for"
        return f"{said}; where '{step}' is looked for stands {at!r:.60}"


def parsed(value: Any) -> Any:
    """A list or an object, also where it is stored as JSON text; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
