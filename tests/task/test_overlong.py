"""Prompts that leave no room for an answer are decided on once, before anything starts, and alike in all processes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_run import quick_settings
from support_tokenizers import CHAT, byte_folder

from async_rl.config import Settings
from async_rl.config.schema import load_yaml, structured, to_yaml
from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer, problem_tokens
from async_rl.run.fitting import PromptMeasure, fit_prompts
from async_rl.run.preflight import preflight, task_digest
from async_rl.run.resume import resumed_settings
from async_rl.run_folder import RunFolder
from async_rl.task import Problem, Task, make_task
from async_rl.task.splitting import Overlong

CONTEXT, ANSWER = 300, 40
LIMIT = CONTEXT - ANSWER


def rows(*, chat: bool = True, count: int = 120) -> list[dict[str, Any]]:
    """Questions of 0 to 500 characters, so that about half of them are too long. What is asked stands at the end."""
    random = Random(1)
    found = []
    for number in range(count):
        text = "é" * random.randrange(250) + f" {number}+1?"
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        found.append({"prompt": said if chat else text, "answer": str(number + 1)})
    return found


def settings_for(folder: Path, given: list[dict[str, Any]], **args: Any) -> tuple[Settings, Task, Tokenizer]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    model = byte_folder(folder / "model", template=CHAT)
    values = {"path": str(path), "max_tokens": ANSWER, "eval_share": 0.3, **args}
    task = {"name": "dataset", "args": values}
    settings = structured(Settings, {"model": {"path": str(model)}, "task": task}, where="")
    return settings, make_task("dataset", values), Tokenizer(model)


def prompts(task: Task) -> dict[str, list[Any]]:
    return {split: [p.prompt for p in task.problems(split)] for split in ("train", "eval")}  # type: ignore[arg-type]


def too_long(task: Task, tokenizer: Tokenizer) -> dict[str, set[int]]:
    """By the definition: every prompt written as the model gets it, and counted."""
    return {
        split: {p.index for p in task.problems(split) if len(problem_tokens(p, tokenizer)) > LIMIT}  # type: ignore[arg-type]
        for split in ("train", "eval")
    }


def test_they_are_refused_with_their_number_the_longest_and_the_first(tmp_path: Path) -> None:
    settings, task, tokenizer = settings_for(tmp_path, rows())
    wrong = too_long(task, tokenizer)
    first = min(p.data["where"] for p in [task.problems("train")[min(wrong["train"])]])
    longest = max(len(problem_tokens(p, tokenizer)) for s in ("train", "eval") for p in task.problems(s))  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        fit_prompts(settings, task, tokenizer, CONTEXT)
    count = sum(map(len, wrong.values()))
    assert str(caught.value).startswith(
        f"{count} prompts have more than {LIMIT} tokens (the longest {longest}; first: {first}), which leaves no room"
    )
    assert "task.args.overlong to drop or truncate_left" in str(caught.value)


@pytest.mark.parametrize("chat", [True, False])
def test_they_are_dropped_in_every_process_and_after_a_resume_alike(tmp_path: Path, chat: bool) -> None:
    settings, task, tokenizer = settings_for(tmp_path, rows(chat=chat), overlong="drop", as_chat=chat)
    wrong = too_long(task, tokenizer)
    assert all(len(found) > 10 for found in wrong.values())
    fitted, used, (note,) = fit_prompts(settings, task, tokenizer, CONTEXT)
    left = {split: [p for i, p in enumerate(found) if i not in wrong[split]] for split, found in prompts(task).items()}
    assert prompts(used) == left
    assert f"{sum(map(len, wrong.values()))} prompts have more than {LIMIT} tokens" in note
    assert "are left out (task.args.overlong=drop)" in note
    # what the other processes and a resumed run get is the settings, without the tokenizer
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(fitted))
    for again in (fitted, structured(Settings, load_yaml(file), where="")):
        assert prompts(make_task(again.task.name, again.task.args)) == left
    folder = RunFolder(tmp_path / "run")
    folder.create(fitted)
    resumed = resumed_settings(folder, [])
    assert prompts(make_task(resumed.task.name, resumed.task.args)) == left
    assert [p.index for p in used.problems("train")] == list(range(len(left["train"])))
    assert task_digest(used, tokenizer) == task_digest(make_task("dataset", fitted.task.args), tokenizer)


@pytest.mark.parametrize("chat", [True, False])
def test_shortened_ones_fit_keep_their_end_and_what_stands_around(tmp_path: Path, chat: bool) -> None:
    settings, task, tokenizer = settings_for(tmp_path, rows(chat=chat), overlong="truncate_left", as_chat=chat)
    wrong = too_long(task, tokenizer)
    fitted, used, (note,) = fit_prompts(settings, task, tokenizer, CONTEXT)
    assert "lose the beginning of their longest message" in note
    for split in ("train", "eval"):
        for before, after in zip(task.problems(split), used.problems(split), strict=True):
            tokens = len(problem_tokens(after, tokenizer))
            if before.index not in wrong[split]:
                assert after == before
                continue
            assert 0.9 * LIMIT <= tokens <= LIMIT, "not much more is taken away than needed"
            old, new = (p.prompt if isinstance(p.prompt, str) else p.prompt[-1]["content"] for p in (before, after))
            assert old.endswith(new)
            assert new.endswith(f" {int(after.data['answer']) - 1}+1?")
            if chat:
                assert after.prompt[0] == before.prompt[0]
            assert after.data == before.data
    again = make_task("dataset", fitted.task.args)
    assert prompts(again) == prompts(used)


def test_prompts_that_fit_change_nothing(tmp_path: Path) -> None:
    settings, task, tokenizer = settings_for(tmp_path, [r for r in rows() if len(r["prompt"][1]["content"]) < 60])
    assert fit_prompts(settings, task, tokenizer, CONTEXT) == (settings, task, [])


def test_only_those_that_may_be_too_long_are_tokenised(tmp_path: Path) -> None:
    _, task, tokenizer = settings_for(tmp_path, rows(), overlong="drop")
    asked: list[Problem] = []

    class Counting(PromptMeasure):
        def tokens(self, problems: Any) -> list[int]:
            asked.extend(problems)
            return super().tokens(problems)

    found = task.fit(Counting(tokenizer=tokenizer), CONTEXT)
    assert found is not None
    shortest = min(len(problem_tokens(p, tokenizer)) for p in asked)
    assert shortest > LIMIT - 150, "a token is at least a byte: most short prompts need no tokenizer"
    assert len(asked) < 110


def test_a_measure_counts_what_the_run_will_write(tmp_path: Path) -> None:
    """Also where the text of a control token is data, and where a text begins with tokens of its own."""
    _, _, tokenizer = settings_for(tmp_path, rows())
    texts = ["x", "<|im_end|>" * 3, "é", "a <|im_start|> b"]
    given: list[Any] = [*texts, *([{"role": "user", "content": text}] for text in texts)]
    problems = [Problem(index=i, prompt=prompt) for i, prompt in enumerate(given)]
    assert PromptMeasure(tokenizer=tokenizer).tokens(problems) == [len(problem_tokens(p, tokenizer)) for p in problems]


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    settings, task, tokenizer = settings_for(tmp_path, rows(), max_tokens=CONTEXT)
    with pytest.raises(UserError, match=r"max_tokens is 300, which leaves no room for a prompt in a context of 300"):
        fit_prompts(settings, task, tokenizer, CONTEXT)
    long = [{"prompt": [{"role": "user", "content": "x" * 200}] * 3, "answer": "1"}, *rows(count=40)]
    settings, task, tokenizer = settings_for(tmp_path, long, overlong="truncate_left", eval_share=0)
    with pytest.raises(UserError, match=r"line 1: the prompt has more than 260 tokens without its longest message"):
        fit_prompts(settings, task, tokenizer, CONTEXT)
    every = [{"prompt": "x" * (400 + i), "answer": "1"} for i in range(40)]
    settings, task, tokenizer = settings_for(tmp_path, every, overlong="drop")
    with pytest.raises(UserError, match="every prompt of the train split has more than 260 tokens"):
        fit_prompts(settings, task, tokenizer, CONTEXT)
    args = settings.task.args | {"overlong_rows": "train 99999"}
    with pytest.raises(UserError, match="the rows are not those that the run began with"):
        make_task("dataset", args)
    with pytest.raises(UserError, match="overlong_rows is 'nonsense'; a run writes it itself"):
        make_task("dataset", args | {"overlong_rows": "nonsense"})


def test_before_a_run_and_in_doctor_but_not_for_a_resumed_run(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "1" * (20 + i), "answer": "1"}) + "\n" for i in range(40)))
    args = f"{{path: {path}, max_tokens: 16, as_chat: false}}"
    threads = ("trainer.threads=1", "trainer.lanes=1", "generator.threads=1")  # else a start chooses them
    settings = quick_settings(tiny_model, "task=dataset", f"task.args={args}", "generator.max_context=64", *threads)
    with pytest.raises(UserError, match="prompts have more than 48 tokens"):
        preflight(settings)
    facts = preflight(quick_settings(tiny_model, "task=dataset", f"task.args={args}", "generator.max_context=64",
                                     "task.args.overlong=drop"))  # fmt: skip
    assert facts.settings.task.args["overlong_rows"].startswith("train ")
    assert facts.train_problems < 30
    assert any("are left out (task.args.overlong=drop)" in note for note in facts.notes)
    assert preflight(settings, resumed=True).settings == settings, "an older run keeps the prompts that it began with"


FOUND = st.dictionaries(
    st.sampled_from(["train", "eval"]),
    st.dictionaries(st.integers(0, 10**6), st.integers(0, 10**5), min_size=1, max_size=20),
)


@given(FOUND)
def test_what_is_written_is_read_back(found: dict[str, dict[int, int]]) -> None:
    assert Overlong.read(Overlong(found=found).write()).found == found
