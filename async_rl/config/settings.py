"""Every setting of a run: its meaning, unit and default."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import floor, isfinite
from pathlib import Path
from typing import Any, Literal

from async_rl.config.schema import described, load_yaml, setting, structured, with_overrides
from async_rl.errors import UserError, check_trackers

# -------------------- ranges
# What numbers a setting may have, by its path.

AT_LEAST: dict[str, float] = {
    "seed": 0,
    "batch.groups_per_step": 1,
    "batch.group_size": 1,
    "staleness.max_staleness": 0,
    "staleness.pipeline_depth": 0,
    "staleness.window": 0,
    "staleness.target_ess": 0,
    "buffer.max_failures": 1,
    "buffer.max_refusals": 1,
    "buffer.memory_mb": 16,
    "buffer.max_store_mb": 0,
    "buffer.keep_steps": 0,
    "generator.count": 0,
    "generator.max_sequences": 1,
    "generator.max_context": 0,
    "generator.max_turns": 1,
    "generator.threads": 1,
    "vllm.tensor_parallel": 1,
    "vllm.kv_cache_mb": 0,
    "generator.max_restarts": 0,
    "generator.save_turns_after_s": 0,
    "trainer.steps": 1,
    "trainer.updates_per_batch": 1,
    "trainer.micro_batch_tokens": 1,
    "trainer.threads": 1,
    "trainer.ranks": 1,
    "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.final_share": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "lora.rank": 0,
    "critic.learning_rate": 0,
    "critic.warmup_steps": 0,
    "evaluation.every": 0,
    "evaluation.problems": 1,
    "evaluation.samples": 1,
    "evaluation.temperature": 0,
    "canary.tolerance": 0,
    "canary.silent_steps": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "guard.window": 3,
    "guard.ess": 0,
    "guard.entropy": 0,
    "guard.gradient": 0,
    "guard.reward": 0,
    "wire.frozen_after_s": 1,
    "wire.max_message_mb": 1,
}
"""Smallest allowed value of a setting."""

AT_MOST: dict[str, float] = {
    "seed": 2**63 - 1,
    "batch.groups_per_step": 10**6,
    "batch.group_size": 10**6,
    "staleness.max_staleness": 10**6,
    "staleness.window": 1,
    "buffer.memory_mb": 10**6,
    "buffer.max_store_mb": 10**8,
    "generator.count": 1024,
    "generator.max_sequences": 10**6,
    "generator.max_context": 10**9,
    "generator.threads": 1024,
    "vllm.tensor_parallel": 1024,
    "vllm.memory_share": 1,
    "vllm.kv_cache_mb": 10**8,
    "generator.episode_timeout_s": 10**7,
    "trainer.steps": 10**9,
    "trainer.updates_per_batch": 10**4,
    "trainer.threads": 1024,
    "trainer.ranks": 1024,
    "trainer.memory_share": 1,
    "trainer.start_timeout_s": 10**6,
    "optimizer.final_share": 1,
    "lora.rank": 4096,
    "evaluation.problems": 10**6,
    "evaluation.samples": 10**6,
    "guard.window": 10**4,
    "guard.ess": 0.5,
    "guard.rollback_lr_scale": 1,
    "wire.timeout_s": 10**6,
    "weights.timeout_s": 10**6,
    "wire.max_message_mb": 10**6,
}
"""Largest allowed value of a setting."""

BELOW_ONE = ("staleness.target_ess", "optimizer.beta1", "optimizer.beta2", "guard.reward")

ABOVE_ZERO = (
    "generator.temperature",
    "vllm.memory_share",
    "trainer.memory_share",
    "trainer.start_timeout_s",
    "generator.episode_timeout_s",
    "generator.restart_window_s",
    "optimizer.epsilon",
    "lora.alpha",
    "guard.rollback_lr_scale",
    "wire.timeout_s",
    "weights.timeout_s",
    "wire.stall_report_s",
)


# -------------------- guard
# Settings of the watch for a collapse, and what follows from one.


@dataclass(frozen=True)
class GuardSettings:
    """Thresholds: calibrated on trainings of the lab, bench/LAB.md says what they catch and what they cost."""

    alarms: bool = setting(
        True, "watch ESS, entropy, gradient norm and reward for a collapse, and warn (metrics alarm/*, event `alarm`)"
    )
    window: int = setting(
        10,
        "what is compared are medians over so many steps; a run's start, which they are compared with, is as long",
        unit="steps",
    )
    ess: float = setting(
        0.05,
        "alarm below this ess/ratio (as a share of ess/reference), or below 2 effective samples, unless the run began near it; 0: never",
        unit="share of the batch",
    )
    entropy: float = setting(
        1.3,
        "alarm when the entropy is so many times that of the run's start, or a tenth of it with no more reward than then; 0: never",
        unit="times",
    )
    gradient: float = setting(
        20.0,
        "alarm when the gradient norm is so many times that of the run's start, or one over it with no more reward than then; 0: never",
        unit="times",
    )
    reward: float = setting(
        0.5, "alarm when the reward has lost this share of its best, beyond its noise; 0: never", unit="share"
    )
    rollback: bool = setting(
        False,
        "at the first alarm go back, once, to the newest checkpoint from before its first sign, with a lower learning rate",
    )
    rollback_lr_scale: float = setting(0.3, "factor on the learning rate after going back", unit="factor")


def check_guard(guard: GuardSettings, *, checkpoints_every: int, generators: int) -> None:
    """Settings that would do nothing, or promise what cannot be kept. Raises UserError."""
    if not guard.alarms:
        for one in fields(guard):
            if one.name != "alarms" and getattr(guard, one.name) != one.default:
                raise UserError(f"guard.{one.name} does nothing with guard.alarms=false; set guard.alarms=true")
        return
    for name in ("entropy", "gradient"):
        if 0 < (factor := getattr(guard, name)) <= 1:
            raise UserError(f"guard.{name} is {factor:g}; it is a factor above 1, or 0 for never")
    if not guard.rollback:
        if guard.rollback_lr_scale != GuardSettings.rollback_lr_scale:
            raise UserError("guard.rollback_lr_scale does nothing with guard.rollback=false; set guard.rollback=true")
        return
    if not any((guard.ess, guard.entropy, guard.gradient, guard.reward)):
        raise UserError("guard.rollback=true, but every alarm is off (guard.ess, guard.entropy, ... are 0); set one")
    if not checkpoints_every:
        raise UserError(
            "guard.rollback=true, but with checkpoint.every=0 there is no checkpoint to go back to before the end of the "
            "run; set checkpoint.every"
        )
    if not generators:
        raise UserError(
            "guard.rollback=true, but with generator.count=0 nobody would generate behind it: going back starts all "
            "processes anew, and generators that joined by themselves are told to end; set generator.count=1 or more, or "
            "guard.rollback=false"
        )


# -------------------- lora
# Settings of low-rank adapters; a part of run.py.


@dataclass(frozen=True)
class LoraSettings:
    rank: int = setting(
        0,
        "rank of the adapters (LoRA) that are trained while the model's own weights stay as they are; 0 trains all weights",
    )
    alpha: float = setting(16.0, "an adapter's product is multiplied by alpha / rank")
    targets: list[str] = setting(
        [],
        "linear layers that get an adapter, by the last part of their names, e.g. [q_proj, v_proj]; empty: all of them but the head",
    )
    send: Literal["merged", "adapter"] = setting(
        "merged",
        "what travels to the generators: the whole model with the adapters added, or the adapters alone, which each generator adds to its own copy of the model",
    )


def check_lora(lora: LoraSettings, transport: str) -> None:
    """`transport`: weights.transport. Raises UserError for what would do nothing."""
    if lora.rank == 0:
        if lora != LoraSettings():
            raise UserError("lora.* does nothing with lora.rank=0, which trains all weights; set lora.rank, e.g. 16")
        return
    if len(set(lora.targets)) < len(lora.targets):
        raise UserError(f"lora.targets names a layer twice: {', '.join(lora.targets)}; once is enough")
    if lora.send == "adapter" and transport not in ("auto", "shared_memory", "stream"):
        raise UserError(
            f"lora.send=adapter needs generators that add adapters to their own copy, and with weights.transport="
            f"{transport} weights go straight into the engine; set lora.send=merged or leave weights.transport out"
        )


# -------------------- wire
# Settings of how the processes of a run reach each other; a part of run.py.


@dataclass(frozen=True)
class WireSettings:
    endpoint: str = setting(
        "auto",
        "where the buffer listens: auto (a Unix socket of this run), ipc://PATH or tcp://HOST:PORT; without a host (tcp://:PORT) on the loopback only, on every interface with tcp://0.0.0.0:PORT",
    )
    keys: str = setting(
        "", "folder of the CURVE keys (`async-rl keys` makes them) that tcp is served with, never without"
    )
    connect: str = setting(
        "", "where generators and trainer connect, if not at wire.endpoint itself: the near end of a tunnel or proxy"
    )
    timeout_s: float = setting(
        120.0, "longest wait of any process for another before the run ends with an error", unit="seconds"
    )
    frozen_after_s: float = setting(
        15.0,
        "a process that gives no sign of life for so long (a busy one gives them, a stopped one does not) is taken for frozen: it is ended; a generator is started again and its permits go to others, without trainer or buffer the run ends",
        unit="seconds",
    )
    stall_report_s: float = setting(
        10.0,
        "a wait that takes longer is reported on the console and in events.jsonl: who waits for whom, since when, for what",
        unit="seconds",
    )
    max_message_mb: int = setting(256, "larger messages are refused", unit="MB")


@dataclass(frozen=True)
class WeightsSettings:
    transport: Literal["auto", "shared_memory", "stream", "nccl", "ipc"] = setting(
        "auto",
        "how generators get weights: from the trainer's shared memory; as a stream from the weight server, which runs with a tcp endpoint; from GPU to GPU into vLLM, over NCCL (other GPUs) or CUDA IPC (the trainer's own); auto: what the placement allows, see docs/weights.md",
    )
    timeout_s: float = setting(
        120.0,
        "nccl and ipc: longest time one transfer to one generator may take, the meeting before the first included; then the generator is given up and starts anew",
        unit="seconds",
    )
    endpoint: str = setting(
        "auto",
        "where the weight server listens, tcp://HOST:PORT as for wire.endpoint; auto: a free port beside the buffer's",
    )


def check_wire(wire: WireSettings, weights: WeightsSettings) -> None:
    """TCP with keys, keys with TCP, a weight server with TCP. Raises UserError."""
    tcp = wire.endpoint.startswith("tcp://")
    if tcp and not wire.keys:
        raise UserError(
            f"wire.endpoint is {wire.endpoint}, but wire.keys is not set: TCP is served with keys only; "
            "`async-rl keys DIR` makes them, then wire.keys=DIR"
        )
    if wire.keys and not tcp:
        raise UserError(
            f"wire.keys is {wire.keys}, but wire.endpoint={wire.endpoint} is no tcp endpoint, and a Unix socket needs "
            "none; set wire.endpoint=tcp://HOST:PORT or leave wire.keys out"
        )
    if not tcp and weights.transport == "stream":
        raise UserError(
            f"weights.transport is stream, but with wire.endpoint={wire.endpoint} no weight server runs: every "
            "generator is on this host; set wire.endpoint=tcp://HOST:PORT or leave weights.transport out"
        )
    if not tcp and weights.endpoint != "auto":
        raise UserError(
            f"weights.endpoint is {weights.endpoint}, but with wire.endpoint={wire.endpoint} no weight server runs; "
            "set wire.endpoint=tcp://HOST:PORT or leave weights.endpoint out"
        )
    if weights.endpoint != "auto" and not weights.endpoint.startswith("tcp://"):
        raise UserError(f"weights.endpoint is {weights.endpoint}; it must be auto or tcp://HOST:PORT")
    if wire.connect and not wire.connect.startswith("tcp://" if tcp else "ipc://"):
        raise UserError(
            f"wire.connect is {wire.connect!r}; it must look like {'tcp://HOST:PORT' if tcp else 'ipc://PATH'}, as what "
            f"it leads to (wire.endpoint={wire.endpoint})"
        )


# -------------------- placement
# Which GPUs a run asks for, read from its settings alone; what this machine has is looked at later
# (launch/placement.py).

MOST_GPUS = 1024
_PART = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def gpus_named(text: str, setting: str) -> tuple[int, ...]:
    """The numbers in `0-3,6`, in order; nothing for an empty text. `setting`: for messages. Raises UserError."""
    if not text.strip():
        return ()
    found: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UserError(f"{setting} is '{text}'; write numbers of GPUs like 0-3 or 0,2")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise UserError(f"{setting} is '{text}', but {first}-{last} runs backwards; write {last}-{first}")
        found += range(first, last + 1)
    twice = sorted({gpu for gpu in found if found.count(gpu) > 1})
    if twice:
        raise UserError(f"{setting} is '{text}': GPU {twice[0]} stands there twice")
    return tuple(found)


def tensor_parallel(settings: Settings) -> int:
    """GPUs of one generator."""
    return settings.vllm.tensor_parallel if settings.generator.engine == "vllm" else 1


def shares_gpus(settings: Settings) -> bool:
    """Whether generators and trainer may be on the same GPU."""
    return settings.trainer.memory_share < 1


def generators_fit(settings: Settings, gpus: int) -> str:
    """Why the run's generators cannot be laid over so many GPUs, or an empty text."""
    count, each = settings.generator.count, tensor_parallel(settings)
    if settings.generator.engine == "vllm":
        if count * each != gpus:
            return (
                f"generator.count={count} with vllm.tensor_parallel={each} needs {count * each} GPUs, not {gpus}; "
                "change one of the three"
            )
    elif count % gpus:
        return f"generator.count={count} cannot be spread evenly over {gpus} GPUs; change one of the two"
    return ""


