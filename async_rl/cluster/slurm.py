"""The job of a run for SLURM: two components of one heterogeneous job, the run with its trainer, and the generators."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from async_rl.cluster.demand import Demand
from async_rl.errors import UserError

MARGIN_S = 15
"""between the end of checkpoint.grace_s and SLURM's own end of the job"""
FIRST_PORT, NUM_JOBS = 10_000, 5_000
"""two ports by the number of the job; those behind 20,000 are for the ranks' meeting point (run/join_trainer.py)"""
_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """Where the job waits. Empty: the cluster's default."""

    partition: str = ""
    account: str = ""


def seconds_of(time: str) -> int:
    """Seconds of `HH:MM:SS` or `D-HH:MM:SS`. Raises UserError."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise UserError(f"--time is '{time}'; write hours, minutes and seconds, 12:00:00, with days 2-12:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def slurm_script(run: Demand, queue: Queue, *, file: str, relays: bool) -> str:
    """The text of the batch file `file`. `relays`: one on each node of generators. Raises UserError for what SLURM
    cannot do for the run."""
    warn_s = run.grace_s + MARGIN_S
    if "SIGUSR1" not in run.settings.checkpoint.signals:
        raise UserError("checkpoint.signals must hold SIGUSR1, by which SLURM says that the job's time is over")
    if run.asked.time_s and run.asked.time_s < 2 * warn_s:
        raise UserError(
            f"--time is {run.asked.time_s} s, of which the last {warn_s} s are for the checkpoint (checkpoint.grace_s="
            f"{run.grace_s} and {MARGIN_S} s); ask for {2 * warn_s} s at least"
        )
    parts = [
        *_head(run, file),
        *_resources(run, queue, warn_s),
        "",
        *_names(run, relays),
        *_generator(relays),
        *_run(run),
        *_trainer(run),
        *_start_generators(run),
        *_end(),
    ]
    return "\n".join(parts) + "\n"


def _head(run: Demand, file: str) -> list[str]:
    return [
        "#!/bin/bash",
        f"# {run.name}: the run and its trainer on {_nodes(run.asked.trainer_nodes)}, and {run.generators} generators "
        "on others, as one job of SLURM.",
        f"# Written by: {run.asked.written_by}",
        "#",
        "# Submit it in the folder from which you would start the run, with async-rl on the PATH. Every node must see",
        "# that folder, with the model, the data and your own code, and this installation of async-rl:",
        f"#   sbatch {file}",
        "# When SLURM ends the job (time limit, preemption, a node that died), it is queued again and goes on at its",
        "# newest checkpoint. To go on with a run in a job of another number:",
        f"#   sbatch {file} runs/{run.name}-NUMBER",
        "# To look at it: tail -f slurm-NUMBER.out, and async-rl top runs/NAME-NUMBER on its first node.",
        "# To stop it behind a checkpoint, for good: scancel --batch --signal=TERM NUMBER",
        "",
    ]


def _nodes(number: int) -> str:
    return "one node" if number == 1 else f"{number} nodes"


def _resources(run: Demand, queue: Queue, warn_s: int) -> Iterator[str]:
    both = ["--requeue"]
    both += [f"--time={_shown(run.asked.time_s)}"] if run.asked.time_s else []
    both += [f"--partition={shlex.quote(queue.partition)}"] if queue.partition else []
    both += [f"--account={shlex.quote(queue.account)}"] if queue.account else []
    nodes, trainer, generator = run.asked.trainer_nodes, run.trainer, run.generator
    tasks = nodes * (run.ranks_per_node if nodes > 1 else 1)
    per_task = math.ceil(trainer.cpus / (run.ranks_per_node if nodes > 1 else 1))
    yield "# -- the first component: launcher, buffer and weight server on its first node, and the trainer"
    yield f"#SBATCH --job-name={shlex.quote(run.name)}"
    yield f"# {warn_s} s before the end SLURM sends USR1 to this script, which passes it on: the run has"
    yield f"# {run.grace_s} s (checkpoint.grace_s) to finish its step and to write a checkpoint."
    yield f"#SBATCH --signal=B:USR1@{warn_s}"
    yield "# All lives of the job write into one file."
    yield "#SBATCH --open-mode=append"
    yield from (f"#SBATCH {word}" for word in both)
    yield f"#SBATCH --nodes={nodes}"
    yield f"#SBATCH --ntasks={tasks}"
    if nodes > 1:
        yield f"#SBATCH --ntasks-per-node={run.ranks_per_node}"
    yield f"#SBATCH --cpus-per-task={per_task}"
    if trainer.gpus:
        yield f"#SBATCH --gpus-per-node={trainer.gpus}"
    if trainer.memory_gb:
        yield f"#SBATCH --mem={trainer.memory_gb}G"
    yield "# -- the second component: generators, each a task, on as many nodes as that takes"
    yield "#SBATCH hetjob"
    yield from (f"#SBATCH {word}" for word in both)
    yield f"#SBATCH --ntasks={run.generators}"
    yield f"#SBATCH --cpus-per-task={generator.cpus}"
    if generator.gpus:
        yield f"#SBATCH --gpus-per-task={generator.gpus}"
    if generator.memory_gb:  # SLURM has no memory of a task
        yield f"#SBATCH --mem-per-cpu={math.ceil(generator.memory_gb * 1024 / generator.cpus)}M"


def _shown(seconds: int) -> str:
    days, rest = divmod(seconds, 86400)
    return f"{days}-{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def _names(run: Demand, relays: bool) -> Iterator[str]:
    yield f"run=${{1:-runs/{shlex.quote(run.name)}-$SLURM_JOB_ID}} # the number stays when the job is queued again"
    yield "keys=$run.keys # encryption of what goes over the network; made below, readable by you alone"
    yield "# The name by which other nodes reach this one; export HEAD=ADDRESS before sbatch where it is another."
    yield "head=${HEAD:-$(hostname)}"
    yield f"port=$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_JOBS} * 2)) # so that two jobs on one node do not meet"
    yield "export keys connect=tcp://$head:$port" + (" relay=$((port + 1))" if relays else "")
    yield ""


def _generator(relays: bool) -> Iterator[str]:
    yield "# What each task of the second component does. A generator that dies, or comes before the run listens, is"
    yield "# started again; one whose run has ended (0), that has a wrong setting (2) or was told to leave is not."
    yield "generator='"
    more = ""
    if relays:
        yield 'if [ "$SLURM_LOCALID" = 0 ]; then # the first task of a node: weights come to it once, for all'
        yield "  ("
        yield "    while true; do"
        yield '      async-rl relay --connect "$connect" --keys "$keys" --listen "tcp://0.0.0.0:$relay"'
        yield "      case $? in 0|2|129|130|138|143) break ;; esac"
        yield "      sleep 5"
        yield "    done"
        yield "  ) &"
        yield "fi"
        more = ' "weights.relay=tcp://127.0.0.1:$relay"'
    yield "while true; do"
    yield f'  async-rl generate --connect "$connect" --keys "$keys"{more}'
    yield "  code=$?"
    yield "  case $code in 0|2|129|130|138|143) exit $code ;; esac"
    yield "  sleep 5"
    yield "done'"
    yield ""


def _run(run: Demand) -> Iterator[str]:
    words = " ".join(map(shlex.quote, run.words))
    yield "# Settings that may be given anew to a run that goes on: on which node it is may have changed."
    yield 'here=(wire.endpoint=tcp://0.0.0.0:$port "wire.keys=$keys")'
    yield 'if [ ! -d "$keys" ]; then async-rl keys "$keys" || exit; fi'
    if run.asked.trainer_nodes > 1:
        yield 'awaited() { grep -c \'"trainer_awaited"\' "$run/events.jsonl" 2>/dev/null; }'
        yield "before=$(awaited)"
    yield 'if [ -f "$run/config.yaml" ]; then'
    yield '  async-rl run --resume "$run" "${here[@]}" &'
    yield "else"
    yield f'  async-rl run {shlex.quote(run.asked.config)} --run-dir "$run" {words} "${{here[@]}}" &'
    yield "fi"
    yield "launcher=$!"
    yield "trap 'kill -USR1 $launcher' USR1 # the job's time is over: behind a checkpoint it is queued again"
    yield "trap 'kill -TERM $launcher' TERM # somebody stops it: behind a checkpoint it ends"
    yield ""


def _trainer(run: Demand) -> Iterator[str]:
    if run.asked.trainer_nodes == 1:
        return
    yield "# The ranks of the trainer, as soon as the run waits for them; the first one is on this node."
    yield 'while kill -0 $launcher 2>/dev/null && [ "$(awaited)" = "$before" ]; do sleep 1; done'
    yield "sleep 3 # until every node sees the run's folder as it is now"
    yield "export MASTER_ADDR=$head MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"
    gpus = " --gpu-bind=none" if run.trainer.gpus else ""
    per_task = math.ceil(run.trainer.cpus / run.ranks_per_node)
    yield (
        f"srun --het-group=0 --nodes={run.asked.trainer_nodes} --ntasks={run.settings.trainer.ranks} "
        f"--ntasks-per-node={run.ranks_per_node} --cpus-per-task={per_task}{gpus} --kill-on-bad-exit=1 "
        '--label async-rl train "$run" --connect "$connect" --keys "$keys" &'
    )
    yield "ranks=$!"
    yield ""


def _start_generators(run: Demand) -> Iterator[str]:
    gpus = f" --gpus-per-task={run.generator.gpus}" if run.generator.gpus else ""
    yield (
        f"srun --het-group=1 --ntasks={run.generators} --cpus-per-task={run.generator.cpus}{gpus} --kill-on-bad-exit=0 "
        '--wait=0 --label bash -c "$generator" &'
    )
    yield "generators=$!"
    yield 'echo "more generators, from other jobs: async-rl generate --connect $connect --keys $(realpath "$keys")"'
    yield ""


def _end() -> Iterator[str]:
    yield "# `wait` returns when a trap has run; the run is still writing its checkpoint then."
    yield "while kill -0 $launcher 2>/dev/null; do wait $launcher; done"
    yield "wait $launcher"
    yield "code=$?"
    yield "# Generators of a run that is done end by themselves; the others have nothing to join any more."
    yield "for _ in 1 2 3 4 5 6 7 8 9 10; do"
    yield "  [ $code -eq 0 ] && kill -0 $generators 2>/dev/null || break"
    yield "  sleep 1"
    yield "done"
    yield "kill $generators ${ranks:-} 2>/dev/null"
    yield "wait"
    yield '[ $code -eq 138 ] && scontrol requeue "$SLURM_JOB_ID" # 138: stopped by USR1'
    yield "exit $code"
