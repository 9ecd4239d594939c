"""Log-probs of a batch's tokens under the run's teachers, as one column.

Teachers that are model folders are run here, once a step; what servers said was noted on the tokens by the generators
(generator/teachers.py), so a replay needs no server. Shapes: T policy tokens, I trajectories of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from async_rl.config import Settings
from async_rl.config.teachers import NOTE, TeacherSettings, teachers_of
from async_rl.model.decoder import DTYPES
from async_rl.model.folder import load_model
from async_rl.model.tokenizer import Tokenizer
from async_rl.model.vocabulary import check_vocabulary
from async_rl.trainer.forward import ModelArithmetic, batch_log_probs
from async_rl.trainer.packing import PackedBatch
from async_rl.trainer.ranks import Ranks, free, whole_log_probs
from async_rl.trainer.sharding import load_sharded

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """One of them, ready to be asked."""

    name: str
    settings: TeacherSettings
    model: Model | None
    """None: a server's log-probs are notes on the tokens"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teachers:
    """All teachers of a run. Over ranks `log_probs` is collective."""

    every: Sequence[Teacher]
    arithmetic: ModelArithmetic
    ranks: Ranks

    def log_probs(self, batch: PackedBatch) -> Tensor:
        """The weighted mean of the teachers' log-probs of each token, at the temperature of its turn; NaN where none
        speaks. A recipe that adds w_k (log q_k - log pi) of several teachers adds their mean, weighted so. [T]"""
        total = torch.zeros(batch.num_policy_tokens, dtype=torch.float64, device=batch.log_behaviour.device)
        weight = torch.zeros_like(total)
        of_token = batch.trajectory_of_turn[batch.turn_of_token]
        for teacher in self.every:
            column = self._of(teacher, batch).double()
            if teacher.name in batch.taught:
                column = torch.where(batch.taught[teacher.name][of_token], column, torch.nan)
            known = column.isfinite()
            total += torch.where(known, teacher.settings.weight * column, 0.0)
            weight += teacher.settings.weight * known
        return torch.where(weight > 0, total / weight.clamp(min=1e-300), torch.nan).to(batch.log_behaviour.dtype)

    def _of(self, teacher: Teacher, batch: PackedBatch) -> Tensor:  # [T]
        if teacher.model is None:
            noted = batch.noted.token.get(NOTE + teacher.name)
            return torch.full_like(batch.log_behaviour, torch.nan) if noted is None else noted
        arithmetic = replace(self.arithmetic, dtype=DTYPES[teacher.settings.dtype])
        own = batch_log_probs(teacher.model, batch, arithmetic)
        free(teacher.model)
        return whole_log_probs(own, batch, self.ranks).log_prob


def make_teachers(settings: Settings, arithmetic: ModelArithmetic, ranks: Ranks) -> Teachers:
    """The teachers of a run, their models loaded and frozen. Collective. Raises UserError."""
    tokenizer = Tokenizer.of(settings.model)
    found = []
    for name, chosen in teachers_of(settings.teachers).items():
        model: Model | None = None
        if chosen.path:
            check_vocabulary(f"teachers.{name}.path", Path(chosen.path), tokenizer)
            sharded = settings.trainer.sharding == "full" and ranks.size > 1
            device, dtype = settings.trainer.device, DTYPES[chosen.dtype]
            if sharded:
                model = load_sharded(Path(chosen.path), ranks, device=device, dtype=dtype)
            else:
                model = load_model(chosen.path, device=device)
            model.requires_grad_(False)
        found.append(Teacher(name=name, settings=chosen, model=model))
    return Teachers(every=found, arithmetic=arithmetic, ranks=ranks)
