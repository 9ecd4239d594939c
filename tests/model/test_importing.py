"""Models from GGUF files, packages and folders, held against transformers' own reading of the same files."""

from __future__ import annotations

import json
import sys
import tracemalloc
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_models import llama_folder, qwen3_folder

from async_rl.errors import UserError
from async_rl.model import importing
from async_rl.model.attention import DocumentAttention
from async_rl.model.folder import check_folder, load_model, load_tensors
from async_rl.model.gguf_file import GGUFFile
from async_rl.model.importing import RECORD, find_source, import_model, our_name, rounded
from async_rl.model.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
HEAD_DIM = {"qwen3": 128}
"""others: 16; transformers takes a Qwen3 file's heads to be of 128 whatever the file says"""
WORDS = ["<|unk|>", *"abcdefghijklmnopqrstuvwxyz0123456789+=?", "Ġ", "ab", "<|start|>", "<|end|>", "<|endoftext|>"]


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


ROWS, WIDTH = 48, 512
"""whole blocks of every quantisation"""


def test_every_quantisation_that_gguf_knows_gives_the_numbers_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random bytes as blocks, read through our header and in parts, against gguf's own reader."""
    monkeypatch.setattr("async_rl.model.gguf_file.CHUNK_ELEMENTS", 5 * WIDTH)
    kinds = [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, *gguf.quants._type_traits]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("some.words", ["a", "bc", ""])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_bool("some.truth", True)
    for kind in kinds:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 60, (ROWS, WIDTH // block * size), dtype=np.uint8)  # no NaN among the scales
        values = data.view(np.float32) if kind == kinds[0] else data.view(np.float16) if kind == kinds[1] else data
        writer.add_tensor(kind.name, values, raw_dtype=None if kind in kinds[:2] else kind)
    writer.add_tensor("vector", random.standard_normal(WIDTH).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GGUFFile(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert ours.fields["some.truth"] is True
    assert ours.fields["general.architecture"] == "llama"
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    assert len(kinds) > 15
    for mine, its in zip(ours.tensors, theirs.tensors, strict=True):
        want = gguf.quants.dequantize(its.data, its.tensor_type)
        parts = list(ours.rows(mine))
        assert len(parts) == (10 if mine.shape[0] == ROWS else 1)
        assert np.array_equal(np.concatenate(parts), want), mine.name
        assert ours.kind(mine) == its.tensor_type.name
    multiples = [len(part) for part in ours.rows(ours.tensors[0], multiple=4)]
    assert multiples == [4] * 12


def test_numbers_are_rounded_to_bfloat16_as_torch_rounds_them() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    edges = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0, 0x80000000], np.uint32)
    values = np.concatenate((bits, edges)).view(np.float32)
    want = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    wrong = (rounded(values) != want) & ~np.isnan(values)
    assert not wrong.any()
    assert np.isnan(rounded(values).astype(np.uint32).__lshift__(16).view(np.float32)[np.isnan(values)]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_no_tensor_is_in_memory_whole(
    kind: str, dtype: importing.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is written at a time, and (from GGUF, whose numbers are numpy's) by what is allocated."""
    if kind == "gguf":
        monkeypatch.setitem(globals(), "INNER", 4096)
        source = write_gguf(tmp_path / "m.gguf", "llama", kind=gguf.GGMLQuantizationType.Q8_0)
    else:
        source = llama_folder(tmp_path / "source", hidden=64, intermediate=2048)
    elements = 4096
    for module in ("gguf_file", "importing"):
        monkeypatch.setattr(f"async_rl.model.{module}.CHUNK_ELEMENTS", elements)
    sizes: list[int] = []
    peak = 0

    def stream(folder: Path, plans: Any, parts: Any) -> None:
        nonlocal peak
        tracemalloc.start()
        write(folder, plans, {name: _counted(each, sizes) for name, each in parts.items()}, most_bytes=400_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    write = importing.stream_weights
    monkeypatch.setattr(importing, "stream_weights", stream)
    import_model(str(source), tmp_path / "made", dtype=dtype)
    made = load_tensors(tmp_path / "made")  # several files, with an index
    assert len(list((tmp_path / "made").glob("model-*-of-*.safetensors"))) > 1
    largest = max(prod(tensor.shape) for tensor in made.values())
    assert largest >= 16 * elements
    assert max(sizes) <= 4 * elements
    if kind == "gguf":
        assert peak < largest, "a quarter of the largest tensor in float32"
        monkeypatch.undo()
        import_model(str(source), tmp_path / "whole", dtype=dtype)
        whole = load_tensors(tmp_path / "whole")
    else:
        whole = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_tensors(source).items()}
    assert made.keys() == whole.keys()
    assert all(torch.equal(made[name], whole[name]) for name in made)


def _counted(parts: Any, sizes: list[int]) -> Any:
    for part in parts:
        sizes.append(memoryview(part).nbytes)
        yield part


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "m.gguf", "llama")
    rows, asked = GGUFFile.rows, 0

    def interrupted(*arguments: Any, **more: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 4:
            assert list(tmp_path.glob(".made*/model.safetensors"))
            raise KeyboardInterrupt
        return rows(*arguments, **more)

    monkeypatch.setattr(GGUFFile, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_model(str(source), tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    monkeypatch.undo()
    (tmp_path / ".made.partial").mkdir()  # of one that was killed
    (tmp_path / ".made.partial" / "rest").write_text("")
    import_model(str(source), tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "made"]
    assert not (tmp_path / "made" / "rest").exists()


def test_a_folder_that_was_imported_keeps_the_quantisation_it_came_from(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", "qwen3", kind=gguf.GGMLQuantizationType.Q8_0, add_key_length=128)
    first = import_model(str(source), tmp_path / "first")
    again = import_model(str(tmp_path / "first"), tmp_path / "again", dtype="bfloat16")
    assert again.quantisation == first.quantisation
    assert "Q8_0" in json.loads((tmp_path / "again" / RECORD).read_text())["quantisation"]


def test_a_package_is_found_by_the_name_pip_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shipping_package_2").mkdir()
    file = write_gguf(tmp_path / "shipping_package_2" / "m.gguf", "llama")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_source("shipping-package-2") == file


def test_a_name_on_a_hub_is_fetched_by_huggingface_hub_or_said_to_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = llama_folder(tmp_path / "fetched")
    asked: list[str] = []

    def fetch(name: str, **_: Any) -> str:
        asked.append(name)
        if name == "owner/gone":
            raise OSError("no route to the hub\nand more")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert import_model("owner/model", tmp_path / "made").source == "owner/model (fetched)"
    with pytest.raises(UserError, match=r"cannot be fetched \(no route to the hub\); name a file"):
        import_model("owner/gone", tmp_path / "other")
    assert asked == ["owner/model", "owner/gone"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="`pip install huggingface_hub` is needed"):
        import_model("owner/model", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("other_names", [False, True])
def test_the_language_model_of_gemma_3_with_images_is_taken_out(other_names: bool, tmp_path: Path) -> None:
    """Against the whole model's logits of a text; also in the names that transformers has for them itself."""
    import transformers
    from safetensors.torch import load_file, save_file
    from support_architectures import TWO_PARTS, write_architecture

    source = write_architecture(tmp_path / "source", "Gemma3Config", TWO_PARTS)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    if other_names:
        named = load_file(source / "model.safetensors")
        turned = {n.replace("language_model.model.", "model.language_model."): t for n, t in named.items()}
        assert turned.keys() != named.keys()
        save_file(turned, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"several parts .* `async-rl import-model .*/source DIR` takes its language"):
        check_folder(source)
    made = import_model(str(source), tmp_path / "made")
    assert made.family == "gemma3_text"
    tokens = torch.arange(3, 20)
    want = theirs(input_ids=tokens[None]).logits[0]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32).eval()
    torch.testing.assert_close(plain(tokens[None]).logits[0], want, rtol=0, atol=1e-5)
    ours = load_model(tmp_path / "made")
    found = ours(tokens, torch.arange(len(tokens)), DocumentAttention([len(tokens)])) @ ours.head.T
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)
    assert made.parameters == sum(p.numel() for p in ours.parameters())
