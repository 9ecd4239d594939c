"""Recipes against the loss functions of verl and TRL themselves: gradients by autograd, on random ragged batches."""

from __future__ import annotations

import importlib
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe

RAW = {"credit": "trajectory", "baseline": "none", "scale": "none", "whiten": False}
"""the advantage of a token is the reward of its answer"""
SEEDS = range(25)


def batch_of(seed: int, spread: float = 0.5) -> tuple[Columns, Tensor]:
    """Answers of 1 to 12 tokens in one group, and where their tokens are in a padded matrix, [answers, 12] bool."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 13, int(random.integers(2, 9)))
    n, count = int(lengths.sum()), len(lengths)
    log_prob = torch.tensor(-random.gamma(1.0, 1.0, n) - 0.01)
    return Columns(
        log_prob=log_prob,
        log_behaviour=(log_prob - torch.tensor(random.normal(0.0, spread, n))).clamp(max=-1e-3),
        version=torch.zeros(n, dtype=torch.int64),
        turn_of_token=torch.arange(count).repeat_interleave(torch.tensor(lengths)),
        trajectory_of_turn=torch.arange(count),
        group_of_trajectory=torch.zeros(count, dtype=torch.int64),
        reward=torch.tensor(random.normal(size=count)),
        turn_reward=torch.zeros(count, dtype=torch.float64),
        state_key=torch.full((count,), -1),
        truncated=torch.zeros(count, dtype=torch.bool),
        current_version=1,
        entropy=torch.tensor(random.gamma(1.0, 1.0, n)).float().double(),
    ), torch.arange(12) < torch.tensor(lengths).unsqueeze(1)


def padded(column: Tensor, mask: Tensor) -> Tensor:
    """[tokens] -> [answers, 12], -1 behind an answer."""
    return torch.full(mask.shape, -1.0, dtype=torch.float64).masked_scatter(mask, column)


def assert_same(columns: Columns, gradient: Tensor, mask: Tensor, name: str, /, **changes: Any) -> None:
    """The recipe's coefficients are minus the gradient [answers, 12] of the foreign loss."""
    recipe = load_recipe({"name": name, "advantage": RAW, **changes})
    got = coefficients(columns, recipe, ObjectiveState())[0].policy
    # verl adds 1e-8 to lengths and probabilities
    torch.testing.assert_close(got, -gradient[mask], rtol=1e-6, atol=1e-10)


