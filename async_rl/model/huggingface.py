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
from async_rl.model.architecture import plain_name
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Attention, Decoder

INTERFACE = "async_rl"
TOLERANCE = 1e-3
"""largest difference of a logit between our call and transformers' own, in float32, relative to the largest logit;
unsupported features differ by far more"""

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
        refuse_unsupported(causal.config, folder)
        causal.eval()
        model = cls(causal, observe_shape(causal, folder))
        model._check_logits(folder)
        causal.to(device=device, dtype=dtype)
        return model

    @property
    def head(self) -> Tensor:  # [vocabulary, hidden]
        return self._causal.get_output_embeddings().weight

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """tokens, positions [tokens] int64 -> hidden [tokens, hidden] after the final norm."""
        with using(attention):
            out = self._causal.base_model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        return out.last_hidden_state[0]

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
        """Check that two documents packed through our attention get transformers' logits of each. Raises UserError."""
        lengths = (11, 6)
        generator = torch.Generator().manual_seed(0)
        documents = [torch.randint(self.config.vocabulary, (n,), generator=generator) for n in lengths]
        positions = torch.cat([torch.arange(n) for n in lengths])
        with torch.no_grad():
            expected = torch.cat([self._causal(input_ids=d[None], use_cache=False).logits[0] for d in documents])
            self._causal.set_attn_implementation(INTERFACE)
            calls = CountedAttention(DocumentAttention(lengths))
            try:
                found = self(torch.cat(documents), positions, calls) @ self.head.T
            except (TypeError, LookupError) as error:
                raise UserError(f"{folder}: this architecture cannot be packed: {error}") from None
        difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if len(calls.layers) != self.config.layers or not difference < TOLERANCE:
            raise UserError(
                f"{folder}: model_type {self.config.family!r} does something this trainer cannot honour "
                f"(logits differ by {float(difference):.2g} of the largest, {len(calls.layers)} of "
                f"{self.config.layers} layers use plain attention): logit scaling or soft-capping, "
                "a head with bias, recurrent layers, attention sinks"
            )


class CountedAttention:
    """An `Attention` that calls `inner` and records which layers called, and (heads, kv_heads, head_dim)."""

    def __init__(self, inner: Attention) -> None:
        self.inner = inner
        self.layers: set[int] = set()
        self.heads = (0, 0, 0)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Shapes as `Attention.__call__`."""
        self.layers.add(layer)
        self.heads = (query.shape[1], key.shape[1], key.shape[2])
        return self.inner(layer, query, key, value)


def call_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **features: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: query [1, heads, tokens, head_dim], key and value with kv_heads
    -> [1, tokens, heads, head_dim]. Raises UserError for a feature of the layer that `Attention` does not have."""
    for name in ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask"):
        if features.get(name) is not None:
            raise UserError(f"{type(module).__name__} uses {name}, which is not supported")
    if attention_mask is not None or key.shape[-1] != value.shape[-1]:
        raise UserError(f"{type(module).__name__} passes its own mask or unequal key and value sizes; not supported")
    head_dim = query.shape[-1]
    if scaling is not None and not math.isclose(scaling, head_dim**-0.5):
        query = query * (scaling * head_dim**0.5)  # Attention scales by 1/sqrt(head_dim)
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _current.get()(module.layer_idx, *packed)[None], None


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


def refuse_unsupported(config: Any, folder: Path) -> None:
    """Raise UserError for features that a short probe would not show."""
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if kinds - {"full_attention"} or (windowed and not kinds):
        raise UserError(f"{folder / 'config.json'}: sliding-window or mixed attention is not supported")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{folder / 'config.json'}: encoder-decoder models are not supported")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None):
            raise UserError(f"{folder / 'config.json'}: {name} is not supported")


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
    head = causal.get_output_embeddings().weight
    return ForeignConfig(
        family=str(config.model_type),
        vocabulary=head.shape[0],
        hidden=head.shape[1],
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=int(getattr(config, "max_position_embeddings", 0) or 2048),
    )


Model = Decoder | HuggingFaceDecoder
"""what the trainer trains"""
