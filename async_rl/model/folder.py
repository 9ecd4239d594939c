"""A model folder on disk: config.json, safetensors, tokenizer. Checking one does not import torch.

The layout of the weights is transformers' own: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on
with `model.safetensors.index.json`, which names the file of each tensor.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from async_rl.errors import UserError
from async_rl.model.architecture import FAMILIES, DecoderConfig, parse_config, rope_settings, tensor_shapes
from async_rl.model.foreign import check_foreign, check_vllm, foreign_context, ties_head
from async_rl.model.tokenizer import MORE_TEMPLATES, Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from async_rl.model.decoder import Decoder
    from async_rl.model.huggingface import HuggingFaceDecoder

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""ends of the names by which architectures call head and embedding"""
MOST_BYTES = 5 << 30
"""largest weights file; so much is held in memory while one is filled"""
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", INDEX)
"""endings of files that `save_folder` does not copy: weights"""


def read_config(path: str | Path) -> DecoderConfig | None:
    """The decoder that a folder holds; None when transformers defines its architecture."""
    folder = existing(path)
    values = read_json(folder / CONFIG)
    if values.get("model_type") not in FAMILIES:
        return None
    return parse_config(values, where=str(folder / CONFIG))


def check_folder(path: str | Path) -> DecoderConfig | None:
    """Check all that can be checked without torch. Returns `read_config(path)`.

    Raises UserError, with the file and the remedy, for a missing folder, config, weights or tokenizer; an unsupported
    architecture; missing, unexpected or misshapen tensors; a head that is tied in config.json and another one in the
    weights; and a tokenizer with tokens that the model has no embedding for.
    """
    folder = existing(path)
    config = read_config(folder)
    headers = read_headers(folder)
    tokenizer = Tokenizer(folder)
    check_tied_head(folder, headers)
    if config is not None:
        check_tensors(headers, config, folder)
        vocabulary = config.vocabulary
    else:
        values = read_json(folder / CONFIG)
        if not isinstance(values.get("model_type"), str):
            raise UserError(f"{folder / CONFIG} names no model_type; this is not a Hugging Face model folder")
        check_foreign(values, str(folder / CONFIG))
        if importlib.util.find_spec("transformers") is None:
            raise UserError(
                f"{folder / CONFIG}: model_type {values.get('model_type')!r} needs transformers; "
                "pip install 'transformers>=5.16.1'"
            )
        vocabulary = int((values.get("text_config") or values).get("vocab_size") or tokenizer.vocab_size)
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocabulary}; "
            "use the tokenizer the model was trained with"
        )
    return config


def context_limit(path: str | Path, config: DecoderConfig | None) -> int:
    """Most tokens of a sequence of the model in a folder; 0 where only transformers could say. `config`: as from
    `read_config`."""
    return config.max_context if config is not None else foreign_context(read_json(existing(path) / CONFIG))


def check_context(path: str | Path, config: DecoderConfig | None, asked: int) -> int:
    """Most tokens of a sequence of a run: `asked`, or the model's own limit where that is 0; 0: not known. Raises
    UserError for more than the model holds."""
    limit = context_limit(path, config)
    if not limit or asked <= limit:
        return asked or limit
    kinds = [given["rope_type"] for given in rope_settings(read_json(existing(path) / CONFIG))]
    why = ", beyond which its rope type longrope takes other frequencies" if "longrope" in kinds else ""
    raise UserError(
        f"generator.max_context is {asked}, but the model of {path} holds {limit} tokens{why}; set it to {limit} or "
        "lower"
    )


