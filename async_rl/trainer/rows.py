"""State that several ranks hold, on disk: each writes the rows it has, and any number of ranks reads them back.

A tensor is cut along its first dimension as torch.chunk cuts it, which is how FSDP2 lays it over ranks: pieces of
equal length, the last ones shorter or empty. One rank writes `optimizer.safetensors`, several
`optimizer-00001-of-00002.safetensors` and so on; a file says in its header which rows of which length it holds.
Not torch.distributed.checkpoint: its own files are read by executing them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from async_rl.errors import UserError
from async_rl.trainer.ranks import Ranks

ROWS = "rows"
"""in a file's header: JSON, name -> [first row, rows of the whole tensor] of what is not whole in it"""


def rows_of(total: int, rank: int, size: int) -> tuple[int, int]:
    """First row of a rank, and the one behind its last."""
    each = -(-total // size)
    start = min(rank * each, total)
    return start, min(start + each, total)


def save_rows(tensors: Mapping[str, Tensor], folder: Path, stem: str, ranks: Ranks) -> None:
    """Write this rank's part. Every rank calls it, with the same names; scalars are the leader's. No collective.
    Raises OSError or SafetensorError."""
    mine: dict[str, Tensor] = {}
    where: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if ranks.size == 1 or tensor.ndim == 0:
            if ranks.leads:
                mine[name] = tensor
            continue
        start, stop = rows_of(tensor.shape[0], ranks.rank, ranks.size)
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor[start:stop]
        assert len(part) == stop - start, f"{name} is laid over ranks otherwise"
        if len(part):
            mine[name], where[name] = part, [start, tensor.shape[0]]
    # Cloned: safetensors refuses views of a joint buffer.
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in mine.items()}
    save_file(content, folder / _file_name(stem, ranks), metadata={ROWS: json.dumps(where)} if where else None)


def _file_name(stem: str, ranks: Ranks) -> str:
    return f"{stem}.safetensors" if ranks.size == 1 else f"{stem}-{ranks.rank + 1:05d}-of-{ranks.size:05d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    file: Any
    start: int
    stop: int


@dataclass(slots=True)
class RowFiles:
    """What `save_rows` wrote, by however many ranks. A context; files are mapped, only what is asked for is read."""

    folder: Path
    stem: str
    _stack: ExitStack = field(default_factory=ExitStack)
    _pieces: dict[str, list[_Piece]] = field(default_factory=dict)
    _whole: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> RowFiles:
        files = [self.folder / f"{self.stem}.safetensors"]
        if not files[0].is_file():
            files = sorted(self.folder.glob(f"{self.stem}-*-of-*.safetensors"))
        if not files:
            raise UserError(f"{self.folder} does not belong to these settings: no {self.stem}.safetensors is in it")
        for path in files:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            where = json.loads((file.metadata() or {}).get(ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in where:
                    start = where[name][0]
                    stop = start + file.get_slice(name).get_shape()[0]
                    self._pieces.setdefault(name, []).append(_Piece(file=file, start=start, stop=stop))
                else:
                    self._whole[name] = file
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> Iterable[str]:
        return self._whole.keys() | self._pieces.keys()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start <= row < stop, on the CPU. Raises KeyError for a name that is not there."""
        if name in self._whole:
            part: Tensor = self._whole[name].get_slice(name)[start:stop]
            return part
        found = [
            piece.file.get_slice(name)[max(start, piece.start) - piece.start : min(stop, piece.stop) - piece.start]
            for piece in sorted(self._pieces[name], key=lambda piece: piece.start)
            if piece.start < stop and start < piece.stop
        ]
        if sum(map(len, found)) != stop - start:
            raise KeyError(f"rows {start} to {stop - 1} of {name}")
        return torch.cat(found) if found else self._pieces[name][0].file.get_slice(name)[0:0]

    def scalar(self, name: str) -> Tensor:
        """A tensor that is not cut."""
        value: Tensor = self._whole[name].get_tensor(name)
        return value

    def as_laid_out(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the shape of `like`, on its device, laid over ranks as `like` is: each rank reads its own."""
        if isinstance(like, DTensor):
            mesh = like.device_mesh
            start, stop = rows_of(like.shape[0], mesh.get_local_rank(), mesh.size())
            local = self.rows(name, start, stop).to(like.to_local().device)
            return DTensor.from_local(
                local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        return self.rows(name, 0, like.shape[0]).to(like.device)
