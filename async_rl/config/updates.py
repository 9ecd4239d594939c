"""Settings of what becomes of a batch: how often it is passed over, in which parts, and when that ends early; and of
the reference policy, which may follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting


@dataclass(frozen=True)
class UpdatesSettings:
    """The optimizer updates that a step takes on its batch."""

    epochs: int = setting(
        1,
        "passes over each batch; with more than one, the proximal policy (the one at the start of the step) is no "
        "longer the one that is updated",
        unit="passes",
        min=1,
        max=10_000,
    )
    minibatches: int = setting(
        1,
        "parts of whole groups, as equal as can be and drawn anew for each pass, each with an optimizer update of its "
        "own; denominators, ESS, whitening and rejected trajectories are those of the part",
        unit="parts of the batch",
        min=1,
        max=1_000_000,
    )
    kl_stop: float = setting(
        0.0,
        "the rest of a batch's updates is left out when the KL of `kl_target` to the policy, on the tokens of the "
        "update that would follow, is above this; the first update is always taken; 0 is off",
        unit="nats per token",
        min=0,
    )
    kl_target: Literal["start", "behaviour"] = setting(
        "start", "kl_stop: the policy at the start of the step, or the one that sampled"
    )


@dataclass(frozen=True)
class ReferenceSettings:
    """The reference policy of recipes that have one: the initial model, unless it follows the policy."""

    every: int = setting(
        0, "the policy becomes the reference whenever this many steps were trained; 0: never", unit="steps", min=0
    )
    average: float = setting(
        0.0,
        "after each step the reference is this share of itself and the rest of the policy (moving average); 0 is off",
        unit="share",
        min=0,
        below=1,
    )
