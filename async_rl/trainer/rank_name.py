"""What the processes of the trainer's ranks are called. Does not import torch."""

from __future__ import annotations

RANK = "RANK"
"""environment variable: torchrun's number of a process, 0 for the one that leads"""
MISSED = "did not get"
"""in the words of a rank that another one failed: not the cause"""


def process_name(rank: int) -> str:
    """In logs and messages. Rank 0 is what the run knows as its trainer."""
    return "trainer" if rank == 0 else f"trainer-rank-{rank}"
