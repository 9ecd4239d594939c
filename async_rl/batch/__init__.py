"""GROUPS -> PACKED TENSORS. In: the trajectories of one step. Out: `PackedBatch`, flat token columns
without padding, cut into micro-batches of whole trajectories.

Invariant: only policy tokens reach the objective; how the batch is cut changes no result.
"""

from async_rl.batch.pack import MicroBatch, PackedBatch, pack_batch

__all__ = ["MicroBatch", "PackedBatch", "pack_batch"]
