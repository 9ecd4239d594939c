"""One running episode: the session that the task sees on one side, the trajectory that it becomes on the other."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from async_rl.errors import RunFailed
from async_rl.generator.agent_door import AgentDoor
from async_rl.generator.chat import Chat
from async_rl.generator.contexts import STOPS, WHOLE, Context, RecordedTurns, Spoken, first_tokens, lay_out
from async_rl.generator.engine import Completion, Engine, LogitsNotFinite, Request, SamplingParams
from async_rl.generator.places import Slots
from async_rl.generator.start import OTHER_WAY, GivenStart, with_given
from async_rl.generator.step_mark import AT_ENGINE
from async_rl.generator.turn_request import TurnRequest
from async_rl.model.tokenizer import Tokenizer, adapted, prompt_text
from async_rl.steady_clock import steady_time
from async_rl.task.protocol import Connection, Problem, Score, Utterance
from async_rl.trajectory import Ended, Split, Trajectory, Turn
from async_rl.trajectory.given import OPEN
from async_rl.trajectory.turn_notes import note_name, noted_tokens, noted_turn, sendable
from async_rl.trajectory.types import LOWEST_TEMPERATURE, group_seed, sample_seed, turn_temperature
from async_rl.wire.messages import Permit

Answer = TypeVar("Answer")
LONGEST_REASON = 4000
"""characters kept of a task's error"""
KEYS = 1 << 40
"""distance between the engine's keys of two contexts of an episode, and so the most episodes of a generator"""
MOST_SCORINGS = 16
"""times that a text is scored anew because the weights changed meanwhile"""


class TurnLimit(Exception):
    """The episode asked for more turns than `generator.max_turns` allows."""


class EpisodeAborted(ConnectionAbortedError):
    """The episode is not wanted any more, or the engine gave its turn up."""


class OtherEpisode(Exception):
    """The recorded turns do not belong to this episode: its environment answered differently."""


class Ticket(Struct, frozen=True, kw_only=True):
    """Which trajectory an episode will become: one sample of a permit's group."""

    permit: Permit
    sample: int
    """index within the group"""
    seed: int
    """of the sample, 64 bits unsigned"""
    greedy: bool = False
    """sampled greedily, whatever the task asks for: a baseline that is not trained"""


def make_tickets(permit: Permit, seeds: Sequence[int] | None = None) -> list[Ticket]:
    """One ticket for each sample of the permit. `seeds`: of the samples; None: they follow from the permit's seed."""
    chosen = seeds if seeds is not None else [sample_seed(permit.seed, sample) for sample in permit.samples]
    return [
        Ticket(permit=permit, sample=sample, seed=seed) for sample, seed in zip(permit.samples, chosen, strict=True)
    ]


