"""Every setting of a run: its meaning, unit and default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, isfinite
from pathlib import Path
from typing import Any, Literal

from async_rl.config import described, load_yaml, setting, structured, with_overrides
from async_rl.errors import UserError
from async_rl.extras import check_trackers
from async_rl.settings.guard import GuardSettings, check_guard
from async_rl.settings.lora import LoraSettings, check_lora
from async_rl.settings.placement import check_placement
from async_rl.settings.ranges import ABOVE_ZERO, AT_LEAST, AT_MOST, BELOW_ONE
from async_rl.settings.wire import WeightsSettings, WireSettings, check_wire


@dataclass(frozen=True)
class ModelSettings:
    path: str = setting("", "folder of the Hugging Face model that is trained (config.json, safetensors, tokenizer)")


@dataclass(frozen=True)
class TaskSettings:
    name: str = setting("", "the task: guess, sort, reverse, arithmetic, countdown, calculator, dataset or tools (rehearsed: what --fake-model makes of them)")
    args: dict[str, Any] = setting({}, "settings of that task; `async-rl config` prints them")


@dataclass(frozen=True)
class BatchSettings:
    groups_per_step: int = setting(16, "P: groups trained in one step", unit="groups")
    group_size: int = setting(8, "trajectories sampled for one problem and compared with each other", unit="trajectories")


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
        0.9, "share of the GPU's memory that vLLM takes for weights and KV cache; lower it where a trainer shares the GPU"
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
        False, "compile the layers with torch.compile; the first step then takes a minute longer, and a C++ compiler is needed"
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
    recipe: dict[str, Any] = setting({"name": "vcpo"}, "the objective: a recipe's name and any of its axes; `async-rl recipes` lists them")
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
    trackers: list[str] = setting([], "where metrics go besides the run folder: tensorboard, wandb; by a process of their own that the run never waits for")


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
            raise UserError(f"wire.{name} is {seconds:g}, but a wait ends the run after wire.timeout_s={limit:g}; lower it")
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
        raise UserError("vllm.tensor_parallel and vllm.memory_share need GPUs, and generator.device is cpu; leave them out, or set generator.device=cuda")
