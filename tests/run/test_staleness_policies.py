"""Real runs under each staleness policy and under the controller of the depth."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support_run import quick_settings, train

from async_rl.buffer.store import StoreReader
from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.observe.conclusion import length_bias
from async_rl.observe.console import Console
from async_rl.run.launcher import resume_training
from async_rl.run_folder import RunFolder, read_rows

SLOW = """
import asyncio

async def reward(completion, answer, problem):
    # one problem in four takes longer than any batch waits
    await asyncio.sleep(0.6 if answer == "slow" else 0.02)
    return float(len(set(completion)) % 2)
"""


def slow_problems(folder: Path) -> list[str]:
    """Settings of a task in which some problems take much longer than others."""
    (folder / "slow_reward.py").write_text(SLOW)
    rows = [{"prompt": str(i), "answer": "slow" if i % 4 == 1 else "fast"} for i in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "task.name=dataset",
        f"task.args.path={folder / 'rows.jsonl'}",
        "task.args.prompt_field=prompt",
        "task.args.answer_field=answer",
        "task.args.reward=slow_reward:reward",
        "task.args.max_tokens=8",
    ]


def dataset_settings(folder: Path, model: Path, *overrides: str) -> Settings:
    words = slow_problems(folder)
    return quick_settings(model, "task={name: dataset, args: {}}", *words, "trainer.steps=8", *overrides)


@pytest.mark.parametrize("policy", ["drop", pytest.param("wait", marks=pytest.mark.nightly)])
def test_some_slow_problems_under_each_policy(
    policy: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = dataset_settings(tmp_path, tiny_model, f"staleness.policy={policy}", "staleness.max_staleness=2")
    folder = train(settings, tmp_path / "run")
    rows = list(read_rows(folder.metrics))
    assert [row["step"] for row in rows] == list(range(8))
    assert all(row["lag/max"] <= 2 for row in rows)
    summary = json.loads(folder.summary.read_text())
    assert summary["policy"] == policy
    with StoreReader(folder.store) as store:
        groups = [group for group in store.groups() if group.split == "train"]
        trained = [group for group in groups if group.step is not None]
        assert [len(batch.groups) for batch in store.batches()] == [4] * 8
        assert len({group.position for group in trained}) == len(trained) == 32
        stale = {group.group: group for group in groups if group.refused_because is not None}
        if policy != "drop":
            assert not stale
            assert summary["dropped"] == {}
            assert length_bias(summary) == ""
            # every prompt up to the newest is trained or under way
            assert [group.position for group in groups] == list(range(len(groups)))
            return
        assert stale
        assert all((group.refused_because or "").startswith("stale: ") for group in stale.values())
        asked = {(group.position, group.attempt): group for group in groups}
        assert len(asked) == len(groups)
        for group in stale.values():
            again = asked.get((group.position, group.attempt + 1))
            assert again is not None or group.position not in {g.position for g in trained}
            assert again is None or again.problem == group.problem
        assert summary["dropped"]["groups"] == len(stale) >= rows[-1]["drop/groups"] > 0
        assert "groups were dropped as too old" in length_bias(summary)


def test_the_controller_makes_the_pipeline_shallower_and_a_resumed_run_goes_on_with_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    # an ESS that no stale data reaches
    words = ("staleness.max_staleness=3", "staleness.target_ess=0.99999", "trainer.steps=14", "checkpoint.every=12")
    folder = train(quick_settings(tiny_model, *words, "optimizer.learning_rate=2e-3"), tmp_path / "run")
    (event,) = [row for row in read_rows(folder.events) if row["event"] == "depth"]
    assert event["step"] == 9
    assert event["new"] < event["old"]
    assert event["reason"].startswith("the ESS is below")
    depths = [row["staleness/depth"] for row in read_rows(folder.metrics)]
    assert depths[0] == event["old"]
    assert depths[-1] == event["new"]
    folder.summary.unlink()
    resume_training(folder.path, ["trainer.steps=16"], console=Console(quiet=True))
    again = list(read_rows(RunFolder(folder.path).metrics))
    assert [row["step"] for row in again] == list(range(16))
    assert again[-1]["staleness/depth"] == event["new"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("staleness.policy=wait", "staleness.window=0.5"), "staleness.policy=wait has no window"),
        (("staleness.policy=drop", "staleness.window=0"), "staleness.policy=drop has no window"),
        (("staleness.target_ess=0.5", "staleness.max_staleness=0"), "the pipeline is one batch deep whatever the ESS"),
        (("staleness.target_ess=1",), "staleness.target_ess is 1.0; it must be at least 0 and below 1"),
        (("staleness.target_ess=-0.5",), "staleness.target_ess is -0.5; it must be at least 0"),
        (("staleness.policy=fast",), "choose one of pace, wait, drop"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(words: tuple[str, ...], said: str, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=said):
        quick_settings(tiny_model, *words)
