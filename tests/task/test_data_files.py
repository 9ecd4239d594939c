"""Data sets in every kind of file: other programs write them, the task reads the same problems from all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import UserError
from async_rl.task import make_task
from async_rl.task.rows import Lines, csv_rows, json_rows

TEXTS = ["1+1?", 'a, b\nand "c"', "π ≈ 3; \t ' x", "<|im_end|> \u2028", "  spaces  "]
ROWS = [{"prompt": f"{i}: {TEXTS[i % len(TEXTS)]}", "answer": str(i), "level": f"l{i % 3}"} for i in range(60)]
Writer = Callable[[Path], Path]


def problems(path: Path | str, **args: Any) -> list[tuple[Any, Any, Any]]:
    task = make_task("dataset", {"path": str(path), "eval_share": 0, **args})
    return [(p.prompt, p.data["answer"], p.data["row"]) for p in task.problems("train")]


def refusal(path: Path | str, **args: Any) -> str:
    with pytest.raises(UserError) as caught:
        make_task("dataset", {"path": str(path), **args})
    return str(caught.value)


def plain(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / "reference.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- what other programs write


def by_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def by_json_in_an_object(path: Path) -> Path:
    path.write_text(json.dumps({"version": 2, "tags": ["a"], "data": ROWS}))
    return path


def by_json_lines_of_another_name(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    return path


def by_csv(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROWS[0]), dialect="excel-tab" if ".tsv" in path.name else "excel")
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def by_pandas(path: Path) -> Path:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".parquet":
            frame.to_parquet(path, index=False)
        case ".json":
            frame.to_json(path, orient="records")
        case _:
            frame.to_json(path, orient="records", lines=True)
    return path


def by_pyarrow(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=7, compression="zstd")
        return path
    kind = pyarrow.ipc.new_file if "indexed" in path.name else pyarrow.ipc.new_stream
    with kind(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=11)
    return path


def packed(path: Path) -> Path:
    inner = by_csv(path.with_suffix("")) if ".csv" in path.name else plain(path.parent)
    path.write_bytes(gzip.compress(inner.read_bytes()))
    inner.unlink()
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", by_json),
        ("a.json", by_json_in_an_object),
        ("a.json", by_json_lines_of_another_name),
        ("a.ndjson", by_json_lines_of_another_name),
        ("a.csv", by_csv),
        ("a.tsv", by_csv),
        ("a.CSV", by_csv),
        ("p.csv", by_pandas),
        ("p.json", by_pandas),
        ("p.jsonl", by_pandas),
        ("p.parquet", by_pandas),
        ("y.parquet", by_pyarrow),
        ("stream.arrow", by_pyarrow),
        ("indexed.arrow", by_pyarrow),
        ("z.jsonl.gz", packed),
        ("z.csv.gz", packed),
    ],
)
def test_every_kind_of_file_gives_the_same_problems(tmp_path: Path, name: str, write: Writer) -> None:
    reference = problems(plain(tmp_path))
    found = problems(write(tmp_path / name))
    assert len(found) == len(ROWS)
    assert found == reference


def test_what_hugging_faces_package_saves_is_read_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    chat = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": [r["answer"], "x"]} for r in ROWS]
    whole = datasets.Dataset.from_list(chat)
    whole.save_to_disk(tmp_path / "whole", num_shards=3)
    whole.shuffle(seed=1).select(range(25)).save_to_disk(tmp_path / "chosen")
    datasets.DatasetDict({"train": whole.select(range(40)), "test": whole.select(range(40, 60))}).save_to_disk(
        tmp_path / "splits"
    )
    whole.to_parquet(tmp_path / "whole.parquet")
    chosen = [p["prompt"] for p in datasets.load_from_disk(str(tmp_path / "chosen"))]
    monkeypatch.setitem(sys.modules, "datasets", None)

    reference = problems(plain(tmp_path, chat))
    assert problems(tmp_path / "whole") == problems(tmp_path / "whole.parquet") == reference
    assert [prompt for prompt, _, _ in problems(tmp_path / "chosen")] == chosen
    task = make_task("dataset", {"path": str(tmp_path / "splits")})
    assert [p.prompt for p in task.problems("train")] == [prompt for prompt, _, _ in reference[:40]]
    assert [p.prompt for p in task.problems("eval")] == [prompt for prompt, _, _ in reference[40:]]
    assert task.notes == (f"{tmp_path}/splits has splits: train is trained on, test is held out",)
    assert task.problems("eval")[1].data["where"] == f"{tmp_path}/splits/test/data-00000-of-00001.arrow, row 2"
    assert problems(tmp_path / "splits" / "test") == reference[40:]
    (tmp_path / "whole" / "data-00001-of-00003.arrow").unlink()
    assert "state.json names data-00001-of-00003.arrow, which is not there" in refusal(tmp_path / "whole")


def test_chats_in_parts_with_tools_and_arguments_come_back_from_hugging_faces_package(tmp_path: Path) -> None:
    """Arrow gives every object the fields of all others; none of them may reach a chat template."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def tool(number: int) -> dict[str, Any]:
        properties = {"x": {"type": "string"}} if number % 2 else {"y": {"type": "integer", "minimum": 0}}
        return {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}

    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": f"a{i}"}, {"type": "text", "text": "b"}]}],
            "answer": ["1", "2"],
            "tools": [tool(i)],
            "chat_template_kwargs": {"enable_thinking": False},
        }
        for i in range(6)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    task = make_task("dataset", {"path": str(tmp_path / "saved"), "eval_share": 0})
    for row, problem in zip(rows, task.problems("train"), strict=True):
        assert problem.prompt == row["prompt"]
        assert list(problem.tools) == row["tools"]
        assert problem.template_args == {"enable_thinking": False}
        assert problem.data["answer"] == ["1", "2"]


