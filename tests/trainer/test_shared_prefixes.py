"""Beginnings that trajectories have in common are computed once, and nothing else changes.

The definition is a loop: every context of every trajectory alone through the model in float64, autograd over all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from torch import Tensor

from async_rl.config import CriticSettings
from async_rl.model.decoder import LayerExecution
from async_rl.model.prefix_tree import SHORTEST, make_tree
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import ModelArithmetic, batch_log_probs, log_probs, own_rows
from async_rl.trainer.packing import PackedBatch, pack_batch, pack_step
from async_rl.trainer.shares import Cost, Spread
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Trajectory, Turn, VersionSpan

COST = Cost(per_token=100, per_policy_token=30, per_pair=3)


def trajectory(
    group: int, sample: int, tokens: Sequence[int], turns: Sequence[tuple[int, int]], contexts: Sequence[int] = ()
) -> Trajectory:
    """turns: (start, length)."""
    made = Trajectory(
        group=group, sample=sample, problem=0, split="train", seed=0, tokens=np.array(tokens, np.int32),
        log_behaviour=np.full(len(tokens), -2.0, np.float32),
        turns=tuple(Turn(start=start, length=length) for start, length in turns),
        versions=(VersionSpan(version=0, start=0, end=len(tokens)),), reward=float((group + 2 * sample) % 3),
        ended="finished", temperature=TEMPERATURE, contexts=tuple(contexts),
    )  # fmt: skip
    assert made.check() is None
    return made


def batch_of() -> list[Trajectory]:
    """Groups with a common prompt; with branches inside the answers; with the answer of another as a beginning; equal
    answers; no common beginning; a system prompt that two groups have in common; and two contexts each."""
    random = np.random.default_rng(0)

    def draw(length: int) -> list[int]:
        return random.integers(0, VOCABULARY, length).tolist()  # type: ignore[no-any-return]

    system, made = draw(10), []
    for group, prompt in enumerate((system + draw(5), system + draw(9), draw(13))):
        made += [trajectory(group, i, prompt + draw(3 + i), [(len(prompt), 3 + i)]) for i in range(4)]
    prompt, branch = draw(9), draw(12)
    answers = [branch + draw(4), branch + draw(2), branch, draw(5), branch]
    made += [trajectory(3, i, prompt + a, [(len(prompt), len(a))]) for i, a in enumerate(answers)]
    made += [trajectory(4, i, draw(9), [(4, 5)] if i else []) for i in range(3)]
    prompt = draw(11)
    for i in range(3):  # two turns, the second in a context that begins like the first
        first, second = prompt + draw(4), prompt + draw(2 + i) + draw(3)
        cut, turn = len(first), len(first) + len(second) - 3
        made.append(trajectory(5, i, first + second, [(len(prompt), 4), (turn, 3)], [cut]))
    return made


def flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def through(model: Any, batch: PackedBatch) -> Tensor:  # [own policy tokens], with a graph
    return torch.cat([own_rows(log_probs(model, micro, ARITHMETIC), micro).log_prob for micro in batch.micro_batches])


def close(found: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - want).detach().abs().max()) <= tolerance * max(1.0, float(want.detach().abs().max()))


@pytest.mark.parametrize("name", ["qwen3 tied", "qwen3 untied", "llama with every bias"])
@pytest.mark.parametrize("limit", [10_000, 45, 1])
def test_log_probs_and_gradients_are_those_of_every_context_alone(name: str, limit: int) -> None:
    model, trajectories = sample_model(CONFIGS[name]), batch_of()
    packed = pack_batch(trajectories, micro_batch_tokens=limit, shared=True)
    assert limit == 1 or any(micro.tree is not None for micro in packed.micro_batches)
    want, found = torch.cat([alone(model, t) for t in trajectories]), through(model, packed)
    close(found, want)
    weights = torch.randn(len(want), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    parameters = list(model.parameters())
    close(flat_gradient((weights * found).sum(), parameters), flat_gradient((weights * want).sum(), parameters))


@pytest.mark.parametrize("recipe", ["grpo", "gspo", "so_grpo", "vcpo"])
@pytest.mark.parametrize("limit", [10_000, 45])
def test_a_step_is_that_of_a_batch_laid_out_unshared(recipe: str, limit: int) -> None:
    after = []
    for shared in (False, True):
        learner = make_learner(sample_model(), recipe)
        report = learner.step(pack_batch(batch_of(), micro_batch_tokens=limit, shared=shared, apart=recipe == "vcpo"))
        after.append((dict(report.metrics), learner.weights()))
    (metrics, weights), (others, again) = after
    for name in metrics.keys() - {"batch/micro_batches", "batch/shared"}:
        assert others[name] == pytest.approx(metrics[name], rel=1e-8, abs=1e-9, nan_ok=True), name
    for name, tensor in weights.items():
        close(again[name], tensor)


def test_layers_that_are_computed_again_and_a_critic_read_the_same_rows() -> None:
    model, trajectories = sample_model(), batch_of()
    plain, shared = (pack_batch(trajectories, micro_batch_tokens=60, shared=s) for s in (False, True))
    critic = Critic(model, CriticSettings(kind="head", warmup_steps=0), ARITHMETIC)
    critic.head.double()
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
    close(critic.values(shared), critic.values(plain))
    parameters = list(model.parameters())
    want = flat_gradient(through(model, plain).square().sum(), parameters)
    model.set_execution(LayerExecution(checkpointed=True))
    close(flat_gradient(through(model, shared).square().sum(), parameters), want)


@pytest.mark.parametrize("name", ["qwen3 tied", "qwen3 untied", "llama with every bias"])
@pytest.mark.parametrize("limit", [10_000, 100, 1])
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_exact_norms_and_gradient_are_those_of_every_trajectory_alone(
    name: str, limit: int, scope: Literal["group", "batch"]
) -> None:
    model, trajectories = sample_model(CONFIGS[name]), batch_of()
    packed = pack_batch(trajectories, micro_batch_tokens=limit, shared=True, apart=True)
    assert limit == 1 or any(micro.tree is not None for micro in packed.micro_batches)
    weights = some_weights(packed)
    each = each_gradient(model, trajectories, weights)
    want_norms = torch.stack([sum((g.square().sum() for g in one), torch.zeros(())) for one in each])

    def baselines(norms: Tensor) -> Tensor:
        group = packed.group_of_trajectory if scope == "group" else torch.zeros_like(packed.group_of_trajectory)
        zero = torch.zeros(packed.num_trajectories, dtype=torch.float64)
        found = zero.index_add(0, group, norms * packed.reward) / (zero.index_add(0, group, norms) + 1e-30)
        return found[: int(packed.group_of_trajectory.max()) + 1] if scope == "group" else found[:1].expand(6)

    owner = packed.trajectory_of_turn[packed.turn_of_token]
    model.zero_grad(set_to_none=True)
    exact = TrajectoryGradient(model, ARITHMETIC)
    norms = exact.add(packed, packed.reward[owner].double() * weights, weights, baselines, scope=scope)
    close(norms, want_norms)
    multipliers = packed.reward.double() - baselines(want_norms)[packed.group_of_trajectory]
    for number, parameter in enumerate(model.parameters()):
        want = sum((float(m) * one[number] for m, one in zip(multipliers, each, strict=True)), torch.zeros(()))
        assert parameter.grad is not None
        close(parameter.grad, want)


@st.composite
def documents(draw: st.DrawFn) -> list[Trajectory]:
    """Ragged groups over two token ids, so that beginnings coincide in every way."""
    made = []
    for group in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=14))
        for sample in range(draw(st.integers(1, 4))):
            own = draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
            begin = prompt if draw(st.booleans()) else draw(st.lists(st.integers(0, 1), min_size=1, max_size=14))
            tokens, contexts = begin + own, []
            turns = [(len(begin), len(own))]
            if draw(st.booleans()):  # a second context
                contexts = [len(tokens)]
                turns.append((len(tokens) + len(begin), 1))
                tokens = tokens + begin + [draw(st.integers(0, 1))]
            made.append(trajectory(group, sample, tokens, turns, contexts))
    return made


MODEL = sample_model(CONFIGS["qwen3 untied"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batch=documents(), limit=st.integers(1, 70), whole=st.booleans())
def test_any_batch_has_the_log_probs_of_its_contexts_alone_within_the_limit_of_rows(
    batch: list[Trajectory], limit: int, whole: bool
) -> None:
    packed = pack_batch(batch, micro_batch_tokens=limit, shared=True, whole=whole)
    with torch.no_grad():
        close(through(MODEL, packed), torch.cat([alone(MODEL, t) for t in batch]))
    unshared = pack_batch(batch, micro_batch_tokens=limit, whole=whole)
    assert len(packed.micro_batches) <= len(unshared.micro_batches)
    for micro in packed.micro_batches:
        assert len(micro.tokens) <= limit or len(micro.lengths) == 1
        assert len(micro.tokens) == len(micro.positions) <= sum(micro.documents)
        assert torch.equal(micro.of_policy(micro.predicting), micro.predictors)
        assert len(set(micro.predicting.tolist())) == len(micro.predicting)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=9),
    shortest=st.integers(1, 4),
)
def test_a_tree_has_each_beginning_once_and_every_row_behind_its_own(batch: list[list[int]], shortest: int) -> None:
    arrays = [np.array(tokens, np.int32) for tokens in batch]
    tree = make_tree(arrays, shortest=shortest)
    flat = np.concatenate(arrays)
    assert np.array_equal(flat[tree.token_of_row[tree.row_of_token]], flat)
    assert [run.begin for run in tree.runs] == [0, *(run.end for run in tree.runs[:-1])]
    assert tree.runs[-1].end == tree.num_rows
    ends = np.cumsum([len(tokens) for tokens in batch])
    for begin, end in pairwise([0, *ends.tolist()]):
        path = tree.row_of_token[begin:end].tolist()
        for number, row in enumerate(path):
            seen = [
                other
                for run in tree.runs
                for other in range(run.begin, run.end)
                if (run.begin <= row < run.end and other <= row) or run.end <= row < run.last
            ]
            assert sorted(seen) == sorted(path[: number + 1])
    if shortest == 1:
        assert tree.num_rows == len({tuple(tokens[:n]) for tokens in batch for n in range(1, len(tokens) + 1)})


def test_a_group_takes_the_rows_of_one_prompt_and_all_answers() -> None:
    prompt = list(range(12))
    batch = [trajectory(0, i, [*prompt, i, 1, 2], [(12, 3)]) for i in range(6)]
    (micro,) = pack_batch(batch, micro_batch_tokens=30, shared=True).micro_batches
    assert len(micro.tokens) == 12 + 6 * 3
    assert micro.positions.tolist() == [*range(12), *([12, 13, 14] * 6)]
    assert len(pack_batch(batch, micro_batch_tokens=30).micro_batches) == 3
    short = [trajectory(0, i, [*range(SHORTEST - 1), 9 + i], [(SHORTEST - 1, 1)]) for i in range(3)]
    assert pack_batch(short, micro_batch_tokens=99, shared=True).micro_batches[0].tree is None


def test_ranks_keep_a_group_together_where_that_costs_less() -> None:
    long = [trajectory(g, i, [g, *range(18), *range(g, 9), i], [(19, 10 - g)]) for g in range(4) for i in range(4)]
    for size, whole in ((2, True), (8, False)):
        spreads = [Spread(rank=rank, size=size, cost=COST, whole_groups=False) for rank in range(size)]
        made = [pack_batch(long, micro_batch_tokens=999, shared=True, over=over) for over in spreads]
        rows = [sum(len(micro.tokens) for micro in packed.micro_batches) for packed in made]
        assert made[0].share is not None
        assert made[0].share.groups_cut != whole
        assert max(rows) <= (75 if whole else 45)


@pytest.mark.parametrize(("recipe", "fewest"), [("grpo", 2), ("vcpo", 3)])
def test_a_step_shares_prefixes_unless_it_is_told_not_to(recipe: str, fewest: int) -> None:
    """fewest: micro-batches, where rows count as the recipe's gradients need them."""
    words = (f"recipe.name={recipe}", "trainer.micro_batch_tokens=210")
    packed = pack_step(quick_settings(Path("model"), *words), batch_of())
    assert any(micro.tree is not None for micro in packed.micro_batches)
    assert len(packed.micro_batches) == fewest
    counted = [sum(micro.lengths) if recipe == "vcpo" else len(micro.tokens) for micro in packed.micro_batches]
    assert [micro.counted for micro in packed.micro_batches] == counted
    assert max(counted) <= 210
    plain = pack_step(quick_settings(Path("model"), *words, "trainer.shared_prefixes=false"), batch_of())
    assert all(micro.tree is None for micro in plain.micro_batches)
    assert len(plain.micro_batches) == 3


def test_bfloat16_differs_from_an_unshared_layout_by_rounding_alone() -> None:
    model = sample_model(dtype=torch.float32)
    half = ModelArithmetic(temperature=TEMPERATURE, dtype=torch.bfloat16)
    packed = [pack_batch(batch_of(), micro_batch_tokens=999, shared=s) for s in (False, True)]
    plain, shared = (batch_log_probs(model, batch, half).log_prob for batch in packed)
    exact = batch_log_probs(model, packed[0], ARITHMETIC).log_prob
    assert float((shared - exact).norm()) <= 2 * float((plain - exact).norm())
