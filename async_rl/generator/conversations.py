"""The chats that agents have in one episode: each request is matched, token by token, to what was sampled before.

An agent sends its whole history with every request, as messages: what the model said comes back parsed, stripped,
written anew. Three cases:

- The messages go on where a context ends: tokens are appended to it, nothing before them is touched.
- They go on from an earlier place (another attempt, an edited last message, a sub-agent with the same prompt), or that
  context is in use at this moment: a new context begins with a copy of the tokens up to there.
- They begin otherwise, or the chat template writes the history differently now (it takes thoughts out of earlier
  turns, say): a new context begins with what the template writes. A turn that stands there as it was sampled keeps its
  tokens.

Copied tokens carry no loss: each sampled token is trained once, in the context that it was sampled in.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from async_rl.errors import UserError
from async_rl.generator.chat import Chat, HistoryRewritten
from async_rl.generator.chat_request import Answer, ChatRequest, Message, RequestError, as_message
from async_rl.generator.contexts import Context
from async_rl.generator.engine import Completion
from async_rl.generator.session import EpisodeSession, TurnLimit
from async_rl.generator.turn_request import TurnRequest
from async_rl.model.messages import with_text
from async_rl.task.tool_formats import FORMATS, TAGS, detect

Key = tuple[Any, ...]
"""equal for two messages that are the same to an agent"""


def key_of(message: Message) -> Key:
    """The key of a message. White space around an answer, the order of a call's arguments and ids of calls are left
    out of it."""
    if message["role"] != "assistant":
        return (message["role"], message["content"], message.get("name"))
    calls = tuple(
        (call["function"]["name"], _canonical(call["function"]["arguments"])) for call in message.get("tool_calls", ())
    )
    return ("assistant", message["content"].strip(), calls)


def _canonical(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments or "{}"), sort_keys=True)
    except ValueError:
        return arguments.strip()


@dataclass(slots=True, kw_only=True, eq=False)
class Asked:
    """A request that was answered, or is being answered: a place to go on from."""

    context: Context
    chat: Chat
    """as it was before the turn"""
    keys: tuple[Key, ...]
    """of the messages before the turn"""
    setting: str
    """tools and variables of the template"""
    length: int
    """tokens before the turn"""
    stop: Sequence[str] = ()
    turn: tuple[int, ...] = ()
    """tokens of the turn"""
    text: str = ""
    """of the turn, its end token left out"""
    answer: Key | None = None
    """of the answer; None: there is none (yet)"""
    open: bool = True
    """nothing was appended behind it"""

    @property
    def opened(self) -> bool:
        """The template began a thought."""
        name = detect(self.chat.tokenizer.template_text)
        return self.chat.text.rstrip().endswith(FORMATS[name].thinks[0] if name else TAGS[0])


@dataclass(slots=True, kw_only=True, eq=False)
class Place:
    """Where a request goes on."""

    chat: Chat
    tokens: list[int]
    """of the whole prompt"""
    context: Context | None = None
    """that is continued; None: a new one"""


@dataclass(slots=True, eq=False)
class Conversations:
    """Answers the requests of one episode's agents. Requests may come at the same time: each has its context."""

    session: EpisodeSession
    asked: list[Asked] = field(default_factory=list)
    calls: int = 0
    """tool calls that were answered with"""
    requests: int = 0
    refused: int = 0
    """requests for which turns or room were used up"""
    cancelled: int = 0
    """requests whose agent went away before the answer"""
    contexts: int = 0
    """that were opened"""
    running: set[Context] = field(default_factory=set)
    """in which a turn is being sampled"""

    async def answer(self, request: ChatRequest, on_begin: Callable[[Asked], None] | None = None) -> Answer:
        """Sample the answer to a request. If the caller is cancelled, the turn ends there and is kept as it is.

        Args:
            on_begin: called when the request has found its place, before its turn is sampled.

        Raises RequestError, and what `EpisodeSession.take_turn` raises.
        """
        self.requests += 1
        try:
            asked, turn = self._begin(request)
        finally:
            self._note()
        if on_begin is not None:
            on_begin(asked)
        sampling = asyncio.ensure_future(self.session.take_turn(asked.context, turn))
        sampling.add_done_callback(lambda _: self.running.discard(asked.context))
        try:
            completion = await asyncio.shield(sampling)
        except asyncio.CancelledError:
            self.cancelled += 1
            self._note()
            sampling.add_done_callback(lambda done: done.cancelled() or done.exception())
            self.session.cut_off(asked.context)
            raise
        return self._end(request, asked, completion)

    def _begin(self, request: ChatRequest) -> tuple[Asked, TurnRequest]:
        """Bring the request's messages into a context. Nothing is changed where that fails."""
        session = self.session
        name = detect(session.tokenizer.template_text) if request.calls else ""
        turn = TurnRequest(
            max_tokens=min(request.max_tokens or session.agent_tokens, session.agent_tokens),
            stop=(*request.stop, *(FORMATS[name].stop if name else ())),
            stop_tokens=request.stop_tokens,
            temperature=request.temperature,
            agent=request.agent,
        )
        try:
            session.check_turn(turn)
            keys, setting = tuple(map(key_of, request.messages)), self._setting(request)
            place = self._place(request, keys, setting)
        except TurnLimit:
            self.refused += 1
            raise
        except (UserError, ValueError) as error:
            raise RequestError(str(error)) from None
        if len(place.tokens) >= session.max_context:
            session.refuse_length()
            self.refused += 1
            raise RequestError(
                f"the messages have {len(place.tokens)} tokens, and the context holds {session.max_context}",
                param="messages",
                code="context_length_exceeded",
            )
        context = place.context
        if context is None:
            context = session.open_context()
            context.prompt = len(place.tokens)
            self.contexts += 1
        context.extend(place.tokens[len(context.tokens) :])
        context.chat = copy(place.chat)
        asked = Asked(
            context=context,
            chat=place.chat,
            keys=keys,
            setting=setting,
            length=len(context.tokens),
            stop=turn.stop,
        )
        for other in self.asked:
            other.open = other.open and other.context is not context
        self.asked.append(asked)
        self.running.add(context)
        return asked, turn

    def _end(self, request: ChatRequest, asked: Asked, completion: Completion) -> Answer:
        """The answer, and where the next request may go on."""
        tokenizer = self.session.tokenizer
        text = tokenizer.turn_text(completion.tokens, asked.stop)
        for string in request.stop:
            text = text.removesuffix(string)
        message = as_message(text, request, tokenizer, first_id=self.calls, opened=asked.opened)
        self.calls += len(message.get("tool_calls", ()))
        asked.turn = tuple(completion.tokens)
        asked.text = text
        asked.answer = key_of(message)
        finish = "tool_calls" if "tool_calls" in message and completion.finish == "stop" else completion.finish
        return Answer(
            message=message,
            finish="length" if finish == "aborted" else finish,
            prompt=asked.context.tokens[: asked.length],
            tokens=completion.tokens,
            log_probs=completion.log_probs,
        )

    def _note(self) -> None:
        note = self.session.note
        note("agent/requests", self.requests)
        note("agent/contexts", self.contexts)
        for name, value in (("agent/refused", self.refused), ("agent/cancelled", self.cancelled)):
            if value:
                note(name, value)

    # ------------------------------------------------------------------------------------------ matching

    def _place(self, request: ChatRequest, keys: tuple[Key, ...], setting: str) -> Place:
        """Where the request goes on. Raises UserError, ValueError for what the chat template refuses."""
        for place in (self._unanswered(keys, setting), self._problem(request, keys)):
            if place is not None:
                return place
        for asked in self._before(keys, setting):
            more = request.messages[len(asked.keys) + 1 :]
            chat = copy(asked.chat)
            try:
                behind = self._followed(chat, asked.turn, more)
            except HistoryRewritten:
                break
            goes_on = asked.open and asked.context not in self.running
            tokens = [*asked.context.tokens[: asked.length + len(asked.turn)], *behind]
            return Place(chat=chat, tokens=tokens, context=asked.context if goes_on else None)
        return self._anew(request)

    def _unanswered(self, keys: tuple[Key, ...], setting: str) -> Place | None:
        """The same messages as in an earlier request: another attempt, in a context of its own."""
        for asked in reversed(self.asked):
            if asked.keys == keys and asked.setting == setting:
                tokens = list(asked.context.tokens[: asked.length])
                context = asked.context
                free = context not in self.running and len(context.tokens) == asked.length and not context.unwanted
                return Place(chat=copy(asked.chat), tokens=tokens, context=context if free else None)
        return None

    def _problem(self, request: ChatRequest, keys: tuple[Key, ...]) -> Place | None:
        """The context that holds the problem's prompt, where these are its messages and nothing was made of it yet."""
        context = self.session.contexts[0]
        chat = context.chat
        if chat is None or context.turns or context in self.running or chat.length != len(context.tokens):
            return None
        if list(request.tools) != list(chat.tools) or self._arguments(request) != dict(chat.arguments):
            return None
        try:  # the problem's messages are not checked as those of a request
            same = keys == tuple(key_of(_plain(message)) for message in chat.messages)
        except (UserError, KeyError, TypeError, AttributeError):
            return None
        return Place(chat=copy(chat), tokens=context.tokens, context=context) if same else None

    def _before(self, keys: tuple[Key, ...], setting: str) -> list[Asked]:
        """Answered requests that these messages go on from: those with the longest history first, then the latest."""
        found = [
            asked
            for asked in reversed(self.asked)
            if asked.answer is not None
            and asked.setting == setting
            and len(asked.keys) + 1 < len(keys)
            and asked.keys == keys[: len(asked.keys)]
            and asked.answer == keys[len(asked.keys)]
        ]
        return sorted(found, key=lambda asked: (-len(asked.keys), not asked.open))

    def _anew(self, request: ChatRequest) -> Place:
        """A new context with what the template writes."""
        arguments = self._arguments(request)
        chat = Chat(tokenizer=self.session.tokenizer, messages=[], tools=request.tools, arguments=arguments)
        tokens = self._followed(chat, None, request.messages)
        chat.length = len(tokens)
        return Place(chat=chat, tokens=tokens)

    def _followed(self, chat: Chat, turn: Sequence[int] | None, messages: Sequence[Message]) -> list[int]:
        """Tokens of messages behind a turn (None: at the begin). Turns that stand among them as they were sampled keep
        their tokens. Raises HistoryRewritten, UserError."""
        tokenizer = self.session.tokenizer
        if not tokenizer.shows("developer"):  # a system message to most templates
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        sampled = [self._sampled(key_of(message)) for message in messages]
        as_said = [
            message if asked is None else {"role": "assistant", "content": asked.text}
            for message, asked in zip(messages, sampled, strict=True)
        ]
        try:
            tokens = chat.begin(as_said) if turn is None else chat.follow(turn, as_said)
        except UserError:  # some templates want the calls that a tool's answer belongs to
            tokens = chat.begin(messages) if turn is None else chat.follow(turn, messages)
        for asked in sampled:
            if asked is not None:
                tokens = self._with_turn(tokens, asked)
        return tokens

    def _sampled(self, key: Key) -> Asked | None:
        """The latest turn that was answered with this message."""
        if key[0] != "assistant":
            return None
        return next((asked for asked in reversed(self.asked) if asked.answer == key), None)

    def _with_turn(self, tokens: list[int], asked: Asked) -> list[int]:
        """`tokens` with those that were sampled where the text of a turn stands: the same text, other tokens."""
        tokenizer, turn = self.session.tokenizer, list(asked.turn)
        while turn and turn[-1] in tokenizer.end_ids:
            turn.pop()
        plain = tokenizer.encode(tokenizer.decode(turn, special=True, behind=True), behind=True)
        if plain == turn or not plain:
            return tokens
        at = next((i for i in range(len(tokens) - len(plain) + 1) if tokens[i : i + len(plain)] == plain), -1)
        return tokens if at < 0 else [*tokens[:at], *turn, *tokens[at + len(plain) :]]

    def _arguments(self, request: ChatRequest) -> dict[str, Any]:
        problem = self.session.problem
        return {**(problem.template_args if problem is not None else {}), **request.arguments}

    def _setting(self, request: ChatRequest) -> str:
        return json.dumps([list(request.tools), self._arguments(request)], sort_keys=True, default=str)


def _plain(message: Mapping[str, Any]) -> Message:
    """A problem's message as a request has it."""
    message = with_text(message, "")
    return {**message, "content": message.get("content") or ""}
