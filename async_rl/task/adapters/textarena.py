"""The task `textarena`: games of the package textarena, in which the policy plays one seat or all of them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from async_rl.config.imports import is_import, load_function, load_object
from async_rl.config.schema import setting
from async_rl.errors import UserError, nearest
from async_rl.task.adapters.dialogue import MARK, Dialogue, Style, alphabet_of
from async_rl.task.adapters.registry import require_package
from async_rl.task.adapters.textarena_game import BRACKETED, Game, Message, RandomPlayer, shown
from async_rl.task.generated import HELD_OUT_ONE_IN, GeneratedTask, stable_hash
from async_rl.task.protocol import Problem, Segment, Session
from async_rl.trajectory import Split

SEEN_GAMES = 20
"""random games that are played to see which characters occur"""
OFTEN_ILLEGAL = 2
"""games that a random player loses by a move that is not taken, of 4 that are tried, after which it is refused"""
TRIED_GAMES = 4
TRIED_MOVES = 40
"""of all players, in a game that is played to try it"""
Tell = Callable[[int, Sequence[Message]], str]
"""(player, messages since its last move) -> text"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextArenaSettings:
    """Example: `task: {name: textarena, args: {env: TicTacToe-v0, play: all, max_tokens: 64}}`."""

    env: str = setting("TicTacToe-v0", "id of a game of textarena; most need no network")
    kwargs: dict[str, Any] = setting({}, "given to the game when it is made, e.g. {piles: [1, 2, 3]} for Nim-v0")
    players: int = setting(2, "seats of the game", unit="players", min=1, max=15)
    play: Literal["one", "all"] = setting(
        "one",
        "one: the policy plays one seat, `opponent` the others; all: it plays every seat in training (self-play), and "
        "one against `opponent` in held-out games, so that the held-out reward says something",
    )
    seat: int = setting(-1, "the policy's, where it plays one; -1: each problem has its own, in turn", min=-1, max=14)
    opponent: str = setting(
        "random",
        "who plays the other seats: random (legal moves, as far as they are found), or module:Class or file.py:Class, "
        "made for each seat of a game and called with all it was told; it returns its move (textarena's own agents are "
        "such classes)",
    )
    opponent_args: dict[str, Any] = setting({}, "given to the opponent's class")
    view: str = setting(
        "messages",
        "what a player sees: messages (the game's, one after the other, in one context), observation (what the game's "
        "own wrappers show, in a new context each turn), or module:function or file.py:function that takes (player, "
        "messages since its last move) and returns text",
    )
    prompt: Style = setting(
        "chat", "chat: messages are user messages, for the model's chat template; text: lines of plain text"
    )
    system: str = setting("", "system message, said first; empty: none")
    action: Literal["bracketed", "whole"] = setting(
        "bracketed",
        "what of a turn is the move: the last text in [brackets] (all where there is none), or all of it, reasoning "
        "too, which other players then read",
    )
    unfinished: float = setting(
        -1.0, "reward of the policy's players where a game ends because a context or the turns are used up"
    )
    max_tokens: int = setting(256, "longest turn", unit="tokens", min=1, max=1_000_000)
    max_turns: int = setting(
        64,
        "turns of one player after which a game ends: one of the policy's players then earns `unfinished`; where it is "
        "another player's, the game is a draw of reward 0",
        unit="turns",
        min=1,
        max=100_000,
    )
    num_train: int = setting(10_000, "training problems: seeds of games", unit="problems", min=1, max=10**9)
    num_eval: int = setting(256, "held-out problems", unit="problems", min=1, max=10**6)
    seed: int = setting(0, "decides the problems", min=0, max=2**32 - 1)