# ---------------------------------------------------------------- folders


def part(path: Path, first: int, last: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[first:last]))


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    reference = problems(plain(tmp_path))
    (tmp_path / "reference.jsonl").unlink()
    part(tmp_path / "d/b.jsonl", 20, 40)
    part(tmp_path / "d/c/part.jsonl", 40, 60)
    part(tmp_path / "d/a.jsonl", 0, 20)
    part(tmp_path / "d/.cache/x.jsonl", 0, 5)
    (tmp_path / "d/README.md").write_text("words")
    (tmp_path / "d/dataset_infos.json").write_text("{}")
    assert problems(tmp_path / "d") == reference
    assert problems(tmp_path / "d/[ab]*.jsonl") == reference[:40]
    assert "no file matches" in refusal(tmp_path / "d/z*.jsonl")


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    part(tmp_path / "d/a.jsonl", 0, 20)
    by_csv(tmp_path / "d/b.csv")
    message = refusal(tmp_path / "d")
    assert "holds files of several kinds, a.jsonl and b.csv" in message
    assert f"{tmp_path}/d/*.jsonl" in message


@pytest.mark.parametrize(
    ("train", "evaluated"),
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"),
        ("train/0.jsonl", "dev/0.jsonl"),
        ("training_set.jsonl", "Eval_set.jsonl"),
    ],
)
def test_files_that_are_called_after_splits_are_the_splits(tmp_path: Path, train: str, evaluated: str) -> None:
    part(tmp_path / "d" / train, 0, 50)
    part(tmp_path / "d" / evaluated, 45, 60)
    task = make_task("dataset", {"path": str(tmp_path / "d")})
    assert len(task.problems("train")) == 45, "those that are evaluated are not trained on"
    assert len(task.problems("eval")) == 15
    assert any("is held out" in note for note in task.notes)
    part(tmp_path / "more.jsonl", 0, 5)
    other = make_task("dataset", {"path": str(tmp_path / "d"), "eval_path": str(tmp_path / "more.jsonl")})
    assert (len(other.problems("train")), len(other.problems("eval"))) == (45, 5)
    assert not any("splits" in note for note in other.notes)
    both = make_task("dataset", {"path": str(tmp_path / "d" / train), "eval_path": str(tmp_path / "d")})
    assert len(both.problems("eval")) == 15


def test_of_several_held_out_splits_the_one_for_validation_is_used(tmp_path: Path) -> None:
    for name, first, last in (("train", 0, 30), ("test", 30, 40), ("validation", 40, 60)):
        part(tmp_path / f"d/{name}.jsonl", first, last)
    task = make_task("dataset", {"path": str(tmp_path / "d")})
    assert len(task.problems("eval")) == 20
    assert "test is not used" in task.notes[0]


