"""BEFORE A RUN. In: the machine, and the settings of a run. Out: findings, each ok, warning or error with the remedy.

A check is a small function from what was measured to a frozen `Finding`; measuring stands beside it. `examine` puts
them in order and guards each: one that raises becomes an error and the others go on. Nothing here is needed by a run.
"""
