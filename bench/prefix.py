"""Shared prefixes: trained tokens a second with the prompt of a group computed once, against once for each sample.

    python bench/prefix.py [--repeats 5] [--models small,smollm2] [--shapes 512/64/8,45/15/4,45/15/8,45/15/4/24]
                           [--ways plain,exact]

For each shape (prompt / answer / samples of a group / tokens of the prompt that all groups have in common, as a system
prompt) and each model, forward and backward over the same batch in three layouts, in turns, one thread, float32,
random weights:
- shared: as the trainer does;
- unshared: each trajectory by itself (trainer.shared_prefixes=false);
- full (plain only): unshared, and every row of the last layer is computed, as before those that predict nothing were
  left out.
Ways: plain is the log-probs of the policy tokens and the gradient of a weighted sum of them, as in recipes without
exact norms; exact is that with the norm of each trajectory's gradient and the optimal baseline (exact OPOB). Objective
and optimizer, the same for all, are left out.
Seconds are processor time of this one-threaded process, medians. `ratio` (unshared / shared) and `ratio_full` are
medians of the ratios within a round, which are those of trained tokens a second. `bound` and `bound_full` are what
counting the products of matrices allows: rows x elements of each layer (what lies behind the last attention: rows that
predict only), the head at policy tokens, and attention's pairs of tokens; forward, input gradient and weight gradient
alike. With exact norms the input gradient takes the unshared number of rows in both layouts, since a gradient through
the prefix is each trajectory's own, and so do the norms (not counted: they are no product of the ordinary kind).
`reached` is ratio / bound. `peak_mb` is the most that torch held at once above what was there before.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import opob
import torch
from opob import ARITHMETIC, gradient_of, owner_of, seconds_in_turns, step_peak
from torch import Tensor

from async_rl.model.architecture import DecoderConfig
from async_rl.model.decoder import Decoder
from async_rl.trainer.build import decoder_cost
from async_rl.trainer.forward import log_probs
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trajectory import Trajectory, Turn, VersionSpan

MODELS = {
    "small": DecoderConfig(
        family="qwen3", vocabulary=64, hidden=192, intermediate=512, layers=2, heads=6, kv_heads=3, head_dim=32,
        max_context=1024, qk_norm=True, tied=True,
    ),
    "smollm2": DecoderConfig(
        family="llama", vocabulary=49152, hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64,
        max_context=2048, tied=True,
    ),
}  # fmt: skip
MODELS["smollm2_12"] = replace(MODELS["smollm2"], layers=12)
"""12 of its 30 layers: at prompts of 512 tokens the unshared layout of all would need 7 GB"""
GROUPS = {"small": {512: 2, 45: 8}, "smollm2": {512: 1, 45: 4}, "smollm2_12": {512: 1, 45: 4}}
"""model -> prompt -> groups of a batch"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    prompt: int
    answer: int
    samples: int
    common: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", default="small,smollm2")
    parser.add_argument("--shapes", default="512/64/8,45/15/4,45/15/8,45/15/4/24")
    parser.add_argument("--ways", default="plain,exact")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.models.split(","):
        model = Decoder(MODELS[name])
        model.initialise(0)
        for words in given.shapes.split(","):
            shape = Shape(
                **dict(zip(("prompt", "answer", "samples", "common"), map(int, words.split("/")), strict=False))
            )
            for way in given.ways.split(","):
                found = measure(model, shape, GROUPS[name].get(shape.prompt, 1), way, given.repeats)
                print(json.dumps({"model": name, "shape": words, "way": way, **found}), flush=True)


def measure(model: Decoder, shape: Shape, groups: int, way: str, repeats: int) -> dict[str, Any]:
    made = trajectories(shape, groups, model.config.vocabulary)
    layouts = {name: pack_batch(made, micro_batch_tokens=1 << 20, shared=name == "shared") for name in LAYOUTS[way]}
    steps: dict[str, Callable[[], Tensor]] = {name: partial(WAYS[way], model, batch) for name, batch in layouts.items()}
    if "full" in layouts:
        steps["full"] = partial(plain, model, every_row(layouts["full"]))
    rounds = seconds_in_turns(model, steps, repeats)
    ratios, bounds = {}, bound(model, shape, groups, exact=way == "exact")
    for name in layouts.keys() - {"shared"}:
        ratios[name] = statistics.median(a / b for a, b in zip(rounds[name], rounds["shared"], strict=True))
    trained = shape.answer * shape.samples * groups
    middle = {name: statistics.median(values) for name, values in rounds.items()}
    peaks = {name: round(step_peak(model, steps[name]) / 1e6, 1) for name in ("shared", "unshared")}
    return {
        "rows": {name: len(batch.micro_batches[0].tokens) for name, batch in layouts.items()},
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "trained_tokens_per_s": {name: round(trained / value, 1) for name, value in middle.items()},
        "ratio": round(ratios["unshared"], 2),
        "bound": round(bounds["unshared"], 2),
        "reached": round(ratios["unshared"] / bounds["unshared"], 2),
        **{
            f"{what}_full": round(of["full"], 2)
            for what, of in (("ratio", ratios), ("bound", bounds))
            if "full" in ratios
        },
        "peak_mb": peaks,
        "difference": difference(model, steps),
    }


