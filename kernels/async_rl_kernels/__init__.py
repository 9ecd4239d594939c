"""The operations in which an off-policy trainer spends what an ordinary trainer does not.

Log-probs of given tokens without a [tokens, vocabulary] matrix (logprob), and squared norms of each trajectory's
gradient (segment_gradient, head_gradient). `reference.py` is the definition of each, in plain torch; the others are the
fast paths. `*_triton.py` are the ones for CUDA: nothing else imports Triton, and they are imported only where `backend`
says "triton".
"""

from async_rl_kernels.logprob import LogProbs, linear_logprob
from async_rl_kernels.min_p import min_p_log_prob
from async_rl_kernels.product import backend

__all__ = ["LogProbs", "backend", "linear_logprob", "min_p_log_prob"]