class EpisodeSession:
    """Implements `task.Session`, and keeps the episode's contexts.

    Tokens are only ever appended; nothing is re-tokenised.
    """

    __slots__ = (
        "__dict__", "__weakref__", "_agents", "_begun", "_clock", "_connection", "_ended", "_engine", "_generator",
        "_held", "_info", "_key", "_max_turns", "_now", "_on_turn", "_over", "_params", "_record", "_said", "_sampling",
        "_slots", "_spoken", "_start", "_stopped", "_task_since", "_ticket", "_window", "abandoned", "agent_tokens",
        "contexts", "cut", "diverged", "engine_error", "kept", "max_context", "problem", "refused", "session_id",
        "started_at", "tokenizer",
    )  # fmt: skip  # more than 30 attributes: a dictionary of its own for each session takes longer

    def __init__(
        self,
        *,
        engine: Engine,
        tokenizer: Tokenizer,
        ticket: Ticket,
        session_id: int,
        max_context: int,
        max_turns: int,
        clock: Callable[[], float] = steady_time,
        record: Trajectory | None = None,
        on_turn: Callable[[], None] | None = None,
        generator: str = "",
        agents: AgentDoor[EpisodeSession] | None = None,
        slots: Slots | None = None,
        window: int = 0,
    ) -> None:
        """
        Args:
            session_id: the engine's key of this episode.
            clock: seconds since the epoch.
            record: turns that a lost generator sampled of this episode (see `so_far`), with which the first calls of
                `generate` are answered.
            on_turn: called after each turn that was sampled here.
            generator: name of this generator.
            agents: where agents reach the episodes of this process.
            slots: places that they share.
            window: tokens that a training episode samples before it is cut; 0: it is whole.
        """
        assert 0 <= session_id < KEYS
        self._generator = generator
        self._engine = engine
        self.tokenizer = tokenizer
        self._ticket = ticket
        self._key = ticket.permit.group, ticket.sample
        self.session_id = session_id
        self.max_context = max_context
        self._max_turns = min(max_turns, ticket.permit.max_turns or max_turns)
        self._clock = clock
        self.problem: Problem | None = None
        self.contexts: list[Context] = []
        self._now = self.open_context()
        self._said: list[Spoken] = []  # turns in order of time
        self._spoken: Completion | None = None  # the last turn
        self._begun = 0  # turns sampled or being sampled
        self._params: SamplingParams | None = None
        self._stopped = False
        self._ended: Ended = "finished"
        self._info: dict[str, float | str] = {}
        self.kept: Any = None
        """what the task keeps for the group's reward"""
        self._record = None if record is None else RecordedTurns(record)
        self._start = None if ticket.permit.start is None else GivenStart(ticket.permit.start)
        self._window = window if ticket.permit.split == "train" else 0
        self._on_turn = on_turn
        self._agents = agents
        self._connection: Connection | None = None
        self.agent_tokens = max_context
        """longest turn of an agent"""
        self._slots = slots or Slots({})
        self._held: list[asyncio.Semaphore] = []
        self.abandoned = ""
        """why the episode is not wanted any more"""
        self._over = False
        self._task_since = time.monotonic()  # since when the task has the word, and not the engine
        self._sampling = 0  # calls of the engine
        self.engine_error: Exception | None = None
        """why the engine gave up a turn, whatever the task makes of that"""
        self.refused: Literal["", "length", "turn_limit"] = ""
        """what was used up when a turn was asked for last; empty: nothing"""
        self.cut: Literal["", "turn", "between"] = ""
        """the episode goes on in another permit: it was cut within a turn, or behind one; empty: it is not cut"""
        self.diverged = False
        """the record did not fit; the episode has to be run again without it"""
        self.started_at = clock() if record is None else record.started_at

    # ------------------------------------------------ called by the task

    @property
    def turn(self) -> int:
        return len(self._said)

    @property
    def template(self) -> str:
        return self.tokenizer.template_text

    @property
    def said(self) -> Sequence[Utterance]:
        return [spoken.utterance() for spoken in self._said]

    @property
    def split(self) -> Split:
        return self._ticket.permit.split

    @property
    def seed(self) -> int:
        return group_seed(self._ticket.seed, -1)

    @property
    def truncated(self) -> bool:
        return self._now.truncated

    @property
    def stopped(self) -> bool:
        return self._stopped

    def begin(self, problem: Problem) -> None:
        """Append the prompt. Raises ValueError when it is empty or too long."""
        self.problem = adapted(problem, self.tokenizer)
        if self._start is not None:
            self.problem = self._start.begin(self.problem, self.tokenizer)
        self._append_prompt(self._now, self.problem.prompt)

    async def generate(
        self,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        state_key: int = -1,
        temperature: float | None = None,
        stop_tokens: Sequence[int] = (),
        agent: str = "",
    ) -> str:
        asked = TurnRequest(
            max_tokens=max_tokens,
            stop=stop,
            stop_tokens=stop_tokens,
            temperature=temperature,
            state_key=state_key,
            agent=agent,
        )
        completion = await self.take_turn(self._now, asked)
        self._stopped = completion.finish == "stop"
        if completion is self._spoken:
            return self._said[-1].text
        return self.tokenizer.turn_text(with_given(self._start, completion.tokens), stop)

    def append(self, text: str) -> None:
        self._now.extend(self.tokenizer.encode(text, behind=True))

    def append_messages(self, messages: Sequence[Mapping[str, Any]], *, as_sampled: bool = False) -> None:
        context = self._now
        if context.chat is None:
            raise ValueError(
                "this context began with a text, to which no chat messages can be appended; give the prompt as messages"
            )
        turn = context.tokens[context.chat.length :]
        if not turn and not context.truncated:
            raise ValueError("no turn lies between these messages and those before; append them in one call")
        context.extend(context.chat.follow(turn, messages, as_sampled=as_sampled))

    def start_context(self, prompt: str | Sequence[Mapping[str, Any]]) -> int:
        before, context = self._now, self.open_context()
        try:
            self._append_prompt(context, prompt)
        except Exception:
            self.contexts.remove(context)
            raise
        self._engine.release(before.key)
        self._now = context
        self._stopped = False
        if self._ended == "length":  # of the context before
            self._ended = "finished"
        return context.number

    def resume_context(self, number: int) -> None:
        found = next((context for context in self.contexts if context.number == number), None)
        if found is None:
            raise ValueError(f"there is no context {number} in this episode")
        self._now = found
        self._stopped = False

    async def score(self, text: str) -> Score:
        history, tokens = self._now.tokens, self.tokenizer.encode(text, behind=True)
        if len(history) + len(tokens) > self.max_context:
            raise ValueError(
                f"a text of {len(tokens)} tokens behind {len(history)} does not fit into the context of "
                f"{self.max_context}"
            )
        for _ in range(MOST_SCORINGS):
            version = self._engine.version
            log_probs = await self.untimed(self._engine.probe([*history, *tokens])) if tokens else ()
            if self._engine.version == version:
                return Score(log_probs=tuple(log_probs[len(history) - 1 :]) if tokens else (), version=version)
        raise RuntimeError(f"the weights changed {MOST_SCORINGS} times while a text was scored")

    def openai(self, *, max_tokens: int | None = None) -> Connection:
        if self._agents is None:
            raise RuntimeError("no agent can reach this session: it was made without an endpoint")
        if max_tokens is not None:
            if max_tokens < 1:
                raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
            self.agent_tokens = max_tokens
        if self._connection is None:
            self._connection = self._agents.open(self)
        return self._connection

    @asynccontextmanager
    async def slot(self, name: str) -> AsyncIterator[None]:
        place = self._slots.of(name)
        await self.untimed(place.acquire())
        self._held.append(place)
        try:
            if self.abandoned:
                raise EpisodeAborted(self.abandoned)
            yield
        finally:
            if place in self._held:  # else the episode is over
                self._held.remove(place)
                place.release()

    def reward_turn(self, value: float, *, agent: str | None = None) -> None:
        self._change_turn(agent, lambda turn: replace(turn, reward=float(value)))

    def note_turn(self, key: str, value: float, *, agent: str | None = None) -> None:
        self._change_turn(agent, lambda turn: noted_turn(turn, key, value))

    def note_tokens(self, key: str, values: Sequence[float], *, agent: str | None = None) -> None:
        self._change_turn(agent, lambda turn: noted_tokens(turn, key, values))

    def end_at_turn_limit(self) -> None:
        self._ended = "turn_limit"

    def end_at_token_limit(self) -> None:
        self._ended = "length"

    def note(self, key: str, value: float | str) -> None:
        text = sendable(value) if isinstance(value, str) else float(value)
        self._info[note_name(key)] = text

    def keep(self, value: Any) -> None:
        self.kept = value

    # -------------------------------------------- turns and contexts

    def _change_turn(self, agent: str | None, change: Callable[[Turn], Turn]) -> None:
        """Of the turn generated last (by this agent); one that was given has no record. Raises ValueError."""
        own = [one for one in self._said if agent is None or one.agent == agent]
        if not own:
            raise ValueError("no turn has been generated yet" + (f" by {agent!r}" if agent is not None else ""))
        context, number = own[-1].context, own[-1].number
        if number != WHOLE:
            context.turns[number] = change(context.turns[number])

    def open_context(self) -> Context:
        """A new context, empty."""
        number, seed = len(self.contexts), self._ticket.seed
        # the noise of a token depends on seed and position: two answers to one prompt must not be the same
        context = Context(
            number=number, key=self.session_id + number * KEYS, seed=group_seed(seed, number) if number else seed
        )
        self.contexts.append(context)
        return context

    def check_turn(self, asked: TurnRequest) -> float:
        """The temperature of a turn. Raises ValueError for one that cannot be asked, TurnLimit when the turns are used
        up."""
        temperature = self._ticket.permit.temperature if asked.temperature is None else asked.temperature
        greedy = temperature == 0 and (self.split == "eval" or self._ticket.greedy)
        if not (greedy or LOWEST_TEMPERATURE <= temperature < math.inf):
            raise ValueError(
                f"temperature is {temperature:g}; it must be {LOWEST_TEMPERATURE:g} or more, or 0 (greedy) where the "
                "episode is held out"
            )
        if self._begun >= self._max_turns:
            self.refused = "turn_limit"
            raise TurnLimit(f"more than {self._max_turns} turns")
        return temperature

    async def take_turn(self, context: Context, asked: TurnRequest) -> Completion:
        """Sample one turn of a context, or recall it from the record. A context without room gives a turn of no tokens,
        which is not recorded.

        Raises TurnLimit, EpisodeAborted (with the tokens that came kept), what the engine raises, and ValueError for
        what cannot be asked.
        """
        if self._ticket.greedy:
            asked = replace(asked, temperature=0.0)
        temperature = self.check_turn(asked)
        if context.busy:
            raise ValueError("a turn of this context is being sampled; wait for it")
        room = min(asked.max_tokens, self.max_context - len(context.tokens))
        if room < 1:
            context.truncated = True
            self._ended = "length"
            return Completion(tokens=(), log_probs=(), versions=(), finish="length")
        if self.abandoned or context.unwanted:
            raise EpisodeAborted(self.abandoned or "nobody waits for the turn")
        self.refused = ""
        if self._ended == "length":  # of another context, or of a turn before this one
            self._ended = "finished"
        if self._start is not None and self._connection is None:  # agents have no use for half an answer
            if (whole := self._start.give(context, room)) is not None:
                self._say(context, WHOLE, whole, asked)
                return whole
            room -= len(self._start.opened)
        free = room
        if self._window and (left := self._left(room)) < room:
            room = left
        context.busy = True
        self._begun += 1
        try:
            recorded = 0.0
            if asked.temperature is not None:
                recorded = turn_temperature(asked.temperature, self._ticket.permit.temperature)
            recalled = None if self._record is None else self._recalled(context, room, recorded)
            if recalled is None:
                request = self._request(context, room, temperature, asked)
                completion = await self.untimed(self._engine.generate(request))
                if not all(map(math.isfinite, completion.log_probs)):
                    raise self._not_finite(completion)
            else:
                completion = recalled
            # also one that the engine gave up behind some tokens is recorded
            if not self._over and (completion.tokens or completion.finish != "aborted"):
                context.add_turn(completion, asked.state_key, asked.agent, recorded)
                self._say(context, len(context.turns) - 1, completion, asked)
        finally:
            context.busy = False
            self._begun = len(self._said)
            if len(self.contexts) > 1:
                self._begun += sum(other.busy for other in self.contexts)
        if completion.finish == "aborted":  # the trajectory keeps the tokens that came
            raise EpisodeAborted(self.abandoned or "the engine gave the request up")
        if room < free and completion.finish != "stop":
            self._cut("turn")
        if self._on_turn is not None and recalled is None:
            self._on_turn()
        if room < asked.max_tokens - len(with_given(self._start, ())) and completion.finish != "stop":
            context.truncated = True
            self._ended = "length"
        return completion

    def _left(self, room: int) -> int:
        """Tokens that the episode may still sample before it is cut, or `room` where it is not. An episode of several
        contexts, or one that an agent plays, is whole from there on: nothing could give it back what it said."""
        if not self._window or len(self.contexts) > 1 or self._connection is not None:
            return room
        left = self._window - sum(turn.length for turn in self._now.turns)
        if left < 1:
            self._cut("between")
        return left

    def _cut(self, where: Literal["turn", "between"]) -> NoReturn:
        """End this piece of the episode."""
        self.cut = self.cut or where
        raise EpisodeAborted("the window of the episode is full; it goes on in another permit")

    def refuse_length(self) -> None:
        """Record that an agent asked for a turn for which the context has no room."""
        self.refused = self._ended = "length"

    def sampled(self, context: Context) -> Sequence[int]:
        """Tokens so far of the turn that is being sampled in a context."""
        return self._engine.sampled(context.key) if context.busy else ()

    def cut_off(self, context: Context) -> None:
        """End the turn of a context that nobody waits for any more. What was sampled of it is kept."""
        context.unwanted = True
        self._engine.release(context.key)

    def _say(self, context: Context, number: int, completion: Completion, asked: TurnRequest) -> None:
        tokens = completion.tokens
        text = self.tokenizer.turn_text(tokens if self._start is None else with_given(self._start, tokens), asked.stop)
        self._spoken = completion
        self._said.append(Spoken(context, number, text, tokens, asked.agent))

    def _request(self, context: Context, room: int, temperature: float, asked: TurnRequest) -> Request:
        plain = not asked.stop and not asked.stop_tokens
        params = self._params if plain else None  # of the turn before
        if params is None or params.max_tokens != room or params.temperature != temperature:
            params = SamplingParams(
                max_tokens=room,
                temperature=temperature,
                stop_tokens=self.tokenizer.ends_with(asked.stop_tokens),
                stop_strings=tuple(asked.stop),
            )
            self._params = params if plain else None
        return Request(session=context.key, tokens=context.tokens, params=params, seed=context.seed)

    def _not_finite(self, completion: Completion) -> LogitsNotFinite:
        error = LogitsNotFinite(completion.versions[int(np.isfinite(completion.log_probs).argmin())])
        self.engine_error = error
        return error

    async def untimed(self, call: Awaitable[Answer]) -> Answer:
        """What the engine answers, or a wait for other episodes: the time until then is not the task's."""
        key = self._key
        self._sampling += 1
        AT_ENGINE[key] = AT_ENGINE.get(key, 0) + 1
        try:
            return await call
        except (RunFailed, LogitsNotFinite) as error:
            self.engine_error = error
            raise
        finally:
            self._sampling -= 1
            left = AT_ENGINE.pop(key) - 1
            if left:
                AT_ENGINE[key] = left
            self._task_since = time.monotonic()

    def _recalled(self, context: Context, room: int, temperature: float) -> Completion | None:
        """The turn of the record behind what this context holds; None after its last one. Raises OtherEpisode when it
        has turns left and none fits."""
        record = self._record
        if record is None or not len(record):
            return None
        found = None if record.broken else record.take(context.tokens, room, temperature)
        if found is None and (record.broken or self._connection is None):  # agents may come in another order
            self.diverged = True
            raise OtherEpisode(f"the turns of the record follow other tokens than turn {len(self._said)}")
        return found

    def _append_prompt(self, context: Context, prompt: str | Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError when it is empty or too long, UserError for what the chat template refuses."""
        problem = self.problem
        assert problem is not None
        tools, arguments = problem.tools, problem.template_args
        tokens: Sequence[int]
        if isinstance(prompt, str):
            if prompt is problem.prompt:  # further texts have no use for the problem's tools
                prompt = prompt_text(prompt, self.tokenizer, tools=tools, arguments=arguments)
            tokens = first_tokens(self.tokenizer, prompt)
        else:
            context.chat = Chat(tokenizer=self.tokenizer, tools=tools, arguments=arguments)
            tokens = context.chat.begin(prompt)
        if not tokens:
            raise ValueError("the prompt is empty")
        if len(tokens) >= self.max_context:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the context holds {self.max_context}")
        context.extend(tokens)
        context.prompt = len(tokens)

    # -------------------------------------------- called by the generator

    @property
    def transcript(self) -> str:
        """Everything behind the prompt of the context that spoke last: turns, and what the environment said."""
        context = self._said[-1].context if self._said else self._now
        return self.tokenizer.decode(context.tokens[context.prompt :], behind=True)

    def abandon(self, reason: str) -> None:
        """End the episode, which is not wanted any more: now, or when its environment has answered."""
        self.abandoned = reason
        self._release()

    def _release(self) -> None:
        for context in self.contexts:
            self._engine.release(context.key)

    @property
    def task_s(self) -> float:
        """Seconds that the task has had the word since the last turn; 0 while the engine samples one."""
        return 0.0 if self._sampling else time.monotonic() - self._task_since

    @property
    def waits_for_agent(self) -> bool:
        """An agent may play the episode, and has not asked for a turn yet."""
        return self._connection is not None and not self._begun

    def so_far(self) -> Trajectory:
        """The turns finished until now, from which another generator continues if this one dies. Not for training."""
        return self._made(reward=0.0, ended="aborted", reason="still running", info=None)

    def finish(self, *, reward: float, failed: Ended | None = None, reason: str = "") -> Trajectory:
        """The trajectory that this episode became; `failed` overrides how it ended."""
        self._over = True
        self.abandoned = self.abandoned or "the episode is over"  # what the task left running gets no more turns
        if failed == "window":
            self._info[OPEN] = self.cut
        else:  # a piece keeps its cache: the episode may go on here
            self._release()
        if self._agents is not None and self._connection is not None:
            self._agents.close(self._connection)
        while self._held:
            self._held.pop().release()
        if self._start is not None and self._start.is_left_behind and failed not in ("error", "aborted"):
            failed, reason, reward = "error", OTHER_WAY, 0.0
        made = self._made(reward=reward, ended=failed or self._ended, reason=reason, info=self._info)
        broken = made.check()
        if broken is None:
            return made
        # An engine that answers nonsense (a log-prob that is no number) must not end the run.
        empty = np.zeros(len(made.tokens), np.float32)
        return replace(made, log_behaviour=empty, turns=(), versions=(), reward=0.0, ended="error", reason=broken)

    def _made(self, *, reward: float, ended: Ended, reason: str, info: Mapping[str, float | str] | None) -> Trajectory:
        """`info`: None for an unfinished trajectory."""
        ticket, permit, columns = self._ticket, self._ticket.permit, lay_out(self.contexts)
        given = {} if self._start is None else self._start.record()
        return Trajectory(
            group=permit.group,
            sample=ticket.sample,
            problem=permit.problem,
            split=permit.split,
            seed=ticket.seed,
            tokens=columns.tokens,
            log_behaviour=columns.log_behaviour,
            turns=columns.turns,
            versions=columns.versions,
            contexts=columns.contexts,
            reward=reward,
            ended=ended,
            temperature=permit.temperature,
            reason=reason[:LONGEST_REASON],
            generator=self._generator,
            started_at=self.started_at,
            finished_at=self._clock(),
            info={STOPS: columns.stops, **given} if info is None else {**info, **given},
        )
