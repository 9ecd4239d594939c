"""Passes and minibatches of a batch: the loop of PPO as it is published, written out in plain torch, gives the same
weights; a bound on the KL ends a step; turns in order; a reference that follows the policy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import support_ranks as support
import torch
from support_definition import alone
from torch import Tensor, nn

from async_rl.config import CriticSettings, OptimizerSettings, ReferenceSettings, UpdatesSettings
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import ModelArithmetic
from async_rl.trainer.learner import Learner, LearnerOptions, StepReport
from async_rl.trainer.packing import pack_batch
from async_rl.trainer.updates import partition
from async_rl.trajectory import Trajectory

GROUPS = (4, 3, 2, 5, 2)
SEED = 7
ARITHMETIC = ModelArithmetic(temperature=0.8)  # that of support_definition.alone
RATES = OptimizerSettings(learning_rate=2e-3, warmup_steps=0, clip_norm=0.7, weight_decay=0.01, epsilon=1e-4)
CRITIC = CriticSettings(kind="model", learning_rate=1e-3, warmup_steps=0)
PPO = {
    "name": "ppo",
    "trust": {"rule": "ppo", "dual_clip": 0.0},
    "gae": {"trace": 0.9, "critic_trace": 0.8, "value_clip": 0.2},
    "advantage": {"discount": 0.97},
}


def model_of(seed: int) -> Decoder:
    return support.make_model(support.TIED, seed)


def make(recipe: dict[str, Any], updates: UpdatesSettings, **options: Any) -> Learner:
    loaded = load_recipe(recipe)
    needs, model = requirements(loaded), model_of(1)
    critic = None
    if needs.value:
        critic = Critic(model, options.pop("critic", CRITIC), ARITHMETIC)
        critic.head.double()
    chosen = {"optimizer": RATES, **options}
    made = LearnerOptions(steps=10, arithmetic=ARITHMETIC, updates=updates, seed=SEED, **chosen)
    return Learner(model, loaded, made, critic=critic, reference=model_of(2) if needs.reference else None)


def batch_of(step: int) -> list[Trajectory]:
    return support.episodes(GROUPS, support.TIED, step)


def train(learner: Learner, steps: int = 2, micro_batch_tokens: int = 10_000) -> list[StepReport]:
    return [learner.step(pack_batch(batch_of(n), micro_batch_tokens=micro_batch_tokens)) for n in range(steps)]


# ------------------------------------------------------------------ the loop of PPO, written out


@dataclass
class PlainPpo:
    """Schulman et al. 2017, Algorithm 1, with the details of PPO2: advantages of the critic at the start, whitened in
    the minibatch, a clipped value loss, Adam for each network, gradients clipped by their norm. No code is shared with
    the product but the models and `partition`."""

    policy: Decoder
    critic: Decoder
    head: nn.Linear
    updates: UpdatesSettings
    stops: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        matrices = [p for p in self.policy.parameters() if p.ndim >= 2]
        vectors = [p for p in self.policy.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.of_policy = torch.optim.AdamW(groups, lr=2e-3, betas=(RATES.beta1, RATES.beta2), eps=1e-4)
        values = [*self.head.parameters(), *self.critic.parameters()]
        self.of_critic = torch.optim.AdamW(values, lr=1e-3, weight_decay=0.0)

    def values(self, trajectory: Trajectory) -> Tensor:  # [policy tokens]
        tokens = torch.from_numpy(trajectory.tokens.astype(np.int64))
        hidden = self.critic(tokens, torch.arange(len(tokens)), DocumentAttention([len(tokens)]))
        return self.head(hidden[torch.from_numpy(trajectory.policy_positions() - 1)]).squeeze(-1)

    def advantages(self, trajectory: Trajectory) -> tuple[Tensor, Tensor, Tensor]:
        """Advantage, target of the critic, value, of each policy token, by the recursion."""
        with torch.no_grad():
            value = self.values(trajectory)
        reward = [0.0] * len(value)
        at = 0
        for turn in trajectory.turns:
            at += turn.length
            reward[at - 1] += turn.reward
        reward[-1] += trajectory.reward
        found = []
        for trace in (0.9, 0.8):
            following, total, column = 0.0, 0.0, []
            for r, v in zip(reversed(reward), reversed(value.tolist()), strict=True):
                total = r + 0.97 * following - v + 0.97 * trace * total
                following = v
                column.append(total)
            found.append(torch.tensor(column[::-1], dtype=torch.float64))
        return found[0], found[1] + value, value

    def step(self, batch: list[Trajectory], number: int) -> None:
        groups = sorted({t.group for t in batch})
        ordered = [t for t in sorted(batch, key=lambda t: (t.group, t.sample)) if t.num_policy_tokens]
        known = {id(t): self.advantages(t) for t in ordered}
        for epoch in range(self.updates.epochs):
            for part in partition(len(groups), self.updates.minibatches, key=(SEED, number, epoch)):
                chosen = [t for t in ordered if groups.index(t.group) in part]
                self.update(chosen, [known[id(t)] for t in chosen])

    def update(self, chosen: list[Trajectory], known: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        advantage, target, before = (torch.cat([one[i] for one in known]) for i in range(3))
        value = torch.cat([self.values(t) for t in chosen])
        bounded = before + (value - before).clamp(-0.2, 0.2)
        loss = 0.5 * torch.maximum((value - target) ** 2, (bounded - target) ** 2).mean()
        self.of_critic.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*self.head.parameters(), *self.critic.parameters()], 1.0, norm_type=2.0)
        self.of_critic.step()

        white = (advantage - advantage.mean()) / (advantage.std(correction=1) + 1e-8)
        behaviour = torch.cat([torch.from_numpy(t.log_behaviour[t.policy_positions()]) for t in chosen]).double()
        ratio = (torch.cat([alone(self.policy, t) for t in chosen]) - behaviour).exp()
        loss = -torch.minimum(ratio * white, ratio.clamp(0.8, 1.2) * white).mean()
        self.of_policy.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.policy.parameters()), 0.7)
        self.of_policy.step()


@pytest.mark.parametrize("updates", [UpdatesSettings(epochs=3, minibatches=2), UpdatesSettings(epochs=2)])
def test_ppo_is_the_published_loop(updates: UpdatesSettings) -> None:
    learner = make(PPO, updates)
    assert learner.critic is not None
    plain = PlainPpo(policy=model_of(1), critic=model_of(1), head=deepcopy(learner.critic.head), updates=updates)
    for number in range(2):
        report = learner.step(pack_batch(batch_of(number), micro_batch_tokens=60, shared=True))
        assert report.metrics["updates/done"] == updates.epochs * updates.minibatches
        plain.step(batch_of(number), number)
    for name, parameter in plain.policy.named_parameters():
        torch.testing.assert_close(learner.weights()[name], parameter.detach(), rtol=0, atol=1e-9, msg=name)
    own = learner.critic.named_parameters()
    for name, parameter in plain.critic.named_parameters():
        torch.testing.assert_close(own[f"trunk.{name}"].detach(), parameter.detach(), rtol=0, atol=1e-9, msg=name)
    torch.testing.assert_close(learner.critic.head.weight.detach(), plain.head.weight.detach(), rtol=0, atol=1e-9)


# ------------------------------------------------------------------ minibatches


def test_a_pass_takes_every_group_once_in_parts_as_equal_as_can_be() -> None:
    for groups, parts in ((10, 3), (4, 4), (3, 5), (7, 1)):
        found = partition(groups, parts, key=(1, 2, 3))
        assert sorted(g for part in found for g in part) == list(range(groups))
        assert max(map(len, found)) - min(map(len, found)) <= 1
        assert len(found) == min(groups, parts)
    every = {tuple(map(tuple, partition(8, 2, key=(0, step, epoch)))) for step in range(5) for epoch in range(3)}
    assert len(every) == 15, "each pass of each step has its own"


@pytest.mark.parametrize("recipe", [{"name": "vcpo"}, {"name": "ppo"}, {"name": "gspo", "entropy": 0.01}], ids=str)
def test_minibatches_do_not_depend_on_how_they_are_cut(recipe: dict[str, Any]) -> None:
    plan = UpdatesSettings(epochs=2, minibatches=2)
    one, other = make(recipe, plan), make(recipe, plan)
    for n in range(2):
        one.step(pack_batch(batch_of(n), micro_batch_tokens=10_000))
        other.step(pack_batch(batch_of(n), micro_batch_tokens=30, shared=True))
    for name, tensor in one.weights().items():
        torch.testing.assert_close(other.weights()[name], tensor, rtol=0, atol=1e-9, msg=name)


def test_a_minibatch_without_signal_is_left_out_and_the_others_count() -> None:
    trajectories = [t for t in batch_of(0) if t.group in (0, 3)]
    equal = [replace_reward(t) if t.group == 0 else t for t in trajectories]
    learner = make({"name": "grpo"}, UpdatesSettings(minibatches=2))
    report = learner.step(pack_batch(equal, micro_batch_tokens=10_000))
    assert not report.skipped
    assert report.metrics["updates/done"] == 1
    assert report.metrics["updates/left_out"] == 1
    whole = make({"name": "grpo"}, UpdatesSettings())
    whole.step(pack_batch([t for t in trajectories if t.group == 3], micro_batch_tokens=10_000))
    for name, tensor in whole.weights().items():
        torch.testing.assert_close(learner.weights()[name], tensor, rtol=0, atol=1e-12, msg=name)


def test_a_batch_without_signal_changes_nothing_however_many_passes() -> None:
    learner = make({"name": "grpo"}, UpdatesSettings(minibatches=2, epochs=5))
    before = {name: tensor.clone() for name, tensor in learner.weights().items()}
    report = learner.step(pack_batch([replace_reward(t) for t in batch_of(0)], micro_batch_tokens=10_000))
    assert "equal rewards" in report.skipped
    assert report.metrics["updates/left_out"] == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.weights().items())


def replace_reward(trajectory: Trajectory) -> Trajectory:
    from msgspec.structs import replace as changed

    return changed(trajectory, reward=1.0)


# ------------------------------------------------------------------ the bound on the KL


@pytest.mark.parametrize("target", ["start", "behaviour"])
def test_a_step_ends_when_the_policy_has_moved_too_far(target: str) -> None:
    def trained(kl_stop: float, epochs: int) -> tuple[Learner, StepReport]:
        chosen = target if kl_stop else "start"
        plan = UpdatesSettings(epochs=epochs, minibatches=2, kl_stop=kl_stop, kl_target=chosen)  # type: ignore[arg-type]
        learner = make({"name": "grpo"}, plan)
        return learner, train(learner, 1)[0]

    _, free = trained(1e9, 4)
    assert free.metrics["updates/done"] == 8
    bound = 0.3 * free.metrics["updates/kl"]
    stopped, report = trained(bound, 4)
    done = int(report.metrics["updates/done"])
    assert 1 <= done < 8
    assert report.metrics["updates/kl"] > bound
    assert "above updates.kl_stop" in report.stopped
    assert not report.skipped
    again, repeated = trained(bound, 4)
    assert repeated.metrics == report.metrics
    assert all(torch.equal(a, b) for a, b in zip(stopped.weights().values(), again.weights().values(), strict=True))
    _, first = trained(1e-12, 4)
    assert first.metrics["updates/done"] == 1, "the first update is always taken"


def test_the_kl_is_that_of_the_tokens_about_to_be_trained() -> None:
    learner = make({"name": "grpo"}, UpdatesSettings(epochs=2, kl_stop=1e9))
    report = train(learner, 1)[0]
    once = make({"name": "grpo"}, UpdatesSettings())
    train(once, 1)
    now, start = (torch.cat([alone(m, t) for t in ordered()]).detach() for m in (once.model, model_of(1)))
    x = now - start
    assert report.metrics["updates/kl"] == pytest.approx(float((x.exp() - 1 - x).mean()), rel=1e-9)


def ordered() -> Iterator[Trajectory]:
    return (t for t in sorted(batch_of(0), key=lambda t: (t.group, t.sample)) if t.num_policy_tokens)


def adamw(policy: nn.Module) -> torch.optim.AdamW:
    """Torch's own, with the settings that `make` gives."""
    groups = [
        {"params": [p for p in policy.parameters() if (p.ndim >= 2) == m], "weight_decay": 0.01 * m}
        for m in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=2e-3, betas=(RATES.beta1, RATES.beta2), eps=1e-4)


