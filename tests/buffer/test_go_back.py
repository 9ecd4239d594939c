"""A run that goes back: what the given-up versions have sampled is refused and asked again, and nothing else changes,
whatever dies before and after."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer import policies, trajectory
from support_world import ON_ITS_OWN, Invariants, audit_store, deaths, make_world, play
from support_world_store import RealStore

from async_rl.buffer.staleness import Policy
from async_rl.buffer.store import Store
from async_rl.instruments.world.world import World
from async_rl.wire import messages as msg

STEPS = 8

REASON = "rollback: begun under weights that were given up"


@dataclass(eq=False)
class WorldThatGoesBack(World):
    """The weights of one version are given up before they are published."""

    back_at: int = -1
    """set before the run is played"""
    gone: bool = False

    def share_weights(self, version: int) -> None:
        if version != self.back_at or self.gone:
            super().share_weights(version)
            return
        self.gone = True
        assert isinstance(self.watch, GoingBack)
        self.watch.forget_ahead(version)
        self.saved = [(version, 0, tuple(self.watch.batched))]
        self.fall(None)

    def reopened(self) -> None:
        if self.gone:
            assert isinstance(self.watch, GoingBack)
            before = self.refused_rows()
            self.store.give_up(version=self.back_at, reason=REASON)
            new = self.refused_rows() - before
            assert not new or not before, "it is done once"
            self.watch.refused |= dict.fromkeys(new, REASON)
            self.watch.oldest = self.back_at

    def refused_rows(self) -> set[int]:
        return {row.group for row in self.store.groups() if row.refused_because == REASON}


@dataclass(eq=False, kw_only=True)
class GoingBack(Invariants):
    oldest: int = 0
    """version: what older ones have sampled was given up"""

    def forget_ahead(self, version: int) -> None:
        """The batches formed for steps from here on."""
        for step in [step for step in self.formed if step >= version]:
            del self.formed[step]
            self.answered.pop(step, None)

    def trained(self, step: int, batch: msg.Batch) -> None:
        super().trained(step, batch)
        if self.oldest:
            assert step >= self.oldest
            versions = [t.version_min for t in batch.trajectories]
            assert min((v for v in versions if v >= 0), default=self.oldest) >= self.oldest


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    policy=policies(),
    generators=st.integers(1, 3),
    spread=st.sampled_from([1.0, 30.0]),
    drop=st.booleans(),
    died=st.integers(0, 3),
    back_at=st.integers(1, STEPS - 1),
    seed=st.integers(0, 2**32),
)
def test_after_going_back_nothing_of_the_given_up_versions_is_trained_and_nothing_is_lost(
    policy: Policy, generators: int, spread: float, drop: bool, died: int, back_at: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        world = make_world(
            policy,
            kind=WorldThatGoesBack,
            watch=GoingBack(policy=policy),
            seed=seed,
            steps=STEPS,
            generators=generators,
            **ON_ITS_OWN,
            store=RealStore(Path(folder) / "trajectories.sqlite"),
            save_every=2,
            drop_zero_signal=drop,
            failure=0.05,
            spread=spread,
            faults=(*deaths("kill buffer", died, seed), *deaths("kill generator", 8, seed + 1)),
        )
        assert isinstance(world, WorldThatGoesBack)
        world.back_at = back_at
        play(world)
        assert world.gone
        audit_store(world)


def test_batches_formed_ahead_are_given_up_once_and_later_ones_stay(tmp_path: Path) -> None:
    with Store(tmp_path / "trajectories.sqlite", durability="process", create=True) as store:
        for group in range(6):
            store.add_group(
                group=group, problem=group, split="eval" if group == 5 else "train", admitted_version=0,
                admitted_at=0.0, generator="g", position=-1 if group == 5 else group,
            )  # fmt: skip
            store.add_trajectories([trajectory(group, 0, 0)])
        for step in range(3):
            store.form_batch(step=step, groups=[step], formed_at=1.0)
        store.refuse_group(4, "zero_signal")
        store.give_up(version=1, reason=REASON)
        assert store.next_numbers() == (1, 6)
        fates = {row.group: (row.step, row.refused_because) for row in store.groups()}
        given_up = dict.fromkeys((1, 2, 3), (None, REASON))
        assert fates == {0: (0, None), **given_up, 4: (None, "zero_signal"), 5: (None, None)}
        assert store.dropped_last() == [(1, 0, "rollback"), (2, 0, "rollback"), (3, 0, "rollback")]
        store.add_group(
            group=6, problem=1, split="train", admitted_version=1, admitted_at=2.0, generator="g", position=1, attempt=1
        )
        store.form_batch(step=1, groups=[6], formed_at=3.0)
        store.give_up(version=1, reason=REASON)
        assert [batch.groups for batch in store.batches()] == [(0,), (6,)]
        assert store.dropped_last() == [(2, 0, "rollback"), (3, 0, "rollback")]
