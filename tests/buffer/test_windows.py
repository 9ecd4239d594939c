"""Episodes that are trained in pieces: each goes on once, each token is trained once, each piece has its own bound."""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer import answer, make_core
from support_windows import WindowInvariants, window_world
from support_world import play
from support_world_store import RealStore, TwinStore

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.staleness import PacePolicy
from async_rl.buffer.store import StoreReader
from async_rl.config.rollout import RolloutSettings
from async_rl.observe.audit_windows import Pieces, audit_pieces
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.given import GIVEN, OPEN
from async_rl.wire import messages as msg

POLICY = PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=1, window=1)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_each_token_is_trained_once_within_its_own_bound_whatever_dies(seed: int) -> None:
    play(window_world(seed))


@pytest.mark.nightly
@settings(max_examples=5000, derandomize=False, deadline=None)
@given(seed=st.integers(0, 1_000_000_000))
def test_the_same_for_very_many_schedules(seed: int) -> None:
    play(window_world(seed))


def test_the_schedules_cut_and_continue_and_the_real_store_does_the_same(tmp_path: Path) -> None:
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    seen: Counter[str] = Counter()
    compared = 0
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        for seed in range(12):
            store = TwinStore(Path(folder) / f"{seed}.sqlite")
            watch = play(window_world(seed, store=store))
            store.real.close()
            assert isinstance(watch, WindowInvariants)
            seen, compared = seen + watch.seen, compared + store.compared
    assert compared > 100
    assert min(seen[what] for what in ("cut", "over", "went on", "continued")) > 20, seen


# ---------------------------------------------------------------- what is taken, and what goes on


def begun(window: int = 3) -> tuple[Core, list[msg.Permit]]:
    core = make_core(POLICY, group_size=1, rollout=RolloutSettings(window=window))
    core.handle(b"a", msg.Hello(role="generator", name="a", pid=1, session=1), 0.0)
    out = core.handle(b"a", msg.Want(limit=2, version=0, session=1), 0.0)
    return core, permits_in(out)


def permits_in(effects: list[do.Effect]) -> list[msg.Permit]:
    return [
        p for e in effects if isinstance(e, do.Send) and isinstance(e.message, msg.Permits) for p in e.message.permits
    ]


def piece(permit: msg.Permit, length: int = 3, **changes: object) -> Trajectory:
    made = answer(permit, 0, 0)
    return Trajectory(
        **{
            **{name: getattr(made, name) for name in ("group", "sample", "problem", "split", "seed", "temperature")},
            "tokens": made.tokens[:1].repeat(1 + length),
            "log_behaviour": made.log_behaviour[:1].repeat(1 + length) * 0,
            "turns": (Turn(start=1, length=length),),
            "versions": (VersionSpan(version=0, start=1, end=1 + length),),
            "reward": 0.0,
            "ended": "window",
            "info": {OPEN: "turn"},
            **changes,
        }  # type: ignore[arg-type]
    )


def test_what_goes_on_is_stored_behind_its_group_and_before_its_permit() -> None:
    core, (first, second) = begun()
    core.handle(b"a", msg.Finished(trajectories=(piece(first), answer(second, 0, 0))), 1.0)
    core.handle(b"trainer", msg.NextBatch(step=0), 1.0)
    core.handle(b"trainer", msg.Published(version=1), 2.0)
    out = core.handle(b"a", msg.Want(limit=4, version=1, session=1), 3.0)
    kinds = [type(e) for e in out]
    third, fourth = permits_in(out)
    # the episode first, then the next problem; both of the new version, each with a slot of its own
    assert (third.problem, third.seed, third.samples) == (first.problem, first.seed, (0,))
    assert third.start is not None
    assert (third.start.source, third.start.group) == ("window", first.group)
    assert (fourth.problem, fourth.start) == (2, None)
    assert kinds.index(do.AddGroup) < kinds.index(do.AddDecision) < kinds.index(do.Send)
    assert [g.admitted_version for g in core.groups.values()] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 2}, "cut behind 2 tokens instead of 3"),
        ({"reward": 1.0}, "with a reward"),
        ({"info": {}}, "without saying where"),
        ({"info": {OPEN: "turn", GIVEN: "1+1"}}, "without a start"),
    ],
)
def test_what_is_no_piece_is_refused(changes: dict[str, object], said: str) -> None:
    core, (first, _) = begun()
    out = core.handle(b"a", msg.Finished(trajectories=(piece(first, **changes),)), 1.0)  # type: ignore[arg-type]
    (refused,) = [e.message for e in out if isinstance(e, do.Send) and isinstance(e.message, msg.Refused)]
    assert said in refused.reason
    assert not core.admission.windows.waiting


