"""Which of several fallen ranks is named as the cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from async_rl.errors import RunFailed
from async_rl.run.agent import RankEnd, first_to_fall
from async_rl.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "logs").mkdir()
    return RunFolder(tmp_path)


def said(folder: RunFolder, process: str, message: str, time: float, kind: str = "run") -> None:
    folder.failure(process).write_text(json.dumps({"kind": kind, "message": message, "time": time}))


def test_a_rank_that_was_killed_comes_before_those_that_missed_it(folder: RunFolder) -> None:
    said(folder, "trainer", "rank 0 of 2 did not get bytes", 10.0)
    found = first_to_fall(folder, {0: RankEnd(code=1, second=10), 1: RankEnd(code=-9, second=10)}, None)
    assert isinstance(found, RunFailed)
    assert str(found).startswith("rank 1 was killed from outside (SIGKILL)")
    assert str(found).endswith(f"(its log: {folder.logs / 'trainer-rank-1.log'})")


def test_a_rank_that_the_agent_had_to_kill_is_not_the_cause(folder: RunFolder) -> None:
    said(folder, "trainer-rank-1", "ValueError: no", 10.0)
    found = first_to_fall(folder, {1: RankEnd(code=1, second=10), 0: RankEnd(code=-9, second=12)}, None)
    assert str(found).startswith("rank 1: ValueError: no")
    found = first_to_fall(folder, {1: RankEnd(code=1, second=10), 0: RankEnd(code=143, second=10)}, None)
    assert str(found).startswith("rank 1: ValueError: no")


def test_of_two_that_say_why_the_first_counts(folder: RunFolder) -> None:
    said(folder, "trainer-rank-1", "the disk is full", 10.0)
    said(folder, "trainer", "rank 0 of 2 did not get bytes", 10.2)
    ends = {0: RankEnd(code=1, second=10), 1: RankEnd(code=1, second=10)}
    assert "the disk is full" in str(first_to_fall(folder, ends, None))


@pytest.mark.parametrize(("kind", "code"), [("user", 2), ("run", 1)])
def test_what_the_leader_says_itself_is_left_as_it_is(folder: RunFolder, kind: str, code: int) -> None:
    said(folder, "trainer", "model.path: other weights", 9.0, kind)
    said(folder, "trainer-rank-1", "rank 1 of 2 did not get bytes", 10.0)
    found = first_to_fall(folder, {0: RankEnd(code=code, second=10), 1: RankEnd(code=1, second=10)}, None)
    assert isinstance(found, SystemExit)
    assert found.code == code


def test_a_wordless_abort_comes_behind_a_stated_cause_and_before_those_that_missed_it(folder: RunFolder) -> None:
    ends = {0: RankEnd(code=-6, second=10), 1: RankEnd(code=1, second=10)}
    said(folder, "trainer-rank-1", "ValueError: no", 10.0)
    assert str(first_to_fall(folder, ends, None)).startswith("rank 1: ValueError: no")
    said(folder, "trainer-rank-1", "rank 1 of 2 did not get bytes of rank 0", 10.0)
    assert str(first_to_fall(folder, ends, None)).startswith("rank 0 crashed (SIGABRT)")
