"""The decoder's forward pass in fewer and larger operations, for inference.

A decode step of a small model spends most of its time between operations. Query, key and value come from one product,
gate and up from another, and residuals are added inside a product. There is one set of weights: the decoder's
parameters become views of joint buffers, so an in-place update of them updates these. Where MKL multiplies
(async_rl_kernels.product) the buffers are laid [in, out], with which products of few rows are faster. What lies between
products is one C function each where there is a compiler (async_rl_kernels.native), else torch's operations. A test
holds all forwards to the same numbers.

Shapes: tokens are all tokens of a step; hidden, intermediate, heads and head_dim are the config's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from async_rl.model.decoder import Attention, Decoder, Layer, RMSNorm
from async_rl_kernels import native, product


class FusedDecoder:
    """The forward pass of `decoder`, without autograd. It takes over the storage of the decoder's parameters: do not
    move or cast the decoder afterwards."""

    def __init__(self, decoder: Decoder, max_context: int) -> None:
        """`max_context`: positions are below it."""
        self.decoder = decoder
        config = decoder.config
        positions = torch.arange(max_context, device=decoder.head.device)
        rotation = torch.stack(decoder.rotation(positions, decoder.head.dtype), 1)  # [positions, 2, 1, head_dim]
        eps = torch.tensor(config.norm_eps, device=decoder.head.device, dtype=torch.float32)
        fits = max(config.hidden, config.head_dim) <= native.MOST
        compiled = native.usable(decoder.head) and native.usable(rotation) and fits
        self._between = (CompiledBetween if compiled else TorchBetween)(eps, rotation)
        layers = [layer for layer in decoder.model.layers if isinstance(layer, Layer)]
        self._layers = [FusedLayer(layer, self._between) for layer in layers]
        own([decoder.model.embed_tokens.weight, decoder.model.norm.weight, decoder.head])
        own([norm.weight for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)])

    def __call__(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """tokens, positions [tokens] int64 -> hidden [tokens, hidden] after the final norm."""
        x = F.embedding(tokens, self.decoder.model.embed_tokens.weight)
        turn = self._between.turn(positions)
        for layer in self._layers:
            x = layer(x, turn, attention)
        return self._between.norm(x, self.decoder.model.norm.weight)


class FusedLayer:
    """One layer with joint weights for the projections that share an input: x [tokens, hidden], overwritten ->
    [tokens, hidden]."""

    def __init__(self, layer: Layer, between: Between) -> None:
        at, mlp = layer.self_attn, layer.mlp
        self._between = between
        self._index, self._window = at.layer, at.window
        self._head_dim = at.head_dim
        self._heads = at.q_proj.out_features // at.head_dim
        self._rotated = self._heads + at.k_proj.out_features // at.head_dim
        self._first_norm, self._second_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self._qkv = JointProduct([at.q_proj, at.k_proj, at.v_proj])
        self._gate_up = JointProduct([mlp.gate_proj, mlp.up_proj])
        self._out, self._down = JointProduct([at.o_proj]), JointProduct([mlp.down_proj])
        self._norms: Tensor | None = None
        if at.q_norm is not None and at.k_norm is not None:
            self._norms = join_norms([at.q_norm, at.k_norm])

    def __call__(self, x: Tensor, turn: Turn, attention: Attention) -> Tensor:
        tokens, between = x.shape[0], self._between
        qkv = self._qkv(between.norm(x, self._first_norm)).view(tokens, -1, self._head_dim)  # heads of all three
        both = between.turned(qkv[:, : self._rotated], self._norms, self._heads, turn)  # query and key heads
        query, key, value = both[:, : self._heads], both[:, self._heads :], qkv[:, self._rotated :]
        out = attention(self._index, query, key, value, window=self._window)
        x = self._out.added_to(x, out.reshape(tokens, -1))
        gate_up = self._gate_up(between.norm(x, self._second_norm))  # [tokens, 2 * intermediate]
        return self._down.added_to(x, between.gated(gate_up))


Turn = tuple[Tensor, Tensor]
"""of a step's tokens, as `Between.turn` made it"""


class Between(Protocol):
    """What is computed between products and attention."""

    def turn(self, positions: Tensor) -> Turn:
        """positions [tokens] int64 -> what `turned` takes."""
        ...

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / rms(x) * weight; x [tokens, size], weight [size] -> [tokens, size]."""
        ...

    def turned(self, both: Tensor, norms: Tensor | None, queries: int, turn: Turn) -> Tensor:
        """Query and key heads `both` [tokens, heads, head_dim], of which `queries` are the former, normed with `norms`
        [2, head_dim] where there are some, and rotated; may be overwritten."""
        ...

    def gated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: [tokens, 2 * intermediate], may be overwritten -> [tokens, intermediate]."""
        ...


