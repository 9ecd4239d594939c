"""Critics as networks: Q heads, distributions and target networks against loops written out in plain torch; frozen and
loaded ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support_ranks as support
import torch
from msgspec import structs
from support_run import quick_settings
from torch import Tensor, nn

from async_rl.config import CriticSettings, OptimizerSettings, Settings, UpdatesSettings
from async_rl.errors import UserError
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.objective.library import load_recipe
from async_rl.trainer.build import make_learner
from async_rl.trainer.checkpoint import save_checkpoint
from async_rl.trainer.critic import Critic
from async_rl.trainer.distribution import Distribution
from async_rl.trainer.forward import ModelArithmetic
from async_rl.trainer.learner import Learner, LearnerOptions
from async_rl.trainer.packing import pack_batch, pack_step
from async_rl.trajectory import Trajectory

ARITHMETIC = ModelArithmetic(temperature=0.9)
STILL = OptimizerSettings(learning_rate=0.0, warmup_steps=0)
"""the policy stays, so that only the critic is looked at"""
RATE = 1e-3
GAMMA = 0.9


def learner_with(recipe: dict[str, Any], settings: CriticSettings, *, turn_q: bool = False) -> Learner:
    policy = support.make_model(support.TIED, 1)
    critic = Critic(policy, settings, ARITHMETIC, turn_q=turn_q)
    for head in (critic.head, critic._slow_head):
        head.double()
    options = LearnerOptions(steps=10, optimizer=STILL, arithmetic=ARITHMETIC, updates=UpdatesSettings())
    return Learner(policy, load_recipe(recipe), options, critic=critic)


def batches() -> list[list[Trajectory]]:
    return [support.episodes((3, 2, 4), support.TIED, seed, prompt=4) for seed in range(2)]


def hidden_of(trunk: Decoder, trajectory: Trajectory) -> Tensor:  # [tokens, H]
    tokens = torch.from_numpy(trajectory.tokens.astype(np.int64))
    return trunk(tokens, torch.arange(len(tokens)), DocumentAttention([len(tokens)]))


def follow(slow: nn.Module, now: nn.Module, average: float) -> None:
    with torch.no_grad():
        for old, new in zip(slow.parameters(), now.parameters(), strict=True):
            old.copy_(average * old + (1 - average) * new)


def train(learner: Learner, settings: Settings, steps: Iterable[int]) -> list[Mapping[str, float]]:
    """On episodes of the first ten tokens."""

    def batch(seed: int) -> list[Trajectory]:
        made = support.episodes((4, 4), support.TIED, seed)
        return [structs.replace(t, tokens=t.tokens % 10) for t in made]

    return [learner.step(pack_step(settings, batch(step))).metrics for step in steps]


def test_q_heads_are_trained_as_published() -> None:
    """ArCHer: (Q_i - r - gamma V_i'(next))^2 and (V_i - Q_i')^2 of each turn, ' of the target network, two passes."""
    torch.manual_seed(0)
    settings = CriticSettings(kind="model", learning_rate=RATE, warmup_steps=0, epochs=2, target_average=0.8)
    learner = learner_with({"name": "archer"}, settings, turn_q=True)
    critic = learner.critic
    assert critic is not None
    trunk, head = support.make_model(support.TIED, 1), deepcopy(critic.head)
    slow_trunk, slow_head = deepcopy(trunk), deepcopy(head)
    optimizer = torch.optim.AdamW([*head.parameters(), *trunk.parameters()], lr=RATE, weight_decay=0.0)

    def turns(trunk: Decoder, head: nn.Linear, t: Trajectory) -> tuple[Tensor, Tensor]:  # [turns, 2] twice
        outputs = head(hidden_of(trunk, t))
        first = torch.tensor([turn.start - 1 for turn in t.turns])
        last = torch.tensor([turn.start + turn.length - 1 for turn in t.turns])
        return outputs[first, :2], outputs[last, 2:]

    for number, batch in enumerate(batches()):
        answers = [t for t in batch if t.num_policy_tokens]
        with torch.no_grad():
            known = [turns(slow_trunk, slow_head, t) for t in answers]
        for _ in range(2):
            losses: list[Tensor] = []
            for t, (slow_v, slow_q) in zip(answers, known, strict=True):
                value, q = turns(trunk, head, t)
                rewards = torch.tensor([[turn.reward] for turn in t.turns], dtype=torch.float64)
                rewards[-1] += t.reward
                following = torch.cat([slow_v[1:], torch.zeros(1, 2)])
                losses.append((0.5 * ((q - rewards - GAMMA * following) ** 2 + (value - slow_q) ** 2)).sum())
            optimizer.zero_grad()
            (sum(losses) / sum(len(t.turns) for t in answers)).backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_([*head.parameters(), *trunk.parameters()], 1.0)
            optimizer.step()
            follow(slow_trunk, trunk, 0.8)
            follow(slow_head, head, 0.8)
        learner.step(pack_batch(batch, micro_batch_tokens=60, shared=True))
        compare(critic, {"trunk": trunk, "head": head, "slow_trunk": slow_trunk, "slow_head": slow_head}, number)


