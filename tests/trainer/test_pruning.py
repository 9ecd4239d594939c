"""What CPPO leaves out before the forward pass changes nothing but the cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from support_run import quick_settings

from async_rl.errors import UserError
from async_rl.objective.library import load_recipe
from async_rl.trainer.build import make_learner
from async_rl.trainer.packing import pack_step
from async_rl.trajectory import Trajectory, Turn, VersionSpan


def trajectories(seed: int) -> list[Trajectory]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(16):
        tokens = rng.integers(0, 10, int(rng.integers(4, 9))).astype(np.int32)
        size = len(tokens)
        made.append(
            Trajectory(
                group=number // 4, sample=number % 4, problem=0, split="train", seed=0, tokens=tokens,
                log_behaviour=np.full(size, -1.0, np.float32), turns=(Turn(start=1, length=size - 1),),
                versions=(VersionSpan(version=0, start=0, end=size),), reward=float(rng.integers(0, 3)),
                ended="finished",
            )
        )  # fmt: skip
    made[3] = replace(made[3], turns=(), versions=())
    return made


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_is_that_without_pruning_at_a_smaller_cost(tiny_model: Path, seed: int) -> None:
    settings = quick_settings(tiny_model, "recipe=cppo")
    late = quick_settings(tiny_model, "recipe=cppo", "recipe.select.before_forward=false")
    batch = trajectories(seed)
    small, whole = pack_step(settings, batch), pack_step(late, batch)
    assert small.num_policy_tokens < whole.num_policy_tokens
    assert small.num_trajectories == whole.num_trajectories
    early, after = make_learner(settings).preview(small), make_learner(late).preview(whole)
    torch.testing.assert_close(early.gradient, after.gradient, rtol=1e-4, atol=1e-7)
    name = "reject/small_advantage/trajectories"
    assert early.metrics[name] == after.metrics[name] > 0
    assert early.metrics["reward/mean"] == after.metrics["reward/mean"]


@pytest.mark.parametrize(
    "changes",
    [{"select": {"largest_share": 1.0}}, {"select": {"denominator": "all"}}, {"advantage": {"credit": "turn_return"}},
     {"reward": {"overlong_limit": 8192}}, {"kl": {"coefficient": 0.1, "place": "reward"}},
     {"schedule": [{"number": "select.largest_share", "start": 1.0, "end": 0.5, "until": 9}]}],
)  # fmt: skip
def test_what_cannot_be_known_before_the_forward_pass_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match="before_forward"):
        load_recipe({"name": "cppo", **changes})
