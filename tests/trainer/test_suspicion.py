"""The statistic behind a proof: false proofs are as rare as it says, and lies are found."""

from __future__ import annotations

import numpy as np

from async_rl.trainer.suspicion import CHECKS, FALSE_ALARMS, HONEST, LYING, PROOF, Suspicion


def cusum(wrong: np.ndarray) -> np.ndarray:
    """[streams, trajectories] bool -> [streams] first trajectory with a proof, or -1. The statistic as the docs state
    it, for all streams at once."""
    shares = np.array(LYING)
    up, down = shares / HONEST, (1 - shares) / (1 - HONEST)
    level = np.ones((len(wrong), len(shares)))
    first = np.full(len(wrong), -1)
    for t in range(wrong.shape[1]):
        level = np.clip(level, 1.0, 1e300) * np.where(wrong[:, t, None], up, down)
        proven = (level.mean(1) >= PROOF) & (first < 0)
        first[proven] = t
    return first


def test_the_class_is_the_formula() -> None:
    wrong = np.random.default_rng(0).random((50, 200)) < 0.05
    found = []
    for stream in wrong:
        suspicion = Suspicion()
        proven = [suspicion.add(bool(x)) for x in stream]
        found.append(proven.index(True) if True in proven else -1)
    assert found == cusum(wrong).tolist()


def test_false_proofs_are_rarer_than_one_in_a_million_honest_trajectories() -> None:
    """Twenty million, of which as many look wrong as the bound allows; one kind of check may have its share."""
    random = np.random.default_rng(1)
    streams, long = 10_000, 2_000
    found = cusum(random.random((streams, long)) < HONEST)
    allowed = FALSE_ALARMS / len(CHECKS) * streams * long
    assert (found >= 0).sum() <= allowed


def test_a_lie_that_begins_late_is_proven_soon() -> None:
    random = np.random.default_rng(2)
    wrong = random.random((500, 1_800)) < HONEST / 10
    for share, most in ((1.0, 3), (0.3, 45), (0.05, 500)):
        wrong[:, 800:] = random.random((500, 1_000)) < share
        found = cusum(wrong)
        assert (found >= 800).all()
        assert np.quantile(found - 799, 0.95) <= most


def test_three_in_a_row_prove_a_lie_and_two_do_not() -> None:
    suspicion = Suspicion()
    assert [suspicion.add(True) for _ in range(3)] == [False, False, True]