@pytest.mark.parametrize("loss", ["two_hot", "hl_gauss"])
def test_a_distribution_is_trained_by_cross_entropy_towards_td_targets(loss: str) -> None:
    """TD(.5) targets of a target network, their distributions from the definition, tokens alike."""
    settings = CriticSettings(
        kind="model",
        learning_rate=RATE,
        warmup_steps=0,
        target_average=0.8,
        loss=loss,
        bins=5,
        low=-1.0,
        high=3.0,  # type: ignore[arg-type]
    )
    recipe = {"name": "ppo", "gae": {"critic_trace": 0.5, "value_clip": 0.0}, "advantage": {"discount": GAMMA}}
    learner = learner_with(recipe, settings)
    critic = learner.critic
    assert critic is not None
    trunk, head = support.make_model(support.TIED, 1), deepcopy(critic.head)
    slow_trunk, slow_head = deepcopy(trunk), deepcopy(head)
    optimizer = torch.optim.AdamW([*head.parameters(), *trunk.parameters()], lr=RATE, weight_decay=0.0)
    width = 4.0 / 5
    centres = [-1.0 + i for i in range(5)] if loss == "two_hot" else [-1.0 + width * (i + 0.5) for i in range(5)]

    def logits(trunk: Decoder, head: nn.Linear, t: Trajectory) -> Tensor:  # [policy tokens, 5]
        return head(hidden_of(trunk, t)[torch.from_numpy(t.policy_positions() - 1)])

    for number, batch in enumerate(batches()):
        answers = [t for t in batch if t.num_policy_tokens]
        losses: list[Tensor] = []
        for t in answers:
            with torch.no_grad():
                probabilities = torch.softmax(logits(slow_trunk, slow_head, t), 1).tolist()
            value = [sum(p * c for p, c in zip(row, centres, strict=True)) for row in probabilities]
            target = td_targets(t, value)
            wanted = torch.tensor([spread_of(loss, y, centres, width) for y in target], dtype=torch.float64)
            losses.append(-(wanted * torch.log_softmax(logits(trunk, head, t), 1)).sum())
        optimizer.zero_grad()
        (sum(losses) / sum(t.num_policy_tokens for t in answers)).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_([*head.parameters(), *trunk.parameters()], 1.0)
        optimizer.step()
        follow(slow_trunk, trunk, 0.8)
        follow(slow_head, head, 0.8)
        learner.step(pack_batch(batch, micro_batch_tokens=60, shared=True))
        compare(critic, {"trunk": trunk, "head": head, "slow_trunk": slow_trunk, "slow_head": slow_head}, number)


def td_targets(t: Trajectory, value: Sequence[float]) -> list[float]:
    reward, at = [0.0] * len(value), 0
    for turn in t.turns:
        at += turn.length
        reward[at - 1] += turn.reward
    reward[-1] += t.reward
    total, following, found = 0.0, 0.0, []
    for r, v in zip(reversed(reward), reversed(value), strict=True):
        total = r + GAMMA * following - v + GAMMA * 0.5 * total
        following = v
        found.append(total + v)
    return found[::-1]


def spread_of(loss: str, target: float, centres: Sequence[float], width: float) -> list[float]:
    target = min(max(target, -1.0), 3.0)
    if loss == "two_hot":
        return [max(0.0, 1 - abs(target - c)) for c in centres]

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - target) / (0.75 * width) / math.sqrt(2)))

    mass = [below(c + width / 2) - below(c - width / 2) for c in centres]
    return [m / sum(mass) for m in mass]