class TorchBetween:
    """`Between` of torch's operations, on any device."""

    def __init__(self, eps: Tensor, rotation: Tensor) -> None:
        """rotation: [positions, 2, 1, head_dim], cos and sin as from `Decoder.rotation`."""
        self._eps, self._rotation = eps, rotation

    def turn(self, positions: Tensor) -> Turn:
        cos, sin = self._rotation.index_select(0, positions).unbind(1)
        return cos, sin

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._eps)

    def turned(self, both: Tensor, norms: Tensor | None, queries: int, turn: Turn) -> Tensor:
        if norms is not None:
            kinds = [queries, both.shape[1] - queries]
            both = rms_norm(both, torch.cat([n.expand(k, -1) for n, k in zip(norms, kinds, strict=True)]), self._eps)
        return rotate(both, *turn)

    def gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate, inplace=True).mul_(up)


class CompiledBetween:
    """`Between` of compiled functions, for float32 on a CPU."""

    def __init__(self, eps: Tensor, rotation: Tensor) -> None:
        """As `TorchBetween`."""
        library = native.library()
        assert library is not None
        self._library, self._eps, self._rotation = library, float(eps), rotation.contiguous()
        self._threads = torch.get_num_threads()

    def turn(self, positions: Tensor) -> Turn:
        return positions, self._rotation

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        rows, size = x.shape
        out = torch.empty_like(x)
        self._library.rms_norm(
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            self._eps,
            out.data_ptr(),
            size,
            None,
            rows,
            size,
            self._threads,
        )
        return out

    def turned(self, both: Tensor, norms: Tensor | None, queries: int, turn: Turn) -> Tensor:
        positions, rotation = turn
        tokens, heads, size = both.shape
        at, cos = both.data_ptr(), rotation.data_ptr()
        norm = None if norms is None else norms.data_ptr()
        self._library.turn_heads(
            at, both.stride(0), norm, None if norm is None else norm + 4 * size, queries, self._eps,
            cos, cos + 4 * size, 2 * size, positions.data_ptr(), at, both.stride(0), tokens, heads, size, self._threads,
        )  # fmt: skip
        return both

    def gated(self, gate_up: Tensor) -> Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        at = gate_up.data_ptr()
        self._library.swiglu(at, 2 * size, at + 4 * size, 2 * size, out.data_ptr(), size, rows, size, self._threads)
        return out


class JointProduct:
    """The product with the stacked weights of linear layers that have one input. The layers' own weights and biases
    become views of the stack."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears))
        first = weights[0]
        self._inward = product.PREFERS_MKL and first.dtype == torch.float32 and first.device.type == "cpu"
        self._weight = stack(weights, turned=self._inward)  # [in, out] when inward, else [out, in]
        self._bias = stack(biases) if biases else None  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ weight.T + bias [rows, out]."""
        if not self._inward:
            return product.linear(x, self._weight, self._bias)
        return torch.mm(x, self._weight) if self._bias is None else torch.addmm(self._bias, x, self._weight)

    def added_to(self, x: Tensor, features: Tensor) -> Tensor:
        """x + features @ weight.T + bias [rows, out]; x [rows, out] may be overwritten, features [rows, in]."""
        if not self._inward:
            return product.add_linear(x, features, self._weight, self._bias)
        x.addmm_(features, self._weight)
        return x if self._bias is None else x.add_(self._bias)


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """x / rms(x) * weight over the last dimension; x [..., size] -> the same shape. In float32 the norm is one
    operation, where F.rms_norm takes six on a CPU."""
    if x.dtype != torch.float32 or x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], None, float(eps)) * weight
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`elementwise.rotate` without autograd."""
    half = x.shape[-1] // 2
    return (x * cos).addcmul_(torch.cat((x[..., half:], x[..., :half]), -1), sin)


def join_norms(norms: Sequence[RMSNorm]) -> Tensor:  # [norms, size]
    return stack([norm.weight for norm in norms]).view(len(norms), -1)


def own(parameters: Sequence[Tensor]) -> None:
    """Give parameters storage of their own: else the file that they were read from stays in memory as a whole."""
    for parameter in {id(parameter): parameter for parameter in parameters}.values():
        parameter.data = parameter.detach().clone()


def stack(parameters: Sequence[Tensor], *, turned: bool = False) -> Tensor:
    """Concatenate parameters [out, ...] to [sum of out, ...], or matrices to [in, sum of out] when `turned`, and make
    each a view of the result."""
    first, height = parameters[0].detach(), sum(parameter.shape[0] for parameter in parameters)
    joint = first.new_empty((first.shape[1], height) if turned else (height, *first.shape[1:]))
    begin, rows = 0, joint.t() if turned else joint
    for parameter in parameters:
        place = rows[begin : begin + parameter.shape[0]]
        place.copy_(parameter.detach())
        parameter.data = place
        begin += parameter.shape[0]
    return joint
