"""Architectures that only transformers knows, under our attention."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from async_rl.errors import UserError
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Request, SamplingParams
from async_rl.model import Tokenizer, load_model, save_folder
from async_rl.model.attention import DocumentAttention
from async_rl.model.create import write_character_tokenizer
from async_rl.model.huggingface import HuggingFaceDecoder
from async_rl.model.prefix_tree import make_tree
from async_rl.model.tree_attention import TreeAttention

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def foreign_folder(path: Path, kind: str, **changes: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    write_character_tokenizer(path, "0123456789abcdef")
    return path


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("GPTNeoXConfig", {}),
        ("GraniteConfig", {"num_key_value_heads": 2, "attention_multiplier": 0.5, "logits_scaling": 2.0}),
        ("Starcoder2Config", {"sliding_window": 6}),
    ],
)
def test_packed_logits_equal_transformers_one_by_one(tmp_path: Path, kind, changes):
    from transformers import AutoModelForCausalLM

    folder = foreign_folder(tmp_path, kind, **changes)
    ours = load_model(folder)
    assert isinstance(ours, HuggingFaceDecoder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    documents = [torch.arange(3, 12), torch.arange(20, 5, -1)]
    positions = torch.cat([torch.arange(9), torch.arange(15)])
    packed = ours(torch.cat(documents), positions, DocumentAttention([9, 15])) @ ours.head.T
    # eager: what transformers defines; its other functions differ by rounding
    theirs.set_attn_implementation("eager")
    alone = torch.cat([theirs(document[None]).logits[0] for document in documents])
    assert torch.allclose(packed, alone, atol=1e-5)
    packed.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}


@pytest.mark.parametrize(("kind", "changes"), [("GPTNeoXConfig", {}), ("Starcoder2Config", {"sliding_window": 6})])
def test_documents_that_begin_alike_share_rows(tmp_path: Path, kind, changes):
    """Logits and gradients of transformers' own layers, with a window shorter than the common beginning, too."""
    from transformers import AutoModelForCausalLM

    folder = foreign_folder(tmp_path, kind, **changes)
    ours = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    head = np.arange(3, 14, dtype=np.int32)
    documents = [np.append(head, rest).astype(np.int32) for rest in ([1, 2, 3], [4], [1, 5, 2, 2])]
    tree = make_tree(documents)
    assert tree.num_rows == 11 + 3 + 1 + 4
    tokens = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    one, rows = torch.from_numpy(tree.token_of_row), torch.from_numpy(tree.row_of_token)
    hidden = ours(tokens[one], positions[one], TreeAttention(tree), rows)
    alone = torch.cat([theirs(torch.from_numpy(document)[None].long()).logits[0] for document in documents])
    torch.testing.assert_close(hidden @ ours.head.T, alone, rtol=0, atol=1e-5)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    ((hidden @ ours.head.T) * weights).sum().backward()
    (alone * weights).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-4)


def test_the_embedded_engine_decodes_a_foreign_model(tmp_path: Path):
    folder = foreign_folder(tmp_path, "GPTNeoXConfig")
    model, clean = load_model(folder), load_model(folder)
    engine = EmbeddedEngine(model, Tokenizer(folder), max_sequences=4)

    async def go() -> None:
        histories = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
        params = SamplingParams(max_tokens=9)
        done = await asyncio.gather(
            *(
                engine.generate(Request(session=i, tokens=history, params=params, seed=i))
                for i, history in enumerate(histories)
            )
        )
        await engine.load({name: p.detach() for name, p in clean.named_parameters()}, 1)
        for history, completion in zip(histories, done, strict=True):
            tokens = [*history, *completion.tokens]
            expected = (await engine.probe(tokens))[len(history) - 1 :]
            assert np.allclose(completion.log_probs, expected, atol=1e-5)
        await engine.close()

    asyncio.run(go())


def test_a_foreign_folder_is_saved_as_transformers_saves_it(tmp_path: Path):
    folder = foreign_folder(tmp_path / "source", "GPTNeoXConfig")
    model = load_model(folder)
    save_folder(tmp_path / "saved", model, source=folder)
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("BloomConfig", {}, "positions are added to scores"),
        ("PhiConfig", {}, "its head has a bias"),
    ],
)
def test_what_the_attention_has_no_word_for_is_refused(tmp_path: Path, kind, changes, message):
    with pytest.raises(UserError, match=message):
        load_model(foreign_folder(tmp_path, kind, **changes))