class TextArena(GeneratedTask):
    """An episode is one game. Where the policy plays one seat, the reward is that of its player.

    Where it plays all, each player has a context of its own and is an agent of its own (`player-0`, ...): the game's
    reward of a player is the reward of its last turn, credited to that player's turns alone, and the reward of the
    episode is 0. So both sides of a zero-sum game learn to win. Only recipes with turn-level credit can use that
    (docs/algorithms.md#several-agents).

    A problem is a seed of the game and the policy's seat. What is random behind the policy's first turn follows from
    the episode's own seed, so the samples of a group start alike and then differ. Notes: `won`, `drawn`, `invalid` (the
    game ended by a move of the policy's that it did not take), `stalled` (a draw because a player that is none of the
    policy's used its turns up), `moves`, and with self-play `earned/player-0`, ...
    """

    name = "textarena"
    looked_at = 32
    Settings = TextArenaSettings

    def __init__(self, settings: TextArenaSettings) -> None:
        require_package(self.name)
        self.settings: TextArenaSettings = settings
        if settings.seat >= settings.players:
            raise UserError(f"task.args.seat is {settings.seat}; the seats of {settings.players} players count from 0")
        self.credits_turns = settings.play == "all"
        self._tell = _teller(settings.view)
        self._make_opponent = _opponent(settings.opponent, settings.opponent_args)
        self.dialogue = Dialogue(style=settings.prompt, system=settings.system)
        self._try()
        super().__init__(self._draw, num_train=settings.num_train, num_eval=settings.num_eval, seed=settings.seed)

    def new_game(self, seed: int) -> Game:
        """Raises UserError for a game that does not start."""
        chosen = self.settings
        where = f"task.args.env '{chosen.env}'"
        try:
            return Game.new(chosen.env, chosen.kwargs, players=chosen.players, seed=seed)
        except Exception as error:  # of the game's own code
            from textarena.envs.registration import ENV_REGISTRY

            if chosen.env not in ENV_REGISTRY:
                raise UserError(f"{where} is no game of textarena; {nearest(chosen.env, ENV_REGISTRY)}") from None
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"{where} with {chosen.players} players and task.args.kwargs {chosen.kwargs} does not start here: "
                f"{type(error).__name__}: {said} (some games need nltk's word lists, an API key or another version of "
                "Python)"
            ) from error

    def _try(self) -> None:
        """Play the random opponent against itself, where it is the opponent. Raises UserError when it finds no legal
        moves."""
        if self._make_opponent is not None or self.settings.players == 1:
            self.new_game(0)
            return
        illegal = 0
        for seed in range(TRIED_GAMES):
            game, draw = self.new_game(seed), Random(seed)
            for _ in range(TRIED_MOVES):
                if game.done:
                    break
                game.act(RandomPlayer.choose(game, game.told(), draw))
            illegal += any(game.info(player)["invalid_move"] for player in range(game.players))
        if illegal >= OFTEN_ILLEGAL:
            raise UserError(
                f"task.args.opponent 'random' finds no legal moves in '{self.settings.env}' ({illegal} of "
                f"{TRIED_GAMES} games ended by one that was not taken); name a player of your own, "
                "task.args.opponent=file.py:Class"
            )

    # ------------------------------------------------------------------ problems

    def _draw(self, random: Random) -> tuple[str, Any, Mapping[str, Any]]:
        seed, seat = random.randrange(2**31), random.randrange(self.settings.players)
        key, seat = str(seed), seat if self.settings.seat < 0 else self.settings.seat
        split: Split = "eval" if stable_hash(key) % HELD_OUT_ONE_IN == 0 else "train"
        data = {"seed": seed, "seat": seat}
        match = Match(self, data, split)
        if self._make_opponent is None:
            match.random_moves()
        told = match.see() if match.policys_turn else self._tell(seat, match.game.first_told(seat))
        return key, self.dialogue.prompt(told), data

    def tell(self, game: Game, news: Sequence[Message]) -> str:
        """What the player on turn sees. Raises ValueError for nothing."""
        if self.settings.view == "observation":
            text = game.observation()
        else:
            text = self._tell(game.player, news)
        if not text.strip():
            raise ValueError(f"task.args.view '{self.settings.view}' shows player {game.player} nothing")
        return text.strip("\n")

    def opponent(self) -> Callable[[str], Any] | None:
        """A new player for a seat that is not the policy's; None: the random one."""
        return None if self._make_opponent is None else self._make_opponent()

    # ------------------------------------------------------------------ one episode

    async def rollout(self, problem: Problem, session: Session) -> float:
        match = Match(self, problem.data, session.split)
        await match.opponents_move()
        match.reseed(session.seed)
        finished = await self._play(match, problem, session)
        rewards = match.game.rewards if finished else None
        otherwise = 0.0 if match.stalled else self.settings.unfinished
        own = {p: otherwise if rewards is None else rewards.get(p, 0.0) for p in match.seats}
        self._note(match, own, session, finished=rewards is not None)
        if not self.credits_turns or session.split == "eval":
            return own[match.seat]
        spoke = {turn.agent for turn in session.said}
        for player, reward in own.items():
            if reward and agent_name(player) in spoke:
                session.reward_turn(reward, agent=agent_name(player))
        return 0.0

    async def _play(self, match: Match, problem: Problem, session: Session) -> bool:
        """Play on until the game is over; False where it cannot go on."""
        chosen, contexts, said = self.settings, dict[int, int](), dict[int, str]()
        while not match.done:
            if match.stalled:
                session.end_at_turn_limit()
                return False
            player, text = match.player, match.see()
            if match.turns[player] >= chosen.max_turns:
                session.end_at_turn_limit()
                return False
            if player in contexts and chosen.view != "observation":
                session.resume_context(contexts[player])
                self.dialogue.answer(session, said[player], text)
            elif not contexts and self.dialogue.prompt(text) == problem.prompt:
                contexts[player] = 0  # it is in the session already
            else:
                contexts[player] = session.start_context(self.dialogue.prompt(text))
            said[player] = await session.generate(
                max_tokens=chosen.max_tokens,
                stop=self.dialogue.stop,
                state_key=stable_hash(f"{player} {text}"),
                agent=agent_name(player) if len(match.seats) > 1 else "",
            )
            if session.truncated:
                return False  # the context is full: this player cannot go on
            match.turns[player] += 1
            match.act(self.move_in(said[player]))
            await match.opponents_move()
        return True

    def move_in(self, text: str) -> str:
        """What of a turn is the move."""
        found = BRACKETED.findall(text) if self.settings.action == "bracketed" else []
        return found[-1] if found else text.strip()

    def _note(self, match: Match, own: Mapping[int, float], session: Session, *, finished: bool) -> None:
        rewards = match.game.rewards or {}
        best = max(rewards.values(), default=0.0)
        drawn = finished and len(set(rewards.values())) == 1
        session.note("moves", float(sum(match.turns.values())))
        session.note("drawn", float(drawn or match.stalled))
        session.note("stalled", float(match.stalled))
        if len(match.seats) == 1:
            session.note("seat", float(match.seat))
            session.note("won", float(finished and not drawn and own[match.seat] == best))
        else:
            for player, reward in own.items():
                session.note(f"earned/{agent_name(player)}", reward)
        invalid = finished and any(match.game.info(p).get("invalid_move") for p in match.seats)
        session.note("invalid", float(invalid))

    # ------------------------------------------------------------------ a model that is to learn it from nothing

    @property
    def demonstrates(self) -> bool:
        plain = self.settings.prompt == "text" and self.settings.view != "observation"
        return plain and self._make_opponent is None

    @property
    def alphabet(self) -> str:
        """What occurs in games of random moves, and printable ASCII."""
        problems = self.problems("train")
        return alphabet_of(self.demonstration(problems[i], Random(i)) for i in range(min(SEEN_GAMES, len(problems))))

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        """The policy's seat in a game of random moves: it shows how to play, and nothing of how to play well."""
        if not self.demonstrates:
            raise UserError(
                "a model is warmed up on plain text and games of random moves: task.args.prompt=text, opponent=random, "
                "view=messages or a function"
            )
        match = Match(self, problem.data, "eval")
        match.random_moves()
        text = match.see()
        segments = [Segment(text=str(self.dialogue.prompt(text)), policy=False)]
        match.reseed(random.getrandbits(63))
        while True:
            move = RandomPlayer.choose(match.game, match.news, match.draw)
            segments.append(Segment(text=move + "\n", policy=True))
            match.act(move)
            match.random_moves()
            if match.done or match.stalled or len(segments) >= 2 * self.settings.max_turns:
                return segments
            segments.append(Segment(text=match.see() + MARK, policy=False))


