"""PERMIT -> TRAJECTORY. In: permits from the buffer, weights from the trainer. Out: trajectories.

Invariant: every policy token leaves with the log-prob and version of the weights that sampled it.
A generator never waits for the trainer to be alive; without permits it idles.
"""
