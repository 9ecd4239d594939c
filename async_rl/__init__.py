"""Asynchronous, off-policy RL for language models with bounded, measured and corrected staleness."""

__version__ = "0.1.0"
