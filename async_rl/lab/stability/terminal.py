"""A lab in the terminal: one line a finished cell, a bar, the tables at the end."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console as RichConsole

from async_rl.lab.stability.lab import Progress
from async_rl.lab.stability.merit import Merit
from async_rl.lab.stability.table import cell_line, merit_lines, rate_lines
from async_rl.observe.progress import progress_bar


class Terminal:
    """Give its `show` to `run_lab`. Use it in a `with`."""

    def __init__(self) -> None:
        self._out = RichConsole(highlight=False)
        self._bar = progress_bar(self._out)
        self._task = self._bar.add_task("initial models", total=None)
        self._steps: dict[str, str] = {}
        """running cells and the steps they have done"""

    def say(self, text: str) -> None:
        self._out.print(text, markup=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        match progress.kind:
            case "finished" | "failed":
                assert progress.record is not None
                self._steps.pop(progress.name, None)
                self.say(f"[{progress.done}/{progress.total}] {cell_line(progress.record)}")
            case "models" | "skipped" | "note":
                self.say(progress.text)
            case "started":
                self._steps[progress.name] = "0"
            case "step":
                self._steps[progress.name] = progress.text
        if progress.total:
            running = ", ".join(sorted(f"step {step}" for step in self._steps.values()))
            self._bar.update(
                self._task, completed=progress.done, total=progress.total, description=f"cells ({running})"
            )

    def summary(self, merits: Iterable[Merit]) -> None:
        found = list(merits)
        for line in [*rate_lines(found), *merit_lines(found)]:
            self.say(line)

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
