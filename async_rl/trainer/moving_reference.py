"""The reference policy that follows the one that is trained (settings.reference)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from async_rl.config import ReferenceSettings

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model
    from async_rl.model.lora import WithoutAdapters


@torch.no_grad()
def move_reference(
    reference: Model | WithoutAdapters | None, model: Model, settings: ReferenceSettings, version: int
) -> None:
    """Once a step, when the policy has `version`: bring the reference nearer to it, or make it that policy.

    Elementwise, so that of a sharded model every rank moves its part.
    """
    assert isinstance(reference, nn.Module), "with adapters the reference is the model without them"
    policy = dict(model.named_parameters())
    due = bool(settings.every) and version % settings.every == 0
    for name, parameter in reference.named_parameters():
        if settings.average:
            parameter.mul_(settings.average).add_(policy[name].detach(), alpha=1 - settings.average)
        if due:
            parameter.copy_(policy[name].detach())
