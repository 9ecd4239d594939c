"""Two hosts with the same problems make the same digest; with others, another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from async_rl.model.tokenizer import Tokenizer
from async_rl.run.preflight import LOOKED_AT, spread, task_digest
from async_rl.task import make_task


@pytest.fixture
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def rows(path: Path, *, answer: str = "1") -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{i}<", "answer": answer}) + "\n" for i in range(40)))
    return path


def dataset(path: Path) -> dict[str, object]:
    return {"path": str(path), "as_chat": False, "max_tokens": 3}


def test_the_same_problems_at_another_place_are_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one, two = (make_task("dataset", dataset(rows(tmp_path / name))) for name in ("one.jsonl", "two.jsonl"))
    assert task_digest(one, tokenizer) == task_digest(two, tokenizer)


def test_other_answers_settings_or_tasks_are_others(tmp_path: Path, tokenizer: Tokenizer) -> None:
    digests = [
        task_digest(make_task(name, args), tokenizer)
        for name, args in (
            ("dataset", dataset(rows(tmp_path / "one.jsonl"))),
            ("dataset", dataset(rows(tmp_path / "two.jsonl", answer="2"))),
            ("guess", {}),
            ("guess", {"num_secrets": 8}),
        )
    ]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("count", [0, 1, LOOKED_AT, LOOKED_AT + 1, 10**6])
def test_what_is_looked_at_is_spread_over_the_split(count: int) -> None:
    indices = list(spread(count))
    assert len(set(indices)) == len(indices) == min(count, LOOKED_AT)
    assert not indices or (indices[0], indices[-1]) == (0, count - 1)