def check_placement(settings: Settings) -> None:
    """Settings of GPUs that contradict each other or would do nothing. Raises UserError."""
    chosen, trainer = settings.generator, settings.trainer
    generators = gpus_named(chosen.gpus, "generator.gpus")
    ranks = gpus_named(trainer.gpus, "trainer.gpus")
    for name, gpus, device in (("generator", generators, chosen.device), ("trainer", ranks, trainer.device)):
        if gpus and device != "cuda":
            why = "has its number in it already" if device.startswith("cuda") else "uses none"
            raise UserError(
                f"{name}.gpus does nothing with {name}.device={device}, which {why}; set {name}.device=cuda"
            )
    _check_trainer(settings, ranks)
    if generators and chosen.count == 0:
        raise UserError("generator.gpus does nothing with generator.count=0: joining generators name their own device")
    if generators and (problem := generators_fit(settings, len(generators))):
        raise UserError(f"generator.gpus is '{chosen.gpus}', but {problem}")
    check_shared(settings, generators, ranks)


def _check_trainer(settings: Settings, gpus: tuple[int, ...]) -> None:
    trainer = settings.trainer
    cuda = trainer.device.startswith("cuda")
    if trainer.start == "external":
        for name, value, default in (("gpus", trainer.gpus, ""), ("memory_share", trainer.memory_share, 1.0)):
            if value != default:
                raise UserError(
                    f"trainer.{name} does nothing with trainer.start=external: whoever starts the trainer says where it "
                    f"runs; leave trainer.{name} out"
                )
        if settings.guard.rollback:
            raise UserError(
                "guard.rollback starts the trainer again, which trainer.start=external leaves to others; leave one of the "
                "two out"
            )
    elif trainer.start_timeout_s != type(trainer).start_timeout_s:
        raise UserError("trainer.start_timeout_s does nothing with trainer.start=launcher: nobody is waited for")
    if gpus and len(gpus) != trainer.ranks:
        raise UserError(
            f"trainer.gpus names {len(gpus)} GPUs ('{trainer.gpus}'), but trainer.ranks is {trainer.ranks}: each rank has "
            "one GPU; change one of the two"
        )
    if cuda and trainer.device != "cuda" and trainer.ranks > 1:
        raise UserError(
            f"trainer.device is '{trainer.device}', but trainer.ranks is {trainer.ranks}, and NCCL takes one rank a GPU; "
            "set trainer.device=cuda, and trainer.gpus to choose"
        )
    if trainer.sharding != "none" and trainer.ranks == 1:
        raise UserError(
            f"trainer.sharding={trainer.sharding} does nothing with trainer.ranks=1: there is nobody to share the weights "
            "with; set trainer.ranks, or leave trainer.sharding out"
        )
    if trainer.sharding != "none" and settings.lora.rank:
        raise UserError(
            f"trainer.sharding={trainer.sharding} cannot be combined with lora.rank={settings.lora.rank} yet: adapters are "
            "added to whole weights; set trainer.sharding=none, which needs no optimizer memory for frozen weights"
        )
    if not cuda and trainer.memory_share != 1:
        raise UserError(
            f"trainer.memory_share does nothing with trainer.device={trainer.device}: it is about a GPU's memory"
        )


