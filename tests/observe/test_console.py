"""The terminal during a run: lines that fit, and a last sentence that claims no more than its numbers show."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole
from support_run import quick_settings
from support_story import Story

from async_rl.events import EvaluationReported, StepSkipped
from async_rl.observe.conclusion import conclusion
from async_rl.observe.console import FULL, Console, evaluation_line, figure, layout_for, step_line
from async_rl.trainer.summary import gain_interval, judged, mean_judged


@pytest.mark.parametrize(
    ("last", "said"),
    [(0.13, "shows no clear change"), (0.07, "shows no clear change"), (0.2, "learned"), (0.0, "got worse")],
)
def test_a_difference_within_the_noise_is_no_change(tmp_path: Path, last: float, said: str) -> None:
    summary = Story(path=tmp_path / "run", model=tmp_path, steps=10).summary() | {"dropped": {}}
    assert f"The model {said}:" in conclusion(summary | {"reward_eval_last": last})


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([0.0] * 4, [1.0, 0.0, 0.0, 0.0], "shows no clear change"),
        ([0.0], [1.0], "shows no clear change"),
        ([0.25] * 4, [0.25] * 4, "shows no clear change"),
        ([0.0, 1.0] * 128, [0.0, 1.0, 1.0, 1.0] * 64, "learned"),
        ([0.0, 1.0, 1.0, 1.0] * 64, [0.0, 1.0] * 128, "got worse"),
        ([0.0, 1.0] * 128, [*[0.0, 1.0] * 120, *[1.0] * 16], "shows no clear change"),
    ],
)
def test_the_model_learned_only_where_the_interval_says_so(
    tmp_path: Path, before: list[float], after: list[float], said: str
) -> None:
    means = {"reward_eval_first": sum(before) / len(before), "reward_eval_last": sum(after) / len(after)}
    summary = Story(path=tmp_path / "run", model=tmp_path, steps=10).summary() | {"dropped": {}} | means
    told = conclusion(summary | {"reward_eval_gain": gain_interval(before, after)})
    assert f"The model {said}: " in told
    assert ("95 % of a bootstrap over episodes" in told) == (said == "shows no clear change")


def test_failed_held_out_episodes_are_no_rewards() -> None:
    rewards = [1.0, float("nan"), 0.0, float("nan")]
    assert (judged(rewards), mean_judged(rewards)) == ([1.0, 0.0], 0.5)
    assert gain_interval([], [1.0]) is None
    event = EvaluationReported(
        evaluation=0,
        step=0,
        reward=1.0,
        trajectories=8,
        version_min=0,
        version_max=0,
        failed=7,
        failures=("KeyError: x",),
    )
    line = "held-out reward 1.000 before training (1 episodes, weights 0); 7 of 8 episodes failed: KeyError: x"
    assert evaluation_line(event) == line
    assert evaluation_line(replace(event, failed=8)).startswith("no held-out reward before training: 8 of 8 episodes")


def test_time_is_called_saved_only_when_it_was(tmp_path: Path) -> None:
    summary = Story(path=tmp_path / "run", model=tmp_path, steps=10).summary() | {"dropped": {}}
    slow = summary | {"seconds": 5.0, "seconds_training": 1.0, "seconds_generating": 2.0}
    assert conclusion(slow).endswith("in turn would have taken 3 s, side by side 5 s: nothing was saved.")
    assert "nothing was saved" not in conclusion(slow | {"seconds": 2.5})


# ---------------------------------------------------------------------- lines of steps


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step, "time": 10.0 + step, "reward/mean": 0.5, "lag/mean": 1.25, "lag/max": 2.0, "ess/ratio": 0.9,
        "lr/effective": 0.0004, "lr/base": 0.0005, "grad/norm": 0.25, "tokens/trained": 3000.0, "time/step": 1.0,
        "time/wait_for_batch": 0.5, "slots/used": 8.0, "slots/all": 8.0, "len/mean": 51.5, "entropy": 1.1,
        "group/zero_signal": 0.25, "clip/frac": 0.01, **changes,
    }  # fmt: skip


EXTREME = {
    "reward/mean": -123.456, "lag/mean": 123.4, "lag/max": 128.0, "ess/ratio": 3e-5, "grad/norm": 1234567.8,
    "tokens/trained": 654321.0, "time/wait_for_batch": 1.0, "len/mean": 16384.0,
}  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 97, 98, 120, 140, 200])
@pytest.mark.parametrize("changes", [{}, EXTREME, {"skipped": 1.0}, {"alarm/ess": 1.0}], ids=str)
def test_a_line_fits_the_terminal_and_its_columns_stand_under_their_names(width: int, changes: dict[str, Any]) -> None:
    layout = layout_for(width)
    line = step_line(row(7, **changes), row(6), layout, width)
    top, below = layout.header().split("\n")
    assert max(len(line), len(top), len(below)) <= width
    at = 0
    for column in layout.columns:
        cell = line[at : at + column.width]
        assert cell == column.aligned(cell.strip()) or column.left, column.top
        at += column.width + 2
        assert line[at - 2 : at].strip() in ("", "!"), f"a gap behind {column.top}"


def test_a_wider_terminal_shows_more_and_80_characters_show_who_waits() -> None:
    tops = {width: [c.top for c in layout_for(width).columns] for width in (60, 80, 100, 120, 140)}
    assert "who waits" in tops[80]
    assert layout_for(100) == FULL
    assert len(tops[60]) < len(tops[80]) == len(tops[100]) < len(tops[120]) < len(tops[140])


def test_a_number_keeps_to_its_width() -> None:
    assert [figure(x, 6) for x in (0.25, -0.5, 123.456, 12345.6, 1e9, 2e-6, 0.0, float("nan"))] == [
        "0.250", "-0.500", "123.46", "12346", "1e+09", "2e-06", "0.000", "-",
    ]  # fmt: skip


def shown(tmp_path: Path, rows: list[dict[str, Any]], *, terminal: bool, width: int = 80, height: int = 24) -> str:
    """What a run with these rows prints. Skipped steps come with their event, as the trainer sends it."""
    out = io.StringIO()
    rich = RichConsole(
        file=out, width=width, height=height, force_terminal=terminal, highlight=False, color_system=None
    )
    console = Console(out=rich)
    console.start(quick_settings(tmp_path), tmp_path, [])
    console.stop()
    for one in rows:
        console.step(one)
        if one.get("skipped"):
            console.event(StepSkipped(step=one["step"], reason="every coefficient is zero: equal rewards"))
    return out.getvalue()


def test_the_header_comes_again_after_a_screenful_of_a_terminal_and_once_in_a_file(tmp_path: Path) -> None:
    rows = [row(step) for step in range(45)]
    text = shown(tmp_path, rows, terminal=True).split("\n")
    headers = [number for number, line in enumerate(text) if line.startswith("  step")]
    assert len(headers) == 3
    assert all(18 <= later - first <= 24 for first, later in pairwise(headers))
    assert shown(tmp_path, rows, terminal=False, width=80).count("  step  reward") == 1


def test_a_file_gets_whole_lines_whatever_its_width(tmp_path: Path) -> None:
    assert "who waits for whom" in shown(tmp_path, [row(0)], terminal=False, width=20)


def test_sparse_rewards_take_one_line_a_step(tmp_path: Path) -> None:
    rows = [row(step, skipped=1.0) for step in range(10)]
    text = shown(tmp_path, rows, terminal=False)
    assert text.count("changed nothing") == 1
    assert text.count("no step") == 10 + 1


def test_a_terminal_breaks_notes_between_words(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(out=RichConsole(file=out, width=30, force_terminal=True, color_system=None))
    console.print("held up     3 batches waited for running groups", indent=12)
    assert out.getvalue() == "held up     3 batches waited\n            for running groups\n"
