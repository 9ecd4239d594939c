"""Supervised warm-up of a small model on a task's demonstrations, until it succeeds often enough."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch

from async_rl.errors import UserError
from async_rl.model.create import create_model_folder
from async_rl.model.decoder import Decoder
from async_rl.model.folder import load_model, save_folder
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.evaluate import evaluate
from async_rl.run.preflight import check_fit
from async_rl.task.protocol import Problem, Task
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import pack_batch
from async_rl.trajectory import Trajectory, Turn, VersionSpan

Measure = Callable[[Decoder], float]
"""success rate of a model on held-out problems"""
MOST_PROBLEMS, LEAST_EPISODES = 128, 64
"""of one measurement: a task with two held-out problems is asked each of them often, or luck would decide"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupOptions:
    target: float
    """success rate at which to stop"""
    max_steps: int
    batch: int
    """demonstrations a step"""
    learning_rate: float
    check_every: int
    """steps between two measurements"""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupResult:
    steps: int
    success: float
    seconds: float


def demonstration(task: Task, problem: Problem, tokenizer: Tokenizer, random: Random) -> Trajectory:
    """One demonstration as a trajectory: the segments marked `policy` are its turns."""
    tokens: list[int] = []
    turns: list[Turn] = []
    for segment in task.demonstration(problem, random):
        piece = tokenizer.encode(segment.text)
        if segment.policy:
            turns.append(Turn(start=len(tokens), length=len(piece)))
        tokens += piece
    spans = tuple(VersionSpan(version=0, start=t.start, end=t.start + t.length) for t in turns)
    return Trajectory(
        group=0,
        sample=0,
        problem=problem.index,
        split="train",
        seed=0,
        tokens=np.array(tokens, np.int32),
        log_behaviour=np.zeros(len(tokens), np.float32),
        turns=tuple(turns),
        versions=spans,
        reward=1.0,
        ended="finished",
    )


def warm_up(model: Decoder, task: Task, tokenizer: Tokenizer, options: WarmupOptions, measure: Measure) -> WarmupResult:
    """Maximum likelihood on demonstrations of the train split. Stops at the target success rate."""
    assert task.has_demonstrations()
    started = time.monotonic()
    random = Random(options.seed)
    problems = task.problems("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True)
    arithmetic = ModelArithmetic(temperature=1.0)
    success = measure(model)
    step = 0
    while step < options.max_steps and success < options.target:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, step / 20)
        chosen = [problems[random.randrange(len(problems))] for _ in range(options.batch)]
        shown = [demonstration(task, p, tokenizer, random) for p in chosen]
        packed = pack_batch(shown, micro_batch_tokens=1 << 20)
        answer = log_probs(model, packed.micro_batches[0], arithmetic)
        optimizer.zero_grad(set_to_none=True)
        (-answer.log_prob.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % options.check_every == 0:
            success = measure(model)
    return WarmupResult(steps=step, success=success, seconds=time.monotonic() - started)


def save_text(path: Path, result: WarmupResult, task: str) -> None:
    """Say in the folder where the model came from."""
    path.write_text(
        f"Made by `async-rl init-model`: random weights, then {result.steps} supervised steps on demonstrations of "
        f"the task {task}; success rate on held-out problems {result.success:.2f}.\n"
    )


# -------------------- init model
# The small model of the quickstart: random weights, then a supervised warm-up on a task.


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of the model."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 384
    max_context: int = 256


def init_model(
    path: Path, task: Task, shape: Shape, options: WarmupOptions, say: Callable[[str], None]
) -> WarmupResult:
    """Make the folder `path`. It appears only when it is whole. Raises UserError."""
    if not task.has_demonstrations():
        raise UserError(f"task '{task.name}' has no demonstrations to warm up on; start from a model of your own")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; remove it or choose another folder")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        create_model_folder(
            partial,
            alphabet=task.alphabet,
            hidden=shape.hidden,
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            max_context=shape.max_context,
            seed=options.seed,
        )
        tokenizer = Tokenizer(partial)
        check_fit(task, tokenizer, shape.max_context)
        model = load_model(partial)
        assert isinstance(model, Decoder)
        size = sum(p.numel() for p in model.parameters())
        say(f"{path}: {size / 1e6:.2f} M parameters, {tokenizer.vocab_size} tokens; warming up on '{task.name}'")

        problems = min(MOST_PROBLEMS, len(task.problems("eval")))
        samples = max(2, -(-LEAST_EPISODES // max(1, problems)))

        def measure(current: Decoder) -> float:
            episodes = evaluate(
                current, task, tokenizer, problems=problems, samples=samples, temperature=1.0, seed=options.seed,
                choice="first",  # the task makes them up, so they are in no order
            )  # fmt: skip
            success = sum(t.reward for t in episodes) / len(episodes)
            say(f"  success rate {success:.2f}")
            return success

        result = warm_up(model, task, tokenizer, options, measure)
        save_folder(partial, model, source=partial)
        save_text(partial / "ORIGIN.txt", result, task.name)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result
