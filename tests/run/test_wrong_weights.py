"""Wrong weights end a run at the step they arrive; right ones never do. Real processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support_faulty_trainer import FIRST_WRONG, WRONG_ADAPTER, WRONG_TENSOR
from support_run import quick_settings, train

from async_rl.errors import RunFailed
from async_rl.instruments.replay import replay
from async_rl.model.folder import load_tensors
from async_rl.observe.console import Console
from async_rl.run.child import Command
from async_rl.run.launcher import Launcher
from async_rl.run_folder import RunFolder, read_rows

EASY = ("task.args.num_secrets=2", "task.args.max_turns=1", "batch.groups_per_step=8", "batch.group_size=8")
"""An untrained model finds one of two secrets now and then, so every step changes its weights; except those
of query and key: the answer follows a prompt of one token."""


class FaultyLauncher(Launcher):
    """Starts a trainer that ships wrong weights."""

    fault = ""

    def spawn(self, command: Command) -> None:
        if command.name == "trainer":
            command = replace(command, module=("support_faulty_trainer", self.fault))
        super().spawn(command)


@pytest.mark.parametrize(
    "fault", ["one", *(pytest.param(fault, marks=pytest.mark.nightly) for fault in ("old", "partial"))]
)
def test_wrong_weights_end_the_run_at_that_step_with_the_names_of_the_tensors(
    fault: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    settings = quick_settings(tiny_model, *EASY, "staleness.max_staleness=0", "recipe=grpo", "trainer.steps=8")
    folder = RunFolder(tmp_path / "run")
    launcher = FaultyLauncher(settings, folder, Console(quiet=True))
    launcher.fault = fault
    try:
        with pytest.raises(RunFailed, match="generator-0 does not hold the weights of version 2") as caught:
            launcher.run()
    finally:
        launcher.release()

    message = str(caught.value)
    assert "of the probe as" in message
    assert launcher.crew.child("trainer").process.returncode == 1
    assert not folder.summary.exists()
    # without staleness no token of version 2 can have been trained before generators showed what they hold
    assert len(list(read_rows(folder.metrics))) == FIRST_WRONG
    (event,) = [e for e in read_rows(folder.events) if e["event"] == "canary_failed"]
    names = sorted(load_tensors(tiny_model))
    match fault:
        case "one":
            assert event["tensors"] == [WRONG_TENSOR]
            assert f"1 of {len(names)} tensors differ ({WRONG_TENSOR})" in message
        case "old":
            assert set(event["tensors"]) >= {name for name in names if ".mlp." in name}
            assert "nearest to those of version 1" in message
        case "partial":
            assert set(event["tensors"]) <= set(names[::2])
            assert set(event["tensors"]) >= {name for name in names[::2] if ".mlp." in name}
            assert f"{event['tensors'][0]}, {event['tensors'][1]}" in message


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_an_honest_run_of_two_generators_is_checked_and_never_trips(
    dtype: str, tmp_path: Path, tiny_model: Path
) -> None:
    overrides = ("generator.count=2", f"generator.dtype={dtype}", "staleness.max_staleness=1", "trainer.steps=8")
    folder = train(quick_settings(tiny_model, *EASY, *overrides), tmp_path / "run")
    rows = list(read_rows(folder.metrics))
    canary = json.loads(folder.summary.read_text())["canary"]
    assert canary["unchecked"] == []
    assert canary["checked"] >= 4  # two at the start; generators load the newest, so some versions are skipped
    assert canary["checked"] >= sum(row["canary/checked"] for row in rows)
    assert canary["max_difference"] < (1e-4 if dtype == "float32" else 1.0)
    assert max(row["time/canary"] for row in rows) > 0


ADAPTERS = ("lora.rank=2", "lora.send=adapter", "optimizer.learning_rate=0.02", "recipe=grpo")


@pytest.mark.parametrize("fault", ["adapter", pytest.param("none", marks=pytest.mark.nightly)])
def test_wrong_adapters_end_the_run_at_that_step_with_the_names_of_the_weights(
    fault: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    overrides = (*EASY, *ADAPTERS, "staleness.max_staleness=0", "trainer.steps=8")
    folder = RunFolder(tmp_path / "run")
    launcher = FaultyLauncher(quick_settings(tiny_model, *overrides), folder, Console(quiet=True))
    launcher.fault = fault
    try:
        with pytest.raises(RunFailed, match="generator-0 does not hold the weights of version 2"):
            launcher.run()
    finally:
        launcher.release()
    assert len(list(read_rows(folder.metrics))) == FIRST_WRONG
    (event,) = [e for e in read_rows(folder.events) if e["event"] == "canary_failed"]
    layer = WRONG_ADAPTER.removesuffix(".lora_B.weight") + ".weight"
    if fault == "adapter":
        assert event["tensors"] == [layer]
    else:
        assert layer in event["tensors"]
        assert all("_proj" in name for name in event["tensors"])


@pytest.mark.parametrize("send", ["adapter", pytest.param("merged", marks=pytest.mark.nightly)])
def test_a_run_of_adapters_is_checked_by_the_canary_and_replays_to_the_bit(
    send: str, tmp_path: Path, tiny_model: Path
) -> None:
    overrides = (*EASY, *ADAPTERS, f"lora.send={send}", "trainer.steps=6", "checkpoint.every=3")
    folder = train(quick_settings(tiny_model, *overrides), tmp_path / "run")
    summary = json.loads(folder.summary.read_text())
    assert summary["canary"]["unchecked"] == []
    assert summary["canary"]["max_difference"] < 1e-4
    replayed = replay(folder)
    assert replayed.difference is None
    assert replayed.compared == 7
    (ready,) = [e for e in read_rows(folder.events) if e["event"] == "trainer_ready"]
    whole = sum(4 * t.numel() for t in load_tensors(tiny_model).values())
    assert ready["weights_bytes"] == whole if send == "merged" else ready["weights_bytes"] < whole / 4
