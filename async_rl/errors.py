"""The two ways a command may end badly.

`UserError`: something the user can mend (a setting, a file). Exit code 2, one message, no traceback.
`RunFailed`: a run that had started could not go on. Exit code 1 and the first cause.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A wrong setting or file. The message names it and the remedy."""


class RunFailed(Exception):
    """A run that had started ended with an error. The message is the first cause."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that helps with a misspelt `name`: the nearest known name, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(names) if names else "none is known here"
