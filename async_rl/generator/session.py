"""One running episode: the session that the task sees on one side, the trajectory that it becomes on the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from async_rl.errors import RunFailed
from async_rl.generator.engine import Completion, Engine, LogitsNotFinite, Request, SamplingParams
from async_rl.model.tokenizer import Tokenizer, problem_text
from async_rl.task.protocol import Problem
from async_rl.trajectory import Ended, Split, Trajectory, Turn, VersionSpan
from async_rl.trajectory.types import sample_seed
from async_rl.wire.messages import Permit

STOPS = "turns_stopped"
"""info of an unfinished trajectory: for each turn 1 when it ended by a stop, else 0"""
LONGEST_REASON = 4000
"""characters kept of a task's error"""


class TurnLimit(Exception):
    """The episode asked for more turns than `generator.max_turns` allows."""


class EpisodeAborted(ConnectionAbortedError):
    """The episode is not wanted any more, or the engine gave its turn up."""


class OtherEpisode(Exception):
    """The recorded turns do not belong to this episode: its environment answered differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Which trajectory an episode will become: one sample of a permit's group."""

    permit: Permit
    sample: int
    """index within the group"""
    seed: int
    """of the sample, 64 bits unsigned"""


def make_tickets(permit: Permit, seeds: Sequence[int] | None = None) -> list[Ticket]:
    """One ticket for each sample of the permit. `seeds`: of the samples; None: they follow from the permit's seed."""
    chosen = seeds if seeds is not None else [sample_seed(permit.seed, sample) for sample in permit.samples]
    return [
        Ticket(permit=permit, sample=sample, seed=seed) for sample, seed in zip(permit.samples, chosen, strict=True)
    ]


