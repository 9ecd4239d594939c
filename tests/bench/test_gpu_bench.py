"""bench/gpu.py: what it reads off a run, and that a machine without a GPU gets a table that says so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def row(step: int, **changes: float) -> dict[str, float]:
    """A second a step: 0.6 s of training, 0.3 s of waiting, 0.5 s of decoding."""
    return {
        "step": step, "time": float(step), "tokens/generated": 100.0 * step, "tokens/trained": 80.0, "time/step": 0.6,
        "time/wait_for_batch": 0.3, "time/publish": 0.1, "time/generator_busy": 0.5 * step, "lag/mean": 1.0,
        "lag/max": 2.0, **changes,
    }  # fmt: skip


def test_a_run_is_summed_up_behind_its_first_steps() -> None:
    rows = [row(0), row(1, **{"time/step": 50.0}), *(row(step) for step in range(2, 6))]
    rows[3]["kl/mismatch"] = 1e-4
    rows[4]["canary/mean_difference"] = 2e-3
    found = loaded("gpu_sections").summed_up(rows, 2)
    assert found["steps counted"] == 4
    assert found["seconds a step"] == 1.0
    assert (found["tokens/s generated"], found["tokens/s trained"]) == (100, 80)
    assert found["share of time the trainer trains"] == 0.6
    assert found["share of time the trainer waits for data"] == 0.3
    assert found["share of time the generator waits"] == 0.5
    assert found["kl/mismatch: engine against trainer at equal weights"] == 1e-4
    assert found["canary: mean difference of log-probs"] == 2e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_row_is_not_measured(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [sys.executable, str(BENCH / "gpu.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1
    assert "no GPU here" in done.stderr
    rows = [line for line in out.read_text().splitlines() if "not measured" in line]
    assert len(rows) == len(loaded("gpu").LIMITS) + 1


def test_a_call_goes_on_with_what_the_same_device_measured_and_with_nothing_else(tmp_path: Path) -> None:
    gpu = loaded("gpu")

    def table(device: str) -> Any:
        made = gpu.Table(command="", out=None, results=tmp_path)
        made.say("device", device)
        made.resume()
        return made

    table("NVIDIA H100, 80 GB").add("engine", {"tokens/s generated": 1}, seconds=2.0)
    (tmp_path / "trainer.json").write_text('{"section": "trai')  # the loan ended here
    again = table("NVIDIA H100, 80 GB")
    assert again.has("engine")
    assert not again.has("trainer")
    other = table("CPU (a rehearsal)")
    assert not other.has("engine")
    other.add("engine", {"tokens/s generated": 2}, seconds=2.0)
    other.add("trainer", {"not measured": "why"}, seconds=2.0)
    assert table("CPU (a rehearsal)").has("engine")
    assert not table("CPU (a rehearsal)").has("trainer")  # it is tried again
    assert table("NVIDIA H100, 80 GB").has("engine")
    assert "| engine | tokens/s generated | 1 |" in table("NVIDIA H100, 80 GB").text()
    away = gpu.Table(command="", out=None, results=tmp_path)
    away.resume()  # on a machine without a GPU
    assert "| engine | tokens/s generated |" in away.text()


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_rehearsal_measures_every_section_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    gpu, results = loaded("gpu"), tmp_path / "results"
    assert max(gpu.LIMITS.values()) <= 100

    def play(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCH / "gpu.py"), "--fake-model", "--results", str(results), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)

    play("--only", "trainer,head")
    assert {file.stem for file in results.glob("*.json")} == {"model", "trainer", "head"}
    kept = (results / "trainer.json").read_text()
    done = play("--minutes", "8")
    assert {file.stem for file in results.glob("*.json")} == set(gpu.LIMITS)
    assert "not measured" not in "".join(file.read_text() for file in results.glob("*.json"))
    assert (results / "trainer.json").read_text() == kept
    assert all(f"| {section} |" in done.stdout for section in gpu.LIMITS)
