"""bench/kernels.py, the rows for a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peak import peak_bytes
from torch import Tensor

from async_rl_kernels import linear_logprob, reference
from async_rl_kernels.product import linear

TOKENS, VOCABULARY = 4096, 32_768
WIDTHS = (256, 512, 1024)
BUDGET_S = 240
"""of the whole section"""

Way = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def logprob_cpu(rounds: int) -> dict[str, Any]:
    """linear_logprob, forward and backward, against logits in full, 4k tokens x 32k vocabulary, float32."""
    ways: dict[str, Way] = {"ours": ours, "definition": definition, "full": full, "full_fast_products": full_fast}
    end = time.monotonic() + BUDGET_S
    result: dict[str, Any] = {}
    for width in WIDTHS:
        if time.monotonic() > end:
            result[str(width)] = "not measured: no time left"
            continue
        values = make(TOKENS, width, VOCABULARY)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            if number and time.monotonic() > end:
                break
            for name, way in ways.items():
                seconds[name].append(cpu_seconds(way, values))
        memory = {name: extra_bytes(way, values) for name, way in ways.items()}
        result[f"hidden {width}"] = {
            "seconds": {name: round(statistics.median(times), 2) for name, times in seconds.items()},
            "peak_mb": {name: round(value / 1e6) for name, value in memory.items()},
            "others_over_ours_time": {name: ratio(seconds[name], seconds["ours"]) for name in ways if name != "ours"},
            "others_over_ours_peak": {
                name: round(value / memory["ours"], 1) for name, value in memory.items() if name != "ours"
            },
        }
    return result


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 2)


def make(tokens: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=random) / width**0.5).requires_grad_()
    return (
        hidden,
        weight,
        torch.randint(vocabulary, (tokens,), generator=random),
        torch.randn(tokens, generator=random),
    )


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, up: Tensor) -> None:
    (linear_logprob(hidden, weight, targets).log_prob * up).sum().backward()


def definition(hidden: Tensor, weight: Tensor, targets: Tensor, up: Tensor) -> None:
    """As ours answers entropy and sum of squares too."""
    (reference.linear_logprob(hidden, weight, targets)[0] * up).sum().backward()


def full(hidden: Tensor, weight: Tensor, targets: Tensor, up: Tensor) -> None:
    """Log-probs only, with the fewest operations."""
    logits = hidden @ weight.T
    log_prob = torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)
    (log_prob * up).sum().backward()


def full_fast(hidden: Tensor, weight: Tensor, targets: Tensor, up: Tensor) -> None:
    """The same with the products that ours uses, and the gradient of the logits formed in place."""
    with torch.no_grad():
        tile = torch.log_softmax(linear(hidden, weight), -1)
        tile.exp_().mul_(-up[:, None]).scatter_add_(1, targets[:, None], up[:, None])
        hidden.grad, weight.grad = linear(tile, weight.T), linear(tile.T, hidden.T)


def cpu_seconds(way: Way, values: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    values[0].grad = values[1].grad = None
    started = time.process_time()
    way(*values)
    return time.process_time() - started


def extra_bytes(way: Way, values: tuple[Tensor, Tensor, Tensor, Tensor]) -> int:
    """Bytes that torch holds at most, less the two gradients."""
    values[0].grad = values[1].grad = None
    return peak_bytes(lambda: way(*values)) - sum(value.numel() * value.element_size() for value in values[:2])


SECTIONS = {"logprob_cpu": logprob_cpu}
