"""Exact OPOB with packing kept: per-trajectory gradient norms and the baselined gradient, one backward.

With exact norms a recipe answers two columns that are proportional within a trajectory: policy_t = R_i c_t
and baseline_t = c_t. The gradient is sum_i (R_i - b_i) G_i with G_i = sum_t c_t grad log pi_t, and b
depends on all |G_i|^2. So the backward pass runs with c, autograd forms no weight gradient, hooks keep
each layer's inputs a and output gradients g, norms come from those (async_rl_kernels.segment_gradient),
and each weight gradient (m g)^T a is formed once, when m = R - b is known. Nothing per trajectory is ever
stored but the sums of vectors (norms, biases), and micro-batches stay as packed as they were.

Memory. `a` is what any backward saves; each layer's g replaces what autograd frees by then (attention's
q, k, v, the inputs of norms and activations), which is more, so one packed micro-batch needs about as much
as an ordinary backward (bench/opob.py measures it). A group cut by the end of a micro-batch cannot wait
with its a and g, since groups can be longer than micro-batches: its two sums are formed instead, sum R_i G_i
in `.grad` and sum G_i in one extra gradient copy, and b is taken off when its last trajectory has been seen. The
same serves one baseline for the whole batch. Norms first and a second pass over everything would need no
copy but one more backward, 4/3 of the time, for a case in which a copy is the smaller evil.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from async_rl.batch import MicroBatch, PackedBatch
from async_rl.errors import UserError
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder, RMSNorm
from async_rl.trainer.forward import Arithmetic
from async_rl_kernels import LogProbs, linear_logprob
from async_rl_kernels.segment_gradient import (
    Segments,
    embedding_norm_squares,
    logit_gradients,
    segment_sums,
    tied_products,
    weight_norm_squares,
)

if TYPE_CHECKING:
    from async_rl.trainer.forward import Model

HEAD_ELEMENTS = 1 << 22
"""logit gradients held at a time; a micro-batch that fits keeps them until its gradient is formed"""
HEAD_ROWS = 1024
"""policy tokens of one tile of the head, at least (a tile holds whole trajectories)"""

Sums = dict[nn.Parameter, Tensor]
"""a gradient beside the parameters' own"""


@dataclass(slots=True, eq=False)
class SharedInput:
    """An input and the linear layers that read it (q, k, v; gate, up)."""

    source: Tensor  # the tensor as it was passed, to recognise it
    activations: Tensor | None  # [tokens, in], in the dtype of the product
    uses: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """weight [out, in], gradient of the output [tokens, out]"""


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """One micro-batch between forward and accumulate. Gradients are those of -sum c_t / s_i log pi_t,
    with s_i the largest |c| of the trajectory: importance weights of any size neither under- nor overflow."""

    micro: MicroBatch
    segments: Segments  # of tokens
    policy: Segments  # of policy tokens
    inputs: list[SharedInput] = field(default_factory=list)
    vectors: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """norm weight or bias [width], its gradient for each trajectory [trajectories, width]"""
    embedded: Tensor | None = None  # [tokens, hidden], the leaf of the graph
    hidden: Tensor | None = None  # [policy tokens, hidden], its root
    log_normaliser: Tensor | None = None  # [policy tokens]
    coefficients: Tensor | None = None  # [policy tokens], c_t / s_i
    scale: Tensor | None = None  # [trajectories] float64, s_i
    logit_gradient: Tensor | None = None  # [policy tokens, vocabulary] where small enough
