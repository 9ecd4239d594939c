"""Methods restated from their papers as losses in plain Python, differentiated by autograd in float64, against the
coefficients of their recipes. The statements share nothing with the product but the names of columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support_methods import RAW, SUM, answers, batch, of_answer, of_group, policy_of, spread
from torch import Tensor

from async_rl.objective import Columns
from async_rl.objective.tokens import Noted

Loss = Callable[[Tensor], Tensor]
V6 = (0.5, 0.9, 1.0, 1.3, 2.0, 4.0)
"""ratios, with A = 1 and then A = -1"""
SEEDS = range(6)


def v6(name: str, sign: int, **changes: Any) -> list[float]:
    """Coefficients on V6 without denominators."""
    columns = answers(V6, [float(sign)] * 6)
    changes = {"advantage": RAW, "aggregate": SUM, "kl": {"coefficient": 0.0}} | changes
    return (policy_of(columns, name, **changes) * 6).tolist()


# Vectors that were computed from the published losses (float64 autograd), outside of this program.


@pytest.mark.parametrize(
    ("name", "changes", "positive", "negative"),
    [
        ("sapo", {}, (0.470007, 0.897754, 1, 1.271183, 1.572895, 0.722827),
         (-0.46707, -0.897524, -1, -1.268278, -1.53622, -0.630445)),
        ("icepop", {"trust": {"low": 0.7, "high": 6.0}}, (0, 0.9, 1, 1.3, 2, 4), (0, -0.9, -1, -1.3, -2, -4)),
        ("aspo", {"trust": {"uncertain_share": 0.0}}, (2, 1.111111, 1, 0, 0, 0), (0, -0.9, -1, -1.3, -2, -3)),
        ("cpgd", {}, (1, 1, 1, 0, 0, 0), (0, -1, -1, -1, -1, -1)),
        ("cpgd", {"kl": {"coefficient": 0.1}}, (1.05, 1.01, 1, -0.03, -0.1, -0.1),
         (0.05, -0.99, -1, -1.03, -1.1, -1.1)),
    ],
)  # fmt: skip
def test_a_rule_on_six_ratios(
    name: str, changes: dict[str, Any], positive: Sequence[float], negative: Sequence[float]
) -> None:
    assert v6(name, 1, **changes) == pytest.approx(positive, abs=5e-7)
    assert v6(name, -1, **changes) == pytest.approx(negative, abs=5e-7)


@pytest.mark.parametrize(
    ("sign", "wanted"),
    [
        (1, (0.440927, 1.120422, 1.208125, 1, 0.502043, 0.199148, 0.001975)),
        (-1, (0.039624, 0.339785, 0.577106, 1, 1.241593, 1.082682, 0.15864)),
    ],
)
def test_vespo_reshapes_the_product_of_ratios(sign: int, wanted: Sequence[float]) -> None:
    weights = (0.2, 0.5, 2 / 3, 1.0, 1.5, 2.0, 4.0)
    columns = answers(weights, [float(sign)] * 7)
    got = policy_of(columns, "vespo", advantage=RAW, aggregate=SUM) * 7 * sign
    assert got.tolist() == pytest.approx(wanted, abs=5e-7)


def test_vespo_looks_at_the_whole_answer() -> None:
    columns = replace(answers((2.0, 0.75, 1.0), [1.0] * 3), turn_of_token=torch.tensor([0, 0, 0]))
    columns = replace(
        columns, trajectory_of_turn=torch.tensor([0]), group_of_trajectory=torch.tensor([0]),
        reward=torch.ones(1, dtype=torch.float64), turn_reward=torch.zeros(1, dtype=torch.float64),
        state_key=torch.tensor([-1]), truncated=torch.tensor([False]),
    )  # fmt: skip
    got = policy_of(columns, "vespo", advantage=RAW, aggregate=SUM)
    assert got.tolist() == pytest.approx([0.502043] * 3, abs=5e-7)


def test_sat_contracts_the_bound_of_the_tokens_that_moved_most() -> None:
    moved = (0.01, 0.02, -0.03, 0.04, 0.05, -0.06, 0.07, 0.08, -0.10, 0.15)
    columns = answers([math.exp(d) for d in moved], [1.0] * 10)
    changes = {"advantage": RAW, "aggregate": SUM}
    shifted = policy_of(columns, "sat", **changes) * 10
    hill = policy_of(columns, "sat", trust={"contraction": "from_zero"}, **changes) * 10
    assert shifted.tolist() == pytest.approx([math.exp(d) for d in moved])
    assert hill[:9].tolist() == pytest.approx([math.exp(d) for d in moved[:9]])
    assert float(hill[9]) == 0.0  # e^.15 is above 1 + .2 x .328859
    narrow = {"clip_high": 0.19}  # 1 + .19 x .844828 = 1.1605, below e^.15
    assert float(policy_of(columns, "sat", trust=narrow, **changes)[9]) == 0.0


@pytest.mark.parametrize(
    ("temperature", "target"), [(1.0, (1.228478, 1, 1, 1)), (1e-4, (1.3, 1, 1, 1))]
)  # fmt: skip
def test_gbpo_goes_to_the_ratio_that_the_reward_asks_for(temperature: float, target: Sequence[float]) -> None:
    trust, none = {"target_temperature": temperature}, {"coefficient": 0.0}
    for offset, moved in ((-1e-6, 1.0), (1e-6, -1.0)):  # below the target up, above it down
        columns = answers([r + offset for r in target], (1, 0, 0, 0))
        got = policy_of(columns, "gbpo", trust=trust, aggregate=SUM, kl=none) * 4
        wanted = [moved * 1.499997 * target[0], *[moved * 0.499999 * r for r in target[1:]]]
        assert got.tolist() == pytest.approx(wanted, abs=1e-5)
    columns = answers((1.1, 1.0, 0.9, 1.2), (1, 0, 0, 0))
    got = policy_of(columns, "gbpo", trust={"target_temperature": 1.0}, aggregate=SUM) * 4
    assert got.tolist() == pytest.approx([1.649997, 0.0, 0.449999, -0.599999], abs=2e-6)


def test_bapo_searches_its_bounds_as_published() -> None:
    ratio, sign = (0.5, 0.7, 1.1, 1.5, 0.9, 2.5), (1.0, -1.0, 1.0, -1.0, -1.0, 1.0)
    columns = answers(ratio, sign)

    def used(balance: float) -> list[float]:
        trust = {"balance": balance, "dual_clip": 0.0}
        return (policy_of(columns, "bapo", trust=trust, advantage=RAW, aggregate=SUM) * 6).tolist()

    low = [0.5, -0.7, 1.1, -1.5, -0.9, 0.0]
    assert used(0.9) == pytest.approx(low)  # P / N = .9032 at (.6, 1.2): the search ends at once
    assert used(0.905) == pytest.approx([0.5, 0.0, *low[2:]])  # at (.8, 1.2) .875, at (.8, 1.3) .9063
    assert used(1.1) == pytest.approx([0.5, 0.0, *low[2:]])  # 1.125 at (.8, 2)


@pytest.mark.parametrize(
    ("pi", "mu", "there", "back"),
    [(0.05, 0.40, 0.332584, 0.556057), (0.30, 0.05, 0.323761, 0.200525), (0.40, 0.02, 0.903919, 0.420896),
     (0.9, 0.6, 0.226289, 0.311239), (0.999, 0.9, 0.09965, 0.366593), (1e-4, 1e-3, 0.00067, 0.001403)],
)  # fmt: skip
def test_kpop_masks_a_token_on_which_the_policies_diverge_in_either_direction(
    pi: float, mu: float, there: float, back: float
) -> None:
    columns = answers([pi / mu] * 2, [1.0, 1.0])
    columns = replace(
        columns, log_prob=torch.full((2,), math.log(pi), dtype=torch.float64),
        log_behaviour=torch.full((2,), math.log(mu), dtype=torch.float64),
    )  # fmt: skip
    wide = {"clip_low": 0.99, "clip_high": 1e9}
    for bound, kept in ((max(there, back) * 1.01, True), (max(there, back) * 0.99, False)):
        got = policy_of(columns, "kpop", advantage=RAW, trust=wide, mask={"binary_kl": bound})
        assert bool((got != 0).all()) == kept


def test_gepo_measures_an_answer_by_what_its_group_expects() -> None:
    columns = answers((1.0,) * 4, (1, -1, 1, -1))
    log_prob, log_mu = (-0.5, -0.8, -1.0, -1.2), (-0.6, -0.6, -1.2, -0.9)
    columns = replace(
        columns, log_prob=torch.tensor(log_prob, dtype=torch.float64),
        log_behaviour=torch.tensor(log_mu, dtype=torch.float64),
    )  # fmt: skip
    got = policy_of(columns, "gepo", advantage=RAW) * 4
    assert got.tolist() == pytest.approx([0.0, -0.945023, 0.773719, 0.0], abs=5e-7)


# Objectives of a group, against autograd.


def group_loss(columns: Columns, of_one: Callable[[list[int], Tensor], Tensor], anchor: Tensor | None) -> Loss:
    """Mean over groups of `of_one(answers, l)`, l [answers] the log-ratios of answers to `anchor`."""

    def loss(log_prob: Tensor) -> Tensor:
        own = log_prob if anchor is None else log_prob - anchor
        score = torch.stack([own[tokens].sum() for tokens in of_answer(columns)])
        groups = of_group(columns)
        return torch.stack([of_one(members, score[members]) for members in groups]).mean()

    return loss


def gvpo(columns: Columns, beta: float) -> Callable[[list[int], Tensor], Tensor]:
    def of_one(members: list[int], score: Tensor) -> Tensor:
        reward = columns.reward[members]
        gap = beta * (score - score.mean()) - (reward - reward.mean())
        return 0.5 * gap.square().sum() / (len(members) - 1)

    return of_one


def pairs(columns: Columns, beta: float, half: float) -> Callable[[list[int], Tensor], Tensor]:
    def of_one(members: list[int], score: Tensor) -> Tensor:
        reward = columns.reward[members]
        n = len(members)
        found = [
            half * ((reward[i] - reward[j]) - beta * (score[i] - score[j])) ** 2 for i in range(n) for j in range(i)
        ]
        return torch.stack(found).mean()

    return of_one


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["gvpo", "copg", "rebel"])
def test_a_regression_of_log_ratios_on_rewards(
    descent: Callable[..., Tensor], assert_equal: Callable[..., None], name: str, seed: int
) -> None:
    columns = batch(seed, equal=seed % 2 == 0)
    anchor = columns.log_reference if name == "copg" else columns.log_behaviour
    one = {
        "gvpo": lambda: gvpo(columns, 0.1),
        "copg": lambda: pairs(columns, 0.1, 0.5),
        "rebel": lambda: pairs(columns, 1.0, 1.0),
    }[name]()
    assert_equal(policy_of(columns, name), descent(group_loss(columns, one, anchor), columns))


def test_gvpo_and_copg_on_vectors() -> None:
    columns = answers([math.exp(x) for x in (0.5, -1.0, 2.0, 0.0)], (1, 0, 0, 1))
    got = policy_of(columns, "gvpo")
    assert got.tolist() == pytest.approx([0.01625, -0.012083, -0.022083, 0.017917], abs=5e-7)
    pair = answers([math.exp(0.5), math.exp(-1.0)], (1, 0))
    pair = replace(pair, log_reference=pair.log_behaviour)
    assert policy_of(pair, "copg").tolist() == pytest.approx([0.085, -0.085])


def test_a_star_po_regresses_on_the_value_that_the_task_noted() -> None:
    columns = answers([1.0] * 4, (1, 0, 1, 0))
    moved = torch.tensor([2.0, 2.0, -50.0, -50.0], dtype=torch.float64)
    columns = replace(columns, log_reference=columns.log_prob - moved)
    columns = replace(columns, group_of_trajectory=torch.arange(4))  # one sample a problem
    value = torch.full((4,), 0.5 * math.log((2 * math.exp(2.0) + 6) / 8), dtype=torch.float64)
    assert float(value[0]) == pytest.approx(0.477229, abs=5e-7)
    noted = replace(columns, noted=Noted(trajectory={"v_star": value}))
    wanted = [2.603854e-4, -2.396146e-4, 2.863854e-4, -2.136146e-4]
    assert policy_of(noted, "a_star_po").tolist() == pytest.approx(wanted, abs=5e-11)
    assert not policy_of(columns, "a_star_po").any()  # without a value nothing is learnt
    some = replace(columns, noted=Noted(trajectory={"v_star": value.index_fill(0, torch.tensor([1]), torch.nan)}))
    assert policy_of(some, "a_star_po").tolist() == pytest.approx([wanted[0], 0.0, *wanted[2:]], abs=5e-11)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("level", ["none", "token"])
def test_disco_sets_right_answers_above_wrong_ones_within_a_bound_on_the_kl(
    descent: Callable[..., Tensor], assert_equal: Callable[..., None], level: str, seed: int
) -> None:
    columns = batch(seed, spread=0.02, equal=seed % 2 == 0)
    tau, delta, beta = (10.0, 1e-4, 1e3) if level == "none" else (1.0, 1e-4, 1e3)

    def loss(log_prob: Tensor) -> Tensor:
        tokens = log_prob if level == "none" else (log_prob - columns.log_behaviour).exp()
        score = torch.stack([tokens[t].mean() for t in of_answer(columns)])
        found = []
        for members in of_group(columns):
            right = [i for i in members if columns.reward[i] > 0]
            wrong = [i for i in members if columns.reward[i] <= 0]
            if right and wrong:
                found.append(score[right].mean() - tau * (score[wrong] / tau).exp().sum().log())
        d = log_prob - columns.log_behaviour
        kl = (d.exp() - 1 - d).mean()
        penalty = (beta * (kl - delta)).clamp(min=0).detach() * kl
        return -torch.stack(found).mean() + penalty

    got = policy_of(columns, "disco", ratio={"level": level}, trust={"score_temperature": tau})
    assert_equal(got, descent(loss, columns))


# Other published losses of tokens, against autograd.


def means_of_means(columns: Columns, of_token: Tensor) -> Tensor:
    return torch.stack([of_token[tokens].mean() for tokens in of_answer(columns)]).mean()


def standardised(columns: Columns, epsilon: float = 1e-6) -> Tensor:
    """(R - mean) / (std + epsilon) of each answer, [answers]."""
    out = torch.zeros_like(columns.reward)
    for members in of_group(columns):
        reward = columns.reward[members]
        out[members] = (reward - reward.mean()) / (reward.std(correction=1) + epsilon)
    return out


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dapo(columns: Columns) -> Loss:
    mixed = [m for m in of_group(columns) if len(set(columns.reward[m].tolist())) > 1]
    kept = [t for members in mixed for i in members for t in of_answer(columns)[i]]
    advantage = spread(columns, standardised(columns))

    def loss(log_prob: Tensor) -> Tensor:
        ratio = (log_prob - columns.log_behaviour).exp()
        return -clipped(ratio, advantage, 0.2, 0.28)[kept].mean()

    return loss


def grpo_tcr(columns: Columns) -> Loss:
    advantage = spread(columns, standardised(columns))
    return lambda log_prob: -clipped((log_prob - columns.log_behaviour).exp(), advantage, 0.2, 0.315).mean()


def over_turn(columns: Columns) -> Loss:
    """Truncated answers are compared with the others, and count, but are not trained."""
    whole = (~columns.truncated[columns.trajectory_of_turn[columns.turn_of_token]]).double()
    advantage = spread(columns, standardised(columns)) * whole
    return lambda log_prob: -clipped((log_prob - columns.log_behaviour).exp(), advantage, 0.2, 0.28).mean()


def vc_ppo(columns: Columns) -> Loss:
    """GAE with lambda .95 of values that are 0, whitened over the batch."""
    advantage = torch.zeros_like(columns.log_prob)
    for i, tokens in enumerate(of_answer(columns)):
        for place, t in enumerate(tokens):
            advantage[t] = columns.reward[i] * 0.95 ** (len(tokens) - 1 - place)
    advantage = (advantage - advantage.mean()) / (advantage.var(correction=1) + 1e-8).sqrt()
    return lambda log_prob: -clipped((log_prob - columns.log_behaviour).exp(), advantage, 0.2, 0.2).mean()


def intellect2(columns: Columns) -> Loss:
    mixed = [m for m in of_group(columns) if len(set(columns.reward[m].tolist())) > 1]
    kept = [t for members in mixed for i in members for t in of_answer(columns)[i]]
    advantage = spread(columns, standardised(columns))

    def loss(log_prob: Tensor) -> Tensor:
        assert columns.log_reference is not None
        ratio = (log_prob - columns.log_behaviour).exp()
        term = torch.minimum(ratio.clamp(max=4.0) * advantage, ratio.clamp(0.8, 1.2) * advantage)
        x = columns.log_reference - log_prob
        return (-term + 1e-3 * (x.exp() - x - 1))[kept].mean()

    return loss


def raft(columns: Columns, clip: bool) -> Loss:
    right = spread(columns, (columns.reward > 0.3).double())

    def loss(log_prob: Tensor) -> Tensor:
        term = clipped((log_prob - columns.log_behaviour).exp(), right, 0.2, 0.2) if clip else log_prob * right
        return -means_of_means(columns, term)

    return loss


def reinforce_rej(columns: Columns) -> Loss:
    kept = torch.zeros_like(columns.reward)
    for members in of_group(columns):
        kept[members] = float(len(set(columns.reward[members].tolist())) > 1)
    advantage = spread(columns, columns.reward * kept)

    def loss(log_prob: Tensor) -> Tensor:
        return -means_of_means(columns, clipped((log_prob - columns.log_behaviour).exp(), advantage, 0.2, 0.2))

    return loss


def gpg(columns: Columns) -> Loss:
    advantage, valid = torch.zeros_like(columns.reward), 0
    for members in of_group(columns):
        reward = columns.reward[members]
        advantage[members] = reward - reward.mean()
        valid += len(members) * (len(set(reward.tolist())) > 1)
    share = valid / len(columns.reward)

    def loss(log_prob: Tensor) -> Tensor:
        return -means_of_means(columns, log_prob * spread(columns, advantage)) / share

    return loss


def stable_reinforce(columns: Columns) -> Loss:
    advantage = spread(columns, standardised(columns))
    kept = (advantage - advantage.mean()).abs() <= 3 * advantage.std(correction=0)

    def loss(log_prob: Tensor) -> Tensor:
        ratio = (log_prob - columns.log_behaviour).clamp(math.log(1e-3), math.log(1e3)).exp()
        return -means_of_means(columns, clipped(ratio, advantage, 0.2, 0.2) * kept)

    return loss


def forking(columns: Columns) -> Loss:
    assert columns.entropy is not None
    threshold = torch.quantile(columns.entropy, 0.8)
    kept = columns.entropy >= threshold
    advantage = spread(columns, standardised(columns))

    def loss(log_prob: Tensor) -> Tensor:
        return -(clipped((log_prob - columns.log_behaviour).exp(), advantage, 0.2, 0.28) * kept).mean()

    return loss


def reweighted(columns: Columns) -> Loss:
    advantage = spread(columns, standardised(columns)) * (0.7 + 0.3 * columns.log_prob.exp())

    def loss(log_prob: Tensor) -> Tensor:
        return -means_of_means(columns, clipped((log_prob - columns.log_behaviour).exp(), advantage, 0.2, 0.2))

    return loss


def dro(columns: Columns) -> Loss:
    centred = torch.cat([columns.reward[m] - columns.reward[m].mean() for m in of_group(columns)])

    def loss(log_prob: Tensor) -> Tensor:
        d = log_prob - columns.log_behaviour
        return -(log_prob * spread(columns, centred) - 0.05 * d.square()).mean()

    return loss


def luspo(columns: Columns) -> Loss:
    advantage = standardised(columns)

    def loss(log_prob: Tensor) -> Tensor:
        terms = []
        for i, tokens in enumerate(of_answer(columns)):
            ratio = (log_prob - columns.log_behaviour)[tokens].mean().exp()
            terms.append(len(tokens) * clipped(ratio, advantage[i], 3e-4, 4e-4))
        return -torch.stack(terms).mean()

    return loss


def mdpo(columns: Columns) -> Loss:
    """The KL to the policy that sampled, estimated from its samples: mean of (pi / mu) log (pi / mu)."""
    advantage = spread(columns, standardised(columns))

    def loss(log_prob: Tensor) -> Tensor:
        d = log_prob - columns.log_behaviour
        return (-d.exp() * advantage + d.exp() * d).mean()

    return loss


def aspo(columns: Columns) -> Loss:
    assert columns.entropy is not None
    advantage = spread(columns, standardised(columns))
    uncertain = torch.zeros_like(advantage, dtype=torch.bool)
    for tokens in of_answer(columns):
        order = sorted(tokens, key=lambda t: -float(columns.entropy[t]))  # type: ignore[index]
        uncertain[order[: math.ceil(0.2 * len(tokens))]] = True

    def loss(log_prob: Tensor) -> Tensor:
        assert columns.log_reference is not None
        ratio = (log_prob - columns.log_behaviour).exp().detach()
        epsilon = torch.where(uncertain, 0.4, 0.2)
        weight = torch.where(advantage > 0, 1 / ratio, ratio).clamp(max=3.0)
        out = ((advantage > 0) & (ratio > 1 + epsilon)) | ((advantage < 0) & (ratio < 1 - epsilon))
        x = columns.log_reference - log_prob
        k3 = (x.exp() - x - 1) * ~uncertain
        return (-torch.where(out, 0.0, weight) * advantage * log_prob + 1e-3 * k3).mean()

    return loss


CASES: dict[str, tuple[str, Callable[[Columns], Loss], dict[str, Any]]] = {
    "dapo": ("dapo", dapo, {}),
    "grpo-tcr": ("grpo_tcr", grpo_tcr, {}),
    "over-turn": ("over_turn", over_turn, {}),
    "vc-ppo": ("vc_ppo", vc_ppo, {}),
    "intellect2": ("intellect2", intellect2, {"entropy": 0.0}),
    "raft": ("raft", lambda c: raft(c, False), {"reward": {"threshold": 0.3}}),
    "raft++": ("raft_pp", lambda c: raft(c, True), {"reward": {"threshold": 0.3}}),
    "reinforce-rej": ("reinforce_rej", reinforce_rej, {}),
    "gpg": ("gpg", gpg, {}),
    "stable reinforce": ("stable_reinforce", stable_reinforce, {}),
    "80/20": ("forking_tokens", forking, {}),
    "ar": ("reweighted_grpo", reweighted, {}),
    "dro": ("dro", dro, {}),
    "luspo": ("luspo", luspo, {}),
    "mdpo": ("mdpo", mdpo, {}),
    "aspo": ("aspo", aspo, {}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_a_published_loss(
    descent: Callable[..., Tensor], assert_equal: Callable[..., None], case: str, seed: int
) -> None:
    recipe, loss, changes = CASES[case]
    columns = batch(seed, equal=seed % 2 == 0)
    if "raft" in case:  # fractional rewards: right or wrong, not how much
        columns = replace(columns, reward=columns.reward * 0.6 + 0.1)
    assert_equal(policy_of(columns, recipe, **changes), descent(loss(columns), columns))


@pytest.mark.parametrize("seed", SEEDS)
def test_gdpo_standardises_every_part_by_itself(assert_equal: Callable[..., None], seed: int) -> None:
    columns = batch(seed)
    rng = np.random.default_rng(seed)
    format_, right = (torch.tensor(rng.random(12)), columns.reward.clone())
    right[3] = torch.nan  # a part that does not apply to this episode
    noted = Noted(trajectory={"reward/format": format_, "reward/right": right}, weights={"format": 0.5})
    total = torch.zeros(12, dtype=torch.float64)
    for part, weight in ((format_, 0.5), (right, 1.0)):
        for members in of_group(columns):
            there = [i for i in members if not math.isnan(part[i])]
            mean = sum(float(part[i]) for i in there) / len(there)
            var = sum((float(part[i]) - mean) ** 2 for i in there) / (len(there) - 1)
            for i in there:
                total[i] += weight * (float(part[i]) - mean) / (math.sqrt(var) + 1e-4)
    whitened = (total - total.mean()) / (total.std(correction=1) + 1e-4)
    columns = replace(columns, noted=noted, log_behaviour=columns.log_prob.clone())
    got = policy_of(columns, "gdpo", aggregate=SUM) * 12
    assert_equal(got, spread(columns, whitened))


def test_a_regression_in_the_reward_is_that_of_every_update(descent: Callable[..., Tensor]) -> None:
    """CoPG as the KL in the reward: the second update of a step sees the policy that it moves."""
    columns = replace(batch(1, groups=1, size=2), log_proximal=batch(2, groups=1, size=2).log_prob[:1].new_zeros(0))
    n = len(columns.log_prob)
    start = columns.log_prob - 0.3 * torch.arange(n, dtype=torch.float64) / n
    columns = replace(columns, log_proximal=start)
    kl = {"coefficient": 0.1, "place": "reward", "taken_at": "update"}
    both = {"ratio": {"level": "none"}, "trust": {"rule": "none"}, "aggregate": SUM}
    got = policy_of(columns, "rloo", kl=kl, **both) * 2
    want = policy_of(columns, "copg", aggregate={"mode": "group_mean_token_sum"})
    torch.testing.assert_close(0.1 * got, want, rtol=1e-9, atol=1e-12)
    frozen = policy_of(columns, "rloo", kl=kl | {"taken_at": "step"}, **both) * 2
    assert not torch.allclose(0.1 * frozen, want)
