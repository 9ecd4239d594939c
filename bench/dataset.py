"""How long a data set takes until it is ready, and what it holds. Prints one JSON object.

    python bench/dataset.py [--rows N] [--repeats N] [--folder DIR]

Made-up rows of verl's form (a chat prompt of 30 to 120 words, an answer, three further fields) as JSONL and Parquet,
and the same prompts as plain text; each is loaded in a process of its own, as by each process of a run. Seconds are
the best of all repeats: on a shared machine wall time says little, processor time more. A problem is then asked for in
random order.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

TEXT = """the model learns from problems with a long text that says what is to be found when numbers are given and
nothing else is known about them"""
WORDS = TEXT.split()
PROBE = """
import json, random, resource, sys, time

from async_rl.task import make_task

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

path, args = sys.argv[1], json.loads(sys.argv[2])
make_task("dataset", {"path": sys.argv[3], **args})  # everything is imported then
before, wall, processor = held(), time.perf_counter(), time.process_time()
task = make_task("dataset", {"path": path, **args})
seconds = time.perf_counter() - wall, time.process_time() - processor
problems = task.problems("train")
chosen = random.Random(0).choices(range(len(problems)), k=2000)
begun = time.process_time()
for index in chosen:
    problems[index]
print(json.dumps({
    "seconds": seconds[0],
    "processor seconds": seconds[1],
    "held MB": held() - before,
    "microseconds a problem": (time.process_time() - begun) / len(chosen) * 1e6,
}))
"""


def rows(count: int) -> list[dict[str, Any]]:
    """Rows of verl's form."""
    random = Random(0)
    return [
        {
            "data_source": "made_up",
            "prompt": [
                {"role": "user", "content": f"{i}: " + " ".join(random.choices(WORDS, k=random.randrange(30, 120)))}
            ],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(random.randrange(10**4))},
            "extra_info": {"split": "train", "index": i},
        }
        for i in range(count)
    ]


def write(folder: Path, name: str, made: list[dict[str, Any]]) -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(made), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def measure(path: Path, small: Path, args: dict[str, Any], repeats: int) -> dict[str, float]:
    command = [sys.executable, "-c", PROBE, str(path), json.dumps(args), str(small)]
    found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)]
    return {name: round(min(one[name] for one in found), 3) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=150_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    verl = {"format": "verl", "reward": "numeric"}
    plain = {"reward": "numeric"}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        folder = Path(made)
        chats = rows(arguments.rows)
        texts = [{"prompt": r["prompt"][0]["content"], "answer": r["reward_model"]["ground_truth"]} for r in chats]
        found = {}
        for name, content, args in (
            ("chat.jsonl", chats, verl),
            ("chat.parquet", chats, verl),
            ("text.jsonl", texts, plain),
            ("text.parquet", texts, plain),
        ):
            path, small = write(folder, name, content), write(folder, f"small-{name}", content[:200])
            found[name] = {"MB": round(path.stat().st_size / 1e6, 1), **measure(path, small, args, arguments.repeats)}
        print(json.dumps({"rows": arguments.rows, **found}, indent=1))


if __name__ == "__main__":
    main()
