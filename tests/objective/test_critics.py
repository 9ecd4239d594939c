"""Critics on Markov decision processes small enough to write out: what the coefficients lead a table to is what value
iteration finds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe

LAYERS, STATES, ACTIONS = 3, 3, 2
DISCOUNT = 0.9
SHARES = (1, 3)
"""of 4: how often the policy takes each action"""
NEXT = {
    (layer, s, a): ((s + a) % STATES, (2 * s + a + layer) % STATES)
    for layer in range(LAYERS) for s in range(STATES) for a in range(ACTIONS)
}  # fmt: skip
"""two states that follow, each with probability 1/2"""
REWARD = {key: math.sin(1.0 + 5.0 * key[0] + 3.0 * key[1] + 2.0 * key[2]) for key in NEXT}


def value_iteration() -> tuple[dict[tuple[int, int], float], dict[tuple[int, int, int], float]]:
    """V and Q of the policy, by sweeps over all states until nothing changes."""
    value = {(layer, s): 0.0 for layer in range(LAYERS + 1) for s in range(STATES)}
    while True:
        q = {
            (layer, s, a): REWARD[layer, s, a] + DISCOUNT * sum(value[layer + 1, t] for t in NEXT[layer, s, a]) / 2
            for layer, s, a in NEXT
        }
        found = {(i, s): sum(SHARES[a] * q[i, s, a] for a in range(ACTIONS)) / 4 for i, s, a in q}
        if all(abs(found[key] - value[key]) < 1e-13 for key in found):
            return found, q
        value |= found


def every_trajectory() -> Iterator[list[tuple[int, int, int]]]:
    """(layer, state, action) of each step, as often as it happens among 3 x 8^3."""
    for first in range(STATES):
        for choices in product(range(4 * 2), repeat=LAYERS):
            state, steps = first, []
            for layer, choice in enumerate(choices):
                which, turned = divmod(choice, 2)
                action = 0 if which < SHARES[0] else 1
                steps.append((layer, state, action))
                state = NEXT[layer, state, action][turned]
            yield steps


@dataclass
class World:
    """A batch that holds every trajectory as often as it happens: each step is a turn of one token."""

    columns: Columns
    state: Tensor  # [tokens] int64
    pair: Tensor  # [tokens] int64, state and action

    @staticmethod
    def make() -> World:
        steps = [step for trajectory in every_trajectory() for step in trajectory]
        tokens = len(steps)
        zero = torch.zeros(tokens, dtype=torch.float64)
        trajectories = tokens // LAYERS
        columns = Columns(
            log_prob=zero,
            log_behaviour=zero,
            version=torch.zeros(tokens, dtype=torch.int64),
            turn_of_token=torch.arange(tokens),
            trajectory_of_turn=torch.arange(tokens) // LAYERS,
            group_of_trajectory=torch.zeros(trajectories, dtype=torch.int64),
            reward=torch.zeros(trajectories, dtype=torch.float64),
            turn_reward=torch.tensor([REWARD[step] for step in steps], dtype=torch.float64),
            state_key=torch.full((tokens,), -1),
            truncated=torch.zeros(trajectories, dtype=torch.bool),
            current_version=1,
        )
        state = torch.tensor([layer * STATES + s for layer, s, _ in steps])
        pair = torch.tensor([(layer * STATES + s) * ACTIONS + a for layer, s, a in steps])
        return World(columns=columns, state=state, pair=pair)


def table(values: dict[Any, float]) -> Tensor:
    return torch.tensor([values[key] for key in sorted(values)], dtype=torch.float64)


def moved(old: Tensor, where: Tensor, gradient: Tensor, share: Tensor) -> Tensor:
    """The table behind a step to the minimum of the loss: all of its rows have the same share."""
    total, weight = (torch.zeros_like(old).index_add_(0, where, column) for column in (gradient, share))
    return torch.where(weight > 0, old - total / weight.clamp(min=1e-300), old)


PLAIN = {"ratio": {"level": "none"}, "trust": {"rule": "none"}, "aggregate": {"mode": "token_mean"}}


@pytest.mark.parametrize("credit", ["token_gae", "turn_gae"])
@pytest.mark.parametrize("trace", [0.0, 0.6, 1.0])
def test_td_lambda_with_a_target_network_finds_the_value_of_the_policy(credit: str, trace: float) -> None:
    world, (value, q) = World.make(), value_iteration()
    advantage = {"credit": credit, "discount": DISCOUNT, "whiten": False}
    gae = {"trace": 0.0, "critic_trace": trace, "value_clip": 0.0}
    recipe = load_recipe({"name": "ppo", **PLAIN, "advantage": advantage, "gae": gae})
    now = torch.zeros(LAYERS * STATES, dtype=torch.float64)
    slow = now.clone()
    for _ in range(45):
        of_token = now[world.state]
        columns = replace(world.columns, value=of_token, value_before=of_token, value_slow=slow[world.state])
        answer, _ = coefficients(columns, recipe, ObjectiveState())
        assert answer.value_grad is not None
        assert answer.value_share is not None
        now = moved(now, world.state, answer.value_grad, answer.value_share)
        slow = 0.5 * slow + 0.5 * now
    torch.testing.assert_close(now, table(value), rtol=0, atol=1e-9)
    # with lambda 0 an action's mean advantage is Q - V
    policy = answer.policy * len(world.state)
    mean = torch.zeros(LAYERS * STATES * ACTIONS, dtype=torch.float64).index_add_(0, world.pair, policy)
    mean /= torch.bincount(world.pair)
    wanted = table(q) - table(value).repeat_interleave(ACTIONS)
    torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-9)


def test_the_target_networks_values_are_what_targets_are_formed_with() -> None:
    world = World.make()
    recipe = load_recipe(
        {"name": "ppo", "gae": {"critic_trace": 0.0, "value_clip": 0.0}, "advantage": {"discount": 0.5}}
    )
    now, slow = torch.zeros(len(world.state)), torch.arange(len(world.state)) / 100
    columns = replace(world.columns, value=now.double(), value_before=now.double(), value_slow=slow.double())
    target = coefficients(columns, recipe, ObjectiveState())[0].value_target
    assert target is not None
    following = torch.cat([slow[1:], torch.zeros(1)]).double()
    following[LAYERS - 1 :: LAYERS] = 0.0
    torch.testing.assert_close(target, world.columns.turn_reward + 0.5 * following)


def test_q_heads_of_turns_find_the_values_of_actions() -> None:
    world, (value, q) = World.make(), value_iteration()
    recipe = load_recipe({"name": "archer", **PLAIN, "advantage": {"discount": DISCOUNT}})
    random = torch.Generator().manual_seed(0)
    heads = [torch.randn(n, generator=random, dtype=torch.float64) for n in (LAYERS * STATES,) * 2]
    heads += [torch.randn(n, generator=random, dtype=torch.float64) for n in (LAYERS * STATES * ACTIONS,) * 2]
    where = [world.state, world.state, world.pair, world.pair]
    slow = [head.clone() for head in heads]
    for _ in range(70):
        columns = replace(
            world.columns,
            turn_values=torch.stack([head[w] for head, w in zip(heads, where, strict=True)], 1),
            turn_values_slow=torch.stack([head[w] for head, w in zip(slow, where, strict=True)], 1),
        )
        answer, _ = coefficients(columns, recipe, ObjectiveState())
        assert answer.value_grad is not None
        assert answer.value_share is not None
        heads = [
            moved(head, w, answer.value_grad[:, i], answer.value_share[:, i])
            for i, (head, w) in enumerate(zip(heads, where, strict=True))
        ]
        slow = [0.5 * old + 0.5 * new for old, new in zip(slow, heads, strict=True)]
    for i, wanted in enumerate((value, value, q, q)):
        torch.testing.assert_close(heads[i], table(wanted), rtol=0, atol=1e-9)
    wanted_advantage = (table(q) - table(value).repeat_interleave(ACTIONS))[world.pair]
    torch.testing.assert_close(answer.policy * len(world.state), wanted_advantage, rtol=0, atol=1e-9)


def test_the_advantage_of_a_turn_is_the_least_q_less_the_least_value() -> None:
    world = World.make()
    recipe = load_recipe({"name": "archer", **PLAIN})
    random = torch.randn(len(world.state), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    columns = replace(world.columns, turn_values=random, turn_values_slow=-random)
    got = coefficients(columns, recipe, ObjectiveState())[0].policy * len(world.state)
    wanted = [min(q1, q2) - min(v1, v2) for v1, v2, q1, q2 in random.tolist()]
    assert got.tolist() == pytest.approx(wanted)


# OREO on a tree of two tokens: V and pi of the regularised problem from its definition,
# V(s) = beta log E_ref exp(Q / beta).

BETA, WORDS = 0.5, 3
LEAVES = [(a, b) for a in range(WORDS) for b in range(WORDS)]


def soft_value_iteration(log_ref: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """log_ref [4, 3]: of the root, then of each state behind it; reward [3, 3]. V [4] and log pi [4, 3]."""
    behind = BETA * torch.logsumexp(log_ref[1:] + reward / BETA, 1)
    root = BETA * torch.logsumexp(log_ref[0] + behind / BETA, 0)
    value = torch.cat([root[None], behind])
    q = torch.cat([behind[None], reward])
    return value, log_ref + (q - value[:, None]) / BETA


def tree_columns(log_pi: Tensor, log_ref: Tensor, value: Tensor, reward: Tensor) -> tuple[Columns, Tensor, Tensor]:
    """Every answer once, and of each token its state and word."""
    state = torch.tensor([s for a, _ in LEAVES for s in (0, 1 + a)])
    word = torch.tensor([w for leaf in LEAVES for w in leaf])
    tokens = len(state)
    columns = Columns(
        log_prob=log_pi[state, word],
        log_behaviour=torch.full((tokens,), -1.0, dtype=torch.float64),  # whoever sampled: no weight looks at it
        version=torch.zeros(tokens, dtype=torch.int64),
        turn_of_token=torch.arange(tokens) // 2,
        trajectory_of_turn=torch.arange(len(LEAVES)),
        group_of_trajectory=torch.zeros(len(LEAVES), dtype=torch.int64),
        reward=reward.reshape(-1),
        turn_reward=torch.zeros(len(LEAVES), dtype=torch.float64),
        state_key=torch.full((len(LEAVES),), -1),
        truncated=torch.zeros(len(LEAVES), dtype=torch.bool),
        current_version=1,
        log_reference=log_ref[state, word],
        value=value[state],
    )
    return columns, state, word


def test_the_soft_bellman_equation_holds_at_the_optimum_and_leads_there() -> None:
    random = torch.Generator().manual_seed(3)
    log_ref = torch.log_softmax(torch.randn(1 + WORDS, WORDS, generator=random, dtype=torch.float64), 1)
    reward = torch.rand(WORDS, WORDS, generator=random, dtype=torch.float64)
    best_value, best_policy = soft_value_iteration(log_ref, reward)
    assert best_policy.exp().sum(1).tolist() == pytest.approx([1.0] * 4)
    changes = {"kl": {"coefficient": BETA}, "trust": {"loss_weight": 2 * BETA}, "more_kl": ()}
    recipe = load_recipe({"name": "oreo", **changes})

    columns, _, _ = tree_columns(best_policy, log_ref, best_value, reward)
    answer, _ = coefficients(columns, recipe, ObjectiveState())
    assert answer.value_grad is not None
    assert float(answer.policy.abs().max()) < 1e-12
    assert float(answer.value_grad.abs().max()) < 1e-12

    logits = log_ref.clone().requires_grad_()
    value = torch.zeros(1 + WORDS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.1)
    for number in range(250):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.975**number
        log_pi = torch.log_softmax(logits, 1)
        columns, state, word = tree_columns(log_pi.detach(), log_ref, value.detach(), reward)
        answer, _ = coefficients(columns, recipe, ObjectiveState())
        assert answer.value_grad is not None
        loss = -(answer.policy * log_pi[state, word]).sum() + (answer.value_grad * value[state]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(value.detach(), best_value, rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.log_softmax(logits, 1).detach(), best_policy, rtol=0, atol=1e-2)


def test_oreo_is_the_gradient_of_its_published_loss() -> None:
    """1/L sum_t (beta d_t + sg[beta sum of later d] + V_t - R)^2, d = log pi / ref, and .01 KL by k2."""
    random = torch.Generator().manual_seed(5)
    log_ref, log_pi = (
        torch.log_softmax(torch.randn(1 + WORDS, WORDS, generator=random, dtype=torch.float64), 1) for _ in range(2)
    )
    reward = torch.rand(WORDS, WORDS, generator=random, dtype=torch.float64)
    columns, _, _ = tree_columns(log_pi, log_ref, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), reward)
    assert columns.log_reference is not None
    assert columns.value is not None
    log_prob = columns.log_prob.clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for number in range(len(LEAVES)):
        d = log_prob[2 * number : 2 * number + 2] - columns.log_reference[2 * number : 2 * number + 2]
        value = columns.value[2 * number : 2 * number + 2]
        for t in range(2):
            residual = 0.03 * (d[t] + d[t + 1 :].detach().sum()) + value[t] - columns.reward[number]
            loss = loss + residual**2 / 2 / len(LEAVES)
            loss = loss + 0.01 * d[t] ** 2 / 2 / 2 / len(LEAVES)
    loss.backward()
    assert log_prob.grad is not None
    got, _ = coefficients(columns, load_recipe({"name": "oreo"}), ObjectiveState())
    torch.testing.assert_close(got.policy, -log_prob.grad, rtol=0, atol=1e-12)
