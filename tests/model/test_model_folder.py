"""Model folders: what loads, what is written, what is refused and how."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support_models import llama_folder, make_decoder, qwen3_config, qwen3_folder

from async_rl.errors import UserError
from async_rl.model.create import create_model_folder, write_character_tokenizer
from async_rl.model.folder import (
    check_folder,
    load_model,
    load_tensors,
    read_config,
    save_folder,
    weight_files,
    write_weights,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return qwen3_folder(tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def edit_weights(folder: Path, **changes: Any) -> None:
    """Replace tensors; None removes one."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_checking_a_folder_does_not_import_torch(folder: Path):
    program = (
        "import sys; import async_rl.model.folder as f; f.check_folder(sys.argv[1]); "
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)


def test_a_saved_folder_loads_here_and_in_transformers(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = llama_folder(tmp_path / "source", seed=5)
    model = load_model(source)
    save_folder(tmp_path / "saved", model, source=source)
    again = load_model(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    reference = dict(theirs.named_parameters())
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, reference[name])
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("12 a").input_ids == [1, 2, 36, 10]


def test_what_transformers_saves_loads_here(tmp_path: Path):
    import transformers

    sizes = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    rope = {"rope_type": "llama3", "rope_theta": 99.0, "factor": 2.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(**sizes, **heads, rope_parameters=rope, max_position_embeddings=128)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_character_tokenizer(tmp_path, "abc")
    read = check_folder(tmp_path)
    assert read is not None
    assert (read.rope.theta, read.rope.kind, read.rope.original_context) == (99.0, "llama3", 64)
    assert load_model(tmp_path).config == read


def test_sharded_weights_load(folder: Path):
    whole = dict(load_model(folder).named_parameters())
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in files.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    for name, parameter in load_model(folder).named_parameters():
        assert torch.equal(parameter, whole[name])
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors is missing"):
        check_folder(folder)


def test_a_tied_head_stored_twice_is_accepted(folder: Path):
    embedding = load_tensors(folder)["model.embed_tokens.weight"]
    for head in (embedding.clone(), embedding.double()):
        edit_weights(folder, **{"lm_head.weight": head})
        model = load_model(folder)
        assert model.head is model.model.embed_tokens.weight


def last_changed(embedding: torch.Tensor) -> torch.Tensor:
    head = embedding.clone()
    head[-1, -1] += 1
    return head


@pytest.mark.parametrize(
    "other",
    [torch.zeros_like, last_changed, lambda e: e.half(), lambda e: e[:-1].clone(), lambda e: last_changed(e.double())],
)
def test_a_stored_head_that_is_not_the_embedding_is_never_replaced_by_it(folder: Path, tmp_path: Path, other: Any):
    from transformers import AutoModelForCausalLM

    head = other(load_tensors(folder)["model.embed_tokens.weight"])
    edit_weights(folder, **{"lm_head.weight": head})
    for read in (check_folder, load_model):
        with pytest.raises(UserError, match=r"weights hold another lm_head\.weight; set tie_word_embeddings to false"):
            read(folder)
    if head.shape != (49, 32):
        return
    edit_config(folder, tie_word_embeddings=False)  # the remedy
    model = load_model(folder)
    assert torch.equal(model.head, head.float())
    save_folder(tmp_path / "saved", model, source=folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for found in (load_model(tmp_path / "saved").head, theirs.get_output_embeddings().weight):
        assert torch.equal(found, model.head)


def test_a_head_in_another_file_is_compared_too(folder: Path):
    tensors = load_tensors(folder)
    for name, members in (("a.safetensors", tensors), ("b.safetensors", {"lm_head.weight": torch.ones(49, 32)})):
        save_file(members, folder / name)
    where = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match="another lm_head"):
        check_folder(folder)


@pytest.mark.parametrize("kind", ["GPT2", "Gemma2", "Cohere", "Phi3"])
@pytest.mark.parametrize("silent", [False, True], ids=["said", "by default"])
def test_a_head_of_a_model_that_transformers_defines_is_used_or_refused(
    kind: str, silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By the word of config.json, or by the architecture's default where it has none; never replaced."""
    import transformers

    folder = qwen3_folder(tmp_path / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    word = {} if silent else {"tie_word_embeddings": True}
    config = getattr(transformers, f"{kind}Config")(vocab_size=62, pad_token_id=0, **sizes, **word)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    tied = config.tie_word_embeddings
    if silent:
        values.pop("tie_word_embeddings", None)
        (folder / "config.json").write_text(json.dumps(values))
    check_folder(folder)
    head = torch.randn(62, 32)
    edit_weights(folder, **{"lm_head.weight": head})
    if not tied:
        assert torch.equal(load_model(folder).head, head)
        return
    with pytest.raises(UserError, match="another lm_head"):
        check_folder(folder)
    # as for an architecture whose default is not known here
    monkeypatch.setattr("async_rl.model.folder.check_tied_head", lambda *_: None)
    with pytest.raises(UserError, match="weights hold another head"):
        load_model(folder)


def test_weights_are_converted_to_the_dtype_asked_for(folder: Path, tmp_path: Path):
    model = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())
    save_folder(tmp_path / "half", model, source=folder)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_missing_folder_config_weights_or_tokenizer_is_named(tmp_path: Path, folder: Path):
    with pytest.raises(UserError, match="does not exist"):
        check_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        check_folder(tmp_path / "empty")
    (folder / "model.safetensors").rename(folder / "kept")
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        check_folder(folder)
    (folder / "kept").rename(folder / "model.safetensors")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        check_folder(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path):
    write_character_tokenizer(folder, "".join(chr(0x4E00 + i) for i in range(60)))
    with pytest.raises(UserError, match="is token 60, and the model has embeddings for 49 tokens only"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window is false"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "it has chunked_attention"),
        ({"layer_types": ["full_attention"]}, "each of 2 layers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope type 'ntk'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "needs short_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor has 1 numbers"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_key_value_heads": 3}, "do not share"),
        ({"hidden_size": "big"}, "hidden_size"),
    ],
)
def test_what_the_decoder_cannot_honour_is_refused(folder: Path, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        check_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"1 missing, e\.g\. model\.norm\.weight"),
        ({"model.extra": torch.zeros(2)}, r"1 unexpected, e\.g\. model\.extra"),
        ({"model.norm.weight": torch.ones(31)}, r"shape \[31\], config\.json says \[32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, changes, message):
    edit_weights(folder, **changes)
    with pytest.raises(UserError, match=message):
        check_folder(folder)


def test_damaged_files_are_refused(folder: Path):
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:-7], whole[:20], b"", b"\x10\0\0\0\0\0\0\0" + b"x" * 16):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors is"):
            check_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        read_config(folder)


