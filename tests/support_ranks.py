"""The same training steps by one process and by several ranks: cases, batches, and the process of a rank.

As a program: `support_ranks.py FOLDER` joins the ranks its environment names, goes through cases (`keys`, and
`RUNS` for each model folder in FOLDER) and leaves each one's weights and metrics in FOLDER. With the word `lost`
the last rank leaves without a word, and the others say how they noticed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from safetensors.torch import save_file
from support_run import quick_settings
from torch import Tensor

from async_rl.config import CriticSettings, OptimizerSettings, ReferenceSettings, UpdatesSettings
from async_rl.errors import RunFailed
from async_rl.model.architecture import DecoderConfig
from async_rl.model.decoder import Decoder, LayerExecution
from async_rl.model.lora import add_adapters
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.trainer.build import make_learner
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import ModelArithmetic, batch_log_probs, probe_log_probs
from async_rl.trainer.held_versions import HeldShards
from async_rl.trainer.learner import Learner, LearnerOptions
from async_rl.trainer.packing import PackedBatch, pack_batch, pack_step
from async_rl.trainer.ranks import Ranks, full, join_ranks
from async_rl.trainer.rescoring import Wanted
from async_rl.trainer.sharding import shard
from async_rl.trainer.shares import Cost, Spread
from async_rl.trajectory import Trajectory, Turn, VersionSpan

TIED = DecoderConfig(
    family="qwen3", vocabulary=23, hidden=24, intermediate=30, layers=3, heads=4, kv_heads=2, head_dim=6,
    max_context=64, qk_norm=True, tied=True,
)  # fmt: skip
UNTIED = replace(TIED, family="qwen2", qk_norm=False, qkv_bias=True, tied=False)
ARITHMETIC = ModelArithmetic(temperature=0.9)
# A large epsilon keeps Adam's first step from being a sign: it would blow rounding up.
OPTIMIZER = OptimizerSettings(learning_rate=3e-2, warmup_steps=0, clip_norm=0.5, epsilon=1e-2, weight_decay=0.01)
COST = Cost(per_token=1000, per_policy_token=100, per_pair=10)
STEPS = 2
TWICE = UpdatesSettings(epochs=2)
IN_PARTS = UpdatesSettings(epochs=2, minibatches=2, kl_stop=10.0)
TIMEOUT_S = 300.0
"""enough for a machine that is busy with much else"""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    recipe: Mapping[str, Any]
    micro_batch_tokens: int = 10_000
    groups: Sequence[int] = (4, 3, 1, 5, 2)
    """trajectories of each"""
    config: DecoderConfig = TIED
    updates: UpdatesSettings = UpdatesSettings()
    small: bool = False
    """run by two ranks too, not by four only"""
    critic: CriticSettings = field(default_factory=lambda: CriticSettings(warmup_steps=0))
    again: bool = False
    """compute layers again in the backward pass"""
    lora: int = 0
    """rank of adapters; not with sharded weights"""
    contexts: bool = False
    """episodes of two contexts, agents and temperatures"""
    reference: ReferenceSettings = ReferenceSettings()
    prompt: int = 0
    """tokens with which all episodes of a group begin, before those of their own; ranks compute them once"""


EXACT = {"name": "vcpo"}
ONE_FOR_ALL = {"name": "vcpo", "opob": {"scope": "batch"}}
ADAPTIVE = {
    "name": "vcpo",
    "advantage": {"scale": "none"},
    "kl": {
        "coefficient": 0.05, "place": "reward", "target": "behaviour", "adaptive_target": 1e-4, "adaptive_horizon": 4.0,
    },
}  # fmt: skip
"""beta grows by three quarters in a step"""
CASES = (
    Case(name="grpo", recipe={"name": "grpo"}),
    Case(
        name="grpo untied, many micro-batches", recipe={"name": "grpo"}, micro_batch_tokens=40, config=UNTIED,
        small=True,
    ),
    Case(name="grpo, less than a rank each", recipe={"name": "grpo"}, groups=(2,)),
    Case(name="exact", recipe=EXACT),
    Case(name="exact untied", recipe=EXACT, config=UNTIED),
    Case(name="exact, a group a micro-batch", recipe=EXACT, micro_batch_tokens=120, groups=(4, 2, 3, 4, 2, 1)),
    Case(name="exact, groups cut", recipe=EXACT, micro_batch_tokens=30, small=True),
    Case(name="exact, fewer groups than ranks", recipe=EXACT, groups=(3,)),
    Case(name="exact, one baseline", recipe=ONE_FOR_ALL, config=UNTIED, small=True),
    Case(name="exact, one baseline, many micro-batches", recipe=ONE_FOR_ALL, micro_batch_tokens=40),
    Case(name="exact, adaptive KL", recipe=ADAPTIVE),
    Case(name="exact, adaptive KL, groups cut", recipe=ADAPTIVE, micro_batch_tokens=30, small=True),
    Case(name="reference", recipe={"name": "dr_grpo", "kl": {"coefficient": 0.1}}, micro_batch_tokens=60),
    Case(name="entropy", recipe={"name": "gspo", "entropy": 0.01}, updates=TWICE, micro_batch_tokens=60),
    Case(name="critic head", recipe={"name": "ppo"}, updates=TWICE),
    Case(name="likelihood of correct answers", recipe={"name": "vapo"}, micro_batch_tokens=60, small=True),
    Case(
        name="critic model", recipe={"name": "ppo"}, updates=TWICE, config=UNTIED, micro_batch_tokens=50,
        critic=CriticSettings(kind="model", warmup_steps=1), small=True,
    ),
    Case(name="layers computed again", recipe={"name": "grpo"}, micro_batch_tokens=60, again=True),
    Case(name="adapters", recipe={"name": "grpo"}, micro_batch_tokens=60, config=UNTIED, lora=2),
    Case(name="exact, adapters", recipe=EXACT, lora=2),
    Case(name="contexts", recipe={"name": "grpo"}, micro_batch_tokens=50, contexts=True, small=True),
    Case(name="exact, contexts", recipe=EXACT, micro_batch_tokens=50, contexts=True),
    Case(name="shared prefixes", recipe={"name": "grpo"}, micro_batch_tokens=60, prompt=12, small=True),
    Case(name="exact, shared prefixes", recipe=EXACT, micro_batch_tokens=150, prompt=12, small=True),
    Case(name="shared prefixes, contexts", recipe={"name": "gspo"}, micro_batch_tokens=50, prompt=9, contexts=True),
    Case(
        name="minibatches, critic model", recipe={"name": "ppo"}, updates=IN_PARTS, config=UNTIED, small=True,
        critic=CriticSettings(kind="model", warmup_steps=1), micro_batch_tokens=50,
    ),
    Case(
        name="Q heads with a target network", recipe={"name": "archer"}, micro_batch_tokens=50, prompt=9, small=True,
        critic=CriticSettings(kind="model", warmup_steps=0, epochs=2, target_average=0.8),
    ),
    Case(
        name="minibatches, exact, shared prefixes", recipe=EXACT, updates=IN_PARTS, micro_batch_tokens=100, prompt=12,
        small=True,
    ),
    Case(
        name="a reference that follows, turns in order", updates=TWICE, reference=ReferenceSettings(average=0.5),
        recipe={"name": "grpo", "kl": {"coefficient": 0.1}, "ratio": {"level": "turn"}, "turn_order": "last_first"},
        small=True,
    ),
    Case(name="clipped norm", recipe={"name": "s_ppo", "bias": {"estimator": "exact"}}, updates=TWICE),
    Case(
        name="clipped norm, many micro-batches", recipe={"name": "s_ppo", "bias": {"estimator": "exact"}},
        updates=TWICE, micro_batch_tokens=50,
    ),
)  # fmt: skip


def episodes(
    groups: Sequence[int], config: DecoderConfig, seed: int, *, contexts: bool = False, prompt: int = 0
) -> list[Trajectory]:
    """Two-turn episodes of ragged lengths in groups of these sizes, one without a policy token, sampled (as far
    as log-probs go) by slightly other weights. contexts: most have two, and an agent and a temperature for the second
    turn. prompt: tokens that are the same in a group, before the rest."""
    random = np.random.default_rng(seed)
    made = []
    for group, size in enumerate(groups):
        same = np.random.default_rng((seed, group)).integers(0, TIED.vocabulary, prompt).astype(np.int32)
        for sample in range(size):
            start, first, second = (int(random.integers(1, most)) for most in (5, 12, 6))
            start += prompt
            length = start + first + 2 + second
            turns = (Turn(start=start, length=first, reward=0.5), Turn(start=start + first + 2, length=second))
            if contexts and sample != 1:
                turns = (turns[0], structs.replace(turns[1], agent="second", temperature=0.5 + 0.5 * sample))
            if (group, sample) == (1, 1):
                turns = ()
            made.append(
                Trajectory(
                    group=group,
                    sample=sample,
                    problem=0,
                    split="train",
                    seed=0,
                    tokens=np.concatenate(
                        [same, random.integers(0, TIED.vocabulary, length - prompt).astype(np.int32)]
                    ),
                    log_behaviour=np.zeros(length, np.float32),
                    turns=turns,
                    versions=(VersionSpan(version=0, start=start, end=length),),
                    reward=float(random.integers(0, 3)) + 0.25 * sample,
                    temperature=ARITHMETIC.temperature,
                    contexts=(start + first,) if contexts and sample != 1 else (),
                    ended="finished",
                )
            )
    behaviour = make_model(config, 1)
    with torch.no_grad():
        for parameter in behaviour.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)), alpha=0.02)
    packed = pack_batch(made, micro_batch_tokens=10_000)
    found = batch_log_probs(behaviour, packed, ARITHMETIC).log_prob.float().numpy()
    ends = np.cumsum([t.num_policy_tokens for t in made])
    for trajectory, part in zip(made, np.split(found, ends[:-1]), strict=True):
        trajectory.log_behaviour[trajectory.policy_positions()] = part
    return made


def make_model(config: DecoderConfig, seed: int) -> Decoder:
    model = Decoder(config)
    model.initialise(seed, std=0.3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def build(case: Case, ranks: Ranks, sharding: str) -> Learner:
    """In float64, where rounding hides nothing."""

    def model(seed: int) -> Decoder:
        made = make_model(case.config, seed)
        if sharding == "full" and ranks.size > 1:
            shard(made, ranks, dtype=torch.float64)
        return made

    recipe = load_recipe(case.recipe)
    needs = requirements(recipe)
    policy = model(1)
    policy.set_execution(LayerExecution(checkpointed=case.again))
    adapters = None
    if case.lora:
        torch.manual_seed(0)
        adapters = add_adapters(policy, rank=case.lora, alpha=2.0)
        policy.double()
    critic = None
    if needs.value:
        trunk = model(1) if case.critic.kind == "model" else None
        slow = model(1) if case.critic.target_average else None
        torch.manual_seed(0)
        critic = Critic(policy, case.critic, ARITHMETIC, ranks=ranks, trunk=trunk, slow_trunk=slow, turn_q=needs.turn_q)
        for head in (critic.head, critic._slow_head):
            head.double()
    options = LearnerOptions(
        steps=10, updates=case.updates, optimizer=OPTIMIZER, arithmetic=ARITHMETIC, reference=case.reference
    )
    reference = model(2).requires_grad_(False) if needs.reference else None
    return Learner(policy, recipe, options, critic=critic, reference=reference, ranks=ranks, adapters=adapters)


def pack(case: Case, ranks: Ranks, seed: int) -> PackedBatch:
    over, whole = None, requirements(load_recipe(case.recipe)).per_trajectory_norms
    if ranks.size > 1:
        over = Spread(rank=ranks.rank, size=ranks.size, cost=COST, whole_groups=whole)
    made = episodes(case.groups, case.config, seed, contexts=case.contexts, prompt=case.prompt)
    shared = case.prompt > 0 and ranks.size > 1
    return pack_batch(
        made, micro_batch_tokens=case.micro_batch_tokens, over=over, shared=shared, apart=shared and whole
    )


def outcome(case: Case, ranks: Ranks, sharding: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights (the critic's too) behind two steps, and the metrics of each."""
    learner = build(case, ranks, sharding)
    reports = [learner.step(pack(case, ranks, seed)) for seed in range(STEPS)]
    assert not any(report.skipped for report in reports)
    weights = {name: tensor.clone() for name, tensor in learner.full_weights()}
    if learner.critic is not None:
        weights |= {f"critic.{n}": full(t).clone() for n, t in learner.critic.state_dict().items()}
    return weights, [dict(report.metrics) for report in reports]


