"""The child process that runs reasoning-gym. worker.py starts it as a script; it is never imported.

It reads `{"index": i}` or `{"index": i, "answer": text}` a line and writes the problem or its score. Why a process of
its own: some generators walk through sets of strings, whose order Python salts in every process, and some scores let
sympy read what the policy wrote, which may take for ever. Before each answer it sets a kernel alarm with the default
action, so one that takes too long ends this process whatever Python is doing.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

MEMORY_BYTES = 8 << 30
"""largest address space of this process"""
CACHED = 4096
"""problems kept: the samples of a group are scored one after the other"""


def make(name: str, config: dict[str, Any], seed: int, size: int) -> Any:
    """The generator `name` of reasoning-gym."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    if name == "composite":
        specs = [DatasetSpec(**{"weight": 1.0, "config": {}, **spec}) for spec in config.get("datasets") or []]
        config = {**config, "datasets": specs}
    return reasoning_gym.create_dataset(name, **{"seed": seed, "size": size, **config})


def serve(deadline_s: int, name: str, config: dict[str, Any], seed: int, size: int) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the package prints must not stand among the answers

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer, default=str) + "\n")
        out.flush()

    try:
        dataset = make(name, config, seed, size)
    except Exception as error:  # of the package, about settings of the user's
        say({"error": f"{type(error).__name__}: {error}"[:1000]})
        return

    @lru_cache(CACHED)
    def entry(index: int) -> Any:
        random.seed(f"{seed}/{index}")  # some generators draw from the global one
        return dataset[index]

    say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        signal.alarm(deadline_s)
        try:
            found = entry(asked["index"])
            if "answer" in asked:
                answer = {"score": float(dataset.score_answer(asked["answer"], found))}
            else:
                source = found["metadata"].get("source_dataset", name)
                answer = {"question": found["question"], "answer": found["answer"], "source": source}
        except Exception as error:  # the process boundary: reported to the parent
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        signal.alarm(0)
        say(answer)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    serve(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
