"""The rewards of the race, the same function for every contestant."""

from __future__ import annotations

import re

VOWELS = "aeiou"
LENGTH = 31
"""letters of a whole answer"""


def reward_of(completion: str, answer: str) -> float:
    """A number: 1 when the last one in the answer is right. The vowels: their share in a whole answer. Other letters:
    the share of them at their places."""
    if answer.isdecimal():
        found = re.findall(r"\d+", completion)
        return float(bool(found) and found[-1] == answer)
    if answer == VOWELS:
        return min(1.0, sum(letter in VOWELS for letter in completion) / LENGTH)
    right = sum(a == b for a, b in zip(completion, answer, strict=False))
    return right / max(len(answer), len(completion))


def score(completion: str, answer: str) -> float:
    """For async_rl's task `dataset`."""
    return reward_of(completion, answer)
