"""The calibrated reference under corruption, and under honest change. What is true is found by simulation: log-weights
are drawn token by token, and the ESS of very many fresh answers is counted, without any of the product's formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from async_rl.config import GuardSettings
from async_rl.errors import UserError
from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe
from async_rl.trainer.alarm import CollapseWatch

ANSWERS = 64
Corrupt = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""true log-probs of an answer's tokens, as a trainer sees them -> what a generator says they were"""


def other_tokens(log_prob: np.ndarray, drawn: np.random.Generator) -> np.ndarray:
    """Log-probs of the tokens that were sampled, beside others in their place: the two are independent."""
    return -drawn.gamma(1.0, 1.5, len(log_prob))


CORRUPT: dict[str, Corrupt] = {
    "halved": lambda log_prob, drawn: 0.5 * log_prob,
    "another temperature": lambda log_prob, drawn: 1.5 * log_prob,
    "other tokens": other_tokens,
    "noise": lambda log_prob, drawn: log_prob + drawn.normal(0.0, 1.5, len(log_prob)),
}


def batch(
    drawn: np.random.Generator, *, length: int = 12, noise: float = 0.02, drift: float = 0.0, fresh: float = 1.0,
    corrupt: Corrupt | None = None, share: float = 1.0,
) -> Columns:  # fmt: skip
    """64 answers. noise: of the engine, nats a token; drift: of the policy since stale tokens were sampled; fresh:
    share of answers sampled by the newest version; share: of answers that are corrupt."""
    lengths = np.maximum(1, drawn.poisson(length, ANSWERS))
    log_prob, said, version = [], [], []
    for answer, many in enumerate(lengths):
        is_fresh = answer < fresh * ANSWERS
        ours = -drawn.gamma(1.0, 1.5, many)
        theirs = ours + drawn.normal(0.0, math.hypot(noise, 0.0 if is_fresh else drift), many)
        if corrupt is not None and drawn.random() < share:
            theirs = corrupt(ours, drawn)
        log_prob.append(ours)
        said.append(theirs)
        version.append(np.full(many, 3 if is_fresh else 2))
    each = torch.arange(ANSWERS)
    return Columns(
        log_prob=torch.tensor(np.concatenate(log_prob)), log_behaviour=torch.tensor(np.concatenate(said)),
        version=torch.tensor(np.concatenate(version)), turn_of_token=each.repeat_interleave(torch.tensor(lengths)),
        trajectory_of_turn=each, group_of_trajectory=each // 8, reward=(each % 2).double(),
        turn_reward=torch.zeros(ANSWERS, dtype=torch.float64), state_key=torch.full((ANSWERS,), -1),
        truncated=each < 0, current_version=3,
    )  # fmt: skip


def true_ratio(lengths: int, noise: float) -> float:
    """ESS / n of very many fresh answers of this length, counted."""
    weight = np.exp(np.random.default_rng(1).normal(0.0, noise * lengths**0.5, 200_000))
    return float(weight.sum() ** 2 / (weight**2).sum() / len(weight))


def vcpo(**ess: Any) -> Any:
    return load_recipe({"name": "vcpo", "opob": {"norm": "length"}, "ess": ess})


def played(batches: list[Columns], recipe: Any) -> tuple[list[dict[str, float]], CollapseWatch]:
    """Metric rows of these steps, with the state through a checkpoint at each, and the watch over them."""
    state, rows, guard = ObjectiveState(), [], CollapseWatch(settings=GuardSettings())
    for step, columns in enumerate(batches):
        got, state = coefficients(columns, recipe, state)
        state = ObjectiveState.from_dict(json.loads(json.dumps(state.to_dict())))
        rows.append({**got.metrics, "step": float(step)})
        guard.check(rows[-1])
    return rows, guard


