"""What a cell of a lab leaves behind: its curves, and the numbers drawn from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from async_rl.run_folder import replace_text

COLLAPSED = (
    "reward_final is below half of reward_best, or below reward_first. Rewards are those of a version, measured on "
    "the episodes it sampled, whenever those were trained: reward_final is the mean over the last tenth of the "
    "versions 0 .. steps - 1, reward_best the best mean over as many versions in a row, reward_first that of the "
    "initial model on held-out problems"
)
"""the definition, as lab.json and the page state it"""

STEP_CURVES = {
    "reward_batch": "reward/mean",
    "ess": "ess/ratio",
    "grad_norm": "grad/norm",
    "clip_frac": "clip/frac",
    "rejected": "reject/tokens",
    "learning_rate_factor": "",
    "entropy": "entropy",
    "length": "len/mean",
}
"""curve by step -> the metric it shows"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The curves of one cell."""

    versions: list[int]
    """versions whose reward was measured, ascending"""
    rewards: list[float]
    """mean reward of each version on the episodes it sampled"""
    steps: Mapping[str, list[float | None]]
    """by training step: the keys of STEP_CURVES; None where a step had none (it was skipped)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRecord:
    """One cell, finished or failed. `failed` tells why, or is empty; the numbers of a failed cell are None."""

    name: str
    task: str
    warm_up: str
    recipe: str
    lag: int
    learning_rate: float
    seed: int
    digest: str
    """of the settings it was trained with"""
    failed: str = ""
    reward_first: float | None = None
    reward_final: float | None = None
    reward_best: float | None = None
    collapsed: bool | None = None
    ess_min: float | None = None
    ess_mean: float | None = None
    grad_norm_max: float | None = None
    clip_frac_mean: float | None = None
    learning_rate_factor_mean: float | None = None
    steps_skipped: int | None = None
    seconds: float | None = None
    """wall time"""
    processor_seconds: float | None = None
    curves: str = ""
    """file with its curves, relative to the lab's folder"""
    detail: Mapping[str, Any] = field(default_factory=dict)


def summarise(curves: Curves, *, steps: int, reward_first: float) -> dict[str, Any]:
    """The numbers of a record that come from its curves."""
    tenth = ceil(steps / 10)
    final = window_mean(curves, steps - tenth, steps)
    assert final is not None, "the last tenth was measured"
    windows = [window_mean(curves, end - tenth, end) for end in range(tenth, steps + 1)]
    best = max(mean for mean in windows if mean is not None)

    def values(name: str) -> list[float]:
        return [value for value in curves.steps[name] if value is not None and isfinite(value)]

    def over(name: str, what: Any) -> float | None:
        found = values(name)
        return what(found) if found else None

    return {
        "reward_first": reward_first,
        "reward_final": final,
        "reward_best": best,
        "collapsed": has_collapsed(first=reward_first, best=best, final=final),
        "ess_min": over("ess", min),
        "ess_mean": over("ess", fmean),
        "grad_norm_max": over("grad_norm", max),
        "clip_frac_mean": over("clip_frac", fmean),
        "learning_rate_factor_mean": over("learning_rate_factor", fmean),
    }


def has_collapsed(*, first: float, best: float, final: float) -> bool:
    """Whether a training has collapsed, as COLLAPSED defines it."""
    return final < 0.5 * best or final < first


def window_mean(curves: Curves, first: int, end: int) -> float | None:
    """Mean reward of the measured versions first <= version < end."""
    found = [reward for version, reward in zip(curves.versions, curves.rewards, strict=True) if first <= version < end]
    return fmean(found) if found else None


def write_record(path: Path, record: CellRecord, curves: Curves | None = None) -> None:
    """Write the curves first: a record that is there is whole."""
    if curves is not None:
        replace_text(curves_path(path), json.dumps(_plain(asdict(curves))) + "\n")
    replace_text(path, json.dumps(_plain(asdict(record)), indent=1) + "\n")


def curves_path(record: Path) -> Path:
    """`curves/NAME.json` for `cells/NAME.json`."""
    return record.parent.with_name("curves") / record.name


def read_record(path: Path) -> CellRecord | None:
    """None when there is no record, or it cannot be read: the cell is then run again."""
    try:
        return CellRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_curves(path: Path) -> Curves:
    return Curves(**json.loads(curves_path(path).read_text()))


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value
