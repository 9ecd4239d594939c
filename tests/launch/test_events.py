"""Events are written and read back typed, and rows of other versions are no errors."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from async_rl.events import EVENTS, Event, GeneratorDied, StallReported, describe_events, read_event
from async_rl.run_folder import RunFolder, append_row

EXAMPLES: dict[str, Any] = {
    "int": 3, "float": 1.5, "str": "x", "tuple[int, ...]": (1, 2), "tuple[str, ...]": ("x",),
    "Mapping[str, int]": {"x": 2}, "Mapping[str, float]": {"x": 0.5},
    "Mapping[str, tuple[Any, Any]]": {"trainer.steps": (3, 4)},
}  # fmt: skip
"""a value of each type that events have"""


def example(kind: type[Event]) -> Event:
    return kind(**{f.name: EXAMPLES[str(f.type)] for f in fields(kind)})


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_read_back_as_it_was_written(name: str) -> None:
    event = example(EVENTS[name])
    row = json.loads(json.dumps(event.row(7.0)))
    assert (row["event"], row["time"]) == (name, 7.0)
    assert read_event(row) == event


def test_every_event_is_in_the_table_and_described() -> None:
    known = {kind.__qualname__ for kind in Event.__subclasses__()}
    assert known == {kind.__qualname__ for kind in EVENTS.values()}
    described = describe_events()
    assert [event.name for event in described] == list(EVENTS)
    assert all(event.meaning for event in described)
    (stall,) = [event for event in described if event.name == "stall"]
    assert ("for", "str", "what it waits for") in stall.fields


def test_rows_of_other_versions_are_kept_as_they_are(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append_row(folder.events, {"event": "generator_died", "name": "generator-0", "time": 1})  # without its cause
    append_row(folder.events, {"event": "moon_rose", "time": 2.0})
    append_row(folder.events, {"step": 3})
    died = GeneratorDied(name="generator-0", reason="killed", restart_in_s=0.5, deaths=1, max_restarts=3)
    append_row(folder.events, {**died.row(4.0), "of_a_later_version": True})
    rows = folder.read_events()
    assert [(row.name, row.time, row.event) for row in rows] == [
        ("generator_died", 1.0, None), ("moon_rose", 2.0, None), ("generator_died", 4.0, died),
    ]  # fmt: skip
    assert rows[1].row == {"event": "moon_rose", "time": 2.0}


def test_a_key_that_is_a_word_of_python_keeps_its_name_in_the_row() -> None:
    stall = StallReported(waits="trainer", what="permits", seconds=12.0, text="it waits")
    assert stall.detail() == {"waits": "trainer", "for": "permits", "seconds": 12.0, "text": "it waits"}