def check_shared(settings: Settings, generators: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    """One GPU for both only where their shares of its memory say so. Raises UserError."""
    both = sorted(set(generators) & set(ranks))
    if not both:
        return
    share = settings.trainer.memory_share
    named = ",".join(map(str, both))
    if not shares_gpus(settings):
        raise UserError(
            f"GPU {named} would hold both a generator and the trainer, but trainer.memory_share is 1: all of it; choose "
            "other GPUs (generator.gpus, trainer.gpus), or set trainer.memory_share=0.5"
            + (" and vllm.memory_share=0.4" if settings.generator.engine == "vllm" else "")
        )
    if settings.generator.engine == "vllm" and settings.vllm.memory_share + share > 1:
        raise UserError(
            f"vllm.memory_share={settings.vllm.memory_share:g} and trainer.memory_share={share:g} are more than GPU {named} "
            "has; lower one, e.g. vllm.memory_share=0.4 trainer.memory_share=0.5"
        )


@dataclass(frozen=True)
class ModelSettings:
    path: str = setting("", "folder of the Hugging Face model that is trained (config.json, safetensors, tokenizer)")


@dataclass(frozen=True)
class TaskSettings:
    name: str = setting(
        "",
        "the task: guess, sort, reverse, arithmetic, countdown, calculator, dataset or tools (rehearsed: what --fake-model makes of them)",
    )
    args: dict[str, Any] = setting({}, "settings of that task; `async-rl config` prints them")


@dataclass(frozen=True)
class BatchSettings:
    groups_per_step: int = setting(16, "P: groups trained in one step", unit="groups")
    group_size: int = setting(
        8, "trajectories sampled for one problem and compared with each other", unit="trajectories"
    )


@dataclass(frozen=True)
class StalenessSettings:
    policy: Literal["pace", "wait", "drop"] = setting(
        "pace",
        "how the bound is kept: pace holds generation back (nothing is discarded); wait lets the trainer wait for groups that are due; drop discards groups that are too old and asks their problems again (biased towards short answers; the bias is reported)",
    )
    max_staleness: int = setting(
        1, "k: no token is trained more than k steps after the weights that sampled it", unit="steps"
    )
    pipeline_depth: float = setting(
        0.0,
        "batches being generated, waiting or being trained at once, 1 .. max_staleness + 1; 0 takes max_staleness + 1",
        unit="batches",
    )
    target_ess: float = setting(
        0.0,
        "move pipeline_depth (then its start) within 1 .. max_staleness + 1 so that the effective sample size of the batches, metric ess/ratio, stays at this share; 0 leaves the depth as it is",
        unit="share of the batch",
    )
    window: float = setting(
        0.3,
        "a batch may take finished groups out of the oldest `window` share of the slots, so that one long episode does not stop the step; 0 is strict order",
        unit="share of slots",
    )


@dataclass(frozen=True)
class BufferSettings:
    drop_zero_signal: bool = setting(
        False, "refuse groups whose rewards are all equal (no gradient) and generate others instead"
    )
    max_failures: int = setting(64, "end the run when so many trajectories in a row failed", unit="trajectories")
    max_refusals: int = setting(1000, "end the run when so many groups in a row were refused", unit="groups")
    durability: Literal["process", "power"] = setting(
        "process",
        "what a stored trajectory survives: the death of any process, or a power loss (an fsync a commit)",
    )
    memory_mb: int = setting(
        256,
        "what the buffer process may hold of trajectories in memory: pages of the store, messages under way, the part of a batch being sent; everything else is in the store alone",
        unit="MB",
    )
    max_store_mb: int = setting(
        0,
        "end the run, resumable, before trajectories.sqlite grows beyond this size (its write-ahead log of some 16 MB not counted); 0: no limit",
        unit="MB",
    )
    keep_steps: int = setting(
        0,
        "delete the tokens of batches older than the newest so many steps that are in a checkpoint, and of groups refused before them; never what a kept checkpoint needs to go on. Their rows stay. 0 keeps all: needed to replay or rescore a whole run",
        unit="steps",
    )


@dataclass(frozen=True)
class GeneratorSettings:
    count: int = setting(
        1,
        "generator processes that the run starts; with 0 all join by themselves (`async-rl generate`)",
        unit="processes",
    )
    engine: Literal["embedded", "vllm"] = setting(
        "embedded", "what samples: the embedded torch engine, or vLLM (see vllm.*)"
    )
    temperature: float = setting(
        1.0, "sampling temperature of training rollouts; the trainer computes log-probs at the same one"
    )
    max_sequences: int = setting(256, "trajectories that one generator decodes at once", unit="trajectories")
    max_context: int = setting(0, "longest sequence, prompt included; 0 takes the model's own limit", unit="tokens")
    max_turns: int = setting(64, "turns after which an episode is ended whatever the task says", unit="turns")
    episode_timeout_s: float = setting(
        600.0, "an episode that takes longer ends as failed, with this reason", unit="seconds"
    )
    kv_on_update: Literal["recompute", "keep"] = setting(
        "recompute",
        "KV cache of running sequences after a weight update: rebuilt under the new weights, or kept (later tokens are then sampled from a mixture)",
    )
    device: str = setting("cpu", "torch device of the engine: cpu, cuda (placed by `gpus`) or cuda:N")
    gpus: str = setting(
        "",
        "GPUs of the generators, e.g. 0-3: of those this process sees, counted from 0; each generator takes vllm.tensor_parallel of them. Empty: the first ones, the trainer takes those behind",
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of the engine's weights")
    threads: int = setting(1, "CPU threads of one generator process", unit="threads")
    save_turns_after_s: float = setting(
        20.0,
        "the finished turns of an episode that has run longer are kept, so that it goes on there should its generator die",
        unit="seconds",
    )
    max_restarts: int = setting(
        5, "times a generator that died is started again within `restart_window_s` before the run ends", unit="restarts"
    )
    restart_window_s: float = setting(300.0, "time over which restarts of one generator are counted", unit="seconds")


@dataclass(frozen=True)
class VllmSettings:
    tensor_parallel: int = setting(1, "GPUs that one generator's model is split over", unit="GPUs")
    memory_share: float = setting(
        0.9,
        "share of the GPU's memory that vLLM takes for weights and KV cache; lower it where a trainer shares the GPU",
    )
    kv_cache_mb: int = setting(
        0,
        "memory for keys and values; 0: on a GPU what `memory_share` leaves, on a CPU what max_sequences full sequences need",
        unit="MB",
    )


@dataclass(frozen=True)
class TrainerSettings:
    steps: int = setting(400, "training steps (batches)", unit="steps")
    updates_per_batch: int = setting(
        1,
        "optimizer updates on each batch; more than one makes the proximal policy meaningful",
        unit="updates",
    )
    micro_batch_tokens: int = setting(16384, "most tokens (prompt included) of one packed forward", unit="tokens")
    device: str = setting("cpu", "torch device of the trainer: cpu, cuda (placed by `gpus`) or cuda:N")
    ranks: int = setting(
        1,
        "processes that train together, each on its share of a batch; the step is that of one, but for the order of its sums. Several are started by torch.distributed's own launcher",
        unit="processes",
    )
    gpus: str = setting("", "GPUs of the trainer's ranks, one each, e.g. 4-7; empty: those behind the generators'")
    memory_share: float = setting(
        1.0,
        "share of its GPU's memory that a trainer rank may take; below 1 generators may be on the same GPU",
    )
    start: Literal["launcher", "external"] = setting(
        "launcher",
        "who starts the trainer: the run itself, or somebody else (torchrun, a cluster's scheduler) with `async-rl train RUN`, which the run waits for",
    )
    start_timeout_s: float = setting(
        600.0, "longest wait for a trainer that is started by somebody else", unit="seconds"
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "arithmetic of forward and backward; weights, optimizer and log-probs stay float32"
    )
    attention: Literal["auto", "flash", "varlen", "sdpa"] = setting(
        "auto",
        "attention among packed documents: flash (flash-attn), varlen (torch's own kernel), both for CUDA and bfloat16, or sdpa (documents of similar length padded together); auto takes the first there is",
    )
    checkpoint_activations: Literal["none", "layer"] = setting(
        "none",
        "layer: keep only each layer's input and compute the rest again in the backward pass; a third more time for a fraction of the memory",
    )
    compile: bool = setting(
        False,
        "compile the layers with torch.compile; the first step then takes a minute longer, and a C++ compiler is needed",
    )
    threads: int = setting(1, "CPU threads of each trainer process", unit="threads")
    sharding: Literal["none", "full"] = setting(
        "none",
        "over several ranks: none keeps the whole model and its optimizer on each; full splits weights, gradients and moments over them (FSDP2), the KL reference and a critic model too",
    )


@dataclass(frozen=True)
class OptimizerSettings:
    learning_rate: float = setting(5e-4, "AdamW learning rate after warm-up, before the recipe's factors")
    warmup_steps: int = setting(20, "linear warm-up from 0", unit="steps")
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "learning rate after warm-up")
    final_share: float = setting(0.0, "linear and cosine end at this share of the learning rate", unit="share")
    weight_decay: float = setting(0.0, "AdamW decoupled weight decay of matrices")
    beta1: float = setting(0.9, "AdamW first-moment decay")
    beta2: float = setting(0.95, "AdamW second-moment decay")
    epsilon: float = setting(1e-8, "AdamW denominator offset")
    clip_norm: float = setting(1.0, "global gradient norm above which the gradient is scaled down; 0 turns it off")


@dataclass(frozen=True)
class CriticSettings:
    kind: Literal["head", "model"] = setting(
        "head", "value head on the policy's last hidden state, or a separate model of the same architecture"
    )
    learning_rate: float = setting(1e-3, "AdamW learning rate of the critic")
    warmup_steps: int = setting(
        20, "first steps that train the critic alone, on returns of the frozen policy", unit="steps"
    )


@dataclass(frozen=True)
class EvaluationSettings:
    every: int = setting(
        50,
        "evaluate on held-out problems every so many steps without stopping generation; 0 evaluates at start and end only",
        unit="steps",
    )
    problems: int = setting(64, "held-out problems of one evaluation", unit="problems")
    samples: int = setting(4, "trajectories per problem", unit="trajectories")
    temperature: float = setting(1.0, "sampling temperature of evaluation; 0 is greedy")


@dataclass(frozen=True)
class CanarySettings:
    tolerance: float = setting(
        0.0,
        "mean difference between a generator's log-probs and the trainer's on a fixed probe (as a share of log-probs beyond 1 nat), at equal weights, above which the run ends; 0 takes 1e-4 for generator.dtype=float32, 5e-2 for bfloat16",
        unit="nats",
    )
    silent_steps: int = setting(
        20,
        "report a generator that has not shown for so many steps that it holds published weights; 0 never does",
        unit="steps",
    )


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = setting(
        50,
        "save everything a resumed run needs, the model as a Hugging Face folder, every so many steps; 0 saves at the end only",
        unit="steps",
    )
    keep: int = setting(3, "newest checkpoints kept", unit="checkpoints")


@dataclass(frozen=True)
class Settings:
    """Everything a run can be told."""

    name: str = setting("run", "name of the run; its folder is runs/<name>-<time>")
    seed: int = setting(0, "seed of sampling, prompt order and initialisation")
    model: ModelSettings = field(default_factory=ModelSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    staleness: StalenessSettings = field(default_factory=StalenessSettings)
    recipe: dict[str, Any] = setting(
        {"name": "vcpo"}, "the objective: a recipe's name and any of its axes; `async-rl recipes` lists them"
    )
    buffer: BufferSettings = field(default_factory=BufferSettings)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    vllm: VllmSettings = field(default_factory=VllmSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    critic: CriticSettings = field(default_factory=CriticSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    canary: CanarySettings = field(default_factory=CanarySettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    wire: WireSettings = field(default_factory=WireSettings)
    weights: WeightsSettings = field(default_factory=WeightsSettings)
    pin_threads: bool = setting(
        False,
        "bind each generator and trainer rank to `threads` cores of its own, so that none moves or meets another; the buffer and the rest use any core",
    )
    trackers: list[str] = setting(
        [],
        "where metrics go besides the run folder: tensorboard, wandb; by a process of their own that the run never waits for",
    )


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file and `a.b=c` words, checked. Raises UserError."""
    values = with_overrides(load_yaml(path), overrides)
    refuse_truncated_sampling(values)
    settings = structured(Settings, values, where="")
    check(settings)
    return settings


TRUNCATED = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def refuse_truncated_sampling(values: Mapping[str, Any]) -> None:
    """Settings other programs have, and this one lacks for a reason. Raises UserError with it."""
    for group in ("generator", "vllm"):
        chosen = values.get(group)
        for name in TRUNCATED:
            if isinstance(chosen, Mapping) and name in chosen:
                raise UserError(
                    f"{group}.{name} does not exist: what is sampled from a changed distribution has other probabilities "
                    "than the trainer computes, which biases every ratio. Leave it out; generator.temperature is known "
                    "to both sides"
                )


def default_window(groups_per_step: int, max_staleness: int, fraction: float) -> int:
    """Window in groups: `fraction` of the slots, within what the bound allows."""
    wanted = floor(fraction * (max_staleness + 1) * groups_per_step)
    return max(1, min(wanted, max_staleness * groups_per_step + 1))


def pace_of(settings: Settings) -> tuple[float, int]:
    """(pipeline depth in batches, window in groups) with the defaults filled in."""
    stale, batch = settings.staleness, settings.batch
    depth = stale.pipeline_depth or stale.max_staleness + 1.0
    return depth, default_window(batch.groups_per_step, stale.max_staleness, stale.window)


def check(settings: Settings) -> None:
    """Refuse values out of range and settings that contradict each other. Raises UserError."""
    values = {path: value for path, value, _, _ in described(settings)}
    for path, value in values.items():
        if isinstance(value, float) and not isfinite(value):
            raise UserError(f"{path} is {value}; it must be a finite number")
    for path, least in AT_LEAST.items():
        if values[path] < least:
            raise UserError(f"{path} is {values[path]}; it must be at least {least:g}")
    for path in ABOVE_ZERO:
        if values[path] <= 0:
            raise UserError(f"{path} is {values[path]}; it must be above 0")
    for path, most_allowed in AT_MOST.items():
        if values[path] > most_allowed:
            raise UserError(f"{path} is {values[path]}; it must be at most {most_allowed:,}")
    for path in BELOW_ONE:
        if not 0 <= values[path] < 1:
            raise UserError(f"{path} is {values[path]}; it must be at least 0 and below 1")
    check_wire(settings.wire, settings.weights)
    check_lora(settings.lora, settings.weights.transport)
    check_trackers(settings.trackers)
    check_guard(settings.guard, checkpoints_every=settings.checkpoint.every, generators=settings.generator.count)
    if not settings.name.strip() or "/" in settings.name or "\0" in settings.name:
        raise UserError(f"name is {settings.name!r}; it names a folder, so it must be text without '/'")
    if not settings.model.path:
        raise UserError("model.path is not set; name a model folder (`async-rl init-model` makes a small one)")
    if not settings.task.name:
        raise UserError("task.name is not set; e.g. task.name=guess")
    if not isinstance(settings.recipe.get("name"), str):
        raise UserError("recipe.name is not set; e.g. recipe.name=vcpo (`async-rl recipes` lists them)")
    depth, most = settings.staleness.pipeline_depth, settings.staleness.max_staleness + 1
    if depth and not 1 <= depth <= most:
        raise UserError(
            f"staleness.pipeline_depth is {depth:g}, but with staleness.max_staleness={most - 1} it must lie "
            f"between 1 and {most}: deeper batches would be too stale to train"
        )
    stale = settings.staleness
    if stale.target_ess and stale.max_staleness == 0:
        raise UserError(
            f"staleness.target_ess is {stale.target_ess:g}, but with staleness.max_staleness=0 the pipeline is one batch "
            "deep whatever the ESS; raise staleness.max_staleness or leave staleness.target_ess out"
        )
    if stale.policy != "pace" and stale.window != StalenessSettings.window:
        raise UserError(
            f"staleness.window is {stale.window:g}, but staleness.policy={stale.policy} has no window: a batch takes "
            "whatever groups are finished. Leave staleness.window out"
        )
    if settings.buffer.keep_steps and not settings.checkpoint.every:
        raise UserError(
            "buffer.keep_steps deletes nothing before the first checkpoint, and with checkpoint.every=0 that is the "
            "end of the run; set checkpoint.every"
        )
    for name in ("frozen_after_s", "stall_report_s"):
        if (seconds := values[f"wire.{name}"]) >= (limit := settings.wire.timeout_s):
            raise UserError(
                f"wire.{name} is {seconds:g}, but a wait ends the run after wire.timeout_s={limit:g}; lower it"
            )
    if settings.generator.max_sequences < settings.batch.group_size:
        raise UserError(
            f"generator.max_sequences is {settings.generator.max_sequences}, less than one group "
            f"(batch.group_size={settings.batch.group_size}); raise it"
        )
    _check_engine(settings)
    check_placement(settings)


def _check_engine(settings: Settings) -> None:
    """Settings of an engine that is not used, or that its device cannot follow. Raises UserError."""
    chosen, vllm = settings.generator, settings.vllm
    if chosen.engine != "vllm":
        if vllm != VllmSettings():
            raise UserError(f"vllm.* does nothing with generator.engine={chosen.engine}; set generator.engine=vllm")
        return
    if chosen.device not in ("cpu", "cuda"):
        raise UserError(
            f"generator.device is '{chosen.device}'; with generator.engine=vllm it is cpu or cuda (CUDA_VISIBLE_DEVICES "
            "says which GPU)"
        )
    if chosen.device == "cpu" and (vllm.tensor_parallel != 1 or vllm.memory_share != VllmSettings().memory_share):
        raise UserError(
            "vllm.tensor_parallel and vllm.memory_share need GPUs, and generator.device is cpu; leave them out, or set generator.device=cuda"
        )
