"""Own reward: a function that judges what the model wrote.

    python 01_own_reward.py            # 80 steps, about a minute on a laptop
    python 01_own_reward.py 3          # a look at it

The model is asked to sort four letters. The built-in reward `exact` says 1 or 0; this one pays for every letter in its
place, so that a model which is nearly right learns from it. A reward is any function (or coroutine) of completion,
answer and problem that returns a number.
"""

import itertools
import json
import sys
from pathlib import Path

import async_rl as ar

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 80


def in_place(completion: str, answer: str, problem: ar.Problem) -> float:
    """The share of letters that stand where they belong; a wrong length costs as well."""
    said = completion.removesuffix(".")
    return sum(a == b for a, b in zip(said, answer, strict=False)) / max(len(said), len(answer))


def write_rows(path: Path) -> None:
    """A data set: one JSON object a line, with a prompt and its answer."""
    words = ["".join(letters) for letters in itertools.product("abcde", repeat=4)]
    rows = [{"prompt": f"{word}=", "answer": "".join(sorted(word))} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write_rows(Path("words.jsonl"))
    if not Path("models/four_letters").exists():  # a small model that has seen some sorting
        task = {"name": "sort", "args": {"length": 4, "alphabet_size": 5}}
        ar.init_model("models/four_letters", task, until=0.05, max_steps=5 * STEPS)
    run = ar.train(
        {"name": "own-reward", "model": {"path": "models/four_letters"}, "recipe": "grpo"},
        task={"name": "dataset", "args": {"path": "words.jsonl", "as_chat": False, "stop": ["."], "max_tokens": 6}},
        reward=in_place,
        batch={"groups_per_step": 8, "group_size": 16},
        trainer={"steps": STEPS},
        optimizer={"learning_rate": 3e-4, "warmup_steps": 5, "schedule": "linear"},
        evaluation={"problems": 32},
    )
    print(f"letters in place: {run.summary['reward_eval_first']:.2f} -> {run.summary['reward_eval_last']:.2f}")
