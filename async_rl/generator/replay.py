"""A finished episode played again from its own turns: are prompt, environment and reward what its generator says?

`python -m async_rl.generator.replay RUN` answers such questions, one JSON object a line, in a process of its own: the
code of a task may hang, crash or change whatever it reaches. The trainer asks (trainer/replays.py).
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_rl.config import Settings
from async_rl.generator.contexts import RecordedTurns
from async_rl.generator.engine import Completion, EngineStats, Request
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, Ticket, make_tickets
from async_rl.generator.start import beginning_of
from async_rl.generator.task_code import TaskGuard
from async_rl.model.folder import check_folder, context_limit
from async_rl.model.tokenizer import Tokenizer
from async_rl.run_folder import RunFolder
from async_rl.task import make_task
from async_rl.task.dataset import TIMED_OUT, Dataset
from async_rl.task.problem_fields import value_of
from async_rl.task.protocol import Task
from async_rl.task.tools import Tools
from async_rl.task.weigh import Weights, has_group_reward
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import unpack
from async_rl.trajectory.given import HINT, given_in
from async_rl.wire.messages import Permit, Start

if TYPE_CHECKING:
    from torch import Tensor

CLOSE = 1e-6
"""relative difference of two rewards that are equal"""


class NotRecorded(Exception):
    """The episode asks for a turn that the trajectory does not have behind that history."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of it."""

    lie: str = ""
    """prompts or rewards; empty: nothing is wrong, as far as was looked"""
    reason: str = ""
    """what is wrong"""
    played: bool = False
    """the whole episode was compared, not only its prompt"""


class RecordedEngine:
    """An `Engine` that answers each request with the turn of a trajectory that follows its history."""

    def __init__(self, trajectory: Trajectory, tokenizer: Tokenizer, max_context: int) -> None:
        self._trajectory, self._tokenizer, self.max_context = trajectory, tokenizer, max_context
        self._turns = RecordedTurns(trajectory)
        self.missed = False
        """a turn was asked for that the trajectory does not have"""

    version = 0

    async def generate(self, request: Request) -> Completion:
        """Raises NotRecorded."""
        number = next(self._turns.behind(request.tokens), None)
        if number is None:
            self.missed = True
            raise NotRecorded
        turn, params = self._trajectory.turns[number], request.params
        tokens = self._trajectory.tokens[turn.start : turn.start + turn.length].tolist()
        stopped = bool(tokens) and tokens[-1] in params.stop_tokens
        if not stopped and params.stop_strings:
            text = self._tokenizer.decode(tokens, behind=True)
            stopped = any(stop in text for stop in params.stop_strings if stop)
        return self._turns.give(number, "stop" if stopped else "length")

    async def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        raise NotImplementedError

    async def probe(self, tokens: Sequence[int]) -> Sequence[float]:
        raise NotImplementedError

    async def fingerprint(self) -> Mapping[str, int | None]:
        raise NotImplementedError

    def release(self, session: int) -> None:
        pass

    def sampled(self, session: int) -> Sequence[int]:
        return ()

    def stats(self) -> EngineStats:
        return EngineStats(busy_seconds=0.0, tokens_generated=0, tokens_prefilled=0, running=0, waiting=0)

    async def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayer:
    """Plays episodes of one run again."""

    task: Task
    tokenizer: Tokenizer
    max_context: int
    max_turns: int
    timeout_s: float
    weights: Weights
    start_field: str = ""
    """of the data, with the text that answers may begin with; empty: with none"""
    instruction: str = ""
    """before such a text where it stands in the prompt"""
    window: int = 0
    """tokens behind which training episodes are cut; 0: they are whole"""
    whole: bool
    """episodes are played to their end, where nothing but the policy is random in them; else prompts are compared"""

    @classmethod
    def of(cls, settings: Settings) -> Replayer:
        chosen = settings.generator
        limit = chosen.max_context or context_limit(settings.model.path, check_folder(settings.model.path))
        task = make_task(settings.task.name, settings.task.args)
        rewards = settings.verify.rewards
        return cls(
            task=task,
            tokenizer=Tokenizer.of(settings.model),
            max_context=limit or 1 << 30,
            max_turns=chosen.max_turns,
            timeout_s=chosen.episode_timeout_s,
            weights=Weights(chosen=settings.task.reward_weights),
            start_field=settings.sampler.start_field,
            instruction=settings.sampler.start_instruction,
            window=settings.rollout.window,
            whole=rewards == "always" or (rewards == "auto" and is_repeatable(task)),
        )

    def replay(self, trajectory: Trajectory) -> Replayed:
        """Compare a trajectory with what becomes of its turns here."""
        if wrong := self._wrong_prompt(trajectory) or self._wrong_start(trajectory):
            return Replayed(lie="prompts", reason=wrong)
        if not self.whole or has_group_reward(self.task) or TIMED_OUT in trajectory.info:
            return Replayed()  # a verdict that came too late there may come in time here
        engine = RecordedEngine(trajectory, self.tokenizer, self.max_context)
        ticket = self._ticket(trajectory)
        session = self._session(engine, ticket)
        episode = run_episode(
            self.task, session, ticket, timeout_s=self.timeout_s, guard=TaskGuard(), weights=self.weights
        )
        return _compared(trajectory, asyncio.run(episode), missed=engine.missed)

    def _session(self, engine: RecordedEngine, ticket: Ticket) -> EpisodeSession:
        return EpisodeSession(
            engine=engine,
            tokenizer=self.tokenizer,
            ticket=ticket,
            session_id=0,
            max_context=self.max_context,
            max_turns=self.max_turns,
            window=self.window,
        )

    def _ticket(self, t: Trajectory) -> Ticket:
        permit = Permit(
            group=t.group,
            problem=t.problem,
            split=t.split,
            samples=(t.sample,),
            seed=0,
            temperature=t.temperature,
            max_turns=turns_asked(t) if t.ended == "turn_limit" else 0,  # where the permit allowed fewer
            start=start_of(t, self.start_field, self.instruction),
        )
        return make_tickets(permit, [t.seed])[0]

    def _wrong_start(self, trajectory: Trajectory) -> str:
        """What is wrong with the text of the data that the answer begins with; empty: nothing that is known."""
        given = given_in(trajectory)
        if given is None or not given.stretches or not self.start_field:
            return ""
        problem = self.task.problems(trajectory.split)[trajectory.problem]
        text = value_of(problem, self.start_field)
        prescribed = beginning_of(text, self.tokenizer, 1.0) if isinstance(text, str) else []
        start, length = given.stretches[0]
        found = trajectory.tokens[start : start + length].tolist()
        if len(given.stretches) == 1 and found == prescribed[:length]:
            return ""
        return f"what its answer begins with is not the beginning of the text in '{self.start_field}'"

    def _wrong_prompt(self, trajectory: Trajectory) -> str:
        """What is wrong with the prompt's tokens; empty: nothing that is known."""
        if not begins_with_its_prompt(self.task):
            return ""
        problem = self.task.problems(trajectory.split)[trajectory.problem]
        engine = RecordedEngine(trajectory, self.tokenizer, self.max_context)
        session = self._session(engine, self._ticket(trajectory))
        session.begin(problem)
        prescribed = session.contexts[0].tokens
        found = trajectory.tokens[: len(prescribed)].tolist()
        return "" if found == prescribed else _differing("the prompt", prescribed, found)


