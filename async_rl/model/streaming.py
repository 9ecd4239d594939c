"""Safetensors files written part by part, so that no tensor has to be in memory whole.

A file's header comes first and says where each tensor lies, so dtypes and shapes are known beforehand. Format:
github.com/huggingface/safetensors (eight bytes of length, JSON, the tensors behind one another).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from async_rl.model.folder import INDEX, MOST_BYTES, WEIGHTS

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""bytes of a number, by the dtype's name in safetensors"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """A tensor that is to be written."""

    name: str
    dtype: str
    """as safetensors names it"""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def stream_weights(
    folder: Path, plans: Iterable[TensorPlan], parts: Mapping[str, Iterable[Any]], most_bytes: int = MOST_BYTES
) -> None:
    """Write tensors into `folder` in files of at most `most_bytes`, with an index where there are several.

    parts: name -> the bytes of the tensor, whatever is a buffer, part by part; each is asked for once, in the order of
    `plans`. Nothing is renamed at the end: write into a folder that gets its name when it is complete. Raises OSError.
    """
    files = _divided(plans, most_bytes)
    where: dict[str, str] = {}
    for number, held in enumerate(files, start=1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        where |= {plan.name: name for plan in held}
        with (folder / name).open("wb") as out:
            out.write(_header(held))
            for plan in held:
                written = sum(out.write(memoryview(part).cast("B")) for part in parts[plan.name])
                assert written == plan.num_bytes, f"{plan.name}: {written} bytes instead of {plan.num_bytes}"
    if len(files) > 1:
        total = sum(plan.num_bytes for held in files for plan in held)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _divided(plans: Iterable[TensorPlan], most_bytes: int) -> list[list[TensorPlan]]:
    files: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in plans:
        if files[-1] and filled + plan.num_bytes > most_bytes:
            files.append([])
            filled = 0
        files[-1].append(plan)
        filled += plan.num_bytes
    return files


def _header(plans: Iterable[TensorPlan]) -> bytes:
    values: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for plan in plans:
        end = at + plan.num_bytes
        values[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text
