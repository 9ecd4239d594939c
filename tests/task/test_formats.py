"""Rows as known data sets have them: verl's Parquet, DAPO-Math-17k, GSM8K, fine-tuning files of OpenAI and ShareGPT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_session import END, ScriptedSession, play

from async_rl.errors import UserError
from async_rl.task import Task, make_task
from async_rl.task.chat import text_of
from async_rl.task.dataset_settings import DatasetSettings
from async_rl.task.fields import Field
from async_rl.task.layout import Layout
from async_rl.task.rows import BadRow, Lines

WEATHER = {"name": "get_weather", "description": "Weather of a city.", "parameters": {"type": "object"}}

# the fields and values that verl's examples/data_preprocess/gsm8k.py writes
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "Natalia sold 48 clips. How many? Let's think step by step."}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"split": "train", "index": 0, "answer": "48 + 24\n#### 72", "question": "Natalia sold 48 clips."},
}
# a row of DAPO-Math-17k
DAPO = {
    "data_source": "math_dapo",
    "prompt": [
        {
            "content": "Solve the following math problem step by step. The last line of your response should be of the "
            "form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 17 + 17?\n\n"
            'Remember to put your answer on its own line after "Answer:".',
            "role": "user",
        }
    ],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
GSM8K = {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24 in May.\n48+24 = 72 altogether.\n#### 72"}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris"},
    ]
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Weather in Rome?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": '{"degrees": 31}'},
        {"from": "gpt", "value": "31 degrees"},
    ],
    "system": "You have tools.",
    "tools": json.dumps([WEATHER]),
}


def made(folder: Path, rows: list[dict[str, Any]], *, ending: str = "jsonl", **args: Any) -> Task:
    path = folder / f"rows.{ending}"
    if ending == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_task("dataset", {"path": str(path), "eval_share": 0, **args})


def refusal(folder: Path, rows: list[dict[str, Any]], **args: Any) -> str:
    with pytest.raises(UserError) as caught:
        made(folder, rows, **args)
    return str(caught.value)


def earned(task: Task, said: str) -> float:
    return float(play(task, task.problems("train")[0], ScriptedSession([said + END])))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_verls_rows(tmp_path: Path, ending: str) -> None:
    task = made(tmp_path, [VERL], ending=ending, format="verl")
    problem = task.problems("train")[0]
    assert problem.prompt == VERL["prompt"]
    assert problem.data["answer"] == "72"
    assert problem.data["row"] == {name: value for name, value in VERL.items() if name != "prompt"}
    assert task.settings.reward == "math"  # type: ignore[attr-defined]


def test_verls_rows_with_a_reward_for_verl(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    assert data_source == 'openai/gsm8k' and extra_info['index'] == 0\n"
        "    return float(solution_str.split('####')[-1].strip() == ground_truth)\n"
    )
    task = made(tmp_path, [VERL], ending="parquet", format="verl", reward=f"{tmp_path}/mine.py:compute_score")
    assert earned(task, "so it is\n#### 72") == 1.0
    assert earned(task, "so it is\n#### 71") == 0.0


def test_ground_truths_of_other_kinds_reach_a_reward_of_ones_own(tmp_path: Path) -> None:
    """verl's countdown stores an object, its search data a list within one."""
    rows = [
        {"prompt": [{"role": "user", "content": "24?"}], "reward_model": {"ground_truth": truth}, "data_source": "x"}
        for truth in [{"target": 24, "numbers": [1, 2, 3, 4]}]
    ]
    (tmp_path / "mine.py").write_text("def f(completion, answer, problem):\n    return answer['target'] == 24\n")
    task = made(tmp_path, rows, format="verl", reward=f"{tmp_path}/mine.py:f")
    assert earned(task, "x") == 1.0
    assert "an answer is text or a number, or a list of them" in refusal(tmp_path, rows, format="verl")
    rows[0]["reward_model"] = {"ground_truth": {"target": ["Paris", "paris"]}}
    task = made(tmp_path, rows, format="verl", answer_field="reward_model.ground_truth.target", reward="exact")
    assert (earned(task, "paris"), earned(task, "Rome")) == (1.0, 0.0)


