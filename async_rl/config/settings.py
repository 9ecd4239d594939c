"""Every setting of a run: its meaning, unit, default and bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from async_rl.config.cluster import ClusterSettings
from async_rl.config.critic import CriticSettings
from async_rl.config.generator import GeneratorSettings, VllmSettings
from async_rl.config.pool import PoolSettings
from async_rl.config.rollout import RolloutSettings
from async_rl.config.sampler import SamplerSettings
from async_rl.config.schema import setting
from async_rl.config.trainer import LoraSettings, OptimizerSettings, TrainerSettings
from async_rl.config.updates import ReferenceSettings, UpdatesSettings
from async_rl.config.verify import VerifySettings


@dataclass(frozen=True)
class ModelSettings:
    """The model that is trained."""

    path: str = setting("", "folder of the Hugging Face model that is trained (config.json, safetensors, tokenizer)")
    template_time: str = setting(
        "",
        "date and time that the chat template writes where it asks for them (2026-01-31T12:00), the same in every "
        "process and after a resume; empty: when the run begins",
    )
    control_tokens: Literal["escape", "refuse", "allow"] = setting(
        "escape",
        "what becomes of the text of a control token (<|im_end|>) in chat messages and tools' results: plain text, a "
        "refusal that names it, or the token itself",
    )


@dataclass(frozen=True)
class TaskSettings:
    """Where problems and rewards come from."""

    name: str = setting(
        "",
        "the task: guess, sort, reverse, arithmetic, countdown, calculator, dataset, tools; an environment of another "
        "package: reasoning_gym, verifiers, gymnasium, openenv, textarena; or file.py:Class of your own (rehearsed: "
        "what --fake-model makes of them). `async-rl tasks` lists them",
    )
    args: dict[str, Any] = setting({}, "settings of that task; `async-rl config` prints them")
    reward_weights: dict[str, float] = setting(
        {}, "part of the reward: its weight in the sum that is trained, for rewards that return named parts; others: 1"
    )


@dataclass(frozen=True)
class BatchSettings:
    """The size of one training step."""

    groups_per_step: int = setting(16, "P: groups trained in one step", unit="groups", min=1, max=1_000_000)
    group_size: int = setting(
        8,
        "trajectories sampled for one problem and compared with each other",
        unit="trajectories",
        min=1,
        max=1_000_000,
    )


@dataclass(frozen=True)
class StalenessSettings:
    """How far generation may run ahead of training."""

    policy: Literal["pace", "wait", "drop"] = setting(
        "pace",
        "how the bound is kept: pace holds generation back (nothing is discarded); wait lets the trainer wait for "
        "groups that are due; drop discards groups that are too old and asks their problems again (biased towards "
        "short answers; the bias is reported)",
    )
    max_staleness: int = setting(
        1,
        "k: no token is trained more than k steps after the weights that sampled it",
        unit="steps",
        min=0,
        max=1_000_000,
    )
    pipeline_depth: float = setting(
        0.0,
        "batches being generated, waiting or being trained at once, 1 .. max_staleness + 1; 0 takes max_staleness + 1",
        unit="batches",
        min=0,
    )
    target_ess: float = setting(
        0.0,
        "move pipeline_depth (then its start) within 1 .. max_staleness + 1 so that the effective sample size of "
        "the batches, metric ess/ratio, stays at this share; 0 leaves the depth as it is",
        unit="share of the batch",
        min=0,
        below=1,
    )
    window: float = setting(
        0.3,
        "a batch may take finished groups out of the oldest `window` share of the slots, so that one long episode "
        "does not stop the step; 0 is strict order",
        unit="share of slots",
        min=0,
        max=1,
    )


@dataclass(frozen=True)
class BufferSettings:
    """The process that orders groups and stores trajectories."""

    drop_zero_signal: bool = setting(
        False, "refuse groups whose rewards are all equal (no gradient) and generate others instead"
    )
    max_failures: int = setting(64, "end the run when so many trajectories in a row failed", unit="trajectories", min=1)
    max_refusals: int = setting(1000, "end the run when so many groups in a row were refused", unit="groups", min=1)
    durability: Literal["process", "power"] = setting(
        "process", "what a stored trajectory survives: the death of any process, or a power loss (an fsync a commit)"
    )
    memory_mb: int = setting(
        256,
        "what the buffer process may hold of trajectories in memory: pages of the store, messages under way, the "
        "part of a batch being sent; everything else is in the store alone",
        unit="MB",
        min=16,
        max=1_000_000,
    )
    max_store_mb: int = setting(
        0,
        "end the run, resumable, before trajectories.sqlite grows beyond this size (its write-ahead log of some "
        "16 MB not counted); 0: no limit",
        unit="MB",
        min=0,
        max=100_000_000,
    )
    keep_steps: int = setting(
        0,
        "delete the tokens of batches older than the newest so many steps that are in a checkpoint, and of groups "
        "refused before them; never what a kept checkpoint needs to go on. Their rows stay. 0 keeps all: needed "
        "to replay or rescore a whole run",
        unit="steps",
        min=0,
    )


@dataclass(frozen=True)
class EvaluationSettings:
    """Episodes on held-out problems."""

    every: int = setting(
        50,
        "evaluate on held-out problems every so many steps without stopping generation; 0 evaluates at start and "
        "end only",
        unit="steps",
        min=0,
    )
    problems: int = setting(64, "held-out problems of one evaluation", unit="problems", min=1, max=1_000_000)
    choice: Literal["spread", "first"] = setting(
        "spread",
        "which of them where there are more: `spread`, a fixed choice among all of them, or the `first` of the file, "
        "as runs did that were begun before this setting existed",
    )
    samples: int = setting(4, "trajectories per problem", unit="trajectories", min=1, max=1_000_000)
    temperature: float = setting(1.0, "sampling temperature of evaluation; 0 is greedy", min=0)


@dataclass(frozen=True)
class CanarySettings:
    """The check that generators hold the published weights."""

    tolerance: float = setting(
        0.0,
        "mean difference between a generator's log-probs and the trainer's on a fixed probe (as a share of "
        "log-probs beyond 1 nat), at equal weights, above which the run ends; 0 takes 1e-4 for "
        "generator.dtype=float32, 5e-2 for bfloat16, or three times what the generator showed first",
        unit="nats",
        min=0,
    )
    silent_steps: int = setting(
        20,
        "report a generator that has not shown for so many steps that it holds published weights; 0 never does",
        unit="steps",
        min=0,
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """What a resumed run goes on from."""

    every: int = setting(
        50,
        "save everything a resumed run needs, the model as a Hugging Face folder, every so many steps; 0 saves at "
        "the end only",
        unit="steps",
        min=0,
    )
    keep: int = setting(3, "newest checkpoints kept", unit="checkpoints", min=1)
    signals: list[str] = setting(
        ["SIGTERM", "SIGHUP", "SIGUSR1"],
        "signals to the run on which the step in hand is finished and a checkpoint written before it ends; of SIGTERM, "
        "SIGHUP, SIGUSR1, SIGINT (Ctrl-C); on the others it ends at once",
    )
    grace_s: float = setting(
        25.0,
        "longest time that takes; then the run ends with the checkpoints there are. Schedulers kill 30 s after their "
        "signal unless told otherwise",
        unit="seconds",
        above=0,
        max=1_000_000,
    )


@dataclass(frozen=True)
class GuardSettings:
    """The watch for a collapse. Thresholds are calibrated on the lab's trainings; bench/LAB.md says what they catch."""

    alarms: bool = setting(
        True,
        "watch ESS, its reference, entropy, gradient norm and reward for a collapse, and warn (metrics alarm/*, event "
        "`alarm`)",
    )
    window: int = setting(
        10,
        "what is compared are medians over so many steps; a run's start, which they are compared with, is as long",
        unit="steps",
        min=3,
        max=10_000,
    )
    ess: float = setting(
        0.05,
        "alarm below this ess/ratio (as a share of ess/reference), or below 2 effective samples, unless the run "
        "began near it; 0: never",
        unit="share of the batch",
        min=0,
        max=0.5,
    )
    reference: float = setting(
        1.0,
        "alarm when the log-weights of fresh data spread beyond what the run's start allows, by this factor on the "
        "variance (metric ess/noise): the reference of ess/ratio is no longer one; 0: never",
        unit="times",
        min=0,
    )
    entropy: float = setting(
        1.3,
        "alarm when the entropy is so many times that of the run's start, or a tenth of it with no more reward "
        "than then; 0: never",
        unit="times",
        min=0,
    )
    gradient: float = setting(
        20.0,
        "alarm when the gradient norm is so many times that of the run's start, or one over it with no more "
        "reward than then; 0: never",
        unit="times",
        min=0,
    )
    reward: float = setting(
        0.5,
        "alarm when the reward has lost this share of its best, beyond its noise; 0: never",
        unit="share",
        min=0,
        below=1,
    )
    mismatch: float = setting(
        0.5,
        "say once what to change when engine and trainer disagree so much at equal weights (kl/mismatch) that ratios "
        "spread by more than this share of the recipe's bounds on them (event `mismatch`); 0: never",
        unit="share of the bounds",
        min=0,
        max=100,
    )
    rollback: bool = setting(
        False,
        "at the first alarm go back, once, to the newest checkpoint from before its first sign, with a lower "
        "learning rate",
    )
    rollback_lr_scale: float = setting(
        0.3, "factor on the learning rate after going back", unit="factor", above=0, max=1
    )


