"""A few trajectories of a run as the report shows them: text token by token, turns, versions, log-probs and importance
ratios.

The store holds the log-probs of the policy that sampled, not those of the trainer. So the ratios are computed anew with
the weights of a checkpoint, for the trajectories that are shown and within a time budget.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from async_rl.buffer.store_reader import StoreSurvey, Surveyed
from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.record import RunRecord
from async_rl.trainer.manifest import list_checkpoints, version_of
from async_rl.trajectory import Trajectory, Turn
from async_rl.trajectory.codec import WireError, unpack
from async_rl.trajectory.parts import PREFIX
from async_rl.trajectory.types import GREEDY

STEPS_SHOWN = 14
"""steps of which one group each is shown"""
MOST_OF_A_GROUP = 8
"""trajectories of one group that are shown"""
MOST_TOKENS = 40_000
"""tokens of all trajectories that are shown: about 1.5 MB of page"""
HEAD, TAIL = 900, 300
"""tokens of a long trajectory that are shown, at its start and at its end"""
MOST_NOTES = 12
"""notes of a trajectory that are shown, besides the parts of its reward"""
NUMBER_DIGITS = 3
"""decimals of log-probs and ratios"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A trajectory that is shown, with its row in the store."""

    row: Surveyed
    trajectory: Trajectory


def samples(record: RunRecord, store: StoreSurvey, *, with_ratios: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Trajectories as plain values for the page, and sentences that say what is shown and what is missing."""
    chosen = _choose(record, store)
    notes: list[str] = []
    if not chosen:
        return [], ["There are no trajectories with their tokens to show yet."]
    tokenizer = tokenizer_of(record)
    if tokenizer is None:
        notes.append("model.path and the checkpoints have no tokenizer that can be read: tokens are shown as numbers.")
    found: dict[int, Ratios] = {}
    if with_ratios:
        made, note = ratios(record, [c.trajectory for c in chosen], [c.row.step for c in chosen])
        found = dict(made)
        notes.append(note)
    shown, tokens = [], 0
    for place, one in enumerate(chosen):
        if tokens > MOST_TOKENS:
            notes.append(f"{len(chosen) - place} trajectories are left out to keep this page small.")
            break
        tokens += min(len(one.trajectory.tokens), HEAD + TAIL)
        shown.append(_plain_values(one, tokenizer, found.get(place)))
    return shown, notes


def _choose(record: RunRecord, store: StoreSurvey) -> list[Chosen]:
    """Whole groups: of steps spread over the run, of steps whose weights a checkpoint holds, of held-out problems, and
    some that were refused or failed."""
    first, last = store.steps()
    first = max(first, store.first_step())  # of older ones the tokens are deleted
    steps = {int(s) for s in np.linspace(first, last, STEPS_SHOWN)} if last >= first else set()
    steps |= {version for version in checkpoints_of(record) if first <= version <= last}
    groups = [groups[step % len(groups)] for step in sorted(steps) if (groups := store.groups_in(step))]
    wanted = dict.fromkeys([*groups, *store.odd_groups(6), *store.held_out_groups(6)])
    return [one for group in wanted for one in _group(store, group)]


def _group(store: StoreSurvey, group: int) -> list[Chosen]:
    rows = {row.sample: row for row in store.of_group(group)}
    found = []
    for blob in store.load_groups([group]):
        try:
            trajectory = unpack(blob)
        except WireError:
            continue  # a damaged or newer one: the others are still worth seeing
        if trajectory.sample in rows:
            found.append(Chosen(row=rows[trajectory.sample], trajectory=trajectory))
    return found[:MOST_OF_A_GROUP]


def tokenizer_of(record: RunRecord) -> Tokenizer | None:
    """The tokenizer of the newest checkpoint, else of the model the run began with; None when none can be read."""
    folders = [str(path) for _, path in sorted(checkpoints_of(record).items(), reverse=True)]
    if record.settings is not None:
        folders.append(record.settings.model.path)
    for folder in folders:
        try:
            return Tokenizer(folder)
        except (UserError, OSError, ValueError):
            continue
    return None


def pieces(tokenizer: Tokenizer | None, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the whole text. A token that ends in the middle of a character
    adds nothing, the token that completes the character adds all of it. Without a tokenizer: the numbers."""
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    found, begun, read = [], 0, 0
    before = ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[begun:end], special=True)
        if text.endswith("\ufffd") and end - read < 8 and end < len(tokens):
            found.append("")
            continue
        found.append(text[len(before) :])
        begun, read = read, end
        before = tokenizer.decode(tokens[begun:end], special=True)
    return found