@pytest.mark.parametrize("share", [1.0, 0.25], ids=["all", "one generator of four"])
@pytest.mark.parametrize("begin", [0, 3, 20], ids=["from the start", "at step 3", "at step 20"])
@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_log_probs_never_raise_the_factor(kind: str, begin: int, share: float) -> None:
    drawn = np.random.default_rng(5)
    stale = {"fresh": 0.5, "drift": 0.08}
    honest, _ = played([batch(drawn, **stale) for _ in range(30)], vcpo())
    worst = min(row["lr/ess_scale"] for row in honest)
    steps = [batch(drawn, **stale) for _ in range(begin)]
    steps += [batch(drawn, **stale, corrupt=CORRUPT[kind], share=share) for _ in range(40)]
    rows, guard = played(steps, vcpo())
    assert max(row["lr/ess_scale"] for row in rows[begin:]) < worst
    assert all(row["ess/reference"] >= 0.45 * true_ratio(12, 0.02) or begin < 3 for row in rows)
    if share == 1.0:
        assert max(row["lr/ess_scale"] for row in rows[begin:]) < 0.7
        assert begin <= guard.raised["reference"].step <= begin + 10
        assert guard.columns()["alarm/reference"] == 1.0
        assert "fresh data" in guard.raised["reference"].reason


def test_without_a_floor_the_reference_believes_corrupt_data() -> None:
    drawn = np.random.default_rng(5)
    rows, guard = played([batch(drawn, corrupt=CORRUPT["halved"]) for _ in range(40)], vcpo(floor=0.0))
    assert rows[-1]["lr/ess_scale"] == 1.0, "what the floor is for"
    assert "reference" in guard.raised


@pytest.mark.parametrize("noise", [0.002, 0.03, 0.08])
def test_longer_answers_are_followed_down_without_an_alarm(noise: float) -> None:
    drawn = np.random.default_rng(3)
    lengths = [round(12 * 1.08**step) for step in range(50)]  # to 520 tokens
    rows, guard = played([batch(drawn, length=length, noise=noise) for length in lengths], vcpo())
    assert not {"reference", "ess"} & set(guard.raised)
    for length, row in list(zip(lengths, rows, strict=True))[5::5]:
        want = max(true_ratio(length, noise), 1 / ANSWERS)
        if noise**2 * length < 1:  # beyond, 200,000 answers do not tell the true ratio
            assert row["ess/reference"] == pytest.approx(want, rel=0.25)
        assert row["lr/ess_scale"] > 0.6
    assert rows[-1]["ess/fresh"] < rows[0]["ess/fresh"]


def test_a_quarter_of_corrupt_fresh_data_hardly_moves_the_reference() -> None:
    drawn = np.random.default_rng(7)
    steps = [batch(drawn, noise=0.05, corrupt=CORRUPT["halved"], share=0.25) for _ in range(60)]
    rows, _ = played(steps, vcpo(floor=0.0))
    assert rows[-1]["ess/fresh"] == pytest.approx(true_ratio(12, 0.05), rel=0.1)


def test_noise_that_doubles_is_believed_and_raises_no_alarm() -> None:
    drawn = np.random.default_rng(9)
    steps = [batch(drawn, length=200, noise=0.03 if step < 20 else 0.055) for step in range(80)]
    rows, guard = played(steps, vcpo())
    assert not guard.raised
    assert rows[-1]["ess/fresh"] == pytest.approx(true_ratio(200, 0.055), rel=0.2)


def test_a_batch_of_stale_data_alone_says_nothing_about_noise() -> None:
    rows, guard = played([batch(np.random.default_rng(1), fresh=0.0, drift=0.3) for _ in range(20)], vcpo())
    assert all("ess/noise" not in row for row in rows)
    assert not guard.courses["reference"].steps


@pytest.mark.parametrize(
    ("ess", "said"),
    [
        ({"floor": 1.5}, "a share of the run's start"),
        ({"floor": 0.2, "reference": 0.55}, "ess.floor does nothing with ess.reference=0.55"),
        ({"decay": 0.9, "reference": 1.0}, "ess.decay does nothing with ess.reference=1"),
    ],
    ids=str,
)
def test_a_floor_that_would_mean_nothing_is_refused(ess: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        vcpo(**ess)
