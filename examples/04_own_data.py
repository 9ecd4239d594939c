"""Own data: a JSONL file with prompts and answers.

    python 04_own_data.py              # 80 steps, about a minute on a laptop
    python 04_own_data.py 3            # a look at it

Writes 200 sums as rows, trains on nine tenths of them and measures on the rest. The same works for any file of rows
(JSONL or Parquet) with a real model: name its fields, its reward (`exact`, `numeric`, `math` or a function) and the
folder of the model.
"""

import json
import sys
from pathlib import Path

import async_rl as ar

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 80


def write_rows(path: Path) -> None:
    rows = [{"question": f"{a}+{b}=", "result": a + b} for a in range(20) for b in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CONFIG = {
    "name": "own-data",
    "model": {"path": "models/sums"},
    "task": {
        "name": "dataset",
        "args": {
            "path": "sums.jsonl",
            "prompt_field": "question",
            "answer_field": "result",
            "reward": "numeric",  # the last number of the completion must be the answer
            "eval_share": 0.1,
            "as_chat": False,  # this model knows no chat
            "stop": ["."],
            "max_tokens": 4,
        },
    },
    "recipe": "grpo",
    "batch": {"groups_per_step": 16, "group_size": 8},
    "trainer": {"steps": STEPS},
    "optimizer": {"learning_rate": 6e-4, "warmup_steps": 5},
    "evaluation": {"problems": 20, "samples": 8},
}

if __name__ == "__main__":
    write_rows(Path("sums.jsonl"))
    if not Path("models/sums").exists():
        ar.init_model("models/sums", "arithmetic", until=0.05, max_steps=5 * STEPS)
    run = ar.train(CONFIG)
    right = [row for row in run.trajectories if row["split"] == "eval" and row["reward"] == 1.0]
    print(f"{len(right)} right answers to held-out questions in all evaluations")
    print(f"right: {run.summary['reward_eval_first']:.0%} before, {run.summary['reward_eval_last']:.0%} after")
