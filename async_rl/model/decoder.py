"""The decoder of Llama, Mistral, Qwen2 and Qwen3, over flat packed tokens.

It has no batching, padding, caches or masks on purpose. The caller passes an `Attention` that knows which token may
attend to which: packed documents in training, a KV cache in the engine. So both run the same arithmetic. Parameters
have Hugging Face's names; projections are `nn.Linear`, the embedding is `nn.Embedding`, norms are `RMSNorm`, all called
as modules, so that hooks see every use of a weight.

Shapes: tokens are all tokens of a packed row; hidden, intermediate, heads, kv_heads, head_dim and vocabulary are the
config's. dtypes are the model's unless stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from async_rl.model.architecture import DecoderConfig, Rope
from async_rl.model.compiled_layer import CACHED, compute_after, compute_before, serves
from async_rl.model.compiled_stack import compute_layers, divide
from async_rl.model.elementwise import rms_norm, rotate, swiglu
from async_rl.model.repeats import Repeats
from async_rl.model.tree_attention import TreeAttention
from async_rl_kernels import native
from async_rl_kernels.product import linear, worthwhile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""the dtypes that settings name"""


class Attention(Protocol):
    """Causal attention among the packed tokens, scaled by 1/sqrt(head_dim)."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int = 0, cap: float = 0.0
    ) -> Tensor:
        """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim], already rotated by their
        positions -> [tokens, heads, head_dim].

        window: a token attends to itself and the window - 1 tokens before it; 0: to all before it. cap: a score s
        becomes cap * tanh(s / cap), as in Gemma 2; 0: it stays.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExecution:
    """How a layer's forward is computed. The numbers are the same."""

    checkpointed: bool = False
    """keep only the layer's input, and recompute the rest in the backward pass"""
    compiled: bool = False
    """use torch.compile"""


class Decoder(nn.Module):
    """A causal language model without its last matrix product.

    forward(tokens [tokens] int64, positions [tokens] int64, attention) -> hidden [tokens, hidden] after the final norm,
    or with `rows` [n] int64 those of these tokens, [n, hidden]: others are not computed behind the last layer's
    attention. The caller, who rarely needs all logits, computes them as `hidden @ head.T`.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = None if config.tied else Linear(config.hidden, config.vocabulary, bias=False)
        # not a buffer, because `.to(bfloat16)` must not round it
        self._frequencies: dict[torch.device, Tensor] = {}

    @property
    def head(self) -> Tensor:  # [vocabulary, hidden]
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    logit_cap = 0.0
    """the caller's logits stay as they are (architectures that transformers defines may cap them)"""

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        x = self.model.embed_tokens(tokens)  # [tokens, hidden]
        cos, sin = self.rotation(positions, x.dtype)
        if (found := self._at_once(x, cos, sin, attention, rows)) is not None:
            return self.model.norm(found)
        last = len(self.model.layers) - 1
        for number, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, attention, rows if number == last else None)
        return self.model.norm(x)

    def _at_once(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, rows: Tensor | None) -> Tensor | None:
        """x [tokens, hidden] behind all layers, or of `rows`, by compiled functions; None where they do not serve."""
        if not isinstance(attention, TreeAttention) or attention.tree.num_rows != len(x) or not len(self.model.layers):
            return None
        layers = [weights_at_once(layer) for layer in self.model.layers]
        every = [weight for weights in layers for weight in weights if weight is not None]
        size = self.config.head_dim
        if not all(layers) or size not in native.HEAD_SIZES or not serves(x, every, size):
            return None
        trees = attention.trees([self.config.window(number) for number in range(len(layers))])
        if trees is None:
            return None
        widest = self.config.hidden * self.config.intermediate
        asked_for, eps = divide(trees, len(x), rows, widest), self.config.norm_eps
        if asked_for is None:
            return None
        if widest <= CACHED:
            return compute_layers(x, cos, sin, asked_for, layers, size, eps)
        every_row = divide(trees, len(x), None, widest)
        assert every_row is not None
        for weights in layers[:-1]:
            x = compute_layers(x, cos, sin, every_row, [weights], size, eps)
        return compute_layers(x, cos, sin, asked_for, layers[-1:], size, eps)

    def set_execution(self, execution: LayerExecution) -> LayerExecution:
        """Compute every layer in this way from now on; returns the way until now."""
        before = LayerExecution()
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            before, layer.execution = layer.execution, execution
        return before

    def initialise(self, seed: int, std: float = 0.02) -> None:
        """Draw random weights as Hugging Face does: normal(0, std), norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.fill_(1.0)
                elif name.endswith(".bias"):
                    parameter.zero_()
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [tokens] -> cos and sin [tokens, 1, head_dim] for `rotate`, computed in float32; sin is negative in
        its first half."""
        frequency = self._frequencies.get(positions.device)
        if frequency is None:
            with torch.inference_mode(False):  # tensors of inference mode cannot enter autograd
                frequency = inverse_frequencies(self.config.rope, self.config.head_dim).to(positions.device)
            self._frequencies[positions.device] = frequency
        angle = positions.to(torch.float32)[:, None, None] * frequency  # [tokens, 1, head_dim / 2]
        cos, sin = angle.cos(), angle.sin()
        if (scale := self.config.rope.attention_factor) != 1.0:
            cos, sin = cos * scale, sin * scale
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


