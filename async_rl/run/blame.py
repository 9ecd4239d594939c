"""Whose code ended a generator: read from what the process left (`blame`), its marks and the stacks of its threads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from async_rl.generator.step_mark import Marks
from async_rl.wire.heartbeat import in_user_code, is_ours, place_in_dump, threads_in_dump

_CRASHED = "Fatal Python error:"
_CURRENT = re.compile(r"^Current thread 0x([0-9a-f]+)", re.MULTILINE)
IDLE = ("threading.py", "queue.py", "selectors.py", "concurrent/futures/thread.py")
"""ends of the files in which a thread of Python stands that waits for work"""

RUNS_IT = "async_rl/generator/step_mark.py"
"""calls code of a task in a thread (`MarkedThreads`)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """What is known of the code that ended a process."""

    groups: tuple[int, ...] = ()
    """the group whose code it was; several: it was one of them; none: nobody's, as far as is known"""
    place: str = ""
    """file, line and function, where they are known"""


def blame(marks: Marks, *, frozen: str | None = None, stacks: str = "", recorded: bool = False) -> Blame:
    """Whose code a process ran that crashed, froze or ended by `os._exit`.

    Args:
        frozen: the stacks of a process that was silent for too long; None: it ended by itself.
        stacks: what faulthandler had written when it ended.
        recorded: it told why it ended, as only our own code does.
    """
    _, crashed, dump = stacks.rpartition(_CRASHED)
    dump = frozen if frozen is not None else dump if crashed else ""
    current = _CURRENT.search(dump) if frozen is None else None
    crashed_in = [int(current[1], 16)] if current is not None else []
    place = place_in_dump(dump, crashed_in) if dump else ""
    if marks.step >= 0:
        return Blame(groups=(marks.step,), place=place)
    if recorded or not marks.held:
        return Blame()
    everyone = tuple(dict.fromkeys(group for group, _ in marks.held))
    if not dump:  # nothing is known of a process that could not even write its stacks
        return Blame(groups=everyone) if frozen is None and not crashed else Blame()
    found = threads_in_dump(dump)
    if frozen is None:
        found = {thread: frames for thread, frames in found.items() if thread in crashed_in}
    busy = {thread for thread, frames in found.items() if _is_the_tasks(frames)}
    sure = tuple(dict.fromkeys(group for group, thread in marks.held if thread in busy))
    if sure:
        return Blame(groups=sure, place=place_in_dump(dump, busy))
    return Blame(groups=everyone, place=place_in_dump(dump, busy)) if busy else Blame()


def _is_the_tasks(frames: list[tuple[str, int, str]]) -> bool:
    """Whether a thread with these frames, the innermost first, runs code of a task."""
    if any(in_user_code(*frame) for frame in frames):
        return True
    ours = any(is_ours(file) and not file.endswith(RUNS_IT) for file, _, _ in frames)
    return bool(frames) and not frames[0][0].endswith(IDLE) and not ours
