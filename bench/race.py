"""async_rl beside what one would use instead: the same machine, model, rows, samples, learning rate. One command.

    python bench/race.py [--work small|vowels|smollm2] [--steps N] [--rounds R] [--only NAME ...] [--smollm2 FOLDER]
                         [--learning-rate X] [--target REWARD] [--passive]

Contestants, one at a time, each in processes of its own on all cores:
- async_rl: generator and trainer side by side, `recipe=grpo`, max_staleness 2, sequences of two batches at once,
  everything else as it is by default
- sync: the same with max_staleness=0, sequences of one batch
- trl: GRPOTrainer (`make foreign` fetches it), see bench/race_trl.py
- plain: a straight loop of torch and transformers, bench/race_plain.py
verl 0.9.1 has a name for the CPU (`trainer.device`), but does not run on one: its rollouts are servers of vLLM, SGLang
or TensorRT-LLM and no others (verl/workers/rollout/base.py; that of transformers is no longer among them), and
the pool of its workers counts GPUs or NPUs in ray and raises ValueError where there are fewer than asked for
(single_controller/ray/base.py, _check_resource_available), one at least a worker.

Work loads, both float32:
- small: 0.86 M parameters (4 layers of 128), 8 groups of 8 samples of at most 32 tokens behind prompts of 32
- vowels: the same, with a reward that each contestant learns within its steps (the share of vowels), for the time to
  a reward; letters in reverse, the reward of `small`, are not learned in sixty steps by anybody
- smollm2: SmolLM2-135M-Instruct (`make models/smollm2`), 8 groups of 4 samples of at most 16 tokens behind 45

Printed for each: seconds a step and trained tokens a second (medians of the steady steps: the first third is left
out), processor seconds a step, the most memory of all its processes (proportional set size), and with `--target` the
seconds until five steps in a row have that mean reward. With `--rounds` contestants take turns, and ratios are medians
of those within a round. Wall time means what it says only where nothing else runs; processor time is printed beside it.
On a machine that other work keeps busy use `--passive`: threads of TRL and the plain loop that wait for each other give
their cores away, as async_rl's always do; spinning, as is torch's way, they take several times as long there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from race_reward import VOWELS

HERE = Path(__file__).resolve().parent
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One work load."""

    groups: int
    group_size: int
    max_tokens: int
    learning_rate: float
    steps: int
    target: float | None = None
    """reward whose time is looked for"""


