"""Failed episodes and parts of rewards, wherever a run is looked at."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from rich.console import Console as RichConsole
from support_story import Story

from async_rl.buffer.store import Store
from async_rl.events import EvaluationReported
from async_rl.observe.charts import charts_for
from async_rl.observe.conclusion import summary_rows
from async_rl.observe.console import evaluation_line, layout_for, step_line
from async_rl.observe.glossary import find_metric
from async_rl.observe.record import read_run
from async_rl.observe.report import report_data
from async_rl.observe.top import top
from async_rl.observe.tracker import held_out, numbers
from async_rl.run_folder import append_row, read_rows
from async_rl.trainer.loop import failed_since
from async_rl.trainer.summary import Totals
from async_rl.trajectory.codec import unpack
from async_rl.wire.messages import BufferCounters

REASON = "KeyError: 'gold' (my_rewards.py:31 judge)"
ROW: dict[str, Any] = {
    "step": 7, "time": 17.0, "reward/mean": 0.5, "lag/mean": 1.25, "lag/max": 2.0, "ess/ratio": 0.9,
    "lr/effective": 0.0004, "lr/base": 0.0005, "grad/norm": 0.25, "tokens/trained": 3000.0, "time/step": 1.0,
    "time/wait_for_batch": 0.5, "slots/used": 8.0, "slots/all": 8.0,
}  # fmt: skip
FAILED = {"episodes/failed": 0.125, "episodes/failure": REASON}


@pytest.mark.parametrize("width", [20, 40, 80, 98, 120, 140, 200])
@pytest.mark.parametrize("alarms", [{}, {"alarm/ess": 1.0}], ids=str)
def test_a_step_line_says_how_many_failed_and_why(width: int, alarms: dict[str, float]) -> None:
    row = {**ROW, **FAILED, **alarms}
    whole = step_line(row, None)
    assert whole.endswith(f"  12% failed: {REASON}")
    told = step_line(row, None, layout_for(width), width)
    assert max(map(len, told.split("\n"))) <= width
    assert "12% failed: K" in told
    assert "failed" not in step_line({**ROW, "episodes/failed": 0.0}, None)


def test_a_batch_without_a_token_has_a_line_and_counts_in_the_totals() -> None:
    empty = {name: value for name, value in ROW.items() if not name.startswith(("lag/", "ess/", "reward/"))}
    assert " - / - " in step_line(empty, None)
    totals = Totals()
    totals.add({**ROW, "batch/policy_tokens": 10.0})
    totals.add({**empty, "batch/policy_tokens": 0.0})
    assert (totals.steps, totals.tokens, totals.lag, totals.lag_max) == (2, 10.0, 12.5, 2.0)


def test_the_share_is_of_what_arrived_since_the_row_before() -> None:
    now = BufferCounters(trajectories_arrived=50, trajectories_failed=6, last_failure=REASON)
    assert failed_since({}, now) == {"episodes/failed": 0.12, "episodes/failure": REASON}
    before = {"episodes/arrived": 30.0, "episodes/failed_total": 6.0}
    assert failed_since(before, now) == {"episodes/failed": 0.0}
    assert failed_since({"episodes/arrived": 50.0, "episodes/failed_total": 6.0}, now) == {}
    assert now.metrics()["episodes/failed_total"] == 6.0


def evaluation(**changes: Any) -> EvaluationReported:
    values = {"evaluation": 0, "step": 3, "reward": 0.5, "trajectories": 64, "version_min": 3, "version_max": 3}
    return EvaluationReported(**{**values, **changes})


def test_the_line_of_an_evaluation_has_the_parts() -> None:
    line = evaluation_line(evaluation(parts={"correct": 0.25, "format": 1.0}))
    assert line == "held-out reward 0.500 after 3 steps (64 episodes, weights 3, correct 0.250, format 1.000)"
    event = evaluation(parts={"correct": 0.25}, failed=2, failures=(REASON,))
    assert evaluation_line(event).endswith(f"; 2 of 64 episodes failed: {REASON}")
    assert held_out(event) == {"reward/eval": 0.5, "reward/correct/eval": 0.25}


def test_every_part_is_explained_and_has_a_chart() -> None:
    keys = ("reward/correct/mean", "reward/correct/eval", "reward/format/mean", "reward/mean")
    charts = [(chart.title, chart.keys) for chart in charts_for(keys)]
    assert charts == [
        ("Reward", ("reward/mean",)),
        ("Reward: correct", ("reward/correct/mean", "reward/correct/eval")),
        ("Reward: format", ("reward/format/mean",)),
    ]
    for key in (*keys, "episodes/failed", "episodes/failure", "episodes/arrived", "episodes/failed_total"):
        assert find_metric(key) is not None, key


def story(tmp_path: Path, model: Path, *, summary: bool = True) -> Path:
    """A run of which some episodes failed, with parts in rows and evaluations."""
    folder = Story(path=tmp_path / "run", model=model, steps=6).write(summary=summary)
    rows = list(read_rows(folder.metrics))
    folder.metrics.write_text("")
    for row in rows:
        more = {"reward/correct/mean": 0.5, "episodes/failed": 0.0}
        append_row(folder.metrics, {**row, **more, **(FAILED if row["step"] == 4 else {})})
    folder.record(evaluation(parts={"correct": 0.75}))
    with Store(folder.store, durability="process", create=False) as store:
        (_, last) = store.next_numbers()
        store.add_group(group=last, problem=0, split="train", admitted_version=0, admitted_at=0.0, generator="g")
        known = unpack(store.load_groups([0])[0])
        store.add_trajectories(
            [structs.replace(known, group=last, sample=k, ended="error", reason=REASON) for k in range(3)]
        )
        store.commit()
    return folder.path


def test_top_shows_the_share_and_the_reason(tmp_path: Path, tiny_model: Path) -> None:
    out = io.StringIO()
    top(story(tmp_path, tiny_model), once=True, console=RichConsole(file=out, width=130, highlight=False))
    assert "an episode failed: KeyError: 'gold'" in out.getvalue()
    assert "failed  " in out.getvalue()


def test_the_report_counts_failures_by_reason_and_draws_the_parts(tmp_path: Path, tiny_model: Path) -> None:
    record = read_run(story(tmp_path, tiny_model))
    assert "episodes/failure" not in record.metric_keys(), "a text has no curve"
    (run,) = report_data([record], with_ratios=False)["runs"]
    assert run["failures"] == [[REASON, 3]] or run["failures"] == [(REASON, 3)]
    assert {"reward/correct/mean", "reward/correct/eval", "episodes/failed"} <= run["curves"].keys()
    assert "episodes/failure" not in run["curves"]
    assert "episodes/failure" not in numbers(record.rows[4])


def test_the_summary_says_why_episodes_failed_and_older_ones_say_nothing(tmp_path: Path) -> None:
    summary = Story(path=tmp_path / "run", model=tmp_path, steps=3).summary() | {"dropped": {}, "held_up": {}}
    summary |= {"seconds_with_start": 1.0, "canary": {"checked": 1, "max_difference": 0.0, "unchecked": []}}
    assert "failed because" not in dict(summary_rows(summary))
    ends = [dict(summary_rows({**summary, "steps": steps}))["held-out reward"] for steps in (1, 2)]
    assert [" after 1 step" in ends[0] and " steps" not in ends[0], " after 2 steps" in ends[1]] == [True, True]
    told = dict(summary_rows({**summary, "failures": {REASON: 12, "the reward is nan": 2}}))
    assert told["failed because"] == f"12 x {REASON}; 2 x the reward is nan"
