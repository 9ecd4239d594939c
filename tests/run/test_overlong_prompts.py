"""A run whose data set holds prompts that are too long: every process asks the same ones, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path

from support_run import quick_settings, train

from async_rl.buffer.store_reader import StoreReader
from async_rl.config.schema import load_yaml
from async_rl.observe.audit import audit_run
from async_rl.observe.console import Console
from async_rl.run.launcher import resume_training


def test_they_are_left_out_by_generators_trainer_audit_and_a_resumed_run(tmp_path: Path, tiny_model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "1" * (2 + 2 * i), "answer": "1"}) + "\n" for i in range(60)))
    args = f"{{path: {rows}, max_tokens: 8, as_chat: false, overlong: drop}}"
    settings = quick_settings(
        tiny_model, "task=dataset", f"task.args={args}", "generator.max_context=64", "trainer.steps=3",
        "evaluation.problems=2", "checkpoint.every=1",
    )  # fmt: skip
    folder = train(settings, tmp_path / "run")
    kept = load_yaml(folder.config)["task"]["args"]["overlong_rows"]
    assert kept.startswith("train ")
    resume_training(folder.path, ["trainer.steps=6"], console=Console(quiet=True))
    assert load_yaml(folder.config)["task"]["args"]["overlong_rows"] == kept
    with StoreReader(folder.store) as store:
        lengths = [start for _, start in _prompts(store)]
        assert len(lengths) >= 6 * 16
        assert store.failures() == []
    assert max(lengths) <= 64 - 8
    assert not audit_run(folder).violations


def _prompts(store: StoreReader) -> list[tuple[str, int]]:
    """(split, tokens of the prompt) of every trajectory."""
    from async_rl.trajectory.codec import unpack

    found = []
    for group in store.groups():
        for content in store.load_groups([group.group]):
            trajectory = unpack(content)
            found.append((str(trajectory.split), int(trajectory.turns[0].start)))
    return found
