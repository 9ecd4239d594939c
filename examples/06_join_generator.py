"""Joining a generator: a second shell helps a run that is under way.

    python 06_join_generator.py        # 200 steps, half a minute on a laptop
    python 06_join_generator.py 400    # longer

Generators come and go while a run goes on. The run begins here with one; a "second shell" joins another with
`async-rl generate --run RUN`, which works from any shell of the machine (for other machines:
docs/howto/other_machines.md). When the run ends, so does the one that joined.
"""

import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import async_rl as ar

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
SORT = {"name": "sort", "args": {"length": 3, "alphabet_size": 6}}
RUN = Path("runs") / time.strftime("joined-%Y%m%d-%H%M%S")


def second_shell() -> None:
    """What you would type in another terminal."""
    while not (RUN / "metrics.jsonl").exists():  # the run has trained its first step
        time.sleep(0.2)
    command = [sys.executable, "-m", "async_rl", "generate", "--run", str(RUN), "--name", "second"]
    print("second shell:", "async-rl", *command[3:], flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print("second shell:", (done.stdout or done.stderr).strip().splitlines()[-1:], flush=True)


if __name__ == "__main__":
    if not Path("models/letters").exists():  # a small model that has seen some sorting
        ar.init_model("models/letters", SORT, until=0.2, max_steps=5 * STEPS)
    shell = threading.Thread(target=second_shell, daemon=True)
    shell.start()
    run = ar.train(
        {"name": "joined", "model": {"path": "models/letters"}, "task": SORT, "recipe": "vcpo"},
        run_dir=RUN,
        batch={"groups_per_step": 8, "group_size": 8},
        trainer={"steps": STEPS},
        optimizer={"learning_rate": 3e-4, "warmup_steps": 5, "schedule": "linear"},
        evaluation={"problems": 16},
        quiet=True,
    )
    shell.join(timeout=30)
    print("trajectories by generator:", dict(Counter(row["generator"] for row in run.trajectories)))
