"""Weights in one memory-mapped file: written in place by the trainer, copied by generators.

The file (in /dev/shm where there is one) is a header page, the layout as JSON, and two buffers. A new version goes into
the buffer that does not hold the newest one. Each buffer has a sequence number that is odd while it is written, which
tells a reader that its copy is torn. A reader's copy is whole when it ends before the publisher begins its next but one
write.

multiprocessing.shared_memory is not used because its resource tracker removes segments when any process ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import math
import mmap
import os
import platform
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from async_rl.errors import UserError
from async_rl.weights.pinned import copy_over, pin, unpin, wait_for_copies

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
ALIGN = 64
"""bytes; each tensor begins at a multiple"""
ITEM_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip

PANEL = 64
"""rows"""

_MAGIC = b"ARLWGHT1"
_PREFIX = struct.Struct("<8sIIQ")  # magic, schema, layout bytes, bytes of one buffer
_SCHEMA = 1
_WORDS_AT = 64
_LAYOUT_AT = 4096
_NOTHING, _CLOSED = -1, -2
# 8-byte words from _WORDS_AT on; written and read as one aligned word each
_NEWEST, _PID, _SEQUENCE, _VERSION, _CHECKSUM, _NUM_WORDS = 0, 1, 2, 4, 6, 8
_POLL_S = 0.001
# x86 keeps the order of stores; elsewhere a reader could see a sequence number before the bytes
_STORES_IN_ORDER = platform.machine() in ("x86_64", "AMD64")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """The place of one tensor in the bytes of a set of weights."""

    name: str
    dtype: str
    """as torch names it, e.g. "bfloat16" """
    shape: tuple[int, ...]
    offset: int
    """bytes from the start of the buffer"""

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * ITEM_BYTES[self.dtype]


class WeightsError(Exception):
    """The weights cannot be read: no valid segment, or a wait that exceeded its deadline."""


def shared_folder() -> Path | None:
    """The folder whose files are shared memory; None on a machine without one."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else None


def segment_path(run_folder: Path, name: str = "weights") -> Path:
    """The file of a run's weights: in shared memory where the machine has it, else in the run's folder.

    Every process of a run gets the same path from the same folder and name."""
    shared = shared_folder()
    if shared is not None:
        run = hashlib.blake2b(os.fsencode(run_folder.resolve()), digest_size=8).hexdigest()
        return shared / f"async-rl-{run}-{name}"
    return run_folder / f"{name}.segment"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCopy:
    """One version as it was in the segment."""

    version: int
    layout: str
    """JSON, see `layout_to_json`"""
    content: NDArray[np.uint8]  # [bytes of one buffer]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    """A buffer that held a whole version when it was looked at."""

    version: int
    buffer: int
    sequence: int
    checksum: int
    """crc32 of its bytes; _NOTHING: none was stored"""

    def has(self, content: NDArray[np.uint8]) -> bool:
        """Whether these bytes are those of the version, as far as a checksum tells."""
        return self.checksum == _NOTHING or self.checksum == _crc(content.data)