def test_a_folder_in_which_nobody_can_tell_what_is_held_out_is_refused(tmp_path: Path) -> None:
    part(tmp_path / "d/algebra.jsonl", 0, 30)
    part(tmp_path / "d/test.jsonl", 30, 60)
    assert "test.jsonl seems to be held out, and " in refusal(tmp_path / "d")
    part(tmp_path / "e/testimony.jsonl", 0, 30)  # no split is called so
    part(tmp_path / "e/train.jsonl", 30, 60)
    assert len(problems(tmp_path / "e")) == 60


# ---------------------------------------------------------------- what is wrong with a file


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"[1, 2", "a.json: not valid JSON"),
        ("a.json", b"3", "a.json: a int; it must hold a list of objects"),
        ("a.json", b'{\n"a": [{"x": 1}], "b": [{"x": 1}]}', "an object with 2 lists of objects"),
        ("a.json", b'{"prompt":\n {"0": "x"}}', "an object with 0 lists of objects"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[7]", "a.json, entry 1: a int, not an object with named fields"),
        ("a.json", b"\xff", "not UTF-8"),
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"prompt,answer\n", "holds no rows"),
        ("a.csv", b"prompt,answer\nx,y\nonly\n", "a.csv, line 3: 1 values, but the header names 2 fields"),
        ("a.csv", b'prompt,answer\n"a\nb",y\n"open,y\n', "a.csv, line 4: not valid CSV"),
        ("a.csv", b"prompt,prompt\nx,y\n", "names the field 'prompt' twice"),
        ("a.csv", b"prompt,answer\n\xff,y\n", "not UTF-8"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.parquet.gz", b"", "ends in '.gz'"),
        ("a.arrow", b"nonsense", "cannot be read as Arrow"),
        ("a", b"x", "ends in ''; it must be a"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert reason in refusal(tmp_path / name)


def test_a_csv_file_with_semicolons_or_chats(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt;answer\nWhat, then?;42\n")
    assert problems(tmp_path / "a.csv", as_chat=False) == [("What, then?", "42", {})]
    chat = [{"role": "user", "content": "Hi, you"}]
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer"), (json.dumps(chat), "[1, 2]"), ("[1] and [2]?", "x")])
    assert [(prompt, answer) for prompt, answer, _ in problems(tmp_path / "b.csv")] == [
        (chat, "[1, 2]"),
        ([{"role": "user", "content": "[1] and [2]?"}], "x"),
    ]


# ---------------------------------------------------------------- arbitrary content

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_csv_rows_are_what_the_csv_module_wrote(cells: list[tuple[str, str]]) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("a", "b"), *cells])
    rows = csv_rows("x.csv", out.getvalue().encode(), "")
    assert [rows.values(i) for i in range(len(rows))] == [{"a": a, "b": b} for a, b in cells]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(TEXT, VALUES, max_size=4), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_json_rows_are_what_the_json_module_wrote(rows: list[dict[str, Any]], ascii_only: bool, blank: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    read: list[Any] = [Lines("x.jsonl", ("\n\n" if blank else "\n").join(lines).encode())]
    read.append(json_rows("x.json", json.dumps(rows).encode()))
    for found in read:
        assert [found.values(i) for i in range(len(found))] == rows
    step = 2 if blank else 1
    assert [read[0].where(i) for i in range(len(rows))] == [f"x.jsonl, line {1 + step * i}" for i in range(len(rows))]
    read[0].keep([len(rows) - 1])
    assert read[0].values(0) == rows[-1]
    assert read[0].where(0) == f"x.jsonl, line {1 + step * (len(rows) - 1)}"


# ---------------------------------------------------------------- the digest


def test_the_digest_changes_with_any_row_of_any_file_and_with_nothing_else(tmp_path: Path) -> None:
    part(tmp_path / "d/train.jsonl", 0, 40)
    part(tmp_path / "d/test.jsonl", 40, 60)

    def digest(**args: Any) -> str:
        return make_task("dataset", {"path": str(tmp_path / "d"), **args}).digest()  # type: ignore[attr-defined]

    first = digest()
    assert first == digest(max_tokens=7)
    (tmp_path / "d").rename(tmp_path / "e")
    (tmp_path / "e").rename(tmp_path / "d")
    assert first == digest()
    for name in ("train.jsonl", "test.jsonl"):
        file = tmp_path / "d" / name
        before = file.read_text()
        file.write_text(before.replace('"level": "l1"', '"level": "l9"', 1))
        assert digest() != first
        file.write_text(before)
    assert digest() == first
