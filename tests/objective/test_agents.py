"""Trajectories of several agents: finer credit is that of a batch in which every agent's turns are a trajectory of
their own, compared with the same agent of the other samples."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from async_rl.objective import Columns
from async_rl.objective.advantage import advantage_of
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.objective.tokens import tokens_of

AGENTS = ("black", "white", "umpire")
RECIPES: list[dict[str, Any]] = [
    {"name": "turn_return", "advantage": {"discount": 0.9}},
    {"name": "turn_return", "advantage": {"scale": "group_std", "std_epsilon": 1e-6}},
    {"name": "turn_grpo"},
    {"name": "gigpo", "advantage": {"discount": 0.8}},
    {"name": "reinforce_pp", "advantage": {"discount": 0.9, "whiten": False}},
    {"name": "turn_ppo", "advantage": {"whiten": False}},
    {"name": "ppo", "advantage": {"whiten": False, "discount": 0.95}, "gae": {"trace": 0.7, "critic_trace": 0.8}},
    {"name": "vapo", "advantage": {"whiten": False}},
]


def game(seed: int) -> tuple[Columns, list[int]]:
    """Two groups of three, in each of which every agent has turns, in any order; and the rows that one speaker after
    the other has."""
    draw = random.Random(seed)
    turn_lengths, trajectory_of_turn, agent_of_turn, rewards, keys = [], [], [], [], []
    for trajectory in range(6):
        order = [0, 1, 2, *(draw.randrange(3) for _ in range(draw.randrange(4)))]
        draw.shuffle(order)
        for agent in order:
            turn_lengths.append(draw.randrange(1, 4))
            trajectory_of_turn.append(trajectory)
            agent_of_turn.append(agent)
            rewards.append(draw.choice([0.0, 1.0, -1.0]))
            keys.append(draw.choice([-1, 10 * agent, 10 * agent + 1]))
    tokens = sum(turn_lengths)
    generator = torch.Generator().manual_seed(seed)

    def column() -> Tensor:  # [tokens]
        return -torch.rand(tokens, generator=generator, dtype=torch.float64)

    columns = Columns(
        log_prob=column(),
        log_behaviour=column(),
        version=torch.zeros(tokens, dtype=torch.int64),
        turn_of_token=torch.repeat_interleave(torch.arange(len(turn_lengths)), torch.tensor(turn_lengths)),
        trajectory_of_turn=torch.tensor(trajectory_of_turn),
        group_of_trajectory=torch.tensor([0, 0, 0, 1, 1, 1]),
        reward=torch.tensor([draw.choice([0.0, 1.0, 2.0]) for _ in range(6)], dtype=torch.float64),
        turn_reward=torch.tensor(rewards, dtype=torch.float64),
        state_key=torch.tensor(keys),
        truncated=torch.tensor([draw.random() < 0.5 for _ in range(6)]),
        current_version=1,
        value=column(),
        entropy=column(),
        prob_square_sum=column().abs(),
        agent_of_turn=torch.tensor(agent_of_turn),
        agents=AGENTS,
    )
    speaker = list(zip((t // 3 for t in trajectory_of_turn), agent_of_turn, trajectory_of_turn, strict=True))
    order = sorted(range(len(turn_lengths)), key=lambda turn: (speaker[turn], turn))
    return columns, order


def split(columns: Columns, order: list[int]) -> tuple[Columns, Tensor]:
    """One trajectory for each speaker, and the row in `columns` of each of its tokens."""
    assert columns.agent_of_turn is not None
    assert columns.value is not None
    turns = torch.tensor(order)
    speaker = list(zip(columns.trajectory_of_turn[turns].tolist(), columns.agent_of_turn[turns].tolist(), strict=True))
    distinct = list(dict.fromkeys(speaker))
    owner = torch.tensor([t for t, _ in distinct])
    group = {pair: i for i, pair in enumerate(dict.fromkeys((t // 3, a) for t, a in distinct))}
    rows = torch.cat([(columns.turn_of_token == u).nonzero().flatten() for u in order])
    position = torch.empty(len(order), dtype=torch.int64)
    position[turns] = torch.arange(len(order))
    made = Columns(
        log_prob=columns.log_prob[rows],
        log_behaviour=columns.log_behaviour[rows],
        version=columns.version[rows],
        turn_of_token=position[columns.turn_of_token[rows]],
        trajectory_of_turn=torch.tensor([distinct.index(pair) for pair in speaker]),
        group_of_trajectory=torch.tensor([group[t // 3, a] for t, a in distinct]),
        reward=columns.reward[owner],
        turn_reward=columns.turn_reward[turns],
        state_key=columns.state_key[turns],
        truncated=columns.truncated[owner],
        current_version=1,
        value=columns.value[rows],
        entropy=columns.entropy[rows] if columns.entropy is not None else None,
        prob_square_sum=columns.prob_square_sum[rows] if columns.prob_square_sum is not None else None,
    )
    return made, rows


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(map(str, r.values())))
@pytest.mark.parametrize("seed", range(4))
def test_credit_is_that_of_each_agents_turns_alone(recipe: dict[str, Any], seed: int) -> None:
    loaded = load_recipe(recipe)
    need = requirements(loaded)
    columns, order = game(seed)
    alone, rows = split(columns, order)
    found = advantage_of(tokens_of(columns, loaded, need), loaded, None)
    want = advantage_of(tokens_of(alone, loaded, need), loaded, None)
    torch.testing.assert_close(found.per_token[rows], want.per_token, rtol=1e-12, atol=1e-12)
    assert found.per_token.abs().max() > 0
    if want.returns is not None:
        assert found.returns is not None
        torch.testing.assert_close(found.returns.target[rows], want.returns.target, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.returns.trained[rows], want.returns.trained)


def test_what_one_player_wins_is_never_credited_to_the_other() -> None:
    """A game that white lost with its last move, and black won."""
    columns = Columns(
        log_prob=torch.full((4,), -1.0, dtype=torch.float64),
        log_behaviour=torch.full((4,), -1.0, dtype=torch.float64),
        version=torch.zeros(4, dtype=torch.int64),
        turn_of_token=torch.arange(4),
        trajectory_of_turn=torch.zeros(4, dtype=torch.int64),
        group_of_trajectory=torch.zeros(1, dtype=torch.int64),
        reward=torch.zeros(1, dtype=torch.float64),
        turn_reward=torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=torch.float64),
        state_key=torch.full((4,), -1),
        truncated=torch.zeros(1, dtype=torch.bool),
        current_version=0,
        agent_of_turn=torch.tensor([0, 1, 0, 1]),
        agents=("black", "white"),
    )
    recipe = load_recipe({"name": "turn_return", "advantage": {"baseline": "none", "scale": "none", "discount": 1.0}})
    found = advantage_of(tokens_of(columns, recipe, requirements(recipe)), recipe, None)
    assert found.per_token.tolist() == [1.0, -1.0, 1.0, -1.0]


def test_agents_that_never_share_a_trajectory_change_nothing() -> None:
    columns, _ = game(0)
    assert columns.agent_of_turn is not None
    loaded = load_recipe({"name": "turn_return"})
    one_each = replace(columns, agent_of_turn=columns.trajectory_of_turn % 3)
    plain = replace(columns, agent_of_turn=None, agents=("",))
    first, second = (tokens_of(c, loaded, requirements(loaded)) for c in (one_each, plain))
    assert first.speakers is None
    assert torch.equal(advantage_of(first, loaded, None).per_token, advantage_of(second, loaded, None).per_token)
