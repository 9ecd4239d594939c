"""What a thousand generators would break, were it as for four."""

from __future__ import annotations

import resource
from pathlib import Path

from support_buffer import TRAINER, make_core

from async_rl.buffer.loop import TICK_S, Ticks, queued_messages
from async_rl.buffer.staleness import PacePolicy
from async_rl.observe.top import _chosen
from async_rl.wire import messages as msg
from async_rl.wire.channel import Router

PACE = PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=2.0, window=1)


def test_of_a_thousand_generators_a_few_are_named() -> None:
    core = make_core(PACE)
    for number in range(1000):
        core.handle(b"g%d" % number, msg.Hello(role="generator", name=f"g{number}", pid=1), 0.0)
    core.handle(TRAINER, msg.NextBatch(step=0), 0.0)
    reason = core.wait_reason(1.0)
    assert "g7 holds version 0" in reason
    assert "g8 " not in reason
    assert reason.endswith("and 992 more generators")


def test_few_messages_of_each_may_wait() -> None:
    budget = 256 << 20
    few = [queued_messages(budget, peers=peers) for peers in (1, 8, 64, 1000)]
    assert few == sorted(few, reverse=True)
    assert few[-1] == 1
    for peers, each in zip((8, 64, 1000), few[1:], strict=True):
        assert peers * each <= 1024


def test_a_row_of_metrics_names_those_that_held_up_most() -> None:
    row = msg.BufferCounters(held_up_by={f"g{number}": number for number in range(1000)}).metrics()
    assert sorted(name for name in row if name.startswith("held_up/by/"))[0] == "held_up/by/g984"
    assert sum(name.startswith("held_up/by/") for name in row) == 16


def test_top_shows_those_that_are_silent_longest(tmp_path: Path) -> None:
    trainer = {"name": "trainer", "role": "trainer", "silent_s": 0.1}
    many = [
        {"name": f"g{number}", "role": "generator", "version": number % 3, "silent_s": number / 100}
        for number in range(1000)
    ]
    shown, more = _chosen([trainer, *many])
    assert [row["name"] for row in shown] == ["trainer", *(f"g{number}" for number in range(999, 987, -1))]
    assert more == "and 988 more generators, with version 0 to 2, all heard within 9.9 s"
    assert _chosen([trainer, *many[:12]]) == ([trainer, *many[:12]], "")


def test_all_of_them_are_looked_at_now_and_then_only() -> None:
    core, ticks = make_core(PACE), Ticks()
    core.handle(TRAINER, msg.NextBatch(step=0), 0.0)
    ticks.tick(core, 100.0)
    core.presence.checked = 0.0
    assert ticks.tick(core, 100.0 + TICK_S / 2) == []
    assert core.presence.checked == 0.0, "nobody was looked at"
    ticks.tick(core, 100.0 + 2 * TICK_S)
    assert core.presence.checked > 100.0


def test_a_listening_process_may_open_as_many_files_as_the_system_lets_it(tmp_path: Path) -> None:
    with Router(f"ipc://{tmp_path}/s"):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard
