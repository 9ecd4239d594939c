"""The child process that runs math-verify. reward.py starts it as a script; it is never imported.

It reads one JSON object a line from standard input and writes one to standard output. Before each verdict it sets a
kernel alarm with the default action, so a verdict that takes too long ends this process whatever Python is doing (a
Python signal handler would wait for the end of a huge power). It ends at the end of its input, so it outlives its
parent by one verdict at most.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

MEMORY_BYTES = 4 << 30
"""largest address space of this process"""


def verdict(completion: str, answer: str) -> float:
    """1.0 when `completion` ends in what `answer` says; ValueError when the answer is not mathematics."""
    from math_verify import parse, verify

    # math-verify searches text for mathematics, so a bare LaTeX answer must be put between dollars
    marked = answer if "$" in answer or "\\boxed" in answer or "\\(" in answer else f"${answer}$"
    gold = parse(marked, parsing_timeout=None)
    if not gold:
        raise ValueError(f"the answer {answer!r} cannot be read as mathematics")
    return float(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


def main(deadline_s: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)  # math-verify warns that its own timeout is off: ours is on
    import math_verify  # noqa: F401  # before "ready", so that no verdict pays for it

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        signal.alarm(deadline_s)
        try:
            answer: dict[str, float | str] = {"score": verdict(asked["completion"], asked["answer"])}
        except Exception as error:  # the process boundary: reported to the parent
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
