"""max_staleness=0 is synchronous training: the processes give what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support_run import quick_settings, train

from async_rl.instruments.synchronous import train_synchronously
from async_rl.model.folder import load_tensors
from async_rl.run_folder import read_rows
from async_rl.trainer.learner import StepReport

STEPS = 6
TOLERANCE = 2e-6
"""float32: the order in which episodes enter the engine's batch changes the last bits of a log-prob"""


@pytest.mark.parametrize(("recipe", "policy"), [("grpo", "pace"), ("vcpo", "pace"), ("grpo", "wait"), ("grpo", "drop")])
def test_without_staleness_a_run_equals_the_in_process_reference(
    recipe: str, policy: str, tmp_path: Path, tiny_model: Path
) -> None:
    overrides = ["staleness.max_staleness=0", f"trainer.steps={STEPS}", f"recipe={recipe}", "evaluation.every=2"]
    overrides.append(f"staleness.policy={policy}")
    settings = quick_settings(tiny_model, *overrides)
    reports: list[StepReport] = []
    learner = train_synchronously(settings, lambda _, report: reports.append(report))

    folder = train(settings, tmp_path / "run")

    rows = list(read_rows(folder.metrics))
    assert len(rows) == STEPS
    for row, report in zip(rows, reports, strict=True):
        assert row["lag/max"] == 0
        for key in ("reward/mean", "grad/norm", "lr/effective", "ess/ratio", "entropy", "batch/policy_tokens"):
            assert row[key] == pytest.approx(report.metrics[key], rel=1e-4, abs=1e-6), key
    trained = load_tensors(folder.checkpoints / f"step_{STEPS:06d}")
    for name, tensor in learner.weights().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
