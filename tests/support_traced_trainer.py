"""The trainer of an external run, one step of it traced. `python -m support_traced_trainer RUN STEP OUT`

OUT gets {file: [functions]} as JSON: what of this project ran between asking for the batch of STEP and having its
weights published.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import async_rl
import async_rl_kernels
from async_rl.run.join_trainer import train_for
from async_rl.trainer import loop

ROOTS = tuple(str(Path(str(package.__file__)).parent) for package in (async_rl, async_rl_kernels))


class Tracer:
    """Counts calls into files of this project, in the thread that trains."""

    def __init__(self, step: int, out: Path) -> None:
        self.step = step
        self.out = out
        self.called: dict[str, set[str]] = defaultdict(set)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOTS):
            self.called[frame.f_code.co_filename].add(frame.f_code.co_qualname)

    def install(self) -> None:
        receive, publish = loop.TrainerLoop.receive, loop.TrainerLoop.publish

        def traced_receive(itself: loop.TrainerLoop, number: int) -> loop.Step:
            if number == self.step:
                sys.setprofile(self)
            return receive(itself, number)

        def traced_publish(itself: loop.TrainerLoop, step: loop.Step) -> None:
            publish(itself, step)
            if step.number == self.step:
                sys.setprofile(None)
                self.out.write_text(json.dumps({name: sorted(found) for name, found in self.called.items()}))

        loop.TrainerLoop.receive, loop.TrainerLoop.publish = traced_receive, traced_publish  # type: ignore[method-assign]


if __name__ == "__main__":
    Tracer(int(sys.argv[2]), Path(sys.argv[3])).install()
    train_for(Path(sys.argv[1]))