class EpisodeSession:
    """Implements `task.Session`, and keeps the episode's tokens, log-probs and versions, [tokens] each.

    Tokens are only ever appended; nothing is re-tokenised.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        tokenizer: Tokenizer,
        ticket: Ticket,
        session_id: int,
        max_context: int,
        max_turns: int,
        clock: Callable[[], float] = time.time,
        record: Trajectory | None = None,
        on_turn: Callable[[], None] | None = None,
        generator: str = "",
    ) -> None:
        """
        Args:
            session_id: the engine's key of this episode.
            clock: seconds since the epoch.
            record: turns that a lost generator sampled of this episode (see `so_far`), with which the first calls of
                `generate` are answered.
            on_turn: called after each turn that was sampled here.
            generator: name of this generator.
        """
        self._generator = generator
        self._engine = engine
        self._tokenizer = tokenizer
        self._ticket = ticket
        self._id = session_id
        self._max_context = max_context
        self._max_turns = max_turns
        self._clock = clock
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._versions: list[int] = []  # -1 where not sampled
        self._turns: list[Turn] = []
        self._truncated = False
        self._stopped = False
        self._ended: Ended = "finished"
        self._info: dict[str, float | str] = {}
        self._record = record
        self._on_turn = on_turn
        self._stops = ""  # of each turn: 1 when it ended by a stop
        self._abandoned = ""
        self._task_since = time.monotonic()  # since when the task has the word, and not the engine
        self._sampling = False
        self.engine_error: Exception | None = None
        """why the engine gave up a turn, whatever the task makes of that"""
        self.diverged = False
        """the record did not fit; the episode has to be run again without it"""
        self.started_at = clock() if record is None else record.started_at

    # ------------------------------------------------ called by the task

    @property
    def turn(self) -> int:
        return len(self._turns)

    @property
    def split(self) -> Split:
        return self._ticket.permit.split

    @property
    def truncated(self) -> bool:
        return self._truncated

    @property
    def stopped(self) -> bool:
        return self._stopped

    def begin(self, problem: Problem) -> None:
        """Append the prompt. Raises ValueError when it is empty or too long."""
        tokens = self._tokenizer.encode(problem_text(problem, self._tokenizer))
        if not tokens:
            raise ValueError("the prompt is empty")
        if len(tokens) >= self._max_context:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the context holds {self._max_context}")
        self._extend(tokens)

    async def generate(self, *, max_tokens: int, stop: Sequence[str] = (), state_key: int = -1) -> str:
        if len(self._turns) >= self._max_turns:
            raise TurnLimit(f"more than {self._max_turns} turns")
        room = min(max_tokens, self._max_context - len(self._tokens))
        if room < 1:
            self._stopped = False
            self._truncated = True
            self._ended = "length"
            return ""
        if self._abandoned:
            raise EpisodeAborted(self._abandoned)
        recalled = self._recalled(room)
        completion = recalled or await self._sample(room, stop)
        if completion.finish == "aborted" and not completion.tokens:
            raise EpisodeAborted(self._abandoned or "the engine gave the request up")
        self._turns.append(Turn(start=len(self._tokens), length=len(completion.tokens), state_key=state_key))
        self._tokens = [*self._tokens, *completion.tokens]
        self._log_probs.extend(completion.log_probs)
        self._versions.extend(completion.versions)
        if completion.finish == "aborted":  # the trajectory keeps the tokens that came
            raise EpisodeAborted(self._abandoned or "the engine gave the request up")
        self._stopped = completion.finish == "stop"
        self._stops += "01"[self._stopped]
        if self._on_turn is not None and recalled is None:
            self._on_turn()
        if not self._stopped and room < max_tokens:
            self._truncated = True
            self._ended = "length"
        return self._tokenizer.turn_text(completion.tokens, stop)

    async def _sample(self, room: int, stop: Sequence[str]) -> Completion:
        """One turn by the engine. Raises LogitsNotFinite, or RunFailed when the engine has died."""
        request = Request(
            session=self._id,
            tokens=self._tokens,
            params=SamplingParams(
                max_tokens=room,
                temperature=self._ticket.permit.temperature,
                stop_tokens=tuple(sorted(self._tokenizer.end_ids)),
                stop_strings=tuple(stop),
            ),
            seed=self._ticket.seed,
        )
        self._sampling = True
        try:
            completion = await self._engine.generate(request)
            finite = np.isfinite(completion.log_probs)
            if not finite.all():
                raise LogitsNotFinite(completion.versions[int(finite.argmin())])
        except (RunFailed, LogitsNotFinite) as error:
            self.engine_error = error
            raise
        finally:
            self._sampling = False
            self._task_since = time.monotonic()
        return completion

    def _recalled(self, room: int) -> Completion | None:
        """The next turn of the record; None after its last one. Raises OtherEpisode when it does not fit."""
        record, number = self._record, len(self._turns)
        if record is None or number >= len(record.turns):
            return None
        turn = record.turns[number]
        end = turn.start + turn.length
        stops = str(record.info.get(STOPS, ""))
        same = self._tokens == record.tokens[: turn.start].tolist()
        if not same or turn.length > room or len(stops) != len(record.turns):
            self.diverged = True
            raise OtherEpisode(f"turn {number} of the record follows other tokens")
        versions = np.full(len(record.tokens), -1, np.int64)
        for span in record.versions:
            versions[span.start : span.end] = span.version
        return Completion(
            tokens=record.tokens[turn.start : end].tolist(),
            log_probs=record.log_behaviour[turn.start : end].tolist(),
            versions=versions[turn.start : end].tolist(),
            finish="stop" if stops[number] == "1" else "length",
        )

    def append(self, text: str) -> None:
        self._extend(self._tokenizer.encode(text))

    def reward_turn(self, value: float) -> None:
        if not self._turns:
            raise ValueError("no turn has been generated yet")
        last = self._turns[-1]
        self._turns[-1] = Turn(start=last.start, length=last.length, reward=float(value), state_key=last.state_key)

    def end_at_turn_limit(self) -> None:
        self._ended = "turn_limit"

    def end_at_token_limit(self) -> None:
        self._ended = "length"

    def note(self, key: str, value: float | str) -> None:
        text = value.encode("utf-8", "replace").decode() if isinstance(value, str) else float(value)
        self._info[str(key).encode("utf-8", "replace").decode()] = text

    # -------------------------------------------- called by the generator

    def abandon(self, reason: str) -> None:
        """End the episode, which is not wanted any more: now, or when its environment has answered."""
        self._abandoned = reason
        self._engine.release(self._id)

    @property
    def task_s(self) -> float:
        """Seconds that the task has had the word since the last turn; 0 while the engine samples one."""
        return 0.0 if self._sampling else time.monotonic() - self._task_since

    def so_far(self) -> Trajectory:
        """The turns finished until now, from which another generator continues if this one dies. Not for training."""
        return self._made(reward=0.0, ended="aborted", reason="still running", info={STOPS: self._stops})

    def finish(self, *, reward: float, failed: Ended | None = None, reason: str = "") -> Trajectory:
        """The trajectory that this episode became; `failed` overrides how it ended."""
        self._abandoned = self._abandoned or "the episode is over"  # what the task left running gets no more turns
        self._engine.release(self._id)
        made = self._made(reward=reward, ended=failed or self._ended, reason=reason, info=self._info)
        broken = made.check()
        if broken is None:
            return made
        # An engine that answers nonsense (a log-prob that is no number) must not end the run.
        empty = np.zeros(len(made.tokens), np.float32)
        return replace(made, log_behaviour=empty, turns=(), versions=(), reward=0.0, ended="error", reason=broken)

    def _made(self, *, reward: float, ended: Ended, reason: str, info: Mapping[str, float | str]) -> Trajectory:
        ticket, permit = self._ticket, self._ticket.permit
        return Trajectory(
            group=permit.group,
            sample=ticket.sample,
            problem=permit.problem,
            split=permit.split,
            seed=ticket.seed,
            tokens=np.asarray(self._tokens, dtype=np.int32),
            log_behaviour=np.asarray(self._log_probs, dtype=np.float32),
            turns=tuple(self._turns),
            versions=_spans(self._versions),
            reward=reward,
            ended=ended,
            temperature=permit.temperature,
            reason=reason[:LONGEST_REASON],
            generator=self._generator,
            started_at=self.started_at,
            finished_at=self._clock(),
            info=info,
        )

    def _extend(self, tokens: Sequence[int]) -> None:
        self._tokens = [*self._tokens, *tokens]
        self._log_probs.extend([0.0] * len(tokens))
        self._versions.extend([-1] * len(tokens))


def _spans(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    """Runs of equal versions; environment tokens (-1) between two runs of one version do not split it."""
    spans: list[VersionSpan] = []
    for position, version in enumerate(versions):
        if version < 0:
            continue
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(version=version, start=spans[-1].start, end=position + 1)
        else:
            spans.append(VersionSpan(version=version, start=position, end=position + 1))
    return tuple(spans)