WORKS = {
    "small": Work(groups=8, group_size=8, max_tokens=32, learning_rate=5e-4, steps=60),
    "vowels": Work(groups=8, group_size=8, max_tokens=32, learning_rate=1e-3, steps=60, target=0.8),
    "smollm2": Work(groups=8, group_size=4, max_tokens=16, learning_rate=1e-5, steps=6),
}
CONTESTANTS = ("async_rl", "sync", "trl", "plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one contestant did in one round."""

    step_s: float
    tokens_s: float
    processor_s: float
    """a step, of all processes"""
    peak_mb: float
    reward: float
    """mean of the last third"""
    target_s: float | None


def rows_of(work: str) -> list[dict[str, Any]]:
    """Prompts and answers, made from a fixed seed."""
    draw, made = random.Random(0), []
    for _ in range(ROWS):
        if work != "smollm2":
            text = "".join(draw.choices(LETTERS, k=31))
            made.append({"prompt": f"{text}=", "answer": text[::-1] if work == "small" else VOWELS})
        else:
            a, b = draw.randint(10, 99), draw.randint(10, 99)
            chat = [{"role": "user", "content": f"What is {a} + {b}? Give only the number."}]
            made.append({"prompt": chat, "answer": str(a + b)})
    return made


def settings_of(name: str, work: str, model: Path, rows: Path, chosen: Work) -> dict[str, Any]:
    """async_rl's settings."""
    batches = 1 if name == "sync" else 2  # a step of the engine reads all weights, for however many sequences
    return {
        "name": name,
        "model": {"path": str(model)},
        "task": {
            "name": "dataset",
            "args": {
                "path": str(rows),
                "eval_share": 0.01,
                "as_chat": work == "smollm2",
                "reward": f"{HERE / 'race_reward.py'}:score",
                "max_tokens": chosen.max_tokens,
            },
        },
        "recipe": {"name": "grpo"},
        "batch": {"groups_per_step": chosen.groups, "group_size": chosen.group_size},
        "staleness": {"max_staleness": 0 if name == "sync" else 2},
        "generator": {"max_sequences": chosen.groups * chosen.group_size * batches, "max_context": 128},
        "trainer": {"steps": chosen.steps},
        "optimizer": {"learning_rate": chosen.learning_rate, "warmup_steps": 0},
        "evaluation": {"every": 0, "problems": 8, "samples": 1},
        "checkpoint": {"every": 0},
    }


def steps_of_run(folder: Path) -> Iterator[dict[str, float]]:
    """Of async_rl's metric rows: what the others write themselves."""
    before = None
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if before is not None:
            yield {
                "time": row["time"],
                "seconds": row["time"] - before,
                "tokens": row["tokens/trained"],
                "reward": row["reward/mean"],
            }
        before = row["time"]


def race(name: str, work: str, model: Path, chosen: Work, place: Path, target: float | None) -> Result:
    """Run one contestant to its end."""
    place.mkdir(parents=True)
    rows, out = place / "rows.jsonl", place / "steps.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(work)))
    environment = dict(os.environ) | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    own = name in ("async_rl", "sync")
    if own:
        config = place / "config.yaml"
        config.write_text(yaml.safe_dump(settings_of(name, work, model, rows, chosen)))
        command = ["-m", "async_rl", "run", str(config), "--run-dir", str(place / "run")]
    else:
        command = [str(HERE / f"race_{name}.py"), str(model), str(rows), str(out), json.dumps(asdict(chosen))]
    with (place / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)
        watch = Watch(process.pid)
        watch.start()
        try:
            process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
            watch.ended.set()
            watch.join()
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{(place / 'log').read_text()[-3000:]}")
    steps = list(steps_of_run(place / "run")) if own else [json.loads(x) for x in out.read_text().splitlines()]
    steady = steps[max(1, len(steps) // 3) :]
    return Result(
        step_s=statistics.median(step["seconds"] for step in steady),
        tokens_s=statistics.median(step["tokens"] / step["seconds"] for step in steady),
        processor_s=watch.processor_between(steps[-len(steady) - 1]["time"], steps[-1]["time"]) / len(steady),
        peak_mb=watch.peak / 1e6,
        reward=statistics.fmean(step["reward"] for step in steady),
        target_s=None if target is None else seconds_to(steps, target),
    )


def seconds_to(steps: Sequence[dict[str, float]], target: float) -> float | None:
    """Seconds from the first step on until five in a row have a mean reward of `target`."""
    passed = 0.0
    for i, step in enumerate(steps):
        passed += step["seconds"]
        last = steps[max(0, i - 4) : i + 1]
        if len(last) == 5 and statistics.fmean(s["reward"] for s in last) >= target:
            return passed
    return None


class Watch(threading.Thread):
    """Watches memory and processor time of a process and all that it has started."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.ended = pid, 0, threading.Event()
        self.seen: list[tuple[float, float]] = []
        """(clock, processor seconds so far)"""

    def run(self) -> None:
        while not self.ended.wait(0.3):
            pids = family(self.pid)
            self.seen.append((time.time(), sum(map(processor, pids))))
            self.peak = max(self.peak, sum(map(held, pids)))

    def processor_between(self, begin: float, end: float) -> float:
        """Processor seconds between two times of the clock."""
        return self._at(end) - self._at(begin)

    def _at(self, when: float) -> float:
        before, used = self.seen[0]
        for clock, now in self.seen:
            if clock >= when:
                return used + (now - used) * (when - before) / max(1e-9, clock - before)
            if now >= used:  # a process that has just ended is not counted any more
                before, used = clock, now
        return used


def family(pid: int) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += family(int(child))
    return found


def processor(pid: int) -> float:
    """Processor seconds of a process so far; 0 for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def held(pid: int) -> int:
    """Bytes of memory, those shared with others counted in part; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def make_small(folder: Path) -> Path:
    from async_rl.model.create import create_model_folder

    create_model_folder(folder, alphabet=LETTERS + "=", layers=4, kv_heads=4)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS, default="small")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--smollm2", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--learning-rate", type=float, default=0.0)
    parser.add_argument("--target", type=float, default=None)
    parser.add_argument("--passive", action="store_true")
    arguments = parser.parse_args()
    if arguments.passive:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    usual = WORKS[arguments.work]
    chosen = replace(
        usual,
        learning_rate=arguments.learning_rate or usual.learning_rate,
        steps=arguments.steps or usual.steps,
    )
    results: dict[str, list[Result]] = {name: [] for name in arguments.only}
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        place = Path(name)
        model = arguments.smollm2.resolve() if arguments.work == "smollm2" else make_small(place / "model")
        print(f"{'':10}  s/step  tokens/s  processor s/step  peak MB  reward  s to target", flush=True)
        for number in range(arguments.rounds):
            for contestant in arguments.only:
                found = race(
                    contestant, arguments.work, model, chosen, place / str(number) / contestant,
                    usual.target if arguments.target is None else arguments.target,
                )  # fmt: skip
                results[contestant].append(found)
                print(line(contestant, found), flush=True)
    if "async_rl" in results:
        for other in results:
            if other != "async_rl":
                print(f"{other} / async_rl: {ratio(results, other, 'step_s'):.2f} x a step, "
                      f"{ratio(results, other, 'processor_s'):.2f} x processor time")  # fmt: skip
    print(json.dumps({"work": arguments.work, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
                      "time": time.strftime("%Y-%m-%d %H:%M")}))  # fmt: skip


def line(name: str, found: Result) -> str:
    when = "" if found.target_s is None else f"{found.target_s:.1f}"
    return (
        f"{name:10}  {found.step_s:6.3f}  {found.tokens_s:8.0f}  {found.processor_s:16.3f}  {found.peak_mb:7.0f}  "
        f"{found.reward:6.3f}  {when}"
    )


def ratio(results: dict[str, list[Result]], other: str, what: str) -> float:
    pairs = zip(results[other], results["async_rl"], strict=True)
    return statistics.median(getattr(theirs, what) / getattr(ours, what) for theirs, ours in pairs)


if __name__ == "__main__":
    main()
