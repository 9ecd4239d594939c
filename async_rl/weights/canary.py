"""Evidence of the weights that a process holds: checksums of sampled elements, and log-probs on a probe.

The trainer computes the evidence of each version it publishes, a generator that of the weights in its engine after each
load. The checksums show which tensors differ from those published; the probe shows whether the engine computes with
them what the trainer computes. Nothing here depends on processes or messages.

The sampled elements change with the version, so that an element that one version's samples miss is sampled under
another. A fault in fewer elements of a tensor than lie between two samples stays unseen until some version's samples
include one of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from async_rl.model.tokenizer import problem_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from async_rl.model.tokenizer import Tokenizer
    from async_rl.task.protocol import Task

SAMPLES = 64
"""elements sampled of one tensor under one version; smaller tensors are checked whole"""
PROBE_TOKENS = 64
"""tokens of a probe"""
BUNCH_BYTES = 1 << 28
"""bytes of tensors whose checksums are computed together"""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "fp8": 0.2}
"""mean difference (`Comparison.mean_difference`) that the engine's dtype explains, nats. Measured in bfloat16: 0.001
to 0.005 for two layers, up to 0.02 for 16 layers with sharp answers; in float32 2e-6. FP8: 0.06,
computed for SmolLM2-135M with its matrices and their inputs rounded (docs/howto/gpu.md)"""
_ENOUGH_KINDS = 16
"""a probe with fewer different tokens does not test attention: equal values average to themselves"""
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def tolerance_of(dtype: str, quantization: str = "none") -> float:
    """Of the mean difference that an engine's arithmetic explains, nats."""
    return TOLERANCE[dtype if quantization == "none" else quantization]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Checksums and log-probs of one version of the weights, as one process holds them."""

    version: int
    digests: Mapping[str, int]
    """tensor name -> checksum of its name, shape, dtype and sampled elements, 64 bits"""
    split: Collection[str] = ()
    """tensors that no process of this holder has whole; they are not compared"""
    log_probs: Sequence[float]
    """of all tokens of the probe but the first, nats"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The differences between expected evidence and found evidence."""

    tensors: tuple[str, ...]
    """tensors whose checksums differ, or that only one side has"""
    num_tensors: int
    max_difference: float
    """largest difference of a log-prob on the probe, nats; infinite when one is no number or the lengths differ"""
    mean_difference: float
    """mean of |difference| / max(1, |expected log-prob|), nats: rounding errors grow with the log-prob, and a probe has
    tokens that are far less probable than those that the policy samples"""
    worst: int
    """index of the log-prob with the largest difference"""
    expected: float
    """log-prob there, nats"""
    found: float

    def wrong(self, tolerance: float) -> bool:
        """True when a tensor differs, or the mean difference exceeds `tolerance`, nats."""
        return bool(self.tensors) or not self.mean_difference <= tolerance


def fingerprint(tensors: Mapping[str, Tensor], version: int, dtype: torch.dtype | None = None) -> dict[str, int]:
    """A 64-bit checksum of the name, shape, dtype and sampled elements of each tensor; `dtype`: after a cast to it (the
    engine's)."""
    import torch

    names = sorted(tensors)
    sizes = np.array([tensors[name].numel() for name in names], dtype=np.int64)
    device = tensors[names[0]].device if names else None
    index = torch.from_numpy(sampled_elements(sizes, version)).to(device)
    parts = []
    for name, row in zip(names, index, strict=True):
        tensor = tensors[name].detach()
        taken = tensor.reshape(-1) if tensor.numel() <= SAMPLES else torch.take(tensor, row)
        parts.append(taken.to(dtype or tensor.dtype))
    return {
        name: checksum(name, tensors[name].shape, str(part.dtype), content)
        for name, part, content in zip(names, parts, bytes_of(parts), strict=True)
    }


def bytes_of(parts: Sequence[Tensor]) -> list[bytes]:
    """The bytes of each tensor, none of them 0-dimensional. One copy from their device, not one a tensor."""
    import torch

    flat = [part.contiguous().view(torch.uint8) for part in parts]
    content = torch.cat(flat).cpu().numpy().tobytes() if flat else b""
    ends = list(accumulate(len(part) for part in flat))
    return [content[begin:end] for begin, end in pairwise([0, *ends])]


