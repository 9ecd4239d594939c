"""Exact OPOB while the KL penalty in the reward adapts: the gradient is the one with the optimum for the present beta.

The optimum is restated here from its definition, with one backward pass of autograd for each trajectory in float64:
b = sum |g_i|^2 R_i / sum |g_i|^2 over the group, with R_i = reward_i - beta sum_t (log pi_t - log mu_t).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import support_ranks as support
import torch
from torch import Tensor

from async_rl.model.architecture import config_values
from async_rl.model.create import write_character_tokenizer
from async_rl.objective import ObjectiveState
from async_rl.trainer.checkpoint import load_checkpoint, save_checkpoint
from async_rl.trainer.forward import log_probs
from async_rl.trainer.learner import Learner
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trainer.ranks import one_rank
from async_rl.trajectory import Trajectory

CASE = next(case for case in support.CASES if case.name == "exact, adaptive KL")
CAP = 8.0
"""of the weight of a trajectory in vcpo"""


def gradients(learner: Learner, episodes: list[Trajectory]) -> tuple[Tensor, Tensor]:
    """Of each trajectory, min(w, cap) / length / number of answers * grad sum_t log pi_t [I, parameters], and
    sum_t (log pi_t - log mu_t) [I]."""
    trained = list(learner.trained().values())
    answered = sum(bool(episode.num_policy_tokens) for episode in episodes)
    rows, moved = [], []
    for episode in episodes:
        length = episode.num_policy_tokens
        if length == 0:
            rows.append(torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64))
            moved.append(torch.zeros((), dtype=torch.float64))
            continue
        (micro,) = pack_batch([episode], micro_batch_tokens=10_000).micro_batches
        log_prob = log_probs(learner.model, micro, support.ARITHMETIC).log_prob
        behaviour = torch.tensor(episode.log_behaviour[episode.policy_positions()]).double()
        moved.append((log_prob.detach() - behaviour).sum())
        found = torch.autograd.grad(log_prob.sum(), trained, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]) * moved[-1].exp().clamp(max=CAP) / length / answered)
    return torch.stack(rows), torch.stack(moved)


def optimal_gradient(learner: Learner, episodes: list[Trajectory], beta: float) -> tuple[Tensor, Tensor]:
    """Gradient of the loss [parameters] with the baseline [G] that minimises the second moment, at this beta."""
    each, moved = gradients(learner, episodes)
    reward = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64) - beta * moved
    wanted, baselines = torch.zeros(each.shape[1], dtype=torch.float64), []
    for group in sorted({episode.group for episode in episodes}):
        members = [i for i, episode in enumerate(episodes) if episode.group == group]
        square = each[members].square().sum(1)
        best = (square * reward[members]).sum() / square.sum()
        baselines.append(
            best if len(members) > 1 else torch.zeros_like(best)
        )  # alone it has no gradient; metrics say 0
        wanted -= ((reward[members] - best).unsqueeze(1) * each[members]).sum(0)
    return wanted, torch.stack(baselines)


def check(learner: Learner, episodes: list[Trajectory], batch: PackedBatch, beta: float) -> None:
    wanted, baselines = optimal_gradient(learner, episodes, beta)
    preview = learner.preview(batch)
    torch.testing.assert_close(preview.gradient, wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))
    assert preview.metrics["opob/baseline"] == pytest.approx(float(baselines.mean()), rel=1e-9)


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 120, 30])
def test_the_baseline_is_the_optimum_at_the_present_beta(micro_batch_tokens: int, tmp_path: Path) -> None:
    case = replace(CASE, micro_batch_tokens=micro_batch_tokens)
    model = tmp_path / "model"
    model.mkdir()
    write_character_tokenizer(model, "0123456789abcdef")
    (model / "config.json").write_text(json.dumps(config_values(case.config)))
    learner = support.build(case, one_rank(), "none")
    first = beta = float(case.recipe["kl"]["coefficient"])
    for seed in range(4):
        episodes = support.episodes(case.groups, case.config, seed)
        batch = support.pack(case, one_rank(), seed)
        check(learner, episodes, batch, beta)
        assert not learner.step(batch).skipped
        assert learner.state.kl_coefficient is not None
        beta = learner.state.kl_coefficient
        if seed == 1:  # the run ends and is resumed
            path = save_checkpoint(tmp_path / "checkpoints", learner, {}, source=model, keep=1)
            learner = support.build(case, one_rank(), "none")
            load_checkpoint(path, learner)
    assert max(beta / first, first / beta) > 4


def test_the_baseline_is_the_optimum_far_from_the_first_beta() -> None:
    learner = support.build(CASE, one_rank(), "none")
    learner.state = ObjectiveState(kl_coefficient=5.0)
    check(learner, support.episodes(CASE.groups, CASE.config, 0), support.pack(CASE, one_rank(), 0), 5.0)
