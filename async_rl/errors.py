"""Optional packages that a setting asks for: whether they are there, and how to get them. Imports none of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

# -------------------- errors
# The two ways a command may end badly.
#
# `UserError`: something the user can mend (a setting, a file). Exit code 2, one message, no traceback.
# `RunFailed`: a run that had started could not go on. Exit code 1 and the first cause.


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


TRACKERS = ("tensorboard", "wandb")
"""names of `trackers`, of their packages and of our extras"""


def check_lora_package() -> None:
    """Raises UserError when peft, which lora.rank needs, is not installed."""
    if find_spec("peft") is None:
        raise UserError("lora.rank needs peft; pip install peft transformers, or set lora.rank=0")


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for one that is unknown, named twice or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"trackers: {name!r} is none; {nearest(name, TRACKERS)}")
        if names.count(name) > 1:
            raise UserError(f"trackers names {name} twice; once is enough")
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name in the working directory is no package
            raise UserError(f"trackers: {name} is not installed; pip install {name}, or leave it out")