def bound(model: Decoder, shape: Shape, groups: int, *, exact: bool) -> dict[str, float]:
    """Multiplications of the batch in a layout as a multiple of those shared."""
    c = model.config
    p, s, g = shape.prompt, shape.answer, shape.samples
    cost = decoder_cost(c)
    layer = cost.per_token // c.layers
    behind = 2 * (c.heads * c.head_dim * c.hidden + 3 * c.hidden * c.intermediate)  # o_proj and the MLP

    def products(rows: int, predicting: int, pairs: int) -> int:
        left_out = behind * (rows - predicting)
        return layer * c.layers * rows - left_out + cost.per_policy_token * predicting + cost.per_pair * pairs

    def pairs(tokens: int) -> int:
        return tokens * (tokens + 1) // 2

    predicting, samples = groups * g * s, groups * g
    common = (groups - 1) * shape.common  # computed once for all groups
    full = products(samples * (p + s), samples * (p + s), samples * pairs(p + s))
    full -= cost.per_policy_token * (samples * (p + s) - predicting)
    unshared = products(samples * (p + s), predicting, samples * pairs(p + s))
    rows = groups * (p + g * s) - common
    own = pairs(p + s) - pairs(p)  # of an answer
    shared = products(rows, predicting, groups * (pairs(p) + g * own) - (groups - 1) * pairs(shape.common))
    if exact:
        shared = (2 * shared + unshared) // 3
    return {"unshared": unshared / shared, "full": full / shared}


def every_row(batch: PackedBatch) -> PackedBatch:
    """The batch with the hidden states of all rows computed to the end."""
    return replace(
        batch,
        micro_batches=tuple(
            replace(micro, predicting=torch.arange(len(micro.tokens)), place=micro.predictors)
            for micro in batch.micro_batches
        ),
    )


def plain(model: Decoder, batch: PackedBatch) -> Tensor:
    weights = coefficients(batch)
    for micro in batch.micro_batches:
        (-(weights[micro.policy] * log_probs(model, micro, ARITHMETIC).log_prob).sum()).backward()
    return weights


def exact(model: Decoder, batch: PackedBatch) -> Tensor:
    return opob.exact(model, batch, coefficients(batch).abs())


WAYS: dict[str, Callable[[Decoder, PackedBatch], Tensor]] = {"plain": plain, "exact": exact}
LAYOUTS = {"plain": ("shared", "unshared", "full"), "exact": ("shared", "unshared")}


def coefficients(batch: PackedBatch) -> Tensor:  # [policy tokens]
    random = torch.Generator().manual_seed(0)
    return (torch.randn(batch.num_trajectories, generator=random) / batch.num_policy_tokens)[owner_of(batch)]


def difference(model: Decoder, steps: dict[str, Callable[[], Tensor]]) -> float:
    """Relative difference of both gradients, in float32."""
    found = []
    for step in steps.values():
        model.zero_grad(set_to_none=True)
        step()
        found.append(gradient_of(model))
    return float(f"{float((found[0] - found[1]).norm() / found[1].norm()):.1e}")


def trajectories(shape: Shape, groups: int, vocabulary: int) -> list[Trajectory]:
    random = np.random.default_rng(0)
    common = random.integers(0, vocabulary, shape.common)
    made = []
    for group in range(groups):
        prompt = np.concatenate([common, random.integers(0, vocabulary, shape.prompt - shape.common)])
        for sample in range(shape.samples):
            tokens = np.concatenate([prompt, random.integers(0, vocabulary, shape.answer)]).astype(np.int32)
            trajectory = Trajectory(
                group=group, sample=sample, problem=0, split="train", seed=0, tokens=tokens,
                log_behaviour=np.zeros(len(tokens), np.float32), turns=(Turn(start=shape.prompt, length=shape.answer),),
                versions=(VersionSpan(version=0, start=0, end=len(tokens)),), reward=float(random.integers(0, 2)),
                ended="finished",
            )  # fmt: skip
            made.append(trajectory)
    return made


if __name__ == "__main__":
    main()
