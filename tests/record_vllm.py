"""Writes tests/generator/vllm_releases.json: what of vLLM async_rl calls and passes, in each release.

    python tests/record_vllm.py FOLDER [FOLDER ...]     # each an unpacked vLLM wheel

vLLM is read, not imported, so that releases can be recorded that cannot be installed side by side or at all.
Kept are names only: fields of classes, parameters of functions, with "..." for every default. To record a new
release: `pip download --no-deps vllm==VERSION`, unzip its *.py and METADATA, and name all folders again.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).parent / "generator" / "vllm_releases.json"
TRANSFER = "vllm.distributed.weight_transfer"
THINGS = (
    "vllm._custom_ops._supports_onednn",
    "vllm.config.weight_transfer.WeightTransferConfig",
    f"{TRANSFER}.base.ModuleSource",
    f"{TRANSFER}.base.ParamMeta",
    f"{TRANSFER}.base.TrainerInitInfo",
    f"{TRANSFER}.base.TrainerWeightTransferEngine",
    f"{TRANSFER}.base.VLLMWeightSyncClient",
    f"{TRANSFER}.base.WeightSource",
    f"{TRANSFER}.base.WeightTransferEngine",
    f"{TRANSFER}.base.WeightTransferInitRequest",
    f"{TRANSFER}.base.WeightTransferUpdateRequest",
    f"{TRANSFER}.factory.WeightTransferEngineFactory",
    f"{TRANSFER}.factory.WeightTransferTrainerFactory",
    f"{TRANSFER}.ipc_engine.IPCWeightTransferEngine",
    f"{TRANSFER}.ipc_engine.IPCWeightTransferInitInfo",
    f"{TRANSFER}.ipc_engine.IPCWeightTransferUpdateInfo",
    f"{TRANSFER}.nccl_common.NCCLWeightTransferInitInfo",
    f"{TRANSFER}.nccl_common.stateless_init_process_group",
    f"{TRANSFER}.nccl_common.trainer_init",
    f"{TRANSFER}.nccl_engine.NCCLTrainerInitInfo",
    f"{TRANSFER}.nccl_engine.NCCLTrainerSendWeightsArgs",
    f"{TRANSFER}.nccl_engine.NCCLTrainerWeightTransferEngine",
    f"{TRANSFER}.nccl_engine.NCCLWeightTransferEngine",
    f"{TRANSFER}.nccl_engine.NCCLWeightTransferUpdateInfo",
    "vllm.distributed.device_communicators.pynccl.PyNcclCommunicator",
    "vllm.engine.arg_utils.AsyncEngineArgs",
    "vllm.exceptions.VLLMValidationError",
    "vllm.inputs.TokensPrompt",
    "vllm.logprobs.Logprob",
    "vllm.outputs.CompletionOutput",
    "vllm.outputs.RequestOutput",
    "vllm.outputs.WeightVersionSpan",
    "vllm.sampling_params.RequestOutputKind",
    "vllm.sampling_params.SamplingParams",
    "vllm.v1.engine.async_llm.AsyncLLM",
    "vllm.v1.engine.exceptions.EngineDeadError",
    "vllm.v1.engine.exceptions.EngineGenerateError",
    "vllm.v1.worker.gpu_worker.Worker",
)


def main(folders: list[str]) -> None:
    torch, lines = {}, {}
    for folder in map(Path, folders):
        (metadata,) = folder.glob("*.dist-info/METADATA")
        said = metadata.read_text()
        release = re.search(r"^Version: (\S+)", said, re.M)
        pinned = re.search(r"^Requires-Dist: torch==(\S+?)(?:;|\s|$)", said, re.M)
        assert release
        assert pinned
        torch[release[1]] = pinned[1]
        lines[release[1]] = {thing: described(folder, thing) or [] for thing in THINGS}
    releases = sorted(torch, key=lambda name: [int(word) for word in name.split(".")])
    things: dict[str, dict[str, str]] = {}
    for thing in THINGS:
        every = list(dict.fromkeys(line for release in releases for line in lines[release][thing]))
        having = {line: [release for release in releases if line in lines[release][thing]] for line in every}
        things[thing] = {line: "all" if some == releases else " ".join(some) for line, some in having.items()}
    record = {"torch": {release: torch[release] for release in releases}, "things": things}
    FILE.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{FILE}: {len(THINGS)} things of {len(releases)} releases, {FILE.stat().st_size} bytes")


def described(folder: Path, thing: str) -> list[str] | None:
    """What there is to say of it, in lines that begin with `here`, `base`, `field` (with = if it has a default),
    `method` or `call`. None: there is no such thing."""
    module, _, name = thing.rpartition(".")
    path = folder / (module.replace(".", "/") + ".py")
    package = module.rpartition(".")[0]
    if not path.exists():
        path, package = folder / module.replace(".", "/") / "__init__.py", module
    if not path.exists():
        return None
    tree = ast.parse(path.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(names=names) if name in [alias.asname or alias.name for alias in names]:
                (original,) = [alias.name for alias in names if (alias.asname or alias.name) == name]
                assert node.level < 2
                there = ".".join(word for word in (package if node.level else "", node.module) if word)
                return described(folder, f"{there}.{original}")
            case ast.ClassDef() if node.name == name:
                return ["here", *dict.fromkeys(_class(node, classes))]
            case ast.FunctionDef() | ast.AsyncFunctionDef() if node.name == name:
                return ["here", f"call {_parameters(node)}"]
            case ast.Assign(targets=[ast.Name(id=assigned)]) if assigned == name:
                return ["here"]
    return None


def _class(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """Its own members first, then those of its base classes in the same file (`classes`)."""
    for inside in node.body:
        match inside:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=value):
                if not ast.unparse(kind).startswith("ClassVar"):
                    yield f"field {name}{'=' if value is not None else ''}"
            case ast.Assign(targets=[ast.Name(id=name)]):
                yield f"field {name}="
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                public = not inside.name.startswith("_") or inside.name == "__init__"
                if _is(inside, "property"):
                    yield f"field {inside.name}="
                elif public:
                    yield f"method {inside.name} {_parameters(inside)}"
                if inside.name == "__init__":
                    yield from (f"field {name}=" for name in _assigned(inside))
    for base in node.bases:
        name = ast.unparse(base).split("[")[0].split(".")[-1]
        yield f"base {name}"
        if name in classes:
            yield from _class(classes[name], classes)


def _assigned(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Attributes that a constructor gives itself."""
    for inside in ast.walk(node):
        match inside:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()) if not name.startswith("_"):
                yield name


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """As in the source, without types; "..." for each default. A static method has no self."""
    node.args.defaults = [ast.Constant(...)] * len(node.args.defaults)
    node.args.kw_defaults = [None if d is None else ast.Constant(...) for d in node.args.kw_defaults]
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ("static " if _is(node, "staticmethod") else "") + ast.unparse(node.args)


def _is(node: ast.FunctionDef | ast.AsyncFunctionDef, decorator: str) -> bool:
    return any(isinstance(d, ast.Name) and d.id == decorator for d in node.decorator_list)


if __name__ == "__main__":
    main(sys.argv[1:])
