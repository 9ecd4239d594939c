"""What came back from the experience pool, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def pool_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a run's summary as (name, value); nothing where nothing came back."""
    found = dict(summary.get("pool") or {})
    replaced, age = found.pop("replaced", 0), found.pop("age_max", 0)
    if not found:
        return []
    said = ", ".join(f"{count} {source}" for source, count in sorted(found.items()))
    older = f", at most {age} steps old" if age else ""
    instead = f"; in place of {replaced} fresh trajectories" if replaced else ""
    return [("came back", f"{said}{older}{instead}")]
