"""Own data: a JSONL file with prompts and answers.

    python 04_own_data.py              # 80 steps, about a minute on a laptop
    python 04_own_data.py 3            # a look at it

Writes 200 words as rows, each with its letters in order as the answer, trains on nine tenths of them and measures on
the rest. The same works for any file of rows (JSONL, CSV, Parquet, ...) with a real model: name its fields, its reward
(`exact`, `numeric`, `math` or a function) and the folder of the model.
"""

import itertools
import json
import sys
from pathlib import Path

import async_rl as ar

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 80


def write_rows(path: Path) -> None:
    words = ["".join(letters) for letters in itertools.product("abcdef", repeat=3)][:200]
    rows = [{"word": f"{word}=", "in_order": "".join(sorted(word)) + "."} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CONFIG = {
    "name": "own-data",
    "model": {"path": "models/letters"},
    "task": {
        "name": "dataset",
        "args": {
            "path": "words.jsonl",
            "prompt_field": "word",
            "answer_field": "in_order",
            "reward": "exact",  # the completion must be the answer
            "eval_share": 0.1,
            "as_chat": False,  # this model knows no chat
            "stop": ["."],
            "max_tokens": 4,
        },
    },
    "recipe": "grpo",
    "batch": {"groups_per_step": 8, "group_size": 16},
    "trainer": {"steps": STEPS},
    "optimizer": {"learning_rate": 3e-4, "warmup_steps": 5, "schedule": "linear"},
    "evaluation": {"problems": 20, "samples": 8},
}

if __name__ == "__main__":
    write_rows(Path("words.jsonl"))
    if not Path("models/letters").exists():
        task = {"name": "sort", "args": {"length": 3, "alphabet_size": 6}}
        ar.init_model("models/letters", task, until=0.2, max_steps=5 * STEPS)
    run = ar.train(CONFIG)
    right = [row for row in run.trajectories if row["split"] == "eval" and row["reward"] == 1.0]
    print(f"{len(right)} right answers to held-out questions in all evaluations")
    print(f"right: {run.summary['reward_eval_first']:.0%} before, {run.summary['reward_eval_last']:.0%} after")
