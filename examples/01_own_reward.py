"""Own reward: a function that judges what the model wrote.

    python 01_own_reward.py            # 80 steps, about a minute on a laptop
    python 01_own_reward.py 3          # a look at it

The model is asked for sums. The built-in reward `numeric` says 1 for the right number and 0 for any other; this one
also pays for being near, so that a model which is nearly right learns from it. A reward is any function (or coroutine)
of completion, answer and problem that returns a number.
"""

import json
import sys
from pathlib import Path

import async_rl as ar

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 80


def nearness(completion: str, answer: str, problem: ar.Problem) -> float:
    """1 for the right sum, 1/2 for one beside it, 1/3 for the next, ...; 0 for no number."""
    said = completion.removesuffix(".")
    return 1 / (1 + abs(int(said) - int(answer))) if said.isdecimal() else 0.0


def write_rows(path: Path) -> None:
    """A data set: one JSON object a line, with a prompt and its answer."""
    rows = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(20) for b in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write_rows(Path("sums.jsonl"))
    if not Path("models/sums").exists():  # a small model that has seen a few sums
        ar.init_model("models/sums", "arithmetic", until=0.05, max_steps=5 * STEPS)
    run = ar.train(
        {"name": "own-reward", "model": {"path": "models/sums"}, "recipe": "grpo"},
        task={"name": "dataset", "args": {"path": "sums.jsonl", "as_chat": False, "stop": ["."], "max_tokens": 4}},
        reward=nearness,
        batch={"groups_per_step": 16, "group_size": 8},
        trainer={"steps": STEPS},
        optimizer={"learning_rate": 5e-4, "warmup_steps": 5},
        evaluation={"problems": 20, "samples": 8},
    )
    print(f"nearness to the sum: {run.summary['reward_eval_first']:.2f} -> {run.summary['reward_eval_last']:.2f}")
