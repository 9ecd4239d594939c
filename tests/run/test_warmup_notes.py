"""Warm-ups that cover the whole run are said at its start."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_run import quick_settings

from async_rl.observe.console import FULL, NARROW, Layout, StepRow
from async_rl.run.preflight import describe_warmups


@pytest.mark.parametrize(
    ("words", "has_critic", "said"),
    [
        (("critic.warmup_steps=7", "optimizer.warmup_steps=0"), True, "critic.warmup_steps is 7 and the run has 5"),
        (("critic.warmup_steps=5", "optimizer.warmup_steps=0"), True, "the policy stays as it is"),
        (("critic.warmup_steps=4", "optimizer.warmup_steps=0"), True, ""),
        (("optimizer.warmup_steps=9",), False, "the learning rate reaches 0.50 of optimizer.learning_rate"),
        (("optimizer.warmup_steps=4",), False, ""),
    ],
)
def test_a_warmup_as_long_as_the_run_is_a_note(
    tiny_model: Path, words: tuple[str, ...], has_critic: bool, said: str
) -> None:
    notes = describe_warmups(quick_settings(tiny_model, "trainer.steps=5", *words), has_critic=has_critic)
    assert len(notes) == bool(said)
    assert said in "".join(notes)


@pytest.mark.parametrize("columns", [FULL.columns, NARROW])
def test_the_line_of_a_step_says_that_the_critic_alone_is_trained(columns: tuple) -> None:
    row = {"lr/base": 1e-3, "lr/effective": 0.0}
    rates = next(c for c in Layout(columns).columns if c.top in ("learning", "lr x"))
    assert rates.cell(StepRow(row={**row, "critic/warmup": 1.0}, seconds=1.0)) == "critic"
    assert rates.cell(StepRow(row=row, seconds=1.0)) != "critic"
