"""What a generator makes of a refusal: its own ends it, one of the process that had its name before does not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from support_models import make_decoder, qwen3_config, write_folder

from async_rl.errors import RunFailed
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.loop import GeneratorLoop, GeneratorOptions
from async_rl.model.tokenizer import Tokenizer
from async_rl.wire import messages as msg


@dataclass
class Line:
    """Hands out these messages one after the other, and keeps what is sent."""

    said: Iterable[Any]
    sent: list[Any] = field(default_factory=list)

    async def receive(self) -> Any:
        return next(iter(self.said))

    async def send(self, message: Any) -> None:
        self.sent.append(message)


class NoTask:
    name = "none"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


def hear(tokenizer: Tokenizer, *, sessions: tuple[int, ...]) -> str:
    """Say Hello twice, then hear a refusal of each of these sessions (-1, -2: its last, the one before), then Stop.
    Returns why it ended."""

    async def run() -> str:
        engine = EmbeddedEngine(make_decoder(qwen3_config(), 0), tokenizer, max_sequences=4)
        line = Line(said=())
        loop = GeneratorLoop(
            options=GeneratorOptions(
                name="generator-0",
                max_sequences=4,
                group_size=2,
                max_turns=1,
                episode_timeout_s=9.0,
                save_turns_after_s=9.0,
                timeout_s=9.0,
                stall_report_s=9.0,
            ),
            engine=engine,
            task=NoTask(),  # type: ignore[arg-type]
            tokenizer=tokenizer,
            dealer=line,  # type: ignore[arg-type]
            source=None,  # type: ignore[arg-type]
        )
        await loop._say_hello()
        await loop._say_hello()
        own = [hello.session for hello in line.sent]
        assert len(set(own)) == 2
        refused = [
            msg.Refused(
                what="what it sent",
                reason="you lied",
                kind="quarantine",
                session=own[session] if session < 0 else session,
            )
            for session in sessions
        ]
        line.said = iter([*refused, msg.Stop(reason="the run is done")])
        try:
            await loop._receive()
        except RunFailed as error:
            return str(error)
        finally:
            await engine.close()
        return loop.stopped

    return asyncio.run(run())


def test_a_generator_ends_for_its_own_refusal_in_whichever_session_and_for_no_other_process(
    tokenizer: Tokenizer,
) -> None:
    told = "generator-0: the buffer refused what it sent: you lied"
    assert hear(tokenizer, sessions=(17,)) == "the run is done"
    assert hear(tokenizer, sessions=(17, -1)) == told
    assert hear(tokenizer, sessions=(-2,)) == told  # of before it said Hello anew
    assert hear(tokenizer, sessions=(0,)) == told  # the buffer does not know of whom it is
