"""The endpoint of agents: OpenAI's API for chat completions, over HTTP on the loopback.

One server a process, in its event loop, started when the first task asks for it. Each episode has a key of its own, so
that any number of agents play their episodes at once, in threads or in processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from async_rl.errors import RunFailed, UserError
from async_rl.generator.answer_stream import AnswerStream
from async_rl.generator.chat_request import MODEL, ChatRequest, RequestError, completion, read_request
from async_rl.generator.contexts import Context
from async_rl.generator.conversations import Asked, Conversations
from async_rl.generator.engine import LogitsNotFinite
from async_rl.generator.session import EpisodeAborted, EpisodeSession, TurnLimit
from async_rl.task.protocol import Connection

if TYPE_CHECKING:
    from aiohttp import web

HOST = "127.0.0.1"
MOST_BODY_BYTES = 64 << 20
"""of one request"""
BODY_S = 60.0
"""longest time for the body of a request to arrive"""
PIECE_S = 0.05
"""between two looks at what was sampled for a stream"""
ALIVE_S = 5.0
"""of silence in a stream, after which a comment keeps it alive"""
CLOSE_S = 1.0
"""longest time for connections to end"""
NO_RETRY = {"x-should-retry": "false"}
"""header that tells OpenAI's client not to try again"""
BACKLOG = 1024
"""connections that wait to be accepted"""
TOLD = (RequestError, TurnLimit, EpisodeAborted, RunFailed, LogitsNotFinite, ValueError, RuntimeError)
"""exceptions of a request that become its answer"""


