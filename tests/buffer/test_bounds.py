"""The store within its bounds: what is full, what is deleted, what is fetched in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from async_rl.buffer.store import Store, StoreError, StoreReader
from async_rl.errors import UserError
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.beginnings import join_all
from async_rl.trajectory.codec import unpack


def trajectory(group: int, sample: int, tokens: int = 500, split: str = "train") -> Trajectory:
    return Trajectory(
        group=group,
        sample=sample,
        problem=0,
        split=split,  # type: ignore[arg-type]
        seed=1,
        tokens=np.full(tokens, group, np.int32),
        log_behaviour=np.full(tokens, -0.5, np.float32),
        turns=(Turn(start=0, length=tokens),),
        versions=(VersionSpan(version=0, start=0, end=tokens),),
        reward=0.5,
        ended="finished",
    )


def add_group(store: Store, group: int, *, split: str = "train", samples: int = 2, tokens: int = 500) -> None:
    store.add_group(group=group, problem=0, split=split, admitted_version=0, admitted_at=1.0, generator="g")
    store.add_trajectories([trajectory(group, sample, tokens, split) for sample in range(samples)])


def new_store(folder: Path, **more: int) -> Store:
    return Store(folder / "trajectories.sqlite", durability="process", create=True, **more)


def payloads(store: StoreReader) -> set[int]:
    """Groups of which tokens are there."""
    return {g for (g,) in store._all("SELECT DISTINCT group_id FROM trajectories JOIN payloads USING (id)")}


def prune(store: Store, *, keep_steps: int, oldest_live: int) -> None:
    while store.prune(keep_steps=keep_steps, oldest_live=oldest_live):
        store.commit()


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("most_bytes", [1, 9_000, 10**9])
def test_a_batch_in_parts_is_the_batch(tmp_path: Path, most_bytes: int) -> None:
    with new_store(tmp_path) as store:
        for group in (3, 4):
            add_group(store, group, samples=3)
        store.form_batch(step=0, groups=[4, 3], formed_at=1.0)
        whole = store.load_batch(0)
        assert whole is not None
        got: list[bytes] = []
        parts = 0
        while len(got) < len(whole):
            found = store.load_part(0, after=len(got), most_bytes=most_bytes)
            assert found is not None
            total, some = found
            assert total == 6
            assert len(some) == 1 or sum(map(len, some)) <= most_bytes
            got += join_all(some, most_bytes=10**9)
            parts += 1
        assert got == whole
        assert parts == {1: 6, 9_000: 3, 10**9: 1}[most_bytes]
        assert store.load_part(0, after=6, most_bytes=most_bytes) == (6, [])
        assert store.load_part(1, after=0, most_bytes=most_bytes) is None


# ---------------------------------------------------------------------------------------- retention


def filled(store: Store, *, steps: int) -> None:
    """Two groups a step, each followed by a refused one; an evaluation group before every step. Numbers of
    step s: evaluation 4 s, trained 4 s + 1 and 4 s + 2, refused 4 s + 3."""
    for step in range(steps):
        add_group(store, 4 * step, split="eval")
        for group in range(4 * step + 1, 4 * step + 4):
            add_group(store, group)
        store.form_batch(step=step, groups=[4 * step + 1, 4 * step + 2], formed_at=1.0)
        store.refuse_group(4 * step + 3, "zero_signal")
    store.commit()


def test_tokens_of_old_consumed_batches_and_of_refused_groups_are_deleted_and_their_rows_stay(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        filled(store, steps=10)
        store.mark_consumed(step=7, oldest=8)
        store.commit()
        prune(store, keep_steps=3, oldest_live=1000)
        assert store.first_step() == 5
        assert payloads(store) == set(range(21, 40)), "of steps 5 to 9 nothing, of those before everything"
        assert store.load_batch(5) is not None
        rows = list(store.trajectories())
        assert len(rows) == 80
        assert {row.refused_because for row in rows if row.group == 3} == {"zero_signal"}
        assert {(row.length, row.reward) for row in rows} == {(500, 0.5)}


@pytest.mark.parametrize(
    ("consumed", "oldest", "keep_steps", "first"),
    [(7, 8, 1, 7), (7, 4, 1, 4), (7, 0, 1, 0), (-1, 0, 1, 0), (7, 8, 8, 0), (7, 2, 5, 2)],
)
def test_nothing_that_a_kept_checkpoint_needs_is_deleted(
    tmp_path: Path, consumed: int, oldest: int, keep_steps: int, first: int
) -> None:
    with new_store(tmp_path) as store:
        filled(store, steps=10)
        if consumed >= 0:
            store.mark_consumed(step=consumed, oldest=oldest)
        prune(store, keep_steps=keep_steps, oldest_live=1000)
        assert store.first_step() == first
        assert set(range(4 * first + 1, 40)) <= payloads(store)
        assert not payloads(store) & set(range(4 * first))


def test_what_comes_late_of_a_group_that_is_pruned_leaves_its_row_only(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        filled(store, steps=10)
        store.save_turns([trajectory(3, 5)])
        store.mark_consumed(step=9, oldest=10)
        prune(store, keep_steps=1, oldest_live=1000)
        assert store.begun() == []
        store.add_trajectories([trajectory(3, 5), trajectory(38, 5)])
        store.commit()
    with Store(tmp_path / "trajectories.sqlite", durability="process", create=False) as store:
        store.add_trajectories([trajectory(3, 6)])
        assert payloads(store) == {37, 38, 39}
        assert [row.sample for row in store.trajectories_of(3)] == [0, 1, 5, 6]


def test_a_group_that_is_not_finished_with_stops_the_deleting(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        filled(store, steps=10)
        store.mark_consumed(step=9, oldest=10)
        prune(store, keep_steps=1, oldest_live=7)
        assert min(payloads(store)) == 7
        prune(store, keep_steps=1, oldest_live=1000)
        assert payloads(store) == {37, 38, 39}


def test_a_death_between_two_portions_leaves_no_batch_that_looks_whole(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.sqlite"
    with new_store(tmp_path) as store:
        filled(store, steps=20)
        store.mark_consumed(step=19, oldest=20)
        assert store.prune(keep_steps=1, oldest_live=1000)
        store.commit()
    with Store(path, durability="process", create=False) as store:
        assert store.first_step() == 19
        assert min(payloads(store)) == 16, "one portion is gone"
        prune(store, keep_steps=1, oldest_live=1000)
        assert payloads(store) == {77, 78, 79}


def test_freed_pages_are_used_again(tmp_path: Path) -> None:
    sizes = []
    with new_store(tmp_path) as store:
        for step in range(60):
            for group in (2 * step, 2 * step + 1):
                add_group(store, group, tokens=8000)
            store.form_batch(step=step, groups=[2 * step, 2 * step + 1], formed_at=1.0)
            store.mark_consumed(step=step, oldest=step + 1)
            store.commit()
            prune(store, keep_steps=2, oldest_live=1000)
            (pages,) = store._all("PRAGMA page_count")[0]
            sizes.append(pages)
    assert sizes[-1] <= sizes[8] + 2, sizes  # rows alone


# ------------------------------------------------------------------------------------- full, read-only


def fill(store: Store, *, groups: range) -> None:
    for group in groups:
        add_group(store, group)
        store.commit()


def test_a_store_at_its_limit_names_the_setting_and_keeps_what_it_had(tmp_path: Path) -> None:
    said = r"may hold 1 MB \(buffer\.max_store_mb\): raise that, or free some space"
    with new_store(tmp_path, max_bytes=1 << 20) as store:
        with pytest.raises(StoreError, match=said):
            fill(store, groups=range(1000))
        stored = store.counts()["groups_admitted"]
        assert 50 < stored < 300
    path = tmp_path / "trajectories.sqlite"
    assert path.stat().st_size <= 1 << 20
    with Store(path, durability="process", create=False, max_bytes=2 << 20) as store:
        assert [row.group for row in store.groups()] == list(range(stored))
        blobs = store.load_groups(range(stored))
        assert [unpack(blob).group for blob in blobs] == [group for group in range(stored) for _ in "ab"]
        assert store._all("PRAGMA integrity_check") == [("ok",)]
        add_group(store, stored)
        store.commit()


def test_a_limit_below_what_is_there_lets_nothing_more_in_and_damages_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.sqlite"
    with new_store(tmp_path) as store:
        filled(store, steps=40)
    with Store(path, durability="process", create=False, max_bytes=1 << 20) as store:
        with pytest.raises(StoreError, match=r"buffer\.max_store_mb"):
            fill(store, groups=range(160, 200))
        assert len(list(store.groups())) == 160


def test_a_store_that_cannot_have_its_log_beside_it_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """As in a folder one may not write in; root may write anywhere, so something stands in the way."""
    with new_store(tmp_path) as store:
        add_group(store, 0)
        store.commit()
    (tmp_path / "trajectories.sqlite-wal").mkdir()
    with pytest.raises(UserError, match=r"trajectories\.sqlite: .*; .*must be able to write in its folder"):
        Store(tmp_path / "trajectories.sqlite", durability="process", create=False)
    (tmp_path / "trajectories.sqlite-wal").rmdir()
    with Store(tmp_path / "trajectories.sqlite", durability="process", create=False) as store:
        assert len(store.load_groups([0])) == 2


def test_a_store_that_turns_read_only_under_its_writer_says_so(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        store.commit()
        store._connection.execute("PRAGMA query_only = 1")
        add_group(store, 0)
        with pytest.raises(StoreError, match=r"\.sqlite: .*readonly.*; make the file and its folder writable"):
            store.commit()
