"""Tokens per second of the embedded engine, of transformers' `generate`, and of the matrix products alone.

    python bench/engine.py [--repeats 5] [--only mixed groups episodes products]

All of it float32 on one thread, sides alternating in one process. Rates are tokens per second of processor time,
because others may use the machine; `wall_` is the same ratio by the clock.

mixed: 64 requests with 16 prompt tokens and 8..128 new tokens each, all present at the start; 0.86 M parameter Qwen3,
vocabulary 512. transformers gets them as one batch that runs until the longest has ended; only requested tokens count
for it. `ratio` is the median of paired repeats against sampling without log-probs; `ratio_with_log_probs` against the
same with the log-probs of the sampled tokens. The engine samples the same numbers of tokens, with log-probs.
groups: the same with 8 groups of 8 requests that share a prompt of 64 tokens; `unshared` is the engine with 64
different prompts of that length.
episodes: 256 sessions at a time, 512 in all, five turns of 2..3 tokens with one appended token between them, 0.43 M
parameters: the shape of the quickstart. Counted: sampled tokens.
products: SmolLM2's shape (134.5 M parameters, random weights), 4 groups of 8 behind prompts of 45 tokens. A decode step
against its matrix products alone, by torch's own F.linear on separate matrices, and as the engine forms them.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import asyncio
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Request, SamplingParams
from async_rl.model import Tokenizer, load_model
from async_rl.model.architecture import DecoderConfig, Rope
from async_rl.model.create import create_model_folder
from async_rl.model.decoder import Decoder
from async_rl.model.fused_decoder import FusedDecoder

NUM_REQUESTS, PROMPT_TOKENS, SHORTEST, LONGEST = 64, 16, 8, 128
GROUP, GROUP_PROMPT_TOKENS = 8, 64
ROWS, FEW_TOKENS, MANY_TOKENS = 32, 2, 12
SMOLLM2 = DecoderConfig(
    family="llama",
    hidden=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocabulary=49152,
    max_context=128,
    norm_eps=1e-5,
    rope=Rope(theta=100_000.0),
    tied=True,
)
SESSIONS, EPISODES, TURNS = 256, 512, 5


CASES = ("mixed", "groups", "episodes", "products")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # as the generator process does: what imports left behind is not traversed again
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        alphabet = "".join(chr(0x4E00 + i) for i in range(510))  # with two special tokens: 512
        create_model_folder(folder, alphabet=alphabet, layers=4, seed=0)
        if "mixed" in chosen.only:
            result["mixed"] = asyncio.run(against_generate(folder, chosen.repeats, groups=False))
        if "groups" in chosen.only:
            result["groups"] = asyncio.run(against_generate(folder, chosen.repeats, groups=True))
        if "episodes" in chosen.only:
            result["episodes"] = episodes(Path(name) / "episodes", chosen.repeats)
        if "products" in chosen.only:
            result["products"] = asyncio.run(against_products(Tokenizer(folder), chosen.repeats))
    print(json.dumps(result | {"threads": 1, "torch": torch.__version__}, indent=2))


async def against_generate(folder: Path, repeats: int, *, groups: bool) -> dict[str, Any]:
    random = np.random.default_rng(0)
    length = GROUP_PROMPT_TOKENS if groups else PROMPT_TOKENS
    different = random.integers(0, 510, (NUM_REQUESTS, length))
    prompts = np.repeat(different[: NUM_REQUESTS // GROUP], GROUP, 0) if groups else different
    lengths = random.permutation(np.linspace(SHORTEST, LONGEST, NUM_REQUESTS).astype(int))
    engine = EmbeddedEngine(load_model(folder), Tokenizer(folder), max_sequences=NUM_REQUESTS)
    requests = await whole_requests(engine, prompts, lengths)
    sides = {
        "engine": lambda: timed_engine(engine, requests),
        "generate": lambda: timed_generate(baseline, prompts, log_probs=False),
        "scored": lambda: timed_generate(baseline, prompts, log_probs=True),
    }
    if groups:
        unshared = await whole_requests(engine, different, lengths)
        sides["unshared"] = lambda: timed_engine(engine, unshared)
    baseline = transformers_model(folder)
    took: dict[str, list[Times]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            took[name].append(await side())
    await engine.close()
    tokens = int(lengths.sum())

    def rate(name: str) -> int:
        return round(tokens / statistics.median(one.processor for one in took[name][1:]))

    def ratio(name: str, clock: str = "processor") -> float:
        pairs = zip(took[name][1:], took["engine"][1:], strict=True)  # the first is warm-up
        return round(statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in pairs), 2)

    return {
        "tokens": tokens,
        "engine_tokens_per_second": rate("engine"),
        "transformers_tokens_per_second": rate("generate"),
        "transformers_counting_padding": round(rate("generate") * NUM_REQUESTS * LONGEST / tokens),
        "transformers_with_log_probs_tokens_per_second": rate("scored"),
        "ratio": ratio("generate"),
        "wall_ratio": ratio("generate", "wall"),
        "ratio_with_log_probs": ratio("scored"),
        **({"ratio_to_unshared": ratio("unshared")} if groups else {}),
        "repeats": repeats,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds that something took."""

    wall: float
    processor: float


class Stopwatch:
    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def times(self) -> Times:
        return Times(wall=time.perf_counter() - self._wall, processor=time.process_time() - self._processor)