def _plain_values(one: Chosen, tokenizer: Tokenizer | None, ratio: Ratios | None) -> dict[str, Any]:
    """One trajectory as the page's script reads it."""
    t, row = one.trajectory, one.row
    n = len(t.tokens)
    turn_of = np.full(n, -1, np.int64)
    for number, turn in enumerate(t.turns):
        turn_of[turn.start : turn.start + turn.length] = number
    version = np.full(n, -1, np.int64)
    for span in t.versions:
        version[span.start : span.end] = span.version
    version[turn_of < 0] = -1
    of_token = np.full(n, np.nan)
    if ratio is not None:
        of_token[t.policy_positions()] = ratio.ratio
    cut = n > HEAD + TAIL
    shown = [*range(HEAD), *range(n - TAIL, n)] if cut else list(range(n))
    text = pieces_of_contexts(tokenizer, t)
    context_of = np.searchsorted(np.asarray([0, *t.contexts]), np.asarray(shown), side="right")  # from 1
    return {
        "group": t.group,
        "sample": t.sample,
        "problem": t.problem,
        "split": t.split,
        "step": row.step,
        "versions": [t.version_min, t.version_max],
        "reward": float(t.reward) if np.isfinite(t.reward) else None,
        "ended": t.ended,
        "reason": t.reason or row.refused_because or "",
        "refused": row.refused_because or "",
        "generator": t.generator or row.generator,
        "seconds": round(t.finished_at - t.started_at, 3),
        "turns": [
            [turn.start, turn.length, round(turn.reward, 4), turn.agent, temperature_shown(turn)] for turn in t.turns
        ],
        "contexts": 1 + len(t.contexts),
        "context_at": [[int(k), int(context_of[k])] for k in np.flatnonzero(np.diff(context_of, prepend=1))],
        "info": _notes(t.info),
        "length": n,
        "policy": t.num_policy_tokens,
        "cut": HEAD if cut else None,
        "ratio_version": ratio.version if ratio is not None else None,
        "text": [text[i] for i in shown],
        "turn": turn_of[shown].tolist(),
        "version": version[shown].tolist(),
        "logp": [_short(x) if p >= 0 else None for x, p in zip(t.log_behaviour[shown], turn_of[shown], strict=True)],
        "ratio": [_short(x) for x in of_token[shown]] if ratio is not None else None,
    }


def pieces_of_contexts(tokenizer: Tokenizer | None, trajectory: Trajectory) -> list[str]:
    """The text of each token, [tokens]; each context is decoded by itself. In a very long trajectory only the start and
    the end are decoded, and the texts between are empty."""
    tokens, n = trajectory.tokens.tolist(), len(trajectory.tokens)
    cuts = {0, n, *trajectory.contexts}
    if left_out := n > 4 * (HEAD + TAIL):
        cuts |= {HEAD, n - TAIL}
    found: list[str] = []
    for begin, end in pairwise(sorted(cuts)):
        hidden = left_out and HEAD <= begin < n - TAIL
        found += [""] * (end - begin) if hidden else pieces(tokenizer, tokens[begin:end])
    return found


def temperature_shown(turn: Turn) -> float | str | None:
    """The temperature of a turn that has its own; None: it has the trajectory's."""
    return "greedy" if turn.temperature == GREEDY else turn.temperature or None


def _notes(info: Mapping[str, float | str]) -> dict[str, float | str]:
    """The parts of the reward, then the first MOST_NOTES other notes."""
    parts = {name: value for name, value in info.items() if name.startswith(PREFIX)}
    return parts | dict([(name, value) for name, value in info.items() if name not in parts][:MOST_NOTES])


def _short(value: float) -> float | None:
    return round(float(value), NUMBER_DIGITS) if np.isfinite(value) else None


# ---------------------------------------------------------------- importance ratios

