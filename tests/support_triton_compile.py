"""Compile every kernel for a compute capability, as it is launched on real shapes, and print what came of it as JSON.

No GPU is needed. Run by tests/kernels/test_triton.py in a process of its own, with the capabilities as arguments
(90: Hopper); prints {capability: {kernel: facts}}.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from async_rl_kernels import logprob_triton as tile
from async_rl_kernels import segment_gradient_triton as gradient

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ALIGNED = ("stride", "width")
"""arguments that are multiples of 16 for any usual model"""


def compiled(
    capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> dict[str, int]:
    """types: of the arguments; pointers start with *, those not named are i32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and any(word in name for word in ALIGNED))
    }
    constant_places = {(names.index(name),): value for name, value in constants.items()}
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constant_places, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    ptx = made.asm["ptx"]
    waits = [int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", ptx)]
    return resources(made.asm["cubin"]) | {
        "threads": 32 * warps,
        "shared_bytes": made.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "wgmma_in_flight": max(waits, default=0),
        "asynchronous_copies": ptx.count("cp.async.cg"),
        "wide_loads": ptx.count("ld.global.v4"),
    }


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def pointers(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{kind}")


def every_kernel(capability: int) -> dict[str, dict[str, int]]:
    rows = pointers("fp32", "log_normaliser of_log_prob of_entropy entropy of_square square")
    made: dict[str, dict[str, int]] = {}
    logits = pointers("fp32", "logits out") | {"local": "*i64", "scale": "fp32"}
    made["sums"] = compiled(capability, tile.sums_kernel, logits, {"BLOCK": tile.BLOCK}, tile.WARPS, 3)
    for others in (False, True):
        constants = {"BLOCK": tile.BLOCK, "ENTROPY": others, "SQUARE": others}
        for kind in ("bf16", "fp32"):
            types = logits | rows | {"out": f"*{kind}"}
            made[f"gradient {kind} {others}"] = compiled(
                capability, tile.gradient_kernel, types, constants, tile.WARPS, 3
            )
    types = pointers("bf16", "activations gradients gradients_0 gradients_1 gradients_2")
    types |= pointers("i32", "uppers lowers ends starts stops finished") | pointers("fp32", "squares out")
    for layers in (1, 3):
        made[f"gram {layers}"] = compiled(
            capability,
            gradient.gram_kernel,
            types,
            gradient.gram_constants(layers),
            gradient.GRAM_OPTIONS["num_warps"],
            gradient.GRAM_OPTIONS["num_stages"],
        )
    tile_of_norms = gradient.NORMS_TILE
    made["weight"] = compiled(
        capability,
        gradient.weight_kernel,
        types,
        gradient.weight_constants(),
        tile_of_norms.warps,
        tile_of_norms.stages,
    )
    return made


if __name__ == "__main__":
    print(json.dumps({capability: every_kernel(int(capability)) for capability in sys.argv[1:]}))
