"""What an engine is: tokens in, tokens out, with the log-prob and weight version of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from torch import Tensor


class SamplingParams(Struct, frozen=True, kw_only=True, gc=False):
    """How one turn is sampled. Always from the whole vocabulary (top-p 1, no top-k): the recorded log-prob is that of
    the distribution sampled from."""

    max_tokens: int
    """>= 1"""
    temperature: float = 1.0
    """0 is greedy decoding; the log-prob recorded is then that of temperature 1"""
    stop_tokens: tuple[int, ...] = ()
    """sampling one of these ends the turn; it is part of the turn"""
    stop_strings: tuple[str, ...] = ()
    """the turn ends when its decoded text contains one of these"""


class Request(Struct, frozen=True, kw_only=True, gc=False):
    """One turn to be sampled, in one context of an episode."""

    session: int
    """key of the context: an engine may keep its KV cache between turns until `release(session)`"""
    tokens: Sequence[int]
    """the history that the model sees, never empty. It starts with that of the session's turn before, usually: where
    it does not, an engine keeps in its cache what the two have in common"""
    params: SamplingParams
    seed: int
    """of the context. The noise of a token depends only on the seed and its position in the history, so neither the
    batch that it shares nor an interruption changes what is sampled; equal seeds would give the contexts of an episode
    the same noise"""

    def check(self) -> None:
        """Raises ValueError for what no engine can sample."""
        if len(self.tokens) == 0 or self.params.max_tokens < 1 or not self.params.temperature >= 0:
            raise ValueError("a request needs tokens, max_tokens >= 1 and temperature >= 0")


class Completion(Struct, frozen=True, kw_only=True, gc=False):
    """One sampled turn; the three lists have equal length."""

    tokens: Sequence[int]
    log_probs: Sequence[float]
    """log-prob of each token under the (temperature-scaled) distribution it was sampled from"""
    versions: Sequence[int]
    """weight version that sampled each token"""
    finish: Literal["stop", "length", "aborted"]
    """length: `max_tokens` or the engine's context length was reached"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine was made."""

    busy_seconds: float
    """wall time in which it had sequences in hand"""
    tokens_generated: int
    tokens_prefilled: int
    running: int
    """sequences being decoded now"""
    waiting: int
    """requests not yet started"""
    cache_bytes: int = 0
    """of the keys and values held at most until now; 0: not known"""


class LogitsNotFinite(RuntimeError):
    """The model gave logits that are NaN or infinite. It ends the sequence that they belong to."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the model's logits are not finite under weights of version {version}")


class Engine(Protocol):
    """Implemented by the embedded engine and by vLLM. One event loop owns an engine."""

    @property
    def version(self) -> int:
        """Version of the weights that sample the next token."""
        ...

    @property
    def max_context(self) -> int:
        """Most tokens (history and new) of one sequence."""
        ...

    async def generate(self, request: Request) -> Completion:
        """Sample one turn. Requests run together; one that finishes leaves, new ones enter at once.

        Raises LogitsNotFinite, which concerns this request alone, or RunFailed when the engine has died."""
        ...

    def sampled(self, session: int) -> Sequence[int]:
        """Tokens so far of the turn that is being sampled for a session; none where none is."""
        ...

    async def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace the weights in flight. Running sequences go on; tokens sampled after the return
        carry `version`."""
        ...

    async def probe(self, tokens: Sequence[int]) -> Sequence[float]:
        """Log-probs of tokens[1:] given what precedes each, under the current weights."""
        ...

    async def fingerprint(self) -> Mapping[str, int | None]:
        """Checksums (`async_rl.weights.canary.fingerprint`) of the weights as the engine holds them now, under
        the trainer's names. An engine that holds them otherwise gives those of the weights it was given last.
        None: a tensor that no process of the engine holds whole."""
        ...

    def release(self, session: int) -> None:
        """The episode is over: forget its KV cache."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
