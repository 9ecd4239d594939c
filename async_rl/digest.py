"""Whether two hosts work on the same problems: one line of text that both make from what they have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from async_rl.model.tokenizer import prompt_text
from async_rl.trajectory import Split

if TYPE_CHECKING:
    from async_rl.model.tokenizer import Tokenizer
    from async_rl.task import Problem, Task

LOOKED_AT = 256
"""problems of each split, spread over it; small splits are looked at whole"""
SPLITS: tuple[Split, ...] = ("train", "eval")
PLACE = "where"
"""in a problem's data: the file and line it came from, which may differ"""


def task_digest(task: Task, tokenizer: Tokenizer) -> str:
    """Of the task's name, the number of its problems, and of some of them: the tokens of the prompt and what
    the reward is told. So it differs where the data, the settings that make problems or the tokenizer differ."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{task.name} {tokenizer.vocab_size} {tokenizer.eos_id}".encode())
    for split in SPLITS:
        problems = task.problems(split)
        digest.update(f" {split} {len(problems)}".encode())
        for index in spread(len(problems)):
            digest.update(_described(problems[index], tokenizer))
    return digest.hexdigest()


def spread(count: int) -> Sequence[int]:
    """At most LOOKED_AT indices below `count`, the first and the last among them."""
    if count <= LOOKED_AT:
        return range(count)
    return [i * (count - 1) // (LOOKED_AT - 1) for i in range(LOOKED_AT)]


def _described(problem: Problem, tokenizer: Tokenizer) -> bytes:
    tokens = tokenizer.encode(prompt_text(problem.prompt, tokenizer))
    data = {name: value for name, value in problem.data.items() if name != PLACE}
    return json.dumps([problem.index, tokens, data], sort_keys=True, default=_kind).encode()


def _kind(value: Any) -> str:
    """What JSON has no word for counts by its type: its text may hold an address."""
    return type(value).__name__
