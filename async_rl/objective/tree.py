"""Credit in groups whose answers fork from one another: a token that several answers go through is trained once, in the
answer that sampled it, with what all of them say about it.

Formulas: docs/algorithms.md#forks. Shapes: T policy tokens, I trajectories, G groups; float64. `Columns.forks` names
for each trajectory the one it goes on from, and how many of that one's policy tokens come before the fork. An answer
forks from an earlier one of its group, so going backwards every answer is met before the one it came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from async_rl.objective.tokens import Tokens


def path_mean(tokens: Tokens, advantage: Tensor) -> Tensor:
    """ARPO: each token's mean of the advantages [I] of the answers that go through it. [T]"""
    forks = _forks_of(tokens)
    if forks is None:
        return advantage[tokens.trajectory]
    counted = tokens.finite.tolist()
    total = [value if ok else 0.0 for value, ok in zip(advantage.tolist(), counted, strict=True)]
    number = [float(ok) for ok in counted]
    first = (tokens.length.cumsum(0) - tokens.length).long().tolist()
    places: list[int] = []
    sums: list[float] = []
    counts: list[float] = []
    for child in range(len(forks) - 1, -1, -1):
        parent, shared = forks[child]
        if parent < 0:
            continue
        # its own and its forks' advantages hold for the parent's tokens before the fork
        places += [first[parent], first[parent] + shared]
        sums += [total[child], -total[child]]
        counts += [number[child], -number[child]]
        total[parent] += total[child]
        number[parent] += number[child]
    place = torch.tensor(places, device=advantage.device)
    ends = advantage.new_zeros(2, tokens.num_tokens + 1)
    ends.index_add_(1, place, advantage.new_tensor([sums, counts]))
    through = ends.cumsum(1)[:, :-1]
    ok = tokens.finite[tokens.trajectory].double()
    return (advantage[tokens.trajectory] * ok + through[0]) / (ok + through[1]).clamp(min=1.0)


@dataclass(slots=True)
class _Answer:
    """One trajectory as the tree has it."""

    reward: float
    counted: bool
    cuts: dict[int, list[int]] = field(default_factory=dict)
    """own tokens before a fork -> the answers that fork there"""
    values: list[tuple[int, float]] = field(default_factory=list)
    """(own tokens before the cut, value there), rising"""
    ends: int = 0
    """answers that go through its first token and count"""

    @property
    def first(self) -> float:
        """Value at the end of its first segment."""
        return self.values[0][1] if self.values else self.reward


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """A piece of an answer between two forks, as it has it for itself."""

    tokens: int
    before: float
    """value where it begins"""
    behind: float
    begin: float
    """value of the prompt"""
    ends: int
    """answers that go through it and count"""


def segment_gain(tokens: Tokens, reward: Tensor) -> Tensor:
    """SPO: the value at the end of a token's segment minus the value at its beginning. reward [I] -> [T]

    Segments lie between forks. The value of a fork is the mean over the answer that goes on there and those that begin
    there, each with the value at the end of its next segment; the value of the prompt is that mean over the answers
    that begin with it; the value of an end is its reward. Answers that do not count are in no mean.
    """
    found = [s.behind - s.before for s in _segments(tokens, reward) for _ in range(s.tokens)]
    return torch.where(tokens.finite[tokens.trajectory], reward.new_tensor(found), 0.0)


def tree_gain(tokens: Tokens, reward: Tensor) -> Tensor:
    """TreeRL: the value behind a token's segment less that before it, plus the same less that of the prompt, both
    divided by the root of the number of answers that go through it. reward [I] -> [T]"""
    found = [
        (2 * s.behind - s.before - s.begin) / max(s.ends, 1) ** 0.5
        for s in _segments(tokens, reward)
        for _ in range(s.tokens)
    ]
    return torch.where(tokens.finite[tokens.trajectory], reward.new_tensor(found), 0.0)


def root_of(tokens: Tokens) -> Tensor:
    """The answer from the prompt that each answer goes back to, its number in the batch: [I] int64."""
    forks = _forks_of(tokens)
    found = list(range(tokens.num_trajectories))
    for number, (parent, _) in enumerate(forks or []):
        if parent >= 0:
            found[number] = found[parent]
    return torch.tensor(found, dtype=torch.int64, device=tokens.group_of_trajectory.device)


def _segments(tokens: Tokens, reward: Tensor) -> list[_Segment]:
    """Those of every answer, in the order of its own tokens. reward [I]."""
    forks = _forks_of(tokens) or [(-1, 0)] * tokens.num_trajectories
    of_each = zip(reward.tolist(), tokens.finite.tolist(), strict=True)
    answers = [_Answer(reward=r, counted=ok) for r, ok in of_each]
    group = tokens.group_of_trajectory.tolist()
    roots: dict[int, list[int]] = {}
    for number, (parent, shared) in enumerate(forks):
        if parent >= 0:
            answers[parent].cuts.setdefault(shared, []).append(number)
        else:
            roots.setdefault(group[number], []).append(number)
    for answer in reversed(answers):
        ahead, answer.ends = answer.reward, int(answer.counted)
        for cut in sorted(answer.cuts, reverse=True):
            ahead = _mean([ahead] * answer.counted + [answers[c].first for c in answer.cuts[cut] if answers[c].counted])
            answer.values.insert(0, (cut, ahead))
            answer.ends += sum(answers[c].ends for c in answer.cuts[cut])
    begins = {g: _mean([answers[i].first for i in every if answers[i].counted]) for g, every in roots.items()}
    lengths = tokens.length.long().tolist()
    found: list[_Segment] = []
    for number, answer in enumerate(answers):
        parent, shared = forks[number]
        begin = begins.get(group[number], 0.0)
        before = begin if parent < 0 else dict(answers[parent].values)[shared]
        at, ends = 0, answer.ends
        for cut, value in [*answer.values, (lengths[number], answer.reward)]:
            found.append(_Segment(tokens=cut - at, before=before, behind=value, begin=begin, ends=ends))
            ends -= sum(answers[c].ends for c in answer.cuts.get(cut, []))
            before, at = value, cut
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _forks_of(tokens: Tokens) -> list[tuple[int, int]] | None:
    """(trajectory that it goes on from, or -1; policy tokens of that one before the fork) of each; None: no fork."""
    forks = tokens.columns.forks
    if forks is None:
        return None
    length = tokens.length.long().tolist()
    return [(p, min(shared, length[p])) if 0 <= p < i else (-1, 0) for i, (p, shared) in enumerate(forks.tolist())]
