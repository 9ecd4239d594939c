"""The decoder against transformers, which is the definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support_models import llama_config, mistral_config, qwen2_config, qwen3_config, write_folder

from async_rl.model.architecture import Rope, tensor_shapes
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.model.folder import load_model

CONFIGS = {
    "qwen3": qwen3_config(),
    "qwen3 untied, attention bias": qwen3_config(tied=False, qkv_bias=True, output_bias=True),
    "llama3 scaling": llama_config(),
    "llama with biases": llama_config(qkv_bias=True, output_bias=True, mlp_bias=True, rope=Rope()),
    "llama linear scaling": llama_config(rope=Rope(kind="linear", factor=2.0), tied=True),
    "qwen2": qwen2_config(),
    "mistral": mistral_config(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    config = CONFIGS[name]
    folder = write_folder(tmp_path / "m", config, seed=3)
    ours = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    # Not the padding token, whose embedding transformers does not train.
    tokens = torch.randint(config.vocabulary - 1, (90,), generator=torch.Generator().manual_seed(0))
    hidden = ours(tokens, torch.arange(90), DocumentAttention([90]))
    found, expected = hidden @ ours.head.T, theirs(tokens[None]).logits[0]
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.detach().abs().max()), rtol=0)
    for logits in (found, expected):
        torch.log_softmax(logits, -1)[torch.arange(89), tokens[1:]].sum().backward()
    reference = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        wanted = reference[parameter_name].grad
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_listed_without_torch(name):
    model = Decoder(CONFIGS[name])
    found = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    assert found == tensor_shapes(CONFIGS[name])


def test_rotary_frequencies_survive_a_cast_to_bfloat16():
    model = Decoder(qwen3_config())
    positions = torch.arange(1000, 1010)
    exact = model.rotation(positions, torch.float32)
    after = model.to(torch.bfloat16).rotation(positions, torch.float32)
    assert torch.equal(exact[0], after[0])
    assert torch.equal(exact[1], after[1])


def test_initialisation_depends_on_the_seed_alone():
    first, second, other = (Decoder(qwen3_config()) for _ in range(3))
    first.initialise(1)
    second.initialise(1)
    other.initialise(2)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.head, other.head)
