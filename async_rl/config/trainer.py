"""Settings of the processes that train: the step, the optimizer, adapters, a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting


@dataclass(frozen=True)
class TrainerSettings:
    """The processes that train."""

    steps: int = setting(400, "training steps (batches)", unit="steps", min=1, max=1_000_000_000)
    micro_batch_tokens: int = setting(
        16384, "most tokens (prompt included) of one packed forward", unit="tokens", min=1
    )
    device: str = setting("cpu", "torch device of the trainer: cpu, cuda (placed by `gpus`) or cuda:N")
    ranks: int = setting(
        1,
        "processes that train together, each on its share of a batch; the step is that of one, but for the order "
        "of its sums. Several are started by torch.distributed's own launcher",
        unit="processes",
        min=1,
        max=1024,
    )
    gpus: str = setting("", "GPUs of the trainer's ranks, one each, e.g. 4-7; empty: those behind the generators'")
    memory_share: float = setting(
        1.0,
        "share of its GPU's memory that a trainer rank may take; below 1 generators may be on the same GPU",
        above=0,
        max=1,
    )
    start: Literal["launcher", "external"] = setting(
        "launcher",
        "who starts the trainer: the run itself, or somebody else (torchrun, a cluster's scheduler) with "
        "`async-rl train RUN`, which the run waits for",
    )
    nodes: int = setting(
        1,
        "machines that the ranks are on, equally many on each, where somebody else starts them: torchrun is given on "
        "each of them",
        unit="machines",
        min=1,
        max=1024,
    )
    network: str = setting(
        "",
        "what ranks on several machines talk over: a network, e.g. 10.0.0.0/8, of which each machine takes its own "
        "interface, or names of interfaces in order of preference, e.g. ib0,eth0; empty: that of the machine's name. "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in the environment come first",
    )
    start_timeout_s: float = setting(
        600.0, "longest wait for a trainer that is started by somebody else", unit="seconds", above=0, max=1_000_000
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "arithmetic of forward and backward; weights, optimizer and log-probs stay float32"
    )
    attention: Literal["auto", "flash", "varlen", "sdpa"] = setting(
        "auto",
        "attention among packed documents: flash (flash-attn), varlen (torch's own kernel), both for CUDA and "
        "bfloat16, or sdpa (documents of similar length padded together); auto takes the first there is",
    )
    shared_prefixes: bool = setting(
        True,
        "compute a beginning that trajectories of a batch have in common, such as the prompt of a group, once for all "
        "of them; off: for each anew. Results are the same but for the last bits",
    )
    checkpoint_activations: Literal["none", "layer"] = setting(
        "none",
        "layer: keep only each layer's input and compute the rest again in the backward pass; a third more time "
        "for a fraction of the memory",
    )
    compile: bool = setting(
        False,
        "compile the layers with torch.compile; the first step then takes a minute longer, and a C++ compiler is "
        "needed",
    )
    threads: int = setting(0, "CPU threads of a trainer rank; 0: by cores and model", unit="threads", min=0, max=1024)
    lanes: int = setting(
        0,
        "parts of a micro-batch that a rank computes side by side on a CPU: they share `threads`, one each at least; "
        "and each holds a gradient of its own. 0: by cores and model, 1 where `threads` is given",
        unit="parts",
        min=0,
        max=64,
    )
    sharding: Literal["none", "full"] = setting(
        "none",
        "over several ranks: none keeps the whole model and its optimizer on each; full splits weights, gradients "
        "and moments over them (FSDP2), the KL reference and a critic model too",
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate."""

    learning_rate: float = setting(5e-4, "AdamW learning rate after warm-up, before the recipe's factors", min=0)
    warmup_steps: int = setting(20, "linear warm-up from 0", unit="steps", min=0)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "learning rate after warm-up: constant, or falling to `final_share` of it (linear, cosine)"
    )
    final_share: float = setting(
        0.0, "linear and cosine end at this share of the learning rate", unit="share", min=0, max=1
    )
    weight_decay: float = setting(0.0, "AdamW decoupled weight decay of matrices", min=0)
    beta1: float = setting(0.9, "AdamW first-moment decay", min=0, below=1)
    beta2: float = setting(0.95, "AdamW second-moment decay", min=0, below=1)
    epsilon: float = setting(1e-8, "AdamW denominator offset", above=0)
    clip_norm: float = setting(
        1.0, "global gradient norm above which the gradient is scaled down; 0 turns it off", min=0
    )


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters."""

    rank: int = setting(
        0,
        "rank of the adapters (LoRA) that are trained while the model's own weights stay as they are; 0 trains "
        "all weights",
        min=0,
        max=4096,
    )
    alpha: float = setting(16.0, "an adapter's product is multiplied by alpha / rank", above=0)
    targets: list[str] = setting(
        [],
        "linear layers that get an adapter, by the last part of their names, e.g. [q_proj, v_proj]; empty: all of "
        "them but the head",
    )
    send: Literal["merged", "adapter"] = setting(
        "merged",
        "what travels to the generators: the whole model with the adapters added, or the adapters alone, which "
        "each generator adds to its own copy of the model",
    )
