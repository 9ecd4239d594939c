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

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from async_rl.model.decoder import Attention, Decoder, Layer, RMSNorm
from async_rl_kernels import native, product

BLOCK_ROWS = 512
"""tokens of a step that pass through all layers together: what lies between layers is no larger than that"""


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

    def logits(self, step: CachedStep) -> Tensor | None:
        """Logits [wanted, vocabulary] of some tokens of a step, all layers in one compiled function; None where it does
        not serve: another processor, biases, no compiler."""
        return self._compiled_steps.logits(step)

    def argument(self, step: CachedStep) -> tuple[native.Decode, Tensor]:
        """(what the compiled function takes to compute the logits of a step, where it writes them [wanted,
        vocabulary]). What `step` refers to must outlive the call."""
        return self._compiled_steps.argument(step)

    @property
    def at_once(self) -> bool:
        """Whether `logits` serves."""
        return self._compiled_steps.serve

    @cached_property
    def _compiled_steps(self) -> CompiledSteps:
        return CompiledSteps(self.decoder, self._layers, self._between)


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

    def compiled(self) -> native.DecodeLayer | None:
        """For `CompiledSteps`, without the cache; None where a product is another than it computes."""
        products = [self._qkv.inward, self._out.inward, self._gate_up.inward, self._down.inward]
        if any(weight is None for weight in products):
            return None
        each, out, gate_up, down = (weight.data_ptr() for weight in products if weight is not None)
        return native.DecodeLayer(
            first_norm=self._first_norm.data_ptr(), query_key_value=each, out=out,
            second_norm=self._second_norm.data_ptr(), gate_up=gate_up, down=down,
            norms=None if self._norms is None else self._norms.data_ptr(), window=self._window,
        )  # fmt: skip

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
        self.library, self.eps, self.rotation = library, float(eps), rotation.contiguous()
        self._threads = torch.get_num_threads()

    def turn(self, positions: Tensor) -> Turn:
        return positions, self.rotation

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        rows, size = x.shape
        out = torch.empty_like(x)
        self.library.rms_norm(
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            self.eps,
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
        self.library.turn_heads(
            at, both.stride(0), norm, None if norm is None else norm + 4 * size, queries, self.eps,
            cos, cos + 4 * size, 2 * size, positions.data_ptr(), at, both.stride(0), tokens, heads, size, self._threads,
        )  # fmt: skip
        return both

    def gated(self, gate_up: Tensor) -> Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        at = gate_up.data_ptr()
        self.library.swiglu(at, 2 * size, at + 4 * size, 2 * size, out.data_ptr(), size, rows, size, self._threads)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedStep:
    """A step whose tokens all attend to the cache by a compiled function."""

    tokens: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    last: NDArray[np.int64]  # [wanted]
    """the tokens whose logits are asked for"""
    attention: native.Attention
    places: tuple[int, int]
    """addresses of the blocks and places to which keys and values are written, [tokens] int64 each"""
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    """the cache of each layer"""


class CompiledSteps:
    """The forward pass of a decoder on tokens that attend to a cache, as one compiled function: in a step of a small
    model calls and their arguments take longer than what they compute."""

    def __init__(self, decoder: Decoder, layers: Sequence[FusedLayer], between: Between) -> None:
        self._decoder = decoder
        self._layers: ctypes.Array[native.DecodeLayer] | None = None
        self._between = between
        self._room = torch.empty(0)
        if isinstance(between, CompiledBetween) and native.gemm() is not None and native.usable(decoder.head):
            made = [one for layer in layers if (one := layer.compiled()) is not None]
            if len(made) == len(layers):
                self._layers = (native.DecodeLayer * len(made))(*made)

    @property
    def serve(self) -> bool:
        return self._layers is not None

    def logits(self, step: CachedStep) -> Tensor | None:
        """As `FusedDecoder.logits`."""
        if self._layers is None:
            return None
        assert isinstance(self._between, CompiledBetween)
        argument, logits = self.argument(step)
        self._between.library.decode(argument)
        return logits

    def argument(self, step: CachedStep) -> tuple[native.Decode, Tensor]:
        """As `FusedDecoder.argument`."""
        assert self._layers is not None
        assert isinstance(self._between, CompiledBetween)
        c, tokens, wanted, (block, place) = self._decoder.config, len(step.tokens), len(step.last), step.places
        for layer, keys, values in zip(self._layers, step.keys, step.values, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        rows = min(tokens, BLOCK_ROWS)
        need = rows * (2 * c.hidden + (2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.intermediate)
        need += wanted * c.hidden
        if len(self._room) < need:
            self._room = torch.empty(2 * need)
        out = torch.empty(wanted, c.vocabulary)
        rotation, model = self._between.rotation, self._decoder.model
        return native.Decode(
            gemm=native.gemm(), tokens=tokens, hidden=c.hidden, heads=c.heads, kv_heads=c.kv_heads, size=c.head_dim,
            inner=c.intermediate, layers=len(self._layers), vocabulary=c.vocabulary, wanted=wanted, block_rows=rows,
            threads=torch.get_num_threads(), eps=self._between.eps, token=step.tokens.data_ptr(),
            position=step.positions.data_ptr(), block=block, place=place, last=step.last.ctypes.data,
            embedding=model.embed_tokens.weight.data_ptr(), final_norm=model.norm.weight.data_ptr(),
            head=self._decoder.head.data_ptr(), rotation=rotation.data_ptr(), layer=self._layers,
            attention=ctypes.pointer(step.attention), room=self._room.data_ptr(), logits=out.data_ptr(),
        ), out  # fmt: skip


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

    @property
    def inward(self) -> Tensor | None:
        """The weight [in, out]; None where it is laid otherwise, or there is a bias."""
        return self._weight if self._inward and self._bias is None else None

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
