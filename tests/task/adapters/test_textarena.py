"""Games of the real package: who is told what, whose reward is whose, and that a game is the same every time."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from string import printable
from typing import Any

import numpy as np
import pytest
import torch
from support_models import qwen3_config, write_folder
from support_run import quick_settings, train

from async_rl.config.schema import structured
from async_rl.errors import UserError
from async_rl.generator.engine import Completion, Request
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, Ticket, make_tickets
from async_rl.model.tokenizer import Tokenizer
from async_rl.objective import Columns
from async_rl.objective.advantage import advantage_of
from async_rl.objective.conflicts import check_effect
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.objective.tokens import tokens_of
from async_rl.trainer.packing import pack_batch
from async_rl.trajectory import Split, Trajectory
from async_rl.wire.messages import Permit

pytest.importorskip("textarena", reason="textarena is not installed (pip install textarena)")

from async_rl.task.adapters.textarena import TextArena, TextArenaSettings
from async_rl.task.adapters.textarena_game import Game

LISTED = re.compile(r"'(\[[^\]\n]+\])'")
Policy = Callable[[str], str]


@dataclass
class Speaker:
    """An engine whose model is a function from the text of a context to a turn."""

    tokenizer: Tokenizer
    policy: Policy
    version: int = 0
    max_context: int = 100_000
    heard: list[str] = field(default_factory=list)

    async def generate(self, request: Request) -> Completion:
        await asyncio.sleep(0)  # others play here
        self.heard.append(self.tokenizer.decode(request.tokens))
        tokens = self.tokenizer.encode(self.policy(self.heard[-1]))[: request.params.max_tokens]
        finish = "length" if len(tokens) == request.params.max_tokens else "stop"
        return Completion(tokens=tokens, log_probs=[-0.5] * len(tokens), versions=[0] * len(tokens), finish=finish)

    def release(self, session: int) -> None:
        pass


def first_listed(text: str) -> str:
    """The first of the moves that stood last in the text as a list."""
    return LISTED.findall(text.splitlines()[-1] if LISTED.search(text.splitlines()[-1]) else text)[-1] + "\n"


def lowest_free(text: str) -> str:
    """TicTacToe: the first of the available moves."""
    listed = [line for line in text.splitlines() if line.startswith("Available Moves")][-1]
    return LISTED.findall(listed)[0] + "\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model") / "m"
    return Tokenizer(write_folder(folder, qwen3_config(), alphabet=printable + "•─│♠♥♦♣"))


def make(**args: Any) -> TextArena:
    return TextArena(structured(TextArenaSettings, {"prompt": "text", **args}, where="task.args"))


def play(
    task: TextArena, tokenizer: Tokenizer, policy: Policy, *, problem: int = 0, samples: int = 1,
    split: Split = "train", max_context: int = 90_000, max_turns: int = 64,
) -> list[Trajectory]:  # fmt: skip
    """The samples of a problem, played at once."""
    permit = Permit(group=0, problem=problem, split=split, samples=tuple(range(samples)), seed=3, temperature=1.0)

    def one(ticket: Ticket) -> Any:
        engine: Any = Speaker(tokenizer, policy)
        session = EpisodeSession(
            engine=engine, tokenizer=tokenizer, ticket=ticket, session_id=ticket.sample + 1, max_context=max_context,
            max_turns=max_turns, clock=lambda: 0.0,
        )  # fmt: skip
        return run_episode(task, session, ticket, timeout_s=60.0)

    async def together() -> list[Trajectory]:
        return await asyncio.gather(*map(one, make_tickets(permit)))

    return asyncio.run(together())


def contexts(tokenizer: Tokenizer, trajectory: Trajectory) -> list[str]:
    bounds = [0, *trajectory.contexts, len(trajectory.tokens)]
    return [tokenizer.decode(trajectory.tokens[a:b].tolist()) for a, b in pairwise(bounds)]


# ---------------------------------------------------------------- one seat


@pytest.mark.parametrize("problem", range(6))
def test_the_reward_is_that_of_the_package_for_the_same_moves(
    tokenizer: Tokenizer, problem: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import textarena

    moves: list[str] = []
    act = Game.act
    task = make()
    at = task.problems("train")[problem]
    monkeypatch.setattr(Game, "act", lambda game, action: (moves.append(action), act(game, action))[1])
    (trajectory,) = play(task, tokenizer, lowest_free, problem=problem)

    env: Any = textarena.make("TicTacToe-v0")
    env.reset(num_players=2, seed=0)
    done, own = False, []
    for move in moves:
        player, _ = env.get_observation()
        own += [move] if player == at.data["seat"] else []
        done, _ = env.step(move)
    assert done
    rewards, info = env.close()
    assert trajectory.reward == rewards[at.data["seat"]]
    assert trajectory.reason == ""
    assert trajectory.contexts == ()
    assert len(trajectory.turns) == len(own) == info[at.data["seat"]]["turn_count"]
    assert trajectory.info["seat"] == at.data["seat"]
    assert trajectory.info["won"] == (trajectory.reward == 1)
    assert {turn.agent for turn in trajectory.turns} == {""}


def test_a_game_is_the_same_every_time_and_the_samples_of_a_problem_start_alike(tokenizer: Tokenizer) -> None:
    state = random.getstate(), np.random.get_state()[1].tolist()
    first, again = (play(make(), tokenizer, lowest_free, problem=2, samples=6) for _ in range(2))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state, "Python's own random numbers go on"
    for one, other in zip(first, again, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
    assert len({t.turns[0].start for t in first}) == 1
    assert len({t.tokens.tobytes() for t in first}) > 1, "the opponent plays each sample anew"
    (alone,) = play(make(), tokenizer, lowest_free, problem=2)
    assert alone.tokens.tolist() == first[0].tokens.tolist(), "games that run together do not share their dice"


def test_held_out_games_are_never_trained_on() -> None:
    task = make(env="KuhnPoker-v0", num_train=60, num_eval=20)
    train, held_out = ([p.data["seed"] for p in task.problems(split)] for split in ("train", "eval"))
    assert not set(train) & set(held_out)
    assert {p.data["seat"] for p in task.problems("train")} == {0, 1}


def test_a_move_that_is_not_taken_loses_the_game(tokenizer: Tokenizer) -> None:
    (trajectory,) = play(make(), tokenizer, lambda _: "nonsense\n")
    assert (trajectory.reward, trajectory.ended, trajectory.info["invalid"]) == (-1.0, "finished", 1.0)
    assert len(trajectory.turns) == 2, "the game lets one pass"


def test_a_turn_is_its_last_move_in_brackets_or_all_of_it(tokenizer: Tokenizer) -> None:
    assert make().move_in("I could [1] or... no: [4] it is") == "[4]"
    assert make().move_in(" col 4 \n") == "col 4"
    assert make(action="whole").move_in("I offer [2] for it.\n") == "I offer [2] for it."


@pytest.mark.parametrize(("limits", "ended"), [({"max_turns": 1}, "turn_limit"), ({"max_context": 700}, "length")])
def test_what_cannot_be_played_to_its_end_is_no_way_out(
    tokenizer: Tokenizer, limits: dict[str, int], ended: str
) -> None:
    task = make(seat=0, unfinished=-0.75, **({"max_turns": 1} if "max_turns" in limits else {}))
    (trajectory,) = play(task, tokenizer, lowest_free, max_context=limits.get("max_context", 90_000))
    assert (trajectory.reward, trajectory.ended) == (-0.75, ended)


def test_a_game_in_which_another_player_goes_on_for_ever_is_a_draw(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "drawer.py").write_text("class Drawer:\n    def __call__(self, told):\n        return '[draw]'\n")
    opponent = f"{tmp_path / 'drawer.py'}:Drawer"
    task = make(env="SpiteAndMalice-v0", seat=1, opponent=opponent, max_turns=5, num_eval=4)
    (trajectory,) = play(task, tokenizer, lambda _: "[draw]\n")
    assert (trajectory.ended, trajectory.reward, trajectory.reason) == ("turn_limit", 0.0, "")
    assert {name: trajectory.info[name] for name in ("stalled", "drawn", "won", "moves")} == {
        "stalled": 1.0, "drawn": 1.0, "won": 0.0, "moves": 0.0,
    }  # fmt: skip
    (own_fault,) = play(replace_settings(task, seat=0), tokenizer, lambda _: "[draw]\n")
    assert (own_fault.ended, own_fault.reward, own_fault.info["stalled"]) == ("turn_limit", -1.0, 0.0)
    assert own_fault.info["moves"] == 5.0


def replace_settings(task: TextArena, **changes: Any) -> TextArena:
    return TextArena(replace(task.settings, **changes))


def test_a_game_of_random_moves_that_does_not_end_is_left(tokenizer: Tokenizer) -> None:
    task = make(env="SpiteAndMalice-v0", max_turns=8, num_eval=4)
    said = [segment for segment in task.demonstration(task.problems("train")[2], random.Random(2)) if segment.policy]
    assert 1 <= len(said) <= 9


# ---------------------------------------------------------------- opponents of one's own

OPPONENTS = """
import asyncio, random

