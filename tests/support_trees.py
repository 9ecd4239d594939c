"""Groups of answers that fork from one another, for tests that credit them by brute force."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from support_methods import batch, of_answer, of_group

from async_rl.objective import Columns


def forked(seed: int) -> Columns:
    """Groups in which later answers go on from earlier ones, some of them from forks."""
    columns = batch(seed, groups=3, size=6)
    rng = np.random.default_rng(seed)
    forks = []
    for members in of_group(columns):
        for position in range(len(members)):
            if position < 2:
                forks.append((-1, 0))
                continue
            parent = members[int(rng.integers(position))]
            length = len(of_answer(columns)[parent])  # a fork leaves something of its parent on both sides
            forks.append((parent, int(rng.integers(1, length))) if length > 1 else (-1, 0))
    return replace(columns, forks=torch.tensor(forks), log_behaviour=columns.log_prob)


def path(columns: Columns, answer: int) -> Iterator[tuple[int, int]]:
    """(answer that sampled it, which of its tokens) of every token from the prompt to the end of an answer."""
    assert columns.forks is not None
    parent, shared = columns.forks[answer].tolist()
    if parent >= 0:
        for owner, place in path(columns, parent):
            if owner != parent or place < shared:
                yield owner, place
    for place in range(len(of_answer(columns)[answer])):
        yield answer, place


def advantages(columns: Columns) -> list[float]:
    found = [0.0] * len(columns.reward)
    for members in of_group(columns):
        rewards = columns.reward[members]
        for i in members:
            if float(rewards.max()) > float(rewards.min()):
                found[i] = float((columns.reward[i] - rewards.mean()) / (rewards.std() + 1e-6))
    return found
