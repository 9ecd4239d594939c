"""Rejections: by which bound, counted how, and what stays in the denominators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe

Lists = Callable[[Columns], list[list[int]]]


def kept_by_loop(columns: Columns, owner: list[list[int]], reason: str) -> list[bool]:
    answer = []
    log_ratio = (columns.log_prob - columns.log_behaviour).tolist()
    for i, members in enumerate(owner):
        x = [log_ratio[t] for t in members]
        total, mean = sum(x), sum(x) / max(len(x), 1)
        ok = {
            "sequence_ratio": torch.tensor(0.6).log() <= total <= torch.tensor(1.8).log(),
            "geometric_ratio": torch.tensor(0.9).log() <= mean <= torch.tensor(1.2).log(),
            "veto": min(x, default=0.0) >= torch.tensor(0.6).log(),
            "opsm": not (bool(x) and columns.reward[i] < 0 and -mean > 0.05),
            "truncated": not columns.truncated[i],
        }[reason]
        answer.append(bool(ok))
    return answer


SELECT: dict[str, dict[str, Any]] = {
    "sequence_ratio": {"sequence_low": 0.6, "sequence_high": 1.8},
    "geometric_ratio": {"geometric_low": 0.9, "geometric_high": 1.2},
    "veto": {"veto": 0.6},
    "opsm": {"opsm": 0.05},
    "truncated": {"drop_truncated": True},
}


@pytest.mark.parametrize("denominator", ["all", "kept"])
@pytest.mark.parametrize("reason", SELECT)
@settings(max_examples=12, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_rejected_trajectory_has_no_gradient_and_is_counted(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists, assert_equal: Callable[..., None],
    reason: str, denominator: str, seed: int,
) -> None:  # fmt: skip
    columns = make_columns(seed)
    raw = {"baseline": "none", "scale": "none"}
    values = {"name": "reinforce_tis", "advantage": raw, "trust": {"cap": 50.0}}
    plain, _ = coefficients(columns, load_recipe(values), ObjectiveState())
    select = {**SELECT[reason], "denominator": denominator}
    got, _ = coefficients(columns, load_recipe({**values, "select": select}), ObjectiveState())
    owner = tokens_of_trajectory(columns)
    kept = kept_by_loop(columns, owner, reason)
    want = plain.policy.clone()
    total = len(columns.log_prob)
    left = sum(len(t) for t, ok in zip(owner, kept, strict=True) if ok)
    for members, ok in zip(owner, kept, strict=True):
        want[members] *= (total / max(left, 1) if denominator == "kept" else 1.0) if ok else 0.0
    assert_equal(got.policy, want)
    gone = [len(t) for t, ok in zip(owner, kept, strict=True) if not ok]
    assert got.metrics[f"reject/{reason}/trajectories"] == len(gone)
    assert got.metrics[f"reject/{reason}/tokens"] == sum(gone)
    assert got.metrics.get(f"reject/{reason}/below_16", 0) == sum(n < 16 for n in gone)
    assert got.metrics.get(f"reject/{reason}/below_64", 0) == sum(16 <= n < 64 for n in gone)
    assert bool(got.skip) == (left == 0 or not want.any())


def test_groups_without_signal_can_leave_the_denominators(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(2)
    quiet = {"drop_zero_signal": True, "denominator": "kept"}
    for name in ("grpo", "vcpo"):
        plain, _ = coefficients(columns, load_recipe({"name": name}), ObjectiveState())
        got, _ = coefficients(columns, load_recipe({"name": name, "select": quiet}), ObjectiveState())
        factor = got.policy[plain.policy != 0] / plain.policy[plain.policy != 0]
        assert float(factor.min()) > 1.0
        torch.testing.assert_close(factor, factor[0].expand_as(factor))


@pytest.mark.parametrize("name", ["grpo", "mis", "vcpo", "ppo", "gspo", "m2po"])
def test_when_nothing_is_left_the_step_is_skipped_and_says_why(make_columns: Callable[..., Columns], name: str) -> None:
    columns = make_columns(3)
    broken = replace(columns, log_behaviour=torch.full_like(columns.log_behaviour, torch.nan))
    got, _ = coefficients(broken, load_recipe({"name": name}), ObjectiveState())
    assert got.skip.startswith("every trajectory was rejected: nonfinite")
    assert not got.policy.any()
    assert all(0 <= factor <= 1 for factor in got.learning_rate_factors.values())
    assert all(v == v and abs(v) != float("inf") for v in got.metrics.values()), got.metrics


def test_equal_rewards_everywhere_skip_the_step(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(3)
    columns = replace(columns, reward=torch.ones_like(columns.reward))
    for name in ("grpo", "vcpo"):
        got, _ = coefficients(columns, load_recipe({"name": name}), ObjectiveState())
        assert "equal rewards" in got.skip
