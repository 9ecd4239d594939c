"""What joins a run from outside: one more generator (`async-rl generate`, from another shell or another host), or the
trainer of a run that waits for one (`async-rl train`, by torchrun or a cluster's scheduler; train.py).

In: an endpoint (or a run folder) and keys. Out: a generator like those the launcher started, until the run
ends, it is told to leave, or the buffer is gone.
Invariant: it works on the run's problems with the run's weights, or not at all. What it is told decides; its
own settings say only where things lie here and how much this host can do.
Who waits for whom: it waits for the buffer, by deadline; nobody waits for it. What it holds when it leaves
goes to another.
"""
