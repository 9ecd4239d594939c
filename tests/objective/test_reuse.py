"""Rows of the experience pool against the published losses, written out in float64 and differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from async_rl.config.pool import PoolSettings
from async_rl.errors import UserError
from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.conflicts import check_effect
from async_rl.objective.library import load_recipe
from async_rl.objective.tokens import Coefficients, Noted, Reused
from async_rl.trajectory.reuse import SOURCES

FRESH, REPLAYED, SHOWN, OUT = "fresh", "replayed", "shown", "out"
SETUP: dict[str, Any] = {
    "group_size": 4, "updates_per_batch": 1, "max_staleness": 1, "has_critic": False, "single_turn": True,
}  # fmt: skip


def batch(kinds: list[list[str]], seed: int = 0, *, spread: float = 0.4, rewards: list[float] | None = None) -> Columns:
    """Answers of one turn; kinds: of each trajectory, group by group."""
    random = torch.Generator().manual_seed(seed)
    flat = [kind for group in kinds for kind in group]
    length = torch.randint(1, 6, (len(flat),), generator=random).tolist()
    owner = torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(length))
    n = len(owner)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(n, generator=random, dtype=torch.float64)

    log_prob = -torch.rand(n, generator=random, dtype=torch.float64) * 2 - 0.05
    shown = torch.tensor([kind == SHOWN for kind in flat])
    behaviour = torch.where(shown[owner], 0.0, (log_prob + noise(spread)).clamp(max=-1e-3))
    reward = torch.randint(0, 2, (len(flat),), generator=random).double()
    reward = torch.where(shown, 1.0, reward) if rewards is None else torch.tensor(rewards, dtype=torch.float64)
    replayed = torch.tensor([kind == REPLAYED for kind in flat])
    source = torch.where(shown, SOURCES.index("demonstrations"), torch.where(replayed, SOURCES.index("priority"), -1))
    return Columns(
        log_prob=log_prob,
        log_behaviour=behaviour,
        log_proximal=(log_prob + noise(0.2)).clamp(max=-1e-3),
        version=torch.where(shown | replayed, 0, 5)[owner],
        turn_of_token=owner,
        trajectory_of_turn=torch.arange(len(flat)),
        group_of_trajectory=torch.tensor([g for g, group in enumerate(kinds) for _ in group]),
        reward=reward,
        turn_reward=torch.zeros(len(flat), dtype=torch.float64),
        state_key=torch.full((len(flat),), -1),
        truncated=torch.zeros(len(flat), dtype=torch.bool),
        current_version=5,
        entropy=torch.rand(n, generator=random, dtype=torch.float64),
        reused=Reused(
            source=source,
            replayed=replayed,
            demonstration=shown,
            out=torch.tensor([kind == OUT for kind in flat]),
            advantage=torch.where(replayed, torch.randn(len(flat), generator=random, dtype=torch.float64), 0.0),
            baseline=torch.full((len(flat),), 0.5, dtype=torch.float64),
            scale=torch.full((len(flat),), 0.4, dtype=torch.float64),
        ),
    )


def answer(columns: Columns, name: str, **changes: Any) -> Coefficients:
    return coefficients(columns, load_recipe({"name": name, **changes}), ObjectiveState())[0]


def descent(loss: Callable[[Tensor], Tensor], columns: Columns) -> Tensor:
    """-d loss / d log pi, [T]."""
    log_prob = columns.log_prob.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(log_prob), log_prob)
    return -gradient


def close(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), (found - expected).abs().max()


def of_token(columns: Columns, values: Tensor) -> Tensor:  # [I] -> [T]
    return values[columns.trajectory_of_turn[columns.turn_of_token]]


def means(columns: Columns, counted: Tensor) -> Tensor:
    """Mean reward of the counted trajectories of each one's group, by a loop. [I]"""
    group = columns.group_of_trajectory
    found = [
        columns.reward[(group == group[i]) & counted].mean().nan_to_num(0.0) if bool(counted.any()) else 0.0
        for i in range(len(group))
    ]
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in found])


JOINED = [[FRESH] * 3 + [SHOWN], [FRESH] * 4, [FRESH] * 2 + [SHOWN] * 2]
REPLACED = [[FRESH] * 2 + [OUT] + [REPLAYED], [FRESH] * 3, [OUT] * 3 + [REPLAYED] * 2]


