"""`Decoder`'s arithmetic in fewer and larger operations, for inference.

A decode step of a small model spends most of its time between operations. Here query, key and value
come from one product, gate and up from another, and residuals are added inside a product. There is
still one definition and one set of weights: the decoder's parameters become views of joint buffers, so
an in-place update of them is an update of these. A test holds both to the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from async_rl.model.decoder import Attention, Decoder, Layer, RMSNorm, rotate
from async_rl.model.matmul import add_linear, linear


class FusedDecoder:
    """The forward pass of `decoder`, without autograd. Takes the storage of its parameters over: do not
    move or cast the decoder afterwards."""

    def __init__(self, decoder: Decoder, max_context: int) -> None:
        """`max_context`: positions stay below it."""
        self.decoder = decoder
        config = decoder.config
        positions = torch.arange(max_context, device=decoder.head.device)
        self._rotation = torch.stack(decoder.rotation(positions, decoder.head.dtype), 1)  # [positions, 2, 1, head_dim]
        self._eps = torch.tensor(config.norm_eps, device=decoder.head.device, dtype=torch.float32)
        self._layers = [FusedLayer(layer, self._eps) for layer in decoder.model.layers if isinstance(layer, Layer)]

    def __call__(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """tokens, positions [tokens] int64 -> hidden [tokens, hidden] after the final norm."""
        x = F.embedding(tokens, self.decoder.model.embed_tokens.weight)
        cos, sin = self._rotation.index_select(0, positions).unbind(1)
        for layer in self._layers:
            x = layer(x, cos, sin, attention)
        norm = self.decoder.model.norm
        return rms_norm(x, norm.weight, self._eps)


class FusedLayer:
    """One layer, with joint weights for the projections that share an input."""

    def __init__(self, layer: Layer, eps: Tensor) -> None:
        at, mlp = layer.self_attn, layer.mlp
        self._eps = eps
        self._index = at.layer
        self._head_dim = at.head_dim
        self._heads = at.q_proj.out_features // at.head_dim
        self._rotated = self._heads + at.k_proj.out_features // at.head_dim
        self._first_norm, self._second_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self._qkv, self._qkv_bias = join([at.q_proj, at.k_proj, at.v_proj])
        self._gate_up, self._gate_up_bias = join([mlp.gate_proj, mlp.up_proj])
        self._out, self._down = at.o_proj, mlp.down_proj
        self._norms: Tensor | None = None
        if at.q_norm is not None and at.k_norm is not None:
            self._norms = join_norms([at.q_norm, at.k_norm])
            kinds = [0] * self._heads + [1] * (self._rotated - self._heads)
            self._kind = torch.tensor(kinds, device=eps.device)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        tokens = x.shape[0]
        normed = rms_norm(x, self._first_norm, self._eps)
        qkv = linear(normed, self._qkv, self._qkv_bias).view(tokens, -1, self._head_dim)
        both = qkv[:, : self._rotated]  # query and key heads
        if self._norms is not None:
            both = rms_norm(both, self._norms.index_select(0, self._kind), self._eps)
        both = rotate(both, cos, sin)
        out = attention(self._index, both[:, : self._heads], both[:, self._heads :], qkv[:, self._rotated :])
        x = add_linear(x, out.reshape(tokens, -1), self._out.weight, self._out.bias)
        normed = rms_norm(x, self._second_norm, self._eps)
        gate, up = linear(normed, self._gate_up, self._gate_up_bias).chunk(2, -1)
        return add_linear(x, F.silu(gate).mul_(up), self._down.weight, self._down.bias)


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """x / rms(x) * weight. In float32 the norm is one operation, where F.rms_norm takes six on a CPU."""
    if x.dtype != torch.float32 or x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], None, float(eps)) * weight
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight)


def join(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases stacked by output; the modules' own become views of the stack."""
    weight = stack([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    return weight, (stack(biases) if biases else None)


def join_norms(norms: Sequence[RMSNorm]) -> Tensor:  # [norms, size]
    return stack([norm.weight for norm in norms]).view(len(norms), -1)


def stack(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters one after another along their first dimension, each now a view of the result."""
    with torch.no_grad():
        joint = torch.cat([parameter.detach() for parameter in parameters])
    begin = 0
    for parameter in parameters:
        parameter.data = joint[begin : begin + parameter.shape[0]]
        begin += parameter.shape[0]
    return joint