class Match:
    """A game with those who play it."""

    def __init__(self, task: TextArena, data: Mapping[str, Any], split: Split) -> None:
        self._task = task
        self.seat: int = data["seat"]
        """the policy's, where it plays one"""
        every = task.settings.play == "all" and split == "train"
        self.seats: tuple[int, ...] = tuple(range(task.settings.players)) if every else (self.seat,)
        """the policy's"""
        self.game = task.new_game(data["seed"])
        self.draw = Random(data["seed"])
        self.turns = dict.fromkeys(self.seats, 0)
        self._others_turns: Counter[int] = Counter()
        self.news: Sequence[Message] = ()
        """what the player on turn was told last"""
        self._opponents: dict[int, Callable[[str], Any]] = {}

    @property
    def done(self) -> bool:
        return self.game.done

    @property
    def player(self) -> int:
        return self.game.player

    @property
    def policys_turn(self) -> bool:
        return not self.done and self.game.player in self.seats

    @property
    def others_turn(self) -> bool:
        return not self.done and self.game.player not in self.seats

    @property
    def stalled(self) -> bool:
        """The player on turn is none of the policy's, and has used its turns up: games like SpiteAndMalice let a player
        draw for ever."""
        return self.others_turn and self._others_turns[self.player] >= self._task.settings.max_turns

    def reseed(self, seed: int) -> None:
        """Decide all that is random from now on."""
        self.draw = Random(seed)
        self.game.dice.seed(seed)

    def see(self) -> str:
        """What the player on turn sees. Once a turn: the messages are then told."""
        if self._task.settings.view != "observation":
            self.news = self.game.told()
        return self._task.tell(self.game, self.news)

    def act(self, move: str) -> None:
        self.game.act(move)

    def random_move(self) -> None:
        self.act(RandomPlayer.choose(self.game, self.game.told(), self.draw))

    def random_moves(self) -> None:
        """Let random players move until the policy is on turn, or the game is over or stalled."""
        while self.others_turn and not self.stalled:
            self._others_turns[self.player] += 1
            self.random_move()

    async def opponents_move(self) -> None:
        """Let the others move until the policy is on turn, or the game is over or stalled."""
        while self.others_turn and not self.stalled:
            self._others_turns[self.player] += 1
            player = self._opponents.get(self.player) or self._task.opponent()
            if player is None:
                self.random_move()
                continue
            self._opponents[self.player] = player
            self.game.told()
            with self.game.dice.rolled():
                said = player(shown(self.game.seen[self.player]))
            self.act(str(await said if inspect.isawaitable(said) else said))


def agent_name(player: int) -> str:
    """What the turns of a player of the policy's are recorded under."""
    return f"player-{player}"


def _teller(view: str) -> Tell:
    if view in ("messages", "observation"):
        return lambda _, messages: shown(messages)
    if not is_import(view):
        raise UserError(
            f"task.args.view is '{view}'; it is messages, observation, or module:function (file.py:function)"
        )
    return load_function(view, where=f"task.args.view '{view}'", arguments="(player, messages)")


def _opponent(name: str, args: Mapping[str, Any]) -> Callable[[], Callable[[str], Any]] | None:
    where = f"task.args.opponent '{name}'"
    if name == "random":
        if args:
            raise UserError(f"task.args.opponent_args would do nothing: {where} takes none; leave it out")
        return None
    if not is_import(name):
        raise UserError(f"task.args.opponent is '{name}'; it is random, or module:Class (file.py:Class)")
    made = load_object(name, where=where, what="class")
    try:
        player = made(**args)
    except Exception as error:  # of the user's own code
        raise UserError(f"{where} with opponent_args {dict(args)}: {type(error).__name__}: {error}") from error
    if not callable(player):
        raise UserError(f"{where}: an object of it cannot be called with what a player is told")
    return lambda: made(**args)
