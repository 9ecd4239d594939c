"""From single findings to a proof: `Suspicion` says when a generator's lies cannot be chance. Pure.

Each kind of check finds fault with an honest trajectory with a probability of HONEST at most. Let x_t be 1 where the
t-th checked trajectory was found at fault. For an assumed share q of lies the likelihood ratio of the t-th is
q / HONEST if x_t, else (1 - q) / (1 - HONEST): its mean over honest trajectories is 1 at most, whatever went before
(any q above HONEST). So C_t = max(1, C_{t-1}) * ratio_t, a CUSUM, is never above the Shiryaev-Roberts statistic
R_t = (1 + R_{t-1}) * ratio_t, and R_t - t is a supermartingale: the mean number of honest trajectories until R, and so
until C, reaches c is c at least (Pollak, "Optimality and almost optimality of mixture stopping rules", Annals of
Statistics 1978). The same holds of the mean of C over several q. With c = KINDS / FALSE_ALARMS for each kind of check
there is at most one false proof in 1 / FALSE_ALARMS honest trajectories on average, whenever a lie begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

HONEST = 1e-3
"""most honest trajectories that one kind of check finds fault with; measured: none"""
LYING = (0.5, 0.1, 0.02)
"""shares of lies that are looked for"""
FALSE_ALARMS = 1e-6
"""most false proofs for an honest trajectory that was checked"""
CHECKS = ("log-probs", "tokens", "rewards", "prompts")
"""kinds of checks, each with its own statistic"""
PROOF = len(CHECKS) / FALSE_ALARMS


@dataclass(slots=True)
class Suspicion:
    """The statistic of one kind of check of one generator."""

    logs: list[float] = field(default_factory=lambda: [0.0] * len(LYING))
    """log C for each of LYING"""

    def add(self, wrong: bool) -> bool:
        """Take in one checked trajectory; True when a lie is proven."""
        for number, share in enumerate(LYING):
            ratio = share / HONEST if wrong else (1 - share) / (1 - HONEST)
            self.logs[number] = max(0.0, self.logs[number]) + math.log(ratio)
        return self.proves

    @property
    def proves(self) -> bool:
        """Whether a lie is proven."""
        return self.level >= PROOF

    @property
    def level(self) -> float:
        """The mean of C; PROOF proves a lie."""
        return sum(math.exp(min(log, 700.0)) for log in self.logs) / len(self.logs)
