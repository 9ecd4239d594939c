"""A run of very many steps is looked at as fast as a short one, from rows that are evenly spread over it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from async_rl.observe import record as record_module
from async_rl.observe import top as top_module
from async_rl.observe.long_files import read_spread, row_of
from async_rl.observe.record import read_run
from async_rl.observe.report import _numbers, report_data
from async_rl.observe.top import RunPoller
from async_rl.run_folder import RunFolder

STEPS, LIMIT = 10_000, 1_000_000
SECONDS = 0.5


def rows(first: int, last: int) -> Iterator[dict[str, Any]]:
    for step in range(first, last):
        yield {
            "step": step,
            "time": 1e9 + SECONDS * step,
            "reward/mean": step / STEPS,
            "time/step": 0.3,
            "time/wait_for_batch": 0.2,
            "tokens/trained": 1000.0,
            "tokens/generated": 1000.0 * step,
            "reject/stale/tokens": 2.0,
            "padding": "x" * (step % 7),
        }


def write(path: Path, first: int, last: int) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(first, last))


@pytest.fixture
def long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    folder = RunFolder(tmp_path)
    write(folder.metrics, 0, STEPS)
    assert folder.metrics.stat().st_size > 2 * LIMIT
    for module in (record_module, top_module):
        monkeypatch.setattr(module, "MOST_BYTES", LIMIT)
    return folder


def test_rows_of_a_long_file_are_whole_evenly_spread_and_the_newest_are_there(long_run: RunFolder) -> None:
    found = read_spread(long_run.metrics, LIMIT)
    steps = [row["step"] for row in found.rows]
    assert found.broken == 0
    assert not found.torn
    read = set(steps)
    assert found.rows == [row for row in rows(0, STEPS) if row["step"] in read], "each once, in order, unbroken"
    assert 0.9 * LIMIT < found.share * long_run.metrics.stat().st_size <= LIMIT
    assert steps[-100:] == list(range(STEPS - 100, STEPS))
    assert max(np.diff([-1, *steps])) < 2 * STEPS * 8192 / LIMIT
    assert found.end == long_run.metrics.stat().st_size


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    whole = '{"step": 1}\n'
    path.write_text(whole + '{"step": 2')
    found = read_spread(path)
    assert (found.rows, found.torn, found.end) == ([{"step": 1}], True, len(whole))
    assert read_spread(tmp_path / "none").rows == []


@pytest.mark.parametrize(
    "line", [b'{"a": NaN, "b": Infinity}', b'{"a": 123456789012345678901234567890}', b'{"a": "\\ud800"}']
)
def test_a_row_that_only_json_can_read_is_read(line: bytes) -> None:
    assert repr(row_of(line)) == repr(json.loads(line))


def test_the_report_of_a_long_run_shows_what_that_of_all_rows_shows(
    long_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (some,) = report_data([read_run(long_run.path)], with_ratios=False)["runs"]
    monkeypatch.setattr(record_module, "MOST_BYTES", 1 << 40)
    (every,) = report_data([read_run(long_run.path)], with_ratios=False)["runs"]
    assert some["notes"][0].startswith("metrics.jsonl is long: of about ")
    assert not any("is long" in note for note in every["notes"])
    assert (some["start"], some["end"], some["state_words"]) == (every["start"], every["end"], every["state_words"])
    ends = [(run["curves"]["reward/mean"]["y"][0], run["curves"]["reward/mean"]["y"][-1]) for run in (some, every)]
    assert ends[0] == pytest.approx(ends[1], abs=0.01)
    for rate in ("tokens_per_s/trained", "tokens_per_s/generated"):
        values = np.array([v for v in some["curves"][rate]["y"] if v is not None], np.float64)
        assert values == pytest.approx(1000 / SECONDS), "no rate is taken across what was left out"
    (one,) = some["rejects"]
    assert one["tokens"] == pytest.approx(2.0 * STEPS, rel=0.02)
    for doing, share in (("training", 0.6), ("waiting", 0.4)):
        found = some["timeline"]["lanes"][0]["shares"][doing]
        assert np.median(found) == pytest.approx(share, abs=0.02)


def test_top_follows_a_long_run_in_bounded_memory(long_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_module, "MOST_ROWS", 1000)
    poller = RunPoller(long_run.path)
    assert poller.poll().record.rows[-1]["step"] == STEPS - 1
    for more in range(STEPS, STEPS + 3000, 100):
        write(long_run.metrics, more, more + 100)
        seen = poller.poll().record.rows
        assert [row["step"] for row in seen[-100:]] == list(range(more, more + 100))
        assert len(seen) <= 1000
        assert seen[0]["step"] == 0
    shorter = long_run.path / "shorter"
    write(shorter, 0, STEPS - 50)
    shorter.replace(long_run.metrics)
    assert poller.poll().record.rows[-1]["step"] == STEPS - 51, "as a resumed launch replaces it"


def test_numbers_are_rounded_as_they_are_written() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(5000) * 10.0 ** random.integers(-25, 25, 5000)
    values = np.append(values, [0.0, 1e15, 123456.7, 99999.5, 9.999995, 1e-300, -2.0])
    assert _numbers(values) == [float(f"{v:.5g}") for v in values.tolist()]
