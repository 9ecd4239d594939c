import asyncio
import sys
import textwrap
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import UserError
from async_rl.task import Problem
from async_rl.task.reward import JudgeError, MathJudge, Reward, RewardError, VerdictTimeout, last_number, make_reward

PROBLEM = Problem(index=0, prompt="?")


def score(reward: Reward, completion: str, answer: str) -> float:
    return asyncio.run(reward.score(completion, answer, PROBLEM))


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [("Paris", "Paris", 1.0), (" Paris\n", "Paris", 1.0), ("paris", "Paris", 0.0), ("", "Paris", 0.0), ("", "", 1.0)],
)
def test_exact_compares_all_but_outer_space(completion: str, answer: str, reward: float) -> None:
    assert score(make_reward("exact"), completion, answer) == reward


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("So there are 1,200 apples.", "1200", 1.0),
        ("1200.0", "1200", 1.0),
        ("first 7, then 12", "12", 1.0),
        ("12, not 7", "12", 0.0),
        ("2400/2", "1200", 1.0),
        ("1.2e3", "1200", 1.0),
        ("-5", "-5", 1.0),
        ("\u22125", "-5", 1.0),
        ("5", "-5", 0.0),
        ("8-3", "3", 1.0),  # a difference is not a sign
        ("x = -3", "-3", 1.0),
        (".5", "1/2", 1.0),
        ("0.333333", "1/3", 1.0),
        ("0.33", "1/3", 0.0),
        ("1000001", "1000000", 0.0),
        ("1,2,3", "3", 1.0),
        ("$3.50.", "3.5", 1.0),
        ("#### 42", "the answer is 42", 1.0),
        ("none", "3", 0.0),
        ("", "3", 0.0),
        ("1/0", "3", 0.0),
        ("1e999999999", "3", 0.0),
        ("9" * 100_000, "3", 0.0),
        ("٣", "3", 0.0),
    ],
)
def test_numeric_compares_the_last_numbers(completion: str, answer: str, reward: float) -> None:
    assert score(make_reward("numeric"), completion, answer) == reward


@given(st.fractions(max_denominator=10**6), st.text("abc +.,:", max_size=5))
def test_numeric_reads_any_fraction_back(number: Fraction, before: str) -> None:
    assert last_number(f"{before} {number}") == number


@given(st.text(max_size=200))
def test_numeric_reads_any_text(text: str) -> None:
    last_number(text)


def test_numeric_without_a_number_in_the_answer_is_a_reward_error() -> None:
    with pytest.raises(RewardError, match="holds no number"):
        score(make_reward("numeric"), "3", "three")


@pytest.mark.parametrize(
    ("returned", "reason"),
    [(float("nan"), "nan"), (float("inf"), "inf"), (None, "not a number"), ("x", "not a number"), ([], "not a number")],
)
def test_a_reward_that_is_no_finite_number_is_a_reward_error(returned: object, reason: str) -> None:
    with pytest.raises(RewardError, match=f"'mine'.*{reason}"):
        score(Reward("mine", lambda *_: returned), "a", "b")


def test_a_reward_that_raises_is_a_reward_error_with_its_reason_and_cause() -> None:
    def broken(completion: str, answer: str, problem: Problem) -> float:
        raise KeyError("score")

    with pytest.raises(RewardError, match="KeyError: 'score'") as caught:
        score(Reward("mine", broken), "a", "b")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("value", [True, 1, 0.5, Fraction(1, 2)])
def test_whatever_is_a_number_is_a_reward(value: object) -> None:
    assert score(Reward("mine", lambda *_: value), "a", "b") == float(value)  # type: ignore[arg-type]


def test_a_reward_may_be_a_coroutine() -> None:
    async def slow(completion: str, answer: str, problem: Problem) -> float:
        await asyncio.sleep(0)
        return 0.25

    assert score(Reward("mine", slow), "a", "b") == 0.25


