"""A fake `task.Session` that keeps the protocol's contract: the policy is a script, a token a character."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from async_rl.task import Problem, Task
from async_rl.task.protocol import Utterance

END = "\0"
"""in a script: the end-of-text token, which ends a turn and leaves no text"""


@dataclass(slots=True)
class SpokenTurn:
    text: str
    state_key: int
    max_tokens: int
    reward: float = 0.0


class ScriptedSession:
    """Says what `script` says: a list with one text a turn, or a function from the transcript to a text.

    What is said is cut as an engine would: at the end of text, behind the first stop string, after
    `max_tokens`, and where the context of `max_context` characters is full. Like the generator's session,
    `truncated` is true only for the last of these; a call without room returns "" and is no turn.
    """

    def __init__(
        self,
        script: Sequence[str] | Callable[[str], str],
        *,
        prompt: str = "",
        template: str = "",
        max_context: int = 100_000,
    ) -> None:
        self._script = script
        self.template = template
        self._max_context = max_context
        self.transcript = prompt
        self.turns: list[SpokenTurn] = []
        self.notes: dict[str, float | str] = {}
        self.at_turn_limit = False
        self.at_token_limit = False
        self._truncated = False
        self._stopped = False

    @property
    def turn(self) -> int:
        return len(self.turns)

    @property
    def said(self) -> list[Utterance]:
        return [Utterance(text=turn.text, tokens=tuple(map(ord, turn.text))) for turn in self.turns]

    @property
    def truncated(self) -> bool:
        return self._truncated

    @property
    def stopped(self) -> bool:
        return self._stopped

    async def generate(self, *, max_tokens: int, stop: Sequence[str] = (), state_key: int = -1) -> str:
        assert max_tokens >= 1, "a turn without tokens was asked for"
        assert all(stop), "an empty stop string"
        assert state_key >= -1, "a negative state key"
        assert state_key < 2**63, "a state key wider than an int64"
        assert not self.at_turn_limit, "generate after the episode ended"
        await asyncio.sleep(0)  # others run here, as with an engine
        room = min(max_tokens, self._max_context - len(self.transcript))
        if room < 1:
            self._truncated = True
            return ""
        said = self._script(self.transcript) if callable(self._script) else self._script[self.turn]
        text, ended = self._cut(said, room, stop)
        self._stopped = ended
        self._truncated = not ended and room < max_tokens
        self.turns.append(SpokenTurn(text=text, state_key=state_key, max_tokens=max_tokens))
        self.transcript += text
        return text

    @staticmethod
    def _cut(said: str, room: int, stop: Sequence[str]) -> tuple[str, bool]:
        """(what is generated, whether it ended by a stop or the end of text)"""
        for length in range(min(room, len(said)) + 1):
            text = said[:length]
            if any(string in text for string in stop):
                return text, True
            if said[length : length + 1] in ("", END) and length < room:
                return text, True
        return said[:room], False

    def append(self, text: str) -> None:
        assert text, "an empty environment message"
        self.transcript += text

    def append_messages(self, messages: Sequence[Mapping[str, Any]], *, as_sampled: bool = False) -> None:
        assert messages, "no message"
        self.transcript += "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def reward_turn(self, value: float) -> None:
        assert self.turns, "a reward before the first turn"
        self.turns[-1].reward = value

    def end_at_turn_limit(self) -> None:
        self.at_turn_limit = True

    def end_at_token_limit(self) -> None:
        self.at_token_limit = True

    def note_turn(self, key: str, value: float, *, agent: str | None = None) -> None:
        assert self.turns, "a note before the first turn"

    def note_tokens(self, key: str, values: Sequence[float], *, agent: str | None = None) -> None:
        assert self.turns, "a note before the first turn"

    def note(self, key: str, value: float | str) -> None:
        self.notes[key] = value

    def keep(self, value: Any) -> None:
        self.kept = value


def play(task: Task, problem: Problem, session: ScriptedSession) -> float:
    """The reward of one episode, the prompt put in first as the generator does."""
    shown = problem if problem.adapt is None else problem.adapt(problem, session.template)
    if isinstance(shown.prompt, str):
        session.transcript = shown.prompt
    else:
        session.transcript = "".join(f"<{m['role']}>{m['content']}" for m in shown.prompt)
    return asyncio.run(task.rollout(problem, session))


def looked_up(call: str, problem: Problem) -> str:
    """A tool for the task `tools`."""
    return f"{call}? {problem.data['answer']}"
