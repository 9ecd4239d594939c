"""Checks that engine and trainer compute the same log-probs, and that a run without staleness equals synchronous
training."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from async_rl.config import Settings
from async_rl.errors import RunFailed, UserError
from async_rl.finding import Finding, error, ok, warning
from async_rl.generator.build import make_engine
from async_rl.generator.session import Ticket, make_tickets
from async_rl.instruments.synchronous import train_synchronously
from async_rl.model.decoder import DTYPES
from async_rl.model.folder import load_model, load_tensors
from async_rl.model.tokenizer import Tokenizer
from async_rl.objective.mismatch import remedy_of
from async_rl.observe.console import Console
from async_rl.run.evaluate import limits_of, sample_episodes
from async_rl.run.launcher import run_training
from async_rl.run_folder import RunFolder
from async_rl.task import Task
from async_rl.trainer.forward import ModelArithmetic, batch_log_probs, probe_log_probs
from async_rl.trainer.mismatch_watch import explain, make_mismatch_watch
from async_rl.trainer.packing import pack_batch
from async_rl.trajectory import Trajectory
from async_rl.weights.canary import Comparison, Evidence, compare, probe_tokens, tolerance_of
from async_rl.wire.messages import Permit

SMALL_PARAMETERS = 20_000_000
"""models up to this size are sampled from and trained; larger ones are only probed"""
EPISODES = 16
STEPS = 2
WEIGHT_TOLERANCE = {"float32": 0.01, "bfloat16": 0.3}
"""mean difference of the weights as a share of the mean distance they moved. The order in which episodes enter the
engine changes the last bits of a log-prob, and Adam's first steps make much of them where a gradient is almost 0;
other data would give a share near 1"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDifference:
    """How far the weights of two trainings that should be equal lie apart."""

    apart: float
    """mean over all elements"""
    moved: float
    """mean change by training"""
    tensor: str
    """name of the tensor that is farthest apart"""

    @property
    def share(self) -> float:
        return self.apart / self.moved if self.moved else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What log-probs were compared on: episodes that the engine sampled, or a fixed probe for large models."""

    text: str
    """in words"""
    mismatch: float
    """kl/mismatch on them, nats"""
    length: float
    """policy tokens of a trajectory"""


def measure_log_probs(settings: Settings, task: Task, *, parameters: int) -> tuple[Comparison, Sampled]:
    """Compare the log-probs of engine and trainer at equal weights; also returns what they were compared on."""
    trainer = load_model(Path(settings.model.path), device=settings.trainer.device)
    tokenizer = Tokenizer.of(settings.model)

    async def ask() -> tuple[list[Trajectory], tuple[int, ...], list[float]]:
        engine = make_engine(settings, tokenizer)
        try:
            if parameters > SMALL_PARAMETERS:
                probe = probe_tokens(task, tokenizer, engine.max_context)
                return [], probe, [float(value) for value in await engine.probe(probe)]
            tickets = _tickets(settings, task)
            return await sample_episodes(engine, task, tokenizer, tickets, limits_of(settings)), (), []
        finally:
            await engine.close()

    episodes, probe, shown = asyncio.run(ask())
    if probe:
        expected = probe_log_probs(trainer, probe, ModelArithmetic(temperature=1.0))
        return _compared(expected, shown), _sampled(f"{len(probe)} tokens of a probe", expected, shown, 1)
    usable = [t for t in episodes if not t.failed and t.num_policy_tokens]
    if not usable:
        raise UserError(f"no episode could be sampled: {episodes[0].reason}")
    packed = pack_batch(usable, micro_batch_tokens=settings.trainer.micro_batch_tokens, device=settings.trainer.device)
    arithmetic = ModelArithmetic(temperature=settings.generator.temperature, dtype=DTYPES[settings.trainer.dtype])
    found = batch_log_probs(trainer, packed, arithmetic).log_prob.tolist()
    engines = packed.log_behaviour.tolist()
    on = _sampled(f"{packed.num_policy_tokens} tokens of {len(usable)} episodes", found, engines, len(usable))
    return _compared(found, engines), on


def _sampled(text: str, expected: Sequence[float], shown: Sequence[float], trajectories: int) -> Sampled:
    """expected, shown: log-probs of the same tokens by the trainer and by the engine."""
    apart = torch.tensor(expected, dtype=torch.float64) - torch.tensor(list(shown), dtype=torch.float64)
    apart = apart.clamp(-20.0, 20.0)
    return Sampled(
        text=text, mismatch=float((apart.exp() - 1 - apart).mean()), length=max(1.0, len(expected) / trajectories)
    )


def judge_log_probs(found: Comparison, on: Sampled, settings: Settings) -> Finding:
    """Raises nothing: engines that differ by more than arithmetic explains are an error, by more than the recipe bears
    a warning with the setting to change."""
    check = "log-probs"
    tolerance = settings.canary.tolerance or tolerance_of(settings.generator.dtype, settings.generator.quantization)
    said = (
        f"engine and trainer differ by {found.max_difference:.1e} nats at most, {found.mean_difference:.1e} in the "
        f"mean (tolerance of the mean {tolerance:g}), on {on.text}"
    )
    if found.wrong(tolerance):
        return error(
            check, said,
            "ratios would be wrong from the first step: is generator.dtype what the model bears? If its arithmetic "
            "explains the difference, raise canary.tolerance",
        )  # fmt: skip
    watch = make_mismatch_watch(settings)
    level = watch.bounds.level(watch.share, on.length)
    if watch.share and on.mismatch > level:
        return warning(
            check,
            f"{said}; {explain(on.mismatch, level, watch.bounds, on.length)}",
            remedy_of(watch.recipe, watch.engine, on.mismatch, updates=watch.updates),
        )
    return ok(check, said)


def measure_equivalence(settings: Settings) -> WeightDifference:
    """A run of two steps with max_staleness=0 against the in-process loop. Raises UserError, RunFailed."""
    small = small_settings(settings)
    begun = dict(load_model(Path(settings.model.path)).named_parameters())
    expected = train_synchronously(small, lambda _step, _report: None).weights()
    with TemporaryDirectory(prefix="async-rl-doctor-") as made:
        folder = RunFolder(Path(made) / "run")
        run_training(small, folder.path, console=Console(quiet=True, silent=True))
        trained = load_tensors(folder.checkpoints / f"step_{STEPS:06d}")
    size = {name: tensor.numel() for name, tensor in expected.items()}
    apart = {name: _distance(trained[name], expected[name]) for name in expected}
    moved = sum(_distance(expected[name], begun[name]) for name in expected)
    worst = max(apart, key=lambda name: apart[name] / size[name])
    total = sum(size.values())
    return WeightDifference(apart=sum(apart.values()) / total, moved=moved / total, tensor=worst)


def small_settings(settings: Settings) -> Settings:
    """The same objective, model and task, on a small batch without staleness."""
    batch = settings.batch
    return replace(
        settings,
        name="doctor",
        staleness=replace(settings.staleness, policy="pace", max_staleness=0, pipeline_depth=0.0),
        batch=replace(batch, groups_per_step=min(4, batch.groups_per_step), group_size=min(8, batch.group_size)),
        trainer=replace(settings.trainer, steps=STEPS),
        optimizer=replace(settings.optimizer, warmup_steps=0),
        evaluation=replace(settings.evaluation, every=0, problems=1, samples=1),
        checkpoint=replace(settings.checkpoint, every=0),
        buffer=replace(settings.buffer, keep_steps=0, max_store_mb=0),
        generator=replace(settings.generator, count=1),
        wire=replace(settings.wire, endpoint="auto"),
    )


def judge_equivalence(found: WeightDifference, settings: Settings) -> Finding:
    check = "max_staleness=0"
    tolerance = WEIGHT_TOLERANCE[settings.generator.dtype]
    said = (
        f"after {STEPS} steps weights differ from synchronous training by {found.share:.2%} of what they moved "
        f"(tolerance {tolerance:.0%})"
    )
    if found.share > tolerance or found.apart > 0 == found.moved:
        return error(
            check, f"{said}, at {found.tensor}",
            "a run is not what it should be at staleness 0: a task or reward that depends on time or order? Else "
            "please report it",
        )  # fmt: skip
    if found.moved == 0:
        return warning(
            check, "both changed nothing: no gradient in this small batch",
            "all rewards may have been equal; train the model a little first (`async-rl init-model`)",
        )  # fmt: skip
    return ok(check, said)


def check_log_probs(settings: Settings, task: Task, parameters: int, free_bytes: int) -> Finding:
    if 8 * parameters > free_bytes and not settings.trainer.device.startswith("cuda"):
        return warning("log-probs", "left out: two copies of the model do not fit into memory", "see the line 'memory'")
    return judge_log_probs(*measure_log_probs(settings, task, parameters=parameters), settings)


def check_equivalence(settings: Settings, parameters: int) -> Finding:
    """Only for small models on CPU: it trains."""
    check = "max_staleness=0"
    cuda = settings.trainer.device.startswith("cuda") or settings.generator.device.startswith("cuda")
    if parameters > SMALL_PARAMETERS or cuda or settings.generator.engine != "embedded":
        return warning(
            check, f"left out: it trains a model of at most {SMALL_PARAMETERS:,} parameters on CPU, embedded engine",
            "run doctor with a small model.path, device=cpu and engine=embedded to try this task and recipe",
        )  # fmt: skip
    try:
        found = measure_equivalence(settings)
    except (UserError, RunFailed) as failure:
        return warning(check, f"could not be tried: {failure}", "see the message; a recipe may need staleness to act")
    return judge_equivalence(found, settings)


def _tickets(settings: Settings, task: Task) -> list[Ticket]:
    problems = len(task.problems("train"))
    temperature = settings.generator.temperature
    tickets: list[Ticket] = []
    for i in range(min(EPISODES, settings.generator.max_sequences)):
        seed = settings.seed + i
        permit = Permit(group=i, problem=i % problems, split="train", samples=(0,), seed=seed, temperature=temperature)
        tickets += make_tickets(permit, [seed])
    return tickets


def _compared(expected: list[float] | tuple[float, ...], found: list[float]) -> Comparison:
    return compare(
        Evidence(version=0, digests={}, log_probs=expected), Evidence(version=0, digests={}, log_probs=found)
    )


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().sum())
