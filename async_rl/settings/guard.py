"""Settings of the watch for a collapse, and what follows from one."""

from __future__ import annotations

from dataclasses import dataclass, fields

from async_rl.config import setting
from async_rl.errors import UserError


@dataclass(frozen=True)
class GuardSettings:
    """Thresholds: calibrated on trainings of the lab, bench/LAB.md says what they catch and what they cost."""

    alarms: bool = setting(
        True, "watch ESS, entropy, gradient norm and reward for a collapse, and warn (metrics alarm/*, event `alarm`)"
    )
    window: int = setting(
        10,
        "what is compared are medians over so many steps; a run's start, which they are compared with, is as long",
        unit="steps",
    )
    ess: float = setting(
        0.05,
        "alarm below this ess/ratio (as a share of ess/reference), or below 2 effective samples, unless the run began near it; 0: never",
        unit="share of the batch",
    )
    entropy: float = setting(
        1.3,
        "alarm when the entropy is so many times that of the run's start, or a tenth of it with no more reward than then; 0: never",
        unit="times",
    )
    gradient: float = setting(
        20.0,
        "alarm when the gradient norm is so many times that of the run's start, or one over it with no more reward than then; 0: never",
        unit="times",
    )
    reward: float = setting(
        0.5, "alarm when the reward has lost this share of its best, beyond its noise; 0: never", unit="share"
    )
    rollback: bool = setting(
        False,
        "at the first alarm go back, once, to the newest checkpoint from before its first sign, with a lower learning rate",
    )
    rollback_lr_scale: float = setting(0.3, "factor on the learning rate after going back", unit="factor")


def check_guard(guard: GuardSettings, *, checkpoints_every: int, generators: int) -> None:
    """Settings that would do nothing, or promise what cannot be kept. Raises UserError."""
    if not guard.alarms:
        for one in fields(guard):
            if one.name != "alarms" and getattr(guard, one.name) != one.default:
                raise UserError(f"guard.{one.name} does nothing with guard.alarms=false; set guard.alarms=true")
        return
    for name in ("entropy", "gradient"):
        if 0 < (factor := getattr(guard, name)) <= 1:
            raise UserError(f"guard.{name} is {factor:g}; it is a factor above 1, or 0 for never")
    if not guard.rollback:
        if guard.rollback_lr_scale != GuardSettings.rollback_lr_scale:
            raise UserError("guard.rollback_lr_scale does nothing with guard.rollback=false; set guard.rollback=true")
        return
    if not any((guard.ess, guard.entropy, guard.gradient, guard.reward)):
        raise UserError("guard.rollback=true, but every alarm is off (guard.ess, guard.entropy, ... are 0); set one")
    if not checkpoints_every:
        raise UserError(
            "guard.rollback=true, but with checkpoint.every=0 there is no checkpoint to go back to before the end of the "
            "run; set checkpoint.every"
        )
    if not generators:
        raise UserError(
            "guard.rollback=true, but with generator.count=0 nobody would generate behind it: going back starts all "
            "processes anew, and generators that joined by themselves are told to end; set generator.count=1 or more, or "
            "guard.rollback=false"
        )
