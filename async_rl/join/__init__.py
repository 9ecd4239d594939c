"""One more generator for a run that is going on: `async-rl generate`, from another shell or another host.

In: an endpoint (or a run folder) and keys. Out: a generator like those the launcher started, until the run
ends, it is told to leave, or the buffer is gone.
Invariant: it works on the run's problems with the run's weights, or not at all. What it is told decides; its
own settings say only where things lie here and how much this host can do.
Who waits for whom: it waits for the buffer, by deadline; nobody waits for it. What it holds when it leaves
goes to another.
"""
