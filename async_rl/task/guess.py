"""Number guessing in several turns: the task of the quickstart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from async_rl.config.schema import setting
from async_rl.task.generated import require_range
from async_rl.task.information_gain import InformationGain
from async_rl.task.order import PromptOrder
from async_rl.task.protocol import Problem, Segment, Session, Task
from async_rl.trajectory import Split

PROMPT = "?"
LOWER, HIGHER, FOUND, INVALID = "<", ">", "=", "!"
"""answers: the secret is lower; higher; found; the guess was not a number in range"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuessSettings:
    """Example: `task: {name: guess, args: {num_secrets: 32, max_turns: 6}}`."""

    num_secrets: int = setting(32, "secrets are 0 .. num_secrets - 1; at most 100", unit="numbers")
    max_turns: int = setting(6, "guesses allowed; six are enough for 32 secrets, by halving", unit="turns")
    reward_consistent: float = setting(
        0.0, "turn reward of a guess that was still possible; only recipes with turn-level credit see it"
    )
    information_gain: bool = setting(
        False,
        "reward each guess but the last with how much it raised the policy's own probability of the secret (IGPO); for "
        "recipes with turn-level credit",
    )
    rounds_train: int = setting(8, "how often each secret occurs in the train split", unit="rounds")
    rounds_eval: int = setting(4, "how often each secret occurs in the eval split", unit="rounds")
    seed: int = setting(0, "decides the order of the secrets")


@dataclass(slots=True)
class Interval:
    """What the answers so far imply: low <= secret <= high."""

    low: int
    high: int

    def allows(self, guess: int | None) -> bool:
        return guess is not None and self.low <= guess <= self.high

    def learn(self, guess: int | None, answer: str) -> None:
        if guess is not None and answer == LOWER:
            self.high = min(self.high, guess - 1)
        elif guess is not None and answer == HIGHER:
            self.low = max(self.low, guess + 1)


class Guess(Task):
    """A secret, at most `max_turns` guesses, the environment answers lower, higher or found.

    An episode reads `?15<07>11=`: the prompt, then guesses of a fixed number of digits and one-character
    answers. Reward 1 if found, else 0. A guess that is not a number in range costs a turn.

    What "held out" means here: the policy never sees the secret, so with a few dozen secrets both splits
    necessarily contain all of them. The eval split is other episodes of the same 32 situations: it measures
    the policy without exploration's luck, not generalisation to new problems.

    Needs a tokenizer in which each digit is a token (the one `async-rl init-model` makes).
    """

    name = "guess"
    repeatable = True
    noted = ()
    Settings = GuessSettings

    def __init__(self, settings: GuessSettings) -> None:
        require_range("num_secrets", settings.num_secrets, 2, 100)
        require_range("max_turns", settings.max_turns, 1, 1000)
        require_range("rounds_train", settings.rounds_train, 1, 10**6)
        require_range("rounds_eval", settings.rounds_eval, 1, 10**6)
        require_range("seed", settings.seed, 0, 2**63 - 1)
        self.settings: GuessSettings = settings
        self.num_digits = len(str(settings.num_secrets - 1))
        self._numbers = {f"{number:0{self.num_digits}d}": number for number in range(settings.num_secrets)}
        if settings.information_gain:
            self.repeatable = False  # its rewards depend on the weights
        order = PromptOrder(settings.num_secrets, settings.seed)
        self._train = self._make(order, range(settings.rounds_train))
        self._eval = self._make(order, range(settings.rounds_train, settings.rounds_train + settings.rounds_eval))

    def _make(self, order: PromptOrder, rounds: range) -> list[Problem]:
        n = self.settings.num_secrets
        positions = range(rounds.start * n, rounds.stop * n)
        return [
            Problem(index=index, prompt=PROMPT, data={"secret": order(position)})
            for index, position in enumerate(positions)
        ]

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._train if split == "train" else self._eval

    @property
    def reward_parts(self) -> Sequence[str] | None:
        return () if type(self) is Guess else None

    async def rollout(self, problem: Problem, session: Session) -> float:
        secret: int = problem.data["secret"]
        known = Interval(0, self.settings.num_secrets - 1)
        gain = None
        if self.settings.information_gain:
            gain = InformationGain(session, f"{secret:0{self.num_digits}d}")
            await gain.begin()
        most, digits = self.settings.max_turns, self.num_digits
        for _ in range(most):
            text = await session.generate(max_tokens=digits, state_key=self.state_key(known))
            if not text and session.truncated:
                return 0.0  # the context is full: no further guess can be made
            guess = self.read(text)
            self.judge(session, consistent=known.allows(guess))
            answer = self.answer(secret, guess)
            session.append(answer)
            if answer == FOUND:
                return 1.0
            if gain is not None and session.turn < most:
                await gain.reward_turn()
            known.learn(guess, answer)
        session.end_at_turn_limit()
        return 0.0

    def judge(self, session: Session, *, consistent: bool) -> None:
        """Called behind each guess. `consistent`: the answers so far allow it."""
        if consistent and self.settings.reward_consistent:
            session.reward_turn(self.settings.reward_consistent)

    def state_key(self, known: Interval) -> int:
        """What is known of the secret as one number; after contradictory play the interval may be empty."""
        return known.low * (self.settings.num_secrets + 1) + known.high + 1

    def read(self, text: str) -> int | None:
        """The number guessed, or None. Only ASCII digits count."""
        return self._numbers.get(text)

    @staticmethod
    def answer(secret: int, guess: int | None) -> str:
        if guess is None:
            return INVALID
        if guess == secret:
            return FOUND
        return LOWER if secret < guess else HIGHER

    @property
    def alphabet(self) -> str:
        return PROMPT + "0123456789" + LOWER + HIGHER + FOUND + INVALID

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        """Guesses uniform over the numbers still possible: fair, and far from optimal on purpose, so that
        there is something left to learn."""
        secret: int = problem.data["secret"]
        known = Interval(0, self.settings.num_secrets - 1)
        segments = [Segment(text=PROMPT, policy=False)]
        for _ in range(self.settings.max_turns):
            guess = random.randint(known.low, known.high)
            answer = self.answer(secret, guess)
            segments.append(Segment(text=f"{guess:0{self.num_digits}d}", policy=True))
            segments.append(Segment(text=answer, policy=False))
            if answer == FOUND:
                break
            known.learn(guess, answer)
        return segments
