"""EXPERIMENTS. In: settings, or the folder of a run. Out: numbers about a model, an objective or a run.

The rooms of a run (engine, task, trainer) without its processes: evaluation of a model folder, the small
model of the quickstart, and the synchronous reference that `max_staleness=0` must equal. And questions to a
run: replay (the same weights again?), rescore (what would other recipes have made of its batches?).
"""
