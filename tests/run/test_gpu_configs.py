"""The configs for GPUs, as far as they go without one: loaded, checked, and played through with --fake-model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support_command import CONFIGS, run_command

from async_rl.config import load_settings
from async_rl.objective.conflicts import check_effect
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.run.placement import Heads, Machine, place
from async_rl.run_folder import RunFolder, read_rows

GPUS = {"one_gpu": 1, "two_gpu": 2, "eight_gpu_math": 8, "eight_gpu_tools": 8, "stress_k128": 8}
GPU_CONFIGS = tuple(GPUS)


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_it_loads_and_its_recipe_acts_in_it(name: str) -> None:
    settings = load_settings(CONFIGS / f"{name}.yaml")
    recipe = load_recipe(settings.recipe)
    check_effect(
        recipe,
        group_size=settings.batch.group_size,
        updates_per_batch=settings.updates.epochs * settings.updates.minibatches,
        max_staleness=settings.staleness.max_staleness,
        has_critic=requirements(recipe).value,
        single_turn=settings.task.name == "dataset",
    )
    machine = Machine(gpus=tuple(str(i) for i in range(GPUS[name])), cores=tuple(range(64)))
    placement = place(settings, machine, Heads(query=28, key_value=4))
    assert len(placement.generators) == settings.generator.count
    assert len(placement.ranks) == settings.trainer.ranks
    used = {gpu for spot in (*placement.generators, *placement.ranks) for gpu in spot.gpus}
    assert used == set(range(GPUS[name]))
    assert settings.generator.engine == "vllm"
    assert settings.name == name.replace("_", "-")


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_its_head_says_what_it_needs_and_how_it_is_started(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    head = text[: text.index("\nname:")]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in ("GPU", f"async-rl run configs/{name}.yaml", "--fake-model"):
        assert word in head


def test_the_stress_is_the_eight_gpu_config_with_another_bound() -> None:
    math, stress = (load_settings(CONFIGS / f"{name}.yaml") for name in ("eight_gpu_math", "stress_k128"))
    assert (math.staleness.max_staleness, stress.staleness.max_staleness) == (10, 128)
    for group in ("model", "task", "batch", "recipe", "generator", "vllm", "trainer", "optimizer"):
        assert getattr(math, group) == getattr(stress, group)


@pytest.mark.parametrize(
    "name", ["one_gpu", *(pytest.param(name, marks=pytest.mark.nightly) for name in GPU_CONFIGS[1:])]
)
def test_it_runs_to_its_end_with_a_fake_model(name: str, tmp_path: Path) -> None:
    words = ["trainer.steps=3", "generator.count=1", "checkpoint.every=2"]
    run = tmp_path / "run"
    done = run_command("run", CONFIGS / f"{name}.yaml", "--fake-model", "--run-dir", run, *words, timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert "Replaced (setting: was -> is)" in done.stdout
    folder = RunFolder(run)
    settings = load_settings(CONFIGS / f"{name}.yaml")
    made = folder.settings()
    assert made.recipe == settings.recipe
    assert made.staleness == settings.staleness
    rows = list(read_rows(folder.metrics))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["grad/norm"] > 0 for row in rows)
    assert all(0 <= row["lag/max"] <= settings.staleness.max_staleness for row in rows)
    assert json.loads(folder.summary.read_text())["steps"] == 3


def test_a_fake_model_is_not_given_to_a_run_that_has_one(tmp_path: Path) -> None:
    done = run_command("run", "--resume", tmp_path, "--fake-model")
    assert done.returncode == 2
    assert "--fake-model cannot be given with --resume" in done.stderr


def test_sampling_that_would_bias_ratios_is_refused_with_the_reason() -> None:
    done = run_command("config", CONFIGS / "one_gpu.yaml", "generator.top_p=0.9")
    assert done.returncode == 2
    assert "generator.top_p does not exist" in done.stderr
    assert "biases every ratio" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path, tiny_model: Path) -> None:
    words = [f"model.path={tiny_model}", "--run-dir", tmp_path / "run"]
    done = run_command("run", CONFIGS / "one_gpu.yaml", *words)
    assert done.returncode == 2
    assert "generator.device is 'cuda'" in done.stderr
    assert "--fake-model" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_refused_with_ways_to_get_one() -> None:
    done = run_command("run", CONFIGS / "eight_gpu_math.yaml")
    assert done.returncode == 2
    assert "hf download" in done.stderr
    assert "--fake-model" in done.stderr


@pytest.mark.nightly
def test_doctor_looks_at_a_rehearsal() -> None:
    done = run_command("doctor", CONFIGS / "one_gpu.yaml", "--fake-model", "--json", timeout_s=120)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["log-probs"]["level"] == "ok"
    assert "qwen3" in found["model"]["said"]
    assert found["preflight"]["level"] == "ok"
