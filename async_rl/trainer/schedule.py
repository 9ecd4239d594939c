"""The learning rate before a recipe's factors: warm-up, then constant, linear or cosine."""

from __future__ import annotations

from math import cos, pi

from async_rl.settings import OptimizerSettings


def base_learning_rate(step: int, *, steps: int, optimizer: OptimizerSettings, given_up: int = 0) -> float:
    """Learning rate of training step `step` (0-based) of `steps`.

    Warm-up rises linearly and reaches the full rate at step `warmup_steps`; the first step already
    moves (rate / (warmup_steps + 1)). `given_up`: steps that a rollback took back: the warm-up goes on where
    those weights had been in it, what follows it ends with the run.
    """
    peak = optimizer.learning_rate
    if step - given_up < optimizer.warmup_steps:
        return peak * (step - given_up + 1) / (optimizer.warmup_steps + 1)
    span = max(1, steps - optimizer.warmup_steps)
    done = min(1.0, (step - optimizer.warmup_steps) / span)
    match optimizer.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - (1.0 - optimizer.final_share) * done
        case "cosine":
            share = optimizer.final_share + (1.0 - optimizer.final_share) * 0.5 * (1.0 + cos(pi * done))
    return peak * share
