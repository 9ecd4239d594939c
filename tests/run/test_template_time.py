"""A date in the chat template is chosen once a run, and kept with it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support_run import quick_settings

from async_rl.config import Settings
from async_rl.config.schema import load_yaml, structured, to_yaml
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.preflight import preflight, task_digest, with_template_time
from async_rl.run.resume import resumed_settings
from async_rl.run_folder import RunFolder
from async_rl.task import make_task

DATED = "{{ strftime_now('%H%M') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def dated(tmp_path: Path, tiny_model: Path) -> Path:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


def test_it_is_written_into_the_runs_settings_and_told(dated: Path, tmp_path: Path) -> None:
    settings = with_template_time(quick_settings(dated))
    assert settings.model.template_time
    assert any(settings.model.template_time in note for note in preflight(settings).notes)
    again = with_template_time(settings)
    assert again == settings, "a run keeps it"
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(settings))
    assert structured(Settings, load_yaml(file), where="") == settings
    folder = RunFolder(tmp_path / "run")
    folder.create(settings)
    assert with_template_time(resumed_settings(folder, [])).model.template_time == settings.model.template_time


def test_processes_that_start_at_other_times_have_the_same_prompts(dated: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}", "answer": "1"}}\n' for i in range(40)))
    task = make_task("dataset", {"path": str(rows)})
    settings = replace(quick_settings(dated).model, template_time="2026-01-31T23:59")
    digests = {task_digest(task, Tokenizer.of(settings)) for _ in range(2)}
    assert len(digests) == 1
    later = replace(settings, template_time="2026-02-01T00:00")
    assert task_digest(task, Tokenizer.of(later)) not in digests


def test_a_template_without_a_date_needs_none(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model)
    assert with_template_time(settings) == settings
    missing = replace(settings, model=replace(settings.model, path="/nowhere"))
    assert with_template_time(missing) == missing, "preflight says what is wrong"


def test_whether_it_is_asked_for_is_seen_without_the_tokenizer(dated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.model.tokenizer.read_file", None)  # a large one takes a second
    assert with_template_time(quick_settings(dated)).model.template_time
