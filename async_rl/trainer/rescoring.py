"""Sampled tokens scored again (`score`), and how far a trajectory is from what the scores say.

Shapes: t policy tokens that are scored, N tokens of a packed forward, V vocabulary. Everything is float64.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from async_rl.model.attention import DocumentAttention
from async_rl.model.huggingface import soft_cap
from async_rl.trajectory import Trajectory
from async_rl.trajectory.noise import uniforms
from async_rl.trajectory.types import GREEDY, group_seed

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model

Numbers = NDArray[np.float64]

ELEMENTS = 1 << 24
"""logits that are held at once"""
TILTS = (-0.5, -0.25, 0.25, 0.5)
"""exponents of the plausibility test: below 0 it looks for tokens that are too likely, above 0 for unlikely ones"""
BINS = 16
"""of the cumulative probability, in the same test"""
FLOOR = {"float32": 2e-5, "bfloat16": 1e-2}
"""mismatch of a trajectory that is never held against it, by the engine's dtype, nats"""
TIMES = 30
"""so many times the median mismatch of the run's trajectories is not, either"""
LEAST_SEEN, MOST_SEEN = 16, 256
"""trajectories whose median it is"""
FAR = 100
"""times the limit: in float32 a single token beyond is enough. In bfloat16 long answers have such tokens"""
EDGE = {"float32": 1e-3, "bfloat16": 0.1}
"""how far from its place a prescribed uniform may lie for rounding, by the engine's dtype"""
OUTSIDE = {"float32": 0.01, "bfloat16": 0.05}
"""share of a trajectory's tokens that may lie further"""
UNSPOKEN = 4
"""contexts in which nothing was sampled, which are numbered and not recorded"""
IMPLAUSIBLE = math.log(1e3)
"""log e-value above which tokens were not sampled from the policy: by Markov's inequality at most one honest trajectory
in a thousand is"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Policy tokens of one trajectory that are to be scored."""

    trajectory: Trajectory
    positions: NDArray[np.int64]  # [t], rising


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a model says of them."""

    log_prob: Numbers  # [t]
    below: Numbers  # [t]
    """cumulative probability of the tokens with lower numbers"""
    upto: Numbers  # [t]
    """that, and the token's own"""
    tilted: Numbers  # [t, TILTS]
    """log sum of p**(1 - tilt) over the vocabulary"""


@torch.no_grad()
def score(model: Model, wanted: Sequence[Wanted], *, most_tokens: int) -> list[Scored]:
    """Score the tokens under the model's weights as they are now, at the temperatures that the trajectories name.
    `most_tokens`: of one forward."""
    found: list[list[tuple[int, Scored]]] = [[] for _ in wanted]
    bunch: list[_Document] = []
    for document in sorted(_documents(wanted), key=lambda d: len(d.tokens)):
        if bunch and sum(len(d.tokens) for d in bunch) + len(document.tokens) > most_tokens:
            _forward(model, bunch, found)
            bunch = []
        bunch.append(document)
    if bunch:
        _forward(model, bunch, found)
    return [_joined(parts) for parts in found]


@dataclass(slots=True, kw_only=True)
class _Document:
    """A context of a trajectory, as far as the last token that is scored in it."""

    of: int
    """index of its trajectory"""
    start: int
    """of the context in that"""
    tokens: NDArray[np.int32]
    at: NDArray[np.int64]  # [t], in the document
    temperature: NDArray[np.float32]  # [t]


def _documents(wanted: Sequence[Wanted]) -> Iterator[_Document]:
    for number, one in enumerate(wanted):
        trajectory, temperature = one.trajectory, temperatures(one.trajectory)
        for start, end in trajectory.context_bounds():
            at = one.positions[(one.positions >= start) & (one.positions < end)]
            if len(at):
                tokens = trajectory.tokens[start : int(at[-1]) + 1]
                yield _Document(of=number, start=start, tokens=tokens, at=at - start, temperature=temperature[at])


def temperatures(trajectory: Trajectory) -> NDArray[np.float32]:  # [tokens]
    """The temperature at which each policy token's log-prob is; 1 elsewhere."""
    found = np.ones(len(trajectory.tokens), np.float32)
    for turn in trajectory.turns:
        found[turn.start : turn.start + turn.length] = trajectory.log_prob_temperature(turn)
    return found


