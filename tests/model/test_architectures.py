"""Every cell of the table in docs/architectures.md, on tiny random models, against transformers and autograd."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support_architectures as support
import torch
from support_architectures import REFUSED, ROWS, write_architecture, write_row
from support_run import quick_settings
from torch import Tensor

from async_rl.errors import UserError
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Request, SamplingParams
from async_rl.model import Tokenizer, load_model, save_folder
from async_rl.model.decoder import Decoder
from async_rl.model.folder import check_folder, check_for_vllm, context_limit
from async_rl.model.foreign import REFUSED as REFUSED_TYPES
from async_rl.model.lora import add_adapters
from async_rl.run.preflight import preflight
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Trajectory, Turn, VersionSpan

NATS = 2e-4
"""largest difference of a log-prob in float32; distributions are sharp, so logits reach 20"""
LENGTHS = (40, 7, 25, 47)
"""of documents; longer than windows, and up to the context before an extension"""
ROW = {row.name: row for row in ROWS}
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    transformers.logging.set_verbosity_error()
    root = tmp_path_factory.mktemp("architectures")
    return {row.name: write_row(root / str(number), row) for number, row in enumerate(ROWS)}


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def documents(vocabulary: int = 94) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=random) for length in LENGTHS]


def alone(model: Any, document: Tensor) -> Tensor:
    """transformers' log-probs of a document that is by itself, [tokens, vocabulary]."""
    found: Tensor = torch.log_softmax(model(document[None], use_cache=False).logits[0], -1)
    return found


def batch() -> PackedBatch:
    """Trajectories of which all but three tokens are sampled, in one micro-batch."""
    made = [
        Trajectory(
            group=0, sample=number, problem=0, split="train", seed=0, tokens=tokens.numpy().astype(np.int32),
            log_behaviour=np.zeros(len(tokens), np.float32), turns=(Turn(start=3, length=len(tokens) - 3),),
            versions=(VersionSpan(version=0, start=3, end=len(tokens)),), reward=float(number), ended="finished",
        )
        for number, tokens in enumerate(documents())
    ]  # fmt: skip
    return pack_batch(made, micro_batch_tokens=10_000)


@pytest.mark.parametrize("name", ROW)
def test_packed_documents_get_the_log_probs_and_gradients_that_transformers_gives_each_alone(
    name: str, folders: dict[str, Path]
) -> None:
    model, reference = load_model(folders[name]), theirs(folders[name])
    assert isinstance(model, Decoder) == ROW[name].built_in
    assert model.config.max_context == ROW[name].context
    assert context_limit(folders[name], check_folder(folders[name])) == ROW[name].context
    packed = batch()
    (micro,) = packed.micro_batches
    weight = torch.randn(packed.num_policy_tokens, generator=torch.Generator().manual_seed(4))
    found = log_probs(model, micro, ModelArithmetic(temperature=1.0)).log_prob
    (found * weight).sum().backward()
    lengths = iter(micro.lengths)
    tokens = micro.tokens.split(list(lengths))
    want = torch.cat([alone(reference, d)[torch.arange(2, len(d) - 1), d[3:]] for d in tokens])
    (want * weight).sum().backward()
    assert float((found - want).abs().max()) < NATS
    assert float(want.std()) > 0.5
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        wanted = gradients[parameter_name]
        assert parameter.grad is not None, parameter_name
        assert float((parameter.grad - wanted).abs().max()) <= 2e-4 * float(wanted.abs().max()) + 1e-6, parameter_name


