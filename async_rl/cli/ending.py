"""What becomes of a command that goes wrong: a line for the user and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from async_rl.errors import RunFailed, UserError
from async_rl.process import Interrupted, ignore_interrupts

SIGNALLED = 128
"""exit codes above it: stopped by a signal"""


def code_of(work: Callable[[], int]) -> int:
    """The exit code of `work`: its own, or that of what it raised, which the user is told. Once interrupted, nothing
    interrupts any more."""
    try:
        return _interruptible(work)
    except UserError as error:
        complain(str(error))
        return 2
    except RunFailed as error:
        complain(str(error))
        return 1
    except BrokenPipeError:  # whoever read our output has gone
        _drop_output()
        return 1
    except OSError as error:  # a full disk
        _drop_output()
        complain(str(error))
        return 1


def _interruptible(work: Callable[[], int]) -> int:
    try:
        code = work()
    except Interrupted as order:
        complain(f"stopped by {order}")
        code = order.exit_code
    if code > SIGNALLED:
        ignore_interrupts(to_the_end=True)
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def complain(message: str) -> None:
    """A line for the user."""
    print(f"async-rl: {message}", file=sys.stderr)


def _drop_output() -> None:
    """Nothing more can be written: what is still buffered must not fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
