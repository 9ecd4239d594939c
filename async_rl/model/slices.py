"""Parts of the tensors of a model folder, read where they are needed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from async_rl.model.folder import existing, weight_files


class TensorFiles:
    """Use as a context: `with TensorFiles(folder) as files: files.rows("model.norm.weight", 0, 8)`.

    Files are mapped: what is not asked for is not read."""

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
        """Rows start <= row < stop of a tensor, in its stored dtype, on the CPU. Raises KeyError."""
        part: Tensor = self._file_of[name].get_slice(name)[start:stop]
        return part
