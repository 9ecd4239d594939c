"""The weights of a model folder, written into tensors where these lie.

Mapping the files would keep all of their pages in memory beside the tensors until the last of them was copied. Here a
file is read some rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_rl.model.folder import safetensors_header, weight_files
from async_rl.weights.shared_memory import overwrite

if TYPE_CHECKING:
    from torch import Tensor

STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""dtypes in safetensors files that can be read, by torch's names"""
BUFFER_BYTES = 4 << 20


def can_read(folder: Path) -> bool:
    """Whether every tensor has a dtype of `STORED`."""
    return all(entry["dtype"] in STORED for file in weight_files(folder) for entry in safetensors_header(file).values())


def read_weights(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Overwrite `targets`, whatever their dtypes and strides, with the tensors of these names; others in the folder are
    passed over. Raises KeyError for a target that is not there, UserError for files that are not whole."""
    import torch

    missing = set(targets)
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
    for file in weight_files(folder):
        header = safetensors_header(file)
        with file.open("rb", buffering=0) as stream, torch.no_grad():
            first = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in header.items():
                if name in targets:
                    missing.discard(name)
                    stream.seek(first + entry["data_offsets"][0])
                    buffer = _read(stream, entry, targets[name], buffer)
    if missing:
        raise KeyError(sorted(missing)[0])


def _read(stream: Any, entry: Mapping[str, Any], target: Tensor, buffer: Tensor) -> Tensor:
    """Fill one tensor from where the stream stands. Returns the buffer, which is made larger for a larger row."""
    import torch

    dtype = getattr(torch, STORED[entry["dtype"]])
    rows = target if target.dim() == 2 else target.reshape(1, -1)
    row_bytes = rows.shape[1] * dtype.itemsize
    if row_bytes > len(buffer):
        buffer = torch.empty(row_bytes, dtype=torch.uint8)
    some = max(1, len(buffer) // max(1, row_bytes))
    for begin in range(0, len(rows), some):
        part = rows[begin : begin + some]
        taken = buffer[: len(part) * row_bytes]
        _fill(stream, taken.numpy().data)
        overwrite(part, taken.view(dtype).view(part.shape))
    return buffer


def _fill(stream: Any, view: memoryview) -> None:
    while len(view):
        count = stream.readinto(view)
        assert count, "the file was whole a moment ago"
        view = view[count:]
