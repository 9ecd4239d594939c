"""Places for requests that run at the same time, given in the order in which they were asked for."""

from __future__ import annotations

import asyncio


class Seats:
    """A number of places. vLLM gets one request more than places at most, so that a probe of the weights never waits
    for a turn to end."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: dict[str, asyncio.Future[bool]] = {}

    async def take(self, name: str) -> bool:
        """Wait for a place. False when `withdraw` came first: there is no place to give back then."""
        if self._free:
            self._free -= 1
            return True
        place = self._waiting[name] = asyncio.get_running_loop().create_future()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.result():
                self.give_back()
            raise
        finally:
            self._waiting.pop(name, None)

    def give_back(self) -> None:
        """Free a place, for whoever has waited longest."""
        for place in self._waiting.values():
            if not place.done():
                place.set_result(True)
                return
        self._free += 1

    def withdraw(self, name: str) -> None:
        """End the wait of a request that nobody wants any more."""
        place = self._waiting.get(name)
        if place is not None and not place.done():
            place.set_result(False)
