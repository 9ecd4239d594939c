"""What windows save: processor time, passes of the engine and waiting for a batch, whole episodes against pieces.

    python bench/windows.py [--model-width 384] [--batches 6]

A batch is 64 answers, all of which must be there before the next weights (max_staleness=0), of a random model whose
answers have lengths with a long tail. Behind each batch the engine loads weights, so that every cache is rebuilt, as in
a run with `generator.kv_on_update=recompute`: pieces pay for their beginnings.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec.structs import replace

from async_rl.buffer.sampler import StartChoice
from async_rl.buffer.starts import start_from
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.episodes import Episodes
from async_rl.model.create import create_model_folder
from async_rl.model.folder import load_model
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.protocol import Problem, Session, Split
from async_rl.trajectory import Trajectory
from async_rl.wire.messages import Permit

ANSWERS = 64
LONGEST = 480
"""tokens of an answer"""
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?+-*/=()[]{}<>"


class Speech:
    """One turn, as long as the model likes."""

    name = "speech"

    def problems(self, split: Split) -> Sequence[Problem]:
        return [Problem(index=0, prompt="abc")]

    async def rollout(self, problem: Problem, session: Session) -> float:
        return float(len(await session.generate(max_tokens=LONGEST)))


@dataclass
class Measured:
    batches: int = 0
    tokens: int = 0
    processor_s: float = 0.0
    passes: int = 0
    longest: int = 0
    """tokens of the longest trajectory of a batch, summed over the batches"""
    prefilled: int = 0
    over: int = 0

    def row(self, name: str) -> str:
        each = 1000 / self.tokens
        return (
            f"| {name} | {self.tokens / self.batches:.0f} | {self.longest / self.batches:.0f} | "
            f"{self.passes / self.batches:.0f} | {self.processor_s / self.batches:.2f} | "
            f"{self.processor_s * each:.2f} | {self.prefilled * each / 1000:.2f} | {self.over / self.batches:.0f} |"
        )


async def measure(model: Path, window: int, batches: int, skipped: int) -> Measured:
    torch.set_num_threads(1)
    tokenizer = Tokenizer(model)
    engine = EmbeddedEngine(load_model(model), tokenizer, max_sequences=ANSWERS)
    weights = {name: p.detach().clone() for name, p in engine._model.named_parameters()}
    arrived: list[Trajectory] = []
    episodes = Episodes(
        task=Speech(),  # type: ignore[arg-type]
        engine=engine,
        tokenizer=tokenizer,
        generator="g",
        max_turns=2,
        timeout_s=1e6,
        save_turns_after_s=1e6,
        on_finished=arrived.append,
        on_change=lambda: None,
        window=window,
    )
    step, passes = engine._step, 0

    def counted() -> None:
        nonlocal passes
        passes += 1
        step()

    engine._step = counted  # type: ignore[method-assign]
    going_on: deque[Permit] = deque()
    given: dict[int, Permit] = {}
    number, found = 0, Measured()
    for batch in range(batches + skipped):
        arrived.clear()
        begun, before, fed = time.process_time(), passes, engine.stats().tokens_prefilled
        for _ in range(ANSWERS):
            if going_on:
                permit = replace(going_on.popleft(), group=number)
            else:
                permit = Permit(group=number, problem=0, split="train", samples=(0,), seed=number, temperature=1.0)
            number += 1
            given[permit.group] = permit
            episodes.start(permit, (0,))
        while episodes.running:
            await asyncio.sleep(0)
        for piece in (t for t in arrived if t.ended == "window"):
            start = start_from(piece, StartChoice(source="window", share=1.0, group=piece.group, sample=0))
            going_on.append(replace(given[piece.group], start=start))
        if batch >= skipped:
            found.batches += 1
            found.tokens += sum(t.num_policy_tokens for t in arrived)
            found.longest += max(t.num_policy_tokens for t in arrived)
            found.processor_s += time.process_time() - begun
            found.passes += passes - before
            found.prefilled += engine.stats().tokens_prefilled - fed
            found.over += sum(t.ended != "window" for t in arrived)
        await engine.load(weights, engine.version + 1)
    await engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-width", type=int, default=384)
    parser.add_argument("--batches", type=int, default=6)
    arguments = parser.parse_args()
    width = arguments.model_width
    print(
        "| window | tokens a batch | longest | passes | processor s | s per 1000 tokens | prefilled a token | over |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "m"
        create_model_folder(
            model, alphabet=ALPHABET, hidden=width, layers=6, heads=width // 64, kv_heads=width // 64, head_dim=64,
            intermediate=4 * width, max_context=512, seed=1,
        )  # fmt: skip
        for window in (0, 240, 120, 60, 30):
            skipped = 0 if not window else -(-LONGEST // window) // 2
            found = asyncio.run(measure(model, window, arguments.batches, skipped))
            print(found.row(str(window or "whole")), flush=True)


if __name__ == "__main__":
    main()
