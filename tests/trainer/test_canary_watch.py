"""The trainer's watch over real engines: what it lets pass, what ends the run, what it says of silence."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support_run import quick_settings
from torch import Tensor

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.events import Event
from async_rl.generator.build import make_engine
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Engine
from async_rl.model.folder import load_model
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import make_task
from async_rl.trainer.build import make_learner
from async_rl.trainer.canary_watch import REMEMBERED, CanaryWatch, make_canary
from async_rl.trainer.learner import Learner
from async_rl.trainer.team import Team
from async_rl.wire import messages as msg


class Bench:
    """A learner whose weights one can move, the watch over it, and engines that load them."""

    def __init__(self, model: Path, *overrides: str) -> None:
        self.settings: Settings = quick_settings(model, *overrides)
        self.learner: Learner = make_learner(self.settings)
        self.events: list[dict[str, Any]] = []
        task = make_task(self.settings.task.name, self.settings.task.args)
        self.watch: CanaryWatch = make_canary(self.settings, self.learner, task, self.record, Team(self.learner.ranks))

    def record(self, event: Event) -> None:
        self.events.append({"event": event.event, **event.detail()})

    def step(self) -> dict[str, Tensor]:
        """Weights of the next version, expected by the watch."""
        generator = torch.Generator().manual_seed(self.learner.version)
        with torch.no_grad():
            for parameter in self.learner.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        self.learner.version += 1
        self.watch.expect()
        return {name: tensor.clone() for name, tensor in self.learner.weights().items()}

    def engine(self) -> Engine:
        return make_engine(self.settings, Tokenizer(self.settings.model.path))

    def shown(self, weights: Mapping[str, Tensor], version: int, engine: Engine | None = None) -> msg.Canary:
        """What a generator shows after loading."""
        return asyncio.run(show(engine or self.engine(), weights, version, self.watch.options.probe))


async def show(engine: Engine, weights: Mapping[str, Tensor], version: int, probe: tuple[int, ...]) -> msg.Canary:
    await engine.load(weights, version)
    digests, log_probs = await engine.fingerprint(), await engine.probe(probe)
    await engine.close()
    return msg.Canary(name="g", version=engine.version, digests=tuple(digests.items()), log_probs=tuple(log_probs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_holds_the_published_weights_passes(dtype: str, tiny_model: Path) -> None:
    bench = Bench(tiny_model, f"generator.dtype={dtype}")
    for _ in range(5):
        bench.watch.receive(bench.shown(bench.step(), bench.learner.version))
    row = bench.watch.row()
    assert row["canary/checked"] == 5
    assert 0 <= row["canary/mean_difference"] <= row["canary/max_difference"]
    assert row["canary/mean_difference"] < bench.watch.options.tolerance / 2
    assert row["time/canary"] > 0
    later = bench.watch.row()
    assert later["canary/checked"] == 0
    assert "canary/max_difference" not in later
    assert bench.watch.summary().checked == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_another_version_end_the_run(dtype: str, tiny_model: Path) -> None:
    bench = Bench(tiny_model, f"generator.dtype={dtype}")
    old, _ = bench.step(), bench.step()
    with pytest.raises(RunFailed, match=r"g does not hold the weights of version 2: 24 of 24 tensors differ"):
        bench.watch.receive(bench.shown(old, 2))
    assert bench.events[0]["event"] == "canary_failed"
    assert bench.watch.summary().checked == 0


FORGOTTEN = "model.layers.0.self_attn.o_proj.weight"


class ForgetfulEngine(EmbeddedEngine):
    """Leaves one tensor as it was, and says nothing."""

    async def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        held = dict(self._model.named_parameters())[FORGOTTEN].detach().clone()
        await super().load({**weights, FORGOTTEN: held}, version)


def test_an_engine_that_forgets_a_tensor_is_found_out(tiny_model: Path) -> None:
    """The right weights were shipped; the evidence is of what the engine holds."""
    bench = Bench(tiny_model)
    engine = ForgetfulEngine(load_model(tiny_model), Tokenizer(tiny_model))
    with pytest.raises(RunFailed, match=rf"1 of 24 tensors differ \({FORGOTTEN}\)"):
        bench.watch.receive(bench.shown(bench.step(), 1, engine))


def test_an_engine_split_over_gpus_is_checked_by_what_it_holds_whole(tiny_model: Path) -> None:
    bench = Bench(tiny_model)
    shown = bench.shown(bench.step(), 1)
    kept, others = shown.digests[:1], tuple([name for name, _ in shown.digests[1:]])
    bench.watch.receive(replace(shown, digests=kept, split=others))
    assert bench.watch.summary().checked == 1
    with pytest.raises(RunFailed, match="23 of 24 tensors differ"):
        bench.watch.receive(replace(shown, digests=kept))


def test_an_engine_with_other_arithmetic_is_told_apart_from_wrong_weights(tiny_model: Path) -> None:
    bench = Bench(tiny_model)
    shown = bench.shown(bench.step(), 1)
    off = tuple([value - 0.01 for value in shown.log_probs])
    wrong = msg.Canary(name="g", version=1, digests=shown.digests, log_probs=off)
    with pytest.raises(RunFailed, match=r"holds the weights of version 1 but computes other.*canary\.tolerance"):
        bench.watch.receive(wrong)

    tolerant = Bench(tiny_model, "canary.tolerance=0.02")
    tolerant.step()
    tolerant.watch.receive(wrong)
    assert tolerant.watch.summary().max_difference == pytest.approx(0.01, abs=1e-4)


def test_the_tolerance_grows_with_what_a_generator_showed_first(tiny_model: Path) -> None:
    """Where the weights are surely equal and the user chose none: equal weights differ by more as answers sharpen."""

    def off(shown: msg.Canary, nats: float) -> msg.Canary:
        scaled = tuple([value - nats * max(1.0, abs(value)) for value in shown.log_probs])
        return replace(shown, log_probs=scaled)

    for overrides, split, passes in (((), (), True), (("canary.tolerance=0.05",), (), False), ((), ("x",), False)):
        bench = Bench(tiny_model, "generator.dtype=bfloat16", *overrides)
        shown = replace(bench.shown(bench.step(), 1), split=split)
        bench.watch.receive(off(shown, 0.03))
        if passes:
            bench.watch.receive(off(shown, 0.08))
            with pytest.raises(RunFailed, match="computes other"):
                bench.watch.receive(off(shown, 0.1))
        else:
            with pytest.raises(RunFailed, match="computes other"):
                bench.watch.receive(off(shown, 0.08))
    first = Bench(tiny_model, "generator.dtype=bfloat16")
    with pytest.raises(RunFailed, match="computes other"):  # the first is not excused
        first.watch.receive(off(first.shown(first.step(), 1), 0.06))


def test_what_comes_for_a_forgotten_or_unknown_version_is_counted_only(tiny_model: Path) -> None:
    bench = Bench(tiny_model)
    first = bench.shown(bench.step(), 1)
    for _ in range(REMEMBERED - 1):
        bench.step()
    bench.watch.receive(first)
    bench.step()
    bench.watch.receive(first)
    bench.watch.receive(msg.Canary(name="g", version=10_000, digests=(), log_probs=()))
    assert bench.watch.row()["canary/late"] == 2
    assert bench.watch.summary().checked == 1
    assert len(bench.watch.expected) == REMEMBERED


def test_a_generator_that_shows_nothing_is_reported_once_and_stays_in_the_summary(tiny_model: Path) -> None:
    bench = Bench(tiny_model, "canary.silent_steps=5")
    weights = bench.step()
    for step in range(30):
        bench.watch.report_silent(step, {"a": 1, "g": 1})
        if step % 4 == 0:
            bench.watch.receive(bench.shown(weights, 1))
    assert [(e["event"], e["name"], e["since_step"], e["step"]) for e in bench.events] == [("canary_silent", "a", 0, 5)]
    assert bench.watch.summary().unchecked == ("a",)


def test_silence_is_reported_anew_after_a_sign_of_life_and_not_of_who_has_left(tiny_model: Path) -> None:
    bench = Bench(tiny_model, "canary.silent_steps=5")
    shown = bench.shown(bench.step(), 1)
    both = {"g": 1, "gone": 1}
    for step in range(3):
        bench.watch.report_silent(step, both)
    for step in range(3, 20):
        bench.watch.report_silent(step, {"g": 1})
        if step == 10:
            bench.watch.receive(shown)
    assert [(e["name"], e["step"]) for e in bench.events] == [("g", 5), ("g", 15)]
    assert bench.watch.summary().unchecked == ("gone",)


def test_after_a_resume_time_counts_from_its_first_step(tiny_model: Path) -> None:
    bench = Bench(tiny_model, "canary.silent_steps=5")
    bench.learner.version = 100
    task = make_task("guess", bench.settings.task.args)
    watch = make_canary(bench.settings, bench.learner, task, bench.record, Team(bench.learner.ranks))
    bench.watch = watch
    watch.receive(bench.shown(bench.step(), 101))
    for step in range(100, 105):
        watch.report_silent(step, {"g": 1})
    assert bench.events == []


def test_who_comes_back_has_its_time_anew(tiny_model: Path) -> None:
    bench = Bench(tiny_model, "canary.silent_steps=5")
    bench.step()
    for step in range(40):
        here = step < 4 or step >= 30
        bench.watch.report_silent(step, {"g": 1} if here else {})
    assert [(e["name"], e["since_step"], e["step"]) for e in bench.events] == [("g", 30, 35)]


def test_with_silent_steps_zero_silence_is_left_to_the_summary(tiny_model: Path) -> None:
    bench = Bench(tiny_model, "canary.silent_steps=0")
    for step in range(100):
        bench.watch.report_silent(step, {"g": 1})
    assert bench.events == []
    assert bench.watch.summary().unchecked == ("g",)
