"""Continuous decoding in plain torch on the decoder the trainer uses.

Every step feeds one packed row of tokens: the last token of each running turn, together with new prompts and appended
environment text up to the prefill budget (scheduler.py). A turn that ends leaves at once and the next request takes its
slot before the following step; no sequence waits for the longest. A prompt of several sequences is fed once, and its
blocks of the cache are shared (kv_blocks.py).

One background task owns the model. It yields to the event loop after each step, so that sessions whose turn just ended
can request their next one before the next step; without work it sleeps on an event.

Shapes: rows are the sequences of one step, tokens all tokens fed in it, slots the places of sequences.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from async_rl.errors import RunFailed
from async_rl.generator.engine import Completion, EngineStats, LogitsNotFinite, Request
from async_rl.generator.further_steps import FurtherSteps
from async_rl.generator.kv_blocks import BLOCK, SCRATCH, BlockTables, Ints, block_bytes, cache_blocks
from async_rl.generator.kv_cache import CacheAttention, Feed, KVCache, Places, arrange
from async_rl.generator.sampling import StopRules, sample, uniforms
from async_rl.generator.scheduler import Scheduler
from async_rl.generator.slots import CheckedRequest, Slots
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.model.fused_decoder import CachedStep, FusedDecoder
from async_rl.model.huggingface import HuggingFaceDecoder, soft_cap
from async_rl.model.tokenizer import Tokenizer
from async_rl.weights.canary import fingerprint
from async_rl.weights.shared_memory import check_fit, overwrite
from async_rl_kernels.product import linear

PROBE_ROWS = 1024
"""tokens whose logits a probe holds at once"""

GO_ON_S, FULL_S = 0.01, 0.02
"""in which steps are taken that nothing comes between: where a request may come meanwhile, and where every slot runs"""
FEW = 64
"""tokens: Python finds the largest of so many faster than numpy"""

Answer = asyncio.Future[Completion]
Finish = Literal["stop", "length", "aborted"]


class EmbeddedEngine:
    """`Engine` on the CPU or one GPU. It owns the model: moves it and overwrites its weights.

    Args:
        max_sequences: sequences with a cache (running and between turns); further requests wait in order.
        max_context: tokens of one sequence; never more than the model's own limit.
        cache_bytes: most memory of the KV cache, which grows as it is used. When it is full, idle sessions lose theirs,
            then the youngest running sequences, whose turn goes on later. 0: what `max_sequences` of `max_context`
            take, at most kv_blocks.CACHE_BYTES.
        kv_on_update: after `load`, rebuild the cache of every sequence under the new weights ("recompute"), or go on
            with the old one ("keep": cheaper, but later tokens are sampled from neither policy).
        prefill_tokens: most prompt and environment tokens in one step.
        device, dtype: the model's own unless given.
        around_step: a context in which each step and each probe run.
    """

    def __init__(
        self,
        model: Decoder | HuggingFaceDecoder,
        tokenizer: Tokenizer,
        *,
        max_sequences: int = 64,
        max_context: int | None = None,
        cache_bytes: int = 0,
        kv_on_update: Literal["recompute", "keep"] = "recompute",
        prefill_tokens: int = 2048,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        around_step: AbstractContextManager[None] | None = None,
    ) -> None:
        if max_sequences < 1 or prefill_tokens < 1:
            raise ValueError("max_sequences and prefill_tokens must be at least 1")
        if max_context is not None and not 2 <= max_context <= model.config.max_context:
            raise ValueError(f"max_context {max_context} is not within 2..{model.config.max_context} of the model")
        device = torch.device(device) if device is not None else model.head.device
        dtype = dtype or model.head.dtype
        self._model = model.to(device=device, dtype=dtype).eval()
        self._device = device
        self._max_context = max_context or model.config.max_context
        self._forward: FusedDecoder | HuggingFaceDecoder
        if isinstance(self._model, Decoder):
            self._forward = FusedDecoder(self._model, self._max_context)
        else:
            self._forward = self._model
        self._around_step = around_step or nullcontext()
        self._recompute = kv_on_update == "recompute"
        config = model.config
        each = block_bytes(config.layers, config.kv_heads, config.head_dim, dtype.itemsize)
        blocks = cache_blocks(each, max_sequences, self._max_context, cache_bytes)
        self._cache = KVCache(
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_blocks=blocks,
            device=self._device,
            dtype=dtype,
        )
        self._tables = BlockTables(slots=max_sequences, blocks=blocks, size=BLOCK)
        self._slots = Slots(max_sequences, self._max_context, self._tables)
        self._attention: CacheAttention | None = None  # of the last step
        self._scheduler = Scheduler(self._slots, self._tables, prefill_tokens)
        self._vocabulary = model.config.vocabulary
        self._rules = StopRules(tokenizer, self._vocabulary)
        self._further: FurtherSteps | None = None
        if isinstance(self._forward, FusedDecoder):
            self._further = FurtherSteps.made(self._slots, self._tables, self._rules, self._cache, self._forward)
        self._waiting: dict[int, tuple[CheckedRequest, Answer]] = {}  # by session, in order of arrival
        self._answers: dict[int, Answer] = {}  # of running sessions
        self._version = 0
        self._wake = asyncio.Event()
        self._whole = asyncio.Event()
        """the weights are those of one version"""
        self._whole.set()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop  # from the first request on
        self._closed = False
        self._busy_seconds = 0.0
        self._generated = self._prefilled = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_context(self) -> int:
        return self._max_context

    async def generate(self, request: Request) -> Completion:
        """Sample one turn. Raises ValueError for a request that cannot be right, LogitsNotFinite when the model gives
        such logits for it, RunFailed when the engine has died."""
        session = request.session
        if session in self._answers or session in self._waiting:
            raise ValueError(f"session {session} is generating already")
        slot = self._slots.of(session)
        known = 0 if slot is None else self._slots.goes_on(slot, request.tokens)
        history = self._checked(request, known)
        if self._closed:
            return Completion(tokens=(), log_probs=(), versions=(), finish="aborted")
        if len(request.tokens) >= self._max_context:
            return Completion(tokens=(), log_probs=(), versions=(), finish="length")
        rule = self._rules.number(request.params, self._rules_in_use)
        checked = CheckedRequest(request=request, history=history, rule=rule, known=known)
        if self._task is None or self._task.done():
            self._start_task()
        answer: Answer = self._loop.create_future()
        if slot is not None:  # between two turns: it has its slot already
            self._begin(slot, checked, answer)
        else:
            self._waiting[session] = (checked, answer)
        self._wake.set()
        try:
            return await answer
        except asyncio.CancelledError:
            self.release(session)
            raise

    def sampled(self, session: int) -> Sequence[int]:
        """Tokens so far of the turn that is being sampled for a session; none where none is."""
        slot = self._slots.of(session)
        if slot is None or session not in self._answers or slot in self._slots.resumed:
            return []
        found: list[int] = self._slots.new_tokens(slot).tolist()
        return found

    async def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy `weights` into the parameters. Raises ValueError, and changes nothing, unless names and shapes are
        exactly those of the model's parameters."""
        parameters = dict(self._model.named_parameters())
        check_fit({name: tensor.shape for name, tensor in weights.items()}, parameters, version)
        with torch.no_grad():
            for name, parameter in parameters.items():
                overwrite(parameter, weights[name])
        self._loaded(version)

    async def load_in_place(self, read: Callable[[Mapping[str, Tensor]], int]) -> None:
        """Have `read`, in a thread, write a version into the parameters and say its number; no token is sampled
        meanwhile. Raises ValueError when it does, which must have changed nothing. After another exception the engine
        samples no more, because its weights may be of several versions."""
        parameters = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        self._whole.clear()
        try:
            version = await asyncio.to_thread(read, parameters)
        except ValueError:
            self._whole.set()
            raise
        self._loaded(version)
        self._whole.set()

    def _loaded(self, version: int) -> None:
        self._version = version
        if self._recompute:
            self._tables.clear_all()
        self._tables.forget()

    async def probe(self, tokens: Sequence[int]) -> Sequence[float]:
        """Log-probs of tokens[1:] given what precedes each, at temperature 1."""
        ids = torch.tensor(list(tokens), dtype=torch.int64, device=self._device)
        if len(ids) < 2:
            return []
        found: list[float] = []
        with torch.no_grad(), self._around_step:
            positions = torch.arange(len(ids), device=self._device)
            hidden = self._forward(ids, positions, DocumentAttention([len(ids)]))  # [tokens, hidden]
            for begin in range(0, len(ids) - 1, PROBE_ROWS):
                target = ids[begin + 1 : begin + 1 + PROBE_ROWS, None]
                logits = hidden[begin : begin + len(target)] @ self._model.head.T  # [rows, vocabulary]
                logits = soft_cap(logits, self._model.logit_cap)
                found += torch.log_softmax(logits.float(), -1).gather(1, target).squeeze(1).tolist()
        return found

    async def fingerprint(self) -> Mapping[str, int]:
        """Checksums of the parameters as they are now."""
        return fingerprint(dict(self._model.named_parameters()), self._version)

    def release(self, session: int) -> None:
        """Forget a session and abort its turn, waiting or running."""
        waiting = self._waiting.pop(session, None)
        if waiting is not None:
            self._finish(waiting[1], (), (), (), "aborted")
        slot = self._slots.of(session)
        if slot is None:
            return
        if slot in self._slots.resumed:
            self._finish(self._answers.pop(session), (), (), (), "aborted")
        elif self._slots.running[slot]:
            self._answer(np.array([slot]), ["aborted"])
        self._slots.clear(slot)

    def stats(self) -> EngineStats:
        return EngineStats(
            busy_seconds=self._busy_seconds,
            tokens_generated=self._generated,
            tokens_prefilled=self._prefilled,
            running=int(self._slots.running.sum()) + len(self._slots.resumed),
            waiting=len(self._waiting),
            cache_bytes=self._tables.touched * self._cache.block_bytes,
        )

    async def close(self) -> None:
        """Abort every request with the tokens it has, and stop."""
        self._closed = True
        for session in [*self._waiting, *self._answers]:
            self.release(session)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _checked(self, request: Request, known: int) -> NDArray[np.int32] | list[int]:
        """The request's tokens, [tokens] int32; where some are `known`, a list of those behind them. Raises ValueError
        for a request that cannot be served."""
        request.check()
        tokens = request.tokens[known:] if known else request.tokens
        history = tokens if known and isinstance(tokens, list) else np.asarray(tokens, dtype=np.int32)
        if len(tokens) == 1:
            most = tokens[0] if tokens[0] >= 0 else self._vocabulary
        elif len(tokens) <= FEW and min(tokens) >= 0:
            most = max(tokens)
        else:
            most = int(np.asarray(history, dtype=np.int32).view(np.uint32).max())
        if most >= self._vocabulary:  # negative ones are huge
            raise ValueError(f"a token is outside the vocabulary of {self._vocabulary}")
        return history

    def _rules_in_use(self) -> set[int]:
        running = self._slots.rule[self._slots.running].tolist()
        begin = [*self._slots.resumed.values(), *(checked for checked, _ in self._waiting.values())]
        return {*running, *(checked.rule for checked in begin)}

    def _start_task(self) -> None:
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._task = self._loop.create_task(self._run(), name="embedded engine")
            self._task.add_done_callback(self._ended)
        elif self._task.done() and not self._closed:
            raise self._death(self._task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Raise the cause of the background task's end in everyone who waits for an answer."""
        if self._closed:
            return
        error = self._death(task)
        for answer in [*self._answers.values(), *(answer for _, answer in self._waiting.values())]:
            if not answer.done():
                answer.set_exception(error)
        self._answers.clear()
        self._waiting.clear()
        self._slots.resumed.clear()
        self._slots.running[:] = False

    @staticmethod
    def _death(task: asyncio.Task[None]) -> RunFailed:
        if task.cancelled():
            return RunFailed("the engine's asyncio task was cancelled by other code (asyncio.all_tasks)")
        error = task.exception()
        failed = RunFailed(f"the engine failed: {type(error).__name__}: {error}")
        failed.__cause__ = error
        return failed

    async def _run(self) -> None:
        while True:
            if not self._answers and not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            await self._whole.wait()
            begun = time.perf_counter()
            self._admit()
            if self._answers:
                with self._around_step:
                    self._step()
            await asyncio.sleep(0)  # what sessions do for these sequences is part of generating
            self._busy_seconds += time.perf_counter() - begun

    def _admit(self) -> None:
        """Begin the turns of sessions that have a slot, then give waiting requests one, in order."""
        self._slots.start_resumed()
        while self._waiting:
            session = next(iter(self._waiting))
            if (slot := self._slots.take(session)) is None:
                return
            checked, answer = self._waiting.pop(session)
            self._begin(slot, checked, answer)

    def _begin(self, slot: int, checked: CheckedRequest, answer: Answer) -> None:
        if checked.known:  # all that is cached stays
            self._slots.resume(slot, checked)
        else:
            assert isinstance(checked.history, np.ndarray)
            copy = self._tables.truncate(slot, self._slots.in_common(slot, checked.history))
            self._cache.copy([copy] if copy is not None else [])
            self._slots.start(slot, checked)
        self._answers[checked.request.session] = answer

    @torch.inference_mode()  # no tensor of a step outlives the engine
    def _step(self) -> None:
        """Feed tokens, sample one token of every row whose history is complete, end turns."""
        slots = self._slots
        step = self._scheduler.next_step()
        self._cache.reserve(self._tables.touched)
        self._cache.copy(step.copies)
        rows, order, near, far = arrange(step.feed, plain=self._cache.plain, at_once=self._at_once)
        at = rows_at(step.feed, order)
        where = Places(step.block[at], step.place[at])
        attention = CacheAttention(self._cache, self._tables, rows, where, near, far, self._attention)
        self._attention = attention
        complete = rows.start + rows.count == slots.known[rows.slot]  # [rows]
        logits = self._logits(attention, where, complete)
        self._tables.settle()
        self._prefilled += int(rows.count.sum()) - int((rows.count == 1).sum())
        if logits is None:
            return
        slot = rows.slot[complete]
        if step.twins:
            place = np.empty(len(order), dtype=np.int64)
            place[order[complete]] = np.arange(len(slot))
            slot = np.concatenate((slot, [twin for twin, _ in step.twins]))
            own = [*range(len(logits)), *(int(place[row]) for _, row in step.twins)]
            logits = logits.index_select(0, self._to_device(np.array(own)))
        if not self._sample(slot, logits) and not step.twins and len(slot) == len(attention.row):
            self._go_on(attention)

    @property
    def _at_once(self) -> bool:
        """Whether one compiled function computes a whole step."""
        return self._cache.compiled is not None and isinstance(self._forward, FusedDecoder) and self._forward.at_once

    def _logits(self, attention: CacheAttention, where: Places, complete: NDArray[np.bool_]) -> Tensor | None:
        """Feed a step's tokens; logits of the last ones of rows that are `complete` [rows], None where none is."""
        tokens = self._to_device(self._slots.tokens[attention.slot, attention.position].astype(np.int64))  # [tokens]
        positions, last = self._to_device(attention.position), attention.last[complete]
        if attention.at_once is not None and isinstance(self._forward, FusedDecoder):
            step = CachedStep(
                tokens=tokens,
                positions=positions,
                last=last,
                attention=attention.at_once,
                places=where.addresses,
                keys=self._cache.key,
                values=self._cache.value,
            )
            if (logits := self._forward.logits(step)) is not None:
                return logits if len(last) else None
        hidden = self._forward(tokens, positions, attention)  # [tokens, hidden]
        if not len(last):
            return None
        if len(last) < len(tokens):
            hidden = hidden.index_select(0, self._to_device(last))
        return soft_cap(linear(hidden, self._model.head), self._model.logit_cap)

    def _go_on(self, attention: CacheAttention) -> None:
        """Take further steps like the last one, in which every running row was fed one token and none ended: until one
        may end, a block is full, or the event loop is to have its turn."""
        slots, slot = self._slots, attention.slot
        if self._further is None or attention.at_once is None or len(slot) < len(self._answers):
            return
        full = len(slot) == len(slots.running)
        if self._waiting and not full:
            return
        taken = self._further.take(attention, self._version, FULL_S if full else GO_ON_S)
        if taken is None:
            return
        self._tables.settle()
        self._generated += (taken.steps - 1) * len(slot)
        self._end_turns(slot, taken.token, taken.log_prob)

    def _sample(self, slot: NDArray[np.int64], logits: Tensor) -> bool:
        """Sample one token for each of `slot` [rows] from `logits` [rows, vocabulary], which are overwritten, and end
        turns that are over. Returns whether one is."""
        slots = self._slots
        at = slots.known[slot]
        drawn, drawn_log_probs = sample(logits, slots.temperature[slot], uniforms(slots.seed[slot], at))  # [rows] each
        token, log_prob = drawn.cpu().numpy(), drawn_log_probs.cpu().numpy()
        noted, at_noted = slot, at
        finite = np.isfinite(log_prob)
        if not finite.all():
            noted, at_noted = slot[finite], at[finite]
        slots.tokens[noted, at_noted] = token[finite]
        slots.log_probs[noted, at_noted] = log_prob[finite]
        slots.versions[noted, at_noted] = self._version
        slots.known[noted] = at_noted + 1
        return self._end_turns(slot, token, log_prob)

    def _end_turns(self, slot: NDArray[np.int64], token: NDArray[np.int64], log_prob: NDArray[np.float32]) -> bool:
        """End the turns of `slot` [rows] that are over with the tokens just sampled, and those whose log-probs are not
        finite, whose tokens are not noted. Returns whether one has ended."""
        slots, finite = self._slots, np.isfinite(log_prob)
        if not finite.all():
            for lost in slot[~finite]:
                self._fail(int(lost))
            slot, token = slot[finite], token[finite]
        self._generated += len(slot)
        stopped = self._rules.ended(slots.rule[slot], token, slot, slots.new_tokens)
        over = np.flatnonzero(stopped | (slots.known[slot] >= slots.limit[slot]))
        if len(over):
            self._answer(slot[over], ["stop" if stop else "length" for stop in stopped[over].tolist()])
            slots.end(slot[over])
        return bool(len(over)) or not finite.all()

    def _fail(self, slot: int) -> None:
        """End the turn of a running slot whose logits are not finite, and forget its session."""
        answer = self._answers.pop(self._slots.session[slot])
        if not answer.done():
            answer.set_exception(LogitsNotFinite(self._version))
        # What blocks hold later is multiplied with what they hold now, by weight 0, and 0 times NaN is NaN. A block
        # that another sequence holds, too, stays: when it is not finite, that one fails in its turn.
        own = [block for block in self._tables.chain(slot) if self._tables.holders[block] == 1]
        self._cache.zero([SCRATCH, *own])
        self._slots.clear(slot)

    def _answer(self, slot: NDArray[np.int64], finish: Sequence[Finish]) -> None:
        """Complete the turns of running slots [n]; `finish` [n]."""
        slots = self._slots
        begin = slots.turn_start[slot]
        length = slots.known[slot] - begin
        if len(slot) * int(length.max()) > 4 * int(length.sum()) + FEW:  # one is much longer than the others
            for row, how in enumerate(finish):
                self._answer(slot[row : row + 1], [how])
            return
        column = begin[:, None] + np.arange(length.max())
        at = slot[:, None], np.minimum(column, self._max_context - 1)
        turns = [slots.tokens[at].tolist(), slots.log_probs[at].tolist(), slots.versions[at].tolist()]
        if length.min() < length.max():
            turns = [[row[:n] for row, n in zip(rows, length.tolist(), strict=True)] for rows in turns]
        slots.hold(slot, turns[0])
        for session, how, tokens, log_probs, versions in zip(slots.session[slot].tolist(), finish, *turns, strict=True):
            self._finish(self._answers.pop(session), tokens, log_probs, versions, how)

    def _finish(
        self,
        answer: Answer,
        tokens: Sequence[int],
        log_probs: Sequence[float],
        versions: Sequence[int],
        finish: Finish,
    ) -> None:
        if not answer.done():
            answer.set_result(Completion(tokens=tokens, log_probs=log_probs, versions=versions, finish=finish))

    def _to_device(self, values: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def rows_at(feed: Feed, order: Ints) -> Ints:
    """Indices [tokens] of the tokens of rows `order` of a feed, row by row."""
    begin = feed.count.cumsum() - feed.count
    count = feed.count[order]
    return np.arange(count.sum()) + np.repeat(begin[order] - (count.cumsum() - count), count)
