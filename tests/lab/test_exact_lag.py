"""The lag is exact, and at lag 0 it is synchronous training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support_run import quick_settings

from async_rl.config import Settings
from async_rl.config.schema import structured
from async_rl.config.settings import TaskSettings
from async_rl.instruments.lab.cell import measure_first, run_cell, versions_to_measure
from async_rl.instruments.lab.exact_lag import FirstBatches, Sampled, train_with_exact_lag
from async_rl.instruments.rehearsal import write_tiny_model
from async_rl.instruments.synchronous import train_synchronously
from async_rl.trainer.learner import StepReport

STEPS = 9
TIMES = ("seconds",)


def lagged(model: Path, lag: int, *overrides: str) -> Settings:
    settings = quick_settings(model, f"trainer.steps={STEPS}", f"staleness.max_staleness={lag}", *overrides)
    return replace(settings, generator=replace(settings.generator, max_sequences=40))


def test_every_batch_was_sampled_by_the_version_of_its_lag_and_no_other(tiny_model: Path) -> None:
    for lag in (0, 1, 4):
        batches: list[Sampled] = []
        reports: list[StepReport] = []
        train_with_exact_lag(
            lagged(tiny_model, lag),
            each_batch=batches.append,
            each_step=lambda _, report, into=reports: into.append(report),
            measured=range(STEPS),
        )
        trained = [batch for batch in batches if batch.trained]
        assert [batch.step for batch in trained] == list(range(STEPS))
        for batch in batches:
            versions = {v for t in batch.episodes for v in t.policy_versions().tolist()}
            assert versions == {max(0, batch.step - lag)} == {batch.version}
        assert [report.metrics["lag/mean"] for report in reports] == [min(step, lag) for step in range(STEPS)]
        measured = [batch.version for batch in batches if not batch.trained]
        assert measured == list(range(STEPS - lag, STEPS)), "newer versions than any batch comes from are measured"


@pytest.mark.parametrize("recipe", ["grpo", "vcpo"])
def test_lag_0_is_synchronous_training_bit_for_bit(recipe: str, tiny_model: Path) -> None:
    settings = lagged(tiny_model, 0, f"recipe={recipe}")
    expected: list[StepReport] = []
    reference = train_synchronously(settings, lambda _, report: expected.append(report))
    found: list[StepReport] = []

    learner = train_with_exact_lag(
        settings, each_batch=lambda _: None, each_step=lambda _, report: found.append(report)
    )

    assert [report.metrics for report in found] == [report.metrics for report in expected]
    for name, tensor in reference.weights().items():
        assert torch.equal(learner.weights()[name], tensor), name


def test_cells_of_one_seed_see_the_same_problems_whatever_their_lag(tiny_model: Path) -> None:
    def problems(lag: int) -> list[list[tuple[int, int]]]:
        batches: list[Sampled] = []
        settings = lagged(tiny_model, lag)
        train_with_exact_lag(settings, each_batch=batches.append, each_step=lambda *_: None)
        return [[(t.problem, t.seed) for t in batch.episodes] for batch in batches]

    assert problems(0) == problems(3)


@pytest.mark.parametrize("recipe", ["grpo", "st_ppo"])
def test_a_cell_is_deterministic(recipe: str, tiny_model: Path) -> None:
    settings = lagged(tiny_model, 3, f"recipe={recipe}", "critic.warmup_steps=2")
    torch.manual_seed(1)
    first, first_curves = run_cell(settings, reward_first=0.1)
    torch.manual_seed(2)
    again, again_curves = run_cell(settings, reward_first=0.1)
    assert first_curves == again_curves
    for key in first.keys() - {"seconds", "processor_seconds"}:
        assert first[key] == again[key], key


@pytest.mark.parametrize(("steps", "lag"), [(200, 0), (200, 1), (200, 64), (160, 128), (9, 8), (1, 0)])
def test_the_last_tenth_of_the_versions_is_always_measured(steps: int, lag: int) -> None:
    sampled = {max(0, step - lag) for step in range(steps)}
    measured = sampled | set(versions_to_measure(steps, lag))
    assert set(range(steps - -(-steps // 10), steps)) <= measured
    assert max(measured) == steps - 1
    assert len(measured - sampled) <= 33 + steps / 10


def test_batches_kept_of_version_0_change_no_number_of_the_cells_that_come_after(tiny_model: Path) -> None:
    first = FirstBatches()
    for lag, recipe in ((4, "grpo"), (4, "vcpo"), (2, "vcpo"), (0, "grpo")):
        settings = lagged(tiny_model, lag, f"recipe={recipe}")
        alone, alone_curves = run_cell(settings, reward_first=0.1)
        after, after_curves = run_cell(settings, reward_first=0.1, first=first)
        assert after_curves == alone_curves
        assert after["reward_final"] == alone["reward_final"]


def test_what_version_0_sampled_is_kept_for_one_replicate_and_used_by_its_cells_alone(tiny_model: Path) -> None:
    first = FirstBatches()
    settings = lagged(tiny_model, 3)
    run_cell(settings, reward_first=0.1, first=first)
    known = first.of(replace(settings, recipe={"name": "vcpo"}, staleness=replace(settings.staleness, max_staleness=2)))
    assert sorted(step for begin, end in known for step in range(begin, end + 1)) == [0, 1, 2, 3]
    assert first.of(replace(settings, seed=settings.seed + 1)) == {}
    assert first.of(settings) == {}, "only the replicate at hand is kept"


def test_overlong_prompts_are_dropped_as_in_a_run(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "qwen3", seed=0)
    rows = [{"prompt": "a" * (5 if i % 8 == 0 else 300) + str(i), "answer": "1"} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def one(completion):\n    return 1.0\n")
    task = {
        "name": "dataset",
        "args": {"path": str(tmp_path / "rows.jsonl"), "max_tokens": 4, "eval_share": 0.25, "overlong": "drop",
                 "reward": f"{tmp_path / 'mine.py'}:one"},
    }  # fmt: skip
    chosen = lagged(tmp_path / "model", 1, "generator.max_context=64", "batch.groups_per_step=2", "batch.group_size=2")
    settings = replace(chosen, task=structured(TaskSettings, task, where="task"))
    assert measure_first(settings) == 1.0, "no episode failed"
    numbers, curves = run_cell(settings, reward_first=1.0)
    assert set(curves.rewards) == {1.0}
    assert numbers["reward_final"] == 1.0