class Config(dict[str, Any]):
    """What verl's losses read of an actor's settings."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.2, 0.28
    tau_pos, tau_neg = 1.0, 1.05
    policy_loss = SimpleNamespace(dro_beta=0.1, tau_pos=1.0, tau_neg=1.05)
    global_batch_info: ClassVar[dict[str, Any]] = {}


CLIP = {"clip_low": 0.2, "clip_high": 0.28}
TOKENS, ANSWERS = {"mode": "token_mean"}, {"mode": "seq_mean_token_mean"}
NO_KL = {"coefficient": 0.0}
VERL: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "vanilla": ("vanilla", "token-mean", "grpo", {"trust": {**CLIP, "dual_clip": 3.0}, "aggregate": TOKENS}),
    "vanilla, mean of answers": (
        "vanilla", "seq-mean-token-mean", "grpo", {"trust": {**CLIP, "dual_clip": 3.0}, "aggregate": ANSWERS}
    ),
    "vanilla, sum of tokens": (
        "vanilla", "seq-mean-token-sum", "grpo",
        {"trust": {**CLIP, "dual_clip": 3.0}, "aggregate": {"mode": "seq_mean_token_sum"}},
    ),
    "dppo_kl": (
        "dppo_kl", "token-mean", "dppo",
        {"trust": {"divergence": "binary_kl", "mask_low": 0.2, "mask_high": 0.28}, "kl": NO_KL},
    ),
    "dppo_tv": ("dppo_tv", "token-mean", "dppo", {"trust": {"mask_low": 0.2, "mask_high": 0.28}, "kl": NO_KL}),
    "gspo": ("gspo", "seq-mean-token-mean", "gspo_token", {"trust": CLIP}),
    "geo_mean": ("geo_mean", "token-mean", "gmpo", {"trust": CLIP}),
    "cispo": ("cispo", "token-mean", "cispo", {"trust": CLIP, "aggregate": TOKENS}),
    "sapo": ("sapo", "seq-mean-token-mean", "sapo", {}),
    "dro": ("dro", "token-mean", "dro", {"kl": {"coefficient": 0.1}}),
    "gpg": ("gpg", "seq-mean-token-mean", "gpg", {"select": {"drop_zero_signal": False}}),
}  # fmt: skip


@pytest.mark.parametrize("case", VERL)
def test_a_loss_of_verl(verl: ModuleType, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    function, mode, recipe, changes = VERL[case]
    monkeypatch.setattr(verl, "ActorConfig", Config)
    cap = 3.0 if function == "vanilla" else 1e9  # dual clip; a truncation elsewhere
    for seed in SEEDS:
        columns, mask = batch_of(seed)
        log_prob = padded(columns.log_prob, mask).requires_grad_()
        advantage = columns.reward.unsqueeze(1).expand(mask.shape) * mask
        loss, _ = verl.get_policy_loss_fn(function)(
            padded(columns.log_behaviour, mask), log_prob, advantage, mask.double(), mode, Config(clip_ratio_c=cap)
        )
        (gradient,) = torch.autograd.grad(loss, log_prob)
        assert_same(columns, gradient, mask, recipe, **changes)


TRL: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "grpo": ("grpo", "token", "grpo", {"trust": CLIP}),
    "bnpo": ("bnpo", "token", "grpo", {"trust": CLIP, "aggregate": TOKENS}),
    "dapo": ("dapo", "token", "grpo", {"trust": CLIP, "aggregate": TOKENS}),
    "dr_grpo": ("dr_grpo", "token", "dr_grpo", {"trust": CLIP, "aggregate": {"constant": 12.0}}),
    "grpo of sequences": ("grpo", "sequence", "gspo", {"trust": CLIP}),
    "cispo": ("cispo", "token", "cispo", {"trust": {"clip_low": 1.0, "clip_high": 0.28}, "aggregate": TOKENS}),
    "two-sided": (
        "dapo", "token", "intellect2",
        {"trust": {**CLIP, "dual_clip": 2.0}, "kl": NO_KL, "entropy": 0.0, "select": {"drop_equal_rewards": False}},
    ),
    "sapo": ("sapo", "token", "sapo", {}),
    "vespo": ("vespo", "token", "vespo", {}),
    "luspo": ("luspo", "sequence", "luspo", {"trust": CLIP}),
    "80/20": ("dapo", "token", "forking_tokens", {"trust": CLIP, "mask": {"entropy_share": 0.3}}),
}  # fmt: skip


@pytest.mark.parametrize("case", TRL)
def test_a_loss_of_trl(trl: ModuleType, case: str) -> None:
    loss_type, level, recipe, changes = TRL[case]
    for seed in SEEDS:
        columns, mask = batch_of(seed)
        log_prob = padded(columns.log_prob, mask).requires_grad_()
        high = 1.28 if loss_type == "cispo" else 0.28  # the bound itself there
        trainer = FakeTrainer(
            log_prob, loss_type=loss_type, importance_sampling_level=level, epsilon_low=0.2, epsilon_high=high
        )
        if case == "two-sided":
            trainer.args.delta = 2.0
        if case == "80/20":
            trainer.show_entropy(trl.GRPOTrainer, columns, mask, share=0.3)
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        inputs = {
            "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.double(),
            "advantages": columns.reward, "old_per_token_logps": padded(columns.log_behaviour, mask),
            "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        assert_same(columns, gradient, mask, recipe, **changes)


class FakeTrainer:
    """What GRPOTrainer's loss reads of its trainer."""

    def __init__(self, log_prob: Tensor, **settings: Any) -> None:
        vars(self).update(settings)
        self._log_prob = log_prob
        self.args = SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1, sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        )  # fmt: skip
        self._entropy = torch.zeros_like(log_prob)
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, **_: x,
        )  # fmt: skip
        self.current_gradient_accumulation_steps = 1
        self.max_completion_length = log_prob.shape[1]
        self.top_entropy_quantile, self.beta = 1.0, 0.0
        self.off_policy_mask_threshold = None
        self.use_vllm = self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self._metrics: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def _get_per_token_logps_and_entropies(self, *_: object, **__: object) -> tuple[Tensor, Tensor, None]:
        return self._log_prob, self._entropy, None

    def show_entropy(self, trainer: type[Any], columns: Columns, mask: Tensor, *, share: float) -> None:
        """Only tokens of the highest entropy are to be trained."""
        assert columns.entropy is not None
        self.top_entropy_quantile, self._entropy = share, padded(columns.entropy, mask)
        self.get_high_entropy_mask = lambda *given: trainer.get_high_entropy_mask(self, *given)

    @staticmethod
    def get_gamma_weights(**given: Any) -> Tensor:
        trainer: Any = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
        found: Tensor = trainer.get_gamma_weights(**given)
        return found