def compare(critic: Critic, wanted: dict[str, nn.Module], number: int) -> None:
    found = critic.state_dict()
    for network, module in wanted.items():
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(
                found[f"{network}.{name}"],
                parameter.detach(),
                rtol=0,
                atol=1e-9,
                msg=f"step {number}: {network}.{name}",
            )


def test_a_distribution_has_its_target_as_mean_and_its_critic_finds_the_mean_of_what_it_sees() -> None:
    two_hot = Distribution(kind="two_hot", bins=11, low=-1.0, high=1.0)
    target = torch.linspace(-1.0, 1.0, 57, dtype=torch.float64)
    spread = two_hot.spread(target)
    torch.testing.assert_close((spread * two_hot.centres(target)).sum(1), target)
    gauss = Distribution(kind="hl_gauss", bins=101, low=-1.0, high=1.0)
    inner = target[(target.abs() < 0.9)]
    torch.testing.assert_close((gauss.spread(inner) * gauss.centres(inner)).sum(1), inner, rtol=0, atol=1e-6)
    for one in (two_hot, gauss):
        torch.testing.assert_close(one.spread(target).sum(1), torch.ones_like(target))
        assert one.outside(torch.tensor([-2.0, 0.0, 0.5, 1.5])) == 0.5
    seen = torch.tensor([0.0, 1.0, 1.0, -0.5], dtype=torch.float64)
    wanted = two_hot.spread(seen).mean(0)
    best = wanted.clamp(min=1e-12).log()  # the minimiser of the mean cross-entropy
    assert float(two_hot.mean(best[None])) == pytest.approx(float(seen.mean()))


@pytest.mark.parametrize(("kind", "loss"), [("head", "squared"), ("model", "two_hot"), ("head", "hl_gauss")])
def test_a_critic_learns_returns_with_a_target_network(kind: str, loss: str, tiny_model: Path) -> None:
    words = ["critic.target_average=0.5", f"critic.kind={kind}", f"critic.loss={loss}", "critic.epochs=2"]
    words += ["critic.low=0", "critic.high=2"] if loss != "squared" else []
    settings = quick_settings(
        tiny_model, "recipe=ppo", "recipe.gae.critic_trace=0.9", "recipe.gae.value_clip=0", "critic.warmup_steps=100",
        "critic.learning_rate=0.02", *words,
    )  # fmt: skip
    learner = make_learner(settings)
    rows = train(learner, settings, [0] * 15)
    assert rows[-1]["value/explained_variance"] > 0.3


def test_a_frozen_critic_stays_what_a_checkpoint_has(tiny_model: Path, tmp_path: Path) -> None:
    learnt = quick_settings(tiny_model, "recipe=ppo", "critic.kind=model", "critic.warmup_steps=3")
    first = make_learner(learnt)
    train(first, learnt, range(3))
    path = save_checkpoint(tmp_path, first, {}, source=tiny_model, keep=1)
    words = ("recipe=ppo", "critic.kind=model", "critic.warmup_steps=0", f"critic.path={path}")
    settings = quick_settings(tiny_model, *words, "critic.learning_rate=0")
    learner = make_learner(settings)
    before = deepcopy(learner.critic.state_dict()) if learner.critic is not None else {}
    assert first.critic is not None
    assert any(float(tensor.abs().max()) > 0 for name, tensor in before.items() if name.startswith("head"))
    train(learner, settings, range(3))
    for name, tensor in first.critic.state_dict().items():
        assert learner.critic is not None
        assert torch.equal(learner.critic.state_dict()[name], tensor), name
    goes_on = make_learner(quick_settings(tiny_model, *words, "critic.target_average=0.9"))
    assert goes_on.critic is not None
    torch.testing.assert_close(goes_on.critic.state_dict()["slow_head.weight"], before["head.weight"])
    with pytest.raises(UserError, match=r"critic\.path: .* holds no critic of this kind"):
        make_learner(quick_settings(tiny_model, *words, "critic.loss=two_hot", "recipe.gae.value_clip=0"))
    with pytest.raises(UserError, match=r"critic\.path: .* holds no critic"):
        make_learner(quick_settings(tiny_model, "recipe=ppo", f"critic.path={tiny_model}"))
