"""Buckets of trajectory length: what is left out is counted by them, so that a bias by length is seen."""

from __future__ import annotations

from bisect import bisect_right

LENGTH_BUCKETS = (16, 64, 256, 1024, 4096, 16384)
"""upper ends (exclusive) of the buckets of trajectory length, in policy tokens; the last is open"""


def bucket_names() -> list[str]:
    """Names of the length buckets, in order, for metric keys."""
    ends = [f"below_{end}" for end in LENGTH_BUCKETS]
    return [*ends, f"from_{LENGTH_BUCKETS[-1]}"]


def bucket_of(policy_tokens: int) -> int:
    """Index of the bucket of this length."""
    return bisect_right(LENGTH_BUCKETS, policy_tokens)