def test_nothing_is_cut_where_episodes_are_whole() -> None:
    core, (first, _) = begun(window=0)
    out = core.handle(b"a", msg.Finished(trajectories=(piece(first),)), 1.0)
    (refused,) = [e.message for e in out if isinstance(e, do.Send) and isinstance(e.message, msg.Refused)]
    assert "cut, where episodes are whole" in refused.reason


def test_an_episode_goes_on_where_its_cache_is() -> None:
    core, (first, second) = begun()
    core.handle(b"b", msg.Hello(role="generator", name="b", pid=2, session=1), 0.0)
    core.handle(b"a", msg.Finished(trajectories=(piece(first), piece(second))), 1.0)
    for waiting, sender in zip(core.admission.windows.waiting, ("b", "a"), strict=True):
        object.__setattr__(waiting, "generator", sender)
    taken = core.admission.windows.take("a")
    assert taken is not None
    assert taken.group == second.group
    rest = core.admission.windows.take("c")
    assert rest is not None
    assert rest.group == first.group, "nobody else has anything for it: the oldest"


def test_payloads_of_what_waits_to_go_on_are_kept() -> None:
    core, (first, second) = begun()
    core.handle(b"a", msg.Finished(trajectories=(piece(first), answer(second, 0, 0))), 1.0)
    core.handle(b"trainer", msg.NextBatch(step=0), 1.0)
    assert core.oldest_live() == first.group


# ---------------------------------------------------------------- the audit


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run in which generators and the buffer died."""
    path = tmp_path_factory.mktemp("audit") / "trajectories.sqlite"
    store = RealStore(path)
    play(window_world(29, store=store))
    store.close()
    return path


def wrong_in(path: Path, statement: str = "", window: int = 0) -> tuple[Pieces, int]:
    """What the audit finds in a copy of the store after a statement; the window of the run."""
    reader = StoreReader(path)
    longest = max(row.policy_length for row in reader.trajectories(split="train") if row.ended == "window")
    if statement:
        copy = path.with_name("copy.sqlite")
        copy.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
            target.execute(statement)
            target.commit()
        reader = StoreReader(copy)
    groups = {row.group: row for row in reader.groups() if row.split == "train"}
    return audit_pieces(reader, groups, list(reader.decisions()), window or longest), longest


def test_a_sound_record_has_every_piece_once(audited: Path) -> None:
    found, window = wrong_in(audited)
    assert not found.wrong
    assert len(found.before) > 3
    assert "pieces at most" in found.describe()
    assert wrong_in(audited, window=window + 1)[0].wrong


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE decisions SET of_group = (SELECT min(of_group) FROM decisions)", "and in group"),
        ("UPDATE trajectories SET ended = 'finished' WHERE ended = 'window'", "which was not cut"),
        (
            "UPDATE groups SET problem = 99 WHERE group_id IN (SELECT group_id FROM decisions)",
            "something else",
        ),
        ("UPDATE decisions SET start = NULL", "other turns than its permit said"),
        ("UPDATE decisions SET source = 'success'", "chosen by a sampler"),
    ],
)
def test_a_defect_is_found(audited: Path, statement: str, said: str) -> None:
    found, _ = wrong_in(audited, statement)
    assert any(said in what for what in found.wrong), found.wrong
