"""Any other causal language model, through transformers.

transformers takes attention functions by name; ours passes query, key and value to the `Attention` object of the
current call. So a foreign architecture has the same `forward(tokens, positions, attention)` and `head` as `Decoder`,
and the same packing and KV cache serve it.

Shapes as in decoder.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from async_rl.errors import UserError
from async_rl.model.architecture import plain_name, rope_context, rope_settings
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Attention, Decoder
from async_rl.model.foreign import check_foreign

INTERFACE = "async_rl"
TOLERANCE = 1e-3
"""largest difference of a logit between our call and transformers' own, in float32, relative to the largest logit;
unsupported features differ by far more"""
FEATURES = {"s_aux": "attention sinks", "position_bias": "a bias on positions", "head_mask": "a mask on heads"}
"""arguments that transformers' layers may pass -> what they are"""
PROBE_LENGTHS, PROBE_WINDOW = (23, 9), 7
"""tokens of the documents that are compared, and of the sliding windows while they are"""

_current: ContextVar[Attention] = ContextVar("async_rl_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignConfig:
    """The shape of a model that transformers defines."""

    family: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int
    """tokens"""
    ends: bool = False
    """beyond max_context frequencies would depend on the longest document of a call (longrope)"""
    hidden_scale: float = 1.0
    """hidden states are multiplied by it, where transformers multiplies the logits (Granite, Cohere)"""
    logit_cap: float = 0.0
    """logits x are cap * tanh(x / cap) (Gemma 2); 0: they stay"""


class HuggingFaceDecoder(nn.Module):
    """A transformers causal LM under `Decoder`'s interface. Parameter names are those of transformers."""

    config: ForeignConfig
    _causal: Any

    def __init__(self, causal: Any, config: ForeignConfig) -> None:
        super().__init__()
        for name, child in causal.named_children():
            self.add_module(name, child)
        # hidden from nn.Module, because its children are registered above under their own names
        object.__setattr__(self, "_causal", causal)
        self.config = config

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> HuggingFaceDecoder:
        """Load a model and check that our call computes what transformers computes.

        Raises UserError when transformers is missing, does not know the architecture, or the architecture has a feature
        that we do not support.
        """
        try:
            from transformers import AutoModelForCausalLM
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        except ImportError:
            raise UserError(
                f"{folder / 'config.json'}: this architecture needs transformers; pip install 'transformers>=5.16.1'"
            ) from None
        ALL_ATTENTION_FUNCTIONS.register(INTERFACE, call_attention)
        try:
            causal: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        except (ValueError, OSError) as error:
            raise UserError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None
        check_foreign(causal.config.to_dict(), str(folder / "config.json"))
        if causal.config.tie_word_embeddings and not _tied(causal):
            raise UserError(
                f"{folder}: config.json ties the head to the embedding (tie_word_embeddings is true, or left to its "
                "default), but the weights hold another head; set tie_word_embeddings to false in config.json to use "
                "it, or take it out of the weights"
            )
        causal.eval()
        try:
            model = cls(causal, observe_shape(causal, folder))
            model._check_logits(folder)
        except LayerRefused as error:
            raise UserError(f"{folder}: {error}; choose a model of another architecture") from None
        causal.to(device=device, dtype=dtype)
        return model

    @property
    def head(self) -> Tensor:  # [vocabulary, hidden]
        return self._causal.get_output_embeddings().weight

    @property
    def logit_cap(self) -> float:
        """The caller's logits x become cap * tanh(x / cap); 0: they stay."""
        return self.config.logit_cap

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        """tokens, positions [tokens] int64 -> hidden [tokens, hidden] after the final norm, or [n, hidden] of
        the `rows` [n] int64 asked for (all are computed, as transformers' layers do). Raises ValueError for a position
        at which one document would change another's frequencies."""
        if self.config.ends and int(positions.max()) >= self.config.max_context:
            raise ValueError(f"position {int(positions.max())} of a model that ends at {self.config.max_context}")
        with using(attention):
            out = self._causal.base_model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        hidden = hidden if rows is None else hidden[rows]
        return hidden if self.config.hidden_scale == 1.0 else hidden * self.config.hidden_scale

    def checkpoint_layers(self, where: str) -> None:
        """Keep only each layer's input of a forward and recompute the rest in the backward pass.

        transformers does that where a layer is in training mode. Only the layers are put into it, not the modules in
        them, so that dropout stays off. Raises UserError, which names `where`, when that changes the result or cannot
        be done.
        """
        try:
            self._causal.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recompute_context})
        except ValueError as error:
            raise UserError(f"trainer.checkpoint_activations=layer: {where}: {error}; set it to none") from None
        lengths = (5, 3)
        call = (torch.arange(8) % self.config.vocabulary).to(self.head.device), torch.arange(8).to(self.head.device)
        expected = self(*call, DocumentAttention(lengths))
        layers = [module for module in self.modules() if getattr(module, "gradient_checkpointing", None) is True]
        for layer in layers:
            layer.training = True
        if not layers or not torch.equal(self(*call, DocumentAttention(lengths)), expected):
            raise UserError(
                f"trainer.checkpoint_activations=layer: {where}: this architecture computes otherwise with it; set it "
                "to none"
            )

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and weights as transformers does; `weights` by name take the place of the parameters."""
        state = None
        if weights is not None:  # buffers and tied names come from the model
            # (transformers handles a tied name of a sharded model: it leaves it out)
            held = [item for item in self._causal.state_dict().items() if not isinstance(item[1], DTensor)]
            state = {plain_name(name): tensor for name, tensor in held if ".lora_" not in name} | dict(weights)
            known = {parameter: name for name, parameter in self.named_parameters()}
            for name, parameter in self._causal.named_parameters(remove_duplicate=False):
                if (given := known.get(parameter, "")) in weights:  # a tied weight under its other name
                    state[name] = weights[given]
        self._causal.save_pretrained(folder, state_dict=state, save_peft_format=False)

    def _check_logits(self, folder: Path) -> None:
        """Check that two documents packed through our attention get transformers' logits of each, with windows so short
        that they matter. Raises UserError."""
        lengths = PROBE_LENGTHS
        generator = torch.Generator().manual_seed(0)
        documents = [torch.randint(self.config.vocabulary, (n,), generator=generator) for n in lengths]
        positions = torch.cat([torch.arange(n) for n in lengths])
        with torch.no_grad(), narrowed(self._causal, PROBE_WINDOW):
            expected = torch.cat([self._causal(input_ids=d[None], use_cache=False).logits[0] for d in documents])
            self._causal.set_attn_implementation(INTERFACE)
            calls = CountedAttention(DocumentAttention(lengths))
            try:
                found = soft_cap(self(torch.cat(documents), positions, calls) @ self.head.T, self.logit_cap)
            except (TypeError, LookupError) as error:
                raise UserError(f"{folder}: this architecture cannot be packed: {error}") from None
        difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if len(calls.layers) != self.config.layers or not difference < TOLERANCE:
            raise UserError(
                f"{folder}: model_type {self.config.family!r} does something this trainer cannot honour "
                f"(logits differ by {float(difference):.2g} of the largest, {len(calls.layers)} of "
                f"{self.config.layers} layers use plain attention), such as recurrent layers, attention sinks or "
                "positions that are added to scores; choose a model of another architecture"
            )


class LayerRefused(Exception):
    """A layer asks for what `Attention` does not have."""


class CountedAttention:
    """An `Attention` that calls `inner` and records which layers called, and (heads, kv_heads, head_dim)."""

    def __init__(self, inner: Attention) -> None:
        self.inner = inner
        self.layers: set[int] = set()
        self.heads = (0, 0, 0)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int = 0, cap: float = 0.0
    ) -> Tensor:
        """Shapes as `Attention.__call__`."""
        self.layers.add(layer)
        self.heads = (query.shape[1], key.shape[1], key.shape[2])
        return self.inner(layer, query, key, value, window=window, cap=cap)


def call_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: query [1, heads, tokens, head_dim], key and value with kv_heads
    -> [1, tokens, heads, head_dim]. Raises LayerRefused for a feature that `Attention` does not have."""
    for name, meaning in FEATURES.items():
        if features.get(name) is not None:
            raise LayerRefused(f"{type(module).__name__} uses {meaning}, which cannot be packed")
    if attention_mask is not None or key.shape[-1] != value.shape[-1]:
        raise LayerRefused(f"{type(module).__name__} passes its own mask or keys and values of unequal sizes")
    head_dim = query.shape[-1]
    if scaling is not None and not math.isclose(scaling, head_dim**-0.5):
        query = query * (scaling * head_dim**0.5)  # Attention scales by 1/sqrt(head_dim)
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = _current.get()(module.layer_idx, *packed, window=sliding_window or 0, cap=softcap or 0.0)
    return out[None], None


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), any shape; 0: as they are."""
    return torch.tanh(logits / cap) * cap if cap else logits


def recompute_context() -> tuple[Any, Any]:
    """(context of a layer's forward, context of its recomputation), the second with the same attention."""
    return contextlib.nullcontext(), using(_current.get())


@contextlib.contextmanager
def using(attention: Attention) -> Any:
    """Inside, transformers' layers call `attention`."""
    token = _current.set(attention)
    try:
        yield
    finally:
        _current.reset(token)


def _tied(causal: Any) -> bool:
    return causal.get_output_embeddings().weight is causal.get_input_embeddings().weight


@contextlib.contextmanager
def narrowed(causal: Any, window: int) -> Any:
    """Inside, every sliding window of the model has at most `window` tokens: a short document then shows it."""
    holders = [h for h in (causal.config, *causal.modules()) if isinstance(getattr(h, "sliding_window", None), int)]
    before = [holder.sliding_window for holder in holders]
    for holder in holders:
        holder.sliding_window = min(holder.sliding_window, window)
    try:
        yield
    finally:
        for holder, width in zip(holders, before, strict=True):
            holder.sliding_window = width


def observe_shape(causal: Any, folder: Path) -> ForeignConfig:
    """The shape of a loaded model. The numbers of heads are observed in a call, because configs name them variously."""
    config = causal.config
    calls = CountedAttention(DocumentAttention([2]))
    before = config._attn_implementation
    causal.set_attn_implementation(INTERFACE)
    try:
        with torch.no_grad(), using(calls):
            causal.base_model(input_ids=torch.tensor([[0, 1]]), use_cache=False)
    except TypeError as error:
        raise UserError(f"{folder}: this architecture does not use the attention interface: {error}") from None
    causal.set_attn_implementation(before)
    heads, kv_heads, head_dim = calls.heads
    if getattr(causal.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{folder}: model_type {config.model_type!r} has a head with bias, which is not supported")
    head, values = causal.get_output_embeddings().weight, config.to_dict()
    return ForeignConfig(
        family=str(config.model_type),
        vocabulary=head.shape[0],
        hidden=head.shape[1],
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=rope_context(values, int(getattr(config, "max_position_embeddings", 0) or 2048)),
        ends=any(given["rope_type"] == "longrope" for given in rope_settings(values)),
        hidden_scale=float(values.get("logit_scale") or 1.0) / float(values.get("logits_scaling") or 1.0),
        logit_cap=float(values.get("final_logit_softcapping") or 0.0),
    )


Model = Decoder | HuggingFaceDecoder
"""what the trainer trains"""