@dataclass(slots=True, eq=False)
class Endpoint:
    """Implements `agent_door.AgentDoor`.

    Example: `endpoint = Endpoint(); session = EpisodeSession(..., agents=endpoint); ...; await endpoint.shut()`.
    """

    episodes: dict[str, tuple[str, Conversations]] = field(default_factory=dict)
    """public part of the key -> (secret part, chats of its agents)"""
    listening: socket.socket | None = None
    runner: web.AppRunner | None = None
    serving: asyncio.Task[None] | None = None

    def open(self, session: EpisodeSession) -> Connection:
        """Let agents play an episode; called in the event loop. Raises UserError without the package aiohttp."""
        if self.listening is None:
            self._listen()
        assert self.listening is not None
        name, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        self.episodes[name] = (secret, Conversations(session))
        port = self.listening.getsockname()[1]
        return Connection(base_url=f"http://{HOST}:{port}/v1", api_key=f"ar-{name}-{secret}", model=MODEL)

    def close(self, connection: Connection) -> None:
        """The episode is over: its key is valid no longer."""
        self.episodes.pop(connection.api_key.split("-")[1], None)

    async def shut(self) -> None:
        """End the server."""
        self.episodes.clear()
        if self.serving is not None:
            self.serving.cancel()
            await asyncio.wait({self.serving}, timeout=CLOSE_S)
        if self.runner is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.runner.cleanup(), 2 * CLOSE_S)
        if self.listening is not None:
            self.listening.close()
        self.listening = self.runner = self.serving = None

    def _listen(self) -> None:
        try:
            from aiohttp import web
        except ImportError:
            raise UserError("session.openai() needs the package aiohttp: pip install 'aiohttp>=3.10'") from None
        for variable in ("NO_PROXY", "no_proxy"):  # a proxy must not be asked for the loopback
            there = os.environ.get(variable, "")
            if HOST not in there.split(","):
                os.environ[variable] = f"{there},{HOST}".strip(",")
        app = web.Application(client_max_size=MOST_BODY_BYTES)
        app.router.add_post("/v1/chat/completions", _in_openais_form(self._complete))
        app.router.add_get("/v1/models", _in_openais_form(self._models))
        app.router.add_get("/v1/models/{name}", _in_openais_form(self._models))
        app.router.add_route("*", "/{path:.*}", _in_openais_form(self._elsewhere))
        # a handler is cancelled when its client goes away
        self.runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_S)
        self.listening = socket.create_server((HOST, 0), backlog=BACKLOG)
        self.serving = asyncio.get_running_loop().create_task(self._serve(self.runner, self.listening))

    async def _serve(self, runner: web.AppRunner, listening: socket.socket) -> None:
        """Connections that come before this has run wait in the socket."""
        from aiohttp import web

        await runner.setup()
        await web.SockSite(runner, listening, backlog=BACKLOG).start()

    # ------------------------------------------------------------------------------------------ handlers

    def _episode(self, request: web.Request) -> Conversations:
        """The episode whose key the request holds. Raises RequestError."""
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        _, _, rest = key.strip().partition("-")
        name, _, secret = rest.partition("-")
        known, episode = self.episodes.get(name, ("", None))
        right = secrets.compare_digest(known.encode(), secret.encode("utf-8", "replace"))
        if episode is None or not right or scheme.lower() != "bearer":
            raise RequestError(
                "the key is not valid: it is that of one episode, and no longer than that lasts",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )
        return episode

    async def _models(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        self._episode(request)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "async_rl"}
        name = request.match_info.get("name")
        if name not in (None, MODEL):
            raise RequestError(f"there is no model '{name:.80}'", status=404, code="model_not_found")
        return web.json_response(model if name else {"object": "list", "data": [model]})

    async def _elsewhere(self, request: web.Request) -> web.StreamResponse:
        raise RequestError(
            f"there is no {request.method} {request.path:.80} here, only POST /v1/chat/completions and GET /v1/models",
            status=404,
            code="unknown_url",
        )

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        episode = self._episode(request)
        asked = read_request(await _body(request))
        name = f"chatcmpl-{secrets.token_hex(12)}"
        tokenizer = episode.session.tokenizer
        if not asked.stream:
            return web.json_response(completion(await episode.answer(asked), asked, tokenizer, name))
        return await self._stream(request, episode, asked, name)

    async def _stream(
        self, request: web.Request, episode: Conversations, asked: ChatRequest, name: str
    ) -> web.StreamResponse:
        """The answer in pieces, as it is sampled. Errors come as a status, unless the stream had to begin before."""
        from aiohttp import web

        stream = AnswerStream(name=name, request=asked, tokenizer=episode.session.tokenizer)
        contexts: list[Context] = []

        def begin(found: Asked) -> None:
            stream.opened, stream.stop = found.opened, found.stop
            contexts.append(found.context)

        answering = asyncio.ensure_future(episode.answer(asked, begin))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            wrote = time.monotonic()
            while not answering.done():
                await asyncio.wait({answering}, timeout=PIECE_S)
                if answering.done():
                    break
                pieces = stream.more(episode.session.sampled(contexts[0])) if contexts else []
                if pieces or time.monotonic() - wrote > ALIVE_S:
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(_events(pieces) or b": sampling\n\n")
                    wrote = time.monotonic()
        except BaseException:  # the client went away
            answering.cancel()
            raise
        if not response.prepared:
            answering.result()
            await response.prepare(request)
        try:
            pieces = list(stream.rest(answering.result()))
        except TOLD as error:
            pieces = [_told(error).body]
        await response.write(_events(pieces) + b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _events(pieces: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces).encode()


Handler = Callable[["web.Request"], Awaitable["web.StreamResponse"]]


def _in_openais_form(handler: Handler) -> Handler:
    """The handler, with errors in OpenAI's form."""

    async def handle(request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        try:
            return await handler(request)
        except web.HTTPException as error:
            told = RequestError(str(error.reason), status=error.status)
        except TOLD as error:
            told = _told(error)
        return web.json_response(told.body, status=told.status, headers=NO_RETRY)

    return handle


def _told(error: Exception) -> RequestError:
    """An error as the agent is told it."""
    match error:
        case RequestError():
            return error
        case TurnLimit():
            return RequestError(f"{error} (generator.max_turns)", code="turn_limit_reached")
        case EpisodeAborted():
            return RequestError(f"no more turns: {error}", status=409, code="episode_over")
        case RunFailed() | LogitsNotFinite() | RuntimeError():
            return RequestError(str(error), status=500, kind="server_error")
    return RequestError(str(error))


async def _body(request: web.Request) -> Any:
    """The JSON of a request. Raises RequestError."""
    try:
        text = await asyncio.wait_for(request.read(), BODY_S)
        body = json.loads(text)
        if b"\\u" in text:
            json.dumps(body, ensure_ascii=False).encode()  # half of a character has no token
        return body
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_S:g} s", status=408) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
