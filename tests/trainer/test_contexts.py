"""Trajectories of several contexts, agents and temperatures: each context is a document of its own, each turn has the
logits of its own temperature, and the trajectory stays one row of everything.

The definition here is a loop: every context alone through the model in float64, its logits divided by the temperature
of the turn, autograd for one trajectory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from support_definition import (
    ARITHMETIC,
    CONFIGS,
    TEMPERATURE,
    VOCABULARY,
    alone,
    each_gradient,
    make_learner,
    sample_model,
    some_weights,
)
from support_run import quick_settings
from torch import Tensor, nn

from async_rl.config import CriticSettings
from async_rl.model.attention import DocumentAttention
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import batch_log_probs
from async_rl.trainer.packing import pack_batch, pack_step
from async_rl.trainer.shares import Cost, Spread
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.types import GREEDY

# contexts of (prompt, turns of (policy tokens, environment tokens, agent, temperature)); groups of three
SHAPES: list[list[tuple[int, list[tuple[int, int, str, float]]]]] = [
    [(4, [(5, 0, "a", 0.0)]), (2, [(3, 1, "b", 0.3), (2, 0, "b", 1.7)]), (1, [(1, 0, "a", 0.0)])],
    [(6, [(3, 2, "a", 0.0), (4, 1, "b", 0.0)])],
    [(3, [(0, 0, "a", 0.0)]), (9, []), (2, [(12, 3, "b", 2.0), (2, 0, "a", 0.5)])],
    [(5, [(1, 4, "", 0.5)]), (3, [(0, 0, "", 0.0)])],
    [(7, [(20, 0, "", 0.0)])],
    [(1, [(2, 1, "", 0.0), (2, 1, "", 0.0)]), (8, [(1, 0, "", 0.9)])],
    [(2, []), (3, [])],
    [(1, [(4, 0, "", 0.0)]), (1, [(4, 0, "", 0.0)]), (1, [(4, 0, "", 0.0)])],
    [(3, [(6, 0, "", 4.0)])],
]


def made(number: int, shape: Sequence[tuple[int, list[tuple[int, int, str, float]]]]) -> Trajectory:
    random = np.random.default_rng(number)
    position, turns, contexts = 0, [], []
    for prompt, said in shape:
        contexts.append(position)
        position += prompt
        for length, environment, agent, temperature in said:
            turns.append(Turn(start=position, length=length, agent=agent, temperature=temperature, reward=0.25))
            position += length + environment
    trajectory = Trajectory(
        group=number // 3, sample=number % 3, problem=0, split="train", seed=0,
        tokens=random.integers(0, VOCABULARY, position).astype(np.int32),
        log_behaviour=np.full(position, -2.0, np.float32), turns=tuple(turns),
        versions=(VersionSpan(version=0, start=0, end=position),), reward=float(random.integers(0, 3)),
        ended="finished", temperature=TEMPERATURE, contexts=tuple(contexts[1:]),
    )  # fmt: skip
    assert trajectory.check() is None
    return trajectory


def batch_of() -> list[Trajectory]:
    return [made(number, shape) for number, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 40, 1])
def test_log_probs_are_those_of_each_context_alone_at_each_turns_temperature(micro_batch_tokens: int) -> None:
    model = sample_model()
    packed = pack_batch(batch_of(), micro_batch_tokens=micro_batch_tokens)
    with torch.no_grad():
        want = torch.cat([alone(model, t) for t in batch_of()])
    found = batch_log_probs(model, packed, ARITHMETIC).log_prob
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    assert packed.num_contexts == sum(map(len, SHAPES))
    assert packed.agents == ("", "a", "b")
    assert [packed.agents[i] for i in packed.agent_of_turn] == [turn.agent for t in batch_of() for turn in t.turns]
    for micro in packed.micro_batches:
        assert len(micro.lengths) == len(micro.policy_lengths) == micro.trajectories.stop - micro.trajectories.start


@pytest.mark.parametrize("name", ["qwen3 tied", "llama with every bias", "qwen3 untied"])
@pytest.mark.parametrize("micro_batch_tokens", [10_000, 40, 1])
def test_exact_norms_and_gradient_are_those_of_whole_trajectories(name: str, micro_batch_tokens: int) -> None:
    model, trajectories = sample_model(CONFIGS[name]), batch_of()
    packed = pack_batch(trajectories, micro_batch_tokens=micro_batch_tokens)
    weights = some_weights(packed)
    each = each_gradient(model, trajectories, weights)
    want_norms = torch.stack([torch.stack([g.square().sum() for g in parts]).sum() for parts in each])

    def baselines(norms: Tensor) -> Tensor:  # [I] -> [G]: sum n R / sum n
        group = packed.group_of_trajectory
        top = torch.zeros(3, dtype=torch.float64).index_add(0, group, norms * packed.reward)
        return top / torch.zeros(3, dtype=torch.float64).index_add(0, group, norms).clamp(min=1e-300)

    owner = packed.trajectory_of_turn[packed.turn_of_token]
    policy = packed.reward[owner].double() * weights
    norms = TrajectoryGradient(model, ARITHMETIC).add(packed, policy, weights, baselines)
    assert torch.allclose(norms, want_norms, rtol=1e-9, atol=1e-14)
    multipliers = packed.reward.double() - baselines(want_norms)[packed.group_of_trajectory]
    want = [
        sum((m * g for m, g in zip(multipliers, some, strict=True)), torch.zeros(()))
        for some in zip(*each, strict=True)
    ]
    got = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    for found, wanted in zip(got, want, strict=True):
        assert float((found - wanted).norm()) <= 1e-9 * float(wanted.norm())


@pytest.mark.parametrize("recipe", ["vcpo", "grpo", "gspo", "so_grpo"])
@pytest.mark.parametrize("micro_batch_tokens", [10_000, 40])
def test_the_gradient_of_a_step_is_the_loop_over_its_coefficients(recipe: str, micro_batch_tokens: int) -> None:
    model, trajectories = sample_model(), batch_of()
    learner = make_learner(model, recipe)
    packed = pack_batch(trajectories, micro_batch_tokens=micro_batch_tokens)
    look = learner.preview(packed)
    assert not look.skipped
    each = each_gradient(model, trajectories, look.coefficients.double())
    want = torch.cat([sum(some, torch.zeros(())).flatten() for some in zip(*each, strict=True)])
    torch.testing.assert_close(look.gradient, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    assert learner.step(packed).metrics["contexts/mean"] == sum(map(len, SHAPES)) / len(SHAPES)


def test_the_critic_reads_the_state_within_the_context_whatever_the_temperature() -> None:
    model, trajectories = sample_model(), batch_of()
    critic = Critic(model, CriticSettings(kind="head", warmup_steps=0), ARITHMETIC)
    critic.head.double()
    nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
    found = critic.values(pack_batch(trajectories, micro_batch_tokens=40))
    cold = [structs.replace(t, turns=tuple(structs.replace(u, temperature=0.0) for u in t.turns)) for t in trajectories]
    assert torch.equal(found, critic.values(pack_batch(cold, micro_batch_tokens=40)))
    want = []
    with torch.no_grad():
        for t in trajectories:
            bounds = [0, *t.contexts, len(t.tokens)]
            for begin, end in pairwise(bounds):
                tokens = torch.from_numpy(t.tokens[begin:end].astype(np.int64))
                hidden = model(tokens, torch.arange(end - begin), DocumentAttention([end - begin]))
                for turn in t.turns:
                    if turn.length and begin <= turn.start < end:
                        want.append(hidden[turn.start - begin - 1 : turn.start - begin - 1 + turn.length])
        values = critic.head(torch.cat(want)).squeeze(-1)
    torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-9)


def test_a_batch_of_single_contexts_and_one_temperature_pays_nothing() -> None:
    plain = [
        structs.replace(t, contexts=(), turns=tuple(structs.replace(u, temperature=0.0) for u in t.turns))
        for t in batch_of()
    ]
    packed = pack_batch(plain, micro_batch_tokens=40)
    assert all(micro.stretch is None and micro.documents == micro.lengths for micro in packed.micro_batches)
    report = make_learner(sample_model(), "grpo").step(packed)
    assert "contexts/mean" not in report.metrics


def test_a_context_changes_the_log_probs_behind_it_alone() -> None:
    """What would go wrong if a context were not a document: the same tokens as one sequence have others."""
    model = sample_model()
    one = made(0, SHAPES[0])
    whole = structs.replace(one, contexts=())
    apart, joined = (batch_log_probs(model, pack_batch([t], micro_batch_tokens=99), ARITHMETIC) for t in (one, whole))
    assert torch.allclose(apart.log_prob[:5], joined.log_prob[:5])
    assert (apart.log_prob[5:] - joined.log_prob[5:]).abs().min() > 1e-4


def test_capped_logits_are_those_at_the_turns_temperature() -> None:
    model, trajectory = sample_model(), made(0, SHAPES[0])
    with torch.no_grad():
        plain = alone(model, trajectory)
    model.logit_cap = 2.0
    found = batch_log_probs(model, pack_batch([trajectory], micro_batch_tokens=99), ARITHMETIC).log_prob
    with torch.no_grad():
        want = alone(model, trajectory)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    assert (want - plain).abs().max() > 0.01


def test_greedy_turns_and_trajectories_are_shown_at_temperature_one() -> None:
    """They are of evaluations, which are never trained, but the report computes their ratios."""
    model = sample_model()
    sampled = made(1, SHAPES[1])
    turns = tuple(structs.replace(turn, temperature=GREEDY) for turn in sampled.turns)
    greedy = structs.replace(sampled, turns=turns, split="eval")
    found = batch_log_probs(model, pack_batch([greedy], micro_batch_tokens=99), ARITHMETIC).log_prob
    plain = structs.replace(sampled, temperature=1.0)
    want = batch_log_probs(model, pack_batch([plain], micro_batch_tokens=99), replace(ARITHMETIC, temperature=1.0))
    torch.testing.assert_close(found, want.log_prob, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("limit", [10_000, 9, 1])
def test_a_long_trajectory_is_cut_between_contexts_where_nothing_needs_it_whole(limit: int, size: int) -> None:
    """size: of ranks; 0: no ranks."""
    model, trajectories = sample_model(), batch_of()
    want = batch_log_probs(model, pack_batch(trajectories, micro_batch_tokens=10_000), ARITHMETIC)
    cost = Cost(per_token=100, per_policy_token=30, per_pair=3)
    parts, rows = [], []
    for rank in range(max(1, size)):
        over = Spread(rank=rank, size=size, cost=cost, whole_groups=False) if size else None
        packed = pack_batch(trajectories, micro_batch_tokens=limit, over=over, whole=False)
        longest = max(n for t in trajectories for n in t.context_lengths())
        assert all(len(micro.tokens) <= max(limit, longest) for micro in packed.micro_batches)
        parts.append(batch_log_probs(model, packed, ARITHMETIC).log_prob)
        rows.append(packed.own(torch.arange(packed.num_policy_tokens)))
    found = torch.empty_like(want.log_prob)
    found[torch.cat(rows)] = torch.cat(parts)
    torch.testing.assert_close(found, want.log_prob, rtol=1e-10, atol=1e-10)


def test_steps_of_pieces_are_steps_of_whole_trajectories() -> None:
    after = []
    for whole in (True, False):
        learner = make_learner(sample_model(), "so_grpo")
        report = learner.step(pack_batch(batch_of(), micro_batch_tokens=9, whole=whole))
        after.append((report.metrics, learner.weights()))
    (one, weights), (other, again) = after
    assert other["batch/micro_batches"] > one["batch/micro_batches"]
    assert other["grad/norm"] == pytest.approx(one["grad/norm"], rel=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("recipe", "whole"), [("vcpo", True), ("grpo", False)])
def test_a_step_is_packed_as_its_recipe_needs_it(recipe: str, whole: bool) -> None:
    settings = quick_settings(Path("model"), f"recipe.name={recipe}", "trainer.micro_batch_tokens=9")
    packed = pack_step(settings, batch_of())
    pieces = sum(len(micro.lengths) for micro in packed.micro_batches)
    assert (pieces == packed.num_trajectories) == whole
    assert len(pack_step(settings, batch_of(), whole=True).micro_batches) <= len(packed.micro_batches)


def test_a_sampled_token_that_nothing_predicts_is_never_packed() -> None:
    one = made(0, SHAPES[0])
    broken = structs.replace(one, contexts=(one.turns[0].start,))
    with pytest.raises(AssertionError, match="without a prompt"):
        pack_batch([broken], micro_batch_tokens=99)
