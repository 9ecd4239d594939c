"""One packed micro-batch through the model: log-probs of its policy tokens.

Shapes: N tokens and t policy tokens of a micro-batch, T policy tokens of this rank's share, H hidden.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.trainer.arithmetic import ModelArithmetic
from async_rl.trainer.lanes import lane_parts, side_by_side
from async_rl.trainer.packing import MicroBatch, PackedBatch, Rows
from async_rl.trainer.ranks import free, is_sharded
from async_rl_kernels import LogProbs, linear_logprob, min_p_log_prob

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model
    from async_rl.model.lora import WithoutAdapters


def log_probs(
    model: Model | WithoutAdapters, micro: MicroBatch, arithmetic: ModelArithmetic, *, proxy_share: float = 0.0
) -> LogProbs:
    """Log-prob, entropy and sum of squared probabilities of every policy token, [t] each; with `proxy_share` the
    log-prob under the proxy that keeps this share of the likeliest token's probability, too."""
    compute = partial(_log_probs, model, arithmetic, proxy_share)
    parts = lane_parts(model, micro, arithmetic)
    return side_by_side(cast(Decoder, model), parts, compute) if len(parts) > 1 else compute(micro)


def _log_probs(model: Model | WithoutAdapters, arithmetic: ModelArithmetic, proxy_share: float, rows: Rows) -> LogProbs:
    with arithmetic.autocast(rows.tokens.device):
        attention = rows.attention(arithmetic.kernel)
        hidden = rows.of_policy(model(rows.tokens, rows.positions, attention, rows.predicting))
    head = model.head  # a sharded head is whole behind the forward
    hidden = rows.stretched(hidden.to(head.dtype))
    cap, products, temperature = logit_caps(model, rows), arithmetic.products(head.device), arithmetic.temperature
    found = linear_logprob(hidden, head, rows.targets, temperature=temperature, cap=cap, products=products)
    if not proxy_share:
        return found
    proxy = min_p_log_prob(
        hidden, head, rows.targets, share=proxy_share, temperature=temperature, cap=cap, products=products
    )
    return replace(found, log_proxy=proxy)


def logit_caps(model: Model | WithoutAdapters, rows: Rows) -> Tensor | None:
    """`cap` of linear_logprob for every policy token, [t]. It grows with the stretch of a hidden state: logits are then
    those of the capped ones at the turn's temperature."""
    if not model.logit_cap:
        return None
    every = torch.full((len(rows.targets), 1), model.logit_cap, device=rows.targets.device)
    return rows.stretched(every).squeeze(1)


@torch.no_grad()
def batch_log_probs(
    model: Model | WithoutAdapters, batch: PackedBatch, arithmetic: ModelArithmetic, *, proxy_share: float = 0.0
) -> LogProbs:
    """The columns of this rank's share of the batch, [T] each, without gradients."""
    parts = [
        own_rows(log_probs(model, micro, arithmetic, proxy_share=proxy_share), micro) for micro in batch.micro_batches
    ]
    proxies = [p.log_proxy for p in parts if p.log_proxy is not None]
    return LogProbs(
        log_prob=torch.cat([p.log_prob for p in parts]),
        entropy=torch.cat([p.entropy for p in parts]),
        prob_square_sum=torch.cat([p.prob_square_sum for p in parts]),
        log_proxy=torch.cat(proxies) if proxies else None,
    )


def own_rows(found: LogProbs, micro: MicroBatch) -> LogProbs:
    """The rows [t] of a micro-batch; none for a stand-in (`MicroBatch.idle`)."""
    if not micro.idle:
        return found
    proxy = None if found.log_proxy is None else found.log_proxy[:0]
    return LogProbs(
        log_prob=found.log_prob[:0],
        entropy=found.entropy[:0],
        prob_square_sum=found.prob_square_sum[:0],
        log_proxy=proxy,
    )


@torch.no_grad()
def probe_log_probs(model: Model, tokens: tuple[int, ...], arithmetic: ModelArithmetic) -> tuple[float, ...]:
    """Log-probs of tokens[1:] given what precedes each, at temperature 1, in the dtype of the weights.

    A sharded model computes in the dtype of `arithmetic`, and all ranks together.
    """
    if len(tokens) < 2:
        return ()
    device = model.head.device
    ids = torch.tensor(tokens, device=device)
    with arithmetic.autocast(device) if is_sharded(model) else nullcontext():
        hidden = model(ids, torch.arange(len(ids), device=device), DocumentAttention([len(ids)]))
    cap = torch.full((len(ids) - 1,), model.logit_cap, device=device) if model.logit_cap else None
    answer = linear_logprob(hidden[:-1].to(model.head.dtype), model.head, ids[1:], cap=cap)
    free(model)
    return tuple(answer.log_prob.tolist())
