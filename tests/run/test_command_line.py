"""The command line without a run: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support_command import write_config
from support_run import quick_settings

from async_rl.cli.main import main
from async_rl.errors import UserError
from async_rl.events import EvaluationReported
from async_rl.instruments.replay import _check_ranks
from async_rl.observe.console import HEADER, Console, evaluation_line, step_line
from async_rl.run_folder import RowTail, RunFolder, append_row
from async_rl.trainer.manifest import checkpoint_path, write_whole

ROW = {
    "step": 7, "time": 20.0, "reward/mean": 0.5, "lag/mean": 0.75, "lag/max": 1.0, "ess/ratio": 0.9,
    "lr/effective": 0.0004, "lr/base": 0.0005, "grad/norm": 0.25, "tokens/trained": 3000.0, "time/step": 1.0,
    "time/wait_for_batch": 0.5, "slots/used": 8.0, "slots/all": 8.0,
}  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("walk",), "invalid choice: 'walk'"),
        (("run",), "name a YAML file of settings, or --resume RUN"),
        (("run", "x.yaml", "--trainer.steps=3"), "(settings are written without dashes)"),
        (("run", "--resume", "nowhere"), "nowhere is not a run folder"),
        (("config", "none.yaml"), "none.yaml: no such file"),
        (("recipes", "vcop"), "recipe.name 'vcop' is not a recipe; did you mean 'vcpo'?"),
        (("recipes", "vcpo", "trust.cpa=1"), "did you mean 'recipe.trust.cap'?"),
        (("init-model", "m", "--task", "gues"), "task.name 'gues' is not a task; did you mean 'guess'?"),
        (("init-model", "m", "--task", "dataset"), "task.args.path is not set"),
        (("init-model", "m", "--arg", "num_secret=3"), "did you mean 'task.args.num_secrets'?"),
        (("init-model", "m", "--until", "2"), "--until is 2.0; it is a success rate"),
        (("init-model", "m", "--heads", "3"), "--heads 3 must be a multiple of --kv-heads 2"),
        (("init-model", "m", "--hidden", "0"), "--hidden is 0; it must be at least 1"),
        (("init-model", "m", "--learning-rate", "nan"), "--learning-rate is nan; it must be above 0"),
        (("init-model", "m", "--max-context", "8"), "takes up to 20 tokens, the context holds 8"),
        (("replay", "nowhere"), "nowhere is not a run folder"),
    ],
)
def test_a_wrong_command_is_refused_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    words: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_whose_schedule_is_laid_out_is_not_told_to_take_more_steps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_config(run, tiny_model, "optimizer.schedule=linear", "trainer.steps=10")
    (run / "summary.json").write_text('{"steps": 10}')
    newest = checkpoint_path(RunFolder(run).checkpoints, 10)
    write_whole(newest, lambda folder: None)
    said = refused(capsys, "run", "--resume", str(run))
    assert f"is finished (10 steps); start a new run from its last checkpoint, model.path={newest}" in said
    said = refused(capsys, "run", "--resume", str(run), "trainer.steps=20")
    assert f"laid out over 10 steps; start a new run from its last checkpoint, model.path={newest}" in said


def test_a_trainer_of_several_ranks_is_said_and_its_replay_refused_with_what_works(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    console = Console()
    console.start(quick_settings(tiny_model, "trainer.ranks=2", "trainer.sharding=full"), tmp_path, [])
    console.stop()
    assert "buffer + trainer (2 ranks, sharding full)" in capsys.readouterr().out
    for first, remedy in ((0, "last bits; `rescore`"), (3, "`replay --until 3` does the steps before it, `rescore`")):
        folder = RunFolder(tmp_path / str(first))
        folder.path.mkdir()
        append_row(folder.metrics, {"step": first, "ranks/step_skew": 1.0})
        with pytest.raises(UserError, match=remedy):
            _check_ranks(folder, 9)


def test_init_model_leaves_an_existing_folder_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert "exists already; remove it or choose another folder" in refused(capsys, "init-model", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_settings_may_stand_before_and_behind_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    config = str(write_config(tmp_path, tiny_model))
    said = printed(capsys, "config", config, "trainer.steps=7", "--yaml", "recipe=grpo")
    assert "steps: 7" in said
    assert "name: grpo" in said


def test_the_printed_settings_run_as_they_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    first = printed(capsys, "config", str(write_config(tmp_path, tiny_model)), "--yaml")
    (tmp_path / "again.yaml").write_text(first)
    assert printed(capsys, "config", str(tmp_path / "again.yaml"), "--yaml") == first


def test_a_pipe_that_is_closed_early_gives_no_traceback() -> None:
    """As in `async-rl recipes | head -0`."""
    command = [sys.executable, "-m", "async_rl", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


# ------------------------------------------------------------------------------------------ terminal


def test_the_columns_of_a_step_stand_under_their_names() -> None:
    line = step_line(ROW, {**ROW, "time": 18.0})
    top = HEADER.splitlines()[0]
    for name, shown in (("reward", "0.500"), ("ESS", "0.900"), ("learning", "0.800"), ("gradient", "0.250")):
        assert line[: top.index(name) + len(name)].endswith(shown), name
    assert line.index("trainer for data 25%") == top.index("who waits for whom")
    assert line.endswith("1500     2.00")


def test_who_waits_is_said_as_it_is() -> None:
    busy, before = {**ROW, "time/wait_for_batch": 0.0}, {**ROW, "time": 18.0}
    assert "generators for slots" in step_line(busy, before)
    assert "nobody" in step_line({**busy, "slots/used": 5.0}, before)


def test_an_evaluation_says_when_and_under_which_weights() -> None:
    event = EvaluationReported(evaluation=0, step=0, reward=0.25, trajectories=8, version_min=0, version_max=0)
    assert evaluation_line(event) == "held-out reward 0.250 before training (8 episodes, weights 0)"
    later = replace(event, step=4, version_min=4, version_max=5)
    assert evaluation_line(later) == "held-out reward 0.250 after 4 steps (8 episodes, weights 4 to 5)"


def test_rows_are_read_once_and_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    tail = RowTail(path)
    assert tail.new() == []
    append_row(path, {"a": 1})
    append_row(path, {"a": 2})
    assert tail.new() == [{"a": 1}, {"a": 2}]
    with path.open("a") as file:
        file.write('{"a": ')
    assert tail.new() == []
    with path.open("a") as file:
        file.write("3}\n")
    assert tail.new() == [{"a": 3}]
    assert tail.new() == []
