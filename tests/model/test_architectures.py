"""Every cell of the table in docs/architectures.md, on tiny random models, against transformers and autograd."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support_architectures as support
import support_ranks
import torch
from msgspec import structs
from safetensors.torch import load_file
from support_architectures import REFUSED, ROWS, Refusal, batch, documents, write_architecture, write_row
from support_run import quick_settings
from torch import Tensor

from async_rl.errors import UserError
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Request, SamplingParams
from async_rl.model import Tokenizer, load_model, save_folder
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.model.folder import check_folder, check_for_vllm, context_limit
from async_rl.model.foreign import REFUSED as REFUSED_TYPES
from async_rl.model.foreign import check_vllm
from async_rl.model.lora import add_adapters
from async_rl.run.preflight import preflight
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import pack_batch
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Turn

NATS = 2e-4
"""largest difference of a log-prob in float32; distributions are sharp, so logits reach 20"""
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


def alone(model: Any, document: Tensor) -> Tensor:
    """transformers' log-probs of a document that is by itself, [tokens, vocabulary]."""
    found: Tensor = torch.log_softmax(model(document[None], use_cache=False).logits[0], -1)
    return found


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
    assert float((found - want).detach().abs().max()) < NATS
    assert float(want.detach().std()) > 0.5
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        wanted = gradients[parameter_name]
        assert parameter.grad is not None, parameter_name
        assert float((parameter.grad - wanted).abs().max()) <= 2e-4 * float(wanted.abs().max()) + 1e-6, parameter_name


def test_a_turn_at_a_temperature_of_its_own_has_its_capped_logits_divided_by_it(folders: dict[str, Path]) -> None:
    (document,) = documents()[:1]
    turns = (Turn(start=3, length=10), Turn(start=20, length=20, temperature=0.5))
    trajectory = structs.replace(support.episode(0, document), turns=turns, temperature=0.8)
    (micro,) = pack_batch([trajectory], micro_batch_tokens=10_000).micro_batches
    model = load_model(folders["Gemma 2"])
    found = log_probs(model, micro, ModelArithmetic(temperature=0.8)).log_prob
    logits = theirs(folders["Gemma 2"])(document[None], use_cache=False).logits[0]
    assert float(logits.detach().abs().max()) < support.CAPPED["final_logit_softcapping"]
    want = [
        torch.log_softmax(logits[at - 1] / temperature, -1)[document[at]]
        for turn, temperature in zip(turns, (0.8, 0.5), strict=True)
        for at in range(turn.start, turn.start + turn.length)
    ]
    assert float((found - torch.stack(want)).detach().abs().max()) < NATS


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
        assert float((found - want).detach().abs().max()) < NATS


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


@pytest.mark.xdist_group("vllm")
def test_vllm_computes_the_trainers_log_probs_before_and_after_an_update(tmp_path: Path) -> None:
    """The rows that say yes, in a process of their own; `by hand` were run so once."""
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
    names = [row.name for row in ROWS if row.vllm == "yes"]
    program = Path(__file__).parents[1] / "support_vllm_architectures.py"
    ran = subprocess.run(
        [sys.executable, program, *names], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=True
    )
    said = dict(line.split(": ", 1) for line in ran.stdout.splitlines() if line.partition(": ")[0] in names)
    assert said.keys() == set(names)
    for name, found in said.items():
        before, after, missing = (float(number) for number in found.split()[:3])
        assert before < NATS, name
        assert after < NATS, name
        assert missing == 0, name


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.vllm == "refused"])
def test_vllm_is_refused_before_anything_starts(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"(mixture of experts|in some layers only) .* generator\.engine=embedded"):
        check_for_vllm(folders[name])


