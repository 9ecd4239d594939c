"""Episodes in pieces at the trainer: the critic learns whole episodes when they are over, the policy each piece."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import support_ranks as support
import torch
from msgspec import structs
from torch import Tensor, nn

from async_rl.config import CriticSettings, OptimizerSettings, UpdatesSettings
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import ModelArithmetic
from async_rl.trainer.learner import Learner, LearnerOptions
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trajectory import Trajectory
from async_rl.trajectory.given import GIVEN, Given, given_in

GAMMA, RATE = 0.9, 1e-3
ARITHMETIC = ModelArithmetic(temperature=0.9)
STILL = OptimizerSettings(learning_rate=0.0, warmup_steps=0)
"""the policy stays, so that only the critic is looked at"""
RECIPE: dict[str, Any] = {"name": "t_ppo", "advantage": {"discount": GAMMA}}


def learner_with(settings: CriticSettings) -> Learner:
    policy = support.make_model(support.TIED, 1)
    critic = Critic(policy, settings, ARITHMETIC)
    critic.head.double()
    options = LearnerOptions(steps=10, optimizer=STILL, arithmetic=ARITHMETIC, updates=UpdatesSettings())
    return Learner(policy, load_recipe(RECIPE), options, critic=critic)


def hidden_of(trunk: Decoder, trajectory: Trajectory) -> Tensor:  # [tokens, H]
    tokens = torch.from_numpy(trajectory.tokens.astype(np.int64))
    return trunk(tokens, torch.arange(len(tokens)), DocumentAttention([len(tokens)]))


def pieces(seed: int) -> list[Trajectory]:
    """Episodes whose first turn is an earlier piece's, one of them cut again, and some that began in this piece."""
    made = support.episodes((1, 1, 1, 1, 1, 1), support.TIED, seed, prompt=4)
    found = []
    for number, t in enumerate(made):
        first = t.turns[0]
        if number < 4:
            keep = t.log_behaviour.copy()
            keep[first.start : first.start + first.length] = 0
            given = Given(stretches=((first.start, first.length),)).write()
            t = structs.replace(t, turns=t.turns[1:], log_behaviour=keep, info={GIVEN: given})
        if number in (3, 5):
            t = structs.replace(t, ended="window", reward=0.0, turns=(structs.replace(t.turns[-1], reward=0.0),))
        found.append(t)
    return found


def packed(batch: list[Trajectory], **more: Any) -> PackedBatch:
    needs = requirements(load_recipe(RECIPE))
    return pack_batch(batch, micro_batch_tokens=60, shared=True, needs=needs, **more)


def test_the_critic_learns_returns_on_the_tokens_of_all_pieces_of_what_is_over() -> None:
    torch.manual_seed(0)
    learner = learner_with(CriticSettings(kind="model", learning_rate=RATE, warmup_steps=0))
    critic = learner.critic
    assert critic is not None
    trunk, head = support.make_model(support.TIED, 1), deepcopy(critic.head)
    optimizer = torch.optim.AdamW([*head.parameters(), *trunk.parameters()], lr=RATE, weight_decay=0.0)
    for seed in range(3):
        batch = pieces(seed)
        losses: list[Tensor] = []
        for t in (t for t in batch if t.ended != "window"):
            given = given_in(t)
            stretches = [] if given is None else list(given.stretches)
            places = [p for start, length in stretches for p in range(start, start + length)]
            earlier = len(places)
            places += t.policy_positions().tolist()
            rewards, at = [0.0] * len(places), earlier
            for turn in t.turns:
                at += turn.length
                rewards[at - 1] += turn.reward
            rewards[-1] += t.reward
            returns, ahead = [], 0.0
            for reward in reversed(rewards):
                ahead = reward + GAMMA * ahead
                returns.append(ahead)
            value = head(hidden_of(trunk, t)[torch.tensor(places) - 1]).squeeze(-1)
            losses.append(0.5 * (value - torch.tensor(returns[::-1], dtype=torch.float64)).square())
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        nn.utils.clip_grad_norm_([*head.parameters(), *trunk.parameters()], 1.0)
        optimizer.step()
        report = learner.step(packed(batch))
        assert 0.2 < report.metrics["critic/earlier"] < 0.9
        for name, module in {"trunk": trunk, "head": head}.items():
            same(module, critic.state_dict(), name)


def same(module: nn.Module, found: dict[str, Tensor], path: str) -> None:
    for name, parameter in module.named_parameters():
        if name == "lm_head.weight":
            continue
        torch.testing.assert_close(found[f"{path}.{name}"], parameter.detach(), rtol=0, atol=1e-9)


def test_only_what_a_piece_sampled_is_trained() -> None:
    batch = pieces(1)
    whole = packed(batch)
    assert whole.num_policy_tokens == sum(t.num_policy_tokens for t in batch)
    assert whole.cut is not None
    assert whole.cut.tolist() == [t.ended == "window" for t in batch]
    assert whole.earlier is not None
    over = [t for t in batch if t.ended != "window" and given_in(t) is not None]
    given = [found.stretches[0][1] for t in over if (found := given_in(t)) is not None]
    assert whole.earlier.distance.tolist() == [d for length in given for d in range(length, 0, -1)]
    # a minibatch has what its own groups need
    assert whole.part is not None
    part = whole.part([0, 3])
    assert part.earlier is not None
    assert len(part.earlier.distance) == given[0]
    assert part.earlier.first.max() == 0


@pytest.mark.parametrize("loss", ["two_hot", "hl_gauss"])
def test_a_critic_that_is_a_distribution_learns_them_too(loss: str) -> None:
    settings = CriticSettings(
        kind="model", learning_rate=RATE, warmup_steps=0, loss=loss, bins=5, low=-1.0, high=3.0,  # type: ignore[arg-type]
    )  # fmt: skip
    with_earlier, without = learner_with(settings), learner_with(settings)
    batch = pieces(0)
    with_earlier.step(packed(batch))
    without.step(pack_batch(batch, micro_batch_tokens=60, shared=True))
    assert with_earlier.critic is not None
    assert without.critic is not None
    a, b = with_earlier.critic.state_dict(), without.critic.state_dict()
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_pieces_are_the_same_however_they_are_packed() -> None:
    batch = pieces(2)
    found = []
    for tokens in (25, 10_000):
        learner = learner_with(CriticSettings(kind="model", learning_rate=RATE, warmup_steps=0))
        needs = requirements(load_recipe(RECIPE))
        learner.step(pack_batch(list(np.random.default_rng(tokens).permutation(np.array(batch, object))),
                                micro_batch_tokens=tokens, needs=needs))  # fmt: skip
        assert learner.critic is not None
        found.append(learner.critic.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=1e-9)
