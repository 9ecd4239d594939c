"""A version that is handed out while the next step is computed is that version to the bit, and is announced when it is
whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support_run import quick_settings
from support_steps import episodes
from support_verified import Bench
from torch import Tensor

from async_rl.errors import RunFailed
from async_rl.trainer.build import make_learner
from async_rl.trainer.learner import Learner
from async_rl.trainer.packing import pack_step
from async_rl.trainer.publication import Publication, beside_training
from async_rl.trainer.team import weights_hash
from async_rl.weights.shared_memory import WeightPublisher, WeightReader

Given = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Slow:
    """A publisher that copies a tensor only when it is allowed to go on."""

    def __init__(self, inner: WeightPublisher) -> None:
        self.inner = inner
        self.go = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)

    def publish(self, tensors: Given, version: int) -> None:
        pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)

        def one_after_another() -> Iterator[tuple[str, Tensor]]:
            for pair in pairs:
                self.reached.release()
                assert self.go.acquire(timeout=60)
                yield pair

        self.inner.publish(one_after_another(), version)

    def held(self) -> dict[int, dict[str, Tensor]]:
        return self.inner.held()

    def close(self) -> None:
        self.inner.close()


@contextmanager
def handed_out(folder: Path, learner: Learner) -> Iterator[tuple[Publication, Slow]]:
    slow = Slow(WeightPublisher(folder / "segment", learner.sent()))
    publication = Publication(slow)
    learner.before_write = publication.before_write
    try:
        yield publication, slow
    finally:
        slow.go.release(10_000)
        publication.close()


def test_training_goes_on_while_a_version_is_copied_and_the_copy_is_that_version(
    tmp_path: Path, tiny_model: Path
) -> None:
    settings = quick_settings(tiny_model, "recipe=grpo", "trainer.steps=9")
    learner, alone = make_learner(settings), make_learner(settings)
    told: list[int] = []
    with handed_out(tmp_path, learner) as (publication, slow), WeightReader(tmp_path / "segment") as reader:
        for step in range(4):
            expected, version = weights_hash(learner.weights()), learner.version
            publication.begin(learner.full_weights(), version, lambda v=version: told.append(v))
            assert slow.reached.acquire(timeout=60)
            assert told == list(range(step)), "not whole yet"
            assert reader.latest() == step - 1
            # Half of the tensors now; the rest when forward and backward are done and the optimizer waits.
            slow.go.release(len(learner.weights()) // 2)
            backward = threading.Event()
            before = learner.before_write

            def at_the_optimizer(wait=before, backward=backward) -> None:  # type: ignore[no-untyped-def]
                assert publication.is_running, "forward and backward were computed beside the copy"
                backward.set()
                wait()

            learner.before_write = at_the_optimizer
            threading.Thread(target=lambda b=backward: (b.wait(60), slow.go.release(10_000))).start()
            learner.step(pack_step(settings, episodes(step)))
            learner.before_write = before
            assert told == list(range(step + 1))
            assert weights_hash(learner.weights()) != expected
            got, tensors = reader.read(5)
            assert (got, weights_hash(tensors)) == (version, expected)
            row = publication.row()
            assert 0 < row["time/publish_wait"] <= row["time/publish_beside"]
            while slow.go.acquire(blocking=False) or slow.reached.acquire(blocking=False):
                pass
    for step in range(4):
        alone.step(pack_step(settings, episodes(step)))
    assert weights_hash(alone.weights()) == weights_hash(learner.weights()), "training is the same"


def test_without_the_optimizers_wait_the_bytes_would_be_those_of_two_versions(tmp_path: Path, tiny_model: Path) -> None:
    """What the test above would see if the wait were missing."""
    settings = quick_settings(tiny_model, "recipe=grpo")
    learner = make_learner(settings)
    with handed_out(tmp_path, learner) as (publication, slow), WeightReader(tmp_path / "segment") as reader:
        learner.before_write = lambda: None
        expected = weights_hash(learner.weights())
        publication.begin(learner.full_weights(), 0, lambda: None)
        slow.go.release(len(learner.weights()) // 2)
        learner.step(pack_step(settings, episodes(0)))
        slow.go.release(10_000)
        publication.wait()
        assert weights_hash(reader.read(5)[1]) not in (expected, weights_hash(learner.weights()))


def test_a_failure_is_raised_before_the_weights_change_and_nothing_is_announced(
    tmp_path: Path, tiny_model: Path
) -> None:
    class Full:
        def publish(self, tensors: Given, version: int) -> None:
            raise RunFailed("generator-1 holds it")

        def close(self) -> None: ...

    settings = quick_settings(tiny_model, "recipe=grpo")
    learner, told = make_learner(settings), []
    publication = Publication(Full())
    learner.before_write = publication.before_write
    before = weights_hash(learner.weights())
    publication.begin(learner.full_weights(), 0, lambda: told.append(0))
    with pytest.raises(RunFailed, match="generator-1 holds it"):
        learner.step(pack_step(settings, episodes(0)))
    assert weights_hash(learner.weights()) == before
    assert not told
    publication.close()


def test_where_the_trainer_would_wait_it_looks_for_work_meanwhile(tmp_path: Path, tiny_model: Path) -> None:
    learner = make_learner(quick_settings(tiny_model))
    with handed_out(tmp_path, learner) as (publication, _):
        publication.begin(learner.full_weights(), 0, lambda: None)
        asked: list[int] = []
        publication.wait(unless=lambda: bool(asked.append(1)) or len(asked) > 2)
        assert publication.is_running


@pytest.mark.parametrize(
    ("overrides", "beside"),
    [((), True), (("lora.rank=2", "lora.send=adapter"), True), (("lora.rank=2", "lora.send=merged"), False)],
)
def test_what_must_be_formed_first_is_handed_out_at_once(
    tiny_model: Path, overrides: tuple[str, ...], beside: bool
) -> None:
    learner = make_learner(quick_settings(tiny_model, *overrides))
    assert beside_training(learner, linked=True) is beside


def test_versions_that_are_being_overwritten_are_not_verified_against(tmp_path: Path, tiny_model: Path) -> None:
    """The verifier sees the version before, whole, and never the buffer that the thread writes."""
    bench = Bench(tiny_model, tmp_path, "staleness.max_staleness=3", "verify.share=0.5")
    try:
        slow = Slow(bench.publisher)
        publication = Publication(slow)
        held = bench.verifier.held
        held.publisher = publication  # type: ignore[union-attr]
        bench.step()
        assert set(publication.held() or ()) == {0, 1}
        bench.learner.version += 1
        held.keep()
        publication.begin(bench.learner.full_weights(), 2, lambda: None)
        assert slow.reached.acquire(timeout=60)
        assert set(publication.held() or ()) == {1}
        assert held.versions() == {0, 1, 2}, "version 0 was copied before it is overwritten"
        slow.go.release(10_000)
        publication.wait()
        assert set(publication.held() or ()) == {1, 2}
    finally:
        bench.close()


def test_the_thread_takes_one_core_and_leaves_the_others_to_training(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(1 << 20)}
    used: list[int] = []

    class Counting:
        def publish(self, tensors: Given, version: int) -> None:
            used.append(torch.get_num_threads())

        def close(self) -> None: ...

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        publication = Publication(Counting())
        publication.begin(weights, 0, lambda: None)
        publication.wait()
        assert (used, torch.get_num_threads()) == ([1], 2)
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later[0] in (2, os.cpu_count()), "a thread that begins later is not held to one"
        publication.close()
    finally:
        torch.set_num_threads(before)


PUBLISHES_FOR_EVER = """
import sys, torch
from pathlib import Path
from async_rl.trainer.publication import Publication
from async_rl.weights.shared_memory import WeightPublisher

weights = {f"layer.{i}": torch.zeros(200_000) for i in range(20)}
publication = Publication(WeightPublisher(Path(sys.argv[1]), weights))
for version in range(10**9):
    publication.begin(weights, version, lambda v=version: print(v, flush=True))
    publication.before_write()
    for tensor in weights.values():
        tensor.fill_(version + 1)
"""


def test_a_trainer_killed_in_between_leaves_a_whole_version_and_announced_no_other(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    for turn in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHES_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        announced = [int(process.stdout.readline()) for _ in range(3 + turn)]
        time.sleep(0.001 * turn)  # a kill at another place
        process.send_signal(signal.SIGKILL)
        process.wait()
        announced += [int(line) for line in process.stdout.read().split() if line]
        with WeightReader(path) as reader:
            version, tensors = reader.read(5)
            assert version >= announced[-1]
            for tensor in tensors.values():
                assert (tensor == version).all()
