"""Signs of life go on while the main thread is busy, and say what holds it up."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from async_rl.wire.channel import Dealer, Router
from async_rl.wire.heartbeat import STARTING, Activity, Heartbeat
from async_rl.wire.messages import Pulse, PulseAnswer

LONGEST_S = 20.0


def test_an_activity_knows_since_when_and_whether_its_loop_comes_round() -> None:
    now = 10.0
    activity = Activity(lambda: now)
    assert activity.state() == (STARTING, 0.0)
    activity.now("decoding 3 sequences")
    now = 12.0
    activity.keepalive("decoding 5 sequences")
    assert activity.state() == ("decoding 5 sequences", 2.0)
    with activity.during("checkpoint 50"):
        now = 13.0
        assert activity.state() == ("checkpoint 50", 1.0)
    assert activity.state() == ("decoding 5 sequences", 3.0)
    now = 20.0
    assert activity.held_up_s() == 0.0, "not a loop"
    activity.looping = True
    assert activity.held_up_s() == 7.0


def test_a_thread_tells_buffer_and_launcher_what_a_blocked_main_thread_does(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    endpoint = f"ipc://{tmp_path}/b.sock"
    activity = Activity()
    heard: list[Pulse] = []

    def a_reward_that_blocks(router: Router) -> None:
        """Until the heartbeat says so; the main loop does not come round meanwhile."""
        deadline = time.monotonic() + LONGEST_S
        while not (heard and "held up" in heard[-1].doing) and time.monotonic() < deadline:
            received = router.receive(0.1)
            if received is not None:
                peer, message = received
                assert peer == b"generator-1/pulse"
                assert isinstance(message, Pulse)
                heard.append(message)
                router.send(peer, PulseAnswer())

    with (
        Router(endpoint) as router,
        Heartbeat(
            name="generator-1",
            role="generator",
            activity=activity,
            dealer=lambda: Dealer(endpoint, "generator-1/pulse"),
            every_s=0.05,
            pipe=write,
        ) as heartbeat,
    ):
        activity.now("decoding 3 sequences")
        activity.looping = True
        a_reward_that_blocks(router)
        assert heartbeat.buffer_silent_s < LONGEST_S
    assert (heard[-1].name, heard[-1].pid, heard[-1].role) == ("generator-1", os.getpid(), "generator")
    assert heard[-1].doing.startswith("decoding 3 sequences; held up for ")
    assert "in test_heartbeat.py:" in heard[-1].doing
    assert heard[-1].doing.endswith(" a_reward_that_blocks")
    lines = [json.loads(line) for line in os.read(read, 1 << 16).splitlines()]
    assert {line["pid"] for line in lines} == {os.getpid()}
    assert "decoding 3 sequences" in {line["doing"] for line in lines}
    os.close(read)
    os.close(write)


def test_the_launcher_hears_at_once_that_a_process_has_started() -> None:
    """One that starts may be silent for much longer, and what it was stopped in would be told wrongly."""
    read, write = os.pipe()
    activity = Activity()
    with (
        os.fdopen(read) as lines,
        Heartbeat(name="trainer", role="trainer", activity=activity, dealer=None, every_s=3600.0, pipe=write),
    ):
        assert json.loads(lines.readline())["doing"] == STARTING
        activity.now("training step 1")
        assert json.loads(lines.readline())["doing"] == "training step 1"
    os.close(write)
