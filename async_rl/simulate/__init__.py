"""A RUN WITHOUT A MODEL. In: settings, and times given or taken from a run. Out: speed, staleness, idle shares.

The buffer's real state machine on a virtual clock; generators and trainer only take time. Nobody waits for real.
"""
