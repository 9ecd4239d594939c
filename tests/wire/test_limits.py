"""What is larger than the limit is refused where it is sent, with the setting's name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from async_rl.errors import UserError
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import pack
from async_rl.wire.channel import AsyncDealer, Dealer, Router
from async_rl.wire.messages import Batch, Finished, NextBatch, Query

LIMIT = 1 << 20


def trajectory(tokens: int) -> Trajectory:
    return Trajectory(
        group=7,
        sample=3,
        problem=0,
        split="train",
        seed=1,
        tokens=np.zeros(tokens, np.int32),
        log_behaviour=np.zeros(tokens, np.float32),
        turns=(Turn(start=0, length=tokens),),
        versions=(VersionSpan(version=0, start=0, end=tokens),),
        reward=0.0,
        ended="finished",
    )


def test_a_generator_may_send_up_to_the_limit_and_is_told_beyond_it(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"

    async def send(tokens: int) -> None:
        dealer = AsyncDealer(endpoint, "generator-0", max_message_bytes=LIMIT)
        try:
            await dealer.send(Finished(trajectories=(trajectory(tokens),)))
        finally:
            dealer.close()

    with Router(endpoint, max_message_bytes=LIMIT) as router:
        asyncio.run(send(LIMIT // 8 - 100))
        received = router.receive(20)
        assert received is not None
        assert isinstance(received[1], Finished)
        said = r"wire\.max_message_mb is 1, but .*group 7, sample 3 \(131072 tokens\) takes 1\.0 MB; raise it"
        with pytest.raises(UserError, match=said):
            asyncio.run(send(LIMIT // 8))


def test_the_buffer_is_told_which_batch_is_too_large(tmp_path: Path) -> None:
    blob = pack(trajectory(LIMIT // 16))
    with (
        Router(f"ipc://{tmp_path}/s", max_message_bytes=LIMIT) as router,
        Dealer(router.endpoint, "trainer", max_message_bytes=LIMIT) as trainer,
    ):
        trainer.send(NextBatch(step=0))
        assert router.receive(20) is not None
        assert router.send(b"trainer", Batch(step=0, blobs=(blob,), total=1))
        assert isinstance(trainer.receive(20, "the batch"), Batch)
        with pytest.raises(UserError, match=r"wire\.max_message_mb is 1, but a message 'Batch' takes 1\.5 MB"):
            router.send(b"trainer", Batch(step=0, blobs=(blob,) * 3, total=3))


def test_a_router_that_does_not_look_leaves_messages_with_their_sender(tmp_path: Path) -> None:
    """So a burst of trajectories does not gather in the buffer's memory; none is lost."""
    with Router(f"ipc://{tmp_path}/s", queued_messages=4) as router, Dealer(router.endpoint, "g") as dealer:
        large = Finished(trajectories=(trajectory(100_000),))
        for _ in range(40):
            dealer.send(large)
        dealer.send(Query())
        kinds = []
        while not kinds or kinds[-1] is not Query:
            received = router.receive(20)
            assert received is not None
            kinds.append(type(received[1]))
        assert kinds == [Finished] * 40 + [Query]
