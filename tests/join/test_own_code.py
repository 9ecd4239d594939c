"""A generator that joins works with the run's own code: it is refused where a file is missing or differs."""

from dataclasses import asdict
from pathlib import Path

import pytest
from support_run import quick_settings

from async_rl.config import Settings
from async_rl.config.schema import structured
from async_rl.config.sources import sources_of
from async_rl.errors import UserError
from async_rl.run.join import check_sources, local_settings
from async_rl.wire import messages as msg

TASK = "from async_rl import Task\nclass Mine(Task): pass\n"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a run whose task lies in its working directory."""
    monkeypatch.chdir(tmp_path)
    Path("joined_task.py").write_text(TASK)
    base = asdict(quick_settings(tmp_path))
    return structured(Settings, {**base, "task": {"name": "joined_task.py:Mine", "args": {}}}, where="")


def welcome(settings: Settings) -> msg.Welcome:
    place = {"run": "r", "task_digest": "d", "host": "trainer-host", "folder": "f", "segment": "s", "weights": ""}
    sources = tuple(asdict(source) for source in sources_of(settings))
    return msg.Welcome(settings=asdict(settings), sources=sources, **place)


def test_the_same_file_is_let_in(settings: Settings) -> None:
    check_sources(settings, welcome(settings))


def test_a_file_that_differs_is_refused(settings: Settings) -> None:
    told = welcome(settings)
    Path("joined_task.py").write_text(TASK + "# another version\n")
    with pytest.raises(UserError, match=r"task.name 'joined_task.py:Mine' differs from the run's: .* on trainer-host"):
        check_sources(settings, told)


def test_a_file_that_is_missing_is_refused_and_may_lie_elsewhere(settings: Settings, tmp_path: Path) -> None:
    told = welcome(settings)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path("joined_task.py").rename(elsewhere / "joined_task.py")
    with pytest.raises(
        UserError, match=r"there is no file joined_task.py .*; the run uses it: copy it from trainer-ho"
    ):
        check_sources(settings, told)
    word = "task.name=elsewhere/joined_task.py:Mine"
    here = local_settings(told.settings, [word], "", tmp_path)
    assert here.task.name == f"{elsewhere}/joined_task.py:Mine"
    check_sources(here, told)
    for wrong, message in (
        ("task.name=elsewhere/joined_task.py:Other", "only the file in which it lies may differ"),
        ("task.name=gone/joined_task.py:Mine", "there is no file"),
        ("task.name=guess", "task.name is the run's"),
    ):
        with pytest.raises(UserError, match=message):
            local_settings(told.settings, [wrong], "", tmp_path)
