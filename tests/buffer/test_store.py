"""What was committed is there after any death; nothing is stored twice; readers never disturb."""

import math
import multiprocessing
import os
import signal
import sqlite3
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from async_rl.buffer.store import Durability, Store, StoreError, StoreReader
from async_rl.errors import UserError
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import pack, unpack
from async_rl.wire.frames import decode, encode
from async_rl.wire.messages import Finished

PROCESSES = multiprocessing.get_context("spawn")


def trajectory(group: int, sample: int, *, tokens: int = 20) -> Trajectory:
    return Trajectory(
        group=group,
        sample=sample,
        problem=7,
        split="train",
        seed=2**64 - 1,
        tokens=np.arange(tokens, dtype=np.int32) + group,
        log_behaviour=np.full(tokens, -0.5, dtype=np.float32),
        turns=(Turn(start=0, length=tokens),),
        versions=(VersionSpan(version=2, start=0, end=10), VersionSpan(version=3, start=10, end=tokens)),
        reward=0.25 * sample,
        ended="finished",
        generator="generator-0",
        started_at=1.0,
        finished_at=2.0,
    )


def new_store(folder: Path, durability: Durability = "process") -> Store:
    return Store(folder / "trajectories.sqlite", durability=durability, create=True)


def add_group(store: Store, group: int, *, samples: int = 2, split: str = "train") -> None:
    store.add_group(group=group, problem=7, split=split, admitted_version=1, admitted_at=5.0, generator="generator-0")
    store.add_trajectories([trajectory(group, sample) for sample in range(samples)])


@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_was_committed_comes_back_after_closing(tmp_path: Path, durability: Durability) -> None:
    with new_store(tmp_path, durability) as store:
        for group in range(4):
            add_group(store, group)
        store.form_batch(step=0, groups=[2, 0], formed_at=6.0)
        store.mark_trained(step=0, trained_at=7.0)
        store.mark_consumed(step=0)
        store.refuse_group(1, "zero_signal")
        store.add_evaluation(evaluation=0, rewards=[1.0, 0.0], version_min=0, version_max=1, finished_at=8.0)
        store.commit()
    with Store(tmp_path / "trajectories.sqlite", durability="process", create=False) as store:
        expected = [pack(trajectory(group, sample)) for group in (2, 0) for sample in (0, 1)]
        assert store.load_batch(0) == expected
        assert store.load_groups([2, 0]) == expected
        assert store.load_batch(1) is None
        assert store.consumed_step() == 0
        assert [group.group for group in store.groups(unfinished=True)] == [3]
        assert [group.refused_because for group in store.groups()] == [None, "zero_signal", None, None]
        (batch,) = store.batches()
        assert (batch.step, batch.groups, batch.formed_at, batch.trained_at) == (0, (2, 0), 6.0, 7.0)
        (evaluation,) = store.evaluations()
        assert (evaluation.reward, evaluation.rewards) == (0.5, (1.0, 0.0))
        assert store.counts() == {
            "groups_admitted": 4,
            "groups_batched": 2,
            "groups_refused": 1,
            "trajectories": 8,
            "batches": 1,
            "batches_trained": 1,
        }
        row = next(store.trajectories(step=0))
        assert (row.group, row.sample, row.version_min, row.version_max, row.length) == (0, 0, 2, 3, 20)
        assert {row.refused_because for row in store.trajectories() if row.group == 1} == {"zero_signal"}


