"""How an environment that speaks in text becomes an episode: as chat messages, or as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from async_rl.task.protocol import Segment, Session

Style = Literal["chat", "text"]
MARK = ">"
"""in plain text: stands before what the policy says"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """Observations and the policy's turns, in one of two styles.

    `chat`: the system message and the first observation are the prompt, each further observation is a user message.
    `text`: `OBSERVATION>`, then the turn, then a line break, the next observation and `>`; a turn ends at a line break.

    Example: with `text` an episode reads `0>down`, `4>down`, `8>right`, a line each.
    """

    style: Style
    system: str = ""
    """said once, at the beginning"""

    def prompt(self, observation: str) -> str | Sequence[Mapping[str, str]]:
        """The problem's prompt."""
        if self.style == "text":
            return (f"{self.system}\n" if self.system else "") + observation + MARK
        user = {"role": "user", "content": observation}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings at which a turn ends."""
        return ("\n",) if self.style == "text" else ()

    def answer(self, session: Session, said: str, observation: str) -> None:
        """Put `observation` behind the turn `said`."""
        if self.style == "text":
            session.append(self.between(said) + observation + MARK)
        else:
            session.append_messages([{"role": "user", "content": observation}])

    @staticmethod
    def between(said: str) -> str:
        """What separates a turn in plain text from the next observation."""
        return "" if said.endswith("\n") else "\n"


def alphabet_of(episodes: Iterable[Sequence[Segment]]) -> str:
    """The characters of these episodes, and printable ASCII."""
    seen = {chr(code) for code in range(32, 127)} | {"\n"}
    for segments in episodes:
        seen.update(*(segment.text for segment in segments))
    return "".join(sorted(seen))


def last_named(text: str, names: Sequence[str]) -> int | None:
    """Which of `names` stands last in `text` as a word of its own, upper and lower case alike; None: none does."""
    best, found = -1, None
    for number, name in enumerate(names):
        for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE):
            if match.end() > best:
                best, found = match.end(), number
    return found
