"""TRAJECTORY -> BATCH, BOUNDED. In: finished trajectories. Out: permits to generators, batches to the trainer.

Invariants: no trained token is staler than `max_staleness`; each admitted group is trained exactly once
or refused with a recorded reason. `staleness` is the rule, `core` the state machine (pure, clock passed
in), `store` the SQLite file, `loop` the process around them. The buffer waits for nobody; torch is not
imported here.
"""
