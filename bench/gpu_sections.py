"""The sections of bench/gpu.py that are measured in a process of their own, and what is read off a run."""

from __future__ import annotations

import asyncio
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gpu import Plan

    from async_rl.config import Settings
    from async_rl.trajectory import Trajectory

LOADS = 3
PROBE_TOKENS = 256
STEPS = 3


def make_model(plan: Plan) -> dict[str, Any]:
    """A folder with random weights; tokens are bytes, the vocabulary is as large as the real one's."""
    from gpu import SIZES, VOCABULARY

    from async_rl.model.architecture import DecoderConfig, parameters
    from async_rl.model.create import write_byte_tokenizer, write_random_weights

    write_byte_tokenizer(plan.model)
    config = DecoderConfig(
        family="qwen3", vocabulary=VOCABULARY.get(plan.size, 151_936), max_context=8192, qk_norm=True, tied=True,
        **SIZES[plan.size],
    )  # fmt: skip
    started = time.monotonic()
    write_random_weights(plan.model, config, seed=0)
    return {"parameters": parameters(config), "seconds to make it": round(time.monotonic() - started, 1)}


def measure_engine(plan: Plan) -> dict[str, Any]:
    """The engine alone on its share of the GPU."""
    from async_rl.generator.build import make_engine
    from async_rl.model.folder import load_model
    from async_rl.model.tokenizer import Tokenizer

    settings = settings_of(plan)

    async def measured() -> tuple[dict[str, Any], list[float]]:
        started = time.perf_counter()
        engine = make_engine(settings, Tokenizer(plan.model))
        found: dict[str, Any] = {"seconds to start": round(time.perf_counter() - started, 1)}
        try:
            await sample(engine, plan, session=0)  # kernels are compiled, graphs captured
            before, started = engine.stats().tokens_generated, time.perf_counter()
            await sample(engine, plan, session=10_000)
            seconds = time.perf_counter() - started
            found["tokens/s generated"] = round((engine.stats().tokens_generated - before) / seconds)
            found["sequences at once"] = plan.shape.sequences
            weights = {name: p.detach() for name, p in load_model(plan.model).named_parameters()}
            took = []
            for version in range(1, LOADS + 1):
                started = time.perf_counter()
                await engine.load(weights, version)
                await one_token(engine, version)
                took.append(time.perf_counter() - started)
            found["seconds of a weight update, to the first token"] = round(statistics.median(took), 3)
            return found, [float(value) for value in await engine.probe(PROBE)]
        finally:
            await engine.close()

    found, shown = asyncio.run(measured())
    found |= against_the_trainer(plan, shown)
    return found


def against_the_trainer(plan: Plan, shown: Sequence[float]) -> dict[str, float]:
    """How far log-probs of PROBE are from the trainer's."""
    from async_rl.model.folder import load_model
    from async_rl.trainer.forward import ModelArithmetic, probe_log_probs

    expected = probe_log_probs(load_model(plan.model, device=plan.device), PROBE, ModelArithmetic(temperature=1.0))
    apart = [abs(a - b) for a, b in zip(shown, expected, strict=True)]
    return {
        "log-probs against the trainer's (float32), mean": float(f"{statistics.fmean(apart):.3g}"),
        "the same, largest of 255": float(f"{max(apart):.3g}"),
    }


PROBE = tuple(int(i) for i in np.random.default_rng(0).integers(0, 256, PROBE_TOKENS))


async def sample(engine: Any, plan: Plan, session: int) -> None:
    """As many answers as are decoded at once, of full length."""
    from async_rl.generator.engine import Request, SamplingParams

    random = np.random.default_rng(session)
    params = SamplingParams(max_tokens=plan.shape.tokens)
    requests = [
        Request(session=session + i, tokens=random.integers(0, 256, 64).tolist(), params=params, seed=i)
        for i in range(plan.shape.sequences)
    ]
    await asyncio.gather(*(engine.generate(request) for request in requests))
    for request in requests:
        engine.release(request.session)


async def one_token(engine: Any, version: int) -> None:
    from async_rl.generator.engine import Request, SamplingParams

    session = 50_000 + version
    request = Request(session=session, tokens=list(PROBE[:16]), params=SamplingParams(max_tokens=1), seed=version)
    await engine.generate(request)
    engine.release(session)