@pytest.mark.parametrize("seed", range(6))
def test_luffy_is_the_derivative_of_its_published_loss(seed: int) -> None:
    columns = batch(JOINED, seed)
    assert columns.reused is not None
    shown = of_token(columns, columns.reused.demonstration)
    advantage = of_token(columns, columns.reward - means(columns, torch.ones(len(columns.reward), dtype=torch.bool)))

    def loss(log_prob: Tensor) -> Tensor:
        probability = log_prob.exp()
        off = probability / (probability + 0.1)
        on = (log_prob - columns.log_behaviour).exp()
        return -(torch.where(shown, off, on) * advantage).sum() / (len(columns.reward) * 1024)

    found = answer(columns, "luffy")
    close(found.policy, descent(loss, columns))
    assert found.entropy is not None
    close(found.entropy, torch.full_like(columns.log_prob, 0.001 / (len(columns.reward) * 1024)))


def test_luffys_shape_has_the_numbers_of_its_code() -> None:
    columns = batch([[SHOWN, FRESH]], rewards=[1.0, 0.0])
    probability = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    found = []
    for p in probability.tolist():
        one = replace(columns, log_prob=torch.full_like(columns.log_prob, math.log(p)))
        policy = answer(one, "luffy", aggregate={"mode": "token_mean"}, entropy=0.0).policy
        found.append(float(policy[0]) * len(policy) / 0.5)  # A = 1 - 0.5
    assert found == pytest.approx([0.082645, 0.25, 0.138889, 0.09, 0.083326], abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", ["none", "group_std"])
def test_rl_plus_is_the_derivative_of_its_published_loss(seed: int, scale: str) -> None:
    columns = batch(JOINED, seed)
    assert columns.reused is not None
    assert columns.log_proximal is not None
    proximal = columns.log_proximal
    shown = of_token(columns, columns.reused.demonstration)
    own = ~columns.reused.demonstration
    advantage = columns.reward - means(columns, own)
    if scale == "group_std":
        for i, group in enumerate(columns.group_of_trajectory):
            std = columns.reward[(columns.group_of_trajectory == group) & own].std()
            advantage[i] = advantage[i] / ((std if std > 0 else 1.0) + 1e-6)
    advantage = of_token(columns, advantage)

    def loss(log_prob: Tensor) -> Tensor:
        old = proximal.exp()
        off = 2 * log_prob.exp() / (old + 0.5 * (old + 1)) * (1 - log_prob.detach().exp()) ** 0.5
        on = (log_prob - columns.log_behaviour).exp()
        return -(torch.where(shown, off, on) * advantage).mean()

    close(answer(columns, "rl_plus", advantage={"scale": scale}).policy, descent(loss, columns))


def test_rl_plus_has_the_numbers_of_its_code() -> None:
    found = []
    for p, old in ((0.01, 0.02), (0.1, 0.1), (0.5, 0.4), (0.9, 0.9), (0.99, 0.95)):
        columns = batch([[FRESH, SHOWN]], rewards=[0.0, 1.0])
        columns = replace(
            columns,
            log_prob=torch.full_like(columns.log_prob, math.log(p)),
            log_proximal=torch.full_like(columns.log_prob, math.log(old)),
        )
        policy = answer(columns, "rl_plus").policy
        found.append(float(policy[-1]) * len(policy))
    assert found == pytest.approx([0.037547, 0.291903, 0.642824, 0.307681, 0.102857], abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_hpt_imitates_the_demonstration_where_a_group_failed_and_does_rl_elsewhere(seed: int) -> None:
    columns = batch([[OUT] * 3 + [SHOWN], [FRESH] * 4, [FRESH] * 4], seed)
    assert columns.reused is not None
    shown = of_token(columns, columns.reused.demonstration)
    kept = ~columns.reused.out & ~columns.reused.demonstration
    advantage = of_token(columns, columns.reward - means(columns, kept))

    def loss(log_prob: Tensor) -> Tensor:
        on = -(log_prob - columns.log_behaviour).exp() * advantage
        rl = (on * of_token(columns, kept)).sum() / (kept.sum() * 1024)
        return rl + 1.0 * -(log_prob * shown).sum() / shown.sum()

    found = answer(columns, "hpt")
    close(found.policy, descent(loss, columns))
    nll = -(columns.log_prob * shown).sum() / shown.sum()
    assert found.metrics["pool/nll"] == pytest.approx(float(nll))


def clipped(log_prob: Tensor, columns: Columns, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's loss of each token, [T]."""
    ratio = (log_prob - columns.log_behaviour).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


@pytest.mark.parametrize("seed", range(6))
def test_a_stored_success_in_place_of_a_sample_is_compared_like_one_of_the_group(seed: int) -> None:
    """ARPO: the group's mean and std are those of what is trained; the success keeps its own mu."""
    columns = batch(REPLACED[:2], seed)
    assert columns.reused is not None
    kept = ~columns.reused.out
    advantage = torch.zeros_like(columns.reward)
    for group in range(2):
        mask = (columns.group_of_trajectory == group) & kept
        rewards = columns.reward[mask]
        if bool(rewards.max() > rewards.min()):
            advantage[mask] = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    trained = of_token(columns, kept)

    def loss(log_prob: Tensor) -> Tensor:
        return (clipped(log_prob, columns, of_token(columns, advantage), 0.2, 0.3) * trained).sum() / trained.sum()

    close(answer(columns, "arpo_replay").policy, descent(loss, columns))


@pytest.mark.parametrize("seed", range(6))
def test_ssb_trains_stored_samples_with_the_advantage_they_had(seed: int) -> None:
    columns = batch([[OUT] * 3, [FRESH] * 3, [REPLAYED], [REPLAYED]], seed)
    assert columns.reused is not None
    advantage = columns.reused.advantage.clone()
    mask = columns.group_of_trajectory == 1
    rewards = columns.reward[mask]
    if bool(rewards.max() > rewards.min()):
        advantage[mask] = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    kept = ~columns.reused.out
    length = torch.bincount(columns.turn_of_token).double()
    share = of_token(columns, kept / (kept.sum() * length))

    def loss(log_prob: Tensor) -> Tensor:
        return (clipped(log_prob, columns, of_token(columns, advantage), 0.2, 0.2) * share).sum()

    found = answer(columns, "ssb")
    close(found.policy, descent(loss, columns))
    assert float(found.policy[of_token(columns, columns.reused.replayed)].abs().sum()) > 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("step", [25, 60, 150])
def test_spear_recalibrates_and_weighs_what_it_imitates(seed: int, step: int) -> None:
    columns = replace(batch([[FRESH] * 4, [FRESH] * 3, [REPLAYED], [REPLAYED], [REPLAYED]], seed), current_version=step)
    assert columns.reused is not None
    replayed = columns.reused.replayed
    advantage = torch.where(replayed, (columns.reward - 0.5).clamp(min=0.0), columns.reward - means(columns, ~replayed))
    weight = 0.5 * (1 - math.cos(math.pi * min(step, 100) / 100))
    factor = of_token(columns, torch.where(replayed, torch.tensor(weight, dtype=torch.float64), 1.0))

    def loss(log_prob: Tensor) -> Tensor:
        return (factor * clipped(log_prob, columns, of_token(columns, advantage), 0.2, 0.28)).mean()

    close(
        answer(columns, "spear", trust={"covariance_low": 1e9, "covariance_high": 1e10}).policy, descent(loss, columns)
    )


def test_spears_example_of_its_recalibration() -> None:
    """R = (1, 1, 0) against the median of (.25, .5, .5, .75, .9): .5, .5, dropped."""
    columns = batch([[REPLAYED], [REPLAYED], [REPLAYED], [FRESH] * 2], rewards=[1.0, 1.0, 0.0, 0.0, 1.0])
    columns = replace(columns, log_behaviour=columns.log_prob, current_version=25)
    policy = answer(columns, "spear", trust={"covariance_low": 1e9, "covariance_high": 1e10}).policy * len(
        columns.log_prob
    )
    first = [float(policy[columns.turn_of_token == i][0]) for i in range(3)]
    assert first == pytest.approx([0.5 * 0.146447, 0.5 * 0.146447, 0.0], abs=1e-6)


def test_spears_covariance_clip_takes_tokens_of_replayed_rows_alone() -> None:
    columns = replace(batch([[FRESH] * 8, *[[REPLAYED]] * 8], 3), current_version=200)
    assert columns.reused is not None
    open_trust = {"clip_low": 0.99, "clip_high": 99.0, "covariance_low": -1e9, "covariance_high": 1e9}
    whole = answer(columns, "spear", trust={**open_trust, "covariance_low": 1e9, "covariance_high": 1e10}).policy
    found = answer(columns, "spear", trust={**open_trust, "covariance_fraction": 0.5}).policy
    taken = (found == 0) & (whole != 0)
    assert bool(taken.any())
    assert not bool((taken & ~of_token(columns, columns.reused.replayed)).any())


@pytest.mark.parametrize("seed", range(6))
def test_mix_ppo_clips_around_the_policy_at_the_start_of_the_step(seed: int) -> None:
    """ReMix: the interval is that of pi_k / mu, plus and minus epsilon."""
    columns = batch([[FRESH] * 4, [REPLAYED] * 4], seed, spread=0.8)
    assert columns.log_proximal is not None
    middle = (columns.log_proximal - columns.log_behaviour).exp()
    advantage = torch.zeros_like(columns.reward)
    for group in range(2):
        mask = columns.group_of_trajectory == group
        rewards = columns.reward[mask]
        if bool(rewards.max() > rewards.min()):
            advantage[mask] = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    advantage = of_token(columns, advantage)

    def loss(log_prob: Tensor) -> Tensor:
        ratio = (log_prob - columns.log_behaviour).exp()
        bounded = torch.minimum(torch.maximum(ratio, middle - 0.2), middle + 0.2)
        return -torch.minimum(ratio * advantage, bounded * advantage).mean()

    found = answer(
        columns, "grpo", trust={"rule": "mix_ppo"}, aggregate={"mode": "token_mean"}, kl={"coefficient": 0.0}
    )
    close(found.policy, descent(loss, columns))


@pytest.mark.parametrize(
    ("ratio", "advantage", "kept"), [(1.6, 1, 1.6), (1.8, 1, 0.0), (1.2, -1, 0.0), (1.4, -1, -1.4)]
)
def test_remixs_example(ratio: float, advantage: float, kept: float) -> None:
    columns = batch([[FRESH, FRESH]], rewards=[float(advantage), 0.0])
    columns = replace(
        columns,
        log_behaviour=torch.full_like(columns.log_prob, math.log(0.2)),
        log_prob=torch.full_like(columns.log_prob, math.log(0.2 * ratio)),
        log_proximal=torch.full_like(columns.log_prob, math.log(0.3)),
    )
    raw = {"baseline": "none", "scale": "none"}
    changes: dict[str, Any] = {"aggregate": {"mode": "token_mean"}, "kl": {"coefficient": 0.0}}
    policy = answer(columns, "grpo", trust={"rule": "mix_ppo"}, advantage=raw, **changes).policy
    assert float(policy[0]) * len(policy) == pytest.approx(kept)


def test_self_imitation_adds_the_positive_part_of_the_advantage() -> None:
    columns = batch([[FRESH] * 4, [REPLAYED] * 3], 2)
    assert columns.reused is not None
    plain, more = answer(columns, "grpo"), answer(columns, "grpo", reuse={"self_imitation": 0.7})
    replayed = of_token(columns, columns.reused.replayed)
    group = columns.reward[4:]
    own = torch.zeros_like(columns.reward)
    own[4:] = (group - group.mean()) / (group.std() + 1e-6) if bool(group.max() > group.min()) else 0.0
    expected = 0.7 * of_token(columns, own.clamp(min=0.0)) * replayed / replayed.sum()
    close(more.policy - plain.policy, expected)


def test_what_is_measured_is_measured_of_fresh_rows_and_ess_of_rows_with_a_weight() -> None:
    columns = batch([[FRESH] * 3 + [SHOWN], [FRESH] * 2 + [OUT, REPLAYED]], 5)
    found = answer(columns, "luffy", reuse={"demonstrations": "none", "nll": 1.0}).metrics
    assert found["lag/max"] == 0.0
    assert found["reward/mean"] == pytest.approx(float(columns.reward[[0, 1, 2, 4, 5, 6]].mean()))
    log_ratio = torch.zeros(8, dtype=torch.float64).index_add_(
        0, columns.turn_of_token, columns.log_prob - columns.log_behaviour
    )
    weight = log_ratio[[0, 1, 2, 4, 5, 7]].exp()
    assert found["ess/ratio"] == pytest.approx(float(weight.sum() ** 2 / weight.square().sum() / 6))


def test_a_batch_without_rows_of_the_pool_does_not_look_at_the_axis(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(4)
    plain = answer(columns, "dr_grpo")
    changed = answer(columns, "dr_grpo", reuse={"demonstrations": "shaped", "nll": 1.0, "positive_only": True})
    assert torch.equal(plain.policy, changed.policy)
    assert plain.metrics == changed.metrics


@pytest.mark.parametrize(
    ("recipe", "reuse", "pool", "said"),
    [
        ("luffy", {}, PoolSettings(), "does nothing with pool.source=none"),
        ("luffy", {}, PoolSettings(source="demonstrations"), "compared with nothing"),
        ("grpo", {}, PoolSettings(source="demonstrations", place="join"), "would change nothing"),
        ("grpo", {"nll": 1.0}, PoolSettings(source="groups"), "reuse.nll does nothing"),
        ("grpo", {}, PoolSettings(source="successes"), "compared with nothing"),
        ("grpo", {"replayed": "none"}, PoolSettings(source="groups"), "reuse.self_imitation=0"),
        ("spear", {}, PoolSettings(source="demonstrations"), "reuse.advantage does nothing"),
    ],
)
def test_a_pool_that_would_change_nothing_is_refused(
    recipe: str, reuse: dict[str, Any], pool: PoolSettings, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_effect(load_recipe({"name": recipe, "reuse": reuse}), **SETUP, pool=pool)


@pytest.mark.parametrize(
    ("recipe", "pool"),
    [
        ("vcpo", PoolSettings(source="groups")),
        ("luffy", PoolSettings(source="demonstrations", place="join")),
        ("rl_plus", PoolSettings(source="demonstrations", place="join")),
        ("hpt", PoolSettings(source="demonstrations", place="instead", when="failed")),
        ("spear", PoolSettings(source="priority", priority="advantage", above=1.0)),
        ("ssb", PoolSettings(source="priority", place="instead", when="no_signal", gate=1.0)),
        ("arpo_replay", PoolSettings(source="successes", place="replace", when="no_signal", gate=0.2)),
    ],
)
def test_methods_go_with_their_pools(recipe: str, pool: PoolSettings) -> None:
    check_effect(load_recipe({"name": recipe}), **SETUP, pool=pool)


@pytest.mark.parametrize(
    ("step", "recent"), [(0, 0.0), (50, 0.0), (51, 0.1), (60, 0.1), (61, 0.2), (90, 0.4), (100, 0.5)]
)
def test_remixs_kl_is_a_convex_sum_whose_share_moves_in_stairs(step: int, recent: float) -> None:
    columns = batch([[FRESH] * 4, [REPLAYED] * 3], 1)
    reference = (columns.log_prob + 0.3).clamp(max=-1e-3)
    columns = replace(columns, current_version=step, log_reference=reference)
    assert columns.log_proximal is not None
    proximal = columns.log_proximal
    length = torch.bincount(columns.turn_of_token).double()
    share = of_token(columns, 1 / (len(length) * length))

    def k3(x: Tensor) -> Tensor:
        return (-x).exp() + x - 1

    def loss(log_prob: Tensor) -> Tensor:
        kl = (1 - recent) * k3(log_prob - reference) + recent * k3(log_prob - proximal)
        return 0.5 * (share * kl).sum()

    with_kl = answer(columns, "remix", kl={"coefficient": 0.5}).policy
    without = answer(columns, "remix", kl={"coefficient": 0.0}, schedule=[]).policy
    close(with_kl - without, descent(loss, columns))


def test_a_bonus_of_the_task_is_added_to_the_reward_with_a_weight_that_moves() -> None:
    columns = batch([[FRESH] * 4], 1, rewards=[0.0, 1.0, 0.0, 1.0])
    noted = torch.tensor([1.0, 0.0, math.nan, 2.0], dtype=torch.float64)
    columns = replace(columns, current_version=5, noted=Noted(trajectory={"calls": noted}))
    moves = [{"number": "reward.bonus", "start": 0.4, "end": 0.0, "until": 10}]
    changes: dict[str, Any] = {"reward": {"bonus_note": "calls"}, "schedule": moves}
    found = answer(columns, "dr_grpo", **changes).policy
    added = torch.tensor([0.2, 0.0, 0.0, 0.4], dtype=torch.float64)
    close(found, answer(replace(columns, reward=columns.reward + added), "dr_grpo").policy)
    assert answer(columns, "dr_grpo", **changes).metrics["reward/mean"] == 0.5