def test_dapos_rows_repeat_every_prompt(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    other = {**DAPO, "prompt": [{"content": "2?", "role": "user"}]}
    task = made(tmp_path, [DAPO, other] * 100, ending="parquet", format="dapo")
    assert len(task.problems("train")) == 2
    assert "198 rows repeat a prompt" in task.notes[0]
    assert earned(task, "17 + 17 is 34.\nAnswer: 34") == 1.0
    assert earned(task, "17 + 17 is 34.\nAnswer: 35") == 0.0


def test_gsm8ks_rows(tmp_path: Path) -> None:
    task = made(tmp_path, [GSM8K], format="gsm8k")
    problem = task.problems("train")[0]
    assert problem.prompt == [{"role": "user", "content": "How many clips?"}]
    assert problem.data["answer"] == "72"
    assert (earned(task, "It is 72."), earned(task, "#### 73")) == (1.0, 0.0)
    assert "nothing behind '####'" in refusal(tmp_path, [{**GSM8K, "answer": "72"}], format="gsm8k")
    thousands = made(tmp_path, [{**GSM8K, "answer": "#### 1,200"}], format="gsm8k")
    assert earned(thousands, "1200") == 1.0


def test_openais_rows(tmp_path: Path) -> None:
    task = made(tmp_path, [OPENAI], format="openai")
    problem = task.problems("train")[0]
    assert problem.prompt == OPENAI["messages"][:2]
    assert problem.data["answer"] == "Paris"
    assert (earned(task, " Paris\n"), earned(task, "paris")) == (1.0, 0.0)
    asked = [{"role": "user", "content": "x"}]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    for messages, reason in (
        (asked, "ends with a message of the user, not with the assistant's answer"),
        ([*asked, calls], "ends with a message without text"),
        ([{"role": "assistant", "content": "x"}], "has nothing before the assistant's answer"),
        ("text", "ends with a message of the user"),
    ):
        assert reason in refusal(tmp_path, [{"messages": messages}], format="openai")


def test_sharegpts_rows(tmp_path: Path) -> None:
    task = made(tmp_path, [SHAREGPT], format="sharegpt")
    problem = task.problems("train")[0]
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    assert problem.prompt == [
        {"role": "system", "content": "You have tools."},
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"degrees": 31}'},
    ]
    assert problem.tools == [{"type": "function", "function": WEATHER}]
    assert problem.data["answer"] == "31 degrees"
    wrong = {"conversations": [{"from": "martian", "value": "x"}, {"from": "gpt", "value": "y"}]}
    assert "'from' is 'martian'; known: human, user, gpt," in refusal(tmp_path, [wrong], format="sharegpt")
    broken = {"conversations": [{"from": "function_call", "value": "f(x)"}, {"from": "gpt", "value": "y"}]}
    assert "'f(x)' is not a call written as JSON" in refusal(tmp_path, [broken], format="sharegpt")


def test_explicit_settings_override_a_format(tmp_path: Path) -> None:
    rows = [{**GSM8K, "final": 24}]
    task = made(tmp_path, rows, format="gsm8k", answer_field="final", answer_after="", reward="exact")
    assert (earned(task, "24"), earned(task, "it is 24")) == (1.0, 0.0)
    whole = made(tmp_path, [{**OPENAI, "answer": "x"}], format="openai", answer_field="answer")
    assert whole.problems("train")[0].prompt == OPENAI["messages"], "the answer stands elsewhere"
    assert "task.args.format is 'verll'; choose one of plain, verl, dapo," in refusal(tmp_path, rows, format="verll")
    both = {"answer_in_prompt": True, "answer_field": "answer"}
    assert "set one of the two" in refusal(tmp_path, [OPENAI], prompt_field="messages", **both)


# ---------------------------------------------------------------- dotted fields


def test_a_field_within_a_field(tmp_path: Path) -> None:
    row = {"a": {"b": [{"c": "asked"}]}, "meta": json.dumps({"truth": {"value": 7}}), "x.y": "own"}
    task = made(tmp_path, [row], prompt_field="a.b.0.c", answer_field="meta.truth.value")
    assert task.problems("train")[0].data["answer"] == "7"
    task = made(tmp_path, [row], prompt_field="x.y", answer_field="meta.truth.value", as_chat=False)
    assert task.problems("train")[0].prompt == "own", "a field that is called so comes first"
    for name, reason in (
        ("a.d", "no field 'a.d' (task.args.prompt_field); 'd': known: b"),
        ("a.b.1.c", "there are 1 entries where '1' is looked for"),
        ("x.y.z", "no field 'x.y.z' (task.args.prompt_field); 'x': known: a, meta, x.y"),
        ("a.b.0.c.d", "where 'd' is looked for stands 'asked'"),
    ):
        assert reason in refusal(tmp_path, [row], prompt_field=name, answer_field="meta.truth.value")


STEPS = st.lists(st.one_of(st.text("abc", min_size=1, max_size=3), st.integers(0, 2)), min_size=1, max_size=5)


@given(STEPS, st.sampled_from(["text", 3, 2.5, None, [1]]), st.booleans())
def test_what_lies_at_a_path_is_found_there(steps: list[str | int], value: Any, as_text: bool) -> None:
    steps = [str(steps[0]), *steps[1:]]  # a row is an object
    built = value
    for step in reversed(steps[1:]):
        built = [None] * step + [built] if isinstance(step, int) else {step: built, "other": 0}
        if as_text:
            built = json.dumps(built)
    field = Field(".".join(map(str, steps)), setting="answer_field")
    row = {steps[0]: built}
    assert field.of(row) == field.get(row) == value
    missing = Field(field.name + ".zz", setting="answer_field")
    assert missing.get(row) is None
    with pytest.raises(BadRow):
        missing.of(row)


