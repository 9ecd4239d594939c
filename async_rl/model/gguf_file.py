"""A GGUF file: what it says of itself, and its tensors de-quantised some rows at a time.

The header is read here, since the `gguf` package takes seconds for a vocabulary of 49,152 tokens; its tables of block
sizes and its arithmetic of each quantisation are what de-quantises. Format: GGUF 2 and 3, as
github.com/ggml-org/ggml describes it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from async_rl.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""number of a type of values -> its letter in `struct`"""
STRING, ARRAY = 8, 9
ALIGNMENT = "general.alignment"
CHUNK_ELEMENTS = 1 << 22
"""numbers that are de-quantised at a time: 16 MiB of float32"""
GROUP_ELEMENTS = 1 << 13
"""numbers in a row as gguf gets them: it works on 16 rows at a time, and short ones cost it more calls than work"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where and how a tensor is stored."""

    name: str
    shape: tuple[int, ...]
    """the last dimension is contiguous, as in torch (the file has them the other way round)"""
    kind: int
    """number of its quantisation (gguf's GGMLQuantizationType)"""
    start: int
    """first byte in the file"""


class GGUFFile:
    """A GGUF file, mapped. `fields`: its metadata by key, without arrays; `tensors`: in the order of the file."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is not GGUF, or not whole."""
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = _Header(self._map)
            self.fields, self.tensors = header.read()
            for tensor in self.tensors:
                if tensor.start + self._bytes(tensor) > len(self._map):
                    raise ValueError(f"it ends within {tensor.name}")
        except (ValueError, OSError, KeyError, struct.error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a readable GGUF file ({error}); fetch it again") from None

    def kind(self, tensor: StoredTensor) -> str:
        """The name of a tensor's quantisation, e.g. "Q4_1"."""
        return str(_gguf().GGMLQuantizationType(tensor.kind).name)

    def rows(self, tensor: StoredTensor, *, multiple: int = 1) -> Iterator[NDArray[np.float32]]:
        """The rows of a tensor in float32, [some rows, ...] at a time, a multiple of `multiple` rows in each part."""
        count = tensor.shape[0] if len(tensor.shape) > 1 else 1
        width = prod(tensor.shape) // count
        step = max(1, CHUNK_ELEMENTS // (width * multiple)) * multiple
        data = np.frombuffer(self._map, np.uint8, self._bytes(tensor), tensor.start).reshape(count, -1)
        for begin in range(0, count, step):
            part = self._floats(data[begin : begin + step], tensor.kind)
            yield part.reshape(-1, *tensor.shape[1:]) if len(tensor.shape) > 1 else part.reshape(tensor.shape)

    def _floats(self, data: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
        """Rows of bytes -> their numbers, flat."""
        gguf = _gguf()
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        flat = data.reshape(-1)
        blocks = flat.size // size
        # as rows of equal length; which numbers are in a row does not matter, for blocks are de-quantised one by one
        group = next(n for n in range(max(1, GROUP_ELEMENTS // block), 0, -1) if blocks % n == 0)
        found: NDArray[np.float32] = gguf.dequantize(flat.reshape(-1, group * size), gguf.GGMLQuantizationType(kind))
        return found.reshape(-1)

    def _bytes(self, tensor: StoredTensor) -> int:
        gguf = _gguf()
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        if tensor.shape[-1] % block:
            raise ValueError(f"rows of {tensor.name} are no whole blocks")
        return int(prod(tensor.shape) // block * size)


class _Header:
    """Reads the header from the beginning of a file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def read(self) -> tuple[dict[str, Any], list[StoredTensor]]:
        """(metadata, tensors). Raises ValueError and struct.error."""
        if self._data[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not known here")
        tensors, fields = self._number("Q"), self._number("Q")
        found: dict[str, Any] = {}
        for _ in range(fields):
            key = self._text()
            value = self._value(self._number("I"))
            if value is not None:
                found[key] = value
        places = [self._tensor() for _ in range(tensors)]
        alignment = int(found.get(ALIGNMENT, 32))
        data = -(-self._at // alignment) * alignment
        return found, [
            StoredTensor(name=name, shape=shape, kind=kind, start=data + offset) for name, shape, kind, offset in places
        ]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        dimensions = self._number("I")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        """A value of this type; None for an array, which is passed over."""
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise ValueError(f"a value has type {kind}, which is not known here")
        inner, count = self._number("I"), self._number("Q")
        if inner in NUMBERS:
            self._at += count * struct.calcsize("<" + NUMBERS[inner])
        elif inner == STRING:
            unpack, data, at = struct.Struct("<Q").unpack_from, self._data, self._at
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
            self._at = at
        else:
            for _ in range(count):
                self._value(inner)
        return None

    def _number(self, letter: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self._data, self._at)
        self._at += struct.calcsize("<" + letter)
        return value

    def _text(self) -> str:
        length = self._number("Q")
        if self._at + length > len(self._data):
            raise ValueError("it ends within its header")
        text = self._data[self._at : self._at + length].decode("utf-8")
        self._at += length
        return text


def _gguf() -> Any:
    """The package's constants and its arithmetic. Raises UserError without it."""
    try:
        import gguf
        from gguf import quants  # noqa: F401
    except ImportError:
        raise UserError("to read a .gguf file, `pip install gguf` is needed") from None
    return gguf