def keys(size: int) -> Iterator[tuple[str, Case, str]]:
    """Key, case and sharding of what so many ranks go through."""
    for number, case in enumerate(CASES):
        if size > 2 or case.small:
            for sharding in ("none",) if case.lora else ("none", "full"):
                yield f"{number}-{sharding}", case, sharding


RUNS = {
    "exact": ("recipe=vcpo",),
    "critic": ("recipe=ppo", "critic.kind=model", "critic.warmup_steps=0", "recipe.kl.coefficient=0.1"),
    "bfloat16": ("recipe=grpo", "trainer.dtype=bfloat16"),
    "foreign": ("recipe=grpo", "recipe.kl.coefficient=0.1"),
}
"""settings of the learner for the model in the folder of this name, as a run makes it"""


def run_outcome(model: Path, ranks: Ranks, sharding: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Like `outcome`, from a model folder and settings, in float32."""
    over = (f"trainer.ranks={ranks.size}", f"trainer.sharding={sharding}") if ranks.size > 1 else ()
    words = (*RUNS[model.name], "trainer.micro_batch_tokens=80", "optimizer.epsilon=0.01")
    rate = ("optimizer.learning_rate=0.03", "optimizer.warmup_steps=0", "critic.learning_rate=0.001")
    settings = quick_settings(model, *words, *rate, *over)
    learner = make_learner(settings, ranks)
    config = replace(TIED, vocabulary=learner.model.config.vocabulary)
    batches = [episodes(CASES[0].groups, config, seed) for seed in range(STEPS)]
    shards = HeldShards(learner=learner)
    wanted = [Wanted(trajectory=t, positions=t.policy_positions()) for t in batches[0] if t.num_policy_tokens]
    shards.hold([0])
    first = rescored(shards, 0, wanted)
    reports = [learner.step(pack_step(settings, batch, learner.over)) for batch in batches]
    assert not any(report.skipped for report in reports)
    again, now = rescored(shards, 0, wanted), rescored(shards, learner.version, wanted)
    assert first == again != now, "a held version is scored as it was, and the present one as it is"
    probed = probe_log_probs(learner.model, (1, 2, 3), learner.options.arithmetic)
    weights = {name: tensor.clone() for name, tensor in learner.full_weights()}
    found = {"probe": sum(probed), "rescored_held": again, "rescored": now}
    return weights, [{**report.metrics, **found} for report in reports]


def rescored(shards: HeldShards, version: int, wanted: Sequence[Wanted]) -> float:
    """Sum of the log-probs of all policy tokens, as the verifier finds them."""
    return float(sum(one.log_prob.sum() for one in shards.score(version, wanted, most_tokens=60)))


def start(program: str, folder: Path, size: int, *words: str) -> None:
    """Run `program` as that many ranks to their ends; every one must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        given = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in given.items()}, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, program, str(folder), *words]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        ends = [(process.communicate(timeout=2 * TIMEOUT_S)[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (errors, code) in enumerate(ends):
        assert code == 0, f"rank {rank} of {size} ended with {code}: {errors[-3000:]}"
        assert "terminate called" not in errors


def main(folder: Path) -> None:
    def leave(key: str, weights: dict[str, Tensor], metrics: list[dict[str, float]]) -> None:
        save_file(deepcopy(weights), folder / f"{key}.{ranks.rank}.safetensors")
        (folder / f"{key}.{ranks.rank}.json").write_text(json.dumps(metrics))

    with join_ranks("cpu", TIMEOUT_S) as ranks:
        for key, case, sharding in keys(ranks.size):
            leave(key, *outcome(case, ranks, sharding))
        for model in sorted(path.parent for path in folder.glob("*/config.json")):
            for sharding in ("none", "full"):
                leave(f"{model.name}-{sharding}", *run_outcome(model, ranks, sharding))


def lose_a_rank(folder: Path) -> None:
    ranks = join_ranks("cpu", TIMEOUT_S)
    mine = torch.full((ranks.rank, 2), float(ranks.rank))
    rows = ranks.gather_rows(mine, list(range(ranks.size)))
    assert rows[:, 0].tolist() == [rank for rank in range(ranks.size) for _ in range(rank)]
    assert ranks.broadcast_bytes(b"word" if ranks.leads else None) == b"word"
    assert ranks.broadcast_bytes(b"" if ranks.leads else None) == b""
    assert ranks.sum_tensor(torch.tensor([ranks.rank])).item() == sum(range(ranks.size))
    if ranks.rank == ranks.size - 1:
        os._exit(0)  # as one that is killed: nothing is said or closed
    try:
        ranks.broadcast_bytes(b"word" if ranks.leads else None)
        ranks.barrier()
    except RunFailed as error:
        (folder / f"{ranks.rank}.txt").write_text(str(error))
    os._exit(0)  # as the trainer's processes end


if __name__ == "__main__":
    torch.set_num_threads(1)
    (lose_a_rank if "lost" in sys.argv else main)(Path(sys.argv[1]))
