"""Why a trainer that somebody else started has ended, from what its ranks left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from async_rl.config import Settings
from async_rl.config.schema import structured
from async_rl.errors import RunFailed
from async_rl.process import MISSED
from async_rl.run.external import first_cause, start_command
from async_rl.wire import messages as msg

MISS = {"kind": "run", "message": f"rank 0 of 4 {MISSED} a sum over the ranks: a rank is gone"}
OWN = {"kind": "run", "message": "the disk is full"}


def rank(number: int, host: str, silent_s: float = 0.2) -> msg.ProcessState:
    name = "trainer" if number == 0 else f"trainer-rank-{number}"
    role = "trainer" if number == 0 else msg.RANK
    return msg.ProcessState(
        name=name, role=role, pid=number, doing="training step 7", since_s=0.1, silent_s=silent_s, host=host
    )


RANKS = {r.name: r for r in (rank(0, "a"), rank(1, "a"), rank(2, "b", 3.0), rank(3, "b", 3.5))}


def cause(failures: dict[str, dict[str, Any]], ranks: dict[str, msg.ProcessState] = RANKS) -> str:
    found = first_cause(failures, ranks)
    assert isinstance(found, RunFailed)
    return str(found)


def test_a_machine_that_left_no_word_is_why_the_others_missed_its_ranks() -> None:
    said = cause({"trainer": MISS, "trainer-rank-1": MISS})
    assert said.startswith("b has died or cannot be reached: its part of the trainer (trainer-rank-2, trainer-rank-3)")
    assert "last heard 3.0 s ago: training step 7" in said
    said = cause({"trainer-rank-2": MISS})  # that of rank 0 is gone
    assert said.startswith("a has died or cannot be reached: its part of the trainer (trainer, trainer-rank-1)")


def test_what_a_rank_recorded_of_its_own_comes_before_what_others_missed() -> None:
    assert cause({"trainer": MISS, "trainer-rank-3": OWN}).startswith("trainer-rank-3 failed: the disk is full on b")
    assert isinstance(first_cause({"trainer": OWN, "trainer-rank-3": MISS}, RANKS), SystemExit)  # the launcher reads it


def test_where_every_machine_left_a_word_the_leaders_is_told() -> None:
    assert isinstance(first_cause({"trainer": MISS, "trainer-rank-3": MISS}, RANKS), SystemExit)
    assert cause({"trainer-rank-3": MISS}, {}).startswith("trainer-rank-3 failed: rank 0 of 4")


def test_the_command_is_that_of_each_machine() -> None:
    def command(nodes: int) -> str:
        values = {"trainer": {"start": "external", "ranks": 4, "nodes": nodes}}
        return start_command(Path("runs/x"), structured(Settings, values, where=""))

    assert command(1) == ("torchrun --standalone --nproc-per-node 4 -m async_rl train runs/x")
    assert command(2) == (
        "torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-id x --rdzv-endpoint FIRST-MACHINE:29400 "
        "-m async_rl train runs/x"
    )
