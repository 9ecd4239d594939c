"""What a rehearsal replaces, and that it replaces nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from async_rl.config import Settings, load_settings
from async_rl.config.schema import values_of
from async_rl.errors import UserError
from async_rl.instruments.rehearsal import (
    RULES,
    StandIns,
    changes_table,
    family_of,
    missing,
    prepare_rehearsal,
    shrink,
    write_tiny_model,
)
from async_rl.model.folder import check_folder
from async_rl.model.tokenizer import Tokenizer, prompt_text
from async_rl.run.preflight import preflight
from async_rl.task import make_task

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MATH = CONFIGS / "eight_gpu_math.yaml"
FILES = StandIns(model=Path("fake/model"), data={"path": Path("fake/path.jsonl")})


def values(settings: Settings) -> dict[str, object]:
    return values_of(settings)


def test_the_table_names_every_setting_that_differs_and_no_other() -> None:
    settings = load_settings(MATH)
    made, changes = shrink(settings, [], FILES)
    was, now = values(settings), values(made)
    differing = {path for path in was if was[path] != now[path]} - {"task.args"}
    assert {c.path for c in changes} == differing | {"task.args.path"}
    assert all((c.was, c.now) == (was[c.path], now[c.path]) for c in changes if not c.path.startswith("task."))
    assert all(c.why for c in changes)
    assert len(changes_table(changes).splitlines()) == len(changes)


def test_recipe_staleness_and_what_makes_a_group_stay() -> None:
    settings = load_settings(MATH, ["staleness.policy=drop", "staleness.window=0.3", "recipe.trust.cap=3"])
    made, _ = shrink(settings, [], FILES)
    assert made.recipe == settings.recipe
    assert made.staleness == settings.staleness
    assert made.optimizer.learning_rate == settings.optimizer.learning_rate
    assert made.batch.group_size == 8
    args = made.task.args
    assert (made.task.name, args["name"]) == ("rehearsed", "dataset")
    assert args["args"] == settings.task.args | {"path": "fake/path.jsonl"}


def test_words_win_over_what_would_be_replaced_unless_it_is_not_here() -> None:
    words = ["trainer.steps=9", "batch.groups_per_step=32", "model.path=models/Qwen3-8B", "vllm.memory_share=0.5"]
    made, changes = shrink(load_settings(MATH, words), words, FILES)
    assert (made.trainer.steps, made.batch.groups_per_step) == (9, 32)
    assert made.model.path == "fake/model"
    assert "trainer.steps" not in {c.path for c in changes}
    assert {c.path: c.why for c in changes}["vllm.memory_share"] == "embedded engine"


def test_a_word_that_contradicts_the_rehearsal_is_refused_with_its_name() -> None:
    words = ["generator.max_sequences=4"]
    with pytest.raises(UserError, match=r"generator\.max_sequences"):
        shrink(load_settings(MATH, ["batch.group_size=4", *words]), ["batch.group_size=16", *words], FILES)


def test_every_rule_is_for_a_setting() -> None:
    known = set(values(Settings()))
    assert set(RULES) <= known, set(RULES) - known


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("models/Qwen2.5-7B", "qwen2"),
        ("models/Qwen2-1.5B", "qwen2"),
        ("Qwen3-0.6B", "qwen3"),
        ("x/Llama-3.1-8B", "llama"),
        ("Mistral-7B-v0.3", "mistral"),
        ("models/gemma-9b", "qwen3"),
    ],
)
def test_the_family_is_guessed_by_name_when_the_model_is_not_here(path: str, family: str) -> None:
    assert family_of(path)[0] == family


def test_the_family_of_a_model_that_is_here_is_read(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "Qwen3-but-not", "Mistral-7B", seed=0)
    assert family_of(str(tmp_path / "Qwen3-but-not")) == ("mistral", False)


def test_the_tiny_model_is_a_whole_folder_that_reads_and_writes_any_text(tmp_path: Path) -> None:
    config = write_tiny_model(tmp_path / "m", "Qwen2.5-7B", seed=0)
    assert check_folder(tmp_path / "m") == config
    assert config.qkv_bias
    tokenizer = Tokenizer(tmp_path / "m")
    text = "Wieviel ist 3 + ½? \\boxed{…}\n<tool>日本</tool>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("é") == [int(i) for i in tokenizer.encode("é")]
    assert len(tokenizer.encode("é")) == 2
    assert prompt_text([{"role": "user", "content": "hi"}], tokenizer) == "user: hi\nassistant: "


def test_missing_data_are_made_in_the_format_the_task_names(tmp_path: Path) -> None:
    settings = load_settings(CONFIGS / "one_gpu.yaml")
    rehearsal = prepare_rehearsal(settings, [], tmp_path / "files")
    task = make_task(rehearsal.settings.task.name, rehearsal.settings.task.args)
    assert len(task.problems("train")) == len(task.problems("eval")) == 64
    keys = {split: {str(p.prompt) for p in task.problems(split)} for split in ("train", "eval")}
    assert not keys["train"] & keys["eval"]
    assert "no such file here" in rehearsal.describe()


def test_data_that_are_here_are_used(tmp_path: Path) -> None:
    settings = load_settings(CONFIGS / "word_problems.yaml", ["model.path=models/Qwen3-0.6B"])
    rehearsal = prepare_rehearsal(settings, [], tmp_path / "files")
    assert rehearsal.settings.task.args["args"] == settings.task.args


def test_a_rehearsal_of_a_rehearsal_is_refused(tmp_path: Path) -> None:
    rehearsal = prepare_rehearsal(load_settings(MATH), [], tmp_path / "files")
    with pytest.raises(UserError, match="leave --fake-model out"):
        prepare_rehearsal(rehearsal.settings, [], tmp_path / "again")


@pytest.mark.parametrize("form", ["plain", "verl", "dapo", "gsm8k", "openai", "sharegpt"])
def test_missing_data_are_made_in_the_form_that_the_config_names(tmp_path: Path, form: str) -> None:
    (tmp_path / "c.yaml").write_text(
        f"task: {{name: dataset, args: {{path: {tmp_path}/gone.parquet, format: {form}, reward: numeric}}}}\n"
    )
    settings = load_settings(tmp_path / "c.yaml", needs_model=False)
    assert settings.model.path == "", "a rehearsal needs none"
    rehearsal = prepare_rehearsal(settings, [], tmp_path / "files")
    task = make_task(rehearsal.settings.task.name, rehearsal.settings.task.args)
    problem = task.problems("train")[0]
    left, right = re.findall(r"\d+", str(problem.prompt))[-2:]
    assert problem.data["answer"] == str(int(left) + int(right))
    with pytest.raises(UserError, match=r"model\.path is not set"):
        load_settings(tmp_path / "c.yaml")


def test_data_of_a_pattern_are_here_when_a_file_matches(tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl").write_text('{"prompt": "x", "answer": "1"}\n')
    assert missing({"path": f"{tmp_path}/train-*.jsonl", "eval_path": f"{tmp_path}/test-*.jsonl"}) == ["eval_path"]


def test_prompts_that_are_too_long_in_bytes_are_shortened_in_a_rehearsal(tmp_path: Path) -> None:
    """The model's own tokenizer would make fewer tokens of them."""
    rows = [json.dumps({"prompt": "x" * 20_000 + f" {i}+1?", "answer": str(i + 1)}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "c.yaml").write_text(
        f"task: {{name: dataset, args: {{path: {tmp_path}/a.jsonl, max_tokens: 32768}}}}\n"
    )
    rehearsal = prepare_rehearsal(load_settings(tmp_path / "c.yaml", needs_model=False), [], tmp_path / "files")
    facts = preflight(rehearsal.settings)
    task = make_task(facts.settings.task.name, facts.settings.task.args)
    problem = task.problems("train")[0]
    assert len(str(problem.prompt)) < 16_384
    assert f"{int(problem.data['answer']) - 1}+1?" in str(problem.prompt)