def measure_trainer(plan: Plan) -> dict[str, Any]:
    """Training steps alone, on made-up answers of full length."""
    import torch

    from async_rl.run.memory import estimate
    from async_rl.trainer.build import make_learner
    from async_rl.trainer.packing import pack_step

    settings = settings_of(plan)
    torch.set_num_threads(max(1, settings.trainer.threads))
    learner = make_learner(settings)
    batch = [made_up(plan, i) for i in range(plan.shape.groups * plan.shape.group_size)]
    took = []
    for _ in range(STEPS):
        started = time.perf_counter()
        learner.step(pack_step(settings, batch))
        synchronise(plan)
        took.append(time.perf_counter() - started)
    tokens = sum(len(t.tokens) for t in batch)
    policy = sum(t.num_policy_tokens for t in batch)
    parts = [p for p in estimate(settings).parts if p.name.startswith("trainer") and "CUDA" not in p.name]
    said = sum(p.bytes for p in parts if p.device != "cpu" or plan.device == "cpu")
    return {
        "tokens/s trained": round(policy / min(took[1:])),
        "tokens/s with prompts": round(tokens / min(took[1:])),
        "seconds of a step": round(min(took[1:]), 3),
        "tokens of a step": tokens,
        "peak memory, GB": round(peak_bytes(plan, torch) / 2**30, 2),
        "peak memory by the estimate, GB": round(said / 2**30, 2),
    }


def made_up(plan: Plan, number: int) -> Trajectory:
    from async_rl.trajectory import Trajectory, Turn, VersionSpan

    prompt, length = 64, 64 + plan.shape.tokens
    random = np.random.default_rng(number)
    return Trajectory(
        group=number // plan.shape.group_size, sample=number % plan.shape.group_size, problem=0, split="train", seed=0,
        tokens=random.integers(0, 256, length).astype(np.int32), log_behaviour=np.full(length, -5.5, np.float32),
        turns=(Turn(start=prompt, length=length - prompt),),
        versions=(VersionSpan(version=0, start=prompt, end=length),), reward=float(number % 2), ended="finished",
    )  # fmt: skip


def synchronise(plan: Plan) -> None:
    if plan.device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_bytes(plan: Plan, torch: Any) -> int:
    if plan.device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def settings_of(plan: Plan) -> Settings:
    from async_rl.config import Settings, check
    from async_rl.config.schema import structured

    settings = structured(Settings, plan.settings(max_staleness=2), where="")
    check(settings)
    return settings


# ---------------------------------------------------------------------------------------------- a run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    from async_rl.run_folder import RunFolder, read_rows

    return list(read_rows(RunFolder(folder).metrics))


def summed_up(rows: Sequence[dict[str, Any]], skipped: int) -> dict[str, Any]:
    """Of the steps behind the first `skipped`, from the metric rows of a run."""
    first, counted = rows[skipped - 1], rows[skipped:]
    span = counted[-1]["time"] - first["time"]
    busy = counted[-1]["time/generator_busy"] - first["time/generator_busy"]

    def total(name: str) -> float:
        return sum(float(row[name]) for row in counted)

    def share(seconds: float) -> float:
        return round(seconds / span, 3)

    mismatch = [row["kl/mismatch"] for row in counted if "kl/mismatch" in row]
    canary = [row["canary/mean_difference"] for row in counted if "canary/mean_difference" in row]
    generated = counted[-1]["tokens/generated"] - first["tokens/generated"]
    return {
        "steps counted": len(counted),
        "seconds a step": round(span / len(counted), 3),
        "tokens/s generated": round(generated / span),
        "tokens/s trained": round(total("tokens/trained") / span),
        "share of time the trainer trains": share(total("time/step")),
        "share of time the trainer waits for data": share(total("time/wait_for_batch")),
        "share of time the generator decodes": share(busy),
        "share of time the generator waits": round(max(0.0, 1 - busy / span), 3),
        "seconds to publish weights": round(total("time/publish") / len(counted), 3),
        "staleness, mean": round(total("lag/mean") / len(counted), 2),
        "staleness, largest": int(max(row["lag/max"] for row in counted)),
        "canary: mean difference of log-probs": float(f"{max(canary):.3g}") if canary else "not measured",
        "kl/mismatch: engine against trainer at equal weights": (
            float(f"{statistics.fmean(mismatch):.3g}") if mismatch else "not measured"
        ),
    }


# ------------------------------------------------------------------------------------------- single parts


