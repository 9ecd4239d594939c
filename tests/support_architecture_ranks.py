"""Log-probs and gradients of every architecture with the weights split over ranks.

As a program, `support_architecture_ranks.py FOLDER` joins the ranks that its environment names; FOLDER/folders.json
lists the models, and FOLDER/<number>.safetensors gets what was found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from support_architectures import batch
from support_ranks import TIMEOUT_S

from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.ranks import free, full, join_ranks
from async_rl.trainer.sharding import load_sharded


def main(out: Path) -> None:
    (micro,) = batch().micro_batches
    with join_ranks("cpu", TIMEOUT_S) as ranks:
        for number, folder in enumerate(json.loads((out / "folders.json").read_text()).values()):
            model = load_sharded(Path(folder), ranks, device="cpu", dtype=torch.float32)
            found = log_probs(model, micro, ModelArithmetic(temperature=1.0)).log_prob
            found.sum().backward()
            free(model)
            tensors = {"log_prob": found.detach()}
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                tensors[name] = full(parameter.grad).clone()
            if ranks.leads:
                save_file(tensors, out / f"{number}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]))