def answers_of_the_batch() -> tuple[dict[int, list[float]], list[Trajectory]]:
    """The rewards of each group, and the trajectories with policy tokens in order."""
    batch = sorted(batch_of(0), key=lambda t: (t.group, t.sample))
    rewards: dict[int, list[float]] = {}
    for t in batch:
        rewards.setdefault(t.group, []).append(t.reward)
    return rewards, [t for t in batch if t.num_policy_tokens]


# ------------------------------------------------------------------ turns in order


@pytest.mark.parametrize("order", ["last_first", "first_first"])
def test_turns_are_updated_one_after_another_with_the_ratios_of_those_before(order: str) -> None:
    """Each pass: -mean over answers and turns of min(r A M, clip(r) A M) on its turn alone, r its product of ratios, M
    the product of those of the turns already updated, A the group's."""
    trust = {"rule": "ppo", "clip_low": 0.3, "clip_high": 0.3}
    recipe = {"name": "see_upo", "turn_order": order, "kl": {"coefficient": 0.0}, "trust": trust}
    learner = make(recipe, UpdatesSettings(epochs=2))
    report = train(learner, 1)[0]
    assert report.metrics["updates/done"] == 4
    policy = model_of(1)
    optimizer, (rewards, answers) = adamw(policy), answers_of_the_batch()
    for _ in range(2):
        for turn_pass in range(2):
            losses = []
            for t in answers:
                same = rewards[t.group]
                advantage = (t.reward - np.mean(same)) / (np.std(same, ddof=1) + 1e-6)
                log_ratio = alone(policy, t) - torch.from_numpy(t.log_behaviour[t.policy_positions()]).double()
                per_turn = log_ratio.split([turn.length for turn in t.turns])
                per_turn = per_turn if order == "first_first" else per_turn[::-1]
                weight = advantage * math.exp(sum(float(part.detach().sum()) for part in per_turn[:turn_pass]))
                mine = per_turn[turn_pass]
                ratio = mine.sum().exp()
                least = torch.minimum(ratio * weight, ratio.clamp(0.7, 1.3) * weight)
                losses.append(-least / len(t.turns))
            optimizer.zero_grad()
            (sum(losses) / len(answers)).backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(list(policy.parameters()), 0.7)
            optimizer.step()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(learner.weights()[name], parameter.detach(), rtol=0, atol=1e-9, msg=name)


