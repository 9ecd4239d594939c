"""EXPERIMENTS IN ONE PROCESS. In: settings. Out: numbers about a model or an objective.

The rooms of a run (engine, task, trainer) without its processes: evaluation of a model folder, the small
model of the quickstart, and the synchronous reference that `max_staleness=0` must equal.
"""