def test_cancelling_an_episode_is_no_reward_error() -> None:
    async def never(completion: str, answer: str, problem: Problem) -> float:
        await asyncio.Event().wait()
        return 1.0

    async def cancel() -> None:
        running = asyncio.create_task(Reward("mine", never).score("a", "b", PROBLEM))
        await asyncio.sleep(0)
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's in the working directory."""
    (tmp_path / "my_rewards_for_test.py").write_text(
        textwrap.dedent("""
            def length(completion, answer, problem):
                return len(completion) / len(answer)
            def nothing(): return 0
            LIMIT = 3
        """)
    )
    (tmp_path / "broken_rewards_for_test.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_rewards_for_test", None)


def test_a_function_of_the_users_own_is_found_in_the_working_directory(module: Path) -> None:
    assert score(make_reward("my_rewards_for_test:length"), "ab", "abcd") == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numerc", "did you mean 'numeric'"),
        ("", "module:function"),
        ("no_such_module_at_all:f", "cannot import 'no_such_module_at_all'"),
        ("my_rewards_for_test:lenght", "did you mean 'length'"),
        ("my_rewards_for_test:LIMIT", "no function"),
        ("my_rewards_for_test:nothing", "it takes nothing"),
        ("broken_rewards_for_test:f", "no licence"),
        (":f", "cannot import"),
    ],
)
def test_a_reward_that_cannot_be_had_is_named_with_the_remedy(module: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_reward(name)


# ---------------------------------------------------------------- math, through math-verify


@pytest.fixture(scope="module")
def judge() -> MathJudge:
    pytest.importorskip("math_verify")
    judge = MathJudge()
    yield judge
    judge.close()


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"Hence \boxed{0.5}.", r"\frac{1}{2}", 1.0),
        (r"Hence \boxed{\frac{2}{4}}", "1/2", 1.0),
        ("The answer is 42.", "42", 1.0),
        (r"\boxed{41}", "42", 0.0),
        (r"$1+x^2$", "x^2+1", 1.0),
        (r"\boxed{42}", r"so $42$", 1.0),
        ("", "42", 0.0),
        ("no idea\n\u2028 \x00", "42", 0.0),
    ],
)
def test_math_compares_values_not_texts(judge: MathJudge, completion: str, answer: str, reward: float) -> None:
    assert judge.score(completion, answer) == reward


def test_an_answer_that_is_no_mathematics_is_an_error_and_the_judge_goes_on(judge: MathJudge) -> None:
    with pytest.raises(JudgeError, match="cannot be read"):
        judge.score("1", "$$")
    assert judge.score("1", "1") == 1.0


def test_math_works_in_an_event_loop_and_outside_the_main_thread(judge: MathJudge) -> None:
    reward = make_reward("math")

    async def many() -> list[float]:
        scores = (reward.score(rf"\boxed{{{i}}}", "3", PROBLEM) for i in range(5))
        return await asyncio.gather(*scores)

    assert asyncio.run(many()) == [0.0, 0.0, 0.0, 1.0, 0.0]
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(reward.score("3", "3", PROBLEM))))
    thread.start()
    thread.join(60)
    assert found == [1.0]


def test_a_verdict_that_would_take_forever_is_given_up_and_the_next_is_given() -> None:
    pytest.importorskip("math_verify")
    judge = MathJudge(deadline_s=1)
    with pytest.raises(VerdictTimeout):
        judge.score(r"\boxed{1}", r"9^{9^{9^{9}}}+1")
    assert judge.score("1", "1") == 1.0
    judge.close()


def test_a_judge_whose_child_died_starts_another(judge: MathJudge) -> None:
    assert judge.score("1", "1") == 1.0
    assert judge._child.process is not None
    judge._child.process.kill()
    judge._child.process.wait()
    assert judge.score("1", "1") == 1.0


def test_math_without_the_library_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install math-verify"):
        make_reward("math")