class Trunk(nn.Module):
    """Everything below the head, which Hugging Face calls `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        # Given a weight, the module draws none (`initialise` does); drawing on the meta device imports a compiler.
        table = torch.empty(config.vocabulary, config.hidden)
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden, _weight=table)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)


class Layer(nn.Module):
    """One layer: x [tokens, hidden] -> [tokens, hidden], or [n, hidden] of the `rows` [n] asked for. `execution` says
    how it is computed."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.execution = LayerExecution()
        self.self_attn = SelfAttention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        if self.execution.checkpointed and torch.is_grad_enabled():
            # nothing in a layer is random, so no random state has to be restored
            found: Tensor = checkpoint(
                self._compute, x, cos, sin, attention, rows, use_reentrant=False, preserve_rng_state=False
            )
            return found
        return self._compute(x, cos, sin, attention, rows)

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        before, after = self._ways(x)
        at = self.self_attn
        out = attention(at.layer, *before(self, x, cos, sin), window=at.window)
        if rows is not None:
            x, out = x[rows], out[rows]
        return after(self, x, out)

    def _ways(self, x: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]:
        """What computes the parts before and after attention."""
        if self.execution.compiled:
            return compiled()
        if (weights := plain_weights(self)) and serves(x, weights, self.self_attn.head_dim):
            return before_at_once, after_at_once
        return before_attention, after_attention


