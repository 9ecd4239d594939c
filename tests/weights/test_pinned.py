"""Staging of weights from a GPU. No GPU is here: a tensor that says it is on one records what is done with it."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from async_rl.weights.link import Staged
from async_rl.weights.pinned import copy_over, make_tensors, plan_blocks
from async_rl.weights.shared_memory import WeightPublisher, WeightReader

DONE: list[tuple[str, Any]] = []


class OnGpu(Tensor):
    """A tensor that says it is on a GPU. Its casts stay there."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def to(self, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        DONE.append(("cast on the GPU", dtype))
        return self.as_subclass(Tensor).to(dtype).as_subclass(OnGpu)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.copy_:
            assert args[1].dtype == args[0].dtype, "cast on the CPU"
            DONE.append(("copied", (kwargs or {}).get("non_blocking", False)))
            return args[0].copy_(args[1].as_subclass(Tensor))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_tensors_from_a_gpu_are_cast_there_and_copied_without_waiting() -> None:
    DONE.clear()
    source = torch.randn(5, 7)
    target = torch.zeros(5, 7, dtype=torch.bfloat16)
    copy_over(target, source.as_subclass(OnGpu))
    assert [("cast on the GPU", torch.bfloat16), ("copied", True)] == DONE
    assert torch.equal(target, source.to(torch.bfloat16))


def test_staged_weights_wait_for_the_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last tensor, before anybody may read."""
    monkeypatch.setattr("async_rl.weights.pinned.allocate_pinned", lambda size: torch.zeros(size, dtype=torch.uint8))
    copied = SimpleNamespace(synchronize=lambda: DONE.append(("waited", None)))
    stream = SimpleNamespace(record_event=lambda: copied)  # not the stream, which may be given more meanwhile
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    shapes = {"a": (3, 5), "b": (700,), "c": ()}
    staged = Staged(shapes, torch.bfloat16, "cuda", in_main_memory=True)
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    DONE.clear()
    staged.write([(name, tensor.as_subclass(OnGpu)) for name, tensor in given.items()], 1, 1.0)
    assert [what for what, _ in DONE] == ["cast on the GPU", "copied"] * 3 + ["waited"]
    assert all(torch.equal(t, given[name].to(torch.bfloat16)) for name, t in staged.named_parameters())
    assert [name for name, _ in staged.named_parameters()] == list(shapes)


def test_shared_memory_is_pinned_for_a_gpu_and_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors go from the GPU straight into the segment, in the dtype of the engine, and are announced behind the last
    copy."""
    copied = SimpleNamespace(synchronize=lambda: DONE.append(("waited", reader.latest())))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(record_event=lambda: copied))

    def register(address: int, size: int, flags: int) -> int:
        DONE.append(("pinned", (address % mmap.PAGESIZE, size % mmap.PAGESIZE)))
        return 0

    unregister = lambda address: DONE.append(("unpinned", None))  # noqa: E731
    library = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    given = {name: torch.randn(shape) for name, shape in {"a": (3, 5), "b": (700,)}.items()}
    on_gpu = {name: tensor.as_subclass(OnGpu) for name, tensor in given.items()}
    DONE.clear()
    path = tmp_path / "segment"
    with WeightPublisher(path, on_gpu, dtype=torch.bfloat16) as publisher, WeightReader(path) as reader:
        publisher.publish(on_gpu, 7)
        version, found = reader.read(1)
    assert version == 7
    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in given.items())
    each = [("cast on the GPU", torch.bfloat16), ("copied", True)]
    assert [("pinned", (0, 0)), *each, *each, ("waited", -1), ("unpinned", None)] == DONE


def test_blocks_waste_little_although_each_is_rounded_to_a_power_of_two() -> None:
    """Shapes of Qwen2.5-7B in bfloat16: 15.2 GB; with an allocation a tensor they would take 28.9 GB."""
    rows = [3584 * 3584, 512 * 3584, 512 * 3584, 3584 * 3584, 18_944 * 3584, 18_944 * 3584, 18_944 * 3584, 3584]
    sizes = [2 * n for n in [152_064 * 3584, *rows * 28, 152_064 * 3584]]

    def rounded(size: int) -> int:
        return 1 << (size - 1).bit_length()

    blocks = plan_blocks(sizes)
    assert sorted(number for block in blocks for number in block) == list(range(len(sizes)))
    taken = sum(rounded(sum(sizes[number] for number in block)) for block in blocks)
    assert sum(map(rounded, sizes)) > 1.8 * sum(sizes)
    assert taken < 1.15 * sum(sizes)


def test_tensors_are_views_of_their_blocks_and_do_not_overlap() -> None:
    shapes: dict[str, tuple[int, ...]] = {f"t{i}": (i % 5 + 1, 3) for i in range(20)}
    made = make_tensors(shapes, torch.bfloat16, lambda size: torch.zeros(size, dtype=torch.uint8))
    assert list(made) == list(shapes)
    for number, tensor in enumerate(made.values()):
        tensor.fill_(number)
        assert tensor.data_ptr() % 2 == 0
    for number, (name, tensor) in enumerate(made.items()):
        assert tensor.shape == shapes[name]
        assert (tensor == number).all()
