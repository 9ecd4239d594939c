"""Rows that cannot be used: all of them counted, the first ten named in one message, or left out when asked to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from async_rl.errors import UserError
from async_rl.task import make_task

BAD = ['{"prompt": "", "answer": "1"}', "{broken", '{"answer": "1"}', "[1]", '{"prompt": "x", "answer": null}']


def written(folder: Path, bad: int, good: int = 40) -> str:
    """A file whose every third line cannot be used, until there are `bad` of them."""
    lines = []
    for number in range(good):
        if number < bad:
            lines.append(BAD[number % len(BAD)])
        lines.append(json.dumps({"prompt": f"{number}+1?", "answer": str(number + 1)}))
    path = folder / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def refusal(path: str, **args: Any) -> str:
    with pytest.raises(UserError) as caught:
        make_task("dataset", {"path": path, **args})
    return str(caught.value)


def test_all_bad_rows_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    path = written(tmp_path, bad=33)
    message = refusal(path)
    first, *named, last = message.split("\n")
    assert first == f"33 of 73 rows of {path} cannot be used, the first 10:"
    assert [line.split(": ")[0].strip() for line in named] == [f"{path}, line {n}" for n in range(1, 21, 2)]
    assert "field 'prompt' is empty" in named[0]
    assert "not valid JSON" in named[1]
    assert "no field 'prompt'" in named[2]
    assert "a list, not an object" in named[3]
    assert "an answer is text or a number" in named[4]
    assert "task.args.bad_rows=drop" in last
    few = refusal(written(tmp_path, bad=3))
    assert few.startswith(f"3 of 43 rows of {path} cannot be used:\n")


def test_a_field_that_no_row_has_is_told_once(tmp_path: Path) -> None:
    path = written(tmp_path, bad=0)
    message = refusal(path, answer_field="gold")
    assert message == f"{path}, all 40 rows: no field 'gold' (task.args.answer_field); known: answer, prompt"


def test_bad_rows_are_left_out_when_asked_to(tmp_path: Path) -> None:
    good = make_task("dataset", {"path": written(tmp_path, bad=0)})
    wanted = [[p.prompt for p in good.problems(split)] for split in ("train", "eval")]
    path = written(tmp_path, bad=33)
    task = make_task("dataset", {"path": path, "bad_rows": "drop"})
    assert [[p.prompt for p in task.problems(split)] for split in ("train", "eval")] == wanted
    where = task.problems("train")[3].data["where"]
    number = int(where.split("line ")[1])
    assert json.loads(Path(path).read_text().split("\n")[number - 1])["prompt"] in str(task.problems("train")[3].prompt)
    (note,) = task.notes
    assert note.startswith(f"{path}: 33 of 73 rows cannot be used and are left out ({path}, line 1: field 'prompt' is")


def test_nothing_but_bad_rows_is_refused_also_then(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "x", "answer": "1"}\n' * 5)
    message = refusal(str(path), bad_rows="drop")
    assert message.startswith(f"none of the 5 rows of {path} can be used: {path}, line 1: no field 'prompt'")


def test_a_prompt_with_two_answers_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"{i % 30}?", "answer": str(i)} for i in range(33)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert refusal(str(path)).startswith(f"3 of 33 rows of {path} cannot be used:\n  {path}, line 31: the prompt of")
    task = make_task("dataset", {"path": str(path), "bad_rows": "drop", "eval_share": 0})
    assert [p.data["answer"] for p in task.problems("train")] == [str(i) for i in range(30)]


def test_a_bad_row_of_a_table_is_named_with_the_fields_it_has(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": f"{i}?", "answer": None if i == 7 else i, "other": 1} for i in range(20)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=6)
    path = str(tmp_path / "a.parquet")
    assert refusal(path).startswith(f"{path}, row 8: field 'answer' is None")
    assert "did you mean 'other'?" in refusal(path, prompt_field="othr")
    task = make_task("dataset", {"path": path, "bad_rows": "drop", "eval_share": 0})
    assert [p.data["where"] for p in task.problems("train")][6:9] == [f"{path}, row {n}" for n in (7, 9, 10)]
    assert [p.data["answer"] for p in task.problems("train")][6:9] == ["6", "8", "9"]
    assert task.problems("train")[6].data["row"] == {"other": 1}


def test_those_of_the_held_out_file_are_named_too(tmp_path: Path) -> None:
    train = written(tmp_path, bad=0)
    (tmp_path / "b.jsonl").write_text("{broken\n")
    assert f"{tmp_path}/b.jsonl, line 1: not valid JSON" in refusal(train, eval_path=str(tmp_path / "b.jsonl"))


def test_half_of_a_character_is_no_prompt(tmp_path: Path) -> None:
    """JSON can hold it, and no tokenizer takes it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\\ud83d", "answer": "1"}\n{"prompt": "a\\ud83d\\ude00", "answer": "1"}\n')
    assert "line 1: the prompt holds half of a character" in refusal(str(path))
    whole = [f'{{"prompt": "{number}\\ud83d\\ude00", "answer": "1"}}' for number in range(40)]
    path.write_text("\n".join(whole) + "\n")
    assert len(make_task("dataset", {"path": str(path)}).problems("train")) > 20
