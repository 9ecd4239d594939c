"""The last sentence of a run claims no more than its numbers show."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_story import Story

from async_rl.observe.console import conclusion


@pytest.mark.parametrize(
    ("last", "said"),
    [(0.13, "shows no clear change"), (0.07, "shows no clear change"), (0.2, "learned"), (0.0, "got worse")],
)
def test_a_difference_within_the_noise_is_no_change(tmp_path: Path, last: float, said: str) -> None:
    summary = Story(path=tmp_path / "run", model=tmp_path, steps=10).summary() | {"dropped": {}}
    assert f"The model {said}:" in conclusion(summary | {"reward_eval_last": last})


def test_time_is_called_saved_only_when_it_was(tmp_path: Path) -> None:
    summary = Story(path=tmp_path / "run", model=tmp_path, steps=10).summary() | {"dropped": {}}
    slow = summary | {"seconds": 5.0, "seconds_training": 1.0, "seconds_generating": 2.0}
    assert conclusion(slow).endswith("in turn would have taken 3 s, side by side 5 s: nothing was saved.")
    assert "nothing was saved" not in conclusion(slow | {"seconds": 2.5})