async def whole_requests(engine: EmbeddedEngine, prompts: Any, lengths: Any) -> list[Request]:
    """Requests with seeds under which the random model does not sample end-of-text too early."""
    found: dict[int, Request] = {}
    attempt = 0
    while len(found) < len(lengths):
        missing = [i for i in range(len(lengths)) if i not in found]
        tried = [
            Request(
                session=i,
                tokens=prompts[i].tolist(),
                params=SamplingParams(max_tokens=int(lengths[i])),
                seed=1000 * attempt + i,
            )
            for i in missing
        ]
        done = await asyncio.gather(*(engine.generate(request) for request in tried))
        for request in tried:
            engine.release(request.session)
        for i, request, completion in zip(missing, tried, done, strict=True):
            if len(completion.tokens) == lengths[i]:
                found[i] = request
        attempt += 1
    return [found[i] for i in range(len(lengths))]


async def timed_engine(engine: EmbeddedEngine, requests: list[Request]) -> Times:
    watch = Stopwatch()
    done = await asyncio.gather(*(engine.generate(request) for request in requests))
    times = watch.times()
    assert [len(completion.tokens) for completion in done] == [request.params.max_tokens for request in requests]
    for request in requests:
        engine.release(request.session)
    return times


def transformers_model(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # nothing ends early
    return model


async def timed_generate(model: Any, prompts: Any, *, log_probs: bool) -> Times:
    ids = torch.from_numpy(prompts)
    watch = Stopwatch()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LONGEST,
            do_sample=True,
            top_k=0,
            pad_token_id=511,
            return_dict_in_generate=True,
            output_scores=log_probs,
        )
        if log_probs:
            model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    times = watch.times()
    assert out.sequences.shape[1] == prompts.shape[1] + LONGEST
    return times


def episodes(folder: Path, repeats: int) -> dict[str, Any]:
    create_model_folder(folder, alphabet="0123456789<>=?\n", layers=2, seed=0)
    rates, busy = [], []
    for _ in range(repeats + 1):
        engine = EmbeddedEngine(load_model(folder), Tokenizer(folder), max_sequences=SESSIONS)
        watch = Stopwatch()
        asyncio.run(play(engine))
        times = watch.times()
        rates.append(engine.stats().tokens_generated / times.processor)
        busy.append(engine.stats().busy_seconds / times.wall)
    return {
        "engine_tokens_per_second": round(statistics.median(rates[1:])),
        "share_in_model_steps": round(statistics.median(busy[1:]), 3),
    }


async def play(engine: EmbeddedEngine) -> None:
    places = asyncio.Semaphore(SESSIONS)

    async def episode(session: int) -> None:
        async with places:
            history = [14]
            for turn in range(TURNS):
                params = SamplingParams(max_tokens=2 + (session + turn) % 2)
                done = await engine.generate(Request(session=session, tokens=history, params=params, seed=session))
                history = [*history, *done.tokens, 10 + turn % 3]
            engine.release(session)

    await asyncio.gather(*(episode(session) for session in range(EPISODES)))
    await engine.close()


async def against_products(tokenizer: Tokenizer, repeats: int) -> dict[str, Any]:
    model = Decoder(SMOLLM2)
    model.initialise(0)
    plain = [parameter.detach().clone() for name, parameter in model.named_parameters() if "proj" in name]
    engine = EmbeddedEngine(model, tokenizer, max_sequences=ROWS)
    fused = engine._forward
    assert isinstance(fused, FusedDecoder)
    joint = [part for layer in fused._layers for part in (layer._qkv, layer._out, layer._gate_up, layer._down)]
    inputs = {size: torch.randn(ROWS, size) for size in {weight.shape[1] for weight in plain}}
    widths = [plain[0].shape[1], plain[3].shape[1], plain[4].shape[1], plain[6].shape[1]] * SMOLLM2.layers
    random = np.random.default_rng(0)

    def requests(tokens: int) -> list[Request]:
        prompts = random.integers(0, 49_000, (ROWS // GROUP, 45)).tolist()
        return [
            Request(
                session=i,
                tokens=prompts[i // GROUP],
                params=SamplingParams(max_tokens=tokens),
                seed=i,
            )
            for i in range(ROWS)
        ]

    def torchs() -> None:
        for weight in plain:
            F.linear(inputs[weight.shape[1]], weight)
        F.linear(inputs[SMOLLM2.hidden], model.head)

    def engines() -> None:
        for part, width in zip(joint, widths, strict=True):
            part(inputs[width])
        F.linear(inputs[SMOLLM2.hidden], model.head)

    steps, own, formed = [], [], []
    for _ in range(repeats + 1):
        few = await timed_engine(engine, requests(FEW_TOKENS))
        many = await timed_engine(engine, requests(MANY_TOKENS))
        steps.append((many.processor - few.processor) / (MANY_TOKENS - FEW_TOKENS))
        with torch.inference_mode():
            for products, times in ((torchs, own), (engines, formed)):
                watch = Stopwatch()
                for _ in range(4):
                    products()
                times.append(watch.times().processor / 4)
    await engine.close()
    operations = 2 * ROWS * (sum(weight.numel() for weight in plain) + model.head.numel())
    step, torchs_own, engines_own = (statistics.median(times[1:]) for times in (steps, own, formed))
    return {
        "step_ms": round(1e3 * step, 1),
        "gflop_a_step": round(operations / 1e9, 2),
        "torch_products_ms": round(1e3 * torchs_own, 1),
        "torch_products_gflops": round(operations / torchs_own / 1e9, 1),
        "engine_products_ms": round(1e3 * engines_own, 1),
        "engine_products_gflops": round(operations / engines_own / 1e9, 1),
        "rate_of_torch_products": round(statistics.median(a / b for a, b in zip(own[1:], steps[1:], strict=True)), 2),
        "rate_of_engine_products": round(
            statistics.median(a / b for a, b in zip(formed[1:], steps[1:], strict=True)), 2
        ),
        "repeats": repeats,
    }


if __name__ == "__main__":
    main()
