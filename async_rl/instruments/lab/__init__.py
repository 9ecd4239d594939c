"""HOW FAR OFF POLICY? In: recipes, learning rates, lags, seeds, tasks. Out: one training of each, and a verdict.

A cell is one training with an *exact* lag k: the batch of step s was sampled by version max(0, s - k). It is
made of what a run is made of (engine, tasks, objective, learner) in one process, without its asynchrony, so
that nothing but the lag differs between cells. Cells run side by side in worker processes; each leaves one
file when it is finished, and nothing waits for a cell longer than `cell_timeout_s`.
"""
