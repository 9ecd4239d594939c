"""Which way weights take, what is refused, and what the trainer and a generator make of it."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support_run import quick_settings

from async_rl.errors import UserError
from async_rl.generator.build import make_weights
from async_rl.generator.pull import LinkSource, ReaderSource
from async_rl.run.placement import Machine, Placement, Spot, choose_ways, describe_links
from async_rl.run_folder import RunFolder
from async_rl.trainer.publish import make_publisher
from async_rl.weights.link import Control, Staged
from async_rl.weights.shared_memory import WeightReader, segment_path
from async_rl.weights.vllm_links import REBUILD, IpcLink, rebuild_arguments, split_handle
from async_rl.weights.way import LINKS, Asked, Sides, Way, choose
from async_rl.wire import messages as msg
from async_rl.wire.channel import ipc_endpoint
from async_rl.wire.frames import decode, encode


@pytest.mark.parametrize(
    ("sides", "way"),
    [
        (Sides(same_host=True, engine="embedded"), "shared_memory"),
        (Sides(same_host=True, engine="vllm"), "shared_memory"),
        (Sides(same_host=True, engine="vllm", trainer_gpu="0", generator_gpus=("0",)), "ipc"),
        (Sides(same_host=True, engine="vllm", trainer_gpu="0", generator_gpus=("1",)), "nccl"),
        (Sides(same_host=True, engine="vllm", trainer_gpu="4", generator_gpus=("0", "1")), "nccl"),
        (Sides(same_host=True, engine="vllm", trainer_gpu="0", generator_gpus=("0", "1")), "shared_memory"),
        (Sides(same_host=True, engine="vllm", trainer_gpu="0"), "shared_memory"),
        (Sides(same_host=True, engine="vllm", generator_gpus=("0",)), "shared_memory"),
        (Sides(same_host=True, engine="embedded", trainer_gpu="0", generator_gpus=("1",)), "shared_memory"),
        (Sides(same_host=False, engine="vllm", trainer_gpu="0", generator_gpus=("1",)), "stream"),
        (
            Sides(same_host=True, engine="vllm", trainer_gpu="0", generator_gpus=("0",), ipc_works=False),
            "shared_memory",
        ),
        (
            Sides(same_host=True, engine="vllm", trainer_gpu="0", generator_gpus=("1",), adapters_alone=True),
            "shared_memory",
        ),
    ],
)
def test_auto_takes_the_shortest_way_the_placement_allows(sides: Sides, way: Way) -> None:
    assert choose("auto", sides) == way


@pytest.mark.parametrize(
    ("asked", "sides", "reason"),
    [
        ("nccl", Sides(same_host=True, engine="embedded", trainer_gpu="0", generator_gpus=("1",)), "only vLLM takes"),
        ("ipc", Sides(same_host=True, engine="embedded", trainer_gpu="0", generator_gpus=("0",)), "only vLLM takes"),
        ("nccl", Sides(same_host=True, engine="vllm"), "the trainer is on no GPU"),
        ("nccl", Sides(same_host=True, engine="vllm", trainer_gpu="0"), "the generator is on no GPU"),
        ("nccl", Sides(same_host=True, engine="vllm", trainer_gpu="0", generator_gpus=("0",)), "one process a GPU"),
        ("ipc", Sides(same_host=True, engine="vllm", trainer_gpu="0", generator_gpus=("1",)), "stays on one GPU"),
        ("ipc", Sides(same_host=True, engine="vllm", trainer_gpu="0", generator_gpus=("0", "1")), "stays on one GPU"),
        ("nccl", Sides(same_host=False, engine="vllm", trainer_gpu="0", generator_gpus=("1",)), "another host"),
        ("shared_memory", Sides(same_host=False, engine="vllm"), "not on this host"),
        (
            "ipc",
            Sides(same_host=True, engine="vllm", trainer_gpu="0", generator_gpus=("0",), ipc_works=False),
            "with ray only",
        ),
    ],
)
def test_a_way_that_does_not_lead_there_is_refused_with_the_reason(asked: Asked, sides: Sides, reason: str) -> None:
    with pytest.raises(UserError, match=f"weights.transport is {asked}, but.*{reason}"):
        choose(asked, sides)


GPUS = st.sampled_from("0123")


@given(
    st.builds(
        Sides,
        same_host=st.booleans(),
        engine=st.sampled_from(["embedded", "vllm"]),
        trainer_gpu=st.one_of(st.just(""), GPUS),
        generator_gpus=st.lists(GPUS, unique=True).map(tuple),
        ipc_works=st.booleans(),
        adapters_alone=st.booleans(),
    )
)
def test_auto_always_finds_a_way_and_never_one_that_would_be_refused(sides: Sides) -> None:
    way = choose("auto", sides)
    assert choose(way, sides) == way
    open_ways = []
    for asked in LINKS:
        try:
            open_ways.append(choose(asked, sides))
        except UserError:
            continue
    assert len(open_ways) <= 1
    assert way in (open_ways or ["shared_memory" if sides.same_host else "stream"])


def placement(generators: list[tuple[int, ...]], ranks: list[tuple[int, ...]]) -> Placement:
    return Placement(
        machine=Machine(gpus=tuple("abcdefgh")),
        generators=tuple(Spot(gpus=gpus) for gpus in generators),
        ranks=tuple(Spot(gpus=gpus) for gpus in ranks),
        generators_hidden=True,
        ranks_hidden=True,
    )


def test_each_generator_of_a_run_has_its_own_way(tmp_path: Path) -> None:
    words = ("generator.engine=vllm", "generator.device=cuda", "trainer.device=cuda", "generator.count=2")
    settings = quick_settings(tmp_path, *words, "trainer.memory_share=0.5", "vllm.memory_share=0.4")
    assert choose_ways(settings, placement([(0,), (1,)], [(4,), (5,)]), ipc_works=True) == ("nccl", "nccl")
    assert choose_ways(settings, placement([(0,), (1,)], [(0,)]), ipc_works=True) == ("ipc", "nccl")
    assert choose_ways(settings, placement([(0,), (1,)], []), ipc_works=True) == ("shared_memory",) * 2
    on_cpu = quick_settings(tmp_path, "generator.count=2")
    assert choose_ways(on_cpu, placement([(), ()], [()]), ipc_works=False) == ("shared_memory",) * 2
    for transport in LINKS:
        asked = quick_settings(tmp_path, f"weights.transport={transport}")
        with pytest.raises(UserError, match=f"weights.transport is {transport}, but generator.engine is embedded"):
            choose_ways(asked, placement([()], [()]), ipc_works=True)


def test_a_deadline_of_links_without_links_is_refused(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path, "weights.timeout_s=30")
    with pytest.raises(UserError, match=r"weights\.timeout_s does nothing here"):
        choose_ways(settings, placement([()], [()]), ipc_works=True)


def test_a_broadcast_is_for_several_generators_over_nccl(tmp_path: Path) -> None:
    words = ("generator.engine=vllm", "generator.device=cuda", "trainer.device=cuda", "generator.count=2")
    words += ("trainer.memory_share=0.5", "vllm.memory_share=0.4", "weights.broadcast=true")
    settings = quick_settings(tmp_path, *words)
    assert choose_ways(settings, placement([(0,), (1,)], [(4,)]), ipc_works=True) == ("nccl", "nccl")
    for ranks, count in (((0,), 1), ((), 0)):
        with pytest.raises(UserError, match=f"several generators that get weights over nccl, and here {count} do"):
            choose_ways(settings, placement([(0,), (1,)], [ranks]), ipc_works=True)
    for word, reason in (
        ("weights.transport=shared_memory", "about weights over nccl, and weights.transport is shared_memory"),
        ("generator.quantization=fp8", "loads tensors as they come"),
    ):
        with pytest.raises(UserError, match=reason):
            quick_settings(tmp_path, *words, word, "generator.dtype=bfloat16")


def test_links_are_said_in_words() -> None:
    assert describe_links(("shared_memory", "shared_memory")) == []
    assert describe_links(("ipc", "nccl", "nccl")) == [
        "weights go over nccl into vLLM of generators 1, 2",
        "weights go over ipc into vLLM of generator 0",
    ]


def test_a_generator_takes_the_way_it_was_given(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path)
    endpoint = f"ipc://{tmp_path}/links.sock"
    linked = make_weights(settings, tmp_path / "s", "", "g", here=True, way="nccl", links=endpoint)
    assert isinstance(linked, LinkSource)
    linked.close()
    assert isinstance(make_weights(settings, tmp_path / "s", "", "g", here=True, way="shared_memory"), ReaderSource)
    assert isinstance(make_weights(settings, tmp_path / "s", "", "g", here=True), ReaderSource)
    joined = quick_settings(tmp_path, "weights.transport=nccl")
    with pytest.raises(UserError, match="generators that the run has placed on GPUs itself"):
        make_weights(joined, tmp_path / "s", "", "g", here=True)


# ---------------------------------------------------------------------------------------- CUDA IPC


def invented() -> dict[str, Any]:
    """What torch gives for a CUDA tensor, in the order of REBUILD."""
    return {
        "tensor_cls": torch.Tensor,
        "tensor_size": torch.Size([3, 5]),
        "tensor_stride": (5, 1),
        "tensor_offset": 7,
        "storage_cls": torch.storage.TypedStorage,
        "dtype": torch.bfloat16,
        "storage_device": 0,
        "storage_handle": bytes(range(64)),
        "storage_size_bytes": 1 << 30,
        "storage_offset_bytes": 512,
        "requires_grad": False,
        "ref_counter_handle": b"/torch_7_99_0",
        "ref_counter_offset": 3,
        "event_handle": bytes(reversed(range(64))),
        "event_sync_required": True,
    }


def test_handles_have_the_parts_that_this_torch_gives_them() -> None:
    from torch.multiprocessing import reductions

    assert tuple(inspect.signature(reductions.rebuild_cuda_tensor).parameters) == REBUILD
    assert reductions.rebuild_cuda_tensor.__code__.co_varnames.index("storage_device") == 6  # vLLM replaces the sixth


def test_handles_cross_the_wire_as_plain_data_and_come_out_the_same() -> None:
    given = tuple(invented()[name] for name in REBUILD)
    detail = {"handles": [split_handle(given)]}
    call = msg.LinkCall(number=1, method="update", version=4, detail=detail)
    arrived = decode([bytes(frame) for frame in encode(call)])
    assert isinstance(arrived, msg.LinkCall)
    assert arrived.detail == detail
    assert rebuild_arguments(arrived.detail["handles"][0], torch.bfloat16) == given


@pytest.mark.parametrize("spoil", [*REBUILD, "size", "stride"])
def test_what_is_no_handle_is_refused(spoil: str) -> None:
    plain = split_handle(tuple(invented()[name] for name in REBUILD))
    for wrong in ({**plain, spoil: ["x"]}, {name: value for name, value in plain.items() if name != spoil}):
        if wrong != plain:
            with pytest.raises(ValueError, match="handle"):
                rebuild_arguments(wrong, torch.float32)
    with pytest.raises(ValueError, match="not 15"):
        split_handle((1, 2))


def test_a_generator_with_another_model_is_told_so() -> None:
    class Reader:
        def read(self) -> tuple[int, dict[str, torch.Tensor]]:
            return 1, {"x": torch.zeros(3)}

        def close(self) -> None: ...

    class Engine:
        version = 0

        async def load(self, weights: Any, version: int) -> None:
            raise ValueError("x has shape [3], not [4]")

    with pytest.raises(UserError, match=r"model\.path: this generator's model is not the one that is trained: x has"):
        asyncio.run(ReaderSource(Reader()).pull_into(Engine(), first=True))  # type: ignore[arg-type]


class Told(Control):
    """Remembers what it was to pass on; nobody refuses anything."""

    def __init__(self) -> None:
        super().__init__("g", lambda _: None, 1.0)
        self.calls: list[tuple[str, Any]] = []

    def _call(self, method: str, detail: Any, version: int) -> None:
        self.calls.append((method, detail))


class OnInventedGpu(IpcLink):
    def _gpu(self) -> str:
        return "GPU-7"

    def _export(self, named: Any, gpu: str) -> dict[str, Any]:
        return {"names": [name for name, _ in named], "gpu": gpu}

    def _take_back(self) -> None: ...


def test_handles_are_sent_a_thousand_at_a_time_within_one_update() -> None:
    staged = Staged({f"layers.{i}": (1,) for i in range(2500)}, torch.float32, "cpu")
    for has_packed, init in ((True, {"packed": False}), (False, {})):
        told = Told()
        link = OnInventedGpu(told, staged, has_packed=has_packed)
        link.offer()
        link.send()
        link.close()
        assert [method for method, _ in told.calls] == ["init", "start", "update", "update", "update", "finish"]
        assert told.calls[0][1] == init
        names = [name for method, detail in told.calls if method == "update" for name in detail["names"]]
        assert names == [name for name, _ in staged.named_parameters()]


class Learner:
    """What a publisher sees of the learner: a model that is not the built-in decoder, without adapters."""

    adapters = None
    model = None

    def sent(self) -> dict[str, torch.Tensor]:
        return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


@pytest.mark.parametrize(
    ("ways", "words", "links", "segment"),
    [
        ((), (), False, True),
        (("shared_memory",), (), False, True),
        (("nccl", "nccl"), (), True, False),
        (("ipc", "shared_memory"), (), True, True),
        (("nccl",), ("wire.endpoint=tcp://127.0.0.1:5555", "wire.keys=keys"), True, True),
    ],
)
def test_the_trainer_publishes_where_its_generators_look(
    tmp_path: Path, ways: tuple[str, ...], words: tuple[str, ...], links: bool, segment: bool
) -> None:
    settings = quick_settings(tmp_path, "generator.dtype=bfloat16", *words)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()

    def unused(staged: Staged) -> Any:
        return lambda ask, control: None

    publisher = make_publisher(folder, settings, Learner(), ways, lambda *_, **__: None, unused)  # type: ignore[arg-type]
    try:
        publisher.publish(iter(Learner().sent().items()), 3)
        assert Path(ipc_endpoint(folder.path, "weights").removeprefix("ipc://")).exists() == links
        assert segment_path(folder.path).exists() == segment
        if segment:
            with WeightReader(segment_path(folder.path)) as reader:
                version, tensors = reader.read()
            assert version == 3
            assert torch.equal(tensors["a"].float(), Learner().sent()["a"])
    finally:
        publisher.close()
    assert not segment_path(folder.path).exists()
