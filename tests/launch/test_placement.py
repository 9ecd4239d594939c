"""Where processes run: lists of GPUs, automatic choice, sharing, cores, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_run import quick_settings

from async_rl.config import Settings, check
from async_rl.config.derived import gpus_named
from async_rl.config.schema import structured, with_overrides
from async_rl.errors import UserError
from async_rl.run.child import arithmetic_environment
from async_rl.run.placement import Heads, Machine, Placement, names_of, place, read_heads, threads_here, with_threads
from async_rl.run.preflight import preflight

BASE = {"model": {"path": "m"}, "task": {"name": "guess"}}
BOTH = ("generator.device=cuda", "trainer.device=cuda")
VLLM = (*BOTH, "generator.engine=vllm")


def told(*words: str) -> Settings:
    chosen = structured(Settings, with_overrides(BASE, words), where="")
    check(chosen)
    return chosen


def on(gpus: int, *words: str, heads: Heads | None = None, cores: int = 64) -> Placement:
    machine = Machine(gpus=tuple(map(str, range(gpus))), cores=tuple(range(cores)))
    return place(told(*words), machine, heads)


def gpus_of(placement: Placement) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [spot.gpus for spot in placement.generators], [spot.gpus for spot in placement.ranks]


def test_the_eight_gpu_example_of_the_issue() -> None:
    words = (*VLLM, "generator.count=4", "generator.gpus=0-3", "trainer.ranks=4", "trainer.gpus=4-7")
    placement = on(8, *words)
    assert gpus_of(placement) == ([(0,), (1,), (2,), (3,)], [(4,), (5,), (6,), (7,)])
    assert placement.generator_environment(2) == {"CUDA_VISIBLE_DEVICES": "2"}
    assert placement.trainer_environment() == {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert placement.describe().endswith("generator-3 on GPU 3; trainer rank 0 on GPU 4; trainer rank 1 on GPU 5; "
                                         "trainer rank 2 on GPU 6; trainer rank 3 on GPU 7")  # fmt: skip
    assert gpus_of(on(8, *VLLM, "generator.count=4", "trainer.ranks=4")) == gpus_of(placement), "chosen by itself"


def test_a_generator_takes_as_many_gpus_as_it_is_split_over() -> None:
    placement = on(6, *VLLM, "generator.count=2", "vllm.tensor_parallel=2", heads=Heads(query=8, key_value=2))
    assert gpus_of(placement) == ([(0, 1), (2, 3)], [(4,)])
    assert placement.describe() == "generator-0 on GPU 0,1; generator-1 on GPU 2,3; trainer on GPU 4"


def test_one_gpu_is_shared_when_their_shares_of_it_say_so() -> None:
    placement = on(1, *VLLM, "vllm.memory_share=0.4", "trainer.memory_share=0.5")
    assert gpus_of(placement) == ([(0,)], [(0,)])
    assert placement.shared
    assert "shared by both" in placement.describe()
    assert not on(2, *VLLM, "vllm.memory_share=0.4", "trainer.memory_share=0.5").shared, "with two, each has its own"


def test_small_generators_are_spread_over_the_gpus_there_are() -> None:
    assert gpus_of(on(3, *BOTH, "generator.count=4"))[0] == [(0,), (0,), (1,), (1,)]
    assert gpus_of(on(2, *BOTH, "generator.count=3"))[0] == [(0,)] * 3
    assert gpus_of(on(1, "generator.device=cuda", "generator.count=3"))[0] == [(0,)] * 3


def test_on_a_cpu_nothing_is_placed() -> None:
    placement = on(0, "trainer.ranks=2", "generator.count=2")
    assert placement.describe() == "every process on the CPU, on any core"
    assert placement.trainer_environment() == placement.generator_environment(1) == {}


def test_a_device_with_a_number_leaves_visibility_as_it_is() -> None:
    placement = on(3, "generator.device=cuda:2", "generator.count=2", "trainer.device=cuda:1")
    assert gpus_of(placement) == ([(2,), (2,)], [(1,)])
    assert placement.trainer_environment() == placement.generator_environment(0) == {}


def test_processes_are_told_of_gpus_by_the_names_that_were_visible() -> None:
    assert names_of(2, "GPU-aa, 3,5") == ("GPU-aa", "3")
    assert names_of(2, None) == ("0", "1")
    placement = place(told(*BOTH), Machine(gpus=("GPU-aa", "3")), None)
    assert placement.generator_environment(0) == {"CUDA_VISIBLE_DEVICES": "GPU-aa"}
    assert placement.trainer_environment() == {"CUDA_VISIBLE_DEVICES": "3"}


def test_threads_are_bound_to_cores_when_asked() -> None:
    words = ("generator.count=2", "generator.threads=2", "trainer.ranks=2", "trainer.threads=3")
    placement = on(0, *words, "pin_threads=true", cores=10)
    assert placement.generator_cores(1) == ((2, 3),)
    assert placement.trainer_cores() == ((4, 5, 6), (7, 8, 9))
    assert placement.describe().startswith("generator-0 on core 0,1;")
    assert on(0, *words, cores=2).trainer_cores() == ()
    with pytest.raises(UserError, match=r"pin_threads needs a core for each thread.*are 10, but 9 cores"):
        on(0, *words, "pin_threads=true", cores=9)


@pytest.mark.parametrize(
    ("words", "cores", "parameters", "trainer", "generator"),
    [
        ((), 2, 400_000, 1, 1),  # a second thread costs more than it brings
        ((), 2, 3_000_000, 2, 1),
        ((), 2, 135_000_000, 2, 2),  # whichever has work gets the cores
        (("generator.count=3", "trainer.ranks=2"), 8, 135_000_000, 4, 2),
        (("generator.count=4",), 2, 135_000_000, 2, 1),
        (("trainer.threads=3",), 8, 135_000_000, 3, 8),
        (("generator.threads=1",), 8, 135_000_000, 8, 1),
        (BOTH, 8, 135_000_000, 1, 1),
        (("generator.count=2", "pin_threads=true"), 9, 135_000_000, 3, 3),
        (("trainer.start=external", "trainer.ranks=8"), 8, 135_000_000, 8, 8),
    ],
)
def test_threads_are_chosen_by_cores_and_model(
    words: tuple[str, ...], cores: int, parameters: int, trainer: int, generator: int
) -> None:
    chosen = with_threads(told(*words), cores, parameters)
    assert (chosen.trainer.threads, chosen.generator.threads) == (trainer, generator)
    assert with_threads(chosen, 64, 10**12) == chosen, "what is chosen stays"
    if words != BOTH:
        place(chosen, Machine(cores=tuple(range(cores))), None)


@pytest.mark.parametrize(
    ("words", "cores", "parameters", "lanes"),
    [
        ((), 2, 400_000, 2),
        ((), 16, 400_000, 4),
        ((), 1, 400_000, 1),
        ((), 16, 135_000_000, 2),
        ((), 2, 600_000_000, 1),  # each lane would hold another gradient
        (("trainer.ranks=2",), 4, 400_000, 2),
        (("trainer.threads=1",), 2, 400_000, 1),  # as in the folder of a run that began before there were lanes
        (("trainer.threads=1", "trainer.lanes=3"), 2, 400_000, 3),
        (("pin_threads=true",), 4, 400_000, 1),
        (BOTH, 8, 400_000, 1),
    ],
)
def test_a_model_is_trained_in_lanes(words: tuple[str, ...], cores: int, parameters: int, lanes: int) -> None:
    chosen = with_threads(told(*words), cores, parameters)
    assert chosen.trainer.lanes == lanes
    assert with_threads(chosen, 64, 100) == chosen, "what is chosen stays"


def test_lanes_are_for_a_cpu(tiny_model: Path) -> None:
    settings = told(f"model.path={tiny_model}", "trainer.device=cuda", "trainer.lanes=2")
    with pytest.raises(UserError, match=r"trainer\.lanes is 2, but lanes are threads of a CPU"):
        threads_here(settings)


def test_a_run_goes_on_with_the_threads_that_were_chosen_when_it_began(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run and a replay read them from its folder: last bits of a step may depend on them."""
    monkeypatch.setattr("async_rl.run.placement.TRAINER_GAINS", 1000)
    monkeypatch.setattr("async_rl.run.placement.read_cores", lambda: 3)
    first = preflight(quick_settings(tiny_model)).settings
    assert (first.trainer.threads, first.generator.threads) == (3, 1)
    monkeypatch.setattr("async_rl.run.placement.read_cores", lambda: 64)
    assert preflight(first, resumed=True).settings.trainer.threads == 3


