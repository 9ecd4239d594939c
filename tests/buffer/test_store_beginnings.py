"""The store keeps what the samples of a group begin with alike once, and gives every trajectory back whole."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from random import Random

import numpy as np
import pytest

from async_rl.buffer.store import Store, StoreReader
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.beginnings import is_cut, join_all
from async_rl.trajectory.codec import WireError, pack, unpack

PROMPT, ANSWER, SIZE = 512, 64, 8


def trajectory(group: int, sample: int, beginning: list[int], own: list[int]) -> Trajectory:
    first, last = len(beginning), len(beginning) + len(own)
    log = np.zeros(last, np.float32)
    log[first:] = -0.5
    return Trajectory(
        group=group,
        sample=sample,
        problem=group,
        split="train",
        seed=sample,
        tokens=np.array(beginning + own, np.int32),
        log_behaviour=log,
        turns=(Turn(start=first, length=len(own)),),
        versions=(VersionSpan(version=0, start=first, end=last),),
        reward=0.5,
        ended="finished",
        generator="generator-0",
    )


def group_of(group: int, size: int = SIZE) -> list[Trajectory]:
    random = Random(group)
    prompt = [random.randrange(1000) for _ in range(PROMPT)]
    return [trajectory(group, s, prompt, [random.randrange(1000) for _ in range(ANSWER)]) for s in range(size)]


def opened(folder: Path, *, create: bool) -> Store:
    return Store(folder / "trajectories.sqlite", durability="process", create=create)


def admit(store: Store, group: int) -> None:
    store.add_group(group=group, problem=0, split="train", admitted_version=0, admitted_at=1.0, generator="g")


def stored(folder: Path) -> list[bytes]:
    connection = sqlite3.connect(folder / "trajectories.sqlite")
    payloads = [payload for (payload,) in connection.execute("SELECT payload FROM payloads ORDER BY id")]
    connection.close()
    return payloads


def test_samples_that_arrive_one_by_one_share_their_prompt_in_the_store(tmp_path: Path) -> None:
    sent = {group: group_of(group) for group in (0, 1)}
    arriving = [t for group in sent.values() for t in group]
    Random(0).shuffle(arriving)
    with opened(tmp_path, create=True) as store:
        admit(store, 0)
        admit(store, 1)
        for t in arriving:
            store.add_trajectories([t], [pack(t)])
            store.commit()
        store.form_batch(step=0, groups=[1, 0], formed_at=1.0)
        store.commit()
        assert store.load_batch(0) == [pack(t) for group in (1, 0) for t in sent[group]]
        assert store.load_one(1, 3) == pack(sent[1][3])
        assert store.load_one(1, SIZE) is None
    assert sum(map(is_cut, stored(tmp_path))) == 2 * (SIZE - 1)
    assert sum(map(len, stored(tmp_path))) < 0.35 * sum(len(pack(t)) for t in arriving)
    with StoreReader(tmp_path / "trajectories.sqlite") as reader:
        assert reader.load_groups([0]) == [pack(t) for t in sent[0]]


@pytest.mark.parametrize("most_bytes", [1, 6_000, 10_000, 10**9])
def test_every_part_of_a_batch_can_be_put_together_by_itself(tmp_path: Path, most_bytes: int) -> None:
    sent = [t for group in (0, 1) for t in group_of(group, 4)]
    arriving = sent[::-1]
    with opened(tmp_path, create=True) as store:
        for group in (0, 1):
            admit(store, group)
        store.add_trajectories(arriving)
        store.form_batch(step=0, groups=[0, 1], formed_at=1.0)
        got: list[bytes] = []
        while len(got) < len(sent):
            part = store.load_part(0, after=len(got), most_bytes=most_bytes)
            assert part is not None
            whole = join_all(part[1], most_bytes=10**9)
            assert len(whole) == 1 or sum(map(len, whole)) <= most_bytes
            got += map(bytes, whole)
    assert got == [pack(t) for t in sent]


def test_a_tree_of_rollouts_comes_back_whole(tmp_path: Path) -> None:
    """Each goes on where the one before stopped or from the middle of it, and they are read one by one."""
    random = Random(3)
    made = [trajectory(5, 0, [random.randrange(9) for _ in range(100)], [1] * 50)]
    for sample in range(1, 7):
        parent = made[random.randrange(len(made))].tokens.tolist()
        made.append(trajectory(5, sample, parent[: random.randint(100, len(parent))], [sample] * 50))
    with opened(tmp_path, create=True) as store:
        admit(store, 5)
        for t in made:
            store.add_trajectories([t])
        assert store.load_groups([5]) == [pack(t) for t in made]
        assert [store.load_one(5, t.sample) for t in made] == [pack(t) for t in made]
        store.commit()
    tokens = sum(len(t.tokens) for t in made)
    assert sum(map(len, stored(tmp_path))) < 8 * tokens - 4 * 6 * 100


def test_what_is_rolled_back_is_referred_to_by_nobody(tmp_path: Path) -> None:
    """The process dies before it commits: what the next one stores stands by itself."""
    first, second, third = group_of(0, 3)
    store = opened(tmp_path, create=True)
    admit(store, 0)
    store.commit()
    store.add_trajectories([first])
    assert store.counts()["trajectories"] == 1
    store._connection.execute("ROLLBACK")
    store.add_trajectories([second, third])
    store.commit()
    store.close()
    assert [is_cut(payload) for payload in stored(tmp_path)] == [False, True]
    with opened(tmp_path, create=False) as again:
        assert again.load_groups([0]) == [pack(second), pack(third)]


def test_a_damaged_sample_leaves_the_others_readable(tmp_path: Path) -> None:
    sent = [*group_of(0, 3), *group_of(1, 3)]
    with opened(tmp_path, create=True) as store:
        admit(store, 0)
        admit(store, 1)
        store.add_trajectories(sent)
        store.commit()
        store._connection.execute("UPDATE payloads SET payload = x'00' WHERE id = 1")
        found = store.load_groups([0, 1])
        assert found[3:] == [pack(t) for t in sent[3:]]
        for blob in found[:3]:
            with pytest.raises(WireError):
                unpack(blob)
        store.add_trajectories(group_of(0, 4)[3:])
        assert store.load_one(0, 3) == pack(group_of(0, 4)[3]), "nothing is cut by what is damaged"


def test_a_store_of_an_older_version_is_gone_on_with(tmp_path: Path) -> None:
    before, after = group_of(0, 3), group_of(1, 3)
    with opened(tmp_path, create=True) as store:
        admit(store, 0)
        store.add_trajectories(before[:1])
        store.commit()
        for number, t in enumerate(before[1:], 2):  # as 0.4.0 stored them
            store.add_trajectories([t])
            assert store.counts()["trajectories"] == number
            store._connection.execute("UPDATE payloads SET payload = ? WHERE id = ?", (pack(t), number))
        store._connection.execute("COMMIT")
        store._connection.execute("PRAGMA user_version = 2")
    with StoreReader(tmp_path / "trajectories.sqlite") as reader:
        assert reader.load_groups([0]) == [pack(t) for t in before]
    with opened(tmp_path, create=False) as store:
        admit(store, 1)
        store.add_trajectories(after)
        assert store.load_groups([0, 1]) == [pack(t) for t in (*before, *after)]
        assert store._all("PRAGMA user_version")[0][0] == 3, "an older program does not misread what is cut"