def is_repeatable(task: Task) -> bool:
    """Whether an episode played again from its turns comes to the same reward, as its own class says: a class that
    derives from it may do anything."""
    return "repeatable" in vars(type(task)) and bool(task.repeatable)


def start_of(t: Trajectory, field: str = "", instruction: str = "") -> Start | None:
    """The start from which a trajectory goes on; None: it has none. `field`, `instruction`: of a text in prompts."""
    share, given = t.info.get(HINT), given_in(t)
    if field and isinstance(share, float):
        return Start(source="field", share=share, field=field, in_prompt=True, instruction=instruction)
    if given is None or not given.stretches:
        return None
    last, length = given.stretches[-1]
    tokens = t.tokens[: last + length].astype("<i4").tobytes()
    return Start(source="recorded", share=1.0, tokens=tokens, turns=given.stretches, open=given.open)


def turns_asked(t: Trajectory) -> int:
    """Turns of an episode, those included that were given whole."""
    given = given_in(t)
    return len(t.turns) + (len(given.stretches) - given.open if given is not None else 0)


def begins_with_its_prompt(task: Task) -> bool:
    """Whether every episode's first turn follows the problem's prompt: other tasks may begin another context."""
    return is_repeatable(task) or type(task) in (Dataset, Tools)


def _differing(what: str, wanted: Sequence[int], found: Sequence[int]) -> str:
    at = _first_difference(wanted, found)
    there = found[at] if at < len(found) else "nothing"
    return f"token {at} of {what} is {there}, the task and the tokenizer prescribe {wanted[at]}"


def _compared(said: Trajectory, made: Trajectory, *, missed: bool) -> Replayed:
    """`missed`: the episode went another way."""
    if missed or (not made.failed and made.tokens.tolist() != said.tokens.tolist()):
        at = _first_difference(made.tokens.tolist(), said.tokens.tolist())
        return Replayed(lie="rewards", reason=f"its environment answers otherwise from token {at} on", played=True)
    if made.failed:
        return Replayed()  # it needs what is not here
    if not math.isclose(made.reward, said.reward, rel_tol=CLOSE, abs_tol=CLOSE):
        reason = f"its reward is {said.reward:g}, played again it earns {made.reward:g}"
        return Replayed(lie="rewards", reason=reason, played=True)
    for number, (a, b) in enumerate(zip(said.turns, made.turns, strict=False)):
        if not math.isclose(a.reward, b.reward, rel_tol=CLOSE, abs_tol=CLOSE):
            reason = f"the reward of turn {number} is {a.reward:g}, played again it earns {b.reward:g}"
            return Replayed(lie="rewards", reason=reason, played=True)
    return Replayed(played=True)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def main(run: str) -> None:
    """Answer questions until the input ends. What the task prints goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    replayer = Replayer.of(RunFolder(Path(run)).settings())

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"ready": True})
    for line in sys.stdin:
        trajectory = unpack(base64.b64decode(json.loads(line)["trajectory"]))
        try:
            found = replayer.replay(trajectory)
        except Exception as error:  # a process boundary: code of others
            say({"lie": "", "reason": f"{type(error).__name__}: {error}"[:500], "played": False})
            continue
        say({"lie": found.lie, "reason": found.reason, "played": found.played})


if __name__ == "__main__":
    main(sys.argv[1])
