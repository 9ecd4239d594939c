"""Methods whose point is the reward, the advantage, the filter or the clip, restated from their papers as losses in
plain Python, differentiated by autograd in float64, against the coefficients of their recipes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from support_methods import batch, of_answer, of_group, policy_of, spread
from torch import Tensor

from async_rl.objective import Columns
from async_rl.objective.tokens import Noted

Loss = Callable[[Tensor], Tensor]
OfGroup = Callable[[list[int], list[float]], Sequence[float]]
"""(answers, their rewards) -> a number for each"""


def by_group(columns: Columns, function: OfGroup, rewards: Tensor | None = None) -> Tensor:
    out = torch.zeros_like(columns.reward)
    given = columns.reward if rewards is None else rewards
    for members in of_group(columns):
        out[members] = torch.tensor(list(function(members, given[members].tolist())), dtype=torch.float64)
    return out


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: Sequence[float], less: int = 1) -> float:
    return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - less))


def centred(_: list[int], rewards: list[float]) -> list[float]:
    return [r - mean(rewards) for r in rewards]


def standardised(_: list[int], rewards: list[float]) -> list[float]:
    return [0.0 if max(rewards) == min(rewards) else (r - mean(rewards)) / (std(rewards) + 1e-6) for r in rewards]


def leave_one_out(_: list[int], rewards: list[float]) -> list[float]:
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


def ratio_of(columns: Columns, log_prob: Tensor) -> Tensor:
    return (log_prob - columns.log_behaviour).exp()


def clip(ratio: Tensor, advantage: Tensor, low: float | Tensor = 0.2, high: float | Tensor = 0.2) -> Tensor:
    bounded = torch.maximum(torch.minimum(ratio, torch.as_tensor(1 + high)), torch.as_tensor(1 - low))
    return torch.minimum(ratio * advantage, bounded * advantage)


def over_answers(columns: Columns, of_token: Tensor) -> Tensor:
    return torch.stack([of_token[t].mean() for t in of_answer(columns)]).mean()


def ppo(
    columns: Columns, advantage: Tensor, *, low: float = 0.2, high: float = 0.2, kept: list[int] | None = None,
    answers: bool = False,
) -> Loss:  # fmt: skip
    """advantage of answers or of tokens; kept: answers; mean over tokens, or over answers of theirs."""
    each = spread(columns, advantage) if len(advantage) == len(columns.reward) else advantage

    def loss(log_prob: Tensor) -> Tensor:
        term = clip(ratio_of(columns, log_prob), each, low, high)
        if answers:
            return -over_answers(columns, term)
        chosen = of_answer(columns) if kept is None else [of_answer(columns)[i] for i in kept]
        return -torch.cat([term[t] for t in chosen]).mean()

    return loss


def lengths(columns: Columns) -> list[int]:
    return [len(t) for t in of_answer(columns)]


def right(columns: Columns) -> list[bool]:
    return [r > 0 for r in columns.reward.tolist()]


def mixed(columns: Columns, rewards: Tensor | None = None) -> list[int]:
    """Answers of groups whose rewards differ."""
    given = columns.reward if rewards is None else rewards
    return [i for m in of_group(columns) if len(set(given[m].tolist())) > 1 for i in m]


def k3(columns: Columns, log_prob: Tensor) -> Tensor:
    assert columns.log_reference is not None
    x = columns.log_reference - log_prob
    return x.exp() - x - 1


def most_entropy(columns: Columns, share: float) -> Tensor:
    assert columns.entropy is not None
    chosen = torch.zeros(len(columns.log_prob), dtype=torch.bool)
    for tokens in of_answer(columns):
        number = math.ceil(share * len(tokens) - 1e-9)
        for t in sorted(tokens, key=lambda t: -float(columns.entropy[t]))[:number]:  # type: ignore[index]
            chosen[t] = True
    return chosen


# What the reward becomes.


def kimi_k15(columns: Columns) -> Loss:
    long, ok = lengths(columns), right(columns)

    def shaped(members: list[int], rewards: list[float]) -> list[float]:
        low, high = min(long[i] for i in members), max(long[i] for i in members)
        place = [0.5 - (long[i] - low) / (high - low) if high > low else 0.0 for i in members]
        return [r + 0.1 * (p if ok[i] else min(0.0, p)) for i, r, p in zip(members, rewards, place, strict=True)]

    advantage, tau = by_group(columns, centred, by_group(columns, shaped)), 0.1

    def loss(log_prob: Tensor) -> Tensor:
        moved = torch.stack([(log_prob - columns.log_behaviour)[t].sum() for t in of_answer(columns)])
        return ((advantage - tau * moved).square() / (2 * tau)).mean()

    return loss


def of_lengths(name: str) -> Callable[[Columns], Loss]:
    def made(columns: Columns) -> Loss:
        long, ok = lengths(columns), right(columns)

        def shaped(members: list[int], rewards: list[float]) -> list[float]:
            rights = [long[i] for i in members if ok[i]]
            match name:
                case "l1":
                    return [r - 0.0003 * abs(512 - long[i]) for i, r in zip(members, rewards, strict=True)]
                case "alp":
                    share = max(len(rights) / len(members), 1 / len(members))
                    return [r - 1e-7 * long[i] * share for i, r in zip(members, rewards, strict=True)]
                case "laser":
                    return [r + 0.5 * (ok[i] and long[i] <= 4) for i, r in zip(members, rewards, strict=True)]
                case "shorter_better":
                    wanted = min(rights) if rights else mean([long[i] for i in members])
                    return [2.0 * ok[i] - 0.001 * abs(long[i] - wanted) for i in members]
            z = dict.fromkeys(members, 0.0)
            if rights and std(rights, 0) > 0:
                z = {i: (long[i] - mean(rights)) / std(rights, 0) for i in members}
            if name == "efficient_reasoning":
                return [(1 - 0.1 / (1 + math.exp(-z[i]))) * ok[i] for i in members]
            return [math.exp(-0.05 * z[i]) if ok[i] else -1.0 for i in members]

        rewards = by_group(columns, shaped)
        if name == "efficient_reasoning":
            return ppo(columns, by_group(columns, leave_one_out, rewards))
        advantage = by_group(columns, standardised, rewards)
        if name == "grpo_lead":

            def weighed(members: list[int], values: list[float]) -> list[float]:
                p = mean([float(ok[i]) for i in members])
                w = {s: 0.4 + 1.1 / (1 + math.exp(10 * (s - 0.75))) for s in (p, 1 - p)}
                return [v * (w[p] if v > 0 else w[1 - p]) for v in values]

            advantage = by_group(columns, weighed, advantage)
        return ppo(columns, advantage, answers=name == "shorter_better")

    return made


def pass_k(columns: Columns) -> Loss:
    """By drawing every set of 4."""

    def advantage(members: list[int], rewards: list[float]) -> list[float]:
        n, k = len(members), 4
        sets = list(itertools.combinations(range(n), k))
        best = [max(rewards[i] for i in chosen) for chosen in sets]
        mu = mean(best)
        sigma = math.sqrt(mu * (1 - mu))
        if sigma == 0:
            return [0.0] * n
        return [mean([b for b, s in zip(best, sets, strict=True) if i in s]) / sigma - mu / sigma for i in range(n)]

    return ppo(columns, by_group(columns, advantage), high=0.28)


def pkpo(columns: Columns) -> Loss:
    def marginal(members: list[int], rewards: list[float]) -> list[float]:
        n, k = len(members), 4
        sets = list(itertools.combinations(range(n), k))
        gain = lambda s, i: max(rewards[j] for j in s) - max(rewards[j] for j in s if j != i)  # noqa: E731
        return [math.fsum(gain(s, i) for s in sets if i in s) / math.comb(n, k) for i in range(n)]

    return ppo(columns, by_group(columns, marginal), answers=True)


def rs_grpo(columns: Columns) -> Loss:
    def tilted(_: list[int], rewards: list[float]) -> list[float]:
        weight = [math.exp(2 * r) for r in rewards]
        return [(w / mean(weight) - 1) / 2 for w in weight]

    return ppo(columns, by_group(columns, tilted), high=0.28)


def unlikeliness(columns: Columns) -> Loss:
    likely = [float(columns.log_behaviour[t].sum()) for t in of_answer(columns)]

    def ranked(members: list[int], rewards: list[float]) -> list[float]:
        order = sorted(members, key=lambda i: -likely[i])
        n = len(members)
        return [r * (1 - 0.25 * (n - order.index(i) - 1) / n) for i, r in zip(members, rewards, strict=True)]

    return ppo(columns, by_group(columns, standardised, by_group(columns, ranked)), answers=True)


def w_reinforce(columns: Columns) -> Loss:
    weight = spread(columns, torch.tensor([0.1 if ok else -1.0 for ok in right(columns)], dtype=torch.float64))
    return lambda log_prob: -(weight * log_prob).mean()


def dler(columns: Columns) -> Loss:
    rewards = torch.where(columns.truncated, 0.0, columns.reward)
    kept = mixed(columns, rewards)
    advantage = by_group(columns, centred, rewards)
    values = advantage[kept].tolist()
    whitened = (advantage - mean(values)) / (std(values) + 1e-4)
    return ppo(columns, whitened, high=0.28, kept=kept)


def by_answer(name: str) -> Callable[[Columns], Loss]:
    def made(columns: Columns) -> Loss:
        said = columns.noted.trajectory["answer"].tolist()

        def reward(members: list[int], _: list[float]) -> list[float]:
            given = [said[i] for i in members]
            counts = [0 if math.isnan(g) else given.count(g) for g in given]
            if name == "empo":
                return [c / len(given) for c in counts]
            return [float(g == given[counts.index(max(counts))]) for g in given]

        return ppo(
            columns, by_group(columns, standardised, by_group(columns, reward)), answers=name == "empo"
        )  # fmt: skip

    return made


def rent(columns: Columns) -> Loss:
    assert columns.entropy is not None
    rewards = torch.tensor([-float(columns.entropy[t].mean()) for t in of_answer(columns)], dtype=torch.float64)
    return ppo(columns, by_group(columns, standardised, rewards), answers=True)


# What it is compared with, and divided by.


def lite_ppo(columns: Columns) -> Loss:
    return ppo(columns, by_group(columns, centred) / (std(columns.reward.tolist()) + 1e-6))


def loop(columns: Columns) -> Loss:
    return ppo(columns, by_group(columns, leave_one_out))


def magistral(columns: Columns) -> Loss:
    kept = mixed(columns)
    advantage = by_group(columns, centred)
    values = advantage[kept].tolist()
    return ppo(columns, (advantage - mean(values)) / (std(values) + 1e-4), high=0.28, kept=kept)


def asym_re(columns: Columns) -> Loss:
    advantage = spread(columns, by_group(columns, centred) + 0.1)
    return lambda log_prob: -over_answers(columns, advantage * log_prob)


def qae(columns: Columns) -> Loss:
    def gated(_: list[int], rewards: list[float]) -> list[float]:
        p = mean(rewards)
        if p in (0.0, 1.0):
            return [0.0] * len(rewards)
        base = 0.0 if p <= 1 - 0.4 else 1.0
        return [(r - base) / (std(rewards) + 1e-6) for r in rewards]

    return ppo(columns, by_group(columns, gated), high=0.28)


def mapo(columns: Columns) -> Loss:
    def both(_: list[int], rewards: list[float]) -> list[float]:
        p = mean(rewards)
        if p in (0.0, 1.0):
            return [0.0] * len(rewards)
        sure = 1 - 4 * p * (1 - p)
        return [(1 - sure) * (r - p) / (std(rewards) + 1e-6) + sure * (r - p) / p for r in rewards]

    return ppo(columns, by_group(columns, both), answers=True)


def bnpo(columns: Columns) -> Loss:
    p = [mean(columns.reward[m].tolist()) for m in of_group(columns)]
    m, v = mean(p), std(p, 0) ** 2
    both = m * (1 - m) / v - 1 if v > 0 else 0.0
    beta = torch.distributions.Beta(
        torch.tensor(1 + m * both / 3, dtype=torch.float64), torch.tensor(1 + (1 - m) * both / 3, dtype=torch.float64)
    )

    def normalised(_: list[int], rewards: list[float]) -> list[float]:
        if mean(rewards) in (0.0, 1.0):
            return [0.0] * len(rewards)
        density = float(beta.log_prob(torch.tensor(mean(rewards), dtype=torch.float64)).exp()) if v > 0 else 1.0
        return [(r - mean(rewards)) / density for r in rewards]

    return ppo(columns, by_group(columns, normalised))


def equal_groups(name: str) -> Callable[[Columns], Loss]:
    def made(columns: Columns) -> Loss:
        assert columns.entropy is not None
        each, ok = spread(columns, by_group(columns, standardised)), right(columns)
        alive = mixed(columns)
        for i, tokens in enumerate(of_answer(columns)):
            if i in alive:
                continue
            top = float(columns.entropy[tokens].max())
            for t in tokens:
                h = float(columns.entropy[t])
                if name == "agpo":
                    each[t] = 1.0 if ok[i] else -1.0
                else:
                    each[t] = 0.1 * h if ok[i] else -0.1 * (top - h)
        return ppo(columns, each, high=0.28 if name == "rl_zvp" else 0.2, answers=name == "agpo")

    return made


# Regressions.


def regression(anchor: str, kind: str) -> Callable[[Columns], Loss]:
    def made(columns: Columns) -> Loss:
        base = columns.log_reference if anchor == "reference" else columns.log_behaviour
        assert base is not None

        def loss(log_prob: Tensor) -> Tensor:
            moved = torch.stack([(log_prob - base)[t].sum() for t in of_answer(columns)])
            found = []
            for members in of_group(columns):
                m, r, n = moved[members], columns.reward[members], len(members)
                if kind == "tba":  # log Z estimated from the group, without a gradient
                    log_z = (r / 0.5 - m).mean().detach()
                    found.append((log_z + m - r / 0.5).square().sum() / (n - 1))
                elif kind == "agro":
                    regularised = r - 0.1 * m
                    found.append(0.5 * (regularised - regularised.mean()).square().sum() / (n - 1))
                else:
                    value = math.log(mean([math.exp(x) for x in r.tolist()]))
                    found.append((0.01 * m - (r - value)).square().mean())
            return torch.stack(found).mean()

        return loss

    return made


def real(columns: Columns) -> Loss:
    def loss(log_prob: Tensor) -> Tensor:
        s = torch.stack([(log_prob - columns.log_behaviour)[t].mean() for t in of_answer(columns)]) / 0.5
        ok = torch.tensor(right(columns))
        found = []
        for members in of_group(columns):
            up, down = s[members][ok[members]], s[members][~ok[members]]
            found.append((1 + (-up).exp().sum()).log() + (1 + down.exp().sum()).log())
        return torch.stack(found).mean()

    return loss


# Clips and weights.


def pro_rl(columns: Columns) -> Loss:
    kept = [t for i in mixed(columns) for t in of_answer(columns)[i]]
    advantage = spread(columns, by_group(columns, standardised))

    def loss(log_prob: Tensor) -> Tensor:
        term = clip(ratio_of(columns, log_prob), advantage, 0.2, 0.4) - 0.001 * k3(columns, log_prob)
        return -term[kept].mean()

    return loss


def truncated(cap: float, scale: str) -> Callable[[Columns], Loss]:
    def made(columns: Columns) -> Loss:
        advantage = by_group(columns, centred)
        if scale == "batch":
            advantage = advantage / (std(columns.reward.tolist()) + 1e-6)
        each = spread(columns, advantage)

        def loss(log_prob: Tensor) -> Tensor:
            term = ratio_of(columns, log_prob).clamp(max=cap).detach() * each * log_prob
            if scale == "none":
                return -term.mean()
            groups = [m for m in of_group(columns) if m[0] in mixed(columns)]
            per_group = [torch.cat([term[of_answer(columns)[i]] for i in m]).mean() for m in groups]
            return -torch.stack(per_group).mean()

        return loss

    return made


def deep_swe(columns: Columns) -> Loss:
    advantage = spread(columns, by_group(columns, leave_one_out))
    over = spread(columns, (~columns.truncated).double())

    def loss(log_prob: Tensor) -> Tensor:
        term = clip(ratio_of(columns, log_prob), advantage, 0.2, 0.28) * over
        return -term.sum() / 1024 / len(columns.reward)

    return loss


def ppo_ewma(columns: Columns) -> Loss:
    advantage = spread(columns, by_group(columns, standardised))
    assert columns.log_reference is not None

    def loss(log_prob: Tensor) -> Tensor:
        assert columns.log_reference is not None
        weight = (columns.log_reference - columns.log_behaviour).exp()
        return -(weight * clip((log_prob - columns.log_reference).exp(), advantage)).mean()

    return loss


def dual_token(columns: Columns) -> Loss:
    advantage = spread(columns, by_group(columns, standardised))
    unsure = most_entropy(columns, 0.2)
    wide = torch.where(unsure, 0.5, 0.2).double()

    def loss(log_prob: Tensor) -> Tensor:
        term = clip(ratio_of(columns, log_prob), advantage, wide, wide)
        return -(term - 0.001 * k3(columns, log_prob) * ~unsure).mean()

    return loss


def beyond(low_share: float, high_share: float) -> Callable[[Columns], Loss]:
    def made(columns: Columns) -> Loss:
        advantage = spread(columns, by_group(columns, standardised))

        def loss(log_prob: Tensor) -> Tensor:
            r = ratio_of(columns, log_prob)
            fixed = r.detach()
            term = r * advantage
            term = torch.where((r < 0.8) & (advantage < 0), low_share * 0.8 / fixed * r * advantage, term)
            term = torch.where((r > 1.28) & (advantage > 0), high_share * 1.28 / fixed * r * advantage, term)
            return -torch.where(advantage < 0, torch.maximum(term, 3.0 * advantage), term).mean()

        return loss

    return made


def dcpo(columns: Columns) -> Loss:
    advantage = spread(columns, by_group(columns, standardised))
    q = columns.log_behaviour.exp()
    low = 0.5 + 0.5 * (1 - 4 * 0.16 / q).clamp(min=0).sqrt()
    high = (0.5 + 0.5 * (1 + 4 * 0.2 / q).sqrt()).clamp(max=10)

    def loss(log_prob: Tensor) -> Tensor:
        return -over_answers(columns, clip(ratio_of(columns, log_prob), advantage, 1 - low, high - 1))

    return loss


def entropy_advantage(columns: Columns) -> Loss:
    assert columns.entropy is not None
    advantage = spread(columns, by_group(columns, standardised))
    return ppo(columns, advantage + torch.minimum(0.4 * columns.entropy, advantage.abs() / 2), high=0.28)


def fipo(columns: Columns) -> Loss:
    advantage, moved = spread(columns, by_group(columns, standardised)), columns.log_prob - columns.log_behaviour
    factor = torch.ones_like(moved)
    for tokens in of_answer(columns):
        for place, t in enumerate(tokens):
            ahead = math.fsum(
                2 ** (-j / 32) * float(moved[u]) for j, u in enumerate(tokens[place:]) if math.exp(moved[u]) <= 10
            )
            factor[t] = min(max(math.exp(ahead), 1.0), 1.2)
            if advantage[t] < 0 and math.exp(moved[t]) > 4:
                factor[t] = min(max(factor[t], torch.tensor(0.8)), torch.tensor(1.0))
    each = advantage * factor

    def loss(log_prob: Tensor) -> Tensor:
        term = clip(ratio_of(columns, log_prob), each, 0.2, 0.28)
        return -torch.where(each < 0, torch.maximum(term, 10 * each), term).mean()

    return loss


# Filters.


def gfpo(columns: Columns) -> Loss:
    long = lengths(columns)

    def among_short(members: list[int], rewards: list[float]) -> list[float]:
        kept = sorted(range(len(members)), key=lambda j: long[members[j]])[:4]
        inside = standardised([], [rewards[j] for j in kept])
        return [inside[kept.index(j)] if j in kept else 0.0 for j in range(len(members))]

    return ppo(columns, by_group(columns, among_short))


def pods(columns: Columns) -> Loss:
    kept: list[int] = []

    def widest(members: list[int], rewards: list[float]) -> list[float]:
        best = max(std(list(s), 0) for s in itertools.combinations(rewards, 4))
        order = sorted(range(len(members)), key=lambda j: rewards[j])
        for largest in range(5):  # sets of the highest and lowest are the only ones that can be widest
            chosen = order[: 4 - largest] + (order[-largest:] if largest else [])
            if abs(std([rewards[j] for j in chosen], 0) - best) < 1e-12:
                break
        kept.extend(members[j] for j in chosen)
        inside = standardised([], [rewards[j] for j in chosen])
        return [inside[chosen.index(j)] if j in chosen else 0.0 for j in range(len(members))]

    each = spread(columns, by_group(columns, widest))

    def loss(log_prob: Tensor) -> Tensor:
        term = clip(ratio_of(columns, log_prob), each)
        return -torch.stack([term[of_answer(columns)[i]].mean() for i in kept]).mean()

    return loss


LOSSES: dict[str, Callable[[Columns], Loss]] = {
    "kimi_k15": kimi_k15,
    **{name: of_lengths(name) for name in ("l1", "alp", "laser", "shorter_better", "efficient_reasoning", "grpo_lead")},
    "pass_k": pass_k, "pkpo": pkpo, "rs_grpo": rs_grpo, "unlikeliness": unlikeliness, "w_reinforce": w_reinforce,
    "dler": dler, "ttrl": by_answer("ttrl"), "empo": by_answer("empo"), "rent": rent, "lite_ppo": lite_ppo,
    "loop": loop, "magistral": magistral, "asym_re": asym_re, "qae": qae, "mapo": mapo, "bnpo": bnpo,
    "rl_zvp": equal_groups("rl_zvp"), "agpo": equal_groups("agpo"), "tba": regression("reference", "tba"),
    "agro": regression("reference", "agro"), "oapl": regression("behaviour", "oapl"), "real": real, "pro_rl": pro_rl,
    "reinforce_tis": truncated(2.0, "none"), "scale_rl": truncated(5.0, "batch"), "deep_swe": deep_swe,
    "ppo_ewma": ppo_ewma, "dual_token": dual_token, "gppo": beyond(1.0, 1.0), "ce_gppo": beyond(0.75, 1.0),
    "dcpo": dcpo, "entropy_advantage": entropy_advantage, "fipo": fipo, "gfpo": gfpo, "pods": pods,
}  # fmt: skip
SMALLER: dict[str, dict[str, object]] = {"laser": {"reward": {"length_target": 4}}}
"""a target that answers of a few tokens can miss"""


def answered(seed: int) -> Columns:
    """Groups of six with answers noted, one group without a difference, ratios up to e^2."""
    columns = batch(seed, groups=4, size=6, spread=0.7, equal=True)
    said = np.random.default_rng(seed).integers(0, 3, len(columns.reward)).astype(float)
    said[5] = math.nan
    reward = columns.reward.clone()
    reward[18:] *= 1 - seed % 2  # all wrong
    return replace(columns, reward=reward, noted=Noted(trajectory={"answer": torch.tensor(said)}))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_coefficients_are_the_gradient_of_the_published_loss(
    descent: Callable[..., Tensor], assert_equal: Callable[..., None], name: str, seed: int
) -> None:
    columns = answered(seed)
    got = policy_of(columns, name, **SMALLER.get(name, {}))
    wanted = descent(LOSSES[name](columns), columns)
    assert bool((got != 0).any()) or (name == "pass_k" and not wanted.any())  # any four have a right one
    assert_equal(got, wanted)


def test_the_target_of_a_length_may_be_noted_by_the_task(
    descent: Callable[..., Tensor], assert_equal: Callable[..., None]
) -> None:
    asked = torch.arange(24).double() % 5 + 1
    columns = replace(answered(0), noted=Noted(trajectory={"asked": asked}))
    long = lengths(columns)
    exact = [float(r) - 0.1 * abs(float(a) - n) for r, a, n in zip(columns.reward, asked, long, strict=True)]
    most = [min(max(0.1 * (float(a) - n) + 0.5, 0.0), 1.0) for a, n in zip(asked, long, strict=True)]
    capped = (columns.reward * torch.tensor(most, dtype=torch.float64)).tolist()
    for rule, rewards in (("target", exact), ("target_max", capped)):
        reward = {"length": rule, "length_weight": 0.1, "length_target": 0, "length_target_note": "asked"}
        advantages = by_group(columns, standardised, torch.tensor(rewards, dtype=torch.float64))
        wanted = descent(ppo(columns, advantages), columns)
        assert_equal(policy_of(columns, "l1", reward=reward), wanted)


def test_pass_k_as_large_as_the_group_is_the_leave_one_out_of_the_maximum() -> None:
    columns = replace(answered(2), reward=torch.arange(24).double() % 6, log_behaviour=answered(2).log_prob)
    got = policy_of(columns, "pkpo", reward={"pass_k": 6}, aggregate={"mode": "seq_mean_token_sum"}) * 24
    best = torch.tensor([5.0 - 4.0 if i % 6 == 5 else 0.0 for i in range(24)], dtype=torch.float64)
    torch.testing.assert_close(got, spread(columns, best))
