"""Own task: an environment in several turns.

    python 02_own_task.py              # 100 steps, one to two minutes on a laptop
    python 02_own_task.py 3            # a look at it

The game of Nim: players take one, two or three stones in turn, and whoever takes the last one wins. The model moves
first, against an opponent that moves at random. An episode reads `11:3 06:2 02:2` and so on: the environment writes the
stones that are left, the model writes one digit.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import async_rl as ar

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100


class Nim(ar.Task):
    """`problems` and `rollout` are all that a task needs; `demonstration` is only for `ar.init_model`."""

    name = "nim"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        most_stones: int = 15

    def problems(self, split: str) -> Sequence[ar.Problem]:
        first = 0 if split == "train" else 10_000
        heaps = [5 + number % (self.settings.most_stones - 4) for number in range(200)]
        return [
            ar.Problem(index=i, prompt=f"{heap:02d}:", data={"heap": heap, "seed": first + i})
            for i, heap in enumerate(heaps)
        ]

    async def rollout(self, problem: ar.Problem, session: ar.Session) -> float:
        heap, opponent = problem.data["heap"], Random(problem.data["seed"])
        while True:
            text = await session.generate(max_tokens=1)
            if text not in ("1", "2", "3") or int(text) > heap:
                return 0.0  # no legal move
            heap -= int(text)
            if heap == 0:
                return 1.0
            heap -= opponent.randint(1, min(3, heap))
            if heap == 0:
                return 0.0
            session.append(f" {heap:02d}:")  # text of the environment, which carries no loss

    alphabet = "0123456789: "

    def demonstration(self, problem: ar.Problem, random: Random) -> list[ar.Segment]:
        """A game of two random players: legal moves, and no idea of how to win."""
        heap = problem.data["heap"]
        shown = [ar.Segment(text=f"{heap:02d}:", policy=False)]
        while heap:
            move = random.randint(1, min(3, heap))
            shown.append(ar.Segment(text=str(move), policy=True))
            heap -= move
            if heap:
                heap -= random.randint(1, min(3, heap))
            if heap:
                shown.append(ar.Segment(text=f" {heap:02d}:", policy=False))
        return shown


if __name__ == "__main__":
    if not Path("models/nim").exists():
        ar.init_model("models/nim", Nim, until=0.4, max_steps=5 * STEPS)
    run = ar.train(
        {"name": "own-task", "model": {"path": "models/nim"}, "recipe": "vcpo"},
        task=Nim,
        batch={"groups_per_step": 8, "group_size": 16},
        trainer={"steps": STEPS},
        optimizer={"learning_rate": 6e-4, "warmup_steps": 5},
        evaluation={"problems": 64, "samples": 2},
    )
    print(f"games won: {run.summary['reward_eval_first']:.0%} -> {run.summary['reward_eval_last']:.0%}")
