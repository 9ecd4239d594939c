"""Generators that report what they did not do, in real runs: found, quarantined, and what they touched is known."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support_command import Run, run_command, write_config
from support_run import quick_settings

from async_rl.buffer.store import StoreReader
from async_rl.errors import RunFailed
from async_rl.events import GeneratorDied, GeneratorGivenUp, GeneratorQuarantined
from async_rl.instruments.chaos.liar import LIES
from async_rl.model.create import create_model_folder
from async_rl.observe.console import Console
from async_rl.run.launcher import Launcher
from async_rl.run.preflight import Facts
from async_rl.run_folder import RunFolder, read_rows
from async_rl.task import make_task

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def quarantined(folder: RunFolder) -> list[GeneratorQuarantined]:
    return [row.event for row in folder.read_events() if isinstance(row.event, GeneratorQuarantined)]


@pytest.mark.parametrize(
    "lie", [lie if lie == "rewards" else pytest.param(lie, marks=pytest.mark.nightly) for lie in LIES]
)
def test_a_joined_liar_is_quarantined_within_fifty_groups_and_the_run_goes_on(
    tmp_path: Path, tiny_model: Path, lie: str
) -> None:
    """Beside an honest generator, from its first trajectory on."""
    config = write_config(
        tmp_path, tiny_model, "verify.rewards=auto", "trainer.steps=100000", "wire.timeout_s=100",
        "optimizer.warmup_steps=0", "checkpoint.signals=[SIGTERM]",
    )  # fmt: skip
    run = Run(config, RunFolder(tmp_path / "run"), longest_s=120.0)
    try:
        beside_a_liar(run, lie)
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.communicate()


@pytest.mark.nightly
@pytest.mark.parametrize("lie", ["tokens", "log-probs"])
def test_a_trainer_that_is_sharded_over_ranks_finds_it_too(tmp_path: Path, tiny_model: Path, lie: str) -> None:
    """Scoring takes every rank."""
    config = write_config(
        tmp_path, tiny_model, "trainer.ranks=2", "trainer.sharding=full", "trainer.steps=100000", "wire.timeout_s=100",
        "optimizer.warmup_steps=0",
    )  # fmt: skip
    run = Run(config, RunFolder(tmp_path / "run"), longest_s=300.0)
    try:
        beside_a_liar(run, lie)
        rows = list(read_rows(run.folder.metrics))
        assert sum(row["verify/checked"] for row in rows) > 10 * sum(row["verify/skipped"] for row in rows)
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.communicate()


@pytest.mark.nightly
@pytest.mark.xdist_group("vllm")
def test_false_tokens_of_vllm_are_found(tmp_path: Path) -> None:
    """Its seeds prescribe nothing: the tokens themselves have to be implausible."""
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
    model = tmp_path / "model"
    create_model_folder(
        model, alphabet=make_task("guess", {}).alphabet, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32,
        intermediate=64, seed=3,
    )  # fmt: skip
    config = write_config(
        tmp_path, model, "generator.engine=vllm", "trainer.steps=100000", "wire.timeout_s=300", "checkpoint.every=0"
    )
    run = Run(config, RunFolder(tmp_path / "run"), longest_s=600.0)
    try:
        beside_a_liar(run, "tokens", timeout_s=500)
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.communicate()


def beside_a_liar(run: Run, lie: str, *, timeout_s: float = 120) -> None:
    run.wait_for(lambda: (run.folder.path / "metrics.jsonl").is_file(), "the first step")
    command = [sys.executable, "-m", "async_rl.instruments.chaos.liar", str(run.folder.path), "mallory", lie]
    liar = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout_s, check=False)
    assert liar.returncode != 0
    # what old weights sampled that are not held any more looks like false log-probs and tokens
    known = (lie, "log-probs", "tokens") if lie == "versions" else (lie,)
    said = [f"quarantined: mallory reported {name} that are not what it did" for name in known]
    assert any(words in liar.stderr for words in said), liar.stderr
    run.wait_for(lambda: quarantined(run.folder), "the quarantine")
    (found,) = quarantined(run.folder)
    assert found.name == "mallory"
    assert found.lie in known
    assert found.groups_trained + found.groups_refused <= 50
    steps = found.step + 5
    run.wait_for(lambda: len((run.folder.path / "metrics.jsonl").read_text().splitlines()) > steps, "five more steps")
    run.process.terminate()
    assert "QUARANTINED mallory" in run.said()

    with StoreReader(run.folder.store) as store:
        sent = {t.group for t in store.trajectories(split="train") if t.generator == "mallory"}
        groups = {row.group: row for row in store.groups()}
        batches = {batch.step: set(batch.groups) for batch in store.batches()}
    assert not any(sent & members for step, members in batches.items() if step >= found.step)
    refused = [groups[g] for g in sent if (groups[g].refused_because or "").startswith("fabricated: by mallory")]
    assert len(refused) == found.groups_refused
    asked = {(row.position, row.attempt) for row in groups.values()}
    assert all((row.position, row.attempt + 1) in asked for row in refused)
    audit = run_command("audit", run.folder.path, timeout_s=200)
    assert audit.returncode == 0, audit.stdout
    assert f"mallory reported {found.lie}" in audit.stdout


class LyingLauncher(Launcher):
    """Some of its generators lie."""

    lies: dict[int, str]

    def prepare_generator(self, number: int, endpoint: str, facts: Facts) -> None:
        super().prepare_generator(number, endpoint, facts)
        if number in self.lies:
            self.held_back[-1] = replace(self.held_back[-1], module=("support_liar", self.lies[number]))


def launch(settings: Any, path: Path, lies: dict[int, str]) -> RunFolder:
    folder = RunFolder(path)
    launcher = LyingLauncher(settings, folder, Console(quiet=True))
    launcher.lies = lies
    try:
        launcher.run()
    finally:
        launcher.release()
    return folder


@pytest.mark.nightly
def test_the_launchers_own_liar_is_started_again_once_and_then_ends_the_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    settings = quick_settings(tiny_model, "trainer.steps=100000", "evaluation.problems=1")
    with pytest.raises(RunFailed, match="generator-0 is quarantined: it reported log-probs that are not what it did"):
        launch(settings, tmp_path / "run", {0: "log-probs"})
    folder = RunFolder(tmp_path / "run")
    first, second = quarantined(folder)
    assert first.pid != second.pid
    (died,) = [row.event for row in folder.read_events() if isinstance(row.event, GeneratorDied)]
    assert "generator-0 is quarantined" in died.reason


@pytest.mark.nightly
def test_a_run_goes_on_without_a_liar_of_its_own(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    settings = quick_settings(tiny_model, "trainer.steps=150", "generator.count=2", "wire.timeout_s=200")
    folder = launch(settings, tmp_path / "run", {1: "tokens"})
    assert folder.summary.exists()
    assert [event.name for event in quarantined(folder)] == ["generator-1", "generator-1"]
    (left,) = [row.event for row in folder.read_events() if isinstance(row.event, GeneratorGivenUp)]
    assert left.name == "generator-1"
    audit = run_command("audit", folder.path, timeout_s=200)
    assert audit.returncode == 0, audit.stdout
