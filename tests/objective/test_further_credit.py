"""Methods that credit turns, tokens with a critic, trees, demonstrations, or have numbers that move, restated in plain
Python or as losses that autograd differentiates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support_methods import batch, of_answer, of_group, policy_of, spread
from support_trees import advantages, forked, path
from torch import Tensor

from async_rl.errors import UserError
from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe
from async_rl.objective.tokens import Reused
from async_rl.trajectory.reuse import SOURCES

Loss = Callable[[Tensor], Tensor]
SEEDS = range(4)
OFF = {"trust": {"rule": "none"}, "aggregate": {"mode": "seq_mean_token_sum"}}


def in_turns(seed: int) -> Columns:
    """Answers cut into turns of 1 to 3 tokens, with turn rewards and values."""
    columns = batch(seed, spread=0.6)
    random = torch.Generator().manual_seed(seed)
    turn, owner, number = [], [], -1
    for answer, tokens in enumerate(of_answer(columns)):
        left = 0
        for _ in tokens:
            if left == 0:
                left, number = int(torch.randint(1, 4, (), generator=random)), number + 1
                owner.append(answer)
            turn.append(number)
            left -= 1
    n = len(turn)
    return replace(
        columns,
        turn_of_token=torch.tensor(turn),
        trajectory_of_turn=torch.tensor(owner),
        turn_reward=torch.randn(len(owner), generator=random, dtype=torch.float64),
        state_key=torch.full((len(owner),), -1),
        value=torch.randn(n, generator=random, dtype=torch.float64),
    )


def turns_of(columns: Columns) -> list[list[list[int]]]:
    """Tokens of each turn of each answer."""
    found: list[list[list[int]]] = [[] for _ in columns.reward]
    for turn, answer in enumerate(columns.trajectory_of_turn.tolist()):
        found[answer].append([t for t, k in enumerate(columns.turn_of_token.tolist()) if k == turn])
    return found


def clip(columns: Columns, log_prob: Tensor, advantage: Tensor, high: float = 0.2, dual: float = 0.0) -> Tensor:
    ratio = (log_prob - columns.log_behaviour).exp()
    term = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1 + high) * advantage)
    return torch.where(advantage < 0, torch.maximum(term, dual * advantage), term) if dual else term


def standardised(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    if float(tensor.max()) == float(tensor.min()):
        return [0.0] * len(values)
    return ((tensor - tensor.mean()) / (tensor.std(correction=1) + 1e-6)).tolist()


def whitened(values: list[float]) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.float64)
    return (tensor - tensor.mean()) / (tensor.var(correction=1) + 1e-8).sqrt()


def k3(columns: Columns, log_prob: Tensor) -> Tensor:
    assert columns.log_reference is not None
    x = columns.log_reference - log_prob
    return x.exp() - x - 1


def rewards_of_tokens(columns: Columns) -> list[float]:
    """Of the turns at their ends, the outcome at the end of the answer."""
    reward = [0.0] * len(columns.log_prob)
    number = 0
    for answer, turns in enumerate(turns_of(columns)):
        for tokens in turns:
            reward[tokens[-1]] += float(columns.turn_reward[number])
            number += 1
        reward[turns[-1][-1]] += float(columns.reward[answer])
    return reward


def gae(columns: Columns, trace: float) -> list[float]:
    assert columns.value is not None
    reward, value, found = rewards_of_tokens(columns), columns.value.tolist(), [0.0] * len(columns.log_prob)
    for tokens in of_answer(columns):
        ahead = after = 0.0
        for t in reversed(tokens):
            ahead = reward[t] + after - value[t] + trace * ahead
            after, found[t] = value[t], ahead
    return found


def m_grpo(columns: Columns) -> Loss:
    each = torch.zeros_like(columns.reward)
    for members in of_group(columns):
        each[members] = torch.tensor(standardised(columns.reward[members].tolist()), dtype=torch.float64)
    advantage = spread(columns, each)

    def loss(log_prob: Tensor) -> Tensor:
        term = clip(columns, log_prob, advantage) - 0.001 * k3(columns, log_prob)
        episodes = [torch.stack([term[t].mean() for t in turns]).mean() for turns in turns_of(columns)]
        return -torch.stack(episodes).mean()

    return loss


def kevin(columns: Columns) -> Loss:
    reward, advantage = rewards_of_tokens(columns), torch.zeros_like(columns.log_prob)
    returns: dict[tuple[int, int], float] = {}
    for answer, turns in enumerate(turns_of(columns)):
        ahead = 0.0
        for k in reversed(range(len(turns))):
            ahead = sum(reward[t] for t in turns[k]) + 0.4 * ahead
            returns[answer, k] = ahead
    for members in of_group(columns):
        keys = [key for key in returns if key[0] in members]
        for (answer, k), value in zip(keys, standardised([returns[key] for key in keys]), strict=True):
            advantage[turns_of(columns)[answer][k]] = value

    def loss(log_prob: Tensor) -> Tensor:
        term = clip(columns, log_prob, advantage)
        return -torch.stack([term[t].mean() for turns in turns_of(columns) for t in turns]).mean()

    return loss


def with_critic(trace: float, high: float, dual: float) -> Callable[[Columns], Loss]:
    def made(columns: Columns) -> Loss:
        advantage = whitened(gae(columns, trace))
        return lambda log_prob: -clip(columns, log_prob, advantage, high, dual).mean()

    return made


def starpo_s(columns: Columns) -> Loss:
    advantage = whitened(gae(columns, 1.0))
    spreads = [float(columns.reward[m].std(correction=0)) for m in of_group(columns)]
    least = sorted(spreads)[-math.ceil(0.25 * len(spreads))]
    kept = [i for m, s in zip(of_group(columns), spreads, strict=True) if s >= least for i in m]
    tokens = [t for i in kept for t in of_answer(columns)[i]]
    return lambda log_prob: -clip(columns, log_prob, advantage, 0.28)[tokens].mean()


def vagen(columns: Columns) -> Loss:
    assert columns.value is not None
    reward, value, found = rewards_of_tokens(columns), columns.value.tolist(), [0.0] * len(columns.log_prob)
    for turns in turns_of(columns):
        ahead = after = 0.0
        for tokens in reversed(turns):  # the agent's level: from the end of a turn to the end of the next
            end = tokens[-1]
            ahead = sum(reward[t] for t in tokens) + 0.95 * after - value[end] + 0.95 * 1.0 * ahead
            after, found[end] = value[end], ahead
            within = ahead
            for t in reversed(tokens[:-1]):  # the tokens' level, within the turn
                within = value[t + 1] - value[t] + within
                found[t] = within
    advantage = whitened(found)
    return lambda log_prob: -clip(columns, log_prob, advantage).mean()


LOSSES: dict[str, Callable[[Columns], Loss]] = {
    "m_grpo": m_grpo,
    "kevin": kevin,
    "open_reasoner_zero": with_critic(1.0, 0.2, 0.0),
    "dual_clip_ppo": with_critic(0.95, 0.2, 3.0),
    "ppo": with_critic(0.95, 0.2, 0.0),  # MT-PPO: rewards of turns where they fell
    "starpo_s": starpo_s,
    "vagen": vagen,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_coefficients_are_the_gradient_of_the_published_loss(
    descent: Callable[..., Tensor], assert_equal: Callable[..., None], name: str, seed: int
) -> None:
    columns = in_turns(seed)
    changes: dict[str, Any] = {"gae": {"trace": 0.95}} if name == "ppo" else {}
    got = policy_of(columns, name, **changes)
    assert bool((got != 0).any())
    assert_equal(got, descent(LOSSES[name](columns), columns))


def test_two_levels_train_the_critic_towards_advantage_and_value() -> None:
    columns = in_turns(1)
    assert columns.value is not None
    answer = coefficients(columns, load_recipe({"name": "vagen", "advantage": {"whiten": False}}), ObjectiveState())[0]
    assert answer.value_target is not None
    raw = policy_of(
        replace(columns, log_behaviour=columns.log_prob), "vagen", advantage={"whiten": False},
        aggregate={"mode": "seq_mean_token_sum"},
    ) * len(columns.reward)  # fmt: skip
    torch.testing.assert_close(answer.value_target, raw + columns.value)


# Trees.


def leaves_through(columns: Columns) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for answer in range(len(columns.reward)):
        for token in path(columns, answer):
            found.setdefault(token, []).append(answer)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_tree_rl_credits_the_gain_since_the_prompt_and_since_the_parent(seed: int) -> None:
    columns = forked(seed)
    assert columns.forks is not None
    through = leaves_through(columns)
    children: dict[tuple[int, int], list[int]] = {}
    for child, (parent, shared) in enumerate(columns.forks.tolist()):
        children.setdefault((parent, shared), []).append(child)
    size = [len(tokens) for tokens in of_answer(columns)]

    def cuts(answer: int) -> list[int]:
        return sorted({shared for parent, shared in children if parent == answer and 0 < shared < size[answer]})

    def behind(answer: int, at: int) -> float:
        """Value where the segment that begins at `at` ends."""
        later = [c for c in cuts(answer) if c > at]
        return node(answer, later[0]) if later else float(columns.reward[answer])

    def node(answer: int, at: int) -> float:
        begun = [behind(child, 0) for child in children[answer, at]]
        return sum([behind(answer, at), *begun]) / (1 + len(begun))

    wanted = []
    for answer, (parent, shared) in enumerate(columns.forks.tolist()):
        group = next(m for m in of_group(columns) if answer in m)
        roots = [i for i in group if columns.forks[i, 0] < 0]
        prompt = sum(behind(root, 0) for root in roots) / len(roots)
        before = prompt if parent < 0 else node(parent, shared)
        for begin, end in zip([0, *cuts(answer)], [*cuts(answer), size[answer]], strict=True):
            value = behind(answer, begin)
            for place in range(begin, end):
                gain = (value - prompt) + (value - before)
                wanted.append(gain / math.sqrt(len(through[answer, place])))
            before = value
    got = policy_of(columns, "tree_rl", **OFF) * len(columns.reward)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_tree_grpo_adds_the_advantage_within_a_tree_to_that_among_all(seed: int) -> None:
    columns = forked(seed)
    assert columns.forks is not None
    both = advantages(columns)
    root = list(range(len(both)))
    for child, (parent, _) in enumerate(columns.forks.tolist()):
        root[child] = root[parent] if parent >= 0 else child
    for tree in set(root):
        members = [i for i, r in enumerate(root) if r == tree]
        if len(members) > 1:
            for i, value in zip(members, standardised(columns.reward[members].tolist()), strict=True):
                both[i] += value
    through = leaves_through(columns)
    wanted = [
        sum(both[leaf] for leaf in through[answer, place]) / len(through[answer, place])
        for answer, tokens in enumerate(of_answer(columns))
        for place in range(len(tokens))
    ]
    got = policy_of(columns, "tree_grpo", **OFF) * len(columns.reward)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


# Demonstrations.


def with_demonstrations(seed: int, *, joined: bool) -> Columns:
    """Groups of four, whose last answer is a demonstration, or with a last group of demonstrations alone."""
    columns = batch(seed, groups=3)
    shown = torch.zeros(12, dtype=torch.bool)
    shown[[3, 7, 11] if joined else [8, 9, 10, 11]] = True
    none = torch.zeros(12, dtype=torch.float64)
    no = torch.zeros_like(shown)
    return replace(
        columns,
        reward=torch.where(shown, 1.0, columns.reward),
        log_behaviour=torch.where(spread(columns, shown.double()) > 0, 0.0, columns.log_behaviour),
        reused=Reused(
            source=torch.where(shown, SOURCES.index("demonstrations"), -1), replayed=no, demonstration=shown, out=no,
            advantage=none, baseline=none, scale=none,
        ),
    )  # fmt: skip


def rows(columns: Columns, shown: bool) -> list[int]:
    assert columns.reused is not None
    return [t for i, d in enumerate(columns.reused.demonstration.tolist()) if d == shown for t in of_answer(columns)[i]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weight", ["uncertainty", "equal", "probability"])
def test_chord_mixes_imitation_weighed_by_token_with_grpo(
    descent: Callable[..., Tensor], assert_equal: Callable[..., None], seed: int, weight: str
) -> None:
    columns = with_demonstrations(seed, joined=False)
    mu = 0.9 - 0.85 * 0.5 * (1 - math.cos(math.pi * 50 / 200))
    columns = replace(columns, current_version=50)
    own, demonstrated = rows(columns, False), rows(columns, True)
    advantage = torch.zeros_like(columns.reward)
    for members in of_group(columns)[:2]:
        advantage[members] = torch.tensor(standardised(columns.reward[members].tolist()), dtype=torch.float64)

    def loss(log_prob: Tensor) -> Tensor:
        p = log_prob.detach().exp()
        phi = {"uncertainty": p * (1 - p), "equal": torch.ones_like(p), "probability": p}[weight]
        grpo = -clip(columns, log_prob, spread(columns, advantage))[own].mean()
        return (1 - mu) * grpo + mu * -(phi * log_prob)[demonstrated].mean()

    got = policy_of(columns, "chord", reuse={"nll_weight": weight})
    assert_equal(got, descent(loss, columns))


@pytest.mark.parametrize("seed", SEEDS)
def test_srft_weighs_imitation_and_own_successes_by_entropy(
    descent: Callable[..., Tensor], assert_equal: Callable[..., None], seed: int
) -> None:
    columns = with_demonstrations(seed, joined=True)
    assert columns.entropy is not None
    own, demonstrated = rows(columns, False), rows(columns, True)
    up, down = float(columns.entropy[own].mean()), float(columns.entropy[demonstrated].mean())
    joined = torch.zeros_like(columns.reward)
    for members in of_group(columns):
        rewards = columns.reward[members]
        deviation = float(rewards.std(correction=1))
        joined[members] = (rewards - rewards.mean()) / ((deviation if deviation > 0 else 1.0) + 1e-6)
    signs = torch.tensor([0.1 * math.exp(up) if r > 0 else -1.0 for r in columns.reward], dtype=torch.float64)

    def loss(log_prob: Tensor) -> Tensor:
        ratio = (log_prob - columns.log_behaviour).exp()  # 1 on policy, where its gradient is that of log pi
        term = ratio * spread(columns, signs)
        shown = log_prob.exp() * spread(columns, joined)
        policy = torch.cat([term[own], shown[demonstrated]]).mean()
        return -policy - 0.5 * math.exp(-down) * log_prob[demonstrated].mean()

    assert_equal(policy_of(columns, "srft"), descent(loss, columns))


# Numbers that move.


def test_skywork_raises_its_bonus_while_entropy_is_low_and_holds_it_back_while_it_is_high() -> None:
    recipe = load_recipe({"name": "skywork_or1"})
    columns, state = batch(0), ObjectiveState()
    assert columns.entropy is not None
    held = 0.0
    for step, entropy in enumerate([0.1, 0.15, 0.2, 0.3, 0.5, 0.1, 0.9, 0.05]):
        measured = replace(columns, entropy=torch.full_like(columns.entropy, entropy), current_version=step)
        used = state.controlled["entropy"].value if state.controlled else 0.0
        answer, state = coefficients(measured, recipe, ObjectiveState.from_dict(state.to_dict()))
        given = 0.0 if answer.entropy is None else float(answer.entropy.sum())
        assert given == pytest.approx(used)  # every group has a signal, so the shares sum to 1
        held = max(held + (0.005 if entropy <= 0.2 else -0.005), 0.0)
        assert state.controlled["entropy"].value == pytest.approx(held if entropy <= 0.2 else 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {"right": 2.0}}, "reward.right does nothing without reward.outcome=indicator"),
        ({"reward": {"outcome": "majority"}}, "needs reward.answer_note"),
        ({"reward": {"length": "target"}}, "needs reward.length_target"),
        ({"reward": {"length_weight": 0.5}}, "does nothing without reward.length"),
        ({"reward": {"pass_k": 4}}, "needs baseline=none and scale=none"),
        ({"reward": {"pass_k": 1}}, "from 2, or 0"),
        ({"advantage": {"equal": "sign"}, "select": {"drop_equal_rewards": True}}, "must not leave them out"),
        ({"advantage": {"quantile": 0.7}}, "does nothing without advantage.baseline=quantile"),
        ({"trust": {"rule": "sat", "beyond_low": 1.0}}, "does nothing without trust.rule=ppo"),
        ({"select": {"keep_by": "variance"}}, "does nothing without select.keep_in_group"),
        ({"select": {"keep_in_group": 4, "before_forward": True, "denominator": "kept"}}, "select.keep_by=variance"),
        ({"shape": {"future": 8.0}, "trust": {"rule": "real", "score_temperature": 0.5},
          "aggregate": {"mode": "group_mean_token_sum"}}, "has none"),
        ({"policy_weight": 0.0}, "leaves nothing to learn from"),
        ({"reuse": {"nll_weight": "probability"}}, "does nothing without reuse.nll"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe({"name": "grpo", **changes})
