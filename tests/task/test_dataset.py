import json
import subprocess
import sys
from pathlib import Path

import pytest
from support_session import END, ScriptedSession, play

from async_rl.errors import UserError
from async_rl.task import make_task
from async_rl.task.reward import RewardError

ROOT = Path(__file__).parents[2]


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(n: int) -> list[object]:
    return [{"prompt": f"{i}+1?", "answer": str(i + 1), "level": i % 3} for i in range(n)]


def refusal(path: str | Path, **args: object) -> str:
    with pytest.raises(UserError) as caught:
        make_task("dataset", {"path": str(path), **args})
    return str(caught.value)


def test_a_row_becomes_a_chat_problem_with_its_answer_and_other_fields(tmp_path: Path) -> None:
    task = make_task("dataset", {"path": write(tmp_path / "a.jsonl", sums(50)), "system": "Be short."})
    problem = task.problems("train")[0]
    assert problem.prompt == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": problem.prompt[1]["content"]},
    ]
    assert problem.data["answer"] == str(int(problem.prompt[1]["content"].split("+")[0]) + 1)
    assert set(problem.data["row"]) == {"level"}
    assert [p.index for p in task.problems("train")] == list(range(len(task.problems("train"))))


def test_a_text_prompt_can_be_given_as_it_is(tmp_path: Path) -> None:
    task = make_task("dataset", {"path": write(tmp_path / "a.jsonl", sums(50)), "as_chat": False})
    assert isinstance(task.problems("train")[0].prompt, str)


