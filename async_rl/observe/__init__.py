"""WATCHES EVERY ARROW. In: the files of a run folder. Out: what a person sees: lines in the terminal, `top`, a
page of everything (`report`), traces, trackers.

Invariant: watching changes nothing; a run goes on the same without an observer. Everything here but the console
runs outside the run's processes and imports torch, if at all, only to compute importance ratios.
"""
