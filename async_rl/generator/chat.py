"""A chat that grows by what the chat template writes, without a token of its history written anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from async_rl.errors import UserError
from async_rl.model.data_text import Disguise
from async_rl.model.tokenizer import Tokenizer, disguise_of, prompt_text, prompt_tokens
from async_rl.task.tool_formats import FORMATS, Parsed, call_id, detect

Message = Mapping[str, Any]
STAND_IN = "x5q7z"
"""text of a turn that is rendered in place of the sampled one"""
SHOWN = 60
"""characters of a text that an error quotes"""
REMEDY = "begin a new context (start_context) with the messages that the model is meant to see"


class HistoryRewritten(ValueError):
    """The chat template writes what was said before differently once more follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What the template makes of an open turn and the messages behind it."""

    said: Message
    """the turn as a message"""
    behind: str
    """what the template writes behind the turn: its end, the messages, the header of the next turn"""
    text: str = ""
    """all that the template writes; empty: not known"""


@dataclass(slots=True, kw_only=True)
class Chat:
    """What was said in a context, as messages. It ends with the header of an assistant's turn, behind which the model
    speaks: the open turn."""

    tokenizer: Tokenizer
    messages: Sequence[Message] = ()
    """without the turn that is open"""
    tools: Sequence[Mapping[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """further variables of the chat template"""
    length: int = 0
    """tokens of the context up to the open turn"""
    text: str = ""
    """what the template writes for `messages`, the open turn's header included"""

    def render(self, messages: Sequence[Message]) -> str:
        """The messages as the template writes them, and the header of the next turn. Raises UserError."""
        return prompt_text(messages, self.tokenizer, tools=self.tools, arguments=self.arguments)

    def begin(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the messages that the chat begins with. Raises UserError."""
        text = self.render(messages)
        if disguise_of([*messages, *self.tools], self.tokenizer) is None:
            tokens = self.tokenizer.encode(text, first=not self.tokenizer.has_chat_template)
        else:
            tokens = prompt_tokens(messages, self.tokenizer, tools=self.tools, arguments=self.arguments)
        self.messages, self.text, self.length = list(messages), text, len(tokens)
        return tokens

    def follow(self, turn: Sequence[int], messages: Sequence[Message], *, as_sampled: bool = False) -> list[int]:
        """End the open turn and append messages: the tokens to be put behind it.

        Args:
            turn: tokens behind the header, as the context holds them.
            as_sampled: keep the turn as it was sampled, even where the template would write it differently.

        Raises HistoryRewritten when the template would write what is there differently; UserError when it refuses the
        messages.
        """
        text = ""
        if not self.tokenizer.has_chat_template:
            said: Message = {"role": "assistant", "content": self.tokenizer.decode(turn)}
            tokens = self.tokenizer.encode("\n" + self.render(messages), behind=True)  # a line a message
        else:
            disguise = disguise_of(list(messages), self.tokenizer)
            more = messages if disguise is None else disguise.hide(list(messages))
            try:
                found = self._continuation(turn, more)
            except HistoryRewritten:
                if not as_sampled:
                    raise
                found = self._behind_any(turn, more)
            said, tokens = found.said, self._encoded(found.behind, disguise)
            text = found.text if disguise is None else ""
            if turn and tokens and tokens[0] == turn[-1] and self.tokenizer.is_added(tokens[0]):
                tokens = tokens[1:]  # the end was sampled
        self.messages = [*self.messages, said, *messages]
        self.text = text or self.render(self.messages)
        self.length += len(turn) + len(tokens)
        return tokens

    def _encoded(self, behind: str, disguise: Disguise | None) -> list[int]:
        """Tokens of what follows a turn, its end included: the two are tokenised together, as in a whole text."""
        if disguise is not None:
            return self.tokenizer.encode_disguised(behind, disguise)
        return self.tokenizer.encode(behind, behind=True)

    def _continuation(self, turn: Sequence[int], messages: Sequence[Message]) -> Continuation:
        tokenizer = self.tokenizer
        last = turn[-1] if turn else -1
        whole = tokenizer.decode(turn, special=True, behind=True)
        if last < 0 or (not tokenizer.is_added(last) and last not in tokenizer.end_ids):
            return self._behind(whole, messages)
        before = tokenizer.decode(turn[:-1], special=True, behind=True)
        if last in tokenizer.end_ids:
            return self._behind(before, messages)
        try:  # a stop that the task named may be the end that the template writes
            found = self._behind(before, messages)
        except HistoryRewritten:
            return self._behind(whole, messages)
        ended = found.behind.startswith(tokenizer.decode([last], special=True))
        return found if ended else self._behind(whole, messages)

    def _behind(self, turn: str, messages: Sequence[Message]) -> Continuation:
        """Raises HistoryRewritten unless the template writes the history and the turn as they are, white space at the
        turn's ends aside."""
        said: Message = {"role": "assistant", "content": turn}
        parsed: Parsed | None = None
        try:
            text = self.render([*self.messages, said, *messages])
        except UserError:  # some templates want the calls that a tool's answer belongs to
            parsed = self._parsed(turn)
            if not parsed.calls and parsed.content == turn:
                raise
            said = parsed.message()
            text = self.render([*self.messages, said, *messages])
        if not text.startswith(self.text):
            raise HistoryRewritten(f"the chat template rewrites the history when more follows: {self._change(text)}")
        rest = text[len(self.text) :]
        end = written_until(turn, rest) if parsed is None else self._calls_until(parsed, rest)
        if end < 0:
            raise HistoryRewritten(
                f"the chat template writes the turn {turn[:SHOWN]!r} as {rest[:SHOWN]!r} when more follows; {REMEDY}"
            )
        return Continuation(said=said, behind=rest[end:], text=text)

    def _behind_any(self, turn: Sequence[int], messages: Sequence[Message]) -> Continuation:
        """What the template writes behind a turn, found by rendering `STAND_IN` in its place."""
        parsed = self._parsed(self.tokenizer.decode(turn, behind=True))
        name = next((call.name for call in parsed.calls if call.name), "unknown")
        call = {"id": call_id(0), "type": "function", "function": {"name": name, "arguments": {"x": STAND_IN}}}
        plain: Message = {"role": "assistant", "content": STAND_IN}
        try:
            said: Message = {"role": "assistant", "content": parsed.content or self.tokenizer.decode(turn, behind=True)}
            text = self.render([*self.messages, plain, *messages])
        except UserError:  # some templates want the calls that a tool's answer belongs to
            said = parsed.message()
            text = self.render([*self.messages, {"role": "assistant", "content": "", "tool_calls": [call]}, *messages])
        behind = text.rpartition(STAND_IN)[2]
        end = self.tokenizer.control_pattern.search(behind)
        if end is not None:  # a sampled end token takes the place of the one that the template writes
            ended = bool(turn) and turn[-1] in self.tokenizer.end_ids
            behind = behind[end.end() if ended else end.start() :]
        return Continuation(said=said, behind=behind)

    def _change(self, text: str) -> str:
        """Where a text that was to begin with `self.text` differs from it."""
        pairs = zip(self.text, text, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.text), len(text)))
        shown = slice(max(0, at - SHOWN // 3), at + SHOWN)
        return f"{self.text[shown]!r} becomes {text[shown]!r}; {REMEDY}"

    def _parsed(self, turn: str) -> Parsed:
        name = detect(self.tokenizer.template_text) if self.tools else ""
        return FORMATS[name].parse(turn, self.tools) if name else Parsed(content=turn)

    def _calls_until(self, said: Parsed, rest: str) -> int:
        """Where a turn with calls ends in what the template writes; -1 when that says something else."""
        ends = [rest.find(self.tokenizer.decode([token], special=True)) for token in self.tokenizer.end_ids]
        end = min((at for at in ends if at >= 0), default=-1)
        if end < 0:
            return -1
        return end if _words_and_calls(self._parsed(rest[:end])) == _words_and_calls(said) else -1


def _words_and_calls(turn: Parsed) -> tuple[Any, ...]:
    """What a turn says, white space aside."""
    return turn.content.split(), turn.thinking.split(), [(call.name, call.values()) for call in turn.calls]


def written_until(said: str, text: str) -> int:
    """Where `said` ends at the begin of `text`; -1 when it does not stand there. White space may differ: templates
    strip it.

    Example: `written_until("4 \\n", "4<|im_end|>") == 1`.
    """
    if text.startswith(said):
        return len(said)
    at = 0
    for letter in "".join(said.split()):
        while text[at : at + 1].isspace():
            at += 1
        if text[at : at + 1] != letter:
            return -1
        at += 1
    return at