def test_messages_are_kept_and_their_own_system_message_wins(tmp_path: Path) -> None:
    mine = [{"role": "system", "content": "mine"}, {"role": "user", "content": "1+1?"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": mine, "answer": 2}])
    task = make_task("dataset", {"path": path, "system": "other", "eval_share": 0})
    assert task.problems("train")[0].prompt == mine
    assert task.problems("train")[0].data["answer"] == "2"
    assert len(task.problems("eval")) == 0


def test_an_episode_is_one_turn_and_its_reward(tmp_path: Path) -> None:
    args = {"path": write(tmp_path / "a.jsonl", sums(50)), "reward": "numeric", "max_tokens": 20, "stop": ["\n"]}
    task = make_task("dataset", args)
    problem = task.problems("train")[3]
    answer = problem.data["answer"]
    right, wrong = ScriptedSession([f"It is {answer}.\nAnd 1" + END]), ScriptedSession(["It is none" + END])
    assert (play(task, problem, right), play(task, problem, wrong)) == (1.0, 0.0)
    assert right.transcript.endswith(f"It is {answer}.\n")
    assert right.turns[0].max_tokens == 20


def test_a_reward_that_fails_surfaces_from_the_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_reward_for_test.py").write_text("def f(completion, answer, problem): return float('nan')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write(tmp_path / "a.jsonl", sums(50))
    task = make_task("dataset", {"path": path, "reward": "failing_reward_for_test:f"})
    with pytest.raises(RewardError, match="returned nan"):
        play(task, task.problems("train")[0], ScriptedSession(["x"]))


def test_an_answer_nobody_can_judge_in_time_earns_nothing_and_is_noted(tmp_path: Path) -> None:
    from async_rl.task.reward import Reward, VerdictTimeout

    def never(completion: str, answer: str, problem: object) -> float:
        raise VerdictTimeout("no verdict within 5 s")

    task = make_task("dataset", {"path": write(tmp_path / "a.jsonl", sums(50))})
    task.reward = Reward("math", never)
    session = ScriptedSession(["x"])
    assert play(task, task.problems("train")[0], session) == 0.0
    assert session.notes == {"reward_timeout": 1.0}


def test_the_split_depends_on_the_prompt_alone(tmp_path: Path) -> None:
    def held_out(rows: list[object]) -> set[str]:
        task = make_task("dataset", {"path": write(tmp_path / "a.jsonl", rows), "eval_share": 0.2, "as_chat": False})
        train, evaluated = ({p.prompt for p in task.problems(split)} for split in ("train", "eval"))
        assert not train & evaluated
        assert len(train | evaluated) == len(rows)
        return evaluated

    small, large = held_out(sums(300)), held_out(list(reversed(sums(600))))
    assert small < large
    assert 30 < len(small) < 90


def test_an_eval_file_is_the_eval_split_and_its_rows_are_not_trained_on(tmp_path: Path) -> None:
    path, eval_path = write(tmp_path / "a.jsonl", sums(20)), write(tmp_path / "b.jsonl", sums(5))
    task = make_task("dataset", {"path": path, "eval_path": eval_path})
    assert (len(task.problems("train")), len(task.problems("eval"))) == (15, 5)
    assert [note for note in task.notes if f"5 rows also stand in {eval_path}" in note]
    assert "b.jsonl, line 1" in refusal(path, eval_path=eval_path, duplicates="error")


def test_repeated_prompts(tmp_path: Path) -> None:
    same = write(tmp_path / "same.jsonl", [*sums(30), *sums(2)])
    task = make_task("dataset", {"path": same, "eval_share": 0})
    assert len(task.problems("train")) == 30
    assert task.notes == (f"{same}: 2 rows repeat a prompt and are left out",)
    assert len(make_task("dataset", {"path": same, "eval_share": 0, "duplicates": "keep_all"}).problems("train")) == 32
    assert "line 31: the same prompt as" in refusal(same, duplicates="error")
    other = write(tmp_path / "other.jsonl", [*sums(30), {"prompt": "0+1?", "answer": "7"}])
    message = refusal(other)
    assert "line 31" in message
    assert "line 1 with another answer" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"prompt": "x", "answer"', "not valid JSON"),
        (b"[1, 2]", "a list, not an object"),
        (b'"text"', "a str, not an object"),
        (b'{"promt": "x", "answer": "y"}', "no field 'prompt' (task.args.prompt_field); did you mean 'promt'?"),
        (b'{"prompt": "x"}', "no field 'answer'"),
        (b'{"prompt": "", "answer": "y"}', "field 'prompt' is empty"),
        (b'{"prompt": 3, "answer": "y"}', "a prompt is text or a list of chat messages"),
        (b'{"prompt": [], "answer": "y"}', "an empty list"),
        (b'{"prompt": ["x"], "answer": "y"}', "message 1: 'x' is not an object"),
        (b'{"prompt": [{"role": "user"}], "answer": "y"}', "message 1: 'content' must be text"),
        (b'{"prompt": "x", "answer": null}', "an answer is text or a number"),
        (b'{"prompt": "x", "answer": true}', "an answer is text or a number"),
        (b'{"prompt": "x", "answer": "  "}', "field 'answer' is empty"),
        (b'{"prompt": "\xff", "answer": "y"}', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n\n' + line + b"\n")
    message = refusal(path)
    assert f"{path}, line 3" in message
    assert expected in message


def test_numeric_answers_are_checked_when_the_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": "many"}])
    assert "line 1: field 'answer' is 'many', which holds no number" in refusal(path, reward="numeric")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    assert "task.args.path is not set" in refusal("")
    assert "there is no file nowhere.jsonl (relative paths start at" in refusal("nowhere.jsonl")
    assert "holds no file that ends in .jsonl, .json," in refusal(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "holds no rows" in refusal(tmp_path / "empty.jsonl")
    (tmp_path / "a.xlsx").write_text("prompt,answer")
    assert "ends in '.xlsx'; it must be a .jsonl, .json, .csv," in refusal(tmp_path / "a.xlsx")
    good = write(tmp_path / "good.jsonl", sums(5))
    assert "task.args.eval_path: there is no file" in refusal(good, eval_path="gone.jsonl")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"eval_share": 1.0}, "task.args.eval_share"),
        ({"eval_share": 0.0001}, "none of the 5 rows"),
        ({"max_tokens": 0}, "task.args.max_tokens"),
        ({"stop": [""]}, "task.args.stop"),
        ({"answer_field": ""}, "task.args.answer_field is empty"),
        ({"reward": "exat"}, "did you mean 'exact'"),
        ({"duplicates": "none"}, "task.args.duplicates"),
        ({"prompt_feild": "x"}, "did you mean 'task.args.prompt_field'"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, args: dict[str, object], expected: str) -> None:
    assert expected in refusal(write(tmp_path / "a.jsonl", sums(5)), **args)


def test_relative_paths_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "here.jsonl", sums(50))
    monkeypatch.chdir(tmp_path)
    assert make_task("dataset", {"path": "here.jsonl"}).problems("train")


def test_a_byte_order_mark_and_line_separators_inside_text_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b", "answer": "1"}\r\n'.encode())
    task = make_task("dataset", {"path": str(path), "eval_share": 0, "as_chat": False})
    assert task.problems("train")[0].prompt == "a\u2028b"


def test_parquet_gives_the_same_problems_as_jsonl(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": i} for i in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    one = make_task("dataset", {"path": str(tmp_path / "a.parquet")})
    other = make_task("dataset", {"path": write(tmp_path / "a.jsonl", rows)})
    for split in ("train", "eval"):
        same = zip(one.problems(split), other.problems(split), strict=True)
        for a, b in same:
            assert (a.prompt, a.data["answer"], a.data["row"]) == (b.prompt, b.data["answer"], b.data["row"])
    assert f"{tmp_path / 'a.parquet'}, all 40 rows: no field 'question'" in refusal(
        tmp_path / "a.parquet", prompt_field="question"
    )
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nonsense")
    assert "cannot be read as Parquet" in refusal(tmp_path / "broken.parquet")


def test_parquet_without_pyarrow_names_the_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in refusal(tmp_path / "a.parquet")


# ---------------------------------------------------------------- the example in configs/data


def test_the_example_dataset_loads_with_hundreds_of_rows() -> None:
    task = make_task("dataset", {"path": str(ROOT / "configs/data/word_problems.jsonl"), "reward": "numeric"})
    train, evaluated = task.problems("train"), task.problems("eval")
    assert len(train) >= 200
    assert len(evaluated) >= 20
    problem = evaluated[0]
    assert play(task, problem, ScriptedSession([f"The answer is {problem.data['answer']}."])) == 1.0


def test_the_example_dataset_is_what_its_script_makes(tmp_path: Path) -> None:
    made = tmp_path / "made.jsonl"
    script = ROOT / "configs/data/make_word_problems.py"
    subprocess.run([sys.executable, str(script), str(made)], check=True, timeout=60)
    assert made.read_bytes() == (ROOT / "configs/data/word_problems.jsonl").read_bytes()
