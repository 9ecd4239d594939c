"""The operations in which an off-policy trainer spends what an ordinary trainer does not.

`reference.py` is the definition of each, in plain torch; the others are the fast paths.
"""

from async_rl_kernels.logprob import LogProbs, linear_logprob

__all__ = ["LogProbs", "linear_logprob"]
