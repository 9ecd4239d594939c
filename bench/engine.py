"""Tokens per second of the embedded engine, and of transformers' `generate` on the same model.

    python bench/engine.py [--repeats 5]

mixed: 64 requests with 16 prompt tokens and 8..128 new tokens each, all present at the start; 0.86 M
parameter Qwen3, vocabulary 512, float32, one thread, alternating in one process. transformers gets them
as one batch that runs until the longest has ended; only requested tokens count for it. `ratio` is the
median of paired repeats against sampling without log-probs; `ratio_with_log_probs` against the same
with the log-probs of the sampled tokens. The engine samples the same numbers of tokens, with log-probs.
episodes: 256 sessions at a time, 512 in all, five turns of 2..3 tokens with one appended token between
them, 0.43 M parameters: the shape of the quickstart. Counted: sampled tokens.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.model import Tokenizer, load_model
from async_rl.model.create import create_model_folder

NUM_REQUESTS, PROMPT_TOKENS, SHORTEST, LONGEST = 64, 16, 8, 128
SESSIONS, EPISODES, TURNS = 256, 512, 5


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=5)
    repeats = arguments.parse_args().repeats
    torch.set_num_threads(1)
    gc.freeze()  # as the generator process does: what imports left behind is not traversed again
    with tempfile.TemporaryDirectory() as folder:
        result = {"mixed": asyncio.run(mixed(Path(folder) / "mixed", repeats))}
        result["episodes"] = episodes(Path(folder) / "episodes", repeats)
    print(json.dumps(result | {"threads": 1, "torch": torch.__version__}, indent=2))


async def mixed(folder: Path, repeats: int) -> dict[str, Any]:
    alphabet = "".join(chr(0x4E00 + i) for i in range(510))  # with two special tokens: 512
    create_model_folder(folder, alphabet=alphabet, layers=4, seed=0)
    random = np.random.default_rng(0)
    prompts = random.integers(0, 510, (NUM_REQUESTS, PROMPT_TOKENS))
    lengths = random.permutation(np.linspace(SHORTEST, LONGEST, NUM_REQUESTS).astype(int))
    engine = EmbeddedEngine(load_model(folder), Tokenizer(folder), max_sequences=NUM_REQUESTS)
    requests = await whole_requests(engine, prompts, lengths)
    baseline = transformers_model(folder)
    ours, theirs, scored = [], [], []
    for _ in range(repeats + 1):
        seconds, done = await timed_engine(engine, requests)
        assert [len(completion.tokens) for completion in done] == lengths.tolist()
        ours.append(int(lengths.sum()) / seconds)
        theirs.append(int(lengths.sum()) / timed_generate(baseline, prompts, log_probs=False))
        scored.append(int(lengths.sum()) / timed_generate(baseline, prompts, log_probs=True))
    await engine.close()
    ours, theirs, scored = ours[1:], theirs[1:], scored[1:]  # the first is warm-up
    return {
        "tokens": int(lengths.sum()),
        "engine_tokens_per_second": round(statistics.median(ours)),
        "transformers_tokens_per_second": round(statistics.median(theirs)),
        "transformers_counting_padding": round(statistics.median(theirs) * NUM_REQUESTS * LONGEST / int(lengths.sum())),
        "transformers_with_log_probs_tokens_per_second": round(statistics.median(scored)),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2),
        "ratio_with_log_probs": round(statistics.median(a / b for a, b in zip(ours, scored, strict=True)), 2),
        "repeats": repeats,
    }


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
        _, done = await timed_engine(engine, tried)
        for i, request, completion in zip(missing, tried, done, strict=True):
            if len(completion.tokens) == lengths[i]:
                found[i] = request
        attempt += 1
    return [found[i] for i in range(len(lengths))]


async def timed_engine(engine: EmbeddedEngine, requests: list[Request]) -> tuple[float, list[Completion]]:
    begun = time.perf_counter()
    done = await asyncio.gather(*(engine.generate(request) for request in requests))
    seconds = time.perf_counter() - begun
    for request in requests:
        engine.release(request.session)
    return seconds, done


def transformers_model(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # nothing ends early
    return model


def timed_generate(model: Any, prompts: Any, *, log_probs: bool) -> float:
    ids = torch.from_numpy(prompts)
    begun = time.perf_counter()
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
    seconds = time.perf_counter() - begun
    assert out.sequences.shape[1] == PROMPT_TOKENS + LONGEST
    return seconds


def episodes(folder: Path, repeats: int) -> dict[str, Any]:
    create_model_folder(folder, alphabet="0123456789<>=?\n", layers=2, seed=0)
    rates, busy = [], []
    for _ in range(repeats + 1):
        engine = EmbeddedEngine(load_model(folder), Tokenizer(folder), max_sequences=SESSIONS)
        begun = time.perf_counter()
        asyncio.run(play(engine))
        seconds = time.perf_counter() - begun
        rates.append(engine.stats().tokens_generated / seconds)
        busy.append(engine.stats().busy_seconds / seconds)
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


if __name__ == "__main__":
    main()
