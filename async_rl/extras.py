"""Optional packages that a setting asks for: whether they are there, and how to get them. Imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from async_rl.errors import UserError, nearest

TRACKERS = ("tensorboard", "wandb")
"""names of `trackers`, of their packages and of our extras"""


def check_lora_package() -> None:
    """Raises UserError when peft, which lora.rank needs, is not installed."""
    if find_spec("peft") is None:
        raise UserError("lora.rank needs peft; pip install 'async-rl[lora]', or set lora.rank=0")


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for one that is unknown, named twice or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"trackers: {name!r} is none; {nearest(name, TRACKERS)}")
        if names.count(name) > 1:
            raise UserError(f"trackers names {name} twice; once is enough")
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name in the working directory is no package
            raise UserError(f"trackers: {name} is not installed; pip install 'async-rl[{name}]', or leave it out")
