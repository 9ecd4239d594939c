"""Weights from the trainer to the generators, by version.

In: the trainer's named tensors and their version. Out: all tensors of one version in every generator, over shared
memory (shared_memory.py), a weight server (stream.py), or links from GPU to GPU (link.py); canary.py checks what
arrived.
Invariant: a reader gets all tensors of one version or none of them.
Who waits: one publisher (the trainer) serves any number of readers that come and go; each reader pulls when it wants.
No reader blocks the publisher. A reader waits for the first version, copies, and copies again when the publisher wrote
meanwhile; it gives up after a deadline. Only a link may block the publisher, while it sends, and only until a deadline.
"""

from async_rl.weights.shared_memory import WeightPublisher, WeightReader, WeightsError, segment_path

__all__ = ["WeightPublisher", "WeightReader", "WeightsError", "segment_path"]
