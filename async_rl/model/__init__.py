"""WHAT IS TRAINED. In: a Hugging Face model folder. Out: one definition of each architecture, shared
by the engine that samples and the trainer that learns, and the tokenizer.

Invariant: generator and trainer run the same arithmetic on the same weights.
"""
