"""The child process that runs reasoning-gym. worker.py starts it as a script; it is never imported.

It reads one question a line, `{"generator": [...], "index": i}`, and writes that problem; with an `answer` beside them
it writes the score of the answer, without an `index` it only makes the generator.

A process of its own has two reasons: some generators walk through sets of strings, whose order Python salts in every
process, and some scores let sympy read what the policy wrote, which may take for ever. A timer of the kernel is set
before each answer, so one that takes too long ends this process whatever Python is doing.
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


@lru_cache(16)
def make(chosen: str) -> Any:
    """The generator that `chosen` describes, [name, settings, seed, size] in JSON."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    name, config, seed, size = json.loads(chosen)
    if name == "composite":
        specs = [DatasetSpec(**{"weight": 1.0, "config": {}, **spec}) for spec in config.get("datasets") or []]
        config = {**config, "datasets": specs}
    return reasoning_gym.create_dataset(name, **{"seed": seed, "size": size, **config})


@lru_cache(CACHED)
def entry(chosen: str, index: int) -> Any:
    """The problem `index` of that generator."""
    dataset = make(chosen)
    random.seed(index)  # some generators draw from the global one
    return dataset[index]


def answer_to(asked: dict[str, Any]) -> dict[str, Any]:
    """What the parent asks for."""
    chosen = json.dumps(asked["generator"])
    if "index" not in asked:
        make(chosen)
        return {}
    found = entry(chosen, asked["index"])
    if "answer" in asked:
        return {"score": float(make(chosen).score_answer(asked["answer"], found))}
    source = found["metadata"].get("source_dataset", asked["generator"][0])
    return {"question": found["question"], "answer": found["answer"], "source": source}


def serve() -> None:
    """Answer until the end of the input."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the package prints must not stand among the answers
    import reasoning_gym  # noqa: F401  # before "ready", so that no answer pays for it

    out.write(json.dumps({"ready": True}) + "\n")
    out.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, asked["limit_s"])
        try:
            answer = answer_to(asked)
        except Exception as error:  # the process boundary: reported to the parent
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        out.write(json.dumps(answer, default=str) + "\n")
        out.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    serve()
