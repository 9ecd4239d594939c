"""What a run asks of Ray, which settings follow from it, and how many generators there should be: without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_run import quick_settings

from async_rl.cluster.ray_plan import (
    FEWEST_STEPS,
    IDLE,
    QUICK,
    SLOW,
    Reading,
    Scaler,
    back_to_local,
    generator_words,
    misfit,
    plan,
    spread_words,
)
from async_rl.config import Settings, check
from async_rl.config.schema import structured, values_of, with_overrides
from async_rl.errors import UserError

RAY = "cluster.engine=ray"
MODEL = Path("model")
GPUS = ("generator.device=cuda", "trainer.device=cuda")


def laid(settings: Settings, *words: str) -> Settings:
    from dataclasses import asdict

    out = structured(Settings, with_overrides(asdict(settings), words), where="")
    check(out)
    return out


# ------------------------------------------------------------------------------------------------ resources


def test_buffer_and_trainer_share_a_node_and_each_generator_has_room_of_its_own() -> None:
    found = plan(quick_settings(MODEL, RAY, "generator.count=3", "trainer.threads=2", "generator.threads=4"))
    assert found.trainer == ({"CPU": 3.0},)
    assert found.rank == {"CPU": 2.0}
    assert (found.fewest, found.most) == (3, 3)
    assert found.generator == {"CPU": 4.0}
    assert found.strategy == "STRICT_PACK"


def test_ranks_over_nodes_with_gpus_and_custom_resources() -> None:
    words = (
        RAY, *GPUS, "trainer.ranks=8", "cluster.ranks_per_node=4", "generator.engine=vllm", "vllm.tensor_parallel=2",
        "cluster.generators=4..32", "cluster.trainer_resources={rack: 1}", "cluster.generator_resources={spot: 0.5}",
        "cluster.generator_memory_gb=64", "cluster.generator_cpus=6",
    )  # fmt: skip
    found = plan(quick_settings(MODEL, *words))
    node = {"CPU": 16.0, "GPU": 4.0, "rack": 1.0}
    assert found.trainer == ({**node, "CPU": 17.0}, node)
    assert found.strategy == "STRICT_SPREAD"
    assert found.generator == {"CPU": 6.0, "GPU": 2.0, "spot": 0.5, "memory": 64.0 * 2**30}
    assert (found.fewest, found.most) == (4, 32)


def test_processes_of_a_task_count_as_cpus_and_a_share_of_a_gpu_is_one() -> None:
    found = plan(quick_settings(MODEL, RAY, *GPUS, "cluster.generator_gpus=0.5", "generator.task_processes=3"))
    assert found.generator == {"CPU": 7.0, "GPU": 0.5}


@pytest.mark.parametrize(
    ("bundles", "nodes", "said"),
    [
        ([{"CPU": 2.0}], [{"CPU": 1.0}, {"CPU": 2.0}], ""),
        ([{"CPU": 2.0, "GPU": 1.0}], [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}], "2 CPU, 1 GPU on one node, and none"),
        ([{"CPU": 2.0}] * 2, [{"CPU": 4.0}], "needs 2 nodes, one with 2 CPU, and there are fewer"),
        ([{"CPU": 1.0}, {"CPU": 4.0}], [{"CPU": 4.0}, {"CPU": 1.0}], ""),
        ([{"spot": 1.0}], [], "needs 1 spot on one node"),
    ],
)  # fmt: skip
def test_what_no_node_could_ever_hold_is_said(bundles: list, nodes: list, said: str) -> None:
    found = misfit("the trainer", bundles, nodes, "add a node")
    if said:
        assert said in found
        assert found.endswith("; add a node")
    else:
        assert found == ""


# ------------------------------------------------------------------------------------------------ settings


def test_words_make_a_run_that_waits_for_what_ray_starts() -> None:
    before = quick_settings(MODEL, RAY, "cluster.generators=2..6")
    words, notes = spread_words(before, resumed=False)
    after = laid(before, *words, "wire.endpoint=tcp://10.0.0.1:*", "wire.keys=keys")
    assert (after.generator.count, after.trainer.start, after.cluster.generators) == (0, "external", "2..6")
    assert (after.trainer.threads, notes) == (1, [])
    assert plan(after) == plan(before)  # a resumed run asks for the same
    again, _ = spread_words(after, resumed=True)
    assert laid(after, *again) == after


def test_settings_of_one_machine_are_taken_back() -> None:
    shared = ("trainer.memory_share=0.5", "generator.gpus=0", "trainer.gpus=0", "weights.transport=shared_memory")
    before = quick_settings(MODEL, RAY, *GPUS, *shared)
    words, notes = spread_words(before, resumed=False)
    after = laid(before, *words, "wire.endpoint=tcp://10.0.0.1:*", "wire.keys=keys")
    assert (after.generator.gpus, after.trainer.gpus, after.trainer.memory_share) == ("", "", 1.0)
    assert after.weights.transport == "auto"
    assert len(notes) == 4


def test_a_generator_computes_with_as_many_threads_as_ray_counts_cpus_for_it() -> None:
    assert generator_words(quick_settings(MODEL, RAY, "cluster.generator_cpus=3")) == ["generator.threads=3"]
    assert generator_words(quick_settings(MODEL, RAY, "cluster.generator_cpus=0.5")) == ["generator.threads=1"]
    assert generator_words(quick_settings(MODEL, RAY, *GPUS)) == []


def test_a_run_of_ray_goes_on_without_it() -> None:
    chosen = ("cluster.generators=2..6", "cluster.generator_resources={a: 1}", "cluster.ship=[x]", "cluster.grows=true")
    before = quick_settings(MODEL, RAY, "cluster.trainer_cpus=2", *chosen)
    recorded = laid(before, *spread_words(before, resumed=False)[0], "wire.endpoint=tcp://a:*", "wire.keys=k")
    words = ["cluster.engine=local", "trainer.steps=9"]
    after = laid(recorded, *back_to_local(recorded, words))
    assert (after.generator.count, after.trainer.start, after.wire.endpoint) == (2, "launcher", "auto")
    assert after.trainer.steps == 9
    assert all(not path.startswith("cluster.") or value == values_of(Settings())[path]
               for path, value in values_of(after).items())  # fmt: skip
    assert back_to_local(recorded, ["trainer.steps=9"]) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cluster.address=ray://a:10001",), "which is Ray Client"),
        (("cluster.generators=many",), "write a number like 8, or bounds like 4..32"),
        (("cluster.generators=0..4",), "write it as FEWEST..MOST"),
        (("generator.count=0",), "set cluster.generators"),
        (("generator.count=3", "cluster.generators=4"), "both say how many"),
        (("cluster.scale_s=5",), "does nothing with 1 generators for good"),
        (("trainer.ranks=4", "cluster.ranks_per_node=3"), "does not divide trainer.ranks=4"),
        (("cluster.generator_resources={GPU: 1}",), "which has settings of its own"),
        (("cluster.trainer_resources={a: 1.5}",), "whole numbers, or a share below 1"),
        (("generator.device=cuda:1",), "Ray says which GPU a process gets"),
        ((*GPUS, "cluster.generator_gpus=2"), "a generator uses 1"),
        (("pin_threads=true",), "pin_threads does nothing"),
        (("generator.restart_window_s=9",), "counts the restarts of a generator over the whole run"),
        (("weights.relay=tcp://a:1", "wire.endpoint=tcp://:1", "wire.keys=k"), "generators reach the buffer's node"),
    ],
)
def test_what_ray_cannot_do_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        quick_settings(MODEL, RAY, *words)


# ------------------------------------------------------------------------------------------------ how many generators


def scaler(fewest: int = 2, most: int = 32, wanted: int = 0) -> Scaler:
    return Scaler(fewest=fewest, most=most, scale_s=60.0, wanted=wanted or fewest)


def reading(waits: float, idle: float, connected: int, *, seconds: float = 60.0, steps: int = 10) -> Reading:
    return Reading(
        steps=steps, seconds=seconds, trainer_waited_s=waits * seconds, generators_idle=idle, connected=connected
    )


def test_a_trainer_that_waits_gets_as_many_as_would_make_up_for_it() -> None:
    found = scaler(wanted=6).decide(reading(0.4, 0.0, 6), 0.0)
    assert found.wanted == 10  # 6 / (1 - 0.4)
    assert "waited for data 40% of the last 60 s" in found.reason


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (reading(0.5, 0.0, 6, seconds=59.0), "the stretch is not over"),
        (reading(0.5, 0.0, 6, steps=FEWEST_STEPS - 1), "too few steps tell nothing"),
        (reading(0.5, 0.0, 5), "one that was asked for has not come"),
        (reading(SLOW, 0.0, 6), "within the dead zone"),
        (reading(QUICK, 0.9, 6), "generators idle, yet the trainer waits now and then"),
        (reading(0.0, IDLE, 6), "few are idle"),
        (reading(0.0, 0.9, 5), "one that was asked for has not come"),
    ],
)
def test_nothing_changes_where_nobody_or_not_clearly_anybody_waits(read: Reading, why: str) -> None:
    found = scaler(wanted=6).decide(read, 0.0)
    assert (found.wanted, found.reason) == (6, ""), why


def test_half_of_what_is_idle_is_taken_away_but_never_below_the_bound_nor_what_was_too_few() -> None:
    assert scaler(wanted=20).decide(reading(0.0, 0.5, 20), 0.0).wanted == 15
    assert scaler(wanted=3).decide(reading(0.0, 1.0, 3), 0.0).wanted == 2
    one = scaler(wanted=8)
    assert one.decide(reading(0.2, 0.0, 8), 0.0).wanted == 10
    assert one.decide(reading(0.0, 0.9, 10), 60.0).wanted == 9  # with 8 the trainer waited
    assert one.decide(reading(0.0, 0.9, 9), 120.0).wanted == 9
    assert one.decide(reading(0.0, 0.9, 9), 3000.0).wanted == 5  # that is long ago


@given(
    needed=st.lists(st.floats(0.5, 60.0), min_size=1, max_size=4),
    fewest=st.integers(1, 8),
    span=st.integers(0, 40),
    late=st.integers(0, 3),
)
def test_the_number_settles_where_the_work_is_done_and_stays(
    needed: list[float], fewest: int, span: int, late: int
) -> None:
    """A world of its own: the trainer needs as much as `need` generators produce, each of which works alike; what was
    asked for comes `late` stretches later. The need changes now and then."""
    one, now = Scaler(fewest=fewest, most=fewest + span, scale_s=60.0, wanted=fewest), 0.0
    connected, coming = fewest, [fewest] * late
    for need in needed:
        changes = 0
        for _ in range(60):
            coming.append(one.wanted)
            connected = coming.pop(0)
            waits, idle = max(0.0, 1 - connected / need), max(0.0, 1 - need / connected)
            before = one.wanted
            found = one.decide(reading(waits, idle, connected), now)
            assert fewest <= found.wanted <= fewest + span
            assert (found.wanted == before) == (found.reason == "")
            changes += found.wanted != before
            now += 60.0
        low, high = min(need * (1 - SLOW), fewest + span), max(need / (1 - IDLE) + 1, fewest)
        assert low <= one.wanted + 1e-9
        assert one.wanted <= high + 1e-9 or one.wanted == one.too_few + 1
        assert changes <= 16  # up by doublings, down by halves of what is idle; no turns
