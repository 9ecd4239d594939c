"""Everything about one GPU, section by section: a table in Markdown, kept even when a part fails.

    python bench/gpu.py --results FOLDER [--size 0.6B] [--engine vllm] [--minutes 7.5] [--only engine,trainer]
    python bench/gpu.py --fake-model          # the same on a CPU with a tiny model, in a minute: proves the script

A Qwen3 of `--size` with random weights, made here (no network). vLLM and trainer share one GPU. Each section runs in
a process of its own for at most LIMITS seconds, leaves FOLDER/SECTION.json, and prints it in one line; what is not done
by then says "not measured" and why. Sections that have been measured are not measured again, so several short calls
fill one table. Numbers of two kinds of GPU are not mixed: those of the other kind stay, in files of their own. The most
worth first:

kernels       the Triton kernels against their definition, forward and backward
engine        tokens/s of the engine alone, seconds of a weight update, log-probs against the trainer's
trainer       tokens/s of the training step alone, peak memory, beside the estimate of `async-rl config`
asynchronous  a run of real processes: tokens/s generated and trained, weight update, waiting on each side, canary
synchronous   the same run with max_staleness=0
logprob       rate and memory of the fused log-probs beside three products, Liger, torch.compile and full logits
head          log-probs of the engine whose logits are rounded to bfloat16 (vllm.head_dtype=model)
publication   weights of 7B out of the GPU: cast there and copied into pinned memory, and as torch copies by itself
opob          a step with exact baselines beside one with the mean of each group, 1.5B
Without vLLM installed the embedded engine is measured on the GPU instead, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

SIZES: dict[str, dict[str, Any]] = {
    "0.6B": {"hidden": 1024, "intermediate": 3072, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128},
    "1.7B": {"hidden": 2048, "intermediate": 6144, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128},
    "tiny": {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16},
}
VOCABULARY = {"tiny": 512}
"""others have Qwen3's 151,936"""
LIMITS = {
    "model": 40.0, "kernels": 100.0, "engine": 100.0, "trainer": 60.0, "asynchronous": 100.0, "synchronous": 80.0,
    "logprob": 90.0, "head": 90.0, "publication": 45.0, "opob": 100.0,
}  # fmt: skip
"""section -> most seconds, in the order of their worth"""
LEAST_S = 5.0
"""with less time left no section is begun"""
SKIPPED = 2
"""steps at the start of a run that are not counted"""
END_S = 15.0
"""time a run gets to end when its budget is used up"""


@dataclass(frozen=True)
class Shape:
    """Of the work: small on a CPU."""

    groups: int
    group_size: int
    tokens: int
    """of each answer"""
    sequences: int
    micro_batch: int
    steps: int


ON_GPU = Shape(groups=16, group_size=16, tokens=512, sequences=256, micro_batch=16384, steps=400)
ON_CPU = Shape(groups=4, group_size=4, tokens=32, sequences=16, micro_batch=2048, steps=8)


@dataclass(frozen=True)
class Plan:
    """What is measured, where."""

    size: str
    device: str
    engine: str
    recipe: str
    folder: Path
    limit_s: float = 0.0
    """of the section"""

    @property
    def shape(self) -> Shape:
        return ON_GPU if self.device == "cuda" else ON_CPU

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def settings(self, *, max_staleness: int) -> dict[str, Any]:
        """Of a run, as its YAML."""
        shape, cuda = self.shape, self.device == "cuda"
        data = {"path": str(ROOT / "configs/data/word_problems.jsonl"), "reward": "numeric", "max_tokens": shape.tokens}
        values: dict[str, Any] = {
            "name": "gpu",
            "model": {"path": str(self.model)},
            # coins for rewards: random weights earn none, and without a gradient nothing would be measured
            "task": {"name": "rehearsed", "args": {"name": "dataset", "args": data, "max_tokens": shape.tokens}},
            "recipe": {"name": self.recipe},
            "batch": {"groups_per_step": shape.groups, "group_size": shape.group_size},
            "staleness": {"max_staleness": max_staleness, "pipeline_depth": 2 if max_staleness else 0},
            "generator": {
                "engine": self.engine, "device": self.device, "dtype": "bfloat16" if cuda else "float32",
                "max_sequences": shape.sequences, "max_context": 2 * shape.tokens + 512,
            },
            "trainer": {
                "steps": shape.steps, "device": self.device, "dtype": "bfloat16" if cuda else "float32",
                "micro_batch_tokens": shape.micro_batch,
            },
            "optimizer": {"learning_rate": 1e-7, "warmup_steps": 0},  # episodes keep their lengths
            "evaluation": {"every": 0, "problems": 1, "samples": 1},
            "checkpoint": {"every": 0},
        }  # fmt: skip
        if cuda:
            values["trainer"] |= {"memory_share": 0.55, "gpus": "0"}
            values["generator"]["gpus"] = "0"
        if cuda and self.engine == "vllm":
            values["vllm"] = {"memory_share": 0.4}
        return values


