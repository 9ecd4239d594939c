"""Questions about a whole run's trajectories, answered from so many of them as can be read at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from async_rl.buffer.store_reader import StoreReader

MOST_SCANNED = 200_000
"""trajectories read for one survey (about half a second); of a larger store, evenly spread stretches"""
_STRETCHES = 64
_COLUMNS = (
    "t.group_id, t.sample, t.split, t.step, t.version_min, t.version_max, t.reward, t.policy_length, t.num_turns, "
    "t.ended, t.refused_because, coalesce(g.generator, ''), t.started_at, t.finished_at"
)
_FROM = "FROM trajectories t LEFT JOIN groups g ON g.group_id = t.group_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """A trajectory without its tokens."""

    group: int
    sample: int
    split: str
    step: int | None
    """batch it is in"""
    version_min: int
    version_max: int
    reward: float | None
    """None where it was NaN"""
    policy_length: int
    """tokens sampled by the policy"""
    num_turns: int
    ended: str
    refused_because: str | None
    generator: str
    """that its group's permit was issued to last"""
    started_at: float
    """seconds since the epoch"""
    finished_at: float


class StoreSurvey(StoreReader):
    """A store read for what its trajectories are like as a whole."""

    def spread(self, most: int = MOST_SCANNED) -> list[Surveyed]:
        """All trajectories, or evenly spread stretches of at most about `most` of them, in order of arrival."""
        last = self.last_id()
        if last <= most:
            return list(self.between(1, last))
        length = most // _STRETCHES
        starts = [1 + (last - length) * i // (_STRETCHES - 1) for i in range(_STRETCHES)]
        return [row for start in starts for row in self.between(start, start + length - 1)]

    def newest(self, most: int) -> list[Surveyed]:
        """The last `most` to arrive."""
        last = self.last_id()
        return list(self.between(last - most + 1, last))

    def between(self, first: int, last: int) -> Iterator[Surveyed]:
        """By number of arrival, both included."""
        query = f"SELECT {_COLUMNS} {_FROM} WHERE t.id BETWEEN ? AND ? ORDER BY t.id"
        return self._rows(Surveyed, query, (first, last))

    def of_group(self, group: int) -> Iterator[Surveyed]:
        """Sample by sample."""
        return self._rows(Surveyed, f"SELECT {_COLUMNS} {_FROM} WHERE t.group_id = ? ORDER BY t.sample", (group,))

    def last_id(self) -> int:
        return int(self._all("SELECT coalesce(max(id), 0) FROM trajectories")[0][0])

    def steps(self) -> tuple[int, int]:
        """(first, last) step of a formed batch; (0, -1) before the first."""
        first, last = self._all("SELECT coalesce(min(step), 0), coalesce(max(step), -1) FROM batches")[0]
        return first, last

    def refusals(self) -> dict[str, int]:
        """Training groups refused, by reason."""
        query = (
            "SELECT refused_because, count(*) FROM groups WHERE refused_because IS NOT NULL AND split = 'train' "
            "GROUP BY 1 ORDER BY 2 DESC"
        )
        return dict(self._all(query))

    def groups_in(self, step: int) -> list[int]:
        return [
            group for (group,) in self._all("SELECT group_id FROM groups WHERE step = ? ORDER BY group_id", (step,))
        ]

    def odd_groups(self, most: int) -> list[int]:
        """Newest groups that were refused or in which an episode failed."""
        refused = "SELECT group_id FROM groups WHERE refused_because IS NOT NULL ORDER BY group_id DESC LIMIT ?"
        found = [group for (group,) in self._all(refused, (most,))]
        failed = "SELECT DISTINCT group_id FROM trajectories WHERE id > ? AND ended IN ('error', 'aborted') LIMIT ?"
        found += [group for (group,) in self._all(failed, (self.last_id() - MOST_SCANNED, most))]
        return sorted(set(found))[-most:]

    def held_out_groups(self, most: int) -> list[int]:
        """Newest groups of held-out problems."""
        query = "SELECT group_id FROM groups WHERE split = 'eval' ORDER BY group_id DESC LIMIT ?"
        return [group for (group,) in self._all(query, (most,))]

    def group_range(self, first: int, last: int) -> tuple[int, int]:
        """(lowest, highest) number of the groups in the batches of these steps, both included; (0, -1) when none."""
        query = "SELECT coalesce(min(group_id), 0), coalesce(max(group_id), -1) FROM groups WHERE step BETWEEN ? AND ?"
        low, high = self._all(query, (first, last))[0]
        return low, high

    def of_groups(self, first: int, last: int) -> Iterator[Surveyed]:
        """Those of the groups with these numbers, both included."""
        query = f"SELECT {_COLUMNS} {_FROM} WHERE t.group_id BETWEEN ? AND ? ORDER BY t.group_id, t.sample"
        return self._rows(Surveyed, query, (first, last))
