"""The same file is split as version 0.1.0 split it: runs of that version are resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from async_rl.task import make_task

WEATHER = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
LETTERS = 'ab "\\é日\n\t\u2028\x7f<|im_end|>'


def rows() -> list[dict[str, Any]]:
    """Rows of every form that 0.1.0 read."""
    random = Random(7)

    def text() -> str:
        return "".join(random.choices(LETTERS, k=random.randrange(1, 12))) + str(random.randrange(10**6))

    found = []
    for number in range(600):
        prompt: Any
        match number % 6:
            case 0 | 1:
                prompt = text()
            case 2:
                prompt = [{"role": "user", "content": text()}]
            case 3:
                prompt = [{"content": text(), "role": "user"}]
            case 4:
                prompt = [
                    {"role": "system", "content": text()},
                    {"role": "user", "content": text(), "name": "x", "gone": None},
                ]
            case _:
                call = {"id": "1", "function": {"name": "w", "arguments": {"a": 1.5}}}
                prompt = [
                    {"role": "user", "content": [{"type": "text", "text": text()}]},
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "content": text()},
                ]
        row = {"prompt": prompt, "answer": number}
        if number % 6 in (1, 5):
            row["tools"] = [WEATHER]
        if number % 6 == 3:
            row["chat_template_kwargs"] = {"mood": text()}
        found.append(row)
    return found


@pytest.mark.parametrize(
    ("args", "train", "digest"),
    [
        ({}, 544, "79e79aed9699d9bc22ad9fb4841d4d84"),
        ({"system": "Be brief."}, 534, "1f3a17b62e6b6a31eb6e433bee4c8c6d"),
        (
            {"as_chat": False, "tools_field": "", "template_args_field": ""},
            538,
            "992085b063420061d397820b1e31deda",
        ),
        ({"eval_share": 0.35}, 383, "3fa243c16c6cb0f2e30596ff190eabd8"),
    ],
)
def test_problems_and_splits_are_those_of_0_1_0(tmp_path: Path, args: dict[str, Any], train: int, digest: str) -> None:
    """The digests were made with commit fc088c6, whose reader of JSON lines was that of 0.1.0."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()), encoding="utf-8")
    task = make_task("dataset", {"path": str(path), **args})
    found = [
        [p.data["answer"], p.prompt, list(p.tools), dict(p.template_args)]
        for split in ("train", "eval")
        for p in task.problems(split)
    ]
    assert len(task.problems("train")) == train
    assert hashlib.blake2b(json.dumps(found).encode(), digest_size=16).hexdigest() == digest
