"""vLLM behind the `Engine` protocol: `AsyncLLM` in this process, vLLM's core and workers in their own.

Tokens in, tokens out. Log-probs are those of the distribution sampled from (`processed_logprobs`). The version of each
token is vLLM's own record of which weights sampled it; releases without that record get it from the number of tokens
that had come when an update paused the engine. Weights change while the engine is paused and keeps its requests: the
version is set before it resumes, and with `kv_on_update=recompute` the cache of running requests is rebuilt.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from async_rl.errors import RunFailed
from async_rl.generator.engine import Completion, EngineStats, Request, SamplingParams
from async_rl.generator.pull import TransferEnded
from async_rl.generator.seats import Seats
from async_rl.weights.blocks import join
from async_rl.weights.shared_memory import shared_folder
from async_rl.weights.vllm_release import SPANS, installed_release

if TYPE_CHECKING:
    from torch import Tensor

    from async_rl.generator.pull import SharedReader


LOAD_DEADLINE_S = 600.0
"""longest time the workers may take to load weights"""
BATCH_TOKENS = 8192
"""most tokens of one model step; vLLM's own choice for a GPU, 2048, makes the rebuilding of caches slow"""
STREAM_TOKENS = 16
"""tokens after which vLLM hands on what it sampled, where it keeps the version of each token itself: each handing on
costs this process 20 microseconds"""
PROBE_FIRST = -1
"""vLLM's priority of a probe; turns have 0, and the lowest number is served first"""
OWNER = "ASYNC_RL_VLLM_OWNER"
"""environment variable: the process with which vLLM's processes end (vllm_worker.py)"""
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_ENVIRONMENT_CPU = {
    "TORCHDYNAMO_DISABLE": "1",  # else the first tokens wait 40 s for the sampler to be compiled
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the launcher sets the number of threads; the trainer needs a core
}


@dataclass(slots=True)
class _RunningRequest:
    """The answer to a request so far."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    cuts: list[tuple[int, int]] = field(default_factory=list)
    """(number of tokens that had come, their version) at each update while it ran"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM is started."""

    model: Path
    max_sequences: int
    max_context: int
    """tokens of one sequence"""
    dtype: Literal["float32", "bfloat16"]
    device: str
    """cpu or cuda"""
    kv_on_update: Literal["recompute", "keep"]
    kv_cache_bytes: int
    """memory for keys and values; 0: vLLM's own choice (a share of the GPU)"""
    memory_share: float
    """share of the GPU's memory for weights and cache together"""
    tensor_parallel: int
    """number of worker processes that the model is split over"""
    head_dtype: Literal["float32", "model"] = "float32"
    """of the logits: vLLM's own choice, `model`, rounds those of a bfloat16 model to bfloat16"""
    quantization: Literal["none", "fp8"] = "none"
    """of the layers' matrices, made by vLLM from each version of the weights"""
    speculative: Mapping[str, Any] = field(default_factory=dict)
    """vLLM's speculative_config; empty: none"""
    layout: Mapping[str, tuple[int, ...]]
    """shapes of the model's weights, under the trainer's names"""
    transfer: str = ""
    """vLLM's back end for weights that the trainer sends straight into the workers (nccl, ipc); empty: none, also
    where one broadcast goes to all engines (weights/broadcast.py)"""
    worker: str = "async_rl.generator.vllm_worker.Weights"
    """class that vLLM mixes into its worker"""