def main() -> None:
    arguments = parser().parse_args()
    if arguments.section:  # in a process of its own
        from gpu_sections import SECTIONS

        plan = Plan(**{**json.loads(arguments.plan), "folder": Path(json.loads(arguments.plan)["folder"])})
        print(json.dumps(SECTIONS[arguments.section](plan)), flush=True)
        return
    end = time.monotonic() + 60 * arguments.minutes
    only = [word for word in arguments.only.split(",") if word]
    if unknown := set(only) - set(LIMITS):
        sys.exit(f"there is no section {sorted(unknown)}; there are {list(LIMITS)}")
    command = " ".join(["python", "bench/gpu.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="async-rl-gpu-") as name:
        table = Table(command=command, out=arguments.out, results=arguments.results or Path(name) / "results")
        plan = plan_of(arguments, Path(name), table)
        table.resume()
        if plan is None:
            table.write()
            sys.exit("no GPU here: every row is not measured (--fake-model proves the script on a CPU)")
        for section, limit in LIMITS.items():
            if section != "model" and (table.has(section) or (only and section not in only)):
                continue
            budget = min(limit, end - time.monotonic())
            if budget < LEAST_S:
                continue
            started = time.monotonic()
            try:
                found = measured(section, plan, budget)
            except (OSError, RuntimeError, ValueError, KeyError, subprocess.SubprocessError) as error:
                found = {"not measured": f"{type(error).__name__}: {error}"[:400]}
            table.add(section, found, seconds=time.monotonic() - started)
            if section == "model" and "not measured" in found:
                break
    table.write()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--size", choices=[size for size in SIZES if size != "tiny"], default="0.6B")
    made.add_argument("--engine", choices=["vllm", "embedded"], default="vllm")
    made.add_argument("--recipe", default="grpo", help="e.g. vcpo, whose exact baseline costs more (default grpo)")
    made.add_argument("--minutes", type=float, default=7.5, help="for everything (default 7.5)")
    made.add_argument("--only", default="", help="sections, with commas (default: all that are not measured yet)")
    made.add_argument("--results", type=Path, help="folder of a JSON file for each section; it may have some already")
    made.add_argument("--out", type=Path, help="Markdown file that is written after each section")
    made.add_argument("--fake-model", action="store_true", help="a tiny model on CPU, one minute")
    made.add_argument("--section", help=argparse.SUPPRESS)
    made.add_argument("--plan", help=argparse.SUPPRESS)
    return made


def plan_of(arguments: argparse.Namespace, folder: Path, table: Table) -> Plan | None:
    """None without a GPU."""
    import torch

    engine = arguments.engine
    if arguments.fake_model:
        table.say("device", f"{platform.processor() or 'CPU'} (a rehearsal: numbers mean nothing)")
        table.say("engine", "embedded")
        return Plan(size="tiny", device="cpu", engine="embedded", recipe=arguments.recipe, folder=folder)
    if not torch.cuda.is_available():
        return None
    size = torch.cuda.get_device_properties(0).total_memory / 2**30
    table.say("device", f"{torch.cuda.get_device_name()}, {size:.0f} GB")
    if engine == "vllm" and find_spec("vllm") is None:
        engine = "embedded"
        table.say("engine", "embedded, on the GPU: vLLM is not installed")
    else:
        table.say("engine", f"{engine} {version('vllm') if engine == 'vllm' else ''}".strip())
    table.say("model", f"Qwen3 of {arguments.size}, random weights, bfloat16 arithmetic")
    return Plan(size=arguments.size, device="cuda", engine=engine, recipe=arguments.recipe, folder=folder)


def measured(section: str, plan: Plan, budget: float) -> dict[str, Any]:
    """One section within `budget` seconds. Raises RuntimeError with its last words when it fails."""
    if section in ("asynchronous", "synchronous"):
        return run(section, plan, budget)
    said = json.dumps({**plan.__dict__, "folder": str(plan.folder), "limit_s": budget})
    command = [sys.executable, str(Path(__file__)), "--section", section, "--plan", said]
    with (plan.folder / f"{section}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        try:
            out, _ = process.communicate(timeout=budget)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise RuntimeError(f"not done within {budget:.0f} s; {tail(plan.folder / f'{section}.log')}") from None
    if process.returncode:
        raise RuntimeError(tail(plan.folder / f"{section}.log"))
    found: dict[str, Any] = json.loads(out.decode().strip().splitlines()[-1])
    return found


def run(section: str, plan: Plan, budget: float) -> dict[str, Any]:
    """A run of real processes, stopped by Ctrl-C when the budget is used up."""
    from gpu_sections import rows_of, summed_up

    folder, config = plan.folder / section, plan.folder / f"{section}.yaml"
    config.write_text(json.dumps(plan.settings(max_staleness=2 if section == "asynchronous" else 0)))  # YAML, too
    command = [sys.executable, "-m", "async_rl", "run", str(config), "--run-dir", str(folder), "--quiet"]
    with (plan.folder / f"{section}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        peak = watch_memory(process, budget - END_S) if plan.device == "cuda" else None
        try:
            process.wait(max(1.0, budget - END_S) if peak is None else 0.1)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    rows = rows_of(folder)
    if len(rows) <= SKIPPED + 1:
        raise RuntimeError(f"only {len(rows)} steps within {budget:.0f} s; {tail(plan.folder / f'{section}.log')}")
    found = summed_up(rows, SKIPPED)
    if peak is not None:
        found["memory used on the GPU by both, GB"] = peak
    shutil.rmtree(folder, ignore_errors=True)
    return found


def watch_memory(process: subprocess.Popen[bytes], seconds: float) -> float:
    """Most GB in use on the first GPU while it runs, for so long at most."""
    most, end = 0.0, time.monotonic() + seconds
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    while process.poll() is None and time.monotonic() < end:
        done = subprocess.run(ask, capture_output=True, text=True, check=False) if shutil.which(ask[0]) else None
        if done is not None and done.stdout.strip().isdecimal():
            most = max(most, int(done.stdout) / 1024)
        time.sleep(1.0)
    return round(most, 1)


def tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return " | ".join(lines[-3:])[-300:] or "it left no word"


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def read_row(file: Path) -> dict[str, Any] | None:
    """None for what is no row."""
    try:
        row: dict[str, Any] = json.loads(file.read_text())
    except (ValueError, OSError):
        return None
    return row if {"section", "device", "found"} <= row.keys() else None


class Table:
    """Rows in order; written anew after each section."""

    def __init__(self, command: str, out: Path | None, results: Path) -> None:
        import torch
        from overlap import commit

        self._out, self._results = out, results
        results.mkdir(parents=True, exist_ok=True)
        self._rows: list[tuple[str, str]] = []
        self._found: dict[str, dict[str, Any]] = {}
        self._head = {
            "command": f"`{command}`", "commit": commit() or "not known", "torch": torch.__version__,
            "python": platform.python_version(), "vllm": version("vllm"),
        }  # fmt: skip

    def say(self, name: str, value: str) -> None:
        self._head[name] = value

    def resume(self) -> None:
        """Take over what earlier calls measured on this device: the numbers of two cards are not comparable, and those
        of a rehearsal mean nothing. Without a device: what was measured on the one that left most."""
        rows = [row for row in map(read_row, self._results.glob("*.json")) if row is not None]
        if rows and "device" not in self._head:
            self._head["device"] = Counter(row["device"] for row in rows).most_common(1)[0][0]
        for row in rows:
            if row["device"] == self._head["device"]:
                self._found[row["section"]] = row["found"]

    def has(self, section: str) -> bool:
        """Whether it was measured, here or in an earlier call."""
        return section in self._found and "not measured" not in self._found[section]

    def add(self, section: str, found: dict[str, Any], *, seconds: float) -> None:
        if section == "model" and "not measured" not in found and self.has(section):
            return  # it is made anew for each call
        self._found[section] = found
        row = json.dumps({"section": section, "seconds": round(seconds, 1), **self._head, "found": found})
        self._keep(section, row + "\n")
        print(row, file=sys.stderr, flush=True)
        if self._out is not None:
            self._out.write_text(self.text())

    def _keep(self, section: str, row: str) -> None:
        """Whole or not at all: a loan may end at any moment. What another device left keeps a file of its own."""
        file = self._results / f"{section}.json"
        before = read_row(file) if file.exists() else None
        if before is not None and before["device"] != self._head["device"]:
            other = "".join(letter if letter.isalnum() else "-" for letter in before["device"])
            file.rename(file.with_suffix(f".{other}.json"))
        partial = file.with_suffix(".partial")
        partial.write_text(row)
        partial.replace(file)

    def text(self) -> str:
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self._head.items()), ""]
        lines += ["| section | what | result |", "|---|---|---|"]
        for section in LIMITS:
            found = self._found.get(section) or {"not measured": "no GPU, no time left, or an earlier section failed"}
            for name, value in found.items():
                lines.append(f"| {section} | {name} | {shown(value)} |")
        faster = [self._found.get(name, {}).get("seconds a step") for name in ("synchronous", "asynchronous")]
        ratio = f"{faster[0] / faster[1]:.2f} x" if all(faster) else "not measured"
        return "\n".join([*lines, f"| both | asynchronous is faster by | {ratio} |", ""])

    def write(self) -> None:
        print(self.text())
        if self._out is not None:
            self._out.write_text(self.text())


if __name__ == "__main__":
    main()
