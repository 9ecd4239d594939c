"""The generator: permits in, trajectories out.

In: permits and announcements from the buffer, weights from the trainer. Out: trajectories, turns of long episodes to
save, evidence of the weights in use, and a status several times a second.
Invariant: every policy token leaves with the log-prob and the version of the weights that sampled it.
Who waits: a generator waits for permits; it never waits for the trainer to be alive. Episodes wait for the engine.
`loop` and `session` import no torch; an engine (`embedded`, `vllm_engine`) does.
"""

from async_rl.generator.engine import Completion, Engine, Request, SamplingParams

__all__ = ["Completion", "Engine", "Request", "SamplingParams"]
