"""Letters, arithmetic and countdown."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_session import END, ScriptedSession, play

from async_rl.errors import UserError
from async_rl.task import Problem, make_task
from async_rl.task.countdown import Countdown, CountdownSettings, combine
from async_rl.task.expression import parse


def said(name: str, args: dict[str, object], text: str, *, prompt: str = "p=", **data: object) -> float:
    return play(make_task(name, args), Problem(index=0, prompt=prompt, data=data), ScriptedSession([text]))


@pytest.mark.parametrize(
    ("text", "reward"),
    [("abcd.", 1.0), ("abcd" + END, 1.0), ("abdc.", 0.0), ("abcde.", 0.0), (".", 0.0), ("", 0.0), ("abc.d.", 0.0)],
)
def test_letters_want_the_exact_answer(text: str, reward: float) -> None:
    assert said("sort", {"length": 4}, text, answer="abcd") == reward


@pytest.mark.parametrize(
    ("text", "reward"), [("abcd.", 1.0), ("abdc.", 0.5), ("ab.", 0.5), ("abcdz.", 0.8), (".", 0.0), ("dcba.", 0.0)]
)
def test_partial_reward_is_the_share_of_right_positions(text: str, reward: float) -> None:
    assert said("sort", {"length": 5, "partial_reward": True}, text, answer="abcd") == reward


def test_sort_sorts_and_reverse_reverses() -> None:
    for name, solve in (("sort", sorted), ("reverse", reversed)):
        problems = make_task(name, {"length": 7, "alphabet_size": 5}).problems("train")
        for problem in problems[:20]:
            assert problem.data["answer"] == "".join(solve(problem.prompt.removesuffix("=")))


def test_arithmetic_answers_are_right_and_fit_into_the_turn() -> None:
    for args in ({"operations": "+-*", "digits": 3}, {"operations": "-", "reversed_answer": True}):
        task = make_task("arithmetic", args)
        for problem in task.problems("train")[:200]:
            answer = problem.data["answer"][::-1] if "reversed_answer" in args else problem.data["answer"]
            assert int(answer) == eval(problem.prompt.removesuffix("="))
            assert len(problem.data["answer"] + ".") <= task.max_tokens


@pytest.mark.parametrize(
    ("text", "reward"), [("51.", 1.0), ("51" + END, 1.0), ("15.", 0.0), ("051.", 0.0), ("5", 0.0), ("", 0.0)]
)
def test_arithmetic_wants_the_exact_answer(text: str, reward: float) -> None:
    assert said("arithmetic", {}, text, answer="51") == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("(3+5)*3.", 1.0),
        (" (3 + 5) * 3 .", 1.0),
        ("3*8.", 0.0),  # 8 is not given
        ("3*3*3.", 0.0),  # 3 is given twice only
        ("3+5.", 0.1),
        ("5.", 0.1),
        ("7/2*7.", 0.0),
        ("5/(3-3).", 0.1),
        ("(3+5*3.", 0.0),
        ("(3+5)*3=24.", 0.0),
        ("", 0.0),
        (".", 0.0),
        ("(" * 60, 0.0),
    ],
)
def test_countdown_rewards_the_target_then_the_form(text: str, reward: float) -> None:
    assert said("countdown", {}, text, numbers=(3, 5, 3), target=24) == reward


def test_countdown_is_exact_where_floats_are_not() -> None:
    assert said("countdown", {}, "1/3*3*7.", numbers=(1, 3, 3, 7), target=7) == 1.0
    assert said("countdown", {}, "8/(3-8/3).", numbers=(8, 8, 3, 3), target=24) == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("First 3+5 is 8. So <answer>(3+5)*3</answer>", 1.0),
        ("<answer>3</answer>", 0.1),
        ("I think <answer>3+5</answer>", 0.1),
        ("(3+5)*3", 0.0),
        ("<answer>(3+5)*3", 1.0),
        ("<answer>one</answer>", 0.0),
        ("<answer>3 <answer>(3+5)*3</answer>", 1.0),
    ],
)
def test_countdown_reads_the_answer_of_a_chat(text: str, reward: float) -> None:
    task = make_task("countdown", {"style": "chat"})
    problem = Problem(index=0, prompt=[{"role": "user", "content": "?"}], data={"numbers": (3, 5, 3), "target": 24})
    assert play(task, problem, ScriptedSession([text])) == reward


@given(st.lists(st.integers(1, 99), min_size=1, max_size=8), st.integers(0, 2**32))
def test_made_solutions_have_the_value_they_claim_and_use_every_number(numbers: list[int], seed: int) -> None:
    solution = combine(numbers, Random(seed))
    expression = parse(solution.text)
    assert expression.value == solution.value
    assert Counter(expression.numbers) == Counter(numbers)


@settings(max_examples=15)
@given(n=st.integers(2, 6), most=st.integers(2, 100), seed=st.integers(0, 99))
def test_every_countdown_problem_can_be_solved(n: int, most: int, seed: int) -> None:
    task = Countdown(CountdownSettings(num_numbers=n, max_number=30, max_target=most + 20, seed=seed))
    for problem in task.problems("train")[:3]:
        assert task.score(problem.data["solution"], problem) == 1.0
        assert 0 < problem.data["target"] <= most + 20
        assert problem.data["target"] not in problem.data["numbers"]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("sort", {}),
        ("reverse", {"length": 3, "alphabet_size": 4}),
        ("arithmetic", {"digits": 1}),
        ("countdown", {"num_numbers": 3, "max_number": 9}),
        ("calculator", {}),
    ],
)
def test_no_held_out_problem_is_trained_on(name: str, args: dict[str, object]) -> None:
    task = make_task(name, {**args, "num_train": 2000, "num_eval": 100})
    trained = {problem.prompt for problem in task.problems("train")}
    assert not trained & {problem.prompt for problem in task.problems("eval")}
    assert len(task.problems("train")) == 2000


@pytest.mark.parametrize("name", ["sort", "reverse", "arithmetic", "countdown", "calculator", "guess"])
def test_the_same_settings_give_the_same_problems_and_another_seed_others(name: str) -> None:
    one, again, other = (make_task(name, {"seed": seed}) for seed in (4, 4, 5))
    for split in ("train", "eval"):
        first = one.problems(split)[:30]
        assert first == again.problems(split)[:30]
        assert [p.data for p in first] != [p.data for p in other.problems(split)[:30]]
        # by index, in whatever order
        assert one.problems(split)[7] == first[7]
        assert one.problems(split)[-1] == one.problems(split)[len(one.problems(split)) - 1]
        with pytest.raises(IndexError):
            one.problems(split)[len(one.problems(split))]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("sort", {}),
        ("reverse", {}),
        ("arithmetic", {"operations": "+-*", "digits": 3, "reversed_answer": True}),
        ("countdown", {"num_numbers": 5}),
    ],
)
def test_demonstrations_earn_the_full_reward(name: str, args: dict[str, object]) -> None:
    task = make_task(name, args)
    for problem in task.problems("eval")[:40]:
        prompt, answer = task.demonstration(problem, Random(0))
        assert (prompt.policy, answer.policy) == (False, True)
        session = ScriptedSession([answer.text])
        assert play(task, problem, session) == 1.0
        assert session.transcript == prompt.text + answer.text
        assert set(session.transcript) <= set(task.alphabet)
        assert len(set(task.alphabet)) == len(task.alphabet)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("sort", {"alphabet_size": 27}, "alphabet_size"),
        ("sort", {"length": 0}, "length"),
        ("sort", {"length": 1, "alphabet_size": 2}, "too few different problems"),
        ("arithmetic", {"operations": "+/"}, "operations"),
        ("arithmetic", {"operations": ""}, "operations"),
        ("countdown", {"format_reward": 1.5}, "format_reward"),
        ("countdown", {"style": "essay"}, "style"),
        ("countdown", {"num_train": 0}, "num_train"),
    ],
)
def test_impossible_settings_say_which(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(name, args)