def checksum(name: str, shape: Sequence[int], dtype: str, content: bytes) -> int:
    """Of one tensor; `content`: its sampled elements, in order."""
    described = f"{name} {list(shape)} {dtype} ".encode()
    return int.from_bytes(hashlib.blake2b(described + content, digest_size=8).digest(), "little")


def in_bunches(tensors: Iterable[tuple[str, Tensor]], most_bytes: int = BUNCH_BYTES) -> Iterator[dict[str, Tensor]]:
    """Group tensors that come one after another, so that many are checked at once and not all are held."""
    bunch: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        bunch[name] = tensor
        held += tensor.numel() * tensor.element_size()
        if held >= most_bytes:
            yield bunch
            bunch, held = {}, 0
    if bunch:
        yield bunch


def sampled_places(size: int, version: int) -> NDArray[np.int64]:  # [at most SAMPLES]
    """Flat indices of the elements of one tensor of this size that are in its checksum."""
    return np.arange(size) if size <= SAMPLES else sampled_elements(np.array([size]), version)[0]


def sampled_elements(sizes: NDArray[np.int64], version: int) -> NDArray[np.int64]:  # [tensors, SAMPLES]
    """Flat indices of the sampled elements of tensors with these sizes [tensors]: one in each of SAMPLES equal parts of
    a tensor. A golden-ratio sequence chooses the place in the part, so that neither samples nor versions fall on one
    column."""
    part = np.arange(SAMPLES)
    within = ((version * SAMPLES + part) * _GOLDEN) % 1.0
    return ((part + within) * (sizes[:, None] / SAMPLES)).astype(np.int64).clip(0, (sizes[:, None] - 1).clip(0))


def probe_tokens(task: Task, tokenizer: Tokenizer, max_context: int) -> tuple[int, ...]:
    """At most PROBE_TOKENS tokens, the same in every process of a run: the prompts of the task's first problems; where
    these have too few different tokens, the second half is spread over the vocabulary."""
    problems = task.problems("train")
    tokens: list[int] = []
    for i in range(min(len(problems), PROBE_TOKENS)):
        if len(tokens) >= PROBE_TOKENS:
            break
        tokens += problem_tokens(problems[i], tokenizer)
    tokens = tokens[:PROBE_TOKENS]
    if len(set(tokens)) < _ENOUGH_KINDS:
        tokens = tokens[: PROBE_TOKENS // 2]
        spread = ((i * _GOLDEN) % 1.0 for i in range(1, PROBE_TOKENS - len(tokens) + 1))
        known = min(tokenizer.vocab_size, tokenizer.embedded or tokenizer.vocab_size)
        tokens += [int(x * known) for x in spread]
    return tuple(tokens[:max_context])


def compare(expected: Evidence, found: Evidence) -> Comparison:
    """Compare the evidence of one version, on which the sampled elements depend. Tensors that are split in the process
    behind `found` are left to the probe; if that would be all of them, they count as different."""
    assert expected.version == found.version
    every = expected.digests.keys() | found.digests.keys()
    names = sorted(every - (set(found.split) - found.digests.keys())) or sorted(every)
    tensors = tuple(n for n in names if expected.digests.get(n) != found.digests.get(n))
    if len(expected.log_probs) != len(found.log_probs):
        difference = [math.inf]
    else:
        difference = [
            abs(e - f) if math.isfinite(e) and math.isfinite(f) else math.inf
            for e, f in zip(expected.log_probs, found.log_probs, strict=True)
        ]
    worst = max(range(len(difference)), key=difference.__getitem__, default=0)
    return Comparison(
        tensors=tensors,
        num_tensors=len(names),
        max_difference=max(difference, default=0.0),
        mean_difference=sum(_scaled(difference, expected.log_probs)) / max(1, len(difference)),
        worst=worst,
        expected=_at(expected.log_probs, worst),
        found=_at(found.log_probs, worst),
    )


def _scaled(difference: Sequence[float], log_probs: Sequence[float]) -> list[float]:
    if math.inf in difference:
        return list(difference)
    return [d / max(1.0, abs(value)) for d, value in zip(difference, log_probs, strict=True)]


def _at(values: Sequence[float], index: int) -> float:
    return values[index] if index < len(values) else math.nan
