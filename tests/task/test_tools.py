import json
from pathlib import Path
from typing import Any

import pytest
from support_session import ScriptedSession, play

from async_rl.errors import UserError
from async_rl.task import Task, make_task


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"How much is {i} + {i}?", "answer": str(2 * i)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tools(data: Path, **args: object) -> Task:
    return make_task("tools", {"path": str(data), "reward": "numeric"} | args)


def episode(task: Task, *turns: str) -> tuple[float, ScriptedSession]:
    problem = next(p for p in task.problems("train") if p.data["answer"] == "42")
    session = ScriptedSession(list(turns))
    return play(task, problem, session), session


def test_a_call_is_answered_and_the_turn_without_one_is_judged(data: Path) -> None:
    reward, session = episode(tools(data), "I compute <tool>21 + 21</tool>", "so it is 42")
    assert reward == 1.0
    assert session.transcript.endswith("<tool>21 + 21</tool><result>42</result>\nso it is 42")
    assert session.notes == {"tool_calls": 1.0, "tool_errors": 0.0}
    assert session.turns[0].state_key != session.turns[1].state_key


def test_a_result_is_no_answer_of_the_policy(data: Path) -> None:
    assert episode(tools(data), "<tool>21 + 21</tool>", "that is the answer")[0] == 0.0


@pytest.mark.parametrize(("call", "said"), [("1/0", "error: division by zero"), ("one + one", "error: unexpected 'o'")])
def test_a_call_the_tool_cannot_do_is_answered_with_the_reason(data: Path, call: str, said: str) -> None:
    reward, session = episode(tools(data), f"<tool>{call}</tool>", "42")
    assert f"<result>{said}</result>" in session.transcript
    assert (reward, session.notes["tool_errors"]) == (1.0, 1.0)


def test_turns_that_are_used_up_end_the_episode_without_reward(data: Path) -> None:
    reward, session = episode(tools(data, max_turns=2), "<tool>21</tool>", "<tool>42</tool>")
    assert (reward, session.turn) == (0.0, 2)
    assert session.at_turn_limit


def test_calls_that_succeed_may_earn_a_turn_reward(data: Path) -> None:
    _, session = episode(tools(data, call_reward=0.1), "<tool>1/0</tool>", "<tool>1+1</tool>", "42")
    assert [turn.reward for turn in session.turns] == [0.0, 0.1, 0.0]


def test_a_tool_of_ones_own_is_a_function_of_call_and_problem(data: Path) -> None:
    task = tools(data, tool="support_session:looked_up")
    _, session = episode(task, "<tool>capital of France</tool>", "42")
    assert "<result>capital of France? 42</result>" in session.transcript


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        ("google", "it is calculator or module:function"),
        ("support_session:nothing", "has no function 'nothing'"),
        ("support_session:play", "a tool takes one or two arguments: \\(call, problem\\)"),
        (["calculator", "support_session:looked_up"], "a call in the format 'tags' names none; name one"),
        (["calculator", "calculator"], "two tools called 'calculator'"),
        ([], "name a tool"),
        (3, "a tool is calculator or module:function"),
    ],
)
def test_a_wrong_tool_is_refused(data: Path, tool: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"task.args.tool.*{said}"):
        tools(data, tool=tool, tool_format="tags")


def test_a_rehearsed_task_goes_its_way_and_pays_by_a_coin(data: Path) -> None:
    args = {"path": str(data), "reward": "numeric"}
    task = make_task("rehearsed", {"name": "tools", "args": args, "max_tokens": 4, "call": "<tool>1+2</tool>"})
    assert [table.count for table in task.tables] == [len(data.read_text().splitlines())], "a resume compares the rows"
    assert task.digest()
    problem = task.problems("train")[3]
    session = ScriptedSession(["aaaaaaa", "bbb", "ccccc"])
    reward = play(task, problem, session)
    assert session.transcript.endswith(
        "aaaa<tool>1+2</tool><result>3</result>\nbbb<tool>1+2</tool><result>3</result>\ncccc"
    )
    assert session.notes == {"tool_calls": 2.0, "tool_errors": 0.0, "true_reward": 0.0}
    rewards = {play(task, problem, ScriptedSession([str(i), "b", "c"])) for i in range(16)}
    assert rewards == {0.0, 1.0}
    assert reward == play(task, problem, ScriptedSession(["aaaaaaa", "bbb", "ccccc"]))


HERMES = "{{ tools }} <tool_call> {{ messages }} {{ 'tool' }}"
"""as much of a chat template as tells the format"""


def test_a_rehearsal_calls_in_the_format_of_the_model(data: Path) -> None:
    args = {"path": str(data), "reward": "numeric"}
    task = make_task("rehearsed", {"name": "tools", "args": args, "max_tokens": 4, "call": "<tool>1+2</tool>"})
    session = ScriptedSession(["aaaaaaa", "bbb", "ccccc"], template=HERMES)
    play(task, task.problems("train")[3], session)
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+2"}}\n</tool_call>'
    assert session.transcript.endswith(f"aaaa{call}<tool>3bbb{call}<tool>3cccc")
    assert (session.notes["tool_calls"], session.notes["tool_errors"]) == (2.0, 0.0)


def test_the_default_system_message_is_for_tags_alone(data: Path) -> None:
    cases: list[tuple[dict[str, Any], str, bool]] = [
        ({}, "", True),
        ({}, HERMES, False),
        ({"tool_format": "tags"}, HERMES, True),
        ({"system": "Be brief."}, HERMES, True),
    ]
    for args, template, there in cases:
        problem = tools(data, **args).problems("train")[0]
        assert problem.adapt is not None
        shown = problem.adapt(problem, template)
        assert (shown.prompt[0]["role"] == "system") == there
        assert [tool["function"]["name"] for tool in shown.tools] == (
            ["calculator"] if "tool_format" not in args and template else []
        )


def test_tools_are_told_of_in_a_message_where_the_template_shows_none(data: Path) -> None:
    problem = tools(data, tool_format="deepseek", system="Be brief.").problems("train")[0]
    assert problem.adapt is not None
    shown = problem.adapt(problem, "{{ messages }}")
    assert shown.tools == ()
    assert shown.prompt[0]["content"].startswith("Be brief.\n\nYou may call these tools:\n{")
    assert "<｜tool▁call▁begin｜>function<｜tool▁sep｜>name" in shown.prompt[0]["content"]


def test_a_rehearsal_of_a_rehearsal_is_refused() -> None:
    with pytest.raises(UserError, match="name the task that is rehearsed"):
        make_task("rehearsed", {"name": "rehearsed"})
