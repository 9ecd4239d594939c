"""Runs with several updates a batch, a reference that follows, Q heads: replayed bit for bit; nothing trained twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_run import quick_settings, train

from async_rl.instruments.replay import replay
from async_rl.observe.audit import audit_run
from async_rl.run_folder import read_rows

pytestmark = pytest.mark.nightly
STEPS = 5
PPO = ("recipe=ppo", "critic.warmup_steps=1")
WAYS = {
    "minibatches": (*PPO, "updates.epochs=3", "updates.minibatches=2", "updates.kl_stop=1e-5"),
    "ranks": (*PPO, "updates.epochs=2", "updates.minibatches=2", "trainer.ranks=2"),
    "reference": ("recipe=dr_grpo", "recipe.kl.coefficient=0.1", "reference.average=0.5"),
    "turns": ("recipe=see_upo", "updates.epochs=2"),
    "tokens": ("recipe=ar_lopti", "updates.minibatches=2"),
    "q heads": ("recipe=archer", "critic.warmup_steps=0", "critic.target_average=0.5", "critic.epochs=2"),
    "distribution": (*PPO, "critic.loss=hl_gauss", "critic.low=0", "recipe.gae.value_clip=0"),
    "soft bellman": ("recipe=oreo", "critic.warmup_steps=0"),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_replayed_bit_for_bit(tmp_path: Path, tiny_model: Path, way: str) -> None:
    settings = quick_settings(
        tiny_model, f"trainer.steps={STEPS}", "checkpoint.every=2", "batch.groups_per_step=4", *WAYS[way]
    )
    folder = train(settings, tmp_path / "run")
    rows = list(read_rows(folder.metrics))
    if way == "minibatches":
        assert any(row["updates/done"] < 6 for row in rows), "the bound on the KL ended none"
        assert all(row["updates/done"] >= 1 for row in rows)
    if way == "ranks":
        assert all(row["updates/done"] + row["updates/left_out"] == 4 for row in rows)
        assert any(row["updates/done"] for row in rows)
    else:
        assert replay(folder).difference is None
    assert not audit_run(folder).violations