@pytest.mark.parametrize("name", ROW)
def test_the_embedded_engine_samples_from_transformers_distribution(name: str, folders: dict[str, Path]) -> None:
    """Prompts on both sides of a window, decoded together; greedy tokens are transformers' likeliest."""
    model, reference = load_model(folders[name]), theirs(folders[name])
    engine = EmbeddedEngine(model, Tokenizer(folders[name]), max_sequences=3)  # two wait
    prompts = [d.tolist()[:n] for d, n in zip([*documents(), documents()[0]], (3, 7, 20, 2, 11), strict=True)]
    temperatures = [0.0, 1.0, 0.7, 1.0, 0.0]

    async def go() -> None:
        done = await asyncio.gather(
            *(
                engine.generate(
                    Request(
                        session=i, tokens=prompt, seed=i, params=SamplingParams(max_tokens=21, temperature=temperature)
                    )
                )
                for i, (prompt, temperature) in enumerate(zip(prompts, temperatures, strict=True))
            )
        )
        for prompt, temperature, completion in zip(prompts, temperatures, done, strict=True):
            whole = torch.tensor([*prompt, *completion.tokens])
            logits = reference(whole[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            want = torch.log_softmax(logits / (temperature or 1.0), -1)
            at = torch.tensor(completion.tokens)
            if temperature == 0:
                assert torch.equal(want.argmax(-1), at)
            want = want[torch.arange(len(at)), at]
            assert np.allclose(completion.log_probs, want.detach().numpy(), atol=NATS / (temperature or 1.0))
            probed = await engine.probe(whole.tolist())
            assert np.allclose(probed[len(prompt) - 1 :], _chosen(reference, whole, len(prompt)), atol=NATS)
        await engine.close()

    asyncio.run(go())


def _chosen(reference: Any, whole: Tensor, prompt: int) -> Any:
    every = alone(reference, whole)[prompt - 1 : -1]
    return every[torch.arange(len(every)), whole[prompt:]].detach().numpy()


@pytest.mark.parametrize("name", ROW)
def test_adapters_change_what_the_table_says_and_are_merged_into_what_transformers_loads(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Also that a checkpoint is loaded by plain transformers."""
    row, model = ROW[name], load_model(folders[name])
    torch.manual_seed(0)
    adapters = add_adapters(model, rank=2, alpha=4.0)
    with torch.no_grad():
        for tensor in adapters.tensors().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    frozen = [n for n, p in model.named_parameters() if p.ndim > 2 and not p.requires_grad]
    assert bool(frozen) == row.stacked == (row.lora == "attention only")
    (micro,) = batch().micro_batches
    found = log_probs(model, micro, ModelArithmetic(temperature=1.0)).log_prob
    save_folder(tmp_path / "saved", model, source=folders[name], weights=adapters.weights())
    for saved in (theirs(tmp_path / "saved"), load_model(tmp_path / "saved")):
        if isinstance(saved, Decoder) or hasattr(saved, "head"):
            want = log_probs(saved, micro, ModelArithmetic(temperature=1.0)).log_prob
        else:
            tokens = micro.tokens.split(list(micro.lengths))
            want = torch.cat([alone(saved, d)[torch.arange(2, len(d) - 1), d[3:]] for d in tokens])
        assert float((found - want).abs().max()) < NATS


@pytest.mark.parametrize("name", ROW)
def test_exact_norms_of_trajectories_equal_autograd_or_are_refused_before_anything_starts(
    name: str, folders: dict[str, Path]
) -> None:
    model, (micro,) = load_model(folders[name]), batch().micro_batches
    if ROW[name].exact == "refused":
        with pytest.raises(UserError, match=r"recipe\.opob\.norm=exact .* set recipe\.opob\.norm"):
            preflight(quick_settings(folders[name], "recipe=vcpo"))
        return
    arithmetic = ModelArithmetic(temperature=1.0)
    exact = TrajectoryGradient(model, arithmetic)
    weights = torch.randn(len(micro.targets), generator=torch.Generator().manual_seed(4))
    norms = exact.norms(micro, weights)
    exact.forget()
    found = log_probs(model, micro, arithmetic).log_prob * weights
    parameters = list(model.parameters())
    for norm, part in zip(norms, found.split(list(micro.policy_lengths)), strict=True):
        gradients = torch.autograd.grad(part.sum(), parameters, retain_graph=True)
        want = sum(float(g.double().square().sum()) for g in gradients)
        assert float(norm) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.vllm == "refused"])
def test_vllm_is_refused_before_anything_starts(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"mixture of experts .* generator\.engine=embedded"):
        check_for_vllm(folders[name])


@pytest.mark.parametrize("refused", REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_right_is_refused_from_config_json_and_would_be_by_the_proof(
    refused: tuple[str, str, dict[str, Any], str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config, changes, at_once, later = refused
    folder = write_architecture(tmp_path, config, changes)
    with pytest.raises(UserError, match=at_once) as said:
        check_folder(folder)
    assert "; " in str(said.value)
    assert "config.json" in str(said.value)
    for kind in list(REFUSED_TYPES):
        monkeypatch.delitem(REFUSED_TYPES, kind)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=later):
        load_model(folder)


def test_the_page_shows_this_table() -> None:
    assert support.table() in PAGE.read_text(), f"the table in {PAGE} should be\n\n{support.table()}"
