"""ONE SIMULATED WORLD. In: a plan (times, network, faults) and the buffer's real state machine. Out: what happened.

Generators, a trainer, a launcher and the network between them are models that take time on a virtual clock and can
die, freeze and lose messages; the state machine (async_rl/buffer/core.py) is the one of a run. `simulate` measures
throughput and staleness in this world, the tests play schedules of faults in it. Nothing here opens a socket or a
file; a durable store is handed in by whoever wants one.
"""
