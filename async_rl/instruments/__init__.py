"""EXPERIMENTS AROUND RUNS. In: settings, or the folder of a run. Out: numbers about a configuration, a recipe or a run.

Before a run: simulate forecasts throughput and staleness in a simulated world (world/), rehearsal shrinks settings so
that the program runs on CPU, agreement compares engine and trainer, and a run without staleness with synchronous
training (synchronous.py). After a run: replay trains again on its batches, rescore lets other recipes judge them.
Studies of many runs: lab/ (recipes at exact lags), chaos/ (a run that is hurt on purpose). Invariant: nothing of the
product imports this room; the command line and doctor do.
"""
