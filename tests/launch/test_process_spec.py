"""A child process reads what it is told strictly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import asdict

from async_rl.process import bind_threads
from async_rl.process_spec import BufferSpec, Pipes, ProcessSpec, TrainerSpec, parse_spec

TRAINER = TrainerSpec(
    run="runs/ü", name="trainer", pipes=Pipes(parent=3, pulse=5), cores=((0, 1), (2,)), endpoint="ipc://x", version=7,
    ways=("nccl",),
)  # fmt: skip


def test_a_spec_is_read_back_as_it_was_written() -> None:
    assert parse_spec(TrainerSpec, [TRAINER.to_json()]) == TRAINER
    assert '"run":"runs/ü"' in TRAINER.to_json(), "`pgrep -af runs/ü` finds the process"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "7"}, "Expected `int`, got `str`"),
        ({"versoin": 7}, "unknown field `versoin`"),
        ({"cores": [0]}, r"Expected `array`, got `int` - at `\$.cores"),
    ],
)
def test_another_document_ends_the_process_with_the_reason(change: dict[str, object], reason: str) -> None:
    text = json.dumps({**json.loads(TRAINER.to_json()), **change})
    with pytest.raises(SystemExit, match=reason):
        parse_spec(TrainerSpec, [text])
    with pytest.raises(SystemExit, match="this process is started by `async-rl run`"):
        parse_spec(BufferSpec, [])


def test_threads_keep_to_the_cores_of_their_rank() -> None:
    """In a process of its own: a test's own threads stay where they are."""
    own = sorted(os.sched_getaffinity(0))
    spec = ProcessSpec(run="r", name="trainer", cores=((own[0],), (own[-1],)))
    script = (
        "import os, sys\nfrom async_rl.process import bind_threads\nfrom async_rl.process_spec import *\n"
        "bind_threads(parse_spec(ProcessSpec, sys.argv[1:]))\nprint(*os.sched_getaffinity(0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, spec.to_json()], env={**os.environ, "LOCAL_RANK": "1"}, check=True,
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.split() == [str(own[-1])]
    bind_threads(ProcessSpec(run="r", name="x"))
    assert sorted(os.sched_getaffinity(0)) == own, "without cores nothing is bound"
    assert asdict(spec)["pipes"] == Pipes()
