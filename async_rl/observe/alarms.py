"""Alarms and rollbacks of a run, out of its events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Worth a line on every curve."""

    step: int
    """that raised the alarm; the first one after a rollback"""
    name: str
    """`alarm ess`, `rollback to 40`"""
    text: str
    """why, in words and numbers"""


def incidents(events: Iterable[Mapping[str, Any]]) -> list[Incident]:
    """In the order of the events; those that are not whole are left out."""
    found = []
    for event in events:
        match event:
            case {"event": "alarm", "step": int(step), "signal": str(signal), "reason": str(reason)}:
                found.append(Incident(step=step, name=f"alarm {signal}", text=reason))
            case {"event": "rollback", "version": int(version), "to": int(to), "text": str(text)}:
                found.append(Incident(step=version, name=f"rollback to {to}", text=text))
            case _:
                pass
    return found


def standing(events: Iterable[Mapping[str, Any]]) -> list[Incident]:
    """The alarms that were raised since the run went back, if it did."""
    found: list[Incident] = []
    for incident in incidents(events):
        if incident.name.startswith("rollback"):
            found.clear()
        else:
            found.append(incident)
    return found
