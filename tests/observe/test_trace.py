"""The trace of a run keeps the rules of the Trace Event Format, and its arrows go where the groups went."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support_run import quick_settings, train
from support_story import Story

from async_rl.buffer.store_reader import StoreReader
from async_rl.errors import UserError
from async_rl.observe.record import read_run
from async_rl.observe.trace import trace, write_trace

NEEDED = {"X": {"ts", "dur", "name"}, "M": {"name", "args"}, "i": {"ts", "s", "name"}, "C": {"ts", "args", "name"}}
NEEDED |= {kind: {"ts", "id", "cat", "name"} for kind in "stf"}


def check_format(made: dict[str, Any]) -> None:
    """What chrome://tracing and Perfetto rely on."""
    rows: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    named = {e["pid"] for e in made["traceEvents"] if e["ph"] == "M" and e["name"] == "process_name"}
    for event in made["traceEvents"]:
        assert event.keys() >= NEEDED[event["ph"]] | {"pid", "tid"}, event
        assert event["pid"] in named
        assert event.get("ts", 0) >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] in "stf":
            flows[event["id"]].append(event)
        elif event["ph"] == "C":
            assert all(isinstance(v, int | float) for v in event["args"].values())
    for spans in rows.values():  # no two of one row overlap (times are rounded to 0.1 us)
        spans.sort()
        assert all(end <= start + 0.2 for (_, end), (start, _) in itertools.pairwise(spans))
    for stops in flows.values():
        assert [stop["ph"] for stop in stops] in (["s", "f"], ["s", "t", "f"])
        assert [stop["ts"] for stop in stops] == sorted(stop["ts"] for stop in stops)
        for stop in stops:  # each is bound to a span of its row
            assert any(start <= stop["ts"] <= end for start, end in rows[stop["pid"], stop["tid"]])


def names(made: dict[str, Any]) -> dict[int, str]:
    return {e["pid"]: e["args"]["name"] for e in made["traceEvents"] if e["ph"] == "M" and e["name"] == "process_name"}


def test_the_trace_of_a_story_keeps_the_format_and_shows_each_step(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=20, lag=3)
    made = trace(read_run(story.write().path))
    check_format(made)
    spans = [e for e in made["traceEvents"] if e["ph"] == "X"]
    training = [e["args"]["what"] for e in spans if e["name"] == "training"]
    assert training == [f"step {i}" for i in range(20)]
    assert {"waiting", "publishing", "evaluating", "batch", "generating"} <= {e["name"] for e in spans}
    assert set(names(made).values()) >= {"trainer", "buffer", "generator-0"}
    assert sum(e["name"].startswith("group ") for e in spans) == 20 * 4 + 20 // 3


def test_arrows_lead_from_a_group_to_the_step_that_trained_it(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=20, lag=3).write()
    made = trace(read_run(folder.path))
    steps = {(e["pid"], e["ts"]): e["args"]["what"] for e in made["traceEvents"] if e.get("name") == "training"}
    ends = {e["id"]: steps[e["pid"], e["ts"]] for e in made["traceEvents"] if e["ph"] == "f"}
    with StoreReader(folder.store) as store:
        batches = {group: f"step {batch.step}" for batch in store.batches() for group in batch.groups}
    assert ends == batches


def test_the_trace_of_a_real_run_keeps_the_format(tmp_path: Path, tiny_model: Path) -> None:
    folder = train(quick_settings(tiny_model), tmp_path / "run")
    assert write_trace(folder.path, tmp_path / "trace.json") > 50
    made = json.loads((tmp_path / "trace.json").read_text())
    check_format(made)
    assert len({e["id"] for e in made["traceEvents"] if e["ph"] == "s"}) == 4 * 4


def test_some_steps_can_be_chosen(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=20).write()
    made = trace(read_run(folder.path), (5, 7))
    check_format(made)
    training = [e["args"]["what"] for e in made["traceEvents"] if e.get("name") == "training"]
    assert training == ["step 5", "step 6", "step 7"]
    with pytest.raises(UserError, match="the run has 0:19"):
        trace(read_run(folder.path), (30, 40))


def test_without_a_store_the_trainer_s_side_is_traced(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=5).write()
    folder.store.unlink()
    made = trace(read_run(folder.path))
    check_format(made)
    assert sum(e.get("name") == "training" for e in made["traceEvents"]) == 5
    folder.metrics.unlink()
    with pytest.raises(UserError, match="no step was trained yet"):
        trace(read_run(folder.path))
