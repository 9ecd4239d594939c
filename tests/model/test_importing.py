"""Models from GGUF files, packages and folders, held against transformers' own reading of the same files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support_models import llama_folder, qwen3_folder

from async_rl.errors import UserError
from async_rl.model.folder import load_tensors
from async_rl.model.importing import RECORD, find_source, import_model, our_name
from async_rl.model.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
HEAD_DIM = {"qwen3": 128}
"""others: 16; transformers takes a Qwen3 file's heads to be of 128 whatever the file says"""
WORDS = ["<|unk|>", *"abcdefghijklmnopqrstuvwxyz0123456789+=?", "Ġ", "ab", "<|start|>", "<|end|>"]


def write_gguf(path: Path, architecture: str, *, kind: Any = None, tied: bool = False, **fields: Any) -> Path:
    """A random model of `architecture` with a byte-level tokenizer; matrices stored as `kind`."""
    kind = gguf.GGMLQuantizationType.F32 if kind is None else kind
    writer = gguf.GGUFWriter(path, architecture)
    head = HEAD_DIM.get(architecture, 16)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture.startswith("qwen") else "smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in WORDS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(WORDS.index("<|start|>"))
    writer.add_eos_token_id(WORDS.index("<|end|>"))
    writer.add_pad_token_id(WORDS.index("<|end|>"))
    writer.add_unk_token_id(0)
    for key, value in fields.items():
        getattr(writer, key)(value)
    random = torch.Generator().manual_seed(7)

    def add(name: str, *shape: int, stored: Any = None) -> None:
        values = torch.randn(shape, generator=random).numpy()
        stored = gguf.GGMLQuantizationType.F32 if stored is None else stored
        if stored == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)

    add("token_embd.weight", len(WORDS), HIDDEN, stored=kind)
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HEADS * head, HIDDEN), ("attn_k", KV_HEADS * head, HIDDEN), ("attn_v", KV_HEADS * head, HIDDEN),
            ("attn_output", HIDDEN, HEADS * head), ("ffn_gate", INNER, HIDDEN), ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", rows, columns, stored=kind)
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.{name}.bias", rows)
        if architecture == "qwen3":
            add(f"blk.{layer}.attn_q_norm.weight", head)
            add(f"blk.{layer}.attn_k_norm.weight", head)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(WORDS), HIDDEN, stored=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_a_gguf_file_gives_the_tensors_and_logits_that_transformers_gives(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    head = HEAD_DIM.get(architecture)
    more = {} if head is None else {"add_key_length": head, "add_value_length": head}
    file = write_gguf(
        tmp_path / "m.gguf", architecture, kind=gguf.GGMLQuantizationType[kind], tied=architecture == "qwen2", **more
    )
    made = import_model(str(file), tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert type(ours) is type(theirs)
    want = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    tokens = torch.arange(20)[None] % len(WORDS)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)
    assert made.family == architecture
    assert ("" if kind == "F32" else kind) in made.quantisation
    assert made.parameters == sum(t.numel() for n, t in load_tensors(tmp_path / "folder").items())
    assert json.loads((tmp_path / "folder" / RECORD).read_text())["quantisation"] == made.quantisation
    tokenizer = Tokenizer(tmp_path / "folder")
    assert tokenizer.eos_id == WORDS.index("<|end|>")
    assert tokenizer.decode(tokenizer.encode("abc+1=")) == "abc+1="
    assert WORDS.index("ab") in tokenizer.encode("abc")


def test_the_layout_of_rope_is_turned_for_llama_alone() -> None:
    """By the definition: our row i of a head is GGUF's row 2 i, our row head_dim / 2 + i is its row 2 i + 1."""
    import numpy as np

    from async_rl.model.importing import halves_together

    rows = np.arange(2 * 8)[:, None] * np.ones((1, 3))
    assert halves_together(rows, 2)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


def test_a_name_within_a_layer_and_outside() -> None:
    assert our_name("blk.11.attn_q.weight") == "model.layers.11.self_attn.q_proj.weight"
    assert our_name("output.weight") == "lm_head.weight"


def test_a_package_that_ships_a_model_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shipping_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a package is not run to be looked into')")
    file = write_gguf(package / "m.gguf", "llama")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shipping_package", raising=False)
    assert find_source("shipping_package") == file


def test_a_hugging_face_folder_is_copied_in_the_asked_dtype(tmp_path: Path) -> None:
    source = qwen3_folder(tmp_path / "source")
    made = import_model(str(source), tmp_path / "bf16", dtype="bfloat16")
    assert made.quantisation.startswith("float32 x ")
    before, after = load_tensors(source), load_tensors(tmp_path / "bf16")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, before[name].bfloat16())
    assert Tokenizer(tmp_path / "bf16").encode("abc") == Tokenizer(source).encode("abc")


def test_what_cannot_be_read_is_refused_with_a_remedy_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    extended = write_gguf(tmp_path / "long.gguf", "llama", add_rope_scaling_type=gguf.RopeScalingType.YARN)
    foreign = write_gguf(tmp_path / "foreign.gguf", "gemma2")
    for source, says in (
        ("no_such_package", "is no file, no folder and no installed package"),
        (str(tmp_path / "text.txt"), "is not a .gguf file"),
        (str(tmp_path), "name the file"),
        (str(tmp_path / "broken.gguf"), "fetch it again"),
        (str(extended), "has a context extension"),
        (str(foreign), "architecture 'gemma2'"),
    ):
        with pytest.raises(UserError, match=says):
            import_model(source, target)
        assert not target.exists()
        assert not list(tmp_path.glob(".made*"))
    full = llama_folder(tmp_path / "full")
    with pytest.raises(UserError, match="exists and is not empty"):
        import_model(str(full), full)
