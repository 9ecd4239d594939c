"""Rows of a chat reach the template with all their fields, from JSONL and Parquet, or are refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support_tokenizers import CHAT, byte_folder

from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer, problem_text
from async_rl.run.preflight import check_fit
from async_rl.task import Task, make_task
from async_rl.task.dataset import Dataset

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
WIND = {"type": "function", "function": {"name": "get_wind", "parameters": {"kind": "object"}}}
SHOWS_ALL = "{{ tools | tojson }}{{ mood }}{% for m in messages %}{{ m | tojson }}{% endfor %}"


def chat(number: int) -> list[dict[str, Any]]:
    asked = {"city": "Rome"} if number % 2 else {"place": "Oslo"}
    call = {"type": "function", "id": "c1", "function": {"name": "get_weather", "arguments": asked}}
    return [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "31 C", "name": "get_weather", "tool_call_id": "c1"},
        {"role": "user", "content": [{"type": "text", "text": f"Is that hot? ({number})"}]},
    ]


def rows(**more: Any) -> list[dict[str, Any]]:
    return [{"prompt": chat(i), "tools": [WEATHER, WIND], "answer": "yes"} | more for i in range(30)]


def dataset(folder: Path, rows: list[dict[str, Any]], ending: str = "jsonl", **args: Any) -> Task:
    path = folder / f"data.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        for row in rows:  # Arrow has one type for the content of all messages
            for message in row["prompt"]:
                if not isinstance(message["content"], str):
                    message["content"] = message["content"][0]["text"]
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return make_task("dataset", {"path": str(path), "eval_share": 0.3} | args)


def test_messages_keep_all_their_fields(tmp_path: Path) -> None:
    task = dataset(tmp_path, rows())
    found = {str(problem.prompt) for split in ("train", "eval") for problem in task.problems(split)}
    assert found == {str(chat(i)) for i in range(30)}
    assert all(problem.tools == [WEATHER, WIND] for problem in task.problems("train"))


def test_what_arrow_fills_in_does_not_reach_the_template(tmp_path: Path) -> None:
    task = dataset(tmp_path, rows(), "parquet")
    for problem in [*task.problems("train"), *task.problems("eval")]:
        number = int(problem.prompt[3]["content"].split("(")[1].rstrip(")"))  # type: ignore[index]
        assert list(problem.prompt[:3]) == chat(number)[:3]
        assert problem.tools == [WEATHER, WIND]


@pytest.mark.parametrize("tools", [json.dumps([WEATHER]), [WEATHER]])
@pytest.mark.parametrize("given", [{"mood": "good"}, json.dumps({"mood": "good"})])
def test_tools_and_arguments_of_rows_and_of_the_task_reach_the_template(tmp_path: Path, tools: Any, given: Any) -> None:
    tokenizer = Tokenizer(byte_folder(tmp_path, template=SHOWS_ALL))
    of_rows = dataset(tmp_path, rows(tools=tools, chat_template_kwargs=given), template_args={"mood": "bad"})
    text = problem_text(of_rows.problems("train")[0], tokenizer)
    assert text.startswith(json.dumps([WEATHER]) + "good")
    of_task = dataset(tmp_path, rows(tools=tools), template_args={"mood": "bad"})
    assert problem_text(of_task.problems("train")[0], tokenizer).startswith(json.dumps([WEATHER]) + "bad")


def test_a_row_that_the_template_cannot_show_is_named_however_rare(tmp_path: Path) -> None:
    plain = [{"prompt": f"{i}?", "answer": "yes"} for i in range(2000)]
    plain[1234] = {"prompt": chat(0), "answer": "yes"}
    task = dataset(tmp_path, plain)
    with pytest.raises(UserError, match=r"data\.jsonl, line 1235: .*shows no tool_calls"):
        check_fit(task, Tokenizer(byte_folder(tmp_path, template=CHAT)), 0)
    with pytest.raises(UserError, match=r"data\.jsonl, line 1235: .*'tool_calls' of message 2 needs"):
        check_fit(task, Tokenizer(byte_folder(tmp_path, template=None)), 0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [{"role": "user", "content": None}]}, "line 1.*message 1: 'content' must be text"),
        ({"prompt": [{"role": "user"}]}, "message 1: 'content' must be text"),
        ({"prompt": [{"content": "x"}]}, "message 1: 'role' must be text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 1.*of type 'image_url'"),
        ({"prompt": [{"role": "user", "content": [3]}]}, "a part of 'content' must be text or an object, it is 3"),
        ({"prompt": [{"role": "assistant", "content": "", "tool_calls": "x"}]}, "'tool_calls' must be a list"),
        ({"prompt": "x", "tools": "a hammer"}, "field 'tools' is 'a hammer', not a list of tools"),
        ({"prompt": "x", "chat_template_kwargs": [1]}, "not an object with arguments"),
    ],
)
def test_a_row_of_another_form_is_refused_by_line(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        dataset(tmp_path, [row | {"answer": "1"}])


def test_a_prompt_that_is_given_as_it_is_has_no_tools(tmp_path: Path) -> None:
    row = {"prompt": "x", "tools": [WEATHER], "answer": "1"}
    with pytest.raises(UserError, match=r"line 1: field 'tools' is for the chat template.*as_chat=true"):
        dataset(tmp_path, [row], as_chat=False)
    assert isinstance(dataset(tmp_path, [row], as_chat=False, tools_field="", eval_share=0.0), Dataset)


def test_other_tools_make_another_problem(tmp_path: Path) -> None:
    same = {"prompt": chat(0), "answer": "yes"}
    task = dataset(tmp_path, [same | {"tools": [WEATHER]}, same | {"tools": [WIND]}, same], eval_share=0.0)
    assert len(task.problems("train")) == 3
