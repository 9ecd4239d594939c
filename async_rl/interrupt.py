"""Ctrl-C, an order to end, a closed terminal: the three ways a person stops a command.

The first of them raises `Interrupted` wherever the command is; from then on further ones are ignored, so
that cleaning up is never cut short. Imports nothing heavy: it must act while everything else is imported.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The command was told to end; the message is the signal's name. Not an Exception: code that guards
    itself against whatever a user's function raises must not swallow it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the signals raise Interrupted (once); handlers are put back behind it. Inside another one, or
    in another thread than the main one, it changes nothing."""
    nested = signal.getsignal(signal.SIGINT) in (_interrupt, _nothing)
    if nested or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for s in SIGNALS:
        if s == signal.SIGHUP and signal.getsignal(s) == signal.SIG_IGN:
            continue  # nohup: the command shall outlive its terminal
        before[s] = signal.signal(s, _interrupt)
    try:
        yield
    finally:
        for s, handler in before.items():
            if signal.getsignal(s) != signal.SIG_IGN:  # else it is to stay so
                signal.signal(s, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, a signal waits: it raises Interrupted behind it. For what is short and must not be left half done."""
    waiting: list[int] = []
    held = [s for s in SIGNALS if signal.getsignal(s) == _interrupt]
    if threading.current_thread() is not threading.main_thread():
        held = []
    for s in held:
        signal.signal(s, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for s in held:
            signal.signal(s, _interrupt)
        if waiting:
            _interrupt(waiting[0], None)


def ignore_interrupts(*, to_the_end: bool = False) -> None:
    """From here on the signals do nothing; `to_the_end`: of the interpreter, which takes a moment, too."""
    if threading.current_thread() is threading.main_thread():
        for s in SIGNALS:
            # Not SIG_IGN at once: Python writes a traceback when a signal came just before it was set. But
            # the interpreter takes its own handlers away while it ends.
            signal.signal(s, signal.SIG_IGN if to_the_end else _nothing)


def _nothing(number: int, _: FrameType | None) -> None:
    pass


def _interrupt(number: int, _: FrameType | None) -> None:
    ignore_interrupts()
    raise Interrupted(signal.Signals(number).name)
