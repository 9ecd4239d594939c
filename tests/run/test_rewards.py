"""Named parts, group rewards and failing rewards in runs of real processes, a generator of which is killed."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from pathlib import Path

import pytest
from support_command import Run, run_command, write_config

from async_rl.buffer.store_reader import StoreReader
from async_rl.observe.audit import audit_run
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import unpack

TASK = '''
    """Guess, with a judge of whole groups and a reward that fails on some problems."""
    import asyncio
    from async_rl.task.guess import Guess

    class Judged(Guess):
        async def rollout(self, problem, session):
            reward = await super().rollout(problem, session)
            if problem.index % 5 == 1 and session.turn > 1 and session.split == "train":
                raise KeyError("gold")
            return {"guess": reward, "turns": session.turn, "never": None}

        async def reward_group(self, problem, samples):
            await asyncio.sleep(0.01)
            shortest = min(s.total_tokens for s in samples)
            return [{"size": len(samples), "longer": float(s.total_tokens - shortest)} for s in samples]
'''


def episodes(folder: RunFolder) -> list[Trajectory]:
    with StoreReader(folder.store) as store:
        groups = [row.group for row in store.groups()]
        return [unpack(blob) for blob in store.load_groups(groups)]


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "judged_task.py").write_text(textwrap.dedent(TASK))
    monkeypatch.chdir(tmp_path)
    return write_config(
        tmp_path, tiny_model, "task.name=judged_task.py:Judged", "task.args.num_secrets=8", "task.args.max_turns=3",
        "task.reward_weights.guess=2", "task.reward_weights.size=0", "task.reward_weights.longer=-0.01",
        "task.reward_weights.turns=0", "evaluation.samples=3", "generator.count=2", "trainer.steps=40",
        "generator.save_turns_after_s=0.1", "wire.timeout_s=30",
    )  # fmt: skip


@pytest.mark.nightly
def test_a_killed_generator_leaves_whole_groups_and_every_view_has_the_parts(tmp_path: Path, config: Path) -> None:
    run = Run(config, RunFolder(tmp_path / "run"))
    run.wait_for(lambda: len(list(read_rows(run.folder.metrics))) > 3, "some steps")
    os.kill(run.pid("generator-0"), signal.SIGKILL)
    run.wait_for_event("generator_died")
    said = run.said()
    assert run.process.returncode == 0, said
    assert not audit_run(run.folder).violations

    made = episodes(run.folder)
    judged = [t for t in made if not t.failed]
    failed = [t for t in made if t.failed]
    assert judged
    assert {t.reason for t in failed if t.ended == "error"} == {"KeyError: 'gold' (judged_task.py:10 rollout)"}
    bad = {t.group for t in failed}
    for t in judged:
        size = 4 if t.split == "train" else 3
        if t.group not in bad:
            assert t.info["reward/size"] == size, "the judge saw the whole group"
        parts = {name.removeprefix("reward/"): v for name, v in t.info.items() if name.startswith("reward/")}
        assert set(parts) == {"guess", "turns", "size", "longer"}
        assert t.reward == pytest.approx(2 * parts["guess"] - 0.01 * parts["longer"])

    rows = list(read_rows(run.folder.metrics))
    for row in rows:
        assert row["reward/mean"] == pytest.approx(2 * row["reward/guess/mean"] - 0.01 * row["reward/longer/mean"])
    told = [row for row in rows if row.get("episodes/failed")]
    assert told
    assert all(row["episodes/failure"].startswith("KeyError: 'gold'") for row in told)
    assert "failed: KeyError: 'gold' (judged_task.py:10 rollout)" in said
    assert ", guess 0." in said, "the line of the evaluation has the parts"
    summary = json.loads(run.folder.summary.read_text())
    assert set(summary["failures"]) == {"KeyError: 'gold' (judged_task.py:10 rollout)"}
    assert summary["failures"].popitem()[1] == summary["trajectories_failed"]


def test_the_evaluation_of_a_folder_judges_groups_and_has_the_parts(config: Path) -> None:
    done = run_command("eval", config, "evaluation.problems=2")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["parts"]["size"] == 3.0
    assert told["trajectories"] == 6
    assert told["reward"] == pytest.approx(2 * told["parts"]["guess"] - 0.01 * told["parts"]["longer"])


def test_a_misspelt_weight_ends_the_run_before_it_trains(config: Path, tmp_path: Path) -> None:
    done = run_command("run", config, "task.reward_weights.gues=1", "--run-dir", tmp_path / "wrong")
    assert done.returncode == 1
    assert "task.reward_weights names 'gues', which the reward did not return; did you mean 'guess'?" in done.stderr
    assert "Traceback" not in done.stderr
