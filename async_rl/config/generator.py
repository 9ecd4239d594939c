"""Settings of the processes that sample, and of their engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from async_rl.config.schema import setting


@dataclass(frozen=True)
class GeneratorSettings:
    """The processes that sample."""

    count: int = setting(
        1,
        "generator processes that the run starts; with 0 all join by themselves (`async-rl generate`)",
        unit="processes",
        min=0,
        max=1024,
    )
    start_timeout_s: float = setting(
        600.0,
        "longest time without any generator, at the start or later, where all join by themselves; then the run still "
        "waits wire.timeout_s",
        unit="seconds",
        above=0,
        max=1_000_000,
    )
    engine: Literal["embedded", "vllm"] = setting(
        "embedded", "what samples: the embedded torch engine, or vLLM (see vllm.*)"
    )
    temperature: float = setting(
        1.0, "sampling temperature of training rollouts; the trainer computes log-probs at the same one", min=0.01
    )
    max_sequences: int = setting(
        256, "trajectories that one generator decodes at once", unit="trajectories", min=1, max=1_000_000
    )
    max_context: int = setting(
        0, "longest sequence, prompt included; 0 takes the model's own limit", unit="tokens", min=0, max=1_000_000_000
    )
    max_turns: int = setting(64, "turns after which an episode is ended whatever the task says", unit="turns", min=1)
    episode_timeout_s: float = setting(
        600.0, "an episode that takes longer ends as failed, with this reason", unit="seconds", above=0, max=10_000_000
    )
    task_timeout_s: float = setting(
        0.0, "longest time of a task or reward between two turns; 0: half of wire.timeout_s", unit="seconds", min=0
    )
    task_slots: dict[str, int] = setting(
        {},
        "places that the episodes of one generator share, by name (a task's `slots`), e.g. {sandbox: 8}: how many "
        "there are, instead of what the task says",
    )
    task_processes: int = setting(
        0,
        "processes beside each generator that run the code of tasks and rewards: a slow or crashing environment then "
        "neither delays decoding nor ends the generator; 0: the generator runs it itself",
        unit="processes",
        min=0,
        max=1024,
    )
    kv_cache_mb: int = setting(
        0, "largest KV cache of the embedded engine; 0: for all, at most 2 GB", unit="MB", min=0, max=100_000_000
    )
    kv_on_update: Literal["recompute", "keep"] = setting(
        "recompute", "KV cache of running sequences on an update: rebuilt, or kept (a mixture samples later tokens)"
    )
    device: str = setting("cpu", "torch device of the engine: cpu, cuda (placed by `gpus`) or cuda:N")
    gpus: str = setting(
        "",
        "GPUs of the generators, e.g. 0-3: of those this process sees, counted from 0; each generator takes "
        "vllm.tensor_parallel of them. Empty: the first ones, the trainer takes those behind",
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of the engine's weights")
    quantization: Literal["none", "fp8"] = setting(
        "none",
        "what the engine keeps its layers' matrices in: `fp8` (vLLM on a GPU) halves their memory and traffic; what "
        "its log-probs differ by from the trainer's is measured (kl/mismatch) and stands in every ratio",
    )
    threads: int = setting(
        0,
        "CPU threads of a generator, of the embedded engine at most: where the trainer keeps the cores busy, a step "
        "takes one. 0: by cores and model",
        unit="threads",
        min=0,
        max=1024,
    )
    save_turns_after_s: float = setting(
        20.0,
        "the finished turns of an episode that has run longer are kept, so that it goes on there should its "
        "generator die",
        unit="seconds",
        min=0,
    )
    max_restarts: int = setting(
        5,
        "times a generator that died is started again within `restart_window_s` before the run ends",
        unit="restarts",
        min=0,
    )
    max_deaths: int = setting(
        2,
        "a problem whose code (task, tools, reward) runs when a generator crashes or freezes so many times is refused, "
        "with its place, and the run goes on. Such a death does not count towards max_restarts (unless that is 0) when "
        "trajectories have arrived since the one before",
        unit="deaths",
        min=1,
        max=1000,
    )
    restart_window_s: float = setting(
        300.0, "time over which restarts of one generator are counted", unit="seconds", above=0
    )


@dataclass(frozen=True)
class VllmSettings:
    """The engine vLLM; used with generator.engine=vllm only."""

    tensor_parallel: int = setting(1, "GPUs that one generator's model is split over", unit="GPUs", min=1, max=1024)
    memory_share: float = setting(
        0.9,
        "share of the GPU's memory that vLLM takes for weights and KV cache; lower it where a trainer shares the GPU",
        above=0,
        max=1,
    )
    kv_cache_mb: int = setting(
        0,
        "memory for keys and values; 0: on a GPU of its own what `memory_share` leaves; on a CPU, and within that "
        "share of a GPU with a trainer on it, what max_sequences full sequences need",
        unit="MB",
        min=0,
        max=100_000_000,
    )
    head_dtype: Literal["float32", "model"] = setting(
        "float32",
        "arithmetic of the logits where generator.dtype is bfloat16: `float32`, as the trainer computes them; `model` "
        "rounds them to bfloat16",
    )
    speculative: dict[str, Any] = setting(
        {},
        "vLLM's own speculative_config, handed on as it is, e.g. {method: ngram, num_speculative_tokens: 4, "
        "prompt_lookup_max: 4}: tokens are guessed, and kept with the probability that makes them samples of the "
        "model; empty: off",
    )
