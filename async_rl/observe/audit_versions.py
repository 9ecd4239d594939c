"""Which weights sampled the trajectories of each batch, for the audit: from the bytes that a trainer is answered, and
from the columns beside them where the bytes are deleted (buffer.keep_steps)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from async_rl.buffer.store_reader import StoreReader, connect, explained
from async_rl.trajectory.codec import WireError, unpack
from async_rl.trajectory.reuse import reuse_of

_BY_STEP = (
    "SELECT step, group_id, sample, version_min, version_max, ended FROM trajectories WHERE step < ? ORDER BY step, id"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The versions of one trajectory."""

    group: int
    sample: int
    oldest: int
    """version of its oldest policy token; -1 when no token of it is trained"""
    newest: int
    """version of its newest policy token, or -1"""


@contextmanager
def versions_by_step(store: StoreReader) -> Iterator[Callable[[int], Iterable[Versions | str]]]:
    """Gives what is stored of the trajectories of a batch by its step; a text: one that cannot be read. Steps are asked
    for in ascending order: columns are read in one pass, since no index leads from a step to its trajectories."""
    whole_from = store.first_step()
    with closing(connect(store.path, mode="ro")) as connection, explained(store.path):
        of_column = _in_columns(groupby(connection.execute(_BY_STEP, (whole_from,)), itemgetter(0)))
        yield lambda step: _in_bytes(store, step) if step >= whole_from else of_column(step)


def _in_bytes(store: StoreReader, step: int) -> Iterator[Versions | str]:
    """The versions of a batch's tokens, whatever the columns beside the bytes say."""
    for blob in store.load_batch(step) or ():
        try:
            t = unpack(blob)
        except WireError as error:
            yield f"a trajectory of step {step} cannot be read: {error}"
            continue
        if reuse_of(t) is not None:
            continue  # it has bounds of its own
        versions = [] if t.failed else [span.version for span in t.versions if span.end > span.start]
        yield Versions(
            group=t.group, sample=t.sample, oldest=min(versions, default=-1), newest=max(versions, default=-1)
        )


def _in_columns(
    steps: Iterator[tuple[int, Iterator[tuple[int, int, int, int, int, str]]]],
) -> Callable[[int], Iterator[Versions]]:
    """The versions that the columns tell. `steps`: their rows, step by step."""
    step, rows = next(steps, (-1, iter(())))

    def of_step(wanted: int) -> Iterator[Versions]:
        nonlocal step, rows
        while 0 <= step < wanted:
            step, rows = next(steps, (-1, iter(())))
        for _, group, sample, low, high, ended in rows if step == wanted else ():
            trained = ended not in ("error", "aborted")
            yield Versions(group=group, sample=sample, oldest=low if trained else -1, newest=high if trained else -1)

    return of_step
