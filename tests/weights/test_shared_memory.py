"""Weights cross processes whole, or not at all."""

import multiprocessing
import os
import resource
import signal
import struct
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from async_rl.errors import UserError
from async_rl.weights import WeightPublisher, WeightReader, WeightsError, segment_path, shared_memory
from async_rl_kernels import native

PROCESSES = multiprocessing.get_context("spawn")


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    value = float(value)
    return {
        "embedding": torch.full((40, 30), value),
        "norm": torch.full((7,), value, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scale": torch.tensor(value, dtype=torch.float64),
        "steps": torch.tensor([int(value)], dtype=torch.int64),
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("checksum", [False, True])
def test_a_reader_gets_what_was_published_last(tmp_path: Path, checksum: bool) -> None:
    path = tmp_path / "weights"
    with WeightPublisher(path, tensors(), checksum=checksum) as publisher, WeightReader(path) as reader:
        assert reader.latest() == -1
        for version in (0, 1, 4, 5):
            publisher.publish(tensors(version), version)
            assert reader.latest() == version
            got, weights = reader.read(1)
            assert got == version
            assert same(weights, tensors(version))


def test_what_was_read_stays_when_the_publisher_goes_on_and_closes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with WeightPublisher(path, tensors()) as publisher, WeightReader(path) as reader:
        publisher.publish(tensors(1), 1)
        _, first = reader.read(1)
        for version in (2, 3, 4):
            publisher.publish(tensors(version), version)
    assert same(first, tensors(1))
    first["embedding"] += 1  # the caller owns it


def test_a_version_is_read_into_tensors_of_other_strides_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with WeightPublisher(path, tensors()) as publisher, WeightReader(path) as reader:
        publisher.publish(tensors(2), 2)
        targets = {name: torch.zeros(*t.shape, 2, dtype=torch.float64)[..., 0] for name, t in tensors().items()}
        targets["embedding"] = torch.zeros(30, 40).t()
        assert reader.read_into(targets) == 2
        for name, tensor in tensors(2).items():
            assert torch.equal(targets[name].double(), tensor.double())
        publisher.publish(tensors(5), 5)
        assert reader.read_into(targets) == 5
        for name, tensor in tensors(5).items():
            assert torch.equal(targets[name].double(), tensor.double())


def test_weights_travel_in_the_dtype_that_they_are_computed_in(tmp_path: Path) -> None:
    """What arrives is what a cast of the trainer's weights gives, to the bit, in half of the bytes."""
    path, random = tmp_path / "weights", torch.Generator().manual_seed(0)
    mine = {"a": torch.randn(300, 70, generator=random), "b": torch.randn(5, generator=random)}
    with WeightPublisher(path, mine, dtype=torch.bfloat16) as publisher, WeightReader(path) as reader:
        publisher.publish(mine, 1)
        _, weights = reader.read(1)
        assert {name: t.dtype for name, t in weights.items()} == dict.fromkeys(mine, torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float32):
            targets = {"a": torch.zeros(70, 300, dtype=dtype).t(), "b": torch.zeros(5, dtype=dtype)}
            assert reader.read_into(targets) == 1
            for name, tensor in mine.items():
                assert torch.equal(targets[name], tensor.to(torch.bfloat16).to(dtype))
        with pytest.raises(ValueError, match=r"a is torch.bfloat16 \(300, 70\), not torch.float32"):
            publisher.publish({name: t.bfloat16() for name, t in mine.items()}, 2)
        halved = path.stat().st_size
    with WeightPublisher(path, mine):
        assert path.stat().st_size > 1.8 * halved - 8192


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "before", "behind"),
    [(64, 64, 0, 0), (33, 70, 8, 3), (192, 576, 576, 192), (7, 9, 1, 0), (1, 5, 2, 2), (16, 1, 0, 5), (130, 8, 16, 0)],
)
def test_a_matrix_is_turned_bit_by_bit_and_nothing_beside_it_changes(
    rows: int, columns: int, before: int, behind: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a part of a joint matrix, at any place in it."""
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler")
    bits = torch.randint(-(2**31), 2**31, (rows, columns), generator=torch.Generator().manual_seed(rows))
    source = bits.to(torch.int32).view(torch.float32)  # NaN of every kind among them, and -0
    joint = torch.full((columns, before + rows + behind), 0.5)
    shared_memory.overwrite(joint.t()[before : before + rows], source)
    assert torch.equal(joint.t()[before : before + rows].view(torch.int32), source.view(torch.int32))
    assert (joint[:, :before] == 0.5).all()
    assert (joint[:, before + rows :] == 0.5).all()


def test_a_second_load_maps_no_page_anew(tmp_path: Path) -> None:
    """A fault for each page of both ends would cost most of a copy."""
    path, large = tmp_path / "weights", {"a": torch.zeros(4_000_000)}
    with WeightPublisher(path, large) as publisher, WeightReader(path) as reader:
        targets = {"a": torch.ones(4_000_000)}
        faults = []
        for version in range(6):
            publisher.publish(large, version)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            reader.read_into(targets)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(faults[2:]) < 50 < max(faults[:2])


def test_a_reader_sums_bytes_only_where_a_checksum_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[int] = []

    def counted(data: memoryview) -> int:
        summed.append(len(data))
        return zlib.crc32(data)

    monkeypatch.setattr(shared_memory, "_crc", counted)
    for checksum in (False, True):
        path = tmp_path / f"weights-{checksum}"
        with WeightPublisher(path, tensors(), checksum=checksum) as publisher, WeightReader(path) as reader:
            publisher.publish(tensors(1), 1)
            summed.clear()
            assert reader.read_into(tensors()) == 1
            assert reader.read(1)[0] == 1
            assert bool(summed) == checksum


def test_tensors_that_do_not_fit_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with WeightPublisher(path, tensors()) as publisher, WeightReader(path) as reader:
        publisher.publish(tensors(2), 2)
        name = next(iter(tensors()))
        targets = {other: torch.zeros(t.shape) for other, t in tensors().items()} | {name: torch.zeros(3, 7, 1)}
        with pytest.raises(ValueError, match=name):
            reader.read_into(targets)
        assert all(not target.any() for target in targets.values())


@pytest.mark.parametrize("checksum", [True, False])
def test_what_is_overtaken_while_it_is_read_in_place_is_read_again(tmp_path: Path, checksum: bool) -> None:
    """The first target publishes twice while it is written: the version that was being read is gone."""
    path = tmp_path / "weights"
    with WeightPublisher(path, tensors(), checksum=checksum) as publisher, WeightReader(path) as reader:
        publisher.publish(tensors(1), 1)
        versions = iter((2, 3))

        class Overtaken(torch.Tensor):
            def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
                for version in versions:
                    publisher.publish(tensors(version), version)
                return super().copy_(source, non_blocking)

        targets = {name: torch.zeros(t.shape).as_subclass(Overtaken) for name, t in tensors().items()}
        assert reader.read_into(targets) == 3
        for name, tensor in tensors(3).items():
            assert torch.equal(targets[name].as_subclass(torch.Tensor), tensor.float())


def test_closing_removes_the_segment_and_readers_keep_the_last_version(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    publisher = WeightPublisher(path, tensors())
    reader = WeightReader(path)
    publisher.publish(tensors(3), 3)
    assert reader.latest() == 3
    publisher.close()
    assert not path.exists()
    assert reader.latest() == 3


def test_a_wait_for_weights_ends_with_what_was_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with pytest.raises(WeightsError, match=r"waited 0.01 s for the trainer to make the weight segment"):
        WeightReader(path).read(0.01)
    with (
        WeightPublisher(path, tensors()),
        pytest.raises(WeightsError, match=r"waited 0.01 s for the trainer to publish"),
    ):
        WeightReader(path).read(0.01)


def test_a_second_publisher_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with WeightPublisher(tmp_path / "weights", tensors()), pytest.raises(UserError, match="another run"):
        WeightPublisher(tmp_path / "weights", tensors())


@pytest.mark.parametrize(
    "wrong",
    [
        {"embedding": torch.zeros(40, 30)},
        tensors() | {"norm": torch.zeros(7)},
        tensors() | {"embedding": torch.zeros(30, 40)},
    ],
)
def test_other_tensors_than_the_layout_are_refused(tmp_path: Path, wrong: dict[str, torch.Tensor]) -> None:
    with WeightPublisher(tmp_path / "weights", tensors()) as publisher:
        publisher.publish(tensors(1), 1)
        with pytest.raises(ValueError):
            publisher.publish(wrong, 2)
        with pytest.raises(ValueError, match="not newer"):
            publisher.publish(tensors(1), 1)
        assert WeightReader(publisher.path).read(1)[0] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no weight segment"),
        (b"short", "no weight segment"),
        (bytes(5000), "no weight segment"),
        (struct.pack("<8sIIQ", b"ARLWGHT1", 9, 2, 4096) + bytes(9000), "schema"),
        (struct.pack("<8sIIQ", b"ARLWGHT1", 1, 2, 4096).ljust(4096, b"\0") + b"{]", "damaged"),
        (struct.pack("<8sIIQ", b"ARLWGHT1", 1, 2, 4096).ljust(4096, b"\0") + b"[]", "truncated"),
        (struct.pack("<8sIIQ", b"ARLWGHT1", 1, 13, 4096).ljust(4096, b"\0") + b'[["a","x",1]]', "damaged"),
    ],
)
def test_a_file_that_is_no_segment_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as error:
        WeightReader(path).latest()
    assert str(path) in str(error.value)


def test_a_dtype_that_cannot_be_published_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"):
        WeightPublisher(tmp_path / "weights", {"a": torch.zeros(1, dtype=torch.complex64)})


def publish_until_killed(path: Path, start: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    large = {"a": torch.zeros(60_000), "b": torch.zeros(60_000, dtype=torch.bfloat16)}
    publisher = WeightPublisher(path, large)
    version = start
    while True:
        for tensor in large.values():
            tensor.fill_(version % 251)
        publisher.publish(large, version)
        if version == start + 3:
            pipe.send("ready")
        version += 1


def read_many(path: Path, times: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    reader = WeightReader(path)
    mixed, last = 0, -1
    for _ in range(times):
        version, weights = reader.read(30)
        values = {float(value) for tensor in weights.values() for value in (tensor.min(), tensor.max())}
        mixed += values != {version % 251} or version < last
        last = version
    pipe.send(mixed)


def started(function: object, *arguments: object) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=function, args=(*arguments, theirs), daemon=True)
    process.start()
    return process, ours


def test_readers_in_other_processes_never_see_a_mixed_version(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    publisher, ready = started(publish_until_killed, path, 0)
    readers = [started(read_many, path, 300) for _ in range(2)]
    try:
        assert ready.poll(60)
        for _, mixed in readers:
            assert mixed.poll(60)
            assert mixed.recv() == 0
    finally:
        for process in (publisher, *(process for process, _ in readers)):
            process.kill()
            process.join()


def test_a_killed_publisher_is_replaced_and_readers_follow(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    publisher, ready = started(publish_until_killed, path, 0)
    try:
        assert ready.poll(60)
        reader = WeightReader(path)
        assert reader.read(30)[0] >= 3
    finally:
        assert publisher.pid is not None
        os.kill(publisher.pid, signal.SIGKILL)
        publisher.join()
    last, _ = reader.read(30)
    assert reader.latest() == last
    with WeightPublisher(path, tensors()) as new:
        assert reader.latest() == last
        new.publish(tensors(9), last + 1)
        assert reader.latest() == last + 1
        assert same(reader.read(1)[1], tensors(9))


def test_the_segment_of_a_run_is_the_same_for_every_process_and_differs_between_runs(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert segment_path(tmp_path / "one") == segment_path(tmp_path / "two" / ".." / "one")
    assert segment_path(tmp_path / "one") != segment_path(tmp_path / "two")
    assert segment_path(tmp_path / "one", "weights") != segment_path(tmp_path / "one", "critic")
