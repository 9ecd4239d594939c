"""How a process ended, in words."""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path

from support_run import quick_settings

from async_rl.config.schema import to_yaml
from async_rl.events import MemoryRanOut, RunResumed
from async_rl.process_spec import TrainerSpec
from async_rl.run.child import Child, Command
from async_rl.run_folder import RunFolder


def test_advice_quotes_the_micro_batch_of_this_life_only(tmp_path: Path, tiny_model: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    folder.config.write_text(to_yaml(quick_settings(tiny_model)))
    folder.failure("trainer").write_text(json.dumps({"kind": "memory", "message": "out of memory", "time": 1.0}))
    command = Command(module=(), spec=TrainerSpec(run=str(tmp_path), name="trainer", endpoint="", version=0))
    with FileIO(os.devnull) as pipe:
        child = Child(command=command, folder=folder, process=Ended(), said={}, cause_pipe=pipe)  # type: ignore[arg-type]
        folder.record(MemoryRanOut(step=0, tokens=6000))
        assert "the largest of this step had 6000" in str(child.cause())
        folder.record(RunResumed(version=0))
        assert "the largest of this step had" not in str(child.cause())


class Ended:
    """A process that has."""

    returncode = 1

    def poll(self) -> int:
        return 1
