"""bench/kernels.py, the rows for a GPU.

What the rows are to reach, and the arithmetic behind it (H200: 790 TFLOP/s and 4.3 TB/s were seen in bfloat16):
- linear_logprob, 32k x 4096 x 151,936: a product is 2 x 32768 x 4096 x 151936 = 40.8 TFLOP, 52 ms. Three of them
  155 ms; logits a second time makes 207 ms, 0.75 of the rate of three. Between the products each of the 5.0 G logits
  is read once for the sums (4 bytes) and once for the gradient (4), which is written (2): 50 GB, 12 ms (17 ms on an
  H100), hence 0.71 at best. Memory: a tile of logits in float32 (8192 x 4096: 134 MB), its gradient in bfloat16 (67),
  the weight gradient of its ids (67), the hidden states' gradient in float32 (537): 805 MB.
- weight_norm_squares, 32k x 4096 x 11008: 2.95 TFLOP, 3.7 ms for the plain product of the weight gradient. Norms by
  Gram matrices of 64 segments of 512 rows: 10 pairs of blocks of 128 rows, 64 x 10 x 2 x 128^2 x 15104 = 0.32 TFLOP,
  0.11 of it. Norms and one product, which is what the trainer takes, should need 1.2 plain products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import opob
import torch
from torch import Tensor

from async_rl.model.architecture import DecoderConfig
from async_rl.model.decoder import Decoder
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl_kernels import linear_logprob, reference
from async_rl_kernels.segment_gradient import Segments, segment_sums, weight_norm_squares

Way = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """A device, and the sizes measured on it."""

    device: str = "cuda"
    head: tuple[int, int, int] = (32_768, 4096, 151_936)
    """tokens, hidden, vocabulary"""
    layer: tuple[int, int, int] = (32_768, 4096, 11_008)
    """tokens, in, out"""
    segments: int = 64
    copied: int = 1 << 27
    """elements of the copy"""
    square: int = 8192
    layers: int = 28
    """of the model of the OPOB step; 28 layers of this width are 1.5B parameters"""
    width: int = 1536
    vocabulary: int = 151_936
    trajectories: int = 64
    answer: int = 480
    """tokens"""

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def seconds(way: Way, where: Where) -> float:
    """One run, the device idle before and after."""
    where.synchronize()
    started = time.perf_counter()
    way()
    where.synchronize()
    return time.perf_counter() - started


OTHERS = ("liger", "full", "compiled")
"""not ours: if one fails, the table says so and goes on"""


def in_turns(ways: dict[str, Way], rounds: int, where: Where, budget_s: float) -> dict[str, Any]:
    """Median milliseconds and extra memory of each way; what runs out of memory or cannot be had says so."""
    end = time.monotonic() + budget_s
    found: dict[str, Any] = {}
    times: dict[str, list[float]] = {}
    for name, way in ways.items():
        if time.monotonic() > end:
            found[name] = "not measured: no time left"
            continue
        try:
            found[name] = {"peak_mb": peak_mb(way, where)}  # warms up too
            times[name] = []
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
        except (ImportError, RuntimeError) as error:
            if name not in OTHERS:
                raise
            found[name] = f"not measured: {str(error).splitlines()[0]}"
        free(where)
    for number in range(rounds):
        if number and time.monotonic() > end:
            break
        for name in times:
            times[name].append(seconds(ways[name], where))
            free(where)
    for name, values in times.items():
        found[name]["ms"] = max(0.001, round(1000 * statistics.median(values), 3))
    return found


def peak_mb(way: Way, where: Where) -> int:
    """Above what was there before, gradients that are the result included."""
    if where.device != "cuda":
        way()
        return 0
    free(where)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6)


def free(where: Where) -> None:
    if where.device == "cuda":
        torch.cuda.empty_cache()


def randn(*shape: int, where: Where, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=where.device, dtype=dtype)


# The sections.


def ceilings(rounds: int, where: Where | None = None) -> dict[str, Any]:
    """What this device reaches in a large product and a large copy; the ratios below are to products of their own."""
    where = where or Where()
    n = where.square
    a, b = randn(n, n, where=where), randn(n, n, where=where)
    source = randn(where.copied, where=where)
    target = torch.empty_like(source)
    found = in_turns({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds, where, 20)
    return found | {
        "tflops": round(2 * n**3 / found["product"]["ms"] / 1e9, 1),
        "copy_gb_s": round(2 * source.nbytes / found["copy"]["ms"] / 1e6),
    }


def logprob(rounds: int, where: Where | None = None, budget_s: float = 120) -> dict[str, Any]:
    """Forward and backward of linear_logprob. Target: rate_of_three_products >= 0.55, extra_mb <= 1000."""
    where = where or Where()
    tokens, width, vocabulary = where.head
    hidden = randn(tokens, width, where=where).requires_grad_()
    weight = (randn(vocabulary, width, where=where) / width**0.5).detach().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=where.device)
    up = randn(tokens, where=where, dtype=torch.float32)

    def products() -> None:
        """Three products, with logits rounded to bfloat16 in between, as torch does them."""
        with torch.no_grad():
            tile = hidden @ weight.T
            _ = tile @ weight
            _ = tile.T @ hidden

    def ours() -> None:
        torch.autograd.grad((linear_logprob(hidden, weight, targets).log_prob * up).sum(), (hidden, weight))

    def full() -> None:
        found = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None]).squeeze(-1)
        torch.autograd.grad((found * up).sum(), (hidden, weight))

    compiled = torch.compile(lambda h, w, y: reference.linear_logprob(h, w, y)[0])

    def compiled_definition() -> None:
        torch.autograd.grad((compiled(hidden, weight, targets).float() * up).sum(), (hidden, weight))

    def liger() -> None:
        """Cross entropy with weights of 1: it has no upstream gradient for each token."""
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
        torch.autograd.grad(loss, (hidden, weight))

    ways = {"ours": ours, "products": products, "liger": liger, "full": full, "compiled": compiled_definition}
    if where.device != "cuda":
        del ways["compiled"], ways["liger"]
    found = in_turns(ways, rounds, where, budget_s)
    gradients = (hidden.nbytes + weight.nbytes) / 1e6
    for name, row in found.items():
        if isinstance(row, dict) and name != "products":
            row["extra_mb"] = round(row["peak_mb"] - gradients)
            row["rate_of_three_products"] = ratio(found["products"], row)
    return found


def norms(rounds: int, where: Where | None = None) -> dict[str, Any]:
    """Norms of each segment's weight gradient beside the plain product. Target: over_plain <= 0.2 (equal lengths)."""
    where = where or Where()
    rows, width, out = where.layer
    a, g = randn(rows, width, where=where), randn(rows, out, where=where)
    found: dict[str, Any] = {}
    for name, lengths in {"equal": equal(rows, where.segments), "ragged": ragged(rows, where.segments)}.items():
        segments = Segments(lengths, where.device)
        ways: dict[str, Way] = {"plain": lambda: g.T @ a, "norms": lambda s=segments: weight_norm_squares(a, [g], s)}
        rows_of = in_turns(ways, rounds * 3, where, 20)
        rows_of["norms"]["over_plain"] = ratio(rows_of["norms"], rows_of["plain"])
        found[name] = rows_of
    return found