def _forward(model: Model, bunch: Sequence[_Document], found: list[list[tuple[int, Scored]]]) -> None:
    device = model.head.device
    tokens = torch.from_numpy(np.concatenate([d.tokens for d in bunch]).astype(np.int64)).to(device)
    lengths = [len(d.tokens) for d in bunch]
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    hidden = model(tokens, positions, DocumentAttention(lengths))  # [N, hidden]
    starts = np.cumsum([0, *lengths[:-1]])
    for start, document in zip(starts, bunch, strict=True):
        predictors = torch.from_numpy(document.at - 1 + start).to(device)
        targets = torch.from_numpy(document.tokens[document.at].astype(np.int64)).to(device)
        temperature = torch.from_numpy(document.temperature).to(device)
        rows = max(1, ELEMENTS // len(model.head))
        for begin in range(0, len(targets), rows):
            some = slice(begin, begin + rows)
            part = _rows(model, hidden[predictors[some]], targets[some], temperature[some])
            found[document.of].append((document.start + int(document.at[begin]), part))


def _rows(model: Model, hidden: Tensor, targets: Tensor, temperature: Tensor) -> Scored:
    """Of [t, hidden] that predict `targets` [t]."""
    logits = soft_cap(hidden.to(model.head.dtype) @ model.head.T, model.logit_cap).float()  # [t, V]
    log_p = torch.log_softmax(logits / temperature[:, None], -1)
    cumulative = log_p.exp().cumsum(-1, dtype=torch.float64)
    upto = cumulative.gather(1, targets[:, None]).squeeze(1)
    before = cumulative.gather(1, (targets - 1).clamp_min(0)[:, None]).squeeze(1)
    below = torch.where(targets > 0, before, torch.zeros_like(before))
    tilted = torch.stack([torch.logsumexp((1 - tilt) * log_p, -1) for tilt in TILTS], -1)
    total = cumulative[:, -1]
    return Scored(
        log_prob=_numbers(log_p.gather(1, targets[:, None]).squeeze(1)),
        below=_numbers(below / total),
        upto=_numbers(upto / total),
        tilted=_numbers(tilted),
    )


def _numbers(tensor: Tensor) -> Numbers:
    return tensor.double().cpu().numpy()


def _joined(parts: Sequence[tuple[int, Scored]]) -> Scored:
    """In the order of their first tokens."""
    ordered = [part for _, part in sorted(parts, key=lambda pair: pair[0])]
    return Scored(
        log_prob=np.concatenate([part.log_prob for part in ordered]),
        below=np.concatenate([part.below for part in ordered]),
        upto=np.concatenate([part.upto for part in ordered]),
        tilted=np.concatenate([part.tilted for part in ordered]),
    )


# ---------------------------------------------------------------- how far a trajectory is from its scores


@dataclass(slots=True, kw_only=True)
class Mismatch:
    """What engine and trainer disagree about, as measured in this run."""

    dtype: str
    """of the engine"""
    tolerance: float
    """nats, never exceeded by `limit`: that of the canary"""
    seen: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_SEEN))
    """of trajectories within the limit, nats"""

    @property
    def limit(self) -> float:
        """The mismatch of a trajectory that is held against it, nats."""
        if len(self.seen) < LEAST_SEEN:
            return self.tolerance
        return min(self.tolerance, max(FLOOR[self.dtype], TIMES * median(self.seen)))


def mismatch(trajectory: Trajectory, positions: NDArray[np.int64], log_prob: Numbers) -> Numbers:  # [t]
    """|difference| / max(1, |log-prob|) of what the trajectory says and `log_prob` [t], nats at temperature 1: rounding
    errors grow with the log-prob, and with the logits when these are divided by a low temperature."""
    said = trajectory.log_behaviour[positions].astype(np.float64)
    scale = np.minimum(1.0, temperatures(trajectory)[positions])
    found: Numbers = np.abs(said - log_prob) / np.maximum(1.0, np.abs(log_prob)) * scale
    return found


def sampled(trajectory: Trajectory) -> NDArray[np.bool_]:  # [tokens]
    """Policy tokens that were drawn, not the likeliest ones."""
    found = np.zeros(len(trajectory.tokens), bool)
    for turn in trajectory.turns:
        own = turn.temperature or trajectory.temperature
        found[turn.start : turn.start + turn.length] = own not in (0.0, GREEDY)
    return found


def outside(trajectory: Trajectory, positions: NDArray[np.int64], scored: Scored, edge: Numbers) -> NDArray[np.bool_]:
    """[t] whether a token is not the one that inverse-CDF sampling takes for the uniform its seed prescribes, by more
    than `edge` [t]. Contexts in which nothing was sampled have numbers, too, and are not in the trajectory: the number
    that fits best is taken."""
    found = np.zeros(len(positions), bool)
    first = 0
    for start, end in trajectory.context_bounds():
        here = np.flatnonzero((positions >= start) & (positions < end))
        if not len(here):
            continue
        best: NDArray[np.bool_] | None = None
        for number in range(first, first + UNSPOKEN + 1):
            seed = group_seed(trajectory.seed, number) if number else trajectory.seed
            seeds = np.full(len(here), seed & 0xFFFF_FFFF_FFFF_FFFF, np.uint64)
            drawn = uniforms(seeds, positions[here] - start)
            wrong = (drawn < scored.below[here] - edge[here]) | (drawn > scored.upto[here] + edge[here])
            if best is None or wrong.sum() < best.sum():
                best, first_next = wrong, number + 1
            if not wrong.any():
                break
        assert best is not None
        found[here], first = best, first_next
    return found


def implausibility(scored: Scored, *, slack: float, random: np.random.Generator) -> float:
    """Log of an e-value: its mean over tokens that were drawn from the scored distribution is 1 (0 as a log) or less.

    The mean of several: p**-tilt over its own mean, token by token, for each of TILTS; and a sequential bet on the
    bins of the cumulative probability (Krichevsky-Trofimov), which is uniform for drawn tokens. So no distribution is
    assumed. `slack`: nats a token by which engine and trainer may differ.
    """
    tilts = np.array(TILTS)
    steps = -tilts * scored.log_prob[:, None] - scored.tilted - slack * np.abs(tilts)
    place = scored.below + random.random(len(scored.below)) * (scored.upto - scored.below)
    counts, bet = np.full(BINS, 0.5), 0.0
    for bin_ in np.minimum((place * BINS).astype(int), BINS - 1):
        bet += math.log(counts[bin_] / counts.sum() * BINS) - slack
        counts[bin_] += 1
    return float(np.logaddexp.reduce([*steps.sum(0), bet]) - math.log(len(TILTS) + 1))