@dataclass(frozen=True)
class WireSettings:
    """How the processes reach each other."""

    endpoint: str = setting(
        "auto",
        "where the buffer listens: auto (a Unix socket of this run), ipc://PATH or tcp://HOST:PORT; without a "
        "host (tcp://:PORT) on the loopback only, on every interface with tcp://0.0.0.0:PORT",
    )
    keys: str = setting(
        "", "folder of the CURVE keys (`async-rl keys` makes them) that tcp is served with, never without"
    )
    connect: str = setting(
        "", "where generators and trainer connect, if not at wire.endpoint itself: the near end of a tunnel or proxy"
    )
    timeout_s: float = setting(
        120.0,
        "longest wait of any process for another before the run ends with an error",
        unit="seconds",
        above=0,
        max=1_000_000,
    )
    frozen_after_s: float = setting(
        15.0,
        "a process that gives no sign of life for so long (a busy one gives them, a stopped one does not) is "
        "taken for frozen: it is ended; a generator is started again and its permits go to others, without "
        "trainer or buffer the run ends",
        unit="seconds",
        min=1,
    )
    stall_report_s: float = setting(
        10.0,
        "a wait that takes longer, and longer than two steps of the run, is reported on the console and in "
        "events.jsonl: who waits for whom, since when, for what",
        unit="seconds",
        above=0,
    )
    max_message_mb: int = setting(256, "larger messages are refused", unit="MB", min=1, max=1_000_000)