# ------------------------------------------------------------------ tokens in order


@pytest.mark.parametrize("order", ["improbable_first", "probable_first"])
def test_improbable_tokens_are_updated_in_a_pass_of_their_own(order: str) -> None:
    """AR-Lopti: -mean over all tokens of min(r A, clip(r) A), A damped by the policy's probability, with the advantages
    of one part of the tokens set to 0 in each of two updates."""
    at = 0.1  # the model of the test is unsure of everything
    recipe = {"name": "ar_lopti", "token_order": order, "token_order_at": at, "kl": {"coefficient": 0.0}}
    learner = make(recipe, UpdatesSettings())
    report = train(learner, 1)[0]
    assert report.metrics["updates/done"] == 2
    policy = model_of(1)
    optimizer, (rewards, answers) = adamw(policy), answers_of_the_batch()
    both = [0, 0]
    for number in range(2):
        losses = []
        for t in answers:
            same = rewards[t.group]
            advantage = (t.reward - np.mean(same)) / (np.std(same, ddof=1) + 1e-6)
            log_behaviour = torch.from_numpy(t.log_behaviour[t.policy_positions()]).double()
            log_prob = alone(policy, t)
            damped = advantage * (0.7 + 0.3 * log_prob.detach().exp())
            now = (log_behaviour.exp() < at) == ((number == 0) == (order == "improbable_first"))
            both[number] += int(now.sum())
            weight = torch.where(now, damped, 0.0)
            ratio = (log_prob - log_behaviour).exp()
            least = torch.minimum(ratio * weight, ratio.clamp(0.8, 1.24) * weight)
            losses.append(-torch.where(weight < 0, torch.maximum(least, 10.0 * weight), least))
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        nn.utils.clip_grad_norm_(list(policy.parameters()), 0.7)
        optimizer.step()
    assert min(both) > 5, both
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(learner.weights()[name], parameter.detach(), rtol=0, atol=1e-9, msg=name)


# ------------------------------------------------------------------ the reference


@pytest.mark.parametrize("moves", [ReferenceSettings(every=2), ReferenceSettings(average=0.75)], ids=str)
def test_the_reference_follows_the_policy(moves: ReferenceSettings) -> None:
    learner = make({"name": "dr_grpo", "kl": {"coefficient": 0.1}}, UpdatesSettings(), reference=moves)
    wanted = {name: tensor.detach().clone() for name, tensor in model_of(2).named_parameters()}
    for number in range(5):
        learner.step(pack_batch(batch_of(number), micro_batch_tokens=10_000))
        for name, tensor in learner.weights().items():
            if moves.average:
                wanted[name] = 0.75 * wanted[name] + 0.25 * tensor
            elif (number + 1) % 2 == 0:
                wanted[name] = tensor.clone()
        assert isinstance(learner.reference, nn.Module)
        for name, tensor in learner.reference.named_parameters():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-12, msg=name)
    assert replace(moves) == learner.options.reference
