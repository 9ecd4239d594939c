"""A RUN HURT ON PURPOSE. In: settings and a seed. Out: whether anything was lost or doubled.

chaos.py starts a real run (launch.py), injects the planned faults (plan.py, injector.py, proxy.py) while it follows
the run's files (progress.py), and resumes the run as a user would. evidence.py holds what the store said at each
death against what it says at the end; `async-rl audit` (observe/audit.py) does the rest. Invariant: only processes of
that run are ever signalled (target.py).
"""
