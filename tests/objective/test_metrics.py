"""The diagnostics of docs/metrics.md against their formulas, and their documentation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import list_recipes, load_recipe
from async_rl.objective.measures import quantile
from async_rl.objective.trust import bucket_names

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


@settings(max_examples=25, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_metrics_are_their_formulas(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Callable[[Columns], list[list[int]]], seed: int
) -> None:
    columns = replace(make_columns(seed), log_proximal=None)
    got = coefficients(columns, load_recipe({"name": "grpo"}), ObjectiveState())[0].metrics
    log_ratio = columns.log_prob - columns.log_behaviour
    w = log_ratio.exp()
    n = len(w)
    owner = [t for t in tokens_of_trajectory(columns) if t]
    totals = torch.stack([log_ratio[t].sum() for t in owner])
    lag = (columns.current_version - columns.version).double()
    ages = torch.stack([lag[t].max() - lag[t].min() for t in owner])
    fresh = columns.version == columns.current_version
    want = {
        "ess/token": w.sum() ** 2 / (n * (w**2).sum()),
        "ess/ratio": totals.exp().sum() ** 2 / (len(owner) * (totals.exp() ** 2).sum()),
        "is/log_weight_mean": totals.mean(),
        "is/log_weight_std": totals.std(correction=0),
        "is/log_weight_min": totals.min(),
        "is/log_weight_max": totals.max(),
        "is/ratio_mean": w.mean(),
        "is/ratio_max": w.max(),
        "is/ratio_min": w.min(),
        "is/ratio_p99": w.sort().values[math.ceil(0.99 * n) - 1],
        "is/chi2_token": (w**2).mean() - 1,
        "kl/behaviour": (w - 1 - log_ratio).mean(),
        "kl/behaviour_k1": -log_ratio.mean(),
        "lag/mean": lag.mean(),
        "lag/max": lag.max(),
        "lag/p95": lag.sort().values[math.ceil(0.95 * n) - 1],
        "lag/span": ages.mean(),
        "len/mean": torch.tensor([float(len(t)) for t in owner]).mean(),
        "reward/mean": columns.reward.mean(),
    }
    if fresh.any():
        want["kl/mismatch"] = (w - 1 - log_ratio)[fresh].mean()
    for name, value in want.items():
        assert got[name] == pytest.approx(float(value), rel=1e-6, abs=1e-9), name


def test_clip_fractions_split_by_the_sign_of_the_advantage(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(5)
    raw = {"baseline": "none", "scale": "none"}
    recipe = load_recipe({"name": "grpo", "advantage": raw})
    got = coefficients(columns, recipe, ObjectiveState())[0].metrics
    r = (columns.log_prob - columns.log_behaviour).exp()
    a = columns.reward[columns.trajectory_of_turn[columns.turn_of_token]]
    up, down = (a > 0) & (r > 1.2), (a < 0) & (r < 0.8)
    assert got["clip/frac_pos"] == pytest.approx(float(up.double().mean()))
    assert got["clip/frac_neg"] == pytest.approx(float(down.double().mean()))
    assert got["clip/frac"] == pytest.approx(float((up | down).double().mean()))
    cut = ((r * a).abs() * (up | down)).sum() / (r * a).abs().sum()
    assert got["clip/bias"] == pytest.approx(float(cut))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95, 0.99, 1.0])
def test_a_quantile_is_reached_by_that_share_of_the_values(share: float) -> None:
    for n in (1, 2, 7, 100):
        values = torch.arange(n, dtype=torch.float64).flip(0)
        assert float(quantile(values, share)) == math.ceil(share * n) - 1


def test_every_metric_key_is_documented(make_columns: Callable[..., Columns]) -> None:
    documented = set(re.findall(r"`([a-z0-9_<>/]+)`", DOCS.read_text(encoding="utf-8")))
    for name in list_recipes():
        recipe = load_recipe({"name": name, "select": {"veto": 0.7}})
        if name != "vcpo":
            recipe = load_recipe({"name": name})
        for key in coefficients(make_columns(1), recipe, ObjectiveState())[0].metrics:
            parts = key.split("/")
            if parts[0] == "reject" and len(parts) == 3:
                what = "<bucket>" if parts[2] in bucket_names() else parts[2]
                key = f"reject/<reason>/{what}"
                assert parts[1] in documented, parts[1]
            key = "controlled/<number>" if parts[0] == "controlled" else key
            key = key.replace("kl/more1/", "kl/more<n>/")
            assert key in documented, key
