"""Seeds: each depends on the run's seed and the place in the run only, never on timing."""

from __future__ import annotations

from hashlib import blake2b


def group_seed(run_seed: int, group: int) -> int:
    """Seed of a group: depends on the run's seed and the group only. 63 bits."""
    digest = blake2b(f"{run_seed}:{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def attempt_seed(run_seed: int, position: int, attempt: int) -> int:
    """Seed of the group at `position` in the prompt order, asked for the `attempt`-th time again. 63 bits."""
    seed = group_seed(run_seed, position)
    return group_seed(seed, -attempt) if attempt else seed


def sample_seed(seed: int, sample: int) -> int:
    """Seed of one trajectory of a group. 63 bits."""
    return group_seed(seed, sample)