@pytest.mark.parametrize(("threads", "number"), [(0, "1"), (1, "1"), (6, "6")])
def test_threads_that_have_no_work_leave_their_core(threads: int, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    found = arithmetic_environment(threads)
    assert (found["OMP_NUM_THREADS"], found["OMP_WAIT_POLICY"]) == (number, "PASSIVE")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert arithmetic_environment(threads)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_trainer_that_others_start_is_not_placed() -> None:
    placement = on(1, *BOTH, "trainer.start=external", "trainer.ranks=4")
    assert gpus_of(placement) == ([(0,)], [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generator.gpus=0-1",), "generator.gpus does nothing with generator.device=cpu"),
        (("trainer.gpus=0", "trainer.device=cuda:0"), "trainer.gpus does nothing with trainer.device=cuda:0"),
        ((*BOTH, "generator.gpus=0-"), "generator.gpus is '0-'; write numbers"),
        ((*BOTH, "generator.gpus=3-1"), "3-1 runs backwards; write 1-3"),
        ((*BOTH, "trainer.gpus='0,1,0'"), "GPU 0 stands there twice"),
        ((*BOTH, "trainer.gpus=0-1", "trainer.ranks=4"), "names 2 GPUs .* but trainer.ranks is 4"),
        (("trainer.device=cuda:0", "trainer.ranks=2"), "NCCL takes one rank a GPU"),
        ((*VLLM, "generator.gpus=0-3", "generator.count=3"), "generator.count=3 with vllm.tensor_parallel=1 needs 3"),
        ((*VLLM, "generator.gpus=0-2", "vllm.tensor_parallel=2"), "needs 2 GPUs, not 3"),
        ((*BOTH, "generator.gpus=0-1", "generator.count=3"), "cannot be spread evenly over 2 GPUs"),
        ((*BOTH, "generator.gpus=0", "generator.count=0"), "does nothing with generator.count=0"),
        ((*BOTH, "generator.gpus=0", "trainer.gpus=0"), "GPU 0 would hold both .* trainer.memory_share=0.5"),
        ((*VLLM, "generator.gpus=0", "trainer.gpus=0", "trainer.memory_share=0.5"), "are more than GPU 0 has"),
        (("trainer.sharding=full",), "trainer.sharding=full does nothing with trainer.ranks=1"),
        (("trainer.sharding=full", "trainer.ranks=2", "lora.rank=4"), "trainer.sharding=full cannot be combined with"),
        (("trainer.memory_share=0.5",), "trainer.memory_share does nothing with trainer.device=cpu"),
        ((*BOTH, "trainer.start=external", "trainer.gpus=0"), "trainer.gpus does nothing with trainer.start=external"),
        (("trainer.start=external", "guard.rollback=true"), "guard.rollback starts the trainer again"),
        (("trainer.start_timeout_s=9",), "trainer.start_timeout_s does nothing with trainer.start=launcher"),
    ],
)
def test_what_can_be_known_wrong_without_a_machine_is_refused_at_load(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        told(*words)


@pytest.mark.parametrize(
    ("gpus", "words", "said"),
    [
        (0, BOTH, "generator.device is cuda, but this machine shows no GPU; set generator.device=cpu"),
        (1, BOTH, "need 1 GPU .* the trainer 1, but this machine shows 1 .*share with trainer.memory_share=0.5"),
        (2, ("trainer.device=cuda", "trainer.gpus=2"), r"trainer.gpus names GPU 2, .* shows 2 \(0 to 1\)"),
        (2, ("generator.device=cuda:4",), "generator.device names GPU 4"),
        (4, (*VLLM, "generator.count=4"), "need 4 GPUs .* the trainer 1, but this machine shows 4"),
        (2, ("trainer.device=cuda", "trainer.ranks=4"), "trainer.ranks=4 needs 4 GPUs"),
        (4, (*VLLM, "generator.gpus=0-2", "generator.count=3", "trainer.ranks=2"), "generators have 3 of them"),
    ],
)
def test_what_this_machine_cannot_give_is_refused(gpus: int, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        on(gpus, *words)


def test_a_model_that_cannot_be_split_so_is_refused() -> None:
    split = (*VLLM, "vllm.tensor_parallel=4")
    with pytest.raises(UserError, match=r"tensor_parallel is 4, but .* 14 attention heads"):
        on(8, *split, heads=Heads(query=14, key_value=2))
    with pytest.raises(UserError, match="6 key-value heads"):
        on(8, *split, heads=Heads(query=12, key_value=6))
    on(8, *split, heads=Heads(query=8, key_value=2))  # each key-value head twice


def test_heads_are_those_of_the_models_config(tiny_model: Path) -> None:
    assert read_heads(told(f"model.path={tiny_model}")) == Heads(query=2, key_value=1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12, unique=True))
def test_a_list_of_gpus_is_read_as_it_is_written(gpus: list[int]) -> None:
    assert gpus_named(",".join(map(str, gpus)), "x") == tuple(gpus)


@settings(deadline=None, max_examples=60)
@given(
    gpus=st.integers(1, 9), count=st.integers(1, 4), split=st.sampled_from([1, 2]), ranks=st.integers(1, 4),
    share=st.sampled_from([1.0, 0.5]),
)  # fmt: skip
def test_whatever_is_placed_fits(gpus: int, count: int, split: int, ranks: int, share: float) -> None:
    words = (
        *VLLM, f"generator.count={count}", f"vllm.tensor_parallel={split}", f"trainer.ranks={ranks}",
        f"trainer.memory_share={share}", "vllm.memory_share=0.4",
    )  # fmt: skip
    try:
        placement = on(gpus, *words)
    except UserError:
        enough = max(count * split, ranks) if share < 1 else count * split + ranks
        assert gpus < enough, "refused although it would fit"
        return
    generators, trainer = gpus_of(placement)
    used = [gpu for spot in generators for gpu in spot]
    assert [len(spot) for spot in generators] == [split] * count
    assert [len(spot) for spot in trainer] == [1] * ranks
    assert len(set(used)) == len(used)
    assert len({spot[0] for spot in trainer}) == ranks
    assert max(*used, *(spot[0] for spot in trainer)) < gpus
    assert share < 1 or not placement.shared