def test_a_trajectory_stored_twice_stays_as_it_was(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        store.add_trajectories([trajectory(0, 0), trajectory(0, 1)])
        again = replace(trajectory(0, 1), reward=9.0)
        store.add_trajectories([again, trajectory(0, 2), trajectory(0, 2)])
        store.commit()
        assert [row.reward for row in store.trajectories()] == [0.0, 0.25, 0.5]
        assert [unpack(blob).sample for blob in store.load_groups([0])] == [0, 1, 2]


def test_bytes_that_came_with_trajectories_are_stored_as_they_are(tmp_path: Path) -> None:
    sent = (trajectory(0, 0), trajectory(0, 1))
    received = decode(encode(Finished(trajectories=sent)))
    assert isinstance(received, Finished)
    with new_store(tmp_path) as store:
        store.add_trajectories(received.trajectories, received.blobs)
        store.commit()
        assert [bytes(blob) for blob in store.load_groups([0])] == [pack(t) for t in sent]


def test_a_batch_is_formed_once_and_stays_the_same_when_more_arrives(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        for group in range(3):
            add_group(store, group)
        store.form_batch(step=0, groups=[0, 1], formed_at=1.0)
        before = store.load_batch(0)
        store.add_trajectories([trajectory(0, 9)])
        assert store.load_batch(0) == before
        store.form_batch(step=0, groups=[0, 1], formed_at=2.0)
        assert next(store.batches()).formed_at == 1.0
        with pytest.raises(StoreError, match="formed before, with other groups"):
            store.form_batch(step=0, groups=[0, 2], formed_at=2.0)
        with pytest.raises(StoreError, match="group 1 is not free for the batch of step 1"):
            store.form_batch(step=1, groups=[1], formed_at=2.0)
        store.refuse_group(2, "stale")
        with pytest.raises(StoreError, match="group 2 is not free"):
            store.form_batch(step=1, groups=[2], formed_at=2.0)


def test_marking_an_older_step_does_not_take_the_mark_back(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        assert store.consumed_step() == -1
        for step in (0, 1, 0):
            store.mark_consumed(step=step)
        assert store.consumed_step() == 1


def test_a_failed_trajectory_keeps_its_nan_in_the_blob_and_shows_none(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        store.add_trajectories([replace(trajectory(0, 0), reward=math.nan, ended="error", reason="no")])
        (row,) = store.trajectories()
        assert (row.reward, row.ended, row.reason) == (None, "error", "no")
        assert math.isnan(unpack(store.load_groups([0])[0]).reward)


def test_what_was_not_committed_is_gone(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        add_group(store, 0)
        store.commit()
        store.commit()
        add_group(store, 1)
    with StoreReader(tmp_path / "trajectories.sqlite") as reader:
        assert [group.group for group in reader.groups()] == [0]


def test_a_reader_sees_commits_while_the_writer_goes_on(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, StoreReader(store.path) as reader:
        for group in range(3):
            add_group(store, group)
            assert reader.counts()["groups_admitted"] == group
            store.commit()
            assert reader.counts()["groups_admitted"] == group + 1


def test_a_half_read_iterator_keeps_its_snapshot_and_does_not_stop_the_writer(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, StoreReader(store.path) as reader:
        add_group(store, 0)
        store.commit()
        half_read = reader.trajectories()
        next(half_read)
        add_group(store, 1)
        store.commit()
        assert len(list(half_read)) == 1
        assert reader.counts()["trajectories"] == 4


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    new_store(tmp_path).close()
    with (
        StoreReader(tmp_path / "trajectories.sqlite") as reader,
        pytest.raises(StoreError, match="readonly"),
    ):
        reader._all("DELETE FROM groups")


def test_any_sql_tool_can_ask_while_the_run_goes_on(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        add_group(store, 0)
        store.commit()
        other = sqlite3.connect(store.path)
        found = other.execute("SELECT avg(reward), sum(length), max(version_max) FROM trajectories").fetchone()
        assert found == (0.125, 40, 3)
        other.close()


def write_until_killed(path: Path, pipe: Connection) -> None:
    store = Store(path, durability="process", create=True)
    group = 0
    while True:
        add_group(store, group, samples=3)
        if group % 3 == 2:
            store.form_batch(step=group // 3, groups=[group], formed_at=1.0)
        store.commit()
        pipe.send(group)
        group += 1


def test_a_killed_writer_loses_nothing_it_had_committed(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.sqlite"
    ours, theirs = PROCESSES.Pipe()
    writer = PROCESSES.Process(target=write_until_killed, args=(path, theirs), daemon=True)
    writer.start()
    theirs.close()
    told = -1
    while told < 40:
        assert ours.poll(60)
        told = ours.recv()
    with pytest.raises(UserError, match="another process is writing"):
        Store(path, durability="process", create=False)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    while ours.poll(0):  # what it said before it died
        try:
            told = ours.recv()
        except EOFError:
            break
    with Store(path, durability="process", create=False) as store:
        groups = [group.group for group in store.groups()]
        assert groups == list(range(len(groups)))
        assert len(groups) >= told + 1
        for group in groups:
            blobs = store.load_groups([group])
            assert blobs == [pack(trajectory(group, sample)) for sample in range(3)]
        assert [batch.groups for batch in store.batches()] == [(g,) for g in groups if g % 3 == 2]
        add_group(store, len(groups))
        store.commit()


def test_a_full_disk_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        store.commit()
        store._connection.execute("PRAGMA max_page_count = 20")
        with pytest.raises(StoreError, match=r"trajectories\.sqlite: .*full; free some space"):
            store.add_trajectories([trajectory(group, 0, tokens=5000) for group in range(100)])


def test_a_store_that_another_program_holds_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.buffer.store_reader.LOCK_WAIT_S", 0.05)
    with new_store(tmp_path) as store:
        store.commit()
        other = sqlite3.connect(store.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        add_group(store, 0)
        with pytest.raises(StoreError, match=r"another program held it for 0\.05 s"):
            store.commit()
        other.execute("ROLLBACK")
        other.close()
        add_group(store, 0)
        store.commit()


@pytest.mark.parametrize(("content", "message"), [(b"not a database" * 100, "no SQLite file"), (b"", "not a store")])
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trajectories.sqlite"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        StoreReader(path)
    with pytest.raises(UserError, match=message):
        Store(path, durability="process", create=False)


def test_a_store_of_another_schema_is_refused(tmp_path: Path) -> None:
    new_store(tmp_path).close()
    other = sqlite3.connect(tmp_path / "trajectories.sqlite")
    other.execute("PRAGMA user_version = 9")
    other.close()
    with pytest.raises(UserError, match="schema 9, this program reads 3"):
        StoreReader(tmp_path / "trajectories.sqlite")


def test_missing_existing_and_unwritable_places_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.sqlite"
    with pytest.raises(UserError, match="there is no store here"):
        StoreReader(path)
    with pytest.raises(UserError, match="no store to go on with"):
        Store(path, durability="process", create=False)
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "none" / "trajectories.sqlite", durability="process", create=True)
    new_store(tmp_path).close()
    with pytest.raises(UserError, match="there is a store already"):
        new_store(tmp_path)
