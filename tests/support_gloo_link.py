"""vLLM's own NCCL weight transfer with gloo in NCCL's place, so that it runs without GPUs.

What is vLLM's: the handshake's and the update's messages, the order of calls on both sides (`send_weights`, the
worker's session of start, update and finish), the checks of names, dtypes and shapes, loading into the model.
What is ours: the process group, and the two loops over tensors, which in vLLM speak of CUDA streams.

Named as the worker extension of a vLLM (`Weights`), this module registers both engines in vLLM's workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from support_gloo import GlooCommunicator
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
)

from async_rl.generator.vllm_worker import Weights as OurWeights


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    backend: ClassVar[str] = "gloo"


class GlooEngine(NCCLWeightTransferEngine):
    """In vLLM's worker."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        self.packed = init_info.packed
        rank = self.parallel_config.rank + init_info.rank_offset
        assert init_info.master_address is not None
        assert init_info.master_port is not None
        self.model_update_group = GlooCommunicator(  # type: ignore[assignment]
            init_info.master_address, init_info.master_port, rank, init_info.world_size
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # vLLM's waits for a device here

    def receive_weights(self, update_info: Any) -> None:
        assert self.model_update_group is not None
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self.model_update_group.broadcast(weight, src=0)
            self.model.load_weights([(name, weight)])


class GlooTrainerEngine(NCCLTrainerWeightTransferEngine):
    """In the trainer. `trainer_init` is vLLM's, but for whose endpoint is opened."""

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> GlooTrainerEngine:
        from concurrent.futures import ThreadPoolExecutor

        engine = cls(client=client, source=source, is_sender=init_info.is_sender, packed=init_info.packed)
        for_worker = NCCLWeightTransferInitInfo(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            rank_offset=1,
            world_size=init_info.world_size,
            packed=init_info.packed,
        )
        with ThreadPoolExecutor(max_workers=1) as beside:
            future = beside.submit(engine.client.init_weight_transfer_engine, worker_init_payload(for_worker))
            engine.model_update_group = GlooCommunicator(  # type: ignore[assignment]
                init_info.master_address, init_info.master_port, 0, init_info.world_size
            )
            future.result()
        return engine

    def _broadcast(self, source: Any, meta: Any) -> None:
        assert self.model_update_group is not None
        for _, tensor in self._checked_iter(source, meta):
            self.model_update_group.broadcast(tensor.contiguous(), src=0)


WeightTransferEngineFactory.register_engine("gloo", GlooEngine)
WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerEngine)


class Weights(OurWeights):
    """Mixed into vLLM's worker."""
