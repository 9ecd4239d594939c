"""A trainer process that ships wrong weights. `python -m support_faulty_trainer FAULT SPEC`

Only the publisher is another one; everything else is the trainer as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from torch import Tensor

from async_rl.process_spec import TrainerSpec, parse_spec
from async_rl.trainer.__main__ import main
from async_rl.weights import shared_memory

FIRST_WRONG = 2
"""versions before it are shipped as they are"""
WRONG_TENSOR = "model.layers.1.mlp.up_proj.weight"
WRONG_ADAPTER = "model.layers.1.mlp.up_proj.lora_B.weight"


class FaultyPublisher(shared_memory.WeightPublisher):
    """Ships, from FIRST_WRONG on: `one`: one tensor that is slightly off; `old`: the last right version under
    the new number; `partial`: every second tensor of it; `adapter`: one adapter that is slightly off;
    `none`: adapters that add nothing, which leaves the generator with the model it has."""

    fault = ""
    right: Mapping[str, Tensor]

    def publish(self, given: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> None:
        tensors = dict(given)
        if version < FIRST_WRONG:
            self.right = {name: tensor.clone() for name, tensor in tensors.items()}
            shipped = dict(tensors)
        elif self.fault == "one":
            shipped = dict(tensors) | {WRONG_TENSOR: tensors[WRONG_TENSOR] + 1e-6}
        elif self.fault == "old":
            shipped = dict(self.right)
        elif self.fault == "adapter":
            shipped = dict(tensors) | {WRONG_ADAPTER: tensors[WRONG_ADAPTER] + 1e-4}
        elif self.fault == "none":
            shipped = {name: tensor * 0 for name, tensor in tensors.items()}
        else:
            assert self.fault == "partial"
            shipped = dict(tensors) | {name: self.right[name] for name in sorted(tensors)[::2]}
        super().publish(shipped, version)


if __name__ == "__main__":
    FaultyPublisher.fault = sys.argv[1]
    shared_memory.WeightPublisher = FaultyPublisher  # type: ignore[misc]  # where the trainer takes it from
    main(parse_spec(TrainerSpec, sys.argv[2:]))
