"""An answer that is told piece by piece, in OpenAI's form, while its turn is sampled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from async_rl.generator.chat_request import MODEL, Answer, ChatRequest, log_probs_of, usage
from async_rl.model.text_stream import TextStream
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.tool_formats import detect
from async_rl.task.unfinished_turn import said_so_far, settled

Body = Mapping[str, Any]
PARTS = {"reasoning_content": "thoughts", "content": "text"}


@dataclass(slots=True, kw_only=True)
class AnswerStream:
    """Makes the bodies of a stream: `more` while the turn is sampled, `rest` when it is complete. What was told is
    never taken back: a stop string that may have begun, and what may be a tool call, wait for the end."""

    name: str
    """id of the answer"""
    request: ChatRequest
    tokenizer: Tokenizer
    opened: bool = False
    """the prompt ended with the opening tag of a thought"""
    stop: Sequence[str] = ()
    """strings that end the turn"""
    text: TextStream = field(init=False)
    format_name: str = field(init=False)
    """of the tool calls that the chat template teaches"""
    begun: bool = False
    told: dict[str, str] = field(default_factory=lambda: dict.fromkeys(PARTS, ""))
    """of each part of the message"""

    def __post_init__(self) -> None:
        self.text = TextStream(self.tokenizer)
        self.format_name = detect(self.tokenizer.template_text)

    def more(self, turn: Sequence[int]) -> list[Body]:
        """What is new. `turn`: its tokens so far."""
        text = settled(self.text.follow(turn), self.stop)
        said = said_so_far(self.format_name, text, calls=self.request.calls, opened=self.opened)
        return list(self._deltas({"reasoning_content": said.thinking, "content": said.content}))

    def rest(self, answer: Answer) -> Iterator[Body]:
        """What was not told yet: text, calls, the end. Raises RuntimeError where the text is another now."""
        message = answer.message
        yield from self._deltas({name: message.get(name, "") for name in PARTS}, begin=True)
        if self.request.log_probs:
            yield self._chunk({"content": ""}, logprobs=log_probs_of(answer, self.tokenizer))
        for index, call in enumerate(message.get("tool_calls", ())):
            yield self._chunk({"tool_calls": [{"index": index, **call}]})
        ids = {"token_ids": list(answer.tokens)} if self.request.token_ids else {}
        last = self._chunk({}, answer.finish, **ids)
        yield {**last, "prompt_token_ids": list(answer.prompt)} if self.request.token_ids else last
        if self.request.usage:
            yield {**self._head(), "choices": [], "usage": usage(answer)}

    def _deltas(self, parts: Mapping[str, str], *, begin: bool = False) -> Iterator[Body]:
        """What the parts have that was not told; before the first piece, who speaks."""
        told = self.told
        for name, text in parts.items():
            if not text.startswith(told[name]):
                raise RuntimeError(f"the {PARTS[name]} that was told is not that of the whole turn")
        if not self.begun and (begin or any(parts.values())):
            self.begun = True
            yield self._chunk({"role": "assistant", "content": ""})
        for name, text in parts.items():
            if more := text[len(told[name]) :]:
                told[name] = text
                yield self._chunk({name: more})

    def _head(self) -> dict[str, Any]:
        return {"id": self.name, "object": "chat.completion.chunk", "created": int(time.time()), "model": MODEL}

    def _chunk(self, delta: Body, finish: str | None = None, **more: Any) -> Body:
        return {**self._head(), "choices": [{"index": 0, "delta": dict(delta), "finish_reason": finish, **more}]}
