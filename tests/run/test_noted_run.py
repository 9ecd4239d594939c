"""A run whose task notes turns and tokens: what is noted decides what is trained, and it is replayed bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_run import quick_settings, train

from async_rl.instruments.replay import replay
from async_rl.observe.audit import audit_run
from async_rl.run_folder import read_rows

pytestmark = pytest.mark.nightly
STEPS = 4
TASK = """
from async_rl.task.guess import Guess


class Marked(Guess):
    noted = ("void", "teacher")

    async def rollout(self, problem, session):
        text = await session.generate(max_tokens=self.num_digits)
        session.note_turn("void", float(self.read(text) is None))
        session.note_tokens("teacher", [-1.0] * len(session.said[-1].tokens))
        return float(self.read(text) == problem.data["secret"])
"""


@pytest.mark.parametrize("recipe", ["simple_tir", "gvpo", "dapo"])
def test_a_run_with_notes_is_replayed_bit_for_bit(tmp_path: Path, tiny_model: Path, recipe: str) -> None:
    file = tmp_path / "marked.py"
    file.write_text(TASK)
    settings = quick_settings(
        tiny_model, f"task.name={file}:Marked", f"trainer.steps={STEPS}", f"recipe={recipe}",
        "recipe.schedule=[{number: trust.clip_high, start: 0.4, end: 0.2, until: 3}]",
    )  # fmt: skip
    folder = train(settings, tmp_path / "run")
    rows = list(read_rows(folder.metrics))
    if recipe == "simple_tir":  # the model of the tests hardly ever writes a number
        assert all(row["reject/flag/trajectories"] > 0 for row in rows)
    assert replay(folder).difference is None
    assert not audit_run(folder).violations
