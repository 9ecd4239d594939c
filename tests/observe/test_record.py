"""A run folder is read whatever state it is in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_story import START, STEP_S, Story

from async_rl.buffer.store_reader import StoreSurvey
from async_rl.errors import UserError
from async_rl.events import GeneratorDied, GeneratorReady, ProcessFailed, ProcessStarted, RunInterrupted, RunResumed
from async_rl.observe import timeline
from async_rl.observe.charts import CHARTS, MOST_POINTS, charts_for, curve
from async_rl.observe.glossary import meaning, metrics_page, plain
from async_rl.observe.record import read_run


def test_a_torn_last_line_and_a_broken_one_are_left_out_and_said(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=5).write(summary=False)
    lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("\n".join([*lines[:2], "{not json", *lines[2:], lines[-1][:40]]))
    record = read_run(folder.path)
    assert [row["step"] for row in record.rows] == [0, 1, 2, 3, 4]
    assert sorted(record.notes) == [
        "1 line of metrics.jsonl cannot be read; left out",
        "the last line of metrics.jsonl is not whole; it was left out",
    ]


def test_a_step_that_was_trained_twice_counts_as_it_was_trained_last(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=3).write()
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"step": 1, "reward/mean": 0.125}) + "\n")
    record = read_run(folder.path)
    assert record.steps.tolist() == [0, 1, 2]
    assert record.column("reward/mean")[1] == 0.125


def test_how_a_run_stands_is_said(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=4)
    folder = story.write()
    assert read_run(folder.path).state() == ("finished", "finished: 4 of 4 steps")
    folder.summary.unlink()
    assert read_run(folder.path).state()[0] == "broken off"
    folder.lock.write_text(f"{os.getpid()}\n")
    assert read_run(folder.path).state() == ("going on", "going on: 4 of 4 steps so far")
    folder.lock.unlink()
    folder.record(ProcessFailed(process="trainer", message="out of paper"), time=START)
    assert read_run(folder.path).state() == ("failed", "failed after 4 of 4 steps: trainer: out of paper")
    folder.record(RunInterrupted(signal="SIGINT"), time=START)
    assert read_run(folder.path).state()[0] == "stopped"


def test_settings_of_another_version_are_shown_as_they_are(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=2).write()
    folder.config.write_text("name: old\nwarp: {factor: 9}\n")
    record = read_run(folder.path)
    assert record.settings is None
    assert {row.path: row.value for row in record.setting_rows} == {"name": "old", "warp.factor": 9}
    assert any("config.yaml" in note for note in record.notes)


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        read_run(tmp_path)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=4 * MOST_POINTS),
    st.randoms(use_true_random=False),
)
def test_thinning_a_curve_keeps_every_extreme_and_the_mean(values: list[float], random: object) -> None:
    value = np.array(values * 3, np.float64)
    value[:: max(1, len(value) // 7)] *= 3
    step = np.arange(len(value), dtype=np.float64)
    thin = curve(step, value, absent=np.zeros(len(value), bool))
    finite = value[np.isfinite(value)]
    assert thin is not None
    assert thin.not_finite == len(value) - len(finite)
    assert len(thin.mean) <= MOST_POINTS
    if len(finite) > MOST_POINTS:
        assert thin.low is not None
        assert thin.high is not None
        assert (thin.low.min(), thin.high.max()) == (finite.min(), finite.max())
        assert (thin.low <= thin.mean + 1e-6 * np.abs(thin.mean)).all()
        starts = np.searchsorted(step[np.isfinite(value)], thin.step)
        for part, low, high in zip(np.split(finite, starts[1:]), thin.low, thin.high, strict=True):
            assert (part.min(), part.max()) == (low, high)
    else:
        assert thin.mean.tolist() == finite.tolist()


def test_a_metric_no_row_has_is_no_curve() -> None:
    assert curve(np.arange(3.0), np.full(3, np.nan), absent=np.ones(3, bool)) is None


def test_every_metric_has_its_place_on_exactly_one_chart() -> None:
    placed = [key for chart in CHARTS for key in chart.keys]
    assert len(placed) == len(set(placed))
    shown = [key for chart in charts_for([*placed, "something/new"]) for key in chart.keys]
    assert sorted(shown) == sorted([*placed, "something/new"])


def test_the_meaning_of_a_metric_is_what_the_docs_say() -> None:
    assert meaning("lag/mean") == "mean of v − v_t, in steps"
    assert meaning("reject/veto/tokens") == "tokens rejected for this reason"
    assert meaning("no/such") == ""
    assert plain("x \\| `y`") == "x | y"
    assert (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics_page()


def test_the_trainer_s_time_is_laid_out_from_its_rows(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=20)
    record = read_run(story.write().path)
    spans = timeline.trainer_spans(record, first=3, last=5)
    training = [s for s in spans if s.doing == "training"]
    assert [s.text for s in training] == ["step 3", "step 4", "step 5"]
    assert training[0].end == pytest.approx(story.ends_at(3) - 0.05)
    assert training[0].end - training[0].start == pytest.approx(0.3)
    assert {s.doing for s in timeline.trainer_spans(record)} == {"waiting", "training", "publishing", "evaluating"}


def test_a_process_lives_from_its_start_to_its_death_or_the_end(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=20)
    folder = story.write()
    died = GeneratorDied(name="generator-0", reason="killed", restart_in_s=0.5, deaths=1, max_restarts=3)
    folder.record(died, time=START + 5)
    folder.record(ProcessStarted(process="generator-0", pid=7), time=START + 6)
    folder.record(GeneratorReady(name="generator-0"), time=START + 7)
    spans = [s for s in timeline.lives(read_run(folder.path)) if s.lane == "generator-0"]
    end = story.ends_at(19) + 0.02
    assert [(s.doing, s.start - START, round(s.end - START, 6)) for s in spans] == [
        ("starting", 0, 2),
        ("alive", 2, 5),
        ("starting", 6, 7),
        ("alive", 7, round(end - START, 6)),
    ]


def test_a_launch_that_was_killed_lived_until_its_last_sign(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=20)
    folder = story.write(summary=False)
    folder.record(RunResumed(version=20), time=START + 1000)
    spans = [s for s in timeline.lives(read_run(folder.path)) if s.lane == "trainer"]
    assert spans[-1].end == pytest.approx(story.ends_at(19) + 0.02)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=30),
    st.integers(1, 40),
)
def test_shares_of_time_add_up_to_the_time_spent(gaps: list[tuple[float, float]], buckets: int) -> None:
    spans, at = [], 1.0
    for gap, length in gaps:
        spans.append(timeline.Span(lane="x", doing="training", start=at + gap, end=at + gap + length))
        at += gap + length
    edges = np.linspace(0, at + 1, buckets + 1)
    share = timeline.shares(spans, edges)["training"]
    assert (share >= 0).all()
    assert (share <= 1).all()
    assert (share * np.diff(edges)).sum() == pytest.approx(sum(length for _, length in gaps), abs=1e-6)


def test_a_survey_reads_everything_or_evenly_spread_stretches(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=40, groups=8, size=8)
    with StoreSurvey(story.write().store) as store:
        whole = store.spread()
        assert len(whole) == store.last_id() == 40 * 64 + 13 * 8
        some = store.spread(most=640)
        assert len(some) == 640
        assert {row.step for row in some if row.step is not None} == set(range(40))
        assert store.refusals() == {"zero signal": 13}
        assert {row.generator for row in whole} == {"generator-0"}


def test_busy_generators_are_seen_from_the_rows(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=20)
    record = read_run(story.write().path)
    edges = np.linspace(story.ends_at(0), story.ends_at(19), 11)
    assert timeline.busy_share(record, edges) == pytest.approx(np.full(10, 0.4 / STEP_S))
