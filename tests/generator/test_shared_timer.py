"""One timer for all waits: each is woken when its time has come, whatever the others do."""

from __future__ import annotations

import asyncio

from async_rl.generator.shared_timer import EARLY_S, SharedTimer


async def woken_after(timer: SharedTimer, seconds: float) -> float:
    """Seconds until a wait is woken, by the loop's clock."""
    loop = asyncio.get_running_loop()
    waiting, began = loop.create_future(), loop.time()
    timer.wake(waiting, seconds)
    await waiting
    return loop.time() - began


def test_each_wait_is_woken_not_much_before_its_time():
    times = [0.15, 0.0, 0.3, 0.05, 0.1]

    async def main() -> list[float]:
        timer = SharedTimer()
        return await asyncio.gather(*(woken_after(timer, seconds) for seconds in times))

    for asked, took in zip(times, asyncio.run(main()), strict=True):
        assert took >= asked - EARLY_S - 0.001


def test_a_wait_that_is_over_is_not_woken_and_holds_up_no_other():
    async def main() -> tuple[bool, int]:
        timer, loop = SharedTimer(), asyncio.get_running_loop()
        forgotten, done = loop.create_future(), loop.create_future()
        timer.wake(forgotten, 0.01)
        timer.wake(done, 0.01)
        timer.forget(forgotten)
        done.set_result(None)
        await woken_after(timer, 0.1)
        return forgotten.done(), len(timer.due)

    assert asyncio.run(main()) == (False, 0)


def test_a_timer_serves_the_next_event_loop_too():
    timer = SharedTimer()

    async def leave() -> None:
        timer.wake(asyncio.get_running_loop().create_future(), 0.001)  # its loop ends before

    asyncio.run(leave())
    assert asyncio.run(woken_after(timer, 0.05)) >= 0.05 - EARLY_S - 0.001