BUDGET_S = 3.0
"""time to compute ratios in, without loading torch; trajectories that are left then have none"""
PORTION_TOKENS = 4096
"""tokens of one forward; the time is checked between two"""
MOST_BYTES = 2 << 30
"""a model with larger weight files is not loaded for a report"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Importance ratios of one trajectory: pi_version(token) / mu(token), mu the policy that sampled it."""

    version: int
    """version of the weights in the numerator; when it is the step that trained the trajectory, the trainer had these
    ratios"""
    ratio: NDArray[np.float64]  # [policy tokens]


def checkpoints_of(record: RunRecord) -> dict[int, Path]:
    """Version -> folder of the checkpoints that hold weights."""
    return {version_of(p): p for p in list_checkpoints(record.folder.checkpoints) if any(p.glob("*.safetensors"))}


def ratios(
    record: RunRecord, trajectories: Sequence[Trajectory], steps: Sequence[int | None]
) -> tuple[Mapping[int, Ratios], str]:
    """Index in `trajectories` -> ratios, and a sentence that says what they are or why some are missing.

    `steps`: the step that trained each trajectory, which chooses the checkpoint; None: the newest checkpoint."""
    found: dict[int, Ratios] = {}
    there = checkpoints_of(record)
    if not there:
        return found, "No checkpoint holds weights, so there are no importance ratios."
    work: dict[int, list[int]] = defaultdict(list)
    for place, step in enumerate(steps):
        if trajectories[place].num_policy_tokens and not trajectories[place].failed:
            work[nearest(there, step)].append(place)
    largest = max(sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in there.values())
    if largest > MOST_BYTES:
        return found, f"The model ({largest / 2**30:.1f} GiB) is too large to compute importance ratios for a report."
    try:
        found = _compute(there, work, trajectories)
    except (UserError, OSError, ValueError, RuntimeError, ImportError) as error:
        return found, f"Importance ratios could not be computed: {error}"
    missing = sum(map(len, work.values())) - len(found)
    late = f" {missing} trajectories have none: {BUDGET_S:g} s were over." if missing else ""
    return found, (
        "Ratios are computed for this page, of the checkpoint nearest to the step a trajectory was trained in to "
        f"the policy that sampled it.{late}"
    )


def nearest(there: Mapping[int, Path], step: int | None) -> int:
    """The version of the checkpoint nearest to `step`; step `step` updates the weights of version `step`."""
    return max(there) if step is None else min(there, key=lambda version: (abs(version - step), version))


def _compute(
    there: Mapping[int, Path], work: Mapping[int, Sequence[int]], trajectories: Sequence[Trajectory]
) -> dict[int, Ratios]:
    import torch

    from async_rl.model.folder import load_model
    from async_rl.trainer.forward import ModelArithmetic, batch_log_probs
    from async_rl.trainer.packing import pack_batch

    found: dict[int, Ratios] = {}
    deadline = time.monotonic() + BUDGET_S
    for version in sorted(work, key=lambda v: (-len(work[v]), v)):
        if time.monotonic() > deadline:
            break
        model = load_model(there[version])
        for places in _portions(work[version], trajectories):
            if time.monotonic() > deadline:
                break
            chosen = [trajectories[place] for place in places]
            packed = pack_batch(chosen, micro_batch_tokens=PORTION_TOKENS)
            with torch.no_grad():
                now = batch_log_probs(model, packed, ModelArithmetic(temperature=chosen[0].temperature or 1.0))
            log_ratio = (now.log_prob - packed.log_behaviour).double().clamp(-20, 20).numpy()
            ends = np.cumsum([trajectory.num_policy_tokens for trajectory in chosen])[:-1]
            for place, part in zip(places, np.split(np.exp(log_ratio), ends), strict=True):
                found[place] = Ratios(version=version, ratio=part)
    return found


def _portions(places: Sequence[int], trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """Indices of trajectories of one temperature that fit one forward, in the order in which a batch packs them."""
    ordered = sorted(places, key=lambda p: (trajectories[p].temperature, trajectories[p].group, trajectories[p].sample))
    portions: list[list[int]] = []
    for place in ordered:
        one = trajectories[place]
        last = portions[-1] if portions else []
        full = sum(len(trajectories[p].tokens) for p in last) + len(one.tokens) > PORTION_TOKENS
        if not last or full or trajectories[last[0]].temperature != one.temperature:
            portions.append(last := [])
        last.append(place)
    return portions
