"""Signals wait where something must not be left half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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


WHILE_IMPORTING = """
import signal, sys
from async_rl.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

class Slow:
    def find_spec(self, name, *_):
        if name == "async_rl.cli.main":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Slow())
main()
"""


def test_ctrl_c_while_the_program_is_imported_leaves_no_traceback() -> None:
    line = [sys.executable, "-c", WHILE_IMPORTING]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "async-rl: stopped by SIGINT\n")
