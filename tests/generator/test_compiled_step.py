"""A decoding step in one compiled function, and its sampling, against torch's operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_engine import run
from support_models import llama_config, make_decoder, mistral_config, qwen2_config, qwen3_config, write_folder

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Request, SamplingParams
from async_rl.generator.further_steps import FurtherSteps
from async_rl.generator.sampling import sample
from async_rl.generator.scheduler import Scheduler
from async_rl.model.fused_decoder import FusedDecoder
from async_rl.model.tokenizer import Tokenizer
from async_rl_kernels import native, product

pytestmark = pytest.mark.skipif(
    native.library() is None or native.gemm() is None, reason="no C compiler, or torch shows no products"
)
WIDE: dict[str, Any] = {"head_dim": 16, "hidden": 64}
CONFIGS = {
    "qwen3": qwen3_config(**WIDE),
    "llama": llama_config(**WIDE),
    "with a window": mistral_config(**WIDE, windows=(9, 0)),
}


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "PREFERS_MKL", True)


def asked() -> list[Request]:
    """Two prompts in groups, of unequal lengths."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 40, n).tolist() for n in (5, 5, 5, 40, 40, 3)]
    prompts[1] = prompts[2] = prompts[0]
    prompts[4] = prompts[3]
    return [
        Request(session=i, tokens=p, params=SamplingParams(max_tokens=20 + i, temperature=1.0 - i / 10), seed=i)
        for i, p in enumerate(prompts)
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_tokens_and_log_probs(
    name: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, answered, further, arranged = CONFIGS[name], [], [], 0
    next_step = Scheduler.next_step

    def counted(self: Scheduler) -> Any:
        nonlocal arranged
        arranged += 1
        return next_step(self)

    tokenizer = Tokenizer(write_folder(tmp_path / "m", config))
    compiled = FusedDecoder.logits

    def watched(self: FusedDecoder, step: Any) -> torch.Tensor | None:
        answered.append(compiled(self, step))
        return answered[-1]

    take = FurtherSteps.take

    def taken(self: FurtherSteps, *arguments: Any) -> Any:
        if (found := take(self, *arguments)) is not None:
            further.append(found.steps)
        return found

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        monkeypatch.setattr(FurtherSteps, "take", taken)
        monkeypatch.setattr(FusedDecoder, "logits", watched)
        monkeypatch.setattr(Scheduler, "next_step", counted)
        found = run(EmbeddedEngine(make_decoder(config), tokenizer), asked())
        monkeypatch.setattr(Scheduler, "next_step", next_step)
        monkeypatch.setattr(native, "usable", lambda *_: False)
        monkeypatch.setattr(FusedDecoder, "logits", lambda *_: None)
        expected = run(EmbeddedEngine(make_decoder(config), tokenizer), asked())
    finally:
        torch.set_num_threads(before)
    assert arranged == len(answered)
    assert max(further) > 1  # some steps follow from those before
    assert len(answered) + sum(further) > 20
    assert all(logits is not None for logits in answered)
    for one, other in zip(found, expected, strict=True):
        assert list(one.tokens) == list(other.tokens)
        assert np.allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_biases_and_other_processors_are_left_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(write_folder(tmp_path / "m", qwen2_config(**WIDE)))
    seen = []
    compiled = FusedDecoder.logits
    monkeypatch.setattr(FusedDecoder, "logits", lambda self, step: seen.append(compiled(self, step)))
    assert all(len(one.tokens) for one in run(EmbeddedEngine(make_decoder(qwen2_config(**WIDE)), tokenizer), asked()))
    monkeypatch.setattr(product, "PREFERS_MKL", False)
    assert all(len(one.tokens) for one in run(EmbeddedEngine(make_decoder(CONFIGS["qwen3"]), tokenizer), asked()))
    assert seen
    assert all(logits is None for logits in seen)


def test_a_draw_is_the_definition() -> None:
    """Also where a token cannot be drawn, where all are equally likely, and at the edges of the uniform."""
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(400, 37, generator=draw)
    logits[0:40, 5:] = -torch.inf
    logits[40:80] = 1.0
    logits[80:120, 3] = 300.0
    temperature = np.linspace(0.3, 2.0, 400).astype(np.float32)
    temperature[::7], temperature[1::7] = 0.0, 1.0
    uniform = torch.rand(400, generator=draw, dtype=torch.float64).numpy()
    uniform[::5], uniform[1::5] = 0.0, np.nextafter(1.0, 0.0)
    tokens, log_probs = sample(logits.clone(), temperature, uniform)
    heat = torch.from_numpy(np.where(temperature == 0, 1, temperature)).double()[:, None]
    exact = torch.log_softmax(logits.double() / heat, -1)
    cumulative = exact.exp().cumsum(-1)
    at = torch.from_numpy(uniform)[:, None] * cumulative[:, -1:]
    right = torch.searchsorted(cumulative, at, right=True).squeeze(1)
    right = torch.where(torch.from_numpy(temperature) == 0, logits.argmax(-1), right)
    row = torch.arange(400)
    assert torch.isfinite(exact[row, tokens]).all()
    near = (torch.from_numpy(uniform) * cumulative[:, -1] - cumulative[row, right.clamp_max(36)]).abs() < 1e-6
    assert ((tokens == right) | near | (torch.from_numpy(uniform) > 0.999)).all()
    torch.testing.assert_close(log_probs.double(), exact[row, tokens], rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_have_no_log_prob(value: float) -> None:
    logits = torch.zeros(3, 20)
    logits[1] = value
    logits[2, 4] = value
    _, log_probs = sample(logits, np.ones(3, np.float32), np.full(3, 0.5))
    assert torch.isfinite(log_probs).tolist() == [True, False, value == -torch.inf]
