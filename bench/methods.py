"""Every method's recipe for 30 steps on a small task on which it has its point, and what came out.

    async-rl init-model models/guess --task guess --until 0.5
    python bench/methods.py [--only gdpo,simple_tir] [--seeds 1]

One process and thread, lag 4 (every batch was sampled four versions before), 8 groups of 8, learning rate 1.5e-4. A row
is a plausibility check, not a comparison: one initial model, few seeds. `reward` is the mean of the first and of the
last five batches; GRPO on the same task stands beside. `acts` is what shows that the method did something.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from async_rl.config import Settings
from async_rl.config.schema import structured
from async_rl.instruments.lab.exact_lag import Sampled, train_with_exact_lag
from async_rl.model.decoder import Decoder
from async_rl.model.folder import load_model, save_folder
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.task.guess import Guess
from async_rl.task.protocol import Problem, Reward, Session
from async_rl.trainer.learner import StepReport

STEPS, LAG, GROUPS, SAMPLES, ENDS = 30, 4, 8, 8, 5
HERE = Path(__file__).resolve()


class Parts(Guess):
    """The game with two parts of its reward: found, and how few turns it took. The second is ten times the first."""

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        found = await super().rollout(problem, session)
        return {"found": float(found), "turns": -10.0 * session.turn / self.settings.max_turns}


class Valued(Guess):
    """The game with the value of its problems noted, which is the same for all of them."""

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        session.note("v_star", 0.6)
        return await super().rollout(problem, session)


class Fractional(Guess):
    """The game with a fractional reward: 0.1 for having played at all."""

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        return 0.1 + 0.9 * float(await super().rollout(problem, session))


class Consistent(Guess):
    """The game in which a guess that contradicts the answers before it is a void turn."""

    def judge(self, session: Session, *, consistent: bool) -> None:
        session.note_turn("void", float(not consistent))


class Answered(Guess):
    """The game in which the last guess is noted as the answer."""

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        reward = await super().rollout(problem, session)
        said = getattr(session, "said", ())
        guessed = self.read(said[-1].text) if said else None
        if guessed is not None:
            session.note("answer", guessed)
        return reward


GUESS: dict[str, Any] = {"name": "guess"}
GAINING = {"name": "guess", "args": {"information_gain": True}}
REWARDED = {"name": "guess", "args": {"reward_consistent": 0.1}}
NOISY = "models/guess_noisy"
"""models/guess with noise on its weights, for a policy to be taught by what it was"""
PARTS, VALUED, FRACTIONAL, CONSISTENT, ANSWERED = (
    {"name": f"{HERE}:{name}"} for name in ("Parts", "Valued", "Fractional", "Consistent", "Answered")
)
REJECTED = "reject/trajectories"
CASES: dict[str, tuple[Mapping[str, Any], Mapping[str, Any], str]] = {
    # recipe: task, changes, the metric that shows it
    "grpo": (GUESS, {}, "clip/frac"),
    "vcpo_published": (GUESS, {}, "lr/ess_scale"),
    "dapo": (GUESS, {"reward": {"overlong_limit": 8, "overlong_buffer": 4}}, "reject/equal_rewards/trajectories"),
    "intellect2": (GUESS, {}, "clip/dual"),
    "gdpo": (PARTS, {}, "advantage/std"),
    "simple_tir": (CONSISTENT, {}, "reject/flag/trajectories"),
    "over_turn": (GUESS, {}, "reject/truncated/trajectories"),
    "grpo_tcr": (GUESS, {"reward": {"overlong_limit": 8, "overlong_buffer": 4}}, "clip/frac"),
    "raft": (FRACTIONAL, {"reward": {"threshold": 0.5}}, "advantage/mean"),
    "raft_pp": (FRACTIONAL, {"reward": {"threshold": 0.5}}, "clip/frac"),
    "reinforce_rej": (GUESS, {}, "reject/equal_rewards/trajectories"),
    "gpg": (GUESS, {}, "reject/zero_signal/trajectories"),
    "gvpo": (GUESS, {}, "advantage/std"),
    "copg": (GUESS, {}, "advantage/std"),
    "rebel": (GUESS, {}, "advantage/std"),
    "a_star_po": (VALUED, {"trust": {"beta": 0.01}}, "advantage/mean"),
    "disco": (GUESS, {}, "kl/coefficient"),
    "cpgd": (GUESS, {}, "clip/frac"),
    "gbpo": (GUESS, {}, "clip/frac"),
    "sapo": (GUESS, {}, "clip/bias"),
    "vespo": (GUESS, {}, "is/log_weight_std"),
    "sat": (GUESS, {}, "clip/frac"),
    "kpop": (GUESS, {}, "clip/frac"),
    "aspo": (GUESS, {}, "clip/frac"),
    "bapo": (GUESS, {}, "clip/frac"),
    "gepo": (GUESS, {}, "clip/frac"),
    "stable_reinforce": (GUESS, {}, "clip/frac"),
    "vc_ppo": (GUESS, {}, "value/explained_variance"),
    "forking_tokens": (GUESS, {}, "entropy"),
    "entropy_turns": (GUESS, {}, "clip/frac"),
    "reweighted_grpo": (GUESS, {}, "clip/frac"),
    "ar_lopti": (GUESS, {}, "updates/done"),
    "empg": (GUESS, {}, "clip/frac"),
    "cppo": (GUESS, {}, "reject/small_advantage/trajectories"),
    "balanced_grpo": (GUESS, {}, "reject/group_reward/trajectories"),
    "dro": (GUESS, {}, "kl/regulariser"),
    "luspo": (GUESS, {}, "clip/frac"),
    "mdpo": (GUESS, {}, "kl/regulariser"),
    "ppo": (GUESS, {}, "updates/done"),
    "see_upo": (GUESS, {}, "updates/done"),
    "archer": (GUESS, {}, "value/explained_variance"),
    "oreo": (GUESS, {}, "value/explained_variance"),
    "bpo": (GUESS, {}, "value/explained_variance"),
    "on_policy_distillation": (GUESS, {}, "teacher/kl"),
    "lp_reg": (GUESS, {"kl": {"proxy_share": 0.3, "protected_share": 0.1}}, "kl/regulariser"),
    "epo": (GUESS, {}, "band/outside"),
    "igpo": (GAINING, {}, "advantage/std"),
    "mars": (REWARDED, {}, "advantage/std"),
    "r2vpo": (GUESS, {}, "kl/coefficient"),
    "arpo": (GUESS, {}, "batch/shared"),
    "spo": (GUESS, {}, "batch/shared"),
    "remax": (GUESS, {}, "reject/greedy/trajectories"),
    "lite_ppo": (GUESS, {}, "clip/frac"),
    "kimi_k15": (GUESS, {}, "len/mean"),
    "tba": (GUESS, {}, "advantage/std"),
    "agro": (GUESS, {}, "advantage/std"),
    "oapl": (GUESS, {"trust": {"beta": 0.5, "loss_weight": 2.0}}, "advantage/mean"),
    "loop": (GUESS, {}, "clip/frac"),
    "magistral": (GUESS, {}, "reject/equal_rewards/trajectories"),
    "pro_rl": (GUESS, {}, "kl/regulariser"),
    "m_grpo": (GUESS, {}, "kl/regulariser"),
    "open_reasoner_zero": (GUESS, {}, "value/explained_variance"),
    "dual_clip_ppo": (GUESS, {}, "clip/dual"),
    "reinforce_tis": (GUESS, {}, "clip/frac"),
    "kevin": (REWARDED, {}, "advantage/std"),
    "deep_swe": (GUESS, {"aggregate": {"constant": 16}}, "reject/truncated/trajectories"),
    "ppo_ewma": (GUESS, {}, "clip/frac"),
    "scale_rl": (GUESS, {}, "reject/zero_signal/trajectories"),
    "dual_token": (GUESS, {}, "kl/regulariser"),
    "w_reinforce": (GUESS, {}, "advantage/mean"),
    "asym_re": (GUESS, {}, "advantage/mean"),
    "pass_k": (GUESS, {}, "advantage/std"),
    "pkpo": (GUESS, {}, "advantage/std"),
    "rl_zvp": (GUESS, {}, "entropy"),
    "agpo": (GUESS, {}, "advantage/mean"),
    "entropy_advantage": (GUESS, {}, "entropy"),
    "gppo": (GUESS, {}, "clip/frac"),
    "ce_gppo": (GUESS, {}, "clip/frac"),
    "dcpo": (GUESS, {}, "clip/frac"),
    "l1": (GUESS, {"reward": {"length_target": 6, "length_weight": 0.05}}, "len/mean"),
    "alp": (GUESS, {"reward": {"length_weight": 0.05}}, "len/mean"),
    "laser": (GUESS, {"reward": {"length_target": 6}}, "len/mean"),
    "shorter_better": (GUESS, {"reward": {"length_weight": 0.1}}, "len/mean"),
    "efficient_reasoning": (GUESS, {"reward": {"length_weight": 0.4}}, "len/mean"),
    "grpo_lead": (GUESS, {"reward": {"length_weight": 0.2}}, "len/mean"),
    "dler": (FRACTIONAL, {}, "reject/zero_signal/trajectories"),
    "gfpo": (GUESS, {}, "reject/surplus/trajectories"),
    "pods": (GUESS, {}, "reject/surplus/trajectories"),
    "starpo_s": (GUESS, {}, "reject/small_deviation/trajectories"),
    "ttrl": (ANSWERED, {}, "advantage/std"),
    "empo": (ANSWERED, {}, "advantage/std"),
    "rent": (GUESS, {}, "entropy"),
    "qae": (GUESS, {}, "advantage/mean"),
    "mapo": (GUESS, {}, "advantage/std"),
    "rs_grpo": (GUESS, {}, "advantage/std"),
    "bnpo": (GUESS, {}, "advantage/std"),
    "unlikeliness": (GUESS, {}, "entropy"),
    "real": (GUESS, {}, "is/log_weight_std"),
    "fipo": (GUESS, {}, "advantage/std"),
    "skywork_or1": (GUESS, {"controller": [{"number": "entropy", "metric": "entropy", "target": 1.5, "law": "step",
                                            "rate": 0.005, "low": 0.0, "high": 1.0}]}, "controlled/entropy"),
    "vagen": (REWARDED, {}, "value/explained_variance"),
    "tree_rl": (GUESS, {}, "batch/shared"),
    "tree_grpo": (GUESS, {}, "batch/shared"),
    "clip_cov": (GUESS, {}, "clip/frac"),
    "decoupled_ppo": (GUESS, {}, "clip/frac"),
    "delay_damped": (GUESS, {}, "clip/frac"),
    "dispo": (GUESS, {}, "clip/frac"),
    "dppo": (GUESS, {}, "clip/frac"),
    "dr_grpo": (GUESS, {}, "advantage/std"),
    "gmpo": (GUESS, {}, "clip/frac"),
    "gspo": (GUESS, {}, "clip/frac"),
    "gspo_token": (GUESS, {}, "clip/frac"),
    "icepop": (GUESS, {}, "clip/frac"),
    "kl_cov": (GUESS, {}, "clip/frac"),
    "m2po": (GUESS, {}, "clip/frac"),
    "max_rl": (GUESS, {}, "advantage/std"),
    "mis": (GUESS, {}, "reject/trajectories"),
    "ngrpo": (GUESS, {}, "advantage/std"),
    "opo": (GUESS, {}, "advantage/std"),
    "opsm": (GUESS, {}, "reject/trajectories"),
    "reinforce_pp": (GUESS, {}, "advantage/std"),
    "reinforce_pp_baseline": (GUESS, {}, "advantage/std"),
    "rloo": (GUESS, {}, "advantage/std"),
    "s_ppo": (GUESS, {}, "clip/bias"),
    "so_grpo": (GUESS, {}, "clip/bias"),
    "st_ppo": (GUESS, {}, "clip/bias"),
    "tis": (GUESS, {}, "clip/frac"),
    "topr": (GUESS, {}, "clip/frac"),
    "turn_gae_ppo": (GUESS, {}, "clip/frac"),
    "turn_ppo": (GUESS, {}, "clip/frac"),
    "vapo": (GUESS, {}, "clip/frac"),
    "gigpo": (REWARDED, {}, "advantage/std"),
    "turn_grpo": (REWARDED, {}, "advantage/std"),
    "turn_return": (REWARDED, {}, "advantage/std"),
}  # fmt: skip
OF_RUN: dict[str, Mapping[str, Any]] = {
    # recipe: settings of its run besides the recipe's own
    "ppo": {"updates": {"epochs": 4, "minibatches": 4, "kl_stop": 0.05}, "optimizer": {"learning_rate": 4e-5}},
    "see_upo": {"optimizer": {"learning_rate": 4e-5}},
    "ar_lopti": {"optimizer": {"learning_rate": 4e-5}},
    "archer": {"critic": {"epochs": 3, "target_average": 0.9}, "optimizer": {"learning_rate": 4e-5}},
    "on_policy_distillation": {"model": {"path": NOISY}, "teachers": {"before": {"path": "models/guess"}}},
    "arpo": {"rollout": {"roots": 4}},
    "spo": {"rollout": {"roots": 1, "fork": "improbable_token", "per_cut": 2}},
    "remax": {"rollout": {"greedy": True}},
    "pro_rl": {"reference": {"every": 10}},
    "ppo_ewma": {"reference": {"average": 0.8}},
    "tree_rl": {"rollout": {"roots": 1, "shape": "tree", "fork": "improbable_token"}},
    "tree_grpo": {"rollout": {"roots": 2}},
}


def settings_of(recipe: str, task: Mapping[str, Any], changes: Mapping[str, Any], seed: int, rate: float) -> Settings:
    chosen = {"name": recipe, **changes}
    values: dict[str, Any] = {
        "name": "methods",
        "seed": seed,
        "model": {"path": "models/guess"},
        "task": dict(task),
        "recipe": chosen,
        "staleness": {"max_staleness": LAG},
        "batch": {"groups_per_step": GROUPS, "group_size": SAMPLES},
        "trainer": {"steps": STEPS},
        "optimizer": {"learning_rate": rate, "warmup_steps": 5},
    }
    if requirements(load_recipe(chosen)).value:
        values["critic"] = {"kind": "head", "warmup_steps": 5}
    for group, given in OF_RUN.get(recipe, {}).items():
        values[group] = {**values.get(group, {}), **given}
    return structured(Settings, values, where="run")


def make_noisy(std: float = 0.03) -> None:
    """Write NOISY, unless it is there."""
    if Path(NOISY).exists():
        return
    model = load_model("models/guess")
    assert isinstance(model, Decoder)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=random)
    shutil.copytree("models/guess", NOISY)
    save_folder(Path(NOISY), model, source=Path("models/guess"))


def train(
    recipe: str, task: Mapping[str, Any], changes: Mapping[str, Any], metric: str, seed: int, rate: float
) -> list[float]:
    """Reward of the first and of the last batches, mean of the metric over the steps, steps skipped, seconds."""
    rewards: list[float] = []
    seen: list[float] = []
    skipped = 0

    def batch(sampled: Sampled) -> None:
        earned = [t.reward for t in sampled.episodes if not t.failed]
        rewards.append(sum(earned) / len(earned))

    def step(number: int, report: StepReport) -> None:
        nonlocal skipped
        skipped += bool(report.skipped)
        seen.append(report.metrics.get(metric, 0.0))

    started = time.process_time()
    torch.manual_seed(seed)
    train_with_exact_lag(settings_of(recipe, task, changes, seed, rate), each_batch=batch, each_step=step)
    first, last = statistics.mean(rewards[:ENDS]), statistics.mean(rewards[-ENDS:])
    return [first, last, statistics.mean(seen), float(skipped), time.process_time() - started]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="recipes, with commas")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.5e-4, help="learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_noisy()
    print("| recipe | task | reward: first 5 -> last 5 | GRPO, same task | acts (mean over steps) | skipped | s |")
    print("|---|---|---|---|---|---|---|")
    beside: dict[str, float] = {}
    for recipe in args.only.split(",") if args.only else CASES:
        task, changes, metric = CASES[recipe]
        name = str(task["name"]).rpartition(":")[2] + "".join(f", {arg}" for arg in task.get("args", {}))
        seeds = range(args.seeds)
        if name not in beside:
            runs = [train("grpo", task, {}, "clip/frac", seed, args.rate) for seed in seeds]
            beside[name] = statistics.mean(run[1] for run in runs)
        runs = [train(recipe, task, changes, metric, seed, args.rate) for seed in seeds]
        first, last, acts, skipped, seconds = map(statistics.mean, zip(*runs, strict=True))
        row = (recipe, name, f"{first:.3f} -> {last:.3f}", f"{beside[name]:.3f}", f"{metric} {acts:.4g}",
               f"{skipped:g}", f"{seconds:.1f}")  # fmt: skip
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
