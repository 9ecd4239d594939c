"""GROUPS -> PACKED TENSORS. In: the trajectories of one step. Out: `PackedBatch`, flat token columns
without padding, cut into micro-batches of whole trajectories.

Invariant: only policy tokens reach the objective; how the batch is cut changes no result.
"""

from async_rl.batch.pack import MicroBatch, PackedBatch, pack_batch
from async_rl.batch.share import Spread

__all__ = ["MicroBatch", "PackedBatch", "Spread", "pack_batch"]
