"""What a rank of the trainer does that does not lead: its share of whatever the leader says comes next.

Who waits for whom: it waits for the leader's word, by the time-out of a collective (the leader says every few
seconds that it is there), and talks to nobody else: buffer, generators and files of the run are the leader's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_rl.settings import Settings
from async_rl.trainer.build import pack_step
from async_rl.trainer.checkpoint import save_part
from async_rl.trainer.forward import probe_log_probs
from async_rl.trainer.team import End, Gather, Probe, Save, Still, Train, hear, wait_metrics
from async_rl.wire.heartbeat import Activity

if TYPE_CHECKING:
    from async_rl.trainer.learner import Learner

WAITING = "waiting for the leader"


def follow(settings: Settings, learner: Learner, activity: Activity) -> None:
    """Until the leader says that the run is done. Raises RunFailed when it is gone."""
    ranks = learner.ranks
    activity.now(WAITING)
    while True:
        match hear(ranks):
            case Train(step=step, trajectories=trajectories):
                activity.now(f"training step {step}")
                waited = ranks.waited_s
                learner.step(pack_step(settings, trajectories, learner.over))
                wait_metrics(ranks, waited)
            case Gather():
                activity.now(f"gathering version {learner.version}")
                for _ in learner.full_weights():
                    pass  # they count on the leader
            case Probe(tokens=tokens):
                probe_log_probs(learner.model, tokens, learner.options.arithmetic)
            case Save(folder=folder):
                activity.now(f"checkpoint {learner.version}")
                save_part(folder, learner)
            case Still():
                pass
            case End():
                return
        activity.still(WAITING)
