"""Signals wait where something must not be left half done."""

from __future__ import annotations

import os
import signal

import pytest

from async_rl.process import Interrupted, interruptible, uninterrupted


def half_and_half(done: list[str]) -> None:
    with interruptible():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("the whole of it")
        done.append("never")


def test_a_signal_inside_uninterrupted_is_raised_behind_it() -> None:
    done: list[str] = []
    with pytest.raises(Interrupted, match="SIGTERM"):
        half_and_half(done)
    assert done == ["the whole of it"]


def test_without_a_signal_uninterrupted_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible():
        inside = signal.getsignal(signal.SIGTERM)
        with uninterrupted():
            pass
        assert signal.getsignal(signal.SIGTERM) == inside
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_of_interruptible_it_leaves_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with uninterrupted():
        assert signal.getsignal(signal.SIGTERM) == before
