"""Settings of the value function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting


@dataclass(frozen=True)
class CriticSettings:
    """The value function, for recipes that have one."""

    kind: Literal["head", "model"] = setting(
        "head", "value head on the policy's last hidden state, or a separate model of the same architecture"
    )
    learning_rate: float = setting(
        1e-3, "AdamW learning rate of the critic; 0: it stays as `path` has it (a frozen critic)", min=0
    )
    warmup_steps: int = setting(
        20, "first steps that train the critic alone, on returns of the frozen policy", unit="steps", min=0
    )
    epochs: int = setting(
        1,
        "updates of the critic for each of the policy, all towards the same targets",
        unit="updates",
        min=1,
        max=10_000,
    )
    path: str = setting("", "checkpoint (runs/NAME/checkpoints/step_...) whose critic this one begins as")
    target_average: float = setting(
        0.0,
        "targets are formed with a slow copy of the critic (target network), which after each of its updates is this "
        "share of itself and the rest of the critic; 0: with the critic itself",
        unit="share",
        min=0,
        below=1,
    )
    loss: Literal["squared", "two_hot", "hl_gauss"] = setting(
        "squared",
        "squared error of one number; or cross-entropy of a distribution over `bins`, whose mean is the value, with "
        "the target spread over the two nearest atoms (two_hot) or as a normal distribution of 0.75 bins (hl_gauss)",
    )
    bins: int = setting(51, "two_hot, hl_gauss: atoms, or bins, of the distribution", min=2, max=10_000)
    low: float = setting(-1.0, "two_hot, hl_gauss: smallest return; targets below count as this")
    high: float = setting(1.0, "two_hot, hl_gauss: largest return; targets above count as this")
