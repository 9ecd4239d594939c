"""Own recipe: an algorithm in twenty lines.

    python 03_own_recipe.py            # 80 steps, one to two minutes on a laptop
    python 03_own_recipe.py 3          # a look at it

Every policy gradient is one number for each token, which multiplies the gradient of that token's log-probability. So an
algorithm is a function from the columns of a batch to one column of coefficients. This one is REINFORCE with
leave-one-out baselines and weights that fade with age: the older the weights that sampled a token, the less it counts.
"""

import sys
from pathlib import Path

import torch

import async_rl as ar

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 80
SORT = {"name": "sort", "args": {"length": 3, "alphabet_size": 6}}


def fading(columns: ar.Columns) -> ar.Coefficients:
    """Leave-one-out REINFORCE; each token weighted by min(pi/mu, 1) and by 0.9 for each step of its age."""
    group = columns.group_of_trajectory  # [trajectories]
    count = torch.bincount(group).to(columns.reward)  # [groups]
    total = torch.zeros_like(count).index_add_(0, group, columns.reward)  # [groups]
    others = (total[group] - columns.reward) / (count[group] - 1).clamp(min=1)  # [trajectories]
    advantage = columns.reward - others  # [trajectories]

    of_token = columns.trajectory_of_turn[columns.turn_of_token]  # [tokens]
    age = columns.current_version - columns.version  # [tokens], steps
    weight = (columns.log_prob - columns.log_behaviour).exp().clamp(max=1.0) * 0.9**age  # [tokens]
    policy = weight * advantage[of_token] / len(of_token)  # [tokens]
    return ar.Coefficients(policy=policy, metrics={"mine/weight_mean": float(weight.mean())})


if __name__ == "__main__":
    if not Path("models/letters").exists():  # a small model that has seen some sorting
        ar.init_model("models/letters", SORT, until=0.2, max_steps=5 * STEPS)
    run = ar.train(
        {"name": "own-recipe", "model": {"path": "models/letters"}, "task": SORT},
        recipe=fading,
        staleness={"max_staleness": 2},
        batch={"groups_per_step": 8, "group_size": 16},
        trainer={"steps": STEPS},
        optimizer={"learning_rate": 3e-4, "warmup_steps": 10, "schedule": "linear"},
        evaluation={"problems": 32},
    )
    weights = run.metrics.column("mine/weight_mean")
    print(f"held-out reward: {run.summary['reward_eval_first']:.2f} -> {run.summary['reward_eval_last']:.2f}")
    print(f"mean weight of a token: {weights[0]:.2f} in the first step, {weights[-1]:.2f} in the last")
