"""The task `gymnasium` on real environments of the package."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from support_session import END, ScriptedSession, play

from async_rl.errors import UserError
from async_rl.task import Task, make_task
from async_rl.task.adapters.dialogue import last_named
from async_rl.task.adapters.gymnasium import pictured, plain

gymnasium = pytest.importorskip("gymnasium")

LAKE = {"prompt": "text", "kwargs": {"is_slippery": False}, "actions": ["L", "D", "R", "U"]}
TO_THE_GOAL = ("D", "D", "R", "R", "D", "R")


class Session(ScriptedSession):
    """With a seed, and chat messages."""

    seed = 5

    def append_messages(self, messages: Any) -> None:
        self.append("".join(f"<{message['role']}>{message['content']}" for message in messages))


def made(**args: Any) -> Task:
    return make_task("gymnasium", {"num_train": 60, "num_eval": 30, **args})


def said(*actions: str) -> list[str]:
    return [f"{action}\n" for action in actions]


def test_an_episode_in_plain_text_is_a_line_a_turn() -> None:
    task = made(**LAKE)
    session = Session(said(*TO_THE_GOAL))
    assert play(task, task.problems("train")[0], session) == 1.0
    assert session.transcript == "0>D\n4>D\n8>R\n9>R\n10>D\n14>R\n"
    assert [turn.reward for turn in session.turns] == [0, 0, 0, 0, 0, 1]
    assert session.notes == {"steps": 6.0, "invalid_actions": 0.0}
    assert not session.at_turn_limit
    assert len({turn.state_key for turn in session.turns}) == 6
    again = Session(said("L", "D", "L"))
    play(made(**LAKE, max_turns=3), task.problems("train")[0], again)
    assert again.turns[0].state_key == again.turns[1].state_key != again.turns[2].state_key, "a key is of the state"


def test_an_episode_in_chat_has_the_observation_as_a_user_message() -> None:
    task = made(kwargs={"is_slippery": False}, tell="render", max_tokens=100)
    system, user = task.problems("eval")[0].prompt
    assert system["content"] == "Each turn, name one action: left, down, right, up."
    assert user["content"] == "[S]FFF\nFHFH\nFFFH\nHFFG"
    session = Session([f"I could go left. I go DOWN!{END}", f"?{END}", f"right, right{END}"])
    assert play(task, task.problems("eval")[0], session) == 0.0, "a hole"
    assert session.notes == {"steps": 2.0, "invalid_actions": 1.0}
    assert "<user>  (Down)\nSFFF\n[F]HFH\nFFFH\nHFFG" in session.transcript
    assert "<user>That is none of the actions.\n  (Down)\nSFFF\n[F]HFH" in session.transcript


def test_a_turn_without_an_action_costs_what_is_set() -> None:
    task = made(**LAKE, invalid_reward=-0.5, max_turns=3)
    session = Session(said("x", "LD", "R"))
    assert play(task, task.problems("train")[0], session) == -1.0
    assert [turn.reward for turn in session.turns] == [-0.5, -0.5, 0.0]
    assert session.transcript == "0>x\n0>LD\n0>R\n"
    assert session.at_turn_limit


def test_the_environments_own_time_limit_is_a_turn_limit() -> None:
    task = made(**{**LAKE, "kwargs": {"is_slippery": False, "max_episode_steps": 2}})
    session = Session(said("L", "L", "L"))
    play(task, task.problems("train")[0], session)
    assert (len(session.turns), session.at_turn_limit) == (2, True)


def test_an_episode_ends_where_the_context_is_full() -> None:
    task = made(**LAKE)
    session = Session(said("L", "L", "L"), max_context=5)
    assert play(task, task.problems("train")[0], session) == 0.0
    assert session.truncated


def test_the_start_is_the_problems_and_chance_the_episodes() -> None:
    """Blackjack deals the first cards by the problem, the further ones by the episode."""
    task = made(env="Blackjack-v1")
    problem = task.problems("train")[0]
    outcomes = set()
    for seed in range(12):
        session = Session([f"hit{END}"] * 9)
        session.seed = seed
        outcomes.add((play(task, problem, session), session.transcript))
        assert session.transcript.startswith(
            f"<system>Each turn, name one action: stick, hit.<user>{problem.prompt[1]['content']}"
        )
    assert len(outcomes) > 1
    session.seed = 3
    first, second = (Session([f"hit{END}"] * 9) for _ in range(2))
    assert (play(task, problem, first), first.transcript) == (play(task, problem, second), second.transcript)


def test_seeds_are_disjoint_and_the_same_everywhere() -> None:
    task = made(env="CartPole-v1", prompt="text")
    asked = {split: [problem.prompt for problem in task.problems(split)] for split in ("train", "eval")}
    assert not set(asked["train"]) & set(asked["eval"])
    assert len(set(asked["train"])) == 60
    assert asked["eval"] == [problem.prompt for problem in made(env="CartPole-v1", prompt="text").problems("eval")]


@pytest.mark.parametrize("env", ["Taxi-v4", "CliffWalking-v1", "FrozenLake-v1"])
def test_text_pictures_have_no_colours_left(env: str) -> None:
    prompt = made(env=env, tell="render", prompt="text").problems("train")[0].prompt
    assert "\x1b" not in prompt
    assert "\n" in prompt


def test_a_demonstration_is_an_episode_of_the_task_and_uses_its_alphabet() -> None:
    task = made(**LAKE)
    assert task.demonstrates
    assert not made().demonstrates
    for number in range(20):
        problem = task.problems("train")[number]
        segments = task.demonstration(problem, Random(number))
        assert set("".join(segment.text for segment in segments)) <= set(task.alphabet)
        session = Session([segment.text for segment in segments if segment.policy])
        play(task, problem, session)
        assert session.transcript == "".join(segment.text for segment in segments), "the lake has no chance in it"


def test_an_environment_and_a_telling_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lake_of_mine.py").write_text(
        "import gymnasium\n"
        "def lake(size):\n"
        "    return gymnasium.make('FrozenLake-v1', map_name=f'{size}x{size}', is_slippery=False)\n"
        "def told(observation, env):\n"
        "    return f'row {observation // 8} column {observation % 8}'\n"
    )
    monkeypatch.chdir(tmp_path)
    task = made(env="lake_of_mine.py:lake", kwargs={"size": 8}, tell="lake_of_mine.py:told", prompt="text")
    session = Session(said("down", "right") * 20)
    play(task, task.problems("train")[0], session)
    assert session.transcript.startswith("row 0 column 0>down\nrow 1 column 0>right\nrow 1 column 1>")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"env": "FrozenLak-v1"}, "did you mean 'FrozenLake-v1'"),
        ({"env": "Pendulum-v1"}, "wrap it in a function of your own"),
        ({"actions": ["a", "b"]}, "has 4 actions"),
        ({"actions": ["a", "b", "c", "A"]}, "a word of its own"),
        ({"tell": "nice"}, "it is observation, render, or"),
        ({"kwargs": {"slippery": False}}, "unexpected keyword argument 'slippery'"),
        ({"env": "nowhere.py:lake"}, "there is no file nowhere.py"),
    ],
)
def test_what_cannot_be_played_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        made(**args)
    assert message in str(refused.value)
    assert "task.args" in str(refused.value)


def test_observations_are_told_in_numbers() -> None:
    import numpy as np

    assert plain(np.int64(7)) == "7"
    assert plain((np.int64(4), 1, False)) == "4, 1, 0"
    assert plain(np.array([0.123456, -2.0])) == "0.123, -2"
    assert plain({"agent": np.array([1, 2]), "says": "hm"}) == "agent: 1, 2\nsays: hm"
    assert plain(np.zeros((2, 2))) == "0, 0, 0, 0"


def test_colours_become_brackets() -> None:
    drawn = "\x1b[41mS\x1b[0mF \x1b[34;1mR\x1b[0m \x1b[35mY\x1b[0m \x1b[7m"
    assert pictured(drawn) == "[S]F {R} (Y) "
    with pytest.raises(ValueError, match="draws no text"):
        pictured(np_image())


def np_image() -> Any:
    import numpy as np

    return np.zeros((2, 2, 3))


def test_the_last_word_that_is_an_action_counts() -> None:
    assert last_named("left or right? right", ("left", "right")) == 1
    assert last_named("Leftover", ("left",)) is None
    assert last_named("go 10", ("1", "10")) == 1
    assert last_named("", ("a",)) is None
