"""What a person sees of a run: lines in the terminal, `top`, the report, a trace, trackers, the audit.

In: the files of a run folder, read again and again while the run goes on. Out: text in the terminal, an HTML page, a
Chrome trace, points in TensorBoard or W&B, a list of violations.

Invariant: observing changes nothing; a run is the same with and without an observer. Everything but the console works
outside the run's processes, and nothing here waits for them. Torch is imported only to compute importance ratios.
"""