def check_for_vllm(path: str | Path) -> None:
    """Raise UserError where vLLM would compute another model than the trainer, or cannot take its weights."""
    folder = existing(path)
    check_vllm(read_json(folder / CONFIG), read_headers(folder), str(folder / CONFIG))


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Decoder | HuggingFaceDecoder:
    """The model of a folder in `dtype` (default float32) on `device`. Raises UserError as `check_folder` does."""
    import torch

    dtype = dtype or torch.float32
    folder = existing(path)
    config = check_folder(folder)
    if config is None:
        from async_rl.model.huggingface import HuggingFaceDecoder

        return HuggingFaceDecoder.load(folder, dtype=dtype, device=device)
    from async_rl.model.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(config)
    wanted = tensor_shapes(config)
    tensors = {name: t for name, t in load_tensors(folder, device).items() if name in wanted}
    model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def load_tensors(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, by name, in its stored dtype."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in weight_files(existing(path)):
        tensors |= load_file(file, device=str(device))
    return tensors


def save_folder(
    path: str | Path,
    model: Decoder | HuggingFaceDecoder,
    *,
    source: str | Path,
    weights: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write `model` as a folder that transformers loads.

    config.json, tokenizer and the other small files are copied from `source`, the folder that the model came from. The
    weights are renamed into place last, so a folder with weights is complete. `weights` (name, tensor), one after
    another, take the place of the model's parameters.
    """
    folder, origin = Path(path), existing(source)
    folder.mkdir(parents=True, exist_ok=True)
    if origin.resolve() != folder.resolve():
        for file in origin.iterdir():
            if file.is_file() and not file.name.endswith(NOT_COPIED):
                shutil.copyfile(file, folder / file.name)
        if (origin / MORE_TEMPLATES).is_dir():
            shutil.copytree(origin / MORE_TEMPLATES, folder / MORE_TEMPLATES, dirs_exist_ok=True)
    from async_rl.model.decoder import Decoder

    if not isinstance(model, Decoder):  # its stored names may differ from its parameters' names
        model.save(folder, None if weights is None else {name: tensor.detach().cpu() for name, tensor in weights})
        return
    dtype = write_weights(folder, model.named_parameters() if weights is None else weights)
    values = read_json(folder / CONFIG)
    values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], most_bytes: int = MOST_BYTES) -> str:
    """Write all tensors into files of at most `most_bytes`; returns the dtype of the first as config.json names it.
    The files get their names when all are complete. Raises OSError or SafetensorError."""
    from safetensors.torch import save_file

    written: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    total = held_bytes = 0
    dtype = ""

    def flush() -> None:
        path = folder / f".{WEIGHTS}.{len(written)}.partial"
        save_file(held, path, metadata={"format": "pt"})
        written.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > most_bytes:
            flush()
            held_bytes = 0
        # cloned because safetensors refuses views of a joint buffer, which an engine's parameters are
        held[name] = tensor.detach().cpu().contiguous().clone()
        dtype = dtype or str(tensor.dtype).removeprefix("torch.")
        held_bytes += size
        total += size
    flush()
    _rename(folder, written, total)
    return dtype


def _rename(folder: Path, written: list[tuple[Path, list[str]]], total: int) -> None:
    """Give the files their names. The index is written last: with it the folder has several files."""
    if len(written) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        os.replace(written[0][0], folder / WEIGHTS)
        return
    where: dict[str, str] = {}
    for number, (path, names) in enumerate(written, start=1):
        final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        os.replace(path, folder / final)
        where |= dict.fromkeys(names, final)
    (folder / WEIGHTS).unlink(missing_ok=True)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_headers(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, read from the headers of the safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        for name, entry in safetensors_header(file).items():
            shapes[name] = tuple(entry["shape"])
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The single weights file, or the files that the index lists. Raises UserError when one is missing."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        files = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
    else:
        files = [folder / WEIGHTS]
    for file in files:
        if not file.is_file():
            hint = ""
            if any(folder.glob("*.bin")):
                hint = "; only pickled weights (.bin) lie there: convert them to safetensors"
            raise UserError(f"{folder}: no weights, {file.name} is missing{hint}")
    if not files:
        raise UserError(f"{folder / INDEX} lists no weights")
    return files


def safetensors_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises UserError for a truncated or foreign file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise UserError(f"{file} is not a whole safetensors file; copy or download it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise UserError(f"{file} is not a safetensors file; copy or download it again") from None
    try:
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        shapes = [tuple(entry["shape"]) for entry in header.values()]
    except (AttributeError, TypeError, KeyError, IndexError):
        raise UserError(f"{file} is not a safetensors file; copy or download it again") from None
    assert len(shapes) == len(header)
    if 8 + length + end != size:
        raise UserError(f"{file} is truncated: {size} bytes instead of {8 + length + end}; copy it again")
    return header


def check_tensors(found: dict[str, tuple[int, ...]], config: DecoderConfig, folder: Path) -> None:
    """Raise UserError unless the tensors are those of `config`."""
    wanted = tensor_shapes(config)
    # A tied head is often stored twice; old files also hold the rotary frequencies.
    extra = sorted(
        name
        for name in set(found) - set(wanted)
        if not name.endswith("rotary_emb.inv_freq") and not (name == "lm_head.weight" and config.tied)
    )
    missing = sorted(set(wanted) - set(found))
    if missing or extra:
        parts = [
            f"{len(names)} {kind}, e.g. {names[0]}"
            for kind, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(parts)}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(f"{folder}: {name} has shape {list(found[name])}, config.json says {list(shape)}")


def check_tied_head(folder: Path, headers: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError when config.json ties the head to the embedding and the weights hold another head: which of the
    two is used would differ from program to program, and the stored one would be lost."""
    tied = ties_head(read_json(folder / CONFIG))
    heads, embeddings = ([name for name in headers if name.endswith(ends)] for ends in (HEADS, EMBEDDINGS))
    if tied and len(heads) == len(embeddings) == 1 and not _same_numbers(folder, heads[0], embeddings[0]):
        raise UserError(
            f"{folder}: config.json ties the head to the embedding (tie_word_embeddings is true, or left to its "
            f"default), but the weights hold another {heads[0]}; set tie_word_embeddings to false in config.json to "
            f"use it, or take it out of the weights to use {embeddings[0]} in its place"
        )


def _same_numbers(folder: Path, one: str, two: str) -> bool:
    """Whether two tensors of the folder are equal. Reads them without torch unless their dtypes differ."""
    found: list[tuple[Path, int, dict[str, Any]]] = []
    for name in (one, two):
        for file in weight_files(folder):
            entry = safetensors_header(file).get(name)
            if entry is not None:
                found.append((file, 8 + _header_bytes(file), entry))
    (_, _, first), (_, _, second) = found
    if first["shape"] != second["shape"]:
        return False
    if first["dtype"] == second["dtype"]:
        parts = (
            np.memmap(file, np.uint8, "r", offset + entry["data_offsets"][0], (_num_bytes(entry),))
            for file, offset, entry in found
        )
        left, right = parts
        chunk = 1 << 24
        return all(np.array_equal(left[i : i + chunk], right[i : i + chunk]) for i in range(0, len(left), chunk))
    with TensorFiles(folder) as files:
        rows = range(0, first["shape"][0], 1024)
        return all(bool((files.rows(one, i, i + 1024) == files.rows(two, i, i + 1024)).all()) for i in rows)


def _num_bytes(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end) - int(begin)


def _header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return int(struct.unpack("<Q", stream.read(8))[0])


def existing(path: str | Path) -> Path:
    """`path` as a folder. Raises UserError when there is none or it has no config.json."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"model folder {folder} does not exist; put a Hugging Face model there (hf download NAME --local-dir "
            f"{folder}), or set model.path; `run --fake-model` needs none, and `async-rl init-model` makes a small one "
            "for a task that has demonstrations (guess, calculator, ...)"
        )
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG}; this is not a Hugging Face model folder")
    return folder


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} does not hold a JSON object")
    return values


class TensorFiles:
    """Parts of the tensors of a model folder, read where they are needed. The files are mapped, not read whole.

    Example: `with TensorFiles(folder) as files: files.rows("model.norm.weight", 0, 8)`.
    """

    def __init__(self, path: str | Path) -> None:
        self._paths = weight_files(existing(path))
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}

    def __enter__(self) -> TensorFiles:
        for path in self._paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._file_of |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start <= row < stop of a tensor [stop - start, ...], in its stored dtype on the CPU. Raises KeyError."""
        part: Tensor = self._file_of[name].get_slice(name)[start:stop]
        return part