class WeightPublisher:
    """The trainer's end. It owns the file: creates it, and removes it in `close()`."""

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, Tensor],
        *,
        checksum: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace the segment of a dead publisher at `path`, or make a new one.

        Args:
            layout: tensors with the names, dtypes and shapes that will be published; their values are not used.
            checksum: store a crc32 (3 GB/s); None: only where the processor may reorder stores.
            dtype: that tensors are cast to on their way, where every reader computes in it; None: their own.

        Raises UserError when the publisher at `path` is alive, or the memory is too small.
        """
        self.path = path
        self._checksum = not _STORES_IN_ORDER if checksum is None else checksum
        self._places, self._buffer_bytes = lay_out(layout, dtype)
        self._dtypes = {name: tensor.dtype for name, tensor in layout.items()}
        self._gpu = next((tensor.device for tensor in layout.values() if tensor.device.type == "cuda"), None)
        self._pinned = 0
        """address of the memory that is pinned for a GPU; 0: none is"""
        described = layout_to_json(self._places).encode()
        self._first = aligned(_LAYOUT_AT + len(described), _LAYOUT_AT)
        _retire(path)
        self._file = self._create(described)
        os.rename(f"{path}.new", path)

    def _create(self, described: bytes) -> int:
        """Make the new segment under a temporary name, locked and mapped."""
        size = self._first + 2 * self._buffer_bytes
        try:
            file = os.open(f"{self.path}.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(file, 0, size)  # else a full memory would be a bus error later
        except OSError as error:
            os.close(file)
            os.unlink(f"{self.path}.new")
            raise UserError(
                f"{self.path}: the weights need {size / 1e9:.2f} GB twice-buffered there ({error.strerror}); "
                "give the machine or container more shared memory (docker run --shm-size)"
            ) from None
        self._map = mmap.mmap(file, size)
        self._words = memoryview(self._map)[_WORDS_AT : _WORDS_AT + 8 * _NUM_WORDS].cast("q")
        self._words[_NEWEST], self._words[_PID] = _NOTHING, os.getpid()
        self._words[_VERSION] = self._words[_VERSION + 1] = _NOTHING
        self._map[_LAYOUT_AT : _LAYOUT_AT + len(described)] = described
        self._map[: _PREFIX.size] = _PREFIX.pack(_MAGIC, _SCHEMA, len(described), self._buffer_bytes)
        self._views = [self._view(buffer) for buffer in (0, 1)]
        if self._gpu is not None:
            # In whole pages: the first buffer begins at one.
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._map, self._first))
            self._pinned = address if pin(address, 2 * self._buffer_bytes) else 0
        return file

    def _view(self, buffer: int) -> list[Tensor]:
        import torch

        start = self._first + buffer * self._buffer_bytes
        whole = torch.frombuffer(self._map, dtype=torch.uint8, count=self._buffer_bytes, offset=start)
        return [tensor_of(whole, place) for place in self._places]

    def publish(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the tensors (from any device, one after another) and announce them as `version`. Raises ValueError when
        names, dtypes or shapes are not those of the layout, or the version is not newer."""
        newest = self._words[_NEWEST]
        if version <= newest:
            raise ValueError(f"version {version} is not newer than {newest}")
        buffer = 1 if newest != _NOTHING and self._words[_VERSION] == newest else 0
        missing = {place.name: view for place, view in zip(self._places, self._views[buffer], strict=True)}
        self._words[_SEQUENCE + buffer] |= 1  # it is odd already if an earlier copy failed half-way
        for name, given in tensors.items() if isinstance(tensors, Mapping) else tensors:
            view = missing.pop(name, None)
            if view is None:
                raise ValueError(f"other tensors than announced: {name}")
            if given.shape != view.shape or given.dtype != self._dtypes[name]:
                announced = f"{self._dtypes[name]} {tuple(view.shape)}"
                raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}, not {announced}")
            if given.device.type == "cpu":
                view.copy_(given.detach())
            else:
                copy_over(view, given)
        if self._gpu is not None:
            wait_for_copies(self._gpu)
        if missing:
            raise ValueError(f"other tensors than announced: {sorted(missing)[:5]} did not come")
        start = self._first + buffer * self._buffer_bytes
        self._words[_CHECKSUM + buffer] = (
            _crc(memoryview(self._map)[start : start + self._buffer_bytes]) if self._checksum else _NOTHING
        )
        self._words[_VERSION + buffer] = version
        self._words[_SEQUENCE + buffer] += 1
        self._words[_NEWEST] = version

    def held(self) -> dict[int, dict[str, Tensor]]:
        """Version -> tensors by name, of the versions that the segment holds whole: views, which the next publication
        but one overwrites."""
        found: dict[int, dict[str, Tensor]] = {}
        for buffer in (0, 1):
            version = self._words[_VERSION + buffer]
            if version != _NOTHING and self._words[_SEQUENCE + buffer] % 2 == 0:
                names = (place.name for place in self._places)
                found[version] = dict(zip(names, self._views[buffer], strict=True))
        return found

    def close(self) -> None:
        """Remove the segment. Tensors that were read stay valid."""
        if self._file < 0:
            return
        self._words[_NEWEST] = _CLOSED
        self.path.unlink(missing_ok=True)
        if self._pinned:
            unpin(self._pinned)
        self._views.clear()
        self._words.release()
        self._map.close()
        os.close(self._file)
        self._file = -1

    def __enter__(self) -> WeightPublisher:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class WeightReader:
    """A generator's end. It follows a publisher that is replaced by a new one at the same path."""

    def __init__(self, path: Path, *, timeout_s: float = 60.0) -> None:
        """The segment need not exist yet: a trainer that loads a large model makes it late. One thread at a time may
        use a reader. `timeout_s`: longest wait for a version."""
        self.path = path
        self._timeout_s = timeout_s
        self._map: mmap.mmap | None = None
        self._words = memoryview(bytes(8 * _NUM_WORDS)).cast("q")
        self._places: list[TensorPlace] = []
        self._first = self._buffer_bytes = 0
        self._seen = _NOTHING

    def latest(self) -> int:
        """The newest version published, or -1 before the first; takes a microsecond. After the publisher has closed,
        the last version seen. Raises WeightsError for a file that is no segment."""
        newest = self._words[_NEWEST] if self._map is not None else _CLOSED
        if newest == _CLOSED:
            if not self._open():
                return self._seen
            newest = self._words[_NEWEST]
        if newest >= 0:
            self._seen = newest
        return self._seen

    def read(self, seconds: float | None = None) -> tuple[int, dict[str, Tensor]]:
        """(version, tensors): the newest version. The caller owns the tensors (one allocation, on the CPU).

        Waits for the first version. Raises WeightsError after `seconds` (None: the reader's `timeout_s`)."""
        import torch

        found = self._wait_for(self.copy, self._timeout_s if seconds is None else seconds)
        whole = torch.from_numpy(found.content)
        return found.version, {place.name: tensor_of(whole, place) for place in self._places}

    def read_into(self, targets: Mapping[str, Tensor], seconds: float | None = None) -> int:
        """Copy the newest version into `targets`, whatever their dtypes and strides, and return its number. No other
        copy is made.

        Waits for the first version. Raises WeightsError after `seconds` (None: the reader's `timeout_s`), when
        `targets` may hold parts of several versions, and ValueError, with nothing changed, unless names and shapes are
        those that are published."""
        return self._wait_for(lambda: self._copy_into(targets), self._timeout_s if seconds is None else seconds)

    def wait_for_version(self) -> int:
        """The newest version, as soon as there is one. Raises WeightsError after the reader's `timeout_s`."""
        return self._wait_for(lambda: version if (version := self.latest()) >= 0 else None, self._timeout_s)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that are published, by name; known once a version is."""
        return {place.name: place.shape for place in self._places}

    def lend(self, version: int, use: Callable[[Iterator[tuple[str, Tensor]]], object]) -> bool:
        """Let `use` read the tensors of `version` where they lie, without a copy of them. False when the publisher has
        gone on to write over them, before or meanwhile: `use` may then have seen parts of another version."""
        self.latest()
        whole = next((found for buffer in (0, 1) if (found := self._whole_in(buffer, version)) is not None), None)
        if whole is None or not whole.has(self._bytes(whole.buffer)):
            return False
        source = self._tensor(whole.buffer)
        use((place.name, tensor_of(source, place)) for place in self._places)
        return self._unchanged(whole) and whole.has(self._bytes(whole.buffer))

    def _wait_for(self, attempt: Callable[[], T | None], seconds: float) -> T:
        """The first thing that `attempt`, made when there is a version, gives."""
        deadline = time.monotonic() + seconds
        overtaken = 0
        while True:
            self.latest()
            if self._map is not None and self._words[_NEWEST] >= 0:
                found = attempt()
                if found is not None:
                    return found
                overtaken += 1
            if time.monotonic() > deadline:
                raise WeightsError(self._why(seconds, overtaken))
            if not overtaken:
                time.sleep(_POLL_S)

    def copy(self) -> WeightCopy | None:
        """Copy the bytes of the newest version once, without torch. None when there is no version yet, or the publisher
        wrote meanwhile."""
        whole = self._whole_version()
        if whole is None:
            return None
        copied = self._bytes(whole.buffer).copy()
        if not self._unchanged(whole) or not whole.has(copied):
            return None
        return WeightCopy(version=whole.version, layout=layout_to_json(self._places), content=copied)

    def view(self) -> WeightCopy | None:
        """`copy` without copying, for a reader whose publisher waits for it: the next publication but one overwrites
        the bytes."""
        whole = self._whole_version()
        if whole is None:
            return None
        content = self._bytes(whole.buffer)
        return WeightCopy(version=whole.version, layout=layout_to_json(self._places), content=content)

    def _copy_into(self, targets: Mapping[str, Tensor]) -> int | None:
        """The version that `targets` hold now; None as `copy`, when they may hold anything."""
        import torch

        whole = self._whole_version()
        if whole is None:
            return None
        check_fit({place.name: place.shape for place in self._places}, targets, whole.version)
        content = self._bytes(whole.buffer)
        if not whole.has(content):
            return None
        source = self._tensor(whole.buffer)
        with torch.no_grad():
            for place in self._places:
                overwrite(targets[place.name], tensor_of(source, place))
        # The pages, which are the publisher's, stay mapped: to map them anew would cost most of a copy.
        return whole.version if self._unchanged(whole) and whole.has(content) else None

    def _whole_version(self) -> _Whole | None:
        """The buffer of the newest version, if it is whole now."""
        if self.latest() < 0 or self._map is None:
            return None
        newest = self._words[_NEWEST]
        return self._whole_in(0 if self._words[_VERSION] == newest else 1, newest)

    def _whole_in(self, buffer: int, version: int) -> _Whole | None:
        """The buffer, if it holds `version` whole now."""
        sequence = self._words[_SEQUENCE + buffer]
        if version < 0 or sequence % 2 or self._words[_VERSION + buffer] != version:
            return None
        checksum = self._words[_CHECKSUM + buffer]
        return _Whole(version=version, buffer=buffer, sequence=sequence, checksum=checksum)

    def _unchanged(self, whole: _Whole) -> bool:
        return self._words[_SEQUENCE + whole.buffer] == whole.sequence

    def _bytes(self, buffer: int) -> NDArray[np.uint8]:
        """The bytes of a buffer, where they lie."""
        assert self._map is not None
        return np.frombuffer(self._map, np.uint8, self._buffer_bytes, self._first + buffer * self._buffer_bytes)

    def _tensor(self, buffer: int) -> Tensor:  # [bytes of one buffer] uint8
        """The same, from its address, because torch warns of memory that cannot be written."""
        import torch

        content = self._bytes(buffer)
        return torch.frombuffer((ctypes.c_char * len(content)).from_address(content.ctypes.data), dtype=torch.uint8)

    def _why(self, seconds: float, overtaken: int) -> str:
        if self._map is None:
            return (
                f"waited {seconds:g} s for the trainer to make the weight segment {self.path} (a run whose own "
                "generators are linked over nccl or ipc makes none; for others to join, start it with "
                "weights.transport=shared_memory)"
            )
        if overtaken:
            return (
                f"{self.path}: in {seconds:g} s no copy of the weights was whole ({overtaken} attempts): "
                "the trainer publishes faster than they can be copied, or the segment is damaged"
            )
        return f"waited {seconds:g} s for the trainer to publish weights in {self.path}"

    def _open(self) -> bool:
        """Map the segment at the path. False when there is none yet."""
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise WeightsError(f"{self.path} is no weight segment: {error}") from None
        places, first, buffer_bytes = _parse(self.path, mapped)
        words = memoryview(mapped)[_WORDS_AT : _WORDS_AT + 8 * _NUM_WORDS].cast("q")
        if words[_NEWEST] == _CLOSED:
            words.release()
            mapped.close()
            return False
        self.close()
        self._map, self._words = mapped, words
        self._places, self._first, self._buffer_bytes = places, first, buffer_bytes
        return True

    def close(self) -> None:
        """Unmap. Tensors that were read stay valid."""
        if self._map is not None:
            self._words.release()
            self._map.close()
            self._map = None

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def overwrite(target: Tensor, source: Tensor) -> None:
    """Copy `source` to `target`, of the same shape. A matrix whose columns lie one after another is turned tile by tile
    where there is a compiler; in torch some rows at a time, so that what is read of the source stays in the cache."""
    if target.dim() != 2 or target.stride(0) != 1 or len(target) == 1:
        target.copy_(source)
        return
    import torch

    from async_rl_kernels import native

    if target.dtype == source.dtype and source.is_contiguous() and native.usable(source, target.t()):
        rows, columns = source.shape
        threads = torch.get_num_threads()
        native.library().turn_matrix(  # type: ignore[union-attr]
            source.data_ptr(), rows, columns, target.data_ptr(), target.stride(1), threads
        )
        return
    for begin in range(0, len(target), PANEL):
        target[begin : begin + PANEL].copy_(source[begin : begin + PANEL])


def check_fit(given: Mapping[str, Sequence[int]], wanted: Mapping[str, Tensor], version: int) -> None:
    """Raises ValueError unless the names and shapes of `given` are exactly those of `wanted`."""
    if given.keys() != wanted.keys():
        odd = sorted(given.keys() ^ wanted.keys())
        raise ValueError(f"weights of version {version} do not fit the model: {odd[0]} and {len(odd) - 1} more")
    for name, target in wanted.items():
        if tuple(given[name]) != tuple(target.shape):
            raise ValueError(f"{name} has shape {list(given[name])}, not {list(target.shape)}")


def lay_out(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> tuple[list[TensorPlace], int]:
    """(places, bytes of one buffer) for these tensors, in `dtype` unless it is None. Raises ValueError for a dtype that
    cannot be sent."""
    places, end = [], 1
    for name, tensor in tensors.items():
        named = str(dtype or tensor.dtype).removeprefix("torch.")
        if named not in ITEM_BYTES:
            raise ValueError(f"{name}: weights of dtype {named} cannot be published")
        place = TensorPlace(name=name, dtype=named, shape=tuple(tensor.shape), offset=aligned(end, ALIGN))
        places.append(place)
        end = place.end
    return places, aligned(end, mmap.PAGESIZE)


def layout_to_json(places: Sequence[TensorPlace]) -> str:
    """`[[name, dtype, shape, offset], ...]`."""
    return json.dumps([[p.name, p.dtype, p.shape, p.offset] for p in places])


def layout_from_json(text: str | bytes, buffer_bytes: int) -> list[TensorPlace]:
    """The places that a layout names. Raises ValueError when it is malformed, or a tensor lies outside the buffer."""
    try:
        places = [
            TensorPlace(name=str(name), dtype=dtype, shape=tuple(int(n) for n in shape), offset=int(offset))
            for name, dtype, shape, offset in json.loads(text)
        ]
        fits = all(0 <= p.offset <= p.end <= buffer_bytes and min(p.shape, default=0) >= 0 for p in places)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"damaged: {error}") from None
    if not fits:
        raise ValueError("truncated or damaged: a tensor lies outside its buffer")
    return places


def tensor_of(whole: Tensor, place: TensorPlace) -> Tensor:
    """A view of the buffer `whole`, [bytes] uint8, as the tensor at `place`."""
    import torch

    return whole[place.offset : place.end].view(getattr(torch, place.dtype)).view(place.shape)


def aligned(offset: int, to: int) -> int:
    """`offset` rounded up to a multiple of `to`."""
    return -(-offset // to) * to


def _parse(path: Path, mapped: mmap.mmap) -> tuple[list[TensorPlace], int, int]:
    """(places, offset of the first buffer, bytes of one buffer) of a segment. Raises WeightsError for another file."""
    if len(mapped) < _LAYOUT_AT:
        raise WeightsError(f"{path} is no weight segment: it has {len(mapped)} bytes")
    magic, schema, layout_bytes, buffer_bytes = _PREFIX.unpack_from(mapped)
    if magic != _MAGIC or schema != _SCHEMA:
        raise WeightsError(f"{path} is no weight segment of schema {_SCHEMA}; remove it and run again")
    first = aligned(_LAYOUT_AT + layout_bytes, _LAYOUT_AT)
    try:
        places = layout_from_json(mapped[_LAYOUT_AT : _LAYOUT_AT + layout_bytes], buffer_bytes)
    except ValueError as error:
        raise WeightsError(f"{path}: the weight segment's layout is {error}") from None
    if first + 2 * buffer_bytes != len(mapped):
        raise WeightsError(f"{path}: the weight segment is truncated or damaged; remove it and run again")
    return places, first, buffer_bytes


def _retire(path: Path) -> None:
    """Mark a dead publisher's segment as closed, so that its readers open the new one. Raises UserError when the
    publisher is alive."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be replaced ({error.strerror}); remove it") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_size >= _LAYOUT_AT and os.pread(file, 8, 0) == _MAGIC:
            os.pwrite(file, struct.pack("<q", _CLOSED), _WORDS_AT + 8 * _NEWEST)
    except BlockingIOError:
        raise UserError(f"{path}: another run publishes its weights there; end that run first") from None
    finally:
        os.close(file)


def _crc(data: Any) -> int:
    return zlib.crc32(data)
