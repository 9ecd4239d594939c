"""Weights of a model folder, written as they come: one file, or several with an index where they are large.

The layout is transformers' own: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with
`model.safetensors.index.json`, which says in which file each tensor is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_BYTES = 5 << 30
"""of one file; so much is held in memory while it is filled"""


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], most_bytes: int = MOST_BYTES) -> str:
    """Write them all; the dtype of the first, as config.json names it. Files appear under their names when all are
    whole. Raises OSError or SafetensorError."""
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
        # Cloned: safetensors refuses views of a joint buffer, which an engine's parameters are.
        held[name] = tensor.detach().cpu().contiguous().clone()
        dtype = dtype or str(tensor.dtype).removeprefix("torch.")
        held_bytes += size
        total += size
    flush()
    _rename(folder, written, total)
    return dtype


def _rename(folder: Path, written: list[tuple[Path, list[str]]], total: int) -> None:
    """The index last: it makes the folder one of several files."""
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
