"""The trainer's step: independent of how a batch is cut, careful with what is broken, honest about rates."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from msgspec import structs

from async_rl.config import CriticSettings, OptimizerSettings, UpdatesSettings
from async_rl.model.architecture import DecoderConfig
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.objective.library import load_recipe
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import ModelArithmetic, batch_log_probs
from async_rl.trainer.learner import Learner, LearnerOptions, base_learning_rate
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trajectory import Trajectory, Turn, VersionSpan

CONFIG = DecoderConfig(
    family="qwen3", vocabulary=23, hidden=24, intermediate=32, layers=2, heads=4, kv_heads=2, head_dim=6,
    max_context=64, qk_norm=True, tied=True,
)  # fmt: skip
ARITHMETIC = ModelArithmetic(temperature=0.9)
OPTIMIZER = OptimizerSettings(learning_rate=1e-3, warmup_steps=0, clip_norm=0.0)


def make_model(seed: int, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(CONFIG)
    model.initialise(seed, std=0.3)
    return model.to(dtype)


def make_batch(*, micro_batch_tokens: int = 10_000, broken: bool = False, order: int = 0) -> PackedBatch:
    """Two-turn episodes in groups of four, sampled (as far as log-probs go) by slightly other weights."""
    random = np.random.default_rng(0)
    behaviour = make_model(1)
    with torch.no_grad():
        for parameter in behaviour.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
    made = []
    for number in range(12):
        first, second = int(random.integers(1, 9)), int(random.integers(1, 5))
        start = int(random.integers(1, 5))
        length = start + first + 2 + second
        turns = (Turn(start=start, length=first, reward=0.5), Turn(start=start + first + 2, length=second))
        made.append(
            Trajectory(
                group=number // 4,
                sample=number % 4,
                problem=0,
                split="train",
                seed=0,
                tokens=random.integers(0, CONFIG.vocabulary, length).astype(np.int32),
                log_behaviour=np.full(length, -1.0, np.float32),
                turns=turns,
                versions=(VersionSpan(version=0, start=start, end=length),),
                reward=float(random.integers(0, 2)),
                ended="finished",
            )
        )
    packed = pack_batch(made, micro_batch_tokens=10_000)
    log_behaviour = batch_log_probs(behaviour, packed, ARITHMETIC).log_prob.float().numpy()
    at = 0
    sampled = []
    for t in made:
        column = t.log_behaviour.copy()
        where = t.policy_positions()
        column[where] = log_behaviour[at : at + len(where)]
        at += len(where)
        if broken and t.sample == 0:
            column[where[0]] = np.nan
        sampled.append(structs.replace(t, log_behaviour=column))
    shuffled = [sampled[i] for i in np.random.default_rng(order).permutation(len(sampled))]
    return pack_batch(shuffled, micro_batch_tokens=micro_batch_tokens)


def make_learner(recipe: dict[str, object] | str, *, updates: int = 1, **optimizer: object) -> Learner:
    values = {"name": recipe} if isinstance(recipe, str) else recipe
    loaded = load_recipe(values)
    model = make_model(1)
    options = LearnerOptions(
        steps=10,
        updates=UpdatesSettings(epochs=updates),
        optimizer=replace(OPTIMIZER, **optimizer),  # type: ignore[arg-type]
        arithmetic=ARITHMETIC,
    )
    critic = None
    if loaded.advantage.credit in ("token_gae", "turn_gae"):
        torch.manual_seed(0)
        critic = Critic(model, CriticSettings(kind="model", warmup_steps=0), ARITHMETIC)
        critic.head.double()
    reference = deepcopy(make_model(2)) if loaded.kl.coefficient else None
    return Learner(model, loaded, options, critic=critic, reference=reference)


RECIPES: list[dict[str, object]] = [
    {"name": "grpo"},
    {"name": "dr_grpo", "kl": {"coefficient": 0.1}},
    {"name": "vcpo"},
    {"name": "vcpo", "opob": {"norm": "logit"}},
    {"name": "vcpo", "opob": {"scope": "batch"}},
    {"name": "gspo", "entropy": 0.01},
    {"name": "st_ppo"},
    {"name": "s_ppo", "bias": {"estimator": "exact"}},
    {"name": "m2po"},
    {"name": "mis"},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(map(str, r.values())))
def test_a_step_does_not_depend_on_micro_batches_or_order(recipe: dict[str, object]) -> None:
    learners = []
    for micro_batch_tokens, order in ((10_000, 0), (40, 1), (1, 2)):
        learner = make_learner(recipe)
        report = learner.step(make_batch(micro_batch_tokens=micro_batch_tokens, order=order))
        assert not report.skipped
        learners.append((learner, report))
    first, report = learners[0]
    assert any(not torch.equal(a, b) for a, b in zip(first.weights().values(), make_model(1).parameters(), strict=True))
    for other, again in learners[1:]:
        # float32 columns (log_behaviour, rewards) are the same numbers; the arithmetic is float64
        assert again.metrics["grad/norm"] == pytest.approx(report.metrics["grad/norm"], rel=1e-6)
        assert again.metrics["lr/effective"] == pytest.approx(report.metrics["lr/effective"], rel=1e-6)
        for name, tensor in other.weights().items():
            # Adam's first step is nearly a sign: a gradient that is zero up to rounding may flip
            torch.testing.assert_close(tensor, first.weights()[name], rtol=0, atol=2e-5)


def test_packed_log_probs_equal_one_by_one() -> None:
    batch, model = make_batch(), make_model(1)
    together = batch_log_probs(model, batch, ARITHMETIC).log_prob
    alone = batch_log_probs(model, make_batch(micro_batch_tokens=1), ARITHMETIC).log_prob
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    micro = batch.micro_batches[0]
    start, expected = 0, []
    with torch.no_grad():
        for length in micro.lengths:
            part = slice(start, start + length)
            hidden = model(micro.tokens[part], micro.positions[part], DocumentAttention([length]))
            logits = hidden @ model.head.T / ARITHMETIC.temperature
            inside = (micro.predictors >= start) & (micro.predictors < start + length)
            rows = torch.log_softmax(logits, -1)[micro.predictors[inside] - start]
            expected.append(rows.gather(-1, micro.targets[inside][:, None]).squeeze(-1))
            start += length
    torch.testing.assert_close(together, torch.cat(expected), rtol=1e-10, atol=1e-10)


def test_nothing_to_learn_leaves_weights_and_moments_as_they_are() -> None:
    learner = make_learner("grpo", weight_decay=0.1)
    learner.step(make_batch())
    before = {name: p.clone() for name, p in learner.weights().items()}
    moments = deepcopy(learner.optimizer.state_dict()["state"])
    batch = make_batch()
    equal = replace(batch, reward=torch.ones_like(batch.reward))
    report = learner.step(equal)
    assert "equal rewards" in report.skipped
    assert report.version == 2
    for name, tensor in learner.weights().items():
        assert torch.equal(tensor, before[name]), name
    for key, state in learner.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[key][name]))


def test_a_broken_log_prob_never_reaches_the_weights_nor_raises_the_rate() -> None:
    learner = make_learner({"name": "vcpo", "ess": {"reference": 1.0}})
    report = learner.step(make_batch(broken=True))
    assert report.metrics["ess/nonfinite"] == 3
    assert report.metrics["lr/effective"] < OPTIMIZER.learning_rate
    assert all(torch.isfinite(p).all() for p in learner.weights().values())


def test_factors_act_on_this_step_only() -> None:
    learner = make_learner({"name": "ess_grpo", "ess": {"reference": 1.0}})
    before = [group["lr"] for group in learner.optimizer.param_groups]
    report = learner.step(make_batch())
    assert report.metrics["lr/effective"] < report.metrics["lr/base"]
    assert [group["lr"] for group in learner.optimizer.param_groups] == before


def test_several_updates_on_a_batch_move_away_from_the_proximal_policy() -> None:
    recipe: dict[str, object] = {"name": "ppo", "advantage": {"credit": "trajectory", "baseline": "group_mean"}}
    recipe["ratio"] = {"denominator": "proximal"}
    once, twice = make_learner(recipe), make_learner(recipe, updates=3, learning_rate=0.05)
    assert once.step(make_batch()).metrics["clip/frac"] == 0.0
    assert twice.step(make_batch()).metrics["clip/frac"] > 0.0


def test_a_step_whose_second_update_cannot_be_taken_is_not_called_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = iter([1.0, math.nan])
    monkeypatch.setattr("async_rl.trainer.learner.clip_gradient", lambda *_: next(norms))
    learner = make_learner("grpo", updates=3)
    before = {name: p.clone() for name, p in learner.weights().items()}
    report = learner.step(make_batch())
    assert not report.skipped
    assert "not finite" in report.stopped
    assert report.metrics["updates/done"] == 1.0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in learner.weights().items())


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_critic_learns_the_returns_and_leaves_the_policy_alone_while_it_warms_up(kind: str) -> None:
    torch.manual_seed(0)
    model = make_model(1, torch.float32)
    settings = CriticSettings(kind=kind, learning_rate=1e-2, warmup_steps=1000)  # type: ignore[arg-type]
    critic = Critic(model, settings, ARITHMETIC)
    options = LearnerOptions(steps=200, optimizer=OPTIMIZER, arithmetic=ARITHMETIC)
    learner = Learner(model, load_recipe({"name": "ppo"}), options, critic=critic)
    before = {name: p.clone() for name, p in learner.weights().items()}
    losses = [learner.step(make_batch()).metrics["value/loss"] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in learner.weights().items())


def test_a_critic_comes_back_from_its_state() -> None:
    model, batch = make_model(1, torch.float32), make_batch()
    settings = CriticSettings(kind="model", warmup_steps=0)
    one, other = Critic(model, settings, ARITHMETIC), Critic(model, settings, ARITHMETIC)
    one.values(batch)
    one.step(torch.ones(batch.num_policy_tokens))
    one.step(torch.ones(batch.num_policy_tokens))
    other.load_state_dict({name: t.clone() for name, t in one.state_dict().items()})
    assert torch.equal(one.values(batch), other.values(batch))


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [("constant", 99, 1.0), ("linear", 55, 0.55), ("cosine", 55, 0.55), ("linear", 100, 0.1), ("cosine", 100, 0.1)],
)
def test_schedules_warm_up_and_then_follow_their_curve(schedule: str, step: int, share: float) -> None:
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=10, schedule=schedule, final_share=0.1)  # type: ignore[arg-type]
    assert base_learning_rate(0, steps=100, optimizer=settings) == pytest.approx(2.0 / 11)
    assert base_learning_rate(10, steps=100, optimizer=settings) == 2.0
    assert base_learning_rate(step, steps=100, optimizer=settings) == pytest.approx(2.0 * share)