# ---------------------------------------------------------------- the way of usual rows

SAID = st.dictionaries(
    st.sampled_from(["role", "content", "name"]),
    st.one_of(st.sampled_from(["user", "assistant", "system", "", 'é\n"x"']), st.integers(), st.none()),
    max_size=3,
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.one_of(st.sampled_from(["", " ", "x", 'a"\\\u2028']), st.lists(SAID, max_size=2), st.integers()),
        "answer": st.one_of(
            st.sampled_from(["", " ", "7", "x", "٣", "1" * 200]), st.integers(), st.booleans(), st.floats(), st.none()
        ),
        "tools": st.sampled_from([None, [], "", "[]", [WEATHER], "x"]),
        "chat_template_kwargs": st.sampled_from([None, {}, {"a": 1}]),
    },
)


@given(ROW, st.sampled_from(["exact", "numeric", "mine.py:f"]), st.booleans())
def test_usual_rows_are_read_as_all_others(row: dict[str, Any], reward: str, from_a_table: bool) -> None:
    layout = Layout(DatasetSettings(reward=reward))
    rows = Lines("x", b"")
    rows.has_gaps = from_a_table
    found = layout.usual(rows)(row)
    if found is not None:
        read = layout.read(row, rows)
        assert found == (layout.key(read), read.answer, layout.form(read))
        assert found[0] == json.dumps(read.prompt, ensure_ascii=False)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("reward", "answers", "right", "wrong"),
    [
        ("exact", ["Paris", "paris"], "paris", "Rome"),
        ("numeric", [3, "4.0", 5.5], "so 4", "so 6"),
        ("numeric", 3.0, "3", "3.1"),
        ("math", ["\\frac{1}{2}", "7"], "$0.5$", "$0.4$"),
    ],
)
def test_any_of_several_answers_counts(tmp_path: Path, reward: str, answers: Any, right: str, wrong: str) -> None:
    task = made(tmp_path, [{"prompt": "?", "answer": answers}], reward=reward)
    assert (earned(task, right), earned(task, wrong)) == (1.0, 0.0)


def test_every_accepted_answer_is_checked(tmp_path: Path) -> None:
    for answers, reason in (
        ([], "field 'answer' is []; an answer is text or a number, or a list of them"),
        (["3", "many"], "field 'answer' is 'many', which holds no number"),
        (["3", None], "field 'answer' is None"),
        (["3", ""], "field 'answer' is empty"),
        ([["3"]], "field 'answer' is ['3']"),
        (float("nan"), "field 'answer' is nan, which is no number"),
    ):
        assert reason in refusal(tmp_path, [{"prompt": "?", "answer": answers}], reward="numeric")


def test_whole_numbers_stored_with_a_point_are_warned_of_for_exact_alone(tmp_path: Path) -> None:
    """What pandas makes of whole numbers where one is missing."""
    rows = [{"prompt": f"{i}?", "answer": float(i)} for i in range(5)]
    assert "5 answers are numbers like 3.0, and reward 'exact' wants just that text" in made(tmp_path, rows).notes[0]
    assert not made(tmp_path, rows, reward="numeric").notes
    assert not made(tmp_path, [{"prompt": "?", "answer": 3}]).notes


# ---------------------------------------------------------------- a prompt that ends with the assistant


def test_a_prompt_that_ends_with_the_assistant_is_gone_on_with_when_asked_to(tmp_path: Path) -> None:
    from support_tokenizers import byte_folder

    from async_rl.model.tokenizer import Tokenizer, problem_text

    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "The sum is"}]
    rows = [{"prompt": chat, "answer": "4"}, {"prompt": "3 + 3?", "answer": "6"}]
    tokenizer = Tokenizer(byte_folder(tmp_path / "m"))
    task = made(tmp_path, rows, continue_assistant=True)
    assert not task.notes
    first, second = (problem_text(problem, tokenizer) for problem in task.problems("train"))
    assert first.endswith("<|im_start|>assistant\nThe sum is")
    assert second.endswith("<|im_end|>\n<|im_start|>assistant\n")
    new_turn = made(tmp_path, rows)
    assert problem_text(new_turn.problems("train")[0], tokenizer).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "1 prompts end with a message of the assistant" in new_turn.notes[0]


def test_the_text_of_a_message_in_parts() -> None:
    assert text_of({"content": [{"type": "text", "text": "a"}, "b"]}) == "a\nb"
    assert text_of({"content": None}) == ""