def test_a_created_folder_loads_and_does_not_overwrite(tmp_path: Path):
    config = create_model_folder(tmp_path / "new", alphabet="0123", layers=1, hidden=32, seed=4)
    assert check_folder(tmp_path / "new") == config
    assert (config.vocabulary, config.family, config.tied) == (6, "qwen3", True)
    with pytest.raises(UserError, match="exists"):
        create_model_folder(tmp_path / "new", alphabet="0123")
    with pytest.raises(UserError, match="multiple of kv_heads"):
        create_model_folder(tmp_path / "odd", alphabet="0123", heads=3, kv_heads=2)


def test_saving_does_not_touch_other_files_of_the_source(folder: Path):
    before = {file.name for file in folder.iterdir()}
    save_folder(folder, make_decoder(qwen3_config(), 9), source=folder)
    assert {file.name for file in folder.iterdir()} == before


def test_large_weights_are_written_in_several_files_that_are_read_as_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = make_decoder(qwen3_config(), 9)
    tensors = sorted((name, p.detach()) for name, p in model.named_parameters())
    source.mkdir()
    assert write_weights(source, tensors, most_bytes=20_000) == "float32"
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].startswith("model-00001-of-")
    (source / "config.json").write_text("{}")
    read = load_tensors(source)
    assert read.keys() == {name for name, _ in tensors}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors)
    write_weights(source, tensors)
    assert [path.name for path in weight_files(source)] == ["model.safetensors"]
