"""The package from Python: one real short run, and everything that can be asked of it."""

from __future__ import annotations

import doctest
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support_command import alive, descendants, wait_for

import async_rl as ar
from async_rl.config.from_python import override_words, settings_from
from async_rl.config.schema import to_yaml
from async_rl.run_folder import RunFolder, read_rows

QUICK: dict[str, Any] = {
    "name": "api",
    "task": {"name": "guess", "args": {"num_secrets": 8, "max_turns": 3}},
    "recipe": "grpo",
    "batch": {"groups_per_step": 4, "group_size": 4},
    "trainer.steps": 3,
    "optimizer": {"warmup_steps": 2, "learning_rate": 1e-3},
    "evaluation": {"problems": 4, "samples": 1},
    "wire": {"timeout_s": 60},
}


def quick(model: Path) -> dict[str, Any]:
    return QUICK | {"model": {"path": model}}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ar.Run:
    """A finished run of three steps."""
    return ar.train(quick(tiny_model), run_dir=tmp_path_factory.mktemp("api") / "run", quiet=True)


def test_the_package_imports_no_torch_until_it_is_needed() -> None:
    script = (
        "import sys, async_rl as ar; public = set(ar.__all__) - {'Columns', 'Coefficients', 'RecipeFunction'}\n"
        "[getattr(ar, name) for name in public]\n"
        "print('torch' in sys.modules); ar.Columns; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_every_public_name_is_there_and_says_what_it_is_for() -> None:
    assert sorted(ar.__all__) == ar.__all__
    assert set(ar.__all__) <= set(dir(ar))
    for name in ar.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(ar, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = ar.Trainer  # type: ignore[attr-defined]


def test_the_examples_in_the_docstrings_are_true() -> None:
    from async_rl import api
    from async_rl.config import from_python

    assert doctest.testmod(api).failed == doctest.testmod(from_python).failed == 0


def test_a_finished_run_tells_everything_about_itself(run: ar.Run) -> None:
    assert run.finished
    assert repr(run) == f"Run('{run.path}': finished: 3 of 3 steps)"
    assert run.settings.recipe["name"] == "grpo"
    assert run.summary["steps"] == 3
    assert run.metrics.column("step") == [0, 1, 2]
    assert all(0 <= reward <= 1 for reward in run.metrics.column("reward/mean"))
    assert [row["event"] for row in run.events if row["event"] == "evaluation"] == ["evaluation"] * 2
    assert [path.name for path in run.checkpoints] == ["step_000003"]
    trained = [row for row in run.trajectories if row["step"] is not None]
    assert len(trained) == 3 * 4 * 4
    group = run.group(trained[0]["group"])
    assert [t.sample for t in group] == [0, 1, 2, 3]
    assert all(len(t.tokens) == len(t.log_behaviour) for t in group)


def test_rows_become_tables(run: ar.Run) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    for rows in (run.metrics, run.events, run.trajectories):
        frame, table = rows.to_pandas(), rows.to_arrow()
        assert list(frame.columns) == table.column_names == rows.names
        assert len(frame) == table.num_rows == len(rows)
    assert run.metrics.to_pandas()["reward/mean"].tolist() == run.metrics.column("reward/mean")


def test_values_of_mixed_types_become_text_in_an_arrow_table() -> None:
    pytest.importorskip("pyarrow")
    table = ar.Rows([{"a": 1}, {"a": [2]}, {}]).to_arrow()
    assert table["a"].to_pylist() == ["1", "[2]", None]


def test_a_table_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pandas", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ar.UserError, match="pip install pandas"):
        ar.Rows().to_pandas()
    with pytest.raises(ar.UserError, match="pip install pyarrow"):
        ar.Rows().to_arrow()


def test_a_run_is_evaluated_reported_and_audited(run: ar.Run, tmp_path: Path) -> None:
    evaluation = run.evaluate(evaluation={"problems": 2, "samples": 3})
    assert len(evaluation.episodes) == 6
    assert evaluation.model == str(run.checkpoints[-1])
    assert 0 <= evaluation.reward <= 1
    assert evaluation.failed == ()
    page = run.report(tmp_path / "page.html")
    assert page.read_text().startswith("<!doctype html>")
    audit = run.audit()
    assert audit.groups_trained == 12
    assert not audit.violations


def test_evaluation_works_where_an_event_loop_runs_already(run: ar.Run) -> None:
    import asyncio

    async def notebook() -> ar.Evaluation:
        return run.evaluate(evaluation={"problems": 1, "samples": 1})

    assert len(asyncio.run(notebook()).episodes) == 1


def test_a_run_goes_on_where_it_ended(run: ar.Run) -> None:
    inputs = run.path / "inputs.json"
    inputs.write_text(json.dumps(json.loads(inputs.read_text()) | {"problems": "of others"}))
    with pytest.raises(ar.UserError, match=r'go on with it as it is now: accept_changed="problems"$'):
        run.resume(quiet=True, trainer={"steps": 4})
    with pytest.raises(ar.UserError, match='accept_changed="data": nothing of that has changed'):
        run.resume(quiet=True, trainer={"steps": 4}, accept_changed=["problems", "data"])
    with pytest.raises(ar.UserError, match="accept_changed is for resume"):
        ar.train(QUICK, accept_changed="data")
    again = run.resume(quiet=True, trainer={"steps": 4}, accept_changed="problems")
    assert again.path == run.path
    assert again.metrics.column("step") == [0, 1, 2, 3]
    with pytest.raises(ar.UserError, match="leave config and run_dir out"):
        ar.train(QUICK, resume=run.path)


def test_settings_are_the_same_from_a_file_a_mapping_and_settings(tiny_model: Path, tmp_path: Path) -> None:
    words = override_words({"trainer": {"steps": 7}, "recipe": {"name": "vcpo", "ess": {"reference": 0.5}}})
    made, _ = settings_from(quick(tiny_model), words)
    assert made.trainer.steps == 7
    assert made.recipe == {"name": "vcpo", "ess": {"reference": 0.5}}
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(settings_from(quick(tiny_model))[0]))
    assert settings_from(file, words)[0] == made
    assert settings_from(made)[0] == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"stepz": 3}}, "did you mean 'trainer.steps'"),
        ({"trainer": {"steps": 0}}, "trainer.steps is 0; it must be at least 1"),
        ({"task": {"name": "guess", "more": 1}}, "as a mapping it holds name and args"),
        ({"recipe": "gpro"}, "'gpro' is not a recipe"),
        ({"recipe": lambda columns: columns}, "lambda"),
        ({"name": object()}, "a setting is a number, text"),
        ({"reward": "numeric"}, "task.args.reward is not a setting"),
    ],
)
def test_what_is_wrong_is_said_without_frames_of_ours(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ar.UserError, match=message) as caught:
        ar.train(quick(tiny_model), run_dir=tmp_path / "run", quiet=True, **changes)
    assert len(caught.traceback) == 2  # this test and the border of the API
    assert caught.value.__cause__ is None
    assert not (tmp_path / "run").exists()


