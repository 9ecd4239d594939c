"""A tunnel for bytes between Unix sockets that can break: what is under way then is lost on both ways.

It runs in a thread of its own with an event loop of its own. It knows nothing of messages: a cut may come in
the middle of one. Whoever was connected connects again by itself, as ZeroMQ does.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

CHUNK_BYTES = 1 << 18
START_S = 5.0


@dataclass(slots=True, eq=False)
class _Link:
    """One connection, from both sides."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    flows: asyncio.Event = field(default_factory=asyncio.Event)
    """clear while it carries nothing"""
    lost: int = 0
    """bytes taken in and never passed on"""
    broken: bool = False

    def abort(self) -> None:
        """Both sides see a connection that was lost."""
        self.broken = True
        self.flows.set()
        for writer in (self.near, self.far):
            writer.transport.abort()


class Proxy:
    """Listens at `path`, passes everything on to whoever listens at `target`."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self.target = path, target
        self.bytes_lost = 0
        """taken in and not passed on, in all cuts; what the system still held is not counted"""
        self._links: list[_Link] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(self.path))
        self._listening = listening
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(START_S)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(START_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_S)
        self.path.unlink(missing_ok=True)

    @property
    def connections(self) -> int:
        return len(self._links)

    def hold(self, pick: float) -> Callable[[], int]:
        """From now on some connections, at least one, carry nothing; `pick` draws which. The returned
        function cuts them: what has gathered is lost. It returns how many were cut."""
        return asyncio.run_coroutine_threadsafe(self._hold(pick), self._loop).result(START_S)

    # -------------------------------------------------------------------------------------- in the thread

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _open(self) -> None:
        self._server = await asyncio.start_unix_server(self._accept, sock=self._listening, limit=CHUNK_BYTES)

    async def _close(self) -> None:
        self._server.close()
        for link in self._links:
            link.abort()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _hold(self, pick: float) -> Callable[[], int]:
        random = Random(pick)
        chosen = [link for link in self._links if random.random() < 0.5] or self._links[:1]
        for link in chosen:
            link.flows.clear()

        async def cut() -> int:
            for link in chosen:
                link.abort()
            await asyncio.sleep(0)
            return len(chosen)

        return lambda: asyncio.run_coroutine_threadsafe(cut(), self._loop).result(START_S)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(str(self.target), limit=CHUNK_BYTES)
        except OSError:  # nobody listens there (yet); the other side tries again
            writer.transport.abort()
            return
        link = _Link(near=writer, far=far_writer)
        link.flows.set()
        self._links.append(link)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(link, reader, far_writer))
                both.create_task(self._carry(link, far_reader, writer))
        finally:
            self._links.remove(link)
            link.abort()

    async def _carry(self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """One way, until either side is gone."""
        try:
            while data := await source.read(CHUNK_BYTES):
                await link.flows.wait()
                if link.broken:
                    self.bytes_lost += len(data)
                    break
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        for writer in (link.near, link.far):
            writer.close()
