import asyncio
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_session import END, ScriptedSession, play

from async_rl.errors import UserError
from async_rl.task import Problem, make_task
from async_rl.task.guess import Guess, GuessSettings


def problem(secret: int) -> Problem:
    return Problem(index=0, prompt="?", data={"secret": secret})


def bisect(transcript: str) -> str:
    """The best policy: halve what the transcript leaves possible."""
    low, high = 0, 31
    for i in range(1, len(transcript), 3):
        guess, answer = int(transcript[i : i + 2]), transcript[i + 2]
        low, high = (low, guess - 1) if answer == "<" else (guess + 1, high)
    return f"{(low + high) // 2:02d}"


@pytest.mark.parametrize(("turns", "found"), [(4, 15), (5, 31), (6, 32)])
def test_bisection_finds_31_of_32_secrets_in_five_turns_and_all_in_six(turns: int, found: int) -> None:
    task = Guess(GuessSettings(max_turns=turns))
    rewards = [play(task, problem(secret), ScriptedSession(bisect)) for secret in range(32)]
    assert sum(rewards) == found


def test_a_found_secret_ends_the_episode_with_reward_one() -> None:
    session = ScriptedSession(["15", "07", "11"])
    assert play(Guess(GuessSettings()), problem(11), session) == 1.0
    assert session.transcript == "?15<07>11="
    assert not session.at_turn_limit


def test_guesses_used_up_end_at_the_turn_limit_with_reward_zero() -> None:
    session = ScriptedSession(["31"] * 9)
    assert play(Guess(GuessSettings()), problem(3), session) == 0.0
    assert session.transcript == "?" + "31<" * 6
    assert session.at_turn_limit


@pytest.mark.parametrize("said", ["32", "99", "1<", "==", "", "٣٤", "1" + END, "-1", " 1"])
def test_what_is_no_number_in_range_costs_a_turn(said: str) -> None:
    session = ScriptedSession([said, "05"])
    assert play(Guess(GuessSettings()), problem(5), session) == 1.0
    assert session.transcript == f"?{said.split(END)[0]}!05="
    assert session.turns[0].state_key == session.turns[1].state_key


def test_equal_knowledge_has_the_same_state_key_and_other_knowledge_another() -> None:
    task = Guess(GuessSettings())
    one, other = ScriptedSession(["10", "20", "15"]), ScriptedSession(["20", "10", "15"])
    play(task, problem(15), one)
    play(task, problem(15), other)
    keys = [turn.state_key for turn in one.turns]
    assert keys[0] == other.turns[0].state_key
    assert keys[2] == other.turns[2].state_key
    assert len({*keys, other.turns[1].state_key}) == 4


@given(st.lists(st.integers(0, 31), min_size=6, max_size=6), st.integers(0, 31))
def test_any_play_keeps_the_session_contract(guesses: list[int], secret: int) -> None:
    session = ScriptedSession([f"{g:02d}" for g in guesses])
    reward = play(Guess(GuessSettings()), problem(secret), session)
    assert reward == float(secret in guesses)
    assert all(turn.state_key >= 0 for turn in session.turns)


def test_a_full_context_ends_the_episode() -> None:
    session = ScriptedSession(["31"] * 6, max_context=8)
    assert play(Guess(GuessSettings()), problem(3), session) == 0.0
    assert session.turn == 3
    assert session.truncated
    assert not session.at_turn_limit


def test_turn_rewards_go_to_guesses_that_were_still_possible() -> None:
    session = ScriptedSession(["15", "16", "07", "07", "99", "03"])
    play(Guess(GuessSettings(reward_consistent=0.5)), problem(3), session)
    assert [turn.reward for turn in session.turns] == [0.5, 0.0, 0.5, 0.0, 0.0, 0.5]


def test_both_splits_hold_every_secret_equally_often_in_a_mixed_order() -> None:
    task = make_task("guess", {"rounds_train": 3, "rounds_eval": 2})
    for split, rounds in (("train", 3), ("eval", 2)):
        secrets = [p.data["secret"] for p in task.problems(split)]
        assert sorted(secrets) == sorted(list(range(32)) * rounds)
        assert secrets != sorted(secrets)
        assert [p.index for p in task.problems(split)] == list(range(32 * rounds))


def test_demonstrations_are_episodes_of_the_environment() -> None:
    task = Guess(GuessSettings())
    for i, shown in enumerate(task.problems("train")[:50]):
        segments = task.demonstration(shown, Random(i))
        session = ScriptedSession([s.text for s in segments if s.policy])
        reward = play(task, shown, session)
        assert session.transcript == "".join(s.text for s in segments)
        assert set(session.transcript) <= set(task.alphabet)
        assert reward == float(segments[-1].text == "=")


def test_demonstrations_leave_something_to_learn() -> None:
    task, random = Guess(GuessSettings()), Random(0)
    problems = task.problems("train")
    found = sum(task.demonstration(problems[i % 256], random)[-1].text == "=" for i in range(2000))
    assert 0.65 < found / 2000 < 0.76  # bisection: 1


@pytest.mark.parametrize("args", [{"num_secrets": 101}, {"num_secrets": 1}, {"max_turns": 0}, {"rounds_eval": 0}])
def test_impossible_settings_name_the_setting(args: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"task.args.{next(iter(args))}"):
        make_task("guess", args)


def test_episodes_of_one_task_run_side_by_side() -> None:
    task = Guess(GuessSettings())
    sessions = [ScriptedSession(bisect, prompt="?") for _ in range(32)]

    async def all_of_them() -> list[float]:
        return await asyncio.gather(*(task.rollout(problem(s), sessions[s]) for s in range(32)))

    assert sum(asyncio.run(all_of_them())) == 32