def test_a_config_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ar.UserError, match="name a config"):
        ar.train()
    with pytest.raises(ar.UserError, match="config is a int"):
        ar.train(3)  # type: ignore[arg-type]
    with pytest.raises(ar.UserError, match="is not a run folder"):
        ar.Run(tmp_path)


def test_a_run_that_broke_off_has_no_summary(run: ar.Run, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "begun")
    folder.create(run.settings)
    begun = ar.Run(folder.path)
    assert not begun.finished
    assert begun.checkpoints == ()
    with pytest.raises(ar.UserError, match="has no summary: broke off"):
        _ = begun.summary


OWN = '''
import json, os, sys
import async_rl as ar
from dataclasses import dataclass

class Echo(ar.Task):
    """Say the digit."""
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        digits: int = 10

    def problems(self, split):
        return [ar.Problem(index=i, prompt="?", data={"digit": str(i)}) for i in range(self.settings.digits)]

    async def rollout(self, problem, session):
        return float(problem.data["digit"] in await session.generate(max_tokens=2))

config = json.loads(sys.argv[1]) if sys.argv[1:] else {}  # the processes of the run import this file as well
run = ar.train(config, task={"name": Echo, "args": {"digits": 5}}, run_dir="run", quiet=True)
print(json.dumps([os.getpid(), run.settings.task.name, run.settings.task.args, run.summary["steps"]]))
'''


def test_a_script_needs_no_guard_around_its_training(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(OWN)
    config = json.dumps({name: value for name, value in quick(tiny_model).items() if name != "task"}, default=str)
    done = subprocess.run([sys.executable, script, config], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last[1:] == [f"{script}:Echo", {"digits": 5}, 3]
    assert done.stdout.count('"digits"') == 1


def test_a_class_of_an_interactive_session_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = json.dumps(quick(tiny_model), default=str)
    words = f"import json, sys, async_rl as ar\nclass Mine(ar.Task): pass\nar.train(json.loads({config!r}), task=Mine)"
    done = subprocess.run([sys.executable, "-c", words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "UserError: Mine is defined in no file" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_ends_everything_and_is_a_keyboard_interrupt(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text(
        f"import async_rl as ar, json\nconfig = json.loads({json.dumps(quick(tiny_model), default=str)!r})\n"
        "try:\n    ar.train(config, run_dir='run', trainer={'steps': 100000})\n"
        "except KeyboardInterrupt as stop:\n    print('STOPPED', stop, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    metrics = RunFolder(tmp_path / "run").metrics
    wait_for(lambda: list(read_rows(metrics)), "the first step")
    children = descendants(process.pid)
    assert len(children) >= 3
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "STOPPED SIGINT; everything is down; ar.Run('run').resume() goes on with the run" in out
    time.sleep(0.1)
    assert not [pid for pid in children if alive(pid)]
