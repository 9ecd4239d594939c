"""A version of the weights is handed out while the next step is computed.

Forward and backward pass only read the weights, so a thread may copy them meanwhile. What changes them waits for it:
the optimizer's step (`Learner.before_write`), and the next publication. So the bytes that are handed out are those of
the version, and it is announced when all of them are there, by the thread that handed them out.

Who waits for whom: the trainer's thread waits for this one before it overwrites the weights, as long as the publisher's
own deadlines allow, and where it has nothing to do but wait for the buffer. This thread waits for what the publisher
waits for. Weights that have to be formed for it, by other ranks or out of adapters, are handed out at once instead.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from async_rl.config import Settings
from async_rl.events import RecordEvent
from async_rl.run_folder import RunFolder
from async_rl.trainer.publish import Publisher, make_publisher
from async_rl.trainer.ranks import is_sharded
from async_rl.weights.way import LINKS

if TYPE_CHECKING:
    from torch import Tensor

    from async_rl.trainer.learner import Learner

LOOK_S = 0.02
"""how often a wait looks for something else to do"""
CLOSING_S = 10.0
"""longest time that the end of the trainer waits for a version that is being handed out"""

Tensors = Mapping[str, "Tensor"] | Iterable[tuple[str, "Tensor"]]


@dataclass(slots=True, kw_only=True)
class _Running:
    """One version on its way."""

    version: int
    tensors: list[tuple[str, Tensor]]
    announce: Callable[[], None]
    after: torch.cuda.Event | None
    """what was computed before; None: not on a GPU"""
    done: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None


class Publication:
    """Hands out versions of the weights, one at a time."""

    def __init__(
        self, publisher: Publisher, *, beside: bool = True, keepalive: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            beside: in a thread of its own; else `begin` returns when the version is out.
            keepalive: called often while `wait` waits.
        """
        self._publisher, self._beside, self._keepalive = publisher, beside, keepalive
        self._running: _Running | None = None
        self._seconds: dict[str, float] = {}
        self._jobs: queue.SimpleQueue[_Running | None] = queue.SimpleQueue()
        if beside:
            self._start()

    def begin(self, tensors: Tensors, version: int, announce: Callable[[], None]) -> None:
        """Hand out `tensors` (not to be written before `wait` has returned), then call `announce`, perhaps in another
        thread. Raises what the publisher raises, also for the version before."""
        self.wait()
        if not self._beside:
            self._publisher.publish(tensors, version)
            announce()
            return
        # taken here: the model's parameters may be others for a moment while trajectories are verified
        given = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
        device = given[0][1].device
        after = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._running = _Running(version=version, tensors=given, announce=announce, after=after)
        self._jobs.put(self._running)

    def _start(self) -> None:
        """Start the thread, which copies with one thread of the processor: the others are taken."""
        threads, ready = torch.get_num_threads(), threading.Event()

        def work() -> None:
            torch.get_num_threads()  # the first call of a thread would overwrite what is set
            torch.set_num_threads(1)
            ready.set()
            streams: dict[torch.device, torch.cuda.Stream] = {}
            while (running := self._jobs.get()) is not None:
                self._hand_out(running, streams)

        threading.Thread(target=work, name="publication", daemon=True).start()
        ready.wait()
        torch.set_num_threads(threads)  # it is also the number of threads that have not computed yet

    def _hand_out(self, running: _Running, streams: dict[torch.device, torch.cuda.Stream]) -> None:
        started = time.monotonic()
        try:
            with _on_side_stream(running.tensors[0][1].device, running.after, streams):
                self._publisher.publish(running.tensors, running.version)
            running.announce()
        except Exception as error:  # the boundary of this thread: raised in `wait`
            running.failure = error
        self._seconds["time/publish_beside"] = time.monotonic() - started
        running.tensors.clear()
        running.done.set()

    @property
    def is_running(self) -> bool:
        return self._running is not None and not self._running.done.is_set()

    def wait(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Return when what was begun is out, or as soon as `unless`, which is asked often, says that there is something
        else to do. Raises what the publisher raised."""
        while (running := self._running) is not None:
            if running.done.wait(LOOK_S):
                self._running = None
                if running.failure is not None:
                    raise running.failure
                return
            if unless():
                return
            self._keepalive()

    def before_write(self) -> None:
        """Wait until nobody copies the weights any more, and remember for how long. Calls no keepalive: it may be in
        the middle of a step of all ranks."""
        started = time.monotonic()
        running = self._running
        if running is not None:
            running.done.wait()
            self.wait()
        self._seconds["time/publish_wait"] = self._seconds.get("time/publish_wait", 0.0) + time.monotonic() - started

    def row(self) -> dict[str, float]:
        """Columns of the step's metric row: seconds since the last one."""
        found, self._seconds = self._seconds, {}
        return found if self._beside else {}

    def held(self) -> Mapping[int, Mapping[str, Tensor]] | None:
        """Versions that the publisher holds and that nothing overwrites until the next one is begun; None: it keeps
        none."""
        held: Callable[[], dict[int, dict[str, Tensor]]] | None = getattr(self._publisher, "held", None)
        if held is None:
            return None
        running = self.is_running
        found = held()
        # of the two in a segment the older one is being overwritten
        return {version: found[version] for version in [max(found)]} if running and found else found

    def close(self) -> None:
        """End, behind the version that is being handed out. One that does not get out in time is left to its thread,
        which ends with this process."""
        self._jobs.put(None)
        if self._running is None or self._running.done.wait(CLOSING_S):
            self._publisher.close()


def make_publication(
    folder: RunFolder,
    settings: Settings,
    learner: Learner,
    ways: Iterable[str],
    record: RecordEvent,
    *,
    keepalive: Callable[[], None] = lambda: None,
    upload_to: str = "",
) -> Publication:
    """Of the publisher that `make_publisher` makes of these. Raises UserError."""
    ways = set(ways)
    publisher = make_publisher(folder, settings, learner, ways, record, keepalive=keepalive, upload_to=upload_to)
    beside = beside_training(learner, linked=bool(ways & set(LINKS)) or bool(upload_to))
    return Publication(publisher, beside=beside, keepalive=keepalive)


def beside_training(learner: Learner, *, linked: bool) -> bool:
    """Whether the learner's weights can be handed out while it computes: they are tensors that lie in this process,
    and no other rank may run into its time-out while a link is waited for."""
    alone = learner.adapters is not None and learner.options.send_adapters
    return (alone or lies_here(learner)) and not (linked and learner.ranks.size > 1)


def lies_here(learner: Learner) -> bool:
    """Whether the tensors of `Learner.full_weights` are the parameters themselves: neither gathered from other ranks
    nor sums with adapters."""
    return learner.adapters is None and not is_sharded(learner.model)


@contextmanager
def _on_side_stream(
    device: torch.device, after: torch.cuda.Event | None, streams: dict[torch.device, torch.cuda.Stream]
) -> Iterator[None]:
    """In the block, a thread copies from a GPU behind `after`, and beside what its other streams are given. Not run on
    a GPU yet. `streams`: this thread's, by device."""
    if after is None:
        yield
        return
    torch.cuda.set_device(device)
    stream = streams.get(device) or streams.setdefault(device, torch.cuda.Stream(device))
    stream.wait_event(after)
    with torch.cuda.stream(stream):
        yield
