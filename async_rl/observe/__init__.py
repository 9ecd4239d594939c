"""WATCHES EVERY ARROW. In: metric rows and events of a run folder. Out: what a person sees.

Invariant: watching changes nothing; a run goes on the same without an observer.
"""