def measure_kernels(plan: Plan) -> dict[str, Any]:
    """The Triton kernels, compiled here, against their definition. Without a GPU their tests are skipped."""
    tests = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "test_kernels_on_a_gpu.py"
    words = ["-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "-n", "0", "-o", "addopts="]
    done = subprocess.run([sys.executable, *words, str(tests)], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        raise RuntimeError(" | ".join(line for line in said if line.startswith(("E ", "FAILED", "ERROR")))[-300:])
    return {"tests": said[-1]}


def measure_log_probs(plan: Plan) -> dict[str, Any]:
    import kernels_gpu

    return flat(kernels_gpu.logprob(3, where(plan), budget_s=0.8 * plan.limit_s))


def measure_opob(plan: Plan) -> dict[str, Any]:
    import kernels_gpu

    return flat(kernels_gpu.opob_step(3, where(plan), budget_s=0.7 * plan.limit_s))


def where(plan: Plan) -> Any:
    """The device and its sizes; small ones on a CPU."""
    from kernels_gpu import Where

    small = {
        "device": "cpu", "head": (20, 8, 50), "layer": (60, 8, 12), "segments": 5, "copied": 960, "square": 16,
        "layers": 1, "width": 128, "vocabulary": 50, "trajectories": 32, "answer": 6,
    }  # fmt: skip
    return Where() if plan.device == "cuda" else Where(**small)


def flat(found: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name} {what}".strip(): value
        for name, row in found.items()
        for what, value in (row.items() if isinstance(row, dict) else [("", row)])
    }


def measure_head(plan: Plan) -> dict[str, Any]:
    """As `measure_engine` does, for logits that vLLM rounds to bfloat16."""
    from dataclasses import replace

    from async_rl.generator.build import make_engine
    from async_rl.model.tokenizer import Tokenizer

    if plan.engine != "vllm":
        return {"logits": "float32 always: the embedded engine has no other"}
    settings = settings_of(plan)
    settings = replace(settings, vllm=replace(settings.vllm, head_dtype="model"))

    async def shown() -> list[float]:
        engine = make_engine(settings, Tokenizer(plan.model))
        try:
            return [float(value) for value in await engine.probe(PROBE)]
        finally:
            await engine.close()

    return against_the_trainer(plan, asyncio.run(shown()))


LAYERS_7B = 28
SHAPES_7B = ((3584, 3584), (512, 3584), (512, 3584), (3584, 3584), (18_944, 3584), (18_944, 3584), (3584, 18_944))
EMBEDDING_7B = (152_064, 3584)


def measure_publication(plan: Plan) -> dict[str, Any]:
    """Float32 weights on the device into the staging that links read. The layers are one layer's tensors again and
    again: the GPU need not hold 30 GB."""
    import torch

    from async_rl.weights.link import Staged

    cuda = plan.device == "cuda"
    layers = LAYERS_7B if cuda else 2
    layer = SHAPES_7B if cuda else tuple((rows // 64, columns // 64) for rows, columns in SHAPES_7B)
    embedding = EMBEDDING_7B if cuda else (512, 56)
    shapes = {f"layers.{i}.{j}": shape for i in range(layers) for j, shape in enumerate(layer)}
    shapes |= {"embedding": embedding, "head": embedding}
    held = {shape: torch.randn(shape, device=plan.device) for shape in set(shapes.values())}
    started = time.perf_counter()
    staged = Staged(shapes, torch.bfloat16, plan.device, in_main_memory=True)
    found: dict[str, Any] = {"seconds to make the staging": round(time.perf_counter() - started, 2)}
    took = []
    for version in range(LOADS):
        synchronise(plan)
        started = time.perf_counter()
        staged.write(((name, held[shape]) for name, shape in shapes.items()), version, 60.0)
        took.append(time.perf_counter() - started)
    size = sum(tensor.nbytes for _, tensor in staged.named_parameters())
    found["GB, bfloat16"] = round(size / 1e9, 2)
    found["seconds of a publication"] = round(min(took), 3)
    found["GB/s"] = round(size / 1e9 / min(took), 1)
    plain = torch.zeros(embedding, dtype=torch.bfloat16)
    started = time.perf_counter()
    plain.copy_(held[embedding])
    seconds = time.perf_counter() - started
    found["seconds as torch copies by itself, from the largest tensor"] = round(seconds * size / plain.nbytes, 3)
    return found


SECTIONS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "model": make_model,
    "kernels": measure_kernels,
    "engine": measure_engine,
    "trainer": measure_trainer,
    "logprob": measure_log_probs,
    "head": measure_head,
    "publication": measure_publication,
    "opob": measure_opob,
}
