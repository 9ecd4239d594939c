"""One game of the package textarena: whose turn it is, what that player is told, and who won."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BRACKETED = re.compile(r"\[[^\[\]\n]{1,40}\]")
MOST_TRIALS = 64
"""moves that a random player tries on a copy of the game before it gives up looking for a legal one"""
GAME = "GAME"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a player is told."""

    sender: str
    """GAME, or who says it: Player 1, or a role of the game's own"""
    text: str
    kind: str
    """textarena's ObservationType in small letters: prompt, player_action, game_board, game_message, ..."""


class Dice:
    """Random numbers of one game. Games draw from the random generators that all of Python shares; within the context
    these go on where this game left them, and are put back behind it."""

    def __init__(self, seed: int) -> None:
        self.seed(seed)

    def seed(self, seed: int) -> None:
        import numpy as np

        self._python = random.Random(seed).getstate()
        self._numpy: Any = np.random.RandomState(seed % 2**32).get_state()

    def copy(self) -> Dice:
        """Dice that will fall alike."""
        made = Dice(0)
        made._python, made._numpy = self._python, self._numpy
        return made

    @contextmanager
    def rolled(self) -> Iterator[None]:
        """No other code may run inside: nothing is awaited here."""
        import numpy as np

        python, other = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            self._python, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(python)
            np.random.set_state(other)


@dataclass(slots=True, eq=False)
class Game:
    """A running game. `new` makes one."""

    env: Any
    dice: Dice
    seen: dict[int, list[Message]] = field(default_factory=dict)
    """what each player was told so far"""
    done: bool = False

    @classmethod
    def new(cls, name: str, kwargs: Mapping[str, Any], *, players: int, seed: int) -> Game:
        """A new game; what the package raises is passed on."""
        import textarena

        dice = Dice(seed)
        with dice.rolled():
            env = textarena.make(name, **kwargs)
            env.reset(num_players=players, seed=seed % 2**31)
        return cls(env, dice, done=bool(_base(env).state.done))

    @property
    def player(self) -> int:
        """Who moves next."""
        return int(_base(self.env).state.current_player_id)

    @property
    def players(self) -> int:
        return int(_base(self.env).state.num_players)

    def told(self) -> list[Message]:
        """What the player who moves next is told since its last move; its own moves are not repeated."""
        with self.dice.rolled():
            player, news = _base(self.env).get_observation()
        new = self._messages(player, news)
        self.seen.setdefault(int(player), []).extend(new)
        return new

    def first_told(self, player: int) -> list[Message]:
        """What a player was told before anybody moved, its turn or not."""
        return self._messages(player, _base(self.env).state.observations[player])

    def _messages(self, player: int, news: Sequence[Any]) -> list[Message]:
        """Without those of the player itself."""
        roles = _base(self.env).state.role_mapping
        found = []
        for by, text, kind in news:
            if isinstance(by, int) and by == player:
                continue
            known = isinstance(by, int) and by >= 0  # a few games give the kind in the place of the sender
            sender = str(roles.get(by, f"Player {by}")) if known else GAME
            found.append(Message(sender=sender, text=str(text), kind=getattr(kind, "name", "game_message").lower()))
        return found

    def observation(self) -> str:
        """What the game's own wrappers show the player who moves next: its whole history, or what they leave of it."""
        with self.dice.rolled():
            _, text = self.env.get_observation()
        return str(text)

    def act(self, action: str) -> None:
        """The player's move; a game that does not take it asks again, or ends."""
        with self.dice.rolled():
            self.done, _ = self.env.step(action)

    def takes(self, action: str) -> bool:
        """Whether this would be a legal move, tried on a copy."""
        player, trial, dice = self.player, copy.deepcopy(self.env), self.dice.copy()
        before = getattr(_base(trial).state, "error_count", 0)
        try:
            with dice.rolled():
                trial.step(action)
        except Exception:  # of the game's own code, which the move has broken
            return False
        state = _base(trial).state
        return not (getattr(state, "error_count", 0) > before or state.game_info[player]["invalid_move"])

    @property
    def rewards(self) -> Mapping[int, float] | None:
        """Of each player; None where the game is not over."""
        found = _base(self.env).state.rewards
        return None if found is None or not self.done else {int(p): float(r) for p, r in found.items()}

    def info(self, player: int) -> Mapping[str, Any]:
        """What the game says of a player at the end: reason, invalid_move, turn_count, ..."""
        found: Mapping[str, Any] = _base(self.env).state.game_info[player]
        return found


def _base(env: Any) -> Any:
    """The game itself, without wrappers."""
    from textarena import Wrapper

    while isinstance(env, Wrapper):
        env = env.env
    return env


def shown(messages: Sequence[Message]) -> str:
    """Messages as textarena writes them for language models, a line each: `[GAME] Your card is: 'K'`."""
    return "\n".join(f"[{message.sender}] {message.text}" for message in messages)


class RandomPlayer:
    """Plays any legal move that it can find in what it is told: moves in brackets that the last messages list, else
    those of the rules, with other numbers in them."""

    @classmethod
    def choose(cls, game: Game, news: Sequence[Message], draw: random.Random) -> str:
        """A move for the player who is on turn. `news`: what it was told last."""
        listed = [move for message in news if message.kind != "prompt" for move in BRACKETED.findall(message.text)]
        told = "\n".join(message.text for message in game.seen[game.player])
        named = BRACKETED.findall(told)
        for moves in (listed, named, cls._varied(named, told, draw)):
            distinct = list(dict.fromkeys(moves))
            draw.shuffle(distinct)
            if moves is named and any(any(map(str.isdigit, move)) for move in named):
                continue  # of the rules' examples, those with numbers stand for many
            for move in distinct[:MOST_TRIALS]:
                if game.takes(move):
                    return move
        return next(iter(listed or named), "[pass]")

    @staticmethod
    def _varied(moves: Sequence[str], told: str, draw: random.Random) -> list[str]:
        """Moves of the same forms with numbers up to the largest that stands in `told`."""
        if not moves:
            return []
        forms = list(dict.fromkeys(re.sub(r"\d+", "#", move) for move in moves))
        numbers = [int(number) for number in re.findall(r"(?<!\d)\d{1,2}(?!\d)", told)]
        chosen = [draw.choice(forms) for _ in range(4 * MOST_TRIALS)]
        most = max(numbers, default=1) + 1
        return [re.sub("#", lambda _: str(draw.randrange(most)), form) for form in chosen]