@dataclass(frozen=True)
class WeightsSettings:
    """How generators get new weights."""

    transport: Literal["auto", "shared_memory", "stream", "nccl", "ipc"] = setting(
        "auto",
        "how generators get weights: from the trainer's shared memory; as a stream from the weight server, which "
        "runs with a tcp endpoint; from GPU to GPU into vLLM, over NCCL (other GPUs) or CUDA IPC (the trainer's "
        "own); auto: what the placement allows, see docs/howto/weights.md",
    )
    timeout_s: float = setting(
        120.0,
        "nccl and ipc: longest time one transfer to one generator may take, the meeting before the first "
        "included; then the generator is given up and starts anew",
        unit="seconds",
        above=0,
        max=1_000_000,
    )
    broadcast: bool = setting(
        False,
        "nccl: each version goes to all generators at once, in one NCCL group that is formed anew when generators come "
        "or go, in place of one transfer after another",
    )
    endpoint: str = setting(
        "auto",
        "where the weight server listens, tcp://HOST:PORT as for wire.endpoint; auto: a free port beside the buffer's",
    )
    relay: str = setting(
        "",
        "for `async-rl generate`: the relay from which this generator gets weights, tcp://HOST:PORT; empty: the weight "
        "server itself",
    )
    fan_out: int = setting(
        1,
        "relays (`async-rl relay`) that the weight server and each relay send to; 1: a chain, in which every machine "
        "sends a version once",
        unit="relays",
        min=1,
        max=64,
    )


@dataclass(frozen=True)
class Settings:
    """Everything a run can be told."""

    name: str = setting("run", "name of the run; its folder is runs/<name>-<time>")
    seed: int = setting(0, "seed of sampling, prompt order and initialisation", min=0, max=2**63 - 1)
    model: ModelSettings = field(default_factory=ModelSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    staleness: StalenessSettings = field(default_factory=StalenessSettings)
    recipe: dict[str, Any] = setting(
        {"name": "vcpo"},
        "the objective: a recipe's name (`async-rl recipes` lists them), or file.py:function or file.yaml of your own, "
        "and any of its axes",
    )
    buffer: BufferSettings = field(default_factory=BufferSettings)
    pool: PoolSettings = field(default_factory=PoolSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    vllm: VllmSettings = field(default_factory=VllmSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    updates: UpdatesSettings = field(default_factory=UpdatesSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    teachers: dict[str, Any] = setting(
        {},
        "name: settings of each model whose log-probs of the policy's tokens the recipe distils (recipe.teaching): "
        "`path`, a model folder, or `address`, an OpenAI-compatible server; see docs/howto/teachers.md",
    )
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    critic: CriticSettings = field(default_factory=CriticSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    canary: CanarySettings = field(default_factory=CanarySettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    verify: VerifySettings = field(default_factory=VerifySettings)
    wire: WireSettings = field(default_factory=WireSettings)
    weights: WeightsSettings = field(default_factory=WeightsSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    pin_threads: bool = setting(
        False,
        "bind each generator and trainer rank to `threads` cores of its own, so that none moves or meets another; "
        "the buffer and the rest use any core",
    )
    trackers: list[str] = setting(
        [],
        "where metrics go besides the run folder: tensorboard, wandb; by a process of their own that the run "
        "never waits for",
    )
