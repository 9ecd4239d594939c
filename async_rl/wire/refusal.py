"""Why a message is not taken: a closed list, so that what strangers send cannot grow the counters."""

from __future__ import annotations

from typing import Literal, get_args

from async_rl.trajectory.codec import WireKind

Impossible = Literal[
    "direction", "role", "stranger", "second", "crowd", "number", "step", "version", "group", "permit", "tokens",
    "name", "unlike"
]
"""What is wrong with a message that was well formed: of a kind that the receiver does not take; a role that does
not exist; from a peer that has no business with it; a second trainer beside the first; more peers or evaluations
than are held; a number that cannot be; a batch that cannot be asked for yet; weights that cannot exist; a group
that was not given to this peer; a trajectory that is not the one permitted (sample, problem, split, seed,
temperature); tokens outside the vocabulary; a joining generator under a name that is another's, or with another
version of this program."""
RefusalKind = WireKind | Impossible

REFUSALS: frozenset[str] = frozenset((*get_args(WireKind), *get_args(Impossible)))
HARMLESS: frozenset[str] = frozenset({"group", "stranger", "crowd"})
"""What may befall a sound generator: its group went to another while it was not heard of, or the buffer has
forgotten it. Any other refusal tells it that it is broken itself."""