class Last:
    def __init__(self, shout=""):
        self.turns = 0
        self.shout = shout
    def __call__(self, observation):
        self.turns += 1
        listed = observation.rsplit("Available Moves: ", 1)[1].splitlines()[0]
        return self.shout + listed.split(", ")[-1].strip("'")

class Slow(Last):
    async def __call__(self, observation):
        await asyncio.sleep(0)
        return Last.__call__(self, observation)

class Talker:
    def __call__(self, observation):
        return "well"

def number(player, messages):
    return f"{len(messages)} for {player}\\n"

def tell(player, messages):
    return "".join(m.text.splitlines()[-1] for m in messages if m.kind == "game_board") + f" you are {player}\\n"
"""


@pytest.mark.parametrize("name", ["Last", "Slow"])
def test_an_opponent_of_ones_own_plays_the_other_seat(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "rivals.py").write_text(OPPONENTS)
    monkeypatch.chdir(tmp_path)
    task = make(opponent=f"rivals.py:{name}", opponent_args={"shout": "ha! "})
    for problem in range(4):
        (trajectory,) = play(task, tokenizer, lowest_free, problem=problem)
        (text,) = contexts(tokenizer, trajectory)
        assert trajectory.reason == ""
        assert "] ha! [" in text
        # lowest free against highest free: who begins has 0, 1, 2 before the other has three in a row
        begins = task.problems("train")[problem].data["seat"] == 0
        assert trajectory.reward == (1.0 if begins else -1.0)


def test_a_view_of_ones_own_is_all_that_the_policy_sees(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rivals.py").write_text(OPPONENTS)
    monkeypatch.chdir(tmp_path)
    task = make(view="rivals.py:tell", seat=0)
    (trajectory,) = play(task, tokenizer, lambda text: LISTED.findall(text)[-1] + "\n")
    assert contexts(tokenizer, trajectory)[0].startswith("Available Moves: '[0]', '[1]'")
    assert "Tic Tac Toe" not in contexts(tokenizer, trajectory)[0]


# ---------------------------------------------------------------- every seat


def bold(text: str) -> str:
    """KuhnPoker: bets with a king, folds and checks else."""
    moves = LISTED.findall(text.rsplit("Your available actions are: ", 1)[1].splitlines()[0])
    king = "Your card is: 'K'" in text
    wanted = ("[bet]", "[call]") if king else ("[check]", "[fold]")
    return next(move for move in wanted if move in moves) + "\n"


def test_each_player_sees_its_own_cards_alone_and_earns_its_own_reward(tokenizer: Tokenizer) -> None:
    task = make(env="KuhnPoker-v0", play="all", kwargs={"max_rounds": 2})
    decided = 0
    for problem in range(8):
        (trajectory,) = play(task, tokenizer, bold, problem=problem)
        assert trajectory.reason == ""
        assert trajectory.check() is None
        assert trajectory.reward == 0.0
        texts = contexts(tokenizer, trajectory)
        assert len(texts) == 2
        first, second = set[str](), set[str]()
        for turn in trajectory.turns:
            (second if turn.start >= trajectory.contexts[0] else first).add(turn.agent)
        assert sorted([*first, *second]) == ["player-0", "player-1"]
        players = [agent[-1] for agent in (*first, *second)]
        for player, text in zip(players, texts, strict=True):
            assert f"You are Player {player}" in text
            assert text.count("Your card is: ") == text.count("Starting round"), "its own alone"
        earned = {agent: [u.reward for u in trajectory.turns if u.agent == agent] for agent in ("player-0", "player-1")}
        assert all(not any(rewards[:-1]) for rewards in earned.values()), "at the last turn of each"
        last = {agent: rewards[-1] for agent, rewards in earned.items()}
        assert sum(last.values()) == 0
        assert last == {f"player-{p}": trajectory.info[f"earned/player-{p}"] for p in (0, 1)}
        decided += last["player-0"] != 0
    assert decided >= 4


def test_the_winners_turns_are_learned_and_the_losers_unlearned(tokenizer: Tokenizer) -> None:
    task = make(play="all")
    trajectories = play(task, tokenizer, lowest_free, samples=1)  # who begins wins
    packed = pack_batch(trajectories, micro_batch_tokens=100_000)
    zeros = torch.zeros(packed.num_policy_tokens, dtype=torch.float64)
    columns = Columns(
        log_prob=zeros - 0.5, log_behaviour=zeros - 0.5, version=packed.version, turn_of_token=packed.turn_of_token,
        trajectory_of_turn=packed.trajectory_of_turn, group_of_trajectory=packed.group_of_trajectory,
        reward=packed.reward.double(), turn_reward=packed.turn_reward.double(), state_key=packed.state_key,
        truncated=packed.truncated, current_version=0, agent_of_turn=packed.agent_of_turn, agents=packed.agents,
    )  # fmt: skip
    recipe = load_recipe({"name": "turn_return", "advantage": {"baseline": "none", "scale": "none", "discount": 1.0}})
    found = advantage_of(tokens_of(columns, recipe, requirements(recipe)), recipe, None).per_token
    agent = packed.agent_of_turn[packed.turn_of_token]
    assert packed.agents == ("player-0", "player-1")
    assert found[agent == 0].unique().tolist() == [1.0]
    assert found[agent == 1].unique().tolist() == [-1.0]


def test_held_out_games_are_played_against_the_opponent(tokenizer: Tokenizer) -> None:
    task = make(play="all")
    won = [play(task, tokenizer, lowest_free, problem=i, split="eval")[0] for i in range(4)]
    for trajectory in won:
        assert trajectory.contexts == ()
        assert trajectory.reward in (-1.0, 0.0, 1.0)
        assert not any(turn.reward for turn in trajectory.turns)
    assert any(trajectory.reward for trajectory in won)


def test_recipes_that_see_the_episode_alone_are_refused_for_self_play() -> None:
    setup: Any = {
        "group_size": 4,
        "updates_per_batch": 1,
        "max_staleness": 1,
        "has_critic": False,
        "single_turn": False,
    }
    for play_, refused in (("all", True), ("one", False)):
        task = make(play=play_)
        check_effect(load_recipe({"name": "turn_return"}), **setup, credits_turns=task.credits_turns)
        if refused:
            with pytest.raises(UserError, match="gives its rewards to turns; take a recipe with turn-level credit"):
                check_effect(load_recipe({"name": "vcpo"}), **setup, credits_turns=task.credits_turns)
        else:
            check_effect(load_recipe({"name": "vcpo"}), **setup, credits_turns=task.credits_turns)


@pytest.mark.parametrize("play_", ["one", "all"])
def test_a_view_that_is_rewritten_each_turn_is_a_context_each(tokenizer: Tokenizer, play_: str) -> None:
    """The package's own wrappers for training show the rules, what happened, and the present board alone."""
    task = make(env="TicTacToe-v0-train", view="observation", play=play_, seat=0)
    (trajectory,) = play(task, tokenizer, lowest_free)
    assert trajectory.reason == ""
    assert len(trajectory.contexts) == len(trajectory.turns) - 1 >= 1
    texts = contexts(tokenizer, trajectory)
    assert all(text.count("Current Board") == 1 for text in texts)
    if play_ == "all":
        ends = [turn for turn in trajectory.turns if turn.reward]
        assert sorted((turn.agent, turn.reward) for turn in ends) == [("player-0", 1.0), ("player-1", -1.0)]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"env": "TicTacToe"}, "is no game of textarena; did you mean"),
        ({"players": 3}, "with 3 players and task.args.kwargs {} does not start here: AssertionError"),
        ({"kwargs": {"size": 4}}, "does not start here: TypeError"),
        ({"seat": 2}, "the seats of 2 players count from 0"),
        ({"env": "IteratedTwoThirdsAverage-v0"}, "finds no legal moves"),
        ({"opponent": "randm"}, "it is random, or module:Class"),
        ({"opponent_args": {"a": 1}}, "would do nothing"),
        ({"view": "board"}, "it is messages, observation, or"),
        ({"opponent": "json:dumps"}, "json:dumps' with opponent_args {}: TypeError"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make(**args)


OTHERS = [("Nim-v0", 2), ("ConnectFour-v0", 2), ("Othello-v0-tiny", 2), ("ThreePlayerIPD-v0", 3), ("LightsOut-v0", 1)]


@pytest.mark.parametrize(("env", "players"), OTHERS)
def test_random_games_of_other_kinds_come_to_their_end(tokenizer: Tokenizer, env: str, players: int) -> None:
    task = make(env=env, players=players)
    segments = task.demonstration(task.problems("train")[0], random.Random(1))
    assert [segment.policy for segment in segments] == [i % 2 == 1 for i in range(len(segments))]
    script = iter([segment.text for segment in segments if segment.policy])
    (trajectory,) = play(task, tokenizer, lambda _: next(script, "[0]\n"))
    assert trajectory.reason == ""


# ---------------------------------------------------------------- a run


def test_a_run_of_self_play_trains_and_says_who_earned_what(tmp_path: Path) -> None:
    (tmp_path / "rivals.py").write_text(OPPONENTS)
    args = {
        "env": "TruthAndDeception-v0",  # a talk, in which any text is a turn
        "play": "all",
        "prompt": "text",
        "view": f"{tmp_path}/rivals.py:number",
        "opponent": f"{tmp_path}/rivals.py:Talker",
        "max_tokens": 3,
    }
    model = write_folder(tmp_path / "m", qwen3_config(max_context=256), alphabet=printable)
    settings = quick_settings(model, "recipe.name=turn_return", "trainer.steps=2")
    settings = replace(settings, task=replace(settings.task, name="textarena", args=args))
    folder = train(settings, tmp_path / "run")
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["contexts/mean"] == 2
        assert row["note/earned/player-0/mean"] == -row["note/earned/player-1/mean"]
        assert row["reward/mean"] == 0
        assert row["grad/norm"] > 0
