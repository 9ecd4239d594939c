"""What a joining generator may decide itself, and what it is refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support_run import quick_settings

from async_rl.errors import UserError
from async_rl.run.join import local_settings


@pytest.fixture
def told(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run whose keys and data lie elsewhere."""
    settings = quick_settings(
        Path("there/model"), "wire.endpoint=tcp://0.0.0.0:5555", "wire.keys=there/keys", "task=dataset",
        "task.args.path=there/rows.jsonl", "task.args.max_tokens=3",
    )  # fmt: skip
    return asdict(settings)


def test_what_is_not_said_is_the_runs(told: dict[str, Any], tmp_path: Path) -> None:
    settings = local_settings(told, [], "my/keys", tmp_path)
    told["wire"]["keys"] = "my/keys"
    assert asdict(settings) == told


def test_where_things_lie_here_may_differ_and_is_made_absolute(told: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    words = ["model.path=model", "task.args.path=rows.jsonl", "generator.threads=3", "weights.transport=stream"]
    settings = local_settings(told, words, "k", tmp_path)
    assert settings.model.path == str(tmp_path / "model")
    assert settings.task.args["path"] == str(tmp_path / "rows.jsonl")
    assert settings.generator.threads == 3
    assert settings.weights.transport == "stream"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("generator.temperature=0.5", "generator.temperature is the run's (1.0): it says what is generated"),
        ("generator.dtype=bfloat16", "generator.dtype is the run's ('float32')"),
        ("generator.max_turns=3", "generator.max_turns is the run's"),
        ("generator.count=3", "generator.count does nothing here"),
        ("generator.max_restarts=3", "generator.max_restarts does nothing here"),
        ("generator.max_sequences=999", "the run's generators decode at most 256 each"),
        ("generator.max_sequences=2", "less than one group"),
        ("trainer.steps=3", "trainer.steps is the run's"),
        ("recipe=grpo", "recipe is the run's"),
        ("task=guess", "task is the run's"),
        ("task.args.max_tokens=9", "of the task's settings only those that name a file may differ here"),
        ("task.args.path=nowhere.jsonl", "there is no file "),
        ("generator.thread=3", "generator.thread is not a setting; did you mean 'generator.threads'?"),
        ("threads", "'threads' is not a setting; write name=value"),
        ("generator.threads=-1", "generator.threads is -1; it must be at least 0"),
    ],
)
def test_what_would_make_it_another_run_is_refused(
    told: dict[str, Any], tmp_path: Path, word: str, reason: str
) -> None:
    with pytest.raises(UserError) as refused:
        local_settings(told, [word], "k", tmp_path)
    assert reason in str(refused.value)
