"""Shares of tokens in every aggregation, and what rejections do to the denominators."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.objective import Columns
from async_rl.objective.axes import AggregateSettings
from async_rl.objective.coefficients import shares
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.objective.tokens import Tokens, tokens_of

Lists = Callable[[Columns], list[list[int]]]


def prepared(columns: Columns) -> Tokens:
    recipe = load_recipe({"name": "grpo"})
    return tokens_of(columns, recipe, requirements(recipe))


@pytest.mark.parametrize(
    ("mode", "want"),
    [("token_mean", 10 / 6), ("seq_mean_token_mean", 1.5), ("seq_mean_token_sum", 5.0), ("constant", 1.25)],
)
def test_the_vectors_of_the_specification(mode: str, want: float) -> None:
    turn = torch.tensor([0, 0, 1, 1, 1, 1])
    zero = torch.zeros(6, dtype=torch.float64)
    columns = Columns(
        log_prob=zero, log_behaviour=zero, version=turn, turn_of_token=turn,
        trajectory_of_turn=torch.tensor([0, 1]), group_of_trajectory=torch.tensor([0, 0]),
        reward=zero[:2], turn_reward=zero[:2], state_key=torch.tensor([-1, -1]),
        truncated=torch.tensor([False, False]), current_version=1,
    )  # fmt: skip
    loss = torch.tensor([1.0, 1, 2, 2, 2, 2], dtype=torch.float64)
    settings_ = AggregateSettings(mode=mode, constant=4.0)  # type: ignore[arg-type]
    share = shares(prepared(columns), torch.tensor([True, True]), settings_)
    assert float((loss * share).sum()) == pytest.approx(want)


@pytest.mark.parametrize("mode", get_args(get_type_hints(AggregateSettings)["mode"]))
@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_shares_are_means_of_means(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists, tokens_of_turn: Lists, mode: str, seed: int
) -> None:
    columns = make_columns(seed)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.randn(len(columns.log_prob), generator=generator, dtype=torch.float64)
    counted = torch.rand(len(columns.reward), generator=generator) < 0.7
    sequences = [t for t, ok in zip(tokens_of_trajectory(columns), counted, strict=True) if t and ok]
    if not sequences:
        return
    owner = columns.trajectory_of_turn
    turns = [t for k, t in enumerate(tokens_of_turn(columns)) if t and counted[owner[k]]]
    means = [loss[t].mean() for t in sequences]
    by_turn: dict[int, list[torch.Tensor]] = {}
    for k, t in enumerate(tokens_of_turn(columns)):
        if t and counted[owner[k]]:
            by_turn.setdefault(int(owner[k]), []).append(loss[t].mean())
    by_group: dict[int, list[int]] = {}
    for i, t in enumerate(tokens_of_trajectory(columns)):
        if t and counted[i]:
            by_group.setdefault(int(columns.group_of_trajectory[i]), []).extend(t)
    flat = [t for sequence in sequences for t in sequence]
    want = {
        "token_mean": loss[flat].mean(),
        "seq_mean_token_mean": torch.stack(means).mean(),
        "seq_mean_token_sum": loss[flat].sum() / len(sequences),
        "constant": loss[flat].sum() / len(sequences) / 100.0,
        "turn_mean": torch.stack([loss[t].mean() for t in turns]).mean(),
        "seq_mean_turn_mean": torch.stack([torch.stack(x).mean() for x in by_turn.values()]).mean(),
        "group_mean_token_sum": loss[flat].sum() / len(by_group),
        "group_mean_token_mean": torch.stack([loss[t].mean() for t in by_group.values()]).mean(),
    }[mode]
    share = shares(prepared(columns), counted, AggregateSettings(mode=mode, constant=100.0))  # type: ignore[arg-type]
    kept = counted[columns.trajectory_of_turn[columns.turn_of_token]]
    torch.testing.assert_close((loss * share * kept).sum(), want)
