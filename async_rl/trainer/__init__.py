"""COEFFICIENTS -> STEP. In: batches from the buffer. Out: weights, one version a step, and metrics.

Invariant: the gradient is sum of coefficient x grad log pi over the batch, however it is cut.
The trainer waits for batches and for nothing else; generators need not be alive.
"""
