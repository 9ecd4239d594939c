"""A run that goes back: what the given-up versions have sampled is refused and asked again, and nothing else changes,
whatever dies before and after."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer_world import make_core, policies, trajectory
from support_mortal_world import STEPS, MortalWorld, audit

from async_rl.buffer.staleness import Policy
from async_rl.buffer.store import Store

REASON = "rollback: begun under weights that were given up"


@dataclass
class WorldThatGoesBack(MortalWorld):
    """The weights of one version are given up before they are published."""

    back_at: int = 1
    gone: bool = False

    def publish(self, version: int) -> None:
        if version != self.back_at or self.gone:
            super().publish(version)
            return
        self.gone = True
        self.saved = [version]
        ahead = {group for batch in self.store.batches() if batch.step >= version for group in batch.groups}
        self.trained = [group for group in self.trained if group not in ahead]
        self.sent = {step: blobs for step, blobs in self.sent.items() if step < version}
        self.die(None)

    def opened(self) -> None:
        if self.gone:
            before = self.refused_rows()
            self.store.give_up(version=self.back_at, reason=REASON)
            new = self.refused_rows() - before
            assert not new or not before, "it is done once"
            self.refused |= dict.fromkeys(new, REASON)

    def refused_rows(self) -> set[int]:
        return {row.group for row in self.store.groups() if row.refused_because == REASON}

    def check_batch(self, step: int, groups: tuple[int, ...]) -> None:
        super().check_batch(step, groups)
        if self.gone:
            assert step >= self.back_at
            size = range(self.core.rules.group_size)
            versions = [self.stored[group, sample].version_min for group in groups for sample in size]
            assert min((v for v in versions if v >= 0), default=self.back_at) >= self.back_at


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    policy=policies(),
    generators=st.integers(1, 3),
    spread=st.sampled_from([1.0, 30.0]),
    drop=st.booleans(),
    deaths=st.integers(0, 3),
    back_at=st.integers(1, STEPS - 1),
    seed=st.integers(0, 2**32),
)
def test_after_going_back_nothing_of_the_given_up_versions_is_trained_and_nothing_is_lost(
    policy: Policy, generators: int, spread: float, drop: bool, deaths: int, back_at: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        world = WorldThatGoesBack(
            core=make_core(policy, drop_zero_signal=drop),
            random=Random(seed),
            steps=STEPS,
            generators=generators,
            loss=0.05,
            failure=0.05,
            spread=spread,
            path=Path(folder) / "trajectories.sqlite",
            deaths=deaths,
            back_at=back_at,
        )
        world.run()
        assert world.gone
        audit(world)


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
