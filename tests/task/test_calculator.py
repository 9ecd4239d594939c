from random import Random

import pytest
from support_session import END, ScriptedSession, play

from async_rl.errors import UserError
from async_rl.task import Problem, make_task
from async_rl.task.calculator import Calculator, CalculatorSettings

PROBLEM = Problem(index=0, prompt="12+7*35?", data={"expression": "12+7*35", "answer": "257"})


def episode(*turns: str, **args: object) -> tuple[float, ScriptedSession]:
    session = ScriptedSession(list(turns))
    return play(Calculator(CalculatorSettings(**args)), PROBLEM, session), session


def test_calls_are_answered_and_the_answer_ends_the_episode() -> None:
    reward, session = episode("[7*35]", "[12+245]", "#257.")
    assert reward == 1.0
    assert session.transcript == "12+7*35?[7*35]=245;[12+245]=257;#257."
    assert session.notes == {"tool_calls": 2.0, "tool_errors": 0.0, "void_turns": 0.0}
    assert not session.at_turn_limit


def test_an_answer_without_a_call_counts() -> None:
    assert episode("#257.")[0] == 1.0
    assert episode("so #257.")[0] == 1.0
    assert episode("#256.")[0] == 0.0
    assert episode("#0257.")[0] == 0.0


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("[12*7]", "84"),
        ("[ 12 * 7 ]", "84"),
        ("[1/3]", "1/3"),
        ("[6/3]", "2"),
        ("[-5+2]", "-3"),
        ("[42]", "42"),
        ("[1+[2*3]", "6"),
        ("[1/0]", "?"),
        ("[12*7*2]", "?"),
        ("[twelve]", "?"),
        ("[]", "?"),
        ("[9**9]", "?"),
    ],
)
def test_what_the_tool_says(call: str, result: str) -> None:
    _, session = episode(call, "#1.")
    assert session.transcript == f"12+7*35?{call}={result};#1."
    assert session.notes["tool_errors"] == float(result == "?")
    assert session.notes["tool_calls"] == 1.0


def test_longer_calculations_can_be_allowed() -> None:
    _, session = episode("[12+7*35]", "#257.", operators_per_call=2)
    assert "=257;" in session.transcript


@pytest.mark.parametrize("void", ["257" + END, "", "]", "257.", "x" * 40])
def test_a_turn_without_call_or_answer_is_void_and_noted(void: str) -> None:
    reward, session = episode(void, "#257.")
    assert reward == 1.0
    assert session.notes["void_turns"] == 1.0
    assert session.transcript.endswith("=?;#257.")


def test_turns_used_up_end_at_the_limit() -> None:
    reward, session = episode(*["[1+1]"] * 9, max_turns=3)
    assert (reward, session.turn, session.at_turn_limit) == (0.0, 3, True)
    assert session.notes["tool_calls"] == 3.0


def test_valid_calls_earn_a_turn_reward() -> None:
    _, session = episode("[1+1]", "[1/0]", "#257.", call_reward=0.25)
    assert [turn.reward for turn in session.turns] == [0.25, 0.0, 0.0]


def test_a_full_context_ends_the_episode() -> None:
    session = ScriptedSession(["[7*35]", "[12+245]", "#257."], max_context=20)
    assert play(Calculator(CalculatorSettings()), PROBLEM, session) == 0.0
    assert session.truncated
    assert session.turn == 2
    assert "tool_calls" in session.notes


def test_states_are_equal_when_the_tool_said_the_same() -> None:
    _, one = episode("[7*35]", "[12+245]", "#1.")
    _, other = episode("[ 7*35]", "[245+12]", "#1.")
    keys = [turn.state_key for turn in one.turns]
    assert keys == [turn.state_key for turn in other.turns]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("operands", [2, 3, 5])
def test_demonstrations_earn_the_full_reward(operands: int) -> None:
    task = make_task("calculator", {"num_operands": operands})
    for problem in task.problems("train")[:40]:
        segments = task.demonstration(problem, Random(0))
        session = ScriptedSession([s.text for s in segments if s.policy])
        assert play(task, problem, session) == 1.0
        assert session.transcript == "".join(s.text for s in segments)
        assert set(session.transcript) <= set(task.alphabet)
        assert session.turn == operands
        assert problem.data["answer"] == str(eval(problem.data["expression"]))


def test_impossible_settings_say_which() -> None:
    for args in ({"operations": "/"}, {"digits": 0}, {"max_turns": 0}, {"operators_per_call": 0}):
        with pytest.raises(UserError, match=f"task.args.{next(iter(args))}"):
            make_task("calculator", args)