def before_attention(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part of a layer before attention: x [tokens, hidden] -> query, key, value as `SelfAttention.project`."""
    return layer.self_attn.project(layer.input_layernorm(x), cos, sin)


def after_attention(layer: Layer, x: Tensor, out: Tensor) -> Tensor:
    """The part of a layer after attention: x [tokens, hidden], out [tokens, heads, head_dim] -> [tokens, hidden]."""
    x = x + layer.self_attn.o_proj(out.flatten(1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def before_at_once(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`before_attention` of a plain layer, in one function."""
    at, norm = layer.self_attn, layer.input_layernorm
    norms = None if at.q_norm is None or at.k_norm is None else (at.q_norm.weight, at.k_norm.weight)
    weights = at.q_proj.weight, at.k_proj.weight, at.v_proj.weight
    return compute_before(x, cos, sin, norm.weight, weights, norms, at.head_dim, norm.eps)


def after_at_once(layer: Layer, x: Tensor, out: Tensor) -> Tensor:
    """`after_attention` of a plain layer, in one function."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    inner = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    return compute_after(x, out, layer.self_attn.o_proj.weight, norm.weight, inner, norm.eps)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def plain_weights(layer: Layer) -> Sequence[Tensor]:
    """All weights of a layer; none where a module is not as it was made here (a bias, a hook, an adapter in its place),
    so that it must be called."""
    at, mlp = layer.self_attn, layer.mlp
    linears = (at.q_proj, at.k_proj, at.v_proj, at.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    either = (layer.input_layernorm, layer.post_attention_layernorm, at.q_norm, at.k_norm)
    norms = [norm for norm in either if norm is not None]
    modules = (at, mlp, *linears, *norms)
    if any(is_hooked(module) or type(module) not in OWN for module in modules):
        return ()
    if any(linear.bias is not None or linear.repeats is not None for linear in linears):
        return ()
    return [*(linear.weight for linear in linears), *(norm.weight for norm in norms)]


def weights_at_once(layer: nn.Module) -> list[Tensor | None]:
    """The weights of a plain layer as `compute_layers` takes them; none where the layer must be called."""
    if type(layer) is not Layer or layer.execution != LayerExecution() or is_hooked(layer) or not plain_weights(layer):
        return []
    at, mlp = layer.self_attn, layer.mlp
    norms = [None if norm is None else norm.weight for norm in (at.q_norm, at.k_norm)]
    first = layer.input_layernorm.weight, at.q_proj.weight, at.k_proj.weight, at.v_proj.weight, *norms
    second = layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    return [*first, at.o_proj.weight, *second]


@cache
def compiled() -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]:
    """`before_attention` and `after_attention` through torch.compile, each one graph for all layers and any number of
    tokens. Attention between them is not compiled, because documents differ in every batch."""
    return (
        torch.compile(before_attention, dynamic=True, fullgraph=True),
        torch.compile(after_attention, dynamic=True, fullgraph=True),
    )


class SelfAttention(nn.Module):
    """The projections around attention: query, key and value before it, output after it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.layer, self.head_dim, self.window = layer, c.head_dim, c.window(layer)
        self.q_proj = Linear(c.hidden, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.heads * c.head_dim, c.hidden, bias=c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden] -> query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim]; query and
        key are rotated by their positions."""
        per_head = (x.shape[0], -1, self.head_dim)
        query, key = self.q_proj(x).view(per_head), self.k_proj(x).view(per_head)
        value = self.v_proj(x).view(per_head)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, cos, sin), rotate(key, cos, sin), value


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): x [tokens, hidden] -> [tokens, hidden]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden, config.intermediate, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden, config.intermediate, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate, config.hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # inside: [tokens, intermediate]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019). x [..., size] -> the same shape, in the
    wider of both dtypes."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # the dtypes differ under autocast (x is bfloat16) and in a sharded model (the weight is)
        wider = torch.promote_types(x.dtype, self.weight.dtype)
        return rms_norm(x.to(wider), self.weight.to(wider), self.eps)


class Linear(nn.Linear):
    """`nn.Linear` whose products, forward and backward, use the faster kernel on a CPU (async_rl_kernels.product).

    forward: x [rows, in] -> [rows, out].
    """

    repeats: Repeats | None = None
    """tokens of which several are one row, for an input of so many: products are formed by row, and every token keeps
    its own gradient. The weight gets none."""

    def forward(self, x: Tensor) -> Tensor:
        if self.repeats is not None and x.shape[0] == len(self.repeats.rows):
            out: Tensor = _RepeatedProduct.apply(x, self.weight, self.bias, self.repeats)
            return out
        # torch's compiler takes oneDNN's product with a changing weight for one with a constant weight, and fails
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not worthwhile(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        return _Product.apply(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x [rows, in] @ weight [out, in].T + bias [out] -> [rows, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if of_x else None,
            linear(grad.t(), x.t()) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


class _RepeatedProduct(torch.autograd.Function):
    """The same for x [tokens, in] -> [tokens, out], whose copies of a row are equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, repeats: Repeats) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        rows = x.index_select(0, repeats.one)
        rounded = torch.is_autocast_enabled(x.device.type)
        return (F.linear(rows, weight, bias) if rounded else linear(rows, weight, bias)).index_select(0, repeats.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.to(grad.dtype).t()).to(ctx.dtype), None, None, None


OWN = {SelfAttention, MLP, Linear, RMSNorm}
"""modules that compute what is written here and nothing else"""


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:  # [head_dim / 2] float32
    """The angle per position of each pair of dimensions, as in transformers' modeling_rope_utils."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factors, dtype=torch.float32) * rope.theta**exponent)
    frequency = 1.0 / (rope.theta**exponent)
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / rope.factor
    return llama3_frequencies(rope, frequency) if rope.kind == "llama3" else yarn_frequencies(rope, frequency)


def llama3_frequencies(rope: Rope, frequency: Tensor) -> Tensor:  # [head_dim / 2]
    """Llama 3.1: divided by the factor where the wavelength is long, with a smooth passage."""
    low = rope.original_context / rope.low_frequency_factor
    high = rope.original_context / rope.high_frequency_factor
    wavelength = 2 * math.pi / frequency
    smooth = (rope.original_context / wavelength - rope.low_frequency_factor) / (
        rope.high_frequency_factor - rope.low_frequency_factor
    )
    between = (1 - smooth) * frequency / rope.factor + smooth * frequency
    scaled = torch.where(wavelength > low, frequency / rope.factor, frequency)
    return torch.where((wavelength >= high) & (wavelength <= low), between, scaled)


def yarn_frequencies(rope: Rope, frequency: Tensor) -> Tensor:  # [head_dim / 2]
    """YaRN (Peng et al. 2023): as they are where a dimension turns `beta_fast` times or more within the original
    context, divided by the factor where it turns `beta_slow` times or fewer, and a linear passage between."""
    size = 2 * len(frequency)

    def dimension(turns: float) -> float:
        return size * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first if last != first else 0.001
    divided = ((torch.arange(len(frequency), dtype=torch.float32) - first) / width).clamp(0, 1)
    return frequency / rope.factor * divided + frequency * (1 - divided)
