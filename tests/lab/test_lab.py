"""A whole lab on a tiny model: side by side, gone on with, and what becomes of a cell that breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support_command import alive, descendants, wait_for

from async_rl.config.schema import structured, to_yaml
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.lab.crew import WorkerPool
from async_rl.instruments.lab.lab import LabFolder, Progress, run_lab
from async_rl.instruments.lab.plan import LabPlan, LabSettings, make_plan
from async_rl.instruments.lab.record import read_curves, read_record


def settings(model: Path, **changes: Any) -> LabSettings:
    base: dict[str, Any] = {
        "name": "a <small> lab",
        "run": {
            "batch": {"groups_per_step": 4, "group_size": 4},
            "trainer": {"steps": 5},
            "generator": {"max_sequences": 64},
        },
        "tasks": {"guess": {"args": {"num_secrets": 8, "max_turns": 3}}},
        "recipes": {"grpo": {}, "vcpo": {}},
        "warm_ups": [str(model)],
        "lags": [0, 3],
        "learning_rates": [1e-3],
    }
    return structured(LabSettings, base | changes, where="")


def run(plan: LabPlan, folder: Path, see: Callable[[Progress], None] = lambda _: None) -> list[str]:
    """Names of the cells that were started."""
    started = []

    def show(progress: Progress) -> None:
        see(progress)
        if progress.kind == "started" and progress.total:
            started.append(progress.name)

    run_lab(plan, folder, workers=1, show=show)
    return started


@pytest.mark.nightly
def test_a_lab_whose_worker_is_killed_loses_one_cell_and_the_next_call_runs_that_one_only(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder, plan = LabFolder(tmp_path / "lab"), make_plan(settings(tiny_model))
    names = [cell.name for cell in plan.cells]
    victim = names[1]

    def kill(progress: Progress) -> None:
        if progress.name == victim and progress.kind == "step" and progress.text == "1":
            for pid in descendants(os.getpid()):
                if b"lab.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    assert run(plan, folder.path, kill) == names
    records = {record["name"]: record for record in json.loads(folder.summary.read_text())["cells"]}
    assert [name for name in names if records[name]["failed"]] == [victim]
    assert "was killed from outside (SIGKILL)" in records[victim]["failed"]
    assert victim in folder.page.read_text()
    assert "a &lt;small&gt; lab" in folder.page.read_text()
    for cell in plan.cells:
        if cell.name != victim:
            found = read_record(folder.record(cell))
            assert found is not None
            assert (found.recipe, found.lag, found.learning_rate) == (cell.recipe, cell.lag, cell.learning_rate)
            assert len(read_curves(folder.record(cell)).steps["ess"]) == 5

    assert run(plan, folder.path) == [victim]
    assert run(plan, folder.path) == []
    summary = json.loads(folder.summary.read_text())
    assert not any(record["failed"] for record in summary["cells"])
    assert {(m["recipe"], m["lag"]) for m in summary["merits"]} == {(r, k) for r in ("grpo", "vcpo") for k in (0, 3)}
    before = {name: records[name] for name in names if name != victim}
    assert before == {r["name"]: r for r in summary["cells"] if r["name"] != victim}, "finished cells are left alone"

    other = make_plan(settings(tiny_model, recipes={"grpo": {}, "vcpo": {"trust": {"cap": 4.0}}}))
    assert run(other, folder.path) == [name for name in names if "vcpo" in name], "a cell of other settings is run"


@pytest.mark.nightly
def test_ctrl_c_ends_a_lab_at_once_and_the_same_command_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "lab.yaml", tmp_path / "out"
    longer = {"trainer": {"steps": 40}, "generator": {"max_sequences": 256}}
    config.write_text(to_yaml(settings(tiny_model, run=longer)))
    command = [sys.executable, "-m", "async_rl", "lab", str(config), "--out", str(out), "--workers", "1"]
    lab = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    cells = LabFolder(out).cells
    wait_for(lambda: list(cells.glob("*.json")) or lab.poll() is not None, "the first cell")
    workers = descendants(lab.pid)
    os.killpg(lab.pid, signal.SIGINT)
    said, _ = lab.communicate(timeout=60)
    assert lab.returncode == 130, said
    assert "finished cells are kept, the same command goes on with the lab" in said
    assert "Traceback" not in said
    wait_for(lambda: not any(alive(pid) for pid in workers), "the workers' end")
    finished = len(list(cells.glob("*.json")))
    assert 0 < finished < 4

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{finished} of 4 cells are finished already" in again.stdout
    assert "of synchronous" in again.stdout
    assert len(list(cells.glob("*.json"))) == 4


def test_a_job_that_cannot_be_done_is_answered_with_its_reason_and_the_next_one_is_done(tmp_path: Path) -> None:
    bad = {"kind": "cell", "name": "bad", "settings": {"modell": {}}, "reward_first": 0.0, "record": {}, "path": ""}
    with WorkerPool(1, tmp_path, 60.0) as crew:
        answers = {a.name: a.failed for a in crew.run([bad, {**bad, "name": "worse", "settings": {}}])}
    assert "modell is not a setting" in answers["bad"]
    assert "no config.json" in answers["worse"]


def test_a_job_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with WorkerPool(1, tmp_path, 0.0) as crew:
        (answer,) = [a for a in crew.run([{"kind": "cell", "name": "slow"}]) if a.kind == "done"]
    assert answer.failed == "it took longer than cell_timeout_s=0"


def test_a_lab_in_which_nothing_can_be_done_fails_with_the_first_reason(tiny_model: Path, tmp_path: Path) -> None:
    """The model is gone between the checks and the cells: every worker finds it missing."""
    gone = tmp_path / "gone"
    gone.mkdir()
    for file in tiny_model.iterdir():
        (gone / file.name).write_bytes(file.read_bytes())

    def take_away(progress: Progress) -> None:
        if progress.kind == "started" and progress.total:
            (gone / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(RunFailed, match=r"every cell failed; the first: .*model\.safetensors is missing"):
        run(make_plan(settings(gone, recipes={"grpo": {}}, lags=[0])), tmp_path / "lab", take_away)


def test_a_folder_that_is_no_lab_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no lab's folder"):
        run(make_plan(settings(tiny_model)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
