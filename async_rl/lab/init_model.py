"""The small model of the quickstart: random weights, then a supervised warm-up on a task."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from async_rl.errors import UserError
from async_rl.lab.evaluate import evaluate
from async_rl.launch.preflight import check_fit
from async_rl.model.create import create_model_folder
from async_rl.model.decoder import Decoder
from async_rl.model.folder import load_model, save_folder
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import Task
from async_rl.trainer.warmup import WarmupOptions, WarmupResult, save_text, warm_up


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
    if not hasattr(task, "demonstration"):
        raise UserError(f"task '{task.name}' has no demonstrations to warm up on; start from a model of your own")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; remove it or choose another folder")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        create_model_folder(
            partial,
            alphabet=task.alphabet,  # type: ignore[attr-defined]
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

        def measure(current: Decoder) -> float:
            episodes = evaluate(current, task, tokenizer, problems=128, samples=2, temperature=1.0, seed=options.seed)
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