class VllmEngine:
    """`Engine` on vLLM. Made by `start`, within the event loop that will use it."""

    def __init__(self, llm: Any, options: VllmOptions, *, has_spans: bool) -> None:
        self._llm = llm
        self._options = options
        self._has_spans = has_spans
        self._version = 0
        self._loading = asyncio.Lock()
        self._seats = Seats(options.max_sequences)
        self._requests: dict[int, str] = {}  # by session
        self._running: dict[str, _RunningRequest] = {}
        self._asked = 0
        self._generated = self._prefilled = 0
        self._busy_seconds, self._busy_since = 0.0, 0.0
        self._closed = False

    @classmethod
    def start(cls, options: VllmOptions) -> VllmEngine:
        """Start vLLM's processes (10 to 30 s). Raises RunFailed with its reason when they do not come up."""
        for name, value in {**_ENVIRONMENT, **(_ENVIRONMENT_CPU if options.device == "cpu" else {})}.items():
            os.environ.setdefault(name, value)
        os.environ[OWNER] = str(os.getpid())
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(options)))
        except Exception as error:  # vLLM's own processes failed, which may raise anything
            raise RunFailed(f"vLLM did not start: {type(error).__name__}: {error}") from error
        return cls(llm, options, has_spans=installed_release() >= SPANS)

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_context(self) -> int:
        return self._options.max_context

    async def generate(self, request: Request) -> Completion:
        """Sample one turn. Raises ValueError for a request that cannot be right, RunFailed when vLLM died."""
        request.check()
        history = list(request.tokens)
        if request.session in self._requests:
            raise ValueError(f"session {request.session} is generating already")
        if self._closed:
            return Completion(tokens=(), log_probs=(), versions=(), finish="aborted")
        room = self.max_context - len(history)
        if room <= 0:
            return Completion(tokens=(), log_probs=(), versions=(), finish="length")
        self._asked += 1
        name = f"{request.session}-{self._asked}"
        self._requests[request.session] = name
        running = self._running[name] = _RunningRequest()
        self._busy(now=time.perf_counter())
        try:
            if not await self._seats.take(name):
                return Completion(tokens=(), log_probs=(), versions=(), finish="aborted")
            try:
                return await self._collect(name, running, history, request, min(request.params.max_tokens, room))
            finally:
                self._seats.give_back()
        finally:
            del self._requests[request.session], self._running[name]
            self._busy(now=time.perf_counter())

    def sampled(self, session: int) -> Sequence[int]:
        """Tokens so far of the turn that is being sampled for a session; none where none is."""
        running = self._running.get(self._requests.get(session, ""))
        return tuple(running.tokens) if running is not None else ()

    async def _collect(
        self, name: str, running: _RunningRequest, history: list[int], request: Request, max_tokens: int
    ) -> Completion:
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = TokensPrompt(prompt_token_ids=history, cache_salt=f"version {self._version}")
        params = sampling_params(request.params, turn_seed(request.seed, len(history)), max_tokens)
        if self._has_spans:
            params.stream_interval = STREAM_TOKENS
        output = None
        try:
            async for answer in self._llm.generate(prompt, params, name):
                (output,) = answer.outputs
                if not output.token_ids:  # an abort, which before 0.29 repeats all log-probs
                    continue
                running.tokens += output.token_ids
                running.log_probs += [
                    entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs or (), strict=True)
                ]
        except (EngineDeadError, EngineGenerateError) as error:
            if self._llm.errored:
                raise RunFailed(f"vLLM's engine died: {error or error.__cause__}") from error
            raise RuntimeError(f"vLLM could not serve a request: {error.__cause__ or error}") from error
        except VLLMValidationError as error:
            raise ValueError(str(error)) from None
        self._prefilled += len(history)
        self._generated += len(running.tokens)
        reason = output.finish_reason if output is not None else "abort"
        return Completion(
            tokens=running.tokens,
            log_probs=running.log_probs,
            versions=self._versions(running, output.weight_versions if self._has_spans and output else None),
            finish={"stop": "stop", "length": "length"}.get(str(reason), "aborted"),  # type: ignore[arg-type]
        )

    def _versions(self, running: _RunningRequest, spans: Sequence[Any] | None) -> list[int]:
        """The version of each token. vLLM labels the weights before the first update with a word of its own."""
        if spans is not None:
            labels = [""] * len(running.tokens)
            for span in spans:
                labels[span.start : span.end] = [span.version] * (span.end - span.start)
            return [int(label) if label.isdecimal() else 0 for label in labels]
        versions: list[int] = []
        for count, version in [*running.cuts, (len(running.tokens), self._version)]:
            versions += [version] * (count - len(versions))
        return versions

    async def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace the weights in flight. Raises RunFailed when vLLM does not load them in time; ValueError, with
        nothing changed, for tensors of another model."""
        self._check_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()})
        async with self._loading:
            with tempfile.TemporaryDirectory(prefix="async-rl-", dir=shared_folder()) as folder:
                file = Path(folder) / "weights.safetensors"
                await asyncio.to_thread(_save, weights, file)
                await self._pause()
                await self._ask_workers("async_rl_load", str(file), version)
                await self._resume(version)

    async def load_shared(self, reader: SharedReader) -> None:
        """Have every worker copy the newest version out of shared memory into its parameters. Raises as `load`."""
        async with self._loading:
            version = reader.wait_for_version()
            self._check_shapes(reader.shapes())
            await self._pause()
            # All of one version: where the trainer has gone on meanwhile, all of the newest.
            while not all(await self._ask_workers("async_rl_load_shared", str(reader.path), version)):
                version = reader.wait_for_version()
            await self._resume(version)

    def _check_shapes(self, given: Mapping[str, Sequence[int]]) -> None:
        for name, shape in self._options.layout.items():
            if name in given and tuple(given[name]) != tuple(shape):
                raise ValueError(f"{name} has shape {list(given[name])}, not {list(shape)}")

    async def handle_call(self, method: str, version: int, detail: Mapping[str, Any]) -> None:
        """Execute a call of the trainer's side of a link (generator/pull.py). Nothing is sampled between start and
        finish."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        match method:
            case "init" if "lifeline" in detail:  # of a broadcast
                if not all(await self._ask_workers("async_rl_join", dict(detail))):
                    raise TransferEnded("the group of the broadcast did not come about")
            case "init":
                request = WeightTransferInitRequest(init_info=dict(detail))
                await self._served(self._llm.init_weight_transfer_engine(request))
            case "start":
                await self._pause()
                if self._options.transfer:
                    await self._served(self._llm.start_weight_update())
            case "update" if "broadcast" in detail:
                if not all(await self._ask_workers("async_rl_receive", dict(detail))):
                    raise TransferEnded("the broadcast ended on the way")
            case "update" if "handles" in detail:
                await self._ask_workers("async_rl_update_ipc", dict(detail))
            case "update":
                update = WeightTransferUpdateRequest(update_info=dict(detail))
                await self._served(self._llm.update_weights(update))
            case "finish":
                if self._options.transfer:
                    await self._served(self._llm.finish_weight_update())
                await self._resume(version)
            case _:
                raise RunFailed(f"the trainer wants '{method[:40]}' of vLLM, which this program does not know")

    async def _pause(self) -> None:
        """Pause, keep the running requests, and note how many of their tokens the present version sampled."""
        await self._served(self._llm.pause_generation(mode="keep", clear_cache=False))
        for running in self._running.values():
            running.cuts.append((len(running.tokens), self._version))

    async def _resume(self, version: int) -> None:
        """Set the version that the workers hold now, and resume."""
        if self._has_spans:
            await self._served(self._llm.update_weight_version(str(version)))
        self._version = version
        # cached blocks of other versions are never found again: the salt names the version that filled them
        if self._options.kv_on_update == "recompute":
            await self._served(self._llm.reset_prefix_cache(reset_running_requests=True))
        await self._served(self._llm.resume_generation())

    async def probe(self, tokens: Sequence[int]) -> Sequence[float]:
        """Log-probs of tokens[1:] given what precedes each, at temperature 1."""
        from vllm import SamplingParams as VllmParams
        from vllm.inputs import TokensPrompt

        if len(tokens) < 2:
            return []
        self._asked += 1
        # vLLM samples one token after a prompt, for which a full context has no room. Then the last token of the probe
        # is left out, and its log-prob is read from the whole distribution of the sampled token instead.
        full = len(tokens) >= self.max_context
        asked = list(tokens[:-1] if full else tokens)
        prompt = TokensPrompt(prompt_token_ids=asked, cache_salt=f"probe {self._asked}")
        params = VllmParams(
            max_tokens=1, temperature=1.0, prompt_logprobs=0, logprobs=-1 if full else None, detokenize=False
        )
        probe = self._llm.generate(prompt, params, f"probe-{self._asked}", priority=PROBE_FIRST)
        answer = await self._served(self._last(probe))
        found: list[Any] = [*answer.prompt_logprobs, *(answer.outputs[0].logprobs if full else ())]
        return [entry[token].logprob for token, entry in zip(tokens[1:], found[1:], strict=True)]

    async def _last(self, answers: Any) -> Any:
        answer = None
        async for answer in answers:  # noqa: B007
            pass
        return answer

    async def fingerprint(self) -> Mapping[str, int | None]:
        """Checksums of the weights as vLLM's workers hold them now, under the trainer's names."""
        layout = self._options.layout
        named, workers = [(name, list(shape)) for name, shape in layout.items()], self._options.tensor_parallel
        shown = await self._ask_workers("async_rl_show", self._version, named, workers)
        return join(shown, layout, self._version)

    def release(self, session: int) -> None:
        """The episode is over: abort its turn if one runs."""
        name = self._requests.get(session)
        if name is not None:
            self._seats.withdraw(name)
            self._aborts = asyncio.ensure_future(self._llm.abort(name))

    def stats(self) -> EngineStats:
        self._busy(now=time.perf_counter())
        return EngineStats(
            busy_seconds=self._busy_seconds,
            tokens_generated=self._generated + sum(len(r.tokens) for r in self._running.values()),
            tokens_prefilled=self._prefilled,
            running=min(len(self._running), self._options.max_sequences),
            waiting=max(0, len(self._running) - self._options.max_sequences),
        )

    async def close(self) -> None:
        """Abort every request with the tokens it has, and end vLLM's processes."""
        self._closed = True
        for name in self._requests.values():
            self._seats.withdraw(name)
        if self._requests:
            await self._llm.abort(list(self._requests.values()))
        await asyncio.to_thread(self._llm.shutdown)

    async def _ask_workers(self, method: str, *arguments: Any) -> list[Any]:
        answers: list[Any] = await self._served(self._llm.collective_rpc(method, args=arguments))
        return answers

    async def _served(self, call: Coroutine[Any, Any, Any]) -> Any:
        """vLLM's answer to a call. Raises RunFailed for every error: the engine's state is unknown then."""
        name = getattr(call, "__qualname__", "a call")
        try:
            return await asyncio.wait_for(call, LOAD_DEADLINE_S)
        except TimeoutError:
            raise RunFailed(f"vLLM did not answer {name} within {LOAD_DEADLINE_S:g} s") from None
        except Exception as error:
            raise RunFailed(f"vLLM failed in {name}: {error}") from error

    def _busy(self, now: float) -> None:
        """Count the time in which requests run: vLLM does not report its time in model steps."""
        if self._busy_since:
            self._busy_seconds += now - self._busy_since
        self._busy_since = now if self._running else 0.0


