"""What can be chosen of factors and masks after the advantage, and of the band around past entropy. Plain settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeSettings:
    """Factors on the advantage of a token or turn, fixed numbers without a gradient."""

    probability: float = setting(
        0.0, "a: factor 1 - a + a pi, which damps tokens of low probability (AR-Lopti: 0.3); 0 is off", min=0, max=1
    )
    focal: float = setting(
        0.0, "c: factor (1 - pi)^c, which damps tokens of high probability (RL-PLUS: 0.5); 0 is off", min=0
    )
    turn_entropy: float = setting(
        0.0,
        "k: factor exp(-k H) of a turn, divided by its mean over the batch's turns, with H the turn's mean entropy "
        "scaled to 0..1 over the batch (EMPG); 0 is off",
        min=0,
    )
    entropy_bonus: float = setting(
        0.0,
        "alpha: min(alpha H, |A| / entropy_bound) of a token is added to its advantage (0.4 in the paper); 0 is off",
        min=0,
    )
    entropy_bound: float = setting(
        2.0, "kappa of entropy_bonus: what the advantage stays above is 1 - 1 / kappa", above=1
    )
    difficulty: float = setting(
        0.0,
        "k: with p the group's share of right answers factor low + (high - low) / (1 + exp(k (p - centre))) where A > "
        "0, and the same of 1 - p where it is not (GRPO-LEAD: 10); 0 is off",
        min=0,
    )
    difficulty_low: float = setting(0.4, "difficulty: factor of what is easy", min=0)
    difficulty_high: float = setting(1.5, "difficulty: factor of what is hard", min=0)
    difficulty_centre: float = setting(0.75, "difficulty: share of right answers in the middle", min=0, max=1)
    future: float = setting(
        0.0,
        "half-life of the sum of later log-ratios, whose exp is a factor between 1 and 1 + future_clip (FIPO: 32); 0 "
        "is off",
        unit="tokens",
        min=0,
    )
    future_clip: float = setting(0.2, "future: how far above 1 the factor goes", min=0)
    future_largest: float = setting(10.0, "future: tokens of a larger ratio count for nothing in the sum", above=1)
    future_safe: float = setting(
        4.0, "future: tokens with A < 0 of a larger ratio have a factor between 0.8 and 1", above=1
    )
    positive_entropy: bool = setting(
        False, "fresh tokens with A > 0 have the factor exp(mean entropy of the fresh tokens) (SRFT)"
    )
    clarity: float = setting(
        0.0, "z: z exp(-k H of the next turn) is added, then the mean over the batch's turns taken off (EMPG); 0 is off"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSettings:
    """Tokens or whole turns of kept trajectories without policy gradient; they stay in the denominators."""

    entropy_share: float = setting(
        1.0, "share of the tokens that is trained: those of the highest entropy (80/20: 0.2)", above=0, max=1
    )
    entropy_scope: Literal["batch", "trajectory"] = setting("batch", "entropy_share: among which tokens")
    turn_entropy_share: float = setting(
        1.0, "share of the batch's turns that is trained: those of the highest mean entropy (DART)", above=0, max=1
    )
    probability_below: float = setting(
        1.0, "tokens of a probability above are left out (SPO-chain's mask); 1 is off", above=0, max=1
    )
    binary_kl: float = setting(
        0.0,
        "tokens are left out where the KL of this token or another, between the proximal policy and mu, is above in "
        "either direction (KPop); 0 is off",
        unit="nats",
        min=0,
    )
    advantage_sigma: float = setting(
        0.0,
        "tokens are left out whose advantage is further from the batch's mean (StableReinforce: 3); 0 is off",
        unit="stds",
        min=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BandSettings:
    """EPO's smoothing: a penalty on tokens whose entropy leaves a band around the mean of the steps so far, weight
    times the square of the distance. (The released code has a constant in its place, which has no gradient.)"""

    weight: float = setting(0.0, "of the penalty; 0 is off", min=0)
    low: float = setting(0.8, "lower end of the band", unit="of the past mean", min=0, below=1)
    high: float = setting(1.2, "upper end of the band", unit="of the past mean", above=1)
