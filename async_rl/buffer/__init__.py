"""TRAJECTORY -> BATCH, BOUNDED. In: finished trajectories from generators. Out: permits to generators, batches to the
trainer, and the record of the run (one SQLite file).

Invariants: no trained token is staler than `staleness.max_staleness`; each admitted group is trained exactly once or
refused with a recorded reason; whatever a peer was told is in the store.

Who blocks whom: a generator waits for permits, the trainer waits for batches; the buffer waits for nobody.

`sampler` says what is asked next, from what is known of the problems; `staleness` is the rule and its proof, `core` the
state machine (pure, the clock is passed in), `store` the SQLite file, `store_thread` the thread that carries large
rounds out, `loop` the process around them, `build` makes the state machine from settings. Torch is not imported here.
"""
