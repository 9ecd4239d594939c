"""Targets of bench/fuzz_input.py for what arrives over the wire and through the endpoint of agents.

blobs     trajectories of a group that share their beginnings: bent, cut, swapped, of strangers, leading in a circle
messages  a state machine with a sampler and a pool, among attackers who overhear what is sent and bend it
agents    conversations of agents that follow on one another, with bent requests among them

Nothing but what names the fault may be raised. Each call is drawn from its own random numbers, and plays CALLS of
them where one input follows on others.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support_buffer import TRAINER, answer, make_core
from support_hostile import KINDS, forged, frames_of, some_frames, some_message, some_trajectory
from support_pool import SOME
from support_sampler import some_rules
from support_world import some_policy

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.store import StoreReader
from async_rl.config.pool import PoolSettings
from async_rl.generator.chat_request import RequestError, read_request
from async_rl.generator.conversations import Conversations
from async_rl.generator.endpoint import _body
from async_rl.generator.session import EpisodeAborted, EpisodeSession, TurnLimit, make_tickets
from async_rl.task import Problem
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.beginnings import FEWEST, HEAD_BYTES, cut_all, is_cut, join_all
from async_rl.trajectory.codec import WireError, pack, unpack
from async_rl.wire import messages as msg
from async_rl.wire.frames import decode, encode

CALLS = {"messages": 100, "agents": 12}
"""inputs of one call, of those that follow on one another"""
SOUND, ATTACKERS = (b"generator-0", b"generator-1"), (b"", b"\xff" * 255, b"h0", b"stranger")


# ---------------------------------------------------------------- blobs


def group_of(random: Random, number: int) -> list[Trajectory]:
    """A few samples, most of which begin alike."""
    prompt = np.array([random.randrange(9) for _ in range(FEWEST * random.randint(1, 3))], np.int32)
    found = []
    for sample in range(random.randint(1, 4)):
        begin = prompt[: random.choice((len(prompt), len(prompt), FEWEST, 3))]
        tokens = np.concatenate((begin, np.array([random.randrange(9) for _ in range(random.randint(1, 9))], np.int32)))
        log = np.zeros(len(tokens), np.float32)
        log[len(begin) :] = -0.25
        one = some_trajectory(
            random, group=number, sample=sample, tokens=tokens, log_behaviour=log, temperature=1.0,
            turns=(Turn(start=len(begin), length=len(tokens) - len(begin)),),
            versions=(VersionSpan(version=0, start=len(begin), end=len(tokens)),),
        )  # fmt: skip
        found.append(one)
    return found


def some_blobs(random: Random) -> list[bytes]:
    """Blobs of one or two groups, as they are sent, with something done to them."""
    blobs: list[bytes] = []
    for number in random.sample(range(3), random.randint(1, 2)):
        group = group_of(random, number)
        blobs += [bytes(blob) for blob in cut_all(group, map(pack, group), 1 << 20)]
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        at = random.randrange(len(blobs))
        blob = bytearray(blobs[at])
        match random.randrange(7):
            case 0:
                blob[random.randrange(len(blob))] ^= 1 << random.randrange(8)
            case 1:
                del blob[random.randrange(len(blob)) :]
            case 2 if is_cut(blob):  # it begins as another sample: itself, one that is not there, one of a circle
                blob[HEAD_BYTES - 8 : HEAD_BYTES] = random.choice((0, 1, 2, 3, 77, -1)).to_bytes(
                    8, "little", signed=True
                )
            case 3 if is_cut(blob):  # other offsets and lengths
                place = random.choice((4, 8, 12))
                blob[place : place + 4] = random.choice((0, 1, 8, 64, 2**31, 2**32 - 1)).to_bytes(4, "little")
            case 4:
                blob = bytearray(b"TC" + blob[2:]) if len(blob) > 2 else blob
            case 5:
                blob = bytearray(random.choice(blobs))
            case _:
                random.shuffle(blobs)
                continue
        blobs[at] = bytes(blob)
        if not blobs[at]:
            blobs[at] = b"\0"
    return blobs


class Reader(StoreReader):
    """Of a store that holds nothing but what is given."""

    def __init__(self) -> None:
        pass

    def _all(self, query: str, given: Sequence[Any] = ()) -> list[Any]:
        return []


def blobs_of_a_group(random: Random, _: Path) -> object:
    blobs = some_blobs(random)
    most = random.choice((1 << 20, 1 << 20, 500))
    with suppress(WireError):
        whole = join_all(blobs, most)
        assert sum(map(len, whole)) <= max(most, sum(map(len, blobs)))
        for blob in whole:
            with suppress(WireError):
                assert unpack(blob).check() is None
    for blob in Reader()._whole(blobs):
        with suppress(WireError):
            unpack(blob)
    return [blob.hex() for blob in blobs]


# ---------------------------------------------------------------- messages


@dataclass
class Siege:
    """A state machine with two sound generators and a trainer, among attackers."""

    random: Random
    core: Core
    now: float = 0.0
    open: list[tuple[bytes, msg.Permit, int]] = field(default_factory=list)
    granted: dict[bytes, int] = field(default_factory=lambda: dict.fromkeys(SOUND, 0))
    step: int = 0

    def hear(self, peer: bytes, message: msg.Message) -> None:
        self.now += 0.01
        effects = self.core.handle(peer, message, self.now) + self.core.tick(self.now)
        for effect in effects:
            match effect:
                case do.Send(peer=to, message=told):
                    encode(told)  # whatever is answered can be sent
                    if isinstance(told, msg.Permits) and to in SOUND:
                        self.granted[to] += len(told.permits)
                        self.open += [(to, permit, sample) for permit in told.permits for sample in permit.samples]
                case do.SendBatch(step=step):
                    self.step = max(self.step, step + 1)

    def go_on(self) -> None:
        """Something sound happens."""
        peer = self.random.choice(SOUND)
        self.hear(peer, msg.Want(limit=self.granted[peer] + 4, version=self.core.published, session=1))
        for _ in range(min(4, len(self.open))):
            to, permit, sample = self.open.pop(self.random.randrange(len(self.open)))
            self.hear(to, msg.Finished(trajectories=(self.answer(permit, sample),), session=1))
        if self.step > self.core.published:
            self.hear(TRAINER, msg.Published(version=self.step))
        self.hear(TRAINER, msg.NextBatch(step=self.step))

    def answer(self, permit: msg.Permit, sample: int) -> Trajectory:
        return answer(permit, sample, self.core.published, reward=float(self.random.random() < 0.5))

    def overheard(self) -> list[list[bytes]]:
        held = [self.answer(permit, sample) for _, permit, sample in self.open[:4]]
        sent: list[msg.Message] = [msg.Finished(trajectories=(t,), session=1) for t in held]
        sent += [msg.Finished(trajectories=(forged(self.random, t),), session=1) for t in held]
        sent += [msg.Turns(trajectories=(t,), session=1) for t in held]
        sent.append(some_message(self.random, self.random.choice(KINDS)))
        sent.append(msg.Hello(role="generator", name="h", pid=1, session=self.random.randrange(3)))
        return [frames_of(message) for message in sent]


def messages_of_strangers(random: Random, _: Path) -> object:
    size = random.randint(1, 3)
    core = make_core(
        some_policy(random),
        group_size=size,
        vocabulary=100,
        max_permits=4,
        verify_share=random.choice((0.0, 0.5)),
        sampler=some_rules(random, size) if random.random() < 0.5 else None,
        pool=random.choice(SOME) if random.random() < 0.5 else PoolSettings(),
    )
    siege = Siege(random, core)
    for peer in SOUND:
        siege.hear(peer, msg.Hello(role="generator", name=peer.decode(), pid=1, session=1))
    frames: list[bytes] = []
    valid: list[list[bytes]] = []
    for number in range(CALLS["messages"]):
        if number % 10 == 0:
            siege.go_on()
            valid = siege.overheard()
        frames = some_frames(random, valid)
        peer = random.choice((*ATTACKERS, *SOUND, TRAINER))
        try:
            message = decode(frames)
        except WireError as error:
            core.malformed(peer, error, siege.now)
            continue
        if not isinstance(message, msg.Done | msg.Shutdown):
            siege.hear(peer, message)
        if core.ended:
            break
    encode(core.snapshot(siege.now))
    return [frame.hex() for frame in frames]


# ---------------------------------------------------------------- agents


@dataclass
class Body:
    """A request of HTTP, of which the body is read."""

    text: bytes

    async def read(self) -> bytes:
        return self.text


@cache
def agents_model(place: Path) -> Any:
    from support_agents import agents_tokenizer

    return agents_tokenizer(place / "agents")


def conversations_of_agents(random: Random, place: Path) -> object:
    from fuzz_input import PARAMETERS, PIECES, REQUEST, bent, value
    from support_agents import Endpoint, ScriptedEngine

    tokenizer = agents_model(place)
    said: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    last: list[object] = []

    async def talk() -> None:
        engine = ScriptedEngine(
            tokenizer, lambda _: "".join(random.choice(PIECES) for _ in range(random.randint(0, 4)))
        )
        (ticket,) = make_tickets(msg.Permit(group=0, problem=0, split="train", samples=(0,), seed=5, temperature=1.0))
        session = EpisodeSession(
            engine=engine, tokenizer=tokenizer, ticket=ticket, session_id=1, max_context=engine.max_context,
            max_turns=20, agents=Endpoint(),
        )  # fmt: skip
        session.begin(Problem(index=0, prompt=({"role": "user", "content": "hi"},)))
        chats = Conversations(session)
        for _ in range(CALLS["agents"]):
            given = {**REQUEST, "messages": list(said), "stream": False, "stop": random.choice((None, ["x"], ["}"]))}
            if random.random() < 0.6:
                given = bent(random, given, PARAMETERS)
            last[:] = [given]
            with suppress(RequestError, TurnLimit, EpisodeAborted):
                answered = await chats.answer(read_request(await _body(Body(json.dumps(given).encode()))))  # type: ignore[arg-type]
                said.append(json.loads(json.dumps(answered.message)))
                said.append({"role": random.choice(("user", "tool")), "tool_call_id": "call_0", "content": "go on"})
            if random.random() < 0.2 and said:
                said[random.randrange(len(said))] = value(random, PARAMETERS) if random.random() < 0.3 else said[0]
        made = session.finish(reward=1.0)
        assert made.check() is None
        unpack(pack(made))

    asyncio.run(talk())
    return last


TARGETS = {"blobs": blobs_of_a_group, "messages": messages_of_strangers, "agents": conversations_of_agents}