@pytest.mark.parametrize("refused", REFUSED, ids=[row.name for row in REFUSED])
def test_what_cannot_be_right_is_refused_from_config_json_and_would_be_by_the_proof(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_architecture(tmp_path, refused.config, refused.changes)
    with pytest.raises(UserError, match=refused.at_once) as said:
        check_folder(folder)
    assert "; " in str(said.value)
    assert "config.json" in str(said.value)
    for kind in list(REFUSED_TYPES):
        monkeypatch.delitem(REFUSED_TYPES, kind)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=refused.later):
        load_model(folder)


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.stacked])
def test_what_adapters_leave_out_of_experts_is_said_at_the_start_and_at_the_end(
    name: str, folders: dict[str, Path]
) -> None:
    words = ("recipe=grpo", "lora.rank=2")
    sizes = {n: p.numel() for n, p in load_model(folders[name]).named_parameters()}
    inside = sum(size for n, size in sizes.items() if "experts" in n)
    said = f"the experts, {inside:,} of {sum(sizes.values()):,} parameters"
    facts = preflight(quick_settings(folders[name], *words))
    assert [said in note for note in facts.notes].count(True) == 1
    assert said in facts.not_adapted
    assert not preflight(quick_settings(folders["Gemma 2"], *words)).not_adapted
    stored = {"Qwen3-MoE": "gate_proj", "Mixtral": "w1"}[name]
    with pytest.raises(UserError, match=rf"lora\.targets: '{stored}' is in the experts alone, .* name others \(k_proj"):
        preflight(quick_settings(folders[name], *words, f"lora.targets=[{stored}]"))
    preflight(quick_settings(folders[name], *words, "lora.targets=[q_proj]"))


@pytest.mark.parametrize("name", ["Phi-3 128k, Phi-4 mini (rope `longrope`)", "Llama, rope `longrope`"])
def test_a_run_stays_within_the_context_in_which_packing_changes_nothing(name: str, folders: dict[str, Path]) -> None:
    preflight(quick_settings(folders[name], "recipe=grpo", f"generator.max_context={support.ORIGINAL}"))
    with pytest.raises(
        UserError, match=f"max_context is {support.ORIGINAL + 1}, but the model of .* holds 48 tokens, .* longrope"
    ):
        preflight(quick_settings(folders[name], "recipe=grpo", f"generator.max_context={support.ORIGINAL + 1}"))
    model = load_model(folders[name])
    if not isinstance(model, Decoder):
        positions = torch.arange(support.ORIGINAL + 1)
        with pytest.raises(ValueError, match="ends at 48"):
            model(positions, positions, DocumentAttention([len(positions)]))


@pytest.mark.parametrize(
    ("rope", "match"),
    [
        (support.LONGROPE | {"attention_factor": 1.1}, "longrope.* attention_factor"),
        (support.DYNAMIC | {"alpha": 1000.0}, "dynamic.* alpha"),
    ],
)
def test_rope_settings_that_vllm_reads_otherwise_are_refused_with_it(rope: dict[str, Any], match: str) -> None:
    check_vllm({"model_type": "llama", "rope_parameters": support.LONGROPE}, (), "config.json")
    with pytest.raises(UserError, match=match):
        check_vllm({"model_type": "llama", "rope_scaling": rope}, (), "config.json")


@pytest.fixture(scope="module")
def sharded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks found that hold half of every model each."""
    out = tmp_path_factory.mktemp("sharded")
    (out / "folders.json").write_text(json.dumps({name: str(folder) for name, folder in folders.items()}))
    support_ranks.start(str(Path(__file__).parents[1] / "support_architecture_ranks.py"), out, 2)
    return out


@pytest.mark.parametrize("name", ROW)
def test_two_ranks_that_hold_half_a_model_each_compute_what_one_does(
    name: str, sharded: Path, folders: dict[str, Path]
) -> None:
    model, (micro,) = load_model(folders[name]), batch().micro_batches
    want = log_probs(model, micro, ModelArithmetic(temperature=1.0)).log_prob
    want.sum().backward()
    found = load_file(sharded / f"{list(ROW).index(name)}.safetensors")
    assert float((found.pop("log_prob") - want).detach().abs().max()) < NATS
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = found.pop(parameter_name) / 2 - parameter.grad  # both ranks had the same batch
        assert float(difference.abs().max()) <= 2e-4 * float(parameter.grad.abs().max()) + 1e-6, parameter_name
    assert not found


def test_the_page_shows_these_tables() -> None:
    for table in (support.table(), support.refusals()):
        assert table in PAGE.read_text(), f"a table in {PAGE} should be\n\n{table}"
