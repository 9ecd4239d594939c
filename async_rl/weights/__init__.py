"""STEP -> GENERATOR. In: the trainer's named tensors and their version. Out: a complete set of one version.

One publisher (the trainer), any number of readers (generators) that come and go; each reader pulls when
it wants to. Invariant: a reader gets all tensors of one version or none of them.
Who blocks whom: nobody blocks the publisher. A reader copies, and copies again when the publisher
overtook it meanwhile; it waits for the first version, and gives up after a deadline with a name. Only
links (link.py: from GPU to GPU) may hold the publisher up, for as long as one is sent from, by a deadline.
"""

from async_rl.weights.shared_memory import WeightPublisher, WeightReader, WeightsError, segment_path

__all__ = ["WeightPublisher", "WeightReader", "WeightsError", "segment_path"]