def engine_arguments(options: VllmOptions) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs."""
    chosen: dict[str, Any] = {
        "model": str(options.model),
        "dtype": options.dtype,
        "max_model_len": options.max_context,
        "max_num_seqs": options.max_sequences + 1,  # for the probe
        "scheduling_policy": "priority",  # the probe does not wait behind requests that found no room in the cache
        "tensor_parallel_size": options.tensor_parallel,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,  # for a probe as long as the context
        "generation_config": "vllm",  # no sampling defaults out of the model folder: they would bias ratios
        "worker_extension_cls": options.worker,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    if options.dtype == "bfloat16" and options.head_dtype == "float32":
        chosen["hf_overrides"] = {"head_dtype": "float32"}
    batch = max(BATCH_TOKENS, options.max_sequences + 1)
    if options.device == "cpu":
        chosen["enforce_eager"] = True
        # A request with a seed whose prompt is fed in parts crashes the worker on a CPU (its random generator has no
        # offset to return to), so every history is fed whole.
        chosen["enable_chunked_prefill"] = False
        batch = max(batch, options.max_context)
    else:
        chosen["gpu_memory_utilization"] = options.memory_share
    chosen["max_num_batched_tokens"] = batch
    if options.quantization != "none":
        chosen["quantization"] = options.quantization
    if options.speculative:
        chosen["speculative_config"] = dict(options.speculative)
    if options.transfer:
        chosen["weight_transfer_config"] = {"backend": options.transfer}
    if options.kv_cache_bytes:
        chosen["kv_cache_memory_bytes"] = options.kv_cache_bytes
    return chosen


def sampling_params(params: SamplingParams, seed: int, max_tokens: int) -> Any:
    """vLLM's sampling parameters: the whole vocabulary and no penalties, so that the recorded log-prob is exact."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    return VllmParams(
        temperature=params.temperature,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=list(params.stop_tokens),
        stop=list(params.stop_strings) or None,
        include_stop_str_in_output=True,
        ignore_eos=True,  # only what the request names ends a turn
        logprobs=0,
        detokenize=bool(params.stop_strings),
        skip_special_tokens=False,  # a stop string may be one, and is looked for in the text that the task gets
        output_kind=RequestOutputKind.DELTA,
    )


def turn_seed(seed: int, position: int) -> int:
    """The seed of one turn. vLLM draws the noise of a request in the order of its tokens, and a turn is a request."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # vLLM's seeds are signed


def _save(weights: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