def head_sums(rounds: int, where: Where | None = None) -> dict[str, Any]:
    """Gradients of the queries' norm, summed over heads and each segment: in pieces, as the trainer does; as a product
    with one-hot rows, in which a NaN of one segment reaches all; one bag a segment; beside reading the values once."""
    where = where or Where()
    rows, width, _ = where.layer
    heads = max(1, width // 128)
    values = randn(rows * heads, 128, where=where, dtype=torch.float32)
    segments = Segments(equal(rows, where.segments), where.device)
    hot = torch.nn.functional.one_hot(segments.ids, len(segments)).float().T.contiguous()
    order = torch.arange(rows, device=where.device)
    by_row = values.unflatten(0, (-1, heads))
    ways: dict[str, Way] = {
        "read": lambda: values.sum(),
        "pieces": lambda: segment_sums(values, segments),
        "one_hot": lambda: hot @ by_row.sum(1),
        "bags": lambda: torch.nn.functional.embedding_bag(order, by_row.sum(1), segments.starts, mode="sum"),
    }
    found = in_turns(ways, rounds * 3, where, 20)
    for name in ("pieces", "one_hot", "bags"):
        found[name]["over_read"] = ratio(found[name], found["read"])
    return found


def opob_step(rounds: int, where: Where | None = None, budget_s: float = 120) -> dict[str, Any]:
    """A whole step, optimizer included, of a 1.5B Qwen-architecture model in bfloat16 over float32 weights.
    Target: exact_over_group_mean <= 1.15."""
    where = where or Where()
    arithmetic = ModelArithmetic(temperature=1.0, dtype=torch.bfloat16)
    model = make_model(where)
    case = {
        "trajectories": where.trajectories, "vocabulary": where.vocabulary, "prompt": (28, 33), "turns": (1, 2),
        "answer": (where.answer, where.answer + 1), "reply": 0,
    }  # fmt: skip
    batch = opob.make_batch(case, micro_batch_tokens=opob.GROUP_SIZE * (where.answer + 40), device=where.device)
    weights = opob.make_weights(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=where.device == "cuda")

    def group_mean() -> None:
        advantage = batch.reward - opob.mean_of_group(batch.reward, batch)
        coefficients = advantage[opob.owner_of(batch)] * weights
        for micro in batch.micro_batches:
            (-(coefficients[micro.policy] * log_probs(model, micro, arithmetic).log_prob).sum()).backward()
        finish()

    def exact() -> None:
        policy = batch.reward[opob.owner_of(batch)] * weights
        TrajectoryGradient(model, arithmetic).add(
            batch, policy, weights, lambda norm_squares: opob.optimal(norm_squares, batch)
        )
        finish()

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    found = in_turns({"group_mean": group_mean, "exact": exact}, rounds, where, budget_s)
    if isinstance(found["exact"], dict) and isinstance(found["group_mean"], dict):
        found["exact_over_group_mean"] = ratio(found["exact"], found["group_mean"])
    return found | {
        "tokens": batch.num_tokens,
        "micro_batches": len(batch.micro_batches),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def make_model(where: Where) -> Decoder:
    heads = where.width // 128
    model = Decoder(
        DecoderConfig(
            family="qwen2",
            vocabulary=where.vocabulary,
            hidden=where.width,
            intermediate=where.width * 35 // 6,
            layers=where.layers,
            heads=heads,
            kv_heads=max(1, heads // 6),
            head_dim=128,
            max_context=4096,
            qkv_bias=True,
            tied=True,
        )
    )
    model.initialise(0)
    return model.to(where.device)


def equal(rows: int, segments: int) -> list[int]:
    return [rows // segments] * (segments - 1) + [rows - rows // segments * (segments - 1)]


def ragged(rows: int, segments: int) -> list[int]:
    """Lengths between nearly nothing and twice the mean."""
    share = torch.rand(segments, generator=torch.Generator().manual_seed(0))
    lengths = (share / share.sum() * rows).long().tolist()
    lengths[-1] += rows - sum(lengths)
    return lengths


def ratio(above: dict[str, Any], below: dict[str, Any]) -> float:
    return round(above["ms"] / below["ms"], 3)


SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "ceilings": ceilings,
    "logprob": logprob,
    "norms": norms,
    "head_sums": head_sums,
    "opob_step": opob_step,
}
