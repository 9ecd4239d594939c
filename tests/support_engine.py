"""Requests to an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from async_rl.generator.engine import Completion, Engine, Request


def run(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """The answers to requests that come at once. The engine is closed behind them."""

    async def all_at_once() -> list[Completion]:
        done = await asyncio.gather(*(engine.generate(request) for request in requests))
        await engine.close()
        return done

    return asyncio.run(all_at_once())
