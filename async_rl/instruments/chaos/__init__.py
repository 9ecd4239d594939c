"""A RUN HURT ON PURPOSE. In: settings and a seed, or a finished run. Out: whether anything was lost or doubled.

chaos.py starts a real run, hurts it by a plan (plan.py: kills, freezes, slows, cut connections), resumes it as a
user would; audit.py then asks the store, and `audit` asks any run. Invariant: only processes of that run are ever
signalled. The audit is pure over what was stored and trusts nothing the run said of itself.
"""
