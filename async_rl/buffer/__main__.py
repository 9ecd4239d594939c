"""The buffer process; started by the launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence

from async_rl.buffer.build import make_core
from async_rl.buffer.loop import make_welcome, run_buffer
from async_rl.config import Settings
from async_rl.process import run_process
from async_rl.process_spec import BufferSpec, read_spec
from async_rl.run_folder import RunFolder
from async_rl.task.problem_fields import ProblemSources
from async_rl.wire.heartbeat import Activity, make_heartbeat


def sources_of(folder: RunFolder, settings: Settings) -> Sequence[int]:
    """Number of the source of each training problem, where the sampler chooses among them."""
    return ProblemSources.read(folder.problem_sources).numbers if settings.sampler.choose == "ucb" else ()


def main(spec: BufferSpec) -> None:
    """Serve until the run ends; ends this process."""
    folder = RunFolder(spec.path)

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        with make_heartbeat(spec.name, "buffer", activity, settings.wire, None, pipe=spec.pipes.pulse):
            core = make_core(
                settings,
                train_problems=spec.train_problems,
                vocabulary=spec.vocabulary,
                run=spec.run,
                secret=os.urandom(32),
                sources=sources_of(folder, settings),
            )
            if spec.task_digest:
                core.attendance.welcome = make_welcome(
                    folder,
                    settings,
                    task_digest=spec.task_digest,
                    segment=spec.segment,
                    weights=spec.weights_endpoint,
                )
            run_buffer(folder, settings, core, spec.endpoint, spec.version, activity)

    run_process(spec, work)


if __name__ == "__main__":
    main(read_spec(BufferSpec))
