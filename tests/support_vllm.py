"""What our files ask of vLLM, found by reading them, and what each recorded release would say to it."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from async_rl.generator.vllm_engine import VllmOptions
from async_rl.weights.vllm_release import NEWEST, OLDEST, SPANS, TRAINER_FACTORY, Release

ROOT = Path(__file__).resolve().parent.parent
RECORD = json.loads((Path(__file__).parent / "generator" / "vllm_releases.json").read_text())
RELEASES: list[str] = list(RECORD["torch"])
THINGS: dict[str, dict[str, str]] = RECORD["things"]
ASYNC_LLM = "vllm.v1.engine.async_llm.AsyncLLM"
WORKER = "vllm.v1.worker.gpu_worker.Worker"
INSTANCES = {
    ("vllm_engine.py", "self._llm"): ASYNC_LLM,
    ("vllm_engine.py", "output"): "vllm.outputs.CompletionOutput",
    ("vllm_engine.py", "answer"): "vllm.outputs.RequestOutput",
    ("vllm_engine.py", "entry[token]"): "vllm.logprobs.Logprob",
    ("vllm_engine.py", "span"): "vllm.outputs.WeightVersionSpan",
    ("vllm_worker.py", "self"): WORKER,
}
"""what a name of ours is in a file"""
OURS = {"model_config", "model_runner", "rank", "_given", "_given_version", "_shared", "_receiver"}
"""attributes that no signature shows"""
SINCE: dict[str, Release] = {
    "vllm.outputs.CompletionOutput.weight_versions": SPANS,
    "vllm.outputs.WeightVersionSpan": SPANS,
    f"{ASYNC_LLM}.update_weight_version": SPANS,  # it came earlier; asked of those only that tell the spans
}
"""used in these releases only: the code asks which one it is"""
WITHIN: dict[str, tuple[Release, Release]] = {
    "NcclLink": (TRAINER_FACTORY, NEWEST),
    "OldNcclLink": (OLDEST, (0, TRAINER_FACTORY[1] - 1)),
}
"""class of ours -> first and last release it is made for"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place where something of vLLM is named or called."""

    thing: str
    member: str = ""
    call: tuple[int, tuple[str, ...]] | None = None
    """(positional arguments, names of the others); None: it is not called"""
    where: str
    inside: str = ""
    """class of ours"""

    def used_in(self, release: str) -> bool:
        first, last = WITHIN.get(self.inside, (OLDEST, NEWEST))
        first = max(first, SINCE.get(self.thing, SINCE.get(f"{self.thing}.{self.member}", OLDEST)))
        return first <= number(release) <= last


def number(release: str) -> Release:
    major, minor, *_ = release.split(".")
    return int(major), int(minor)


def lines(thing: str, release: str) -> list[str]:
    """What was recorded of a thing, its own members before those of its base classes."""
    return [line for line, having in THINGS[thing].items() if having == "all" or release in having.split()]


@cache
def signature(parameters: str) -> inspect.Signature:
    node = ast.parse(f"def f({parameters.removeprefix('static ')}): ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    a, kinds = node.args, inspect.Parameter
    positional = [*a.posonlyargs, *a.args]
    required = len(positional) - len(a.defaults)
    made = [
        kinds(arg.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if i < required else ...)
        for i, arg in enumerate(positional)
    ]
    made += [kinds(a.vararg.arg, kinds.VAR_POSITIONAL)] if a.vararg else []
    made += [
        kinds(arg.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else ...)
        for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    made += [kinds(a.kwarg.arg, kinds.VAR_KEYWORD)] if a.kwarg else []
    return inspect.Signature(made)


def refusal(site: Site, release: str) -> str:
    """Why this release would not take it; empty: it would."""
    recorded = lines(site.thing, release)
    if "here" not in recorded:
        return f"there is no {site.thing}"
    fields = {line.removeprefix("field ").rstrip("="): line[-1] for line in recorded if line.startswith("field ")}
    methods = {}
    for line in reversed(recorded):
        kind, _, rest = line.partition(" ")
        if kind == "method":
            name, _, parameters = rest.partition(" ")
            methods[name] = parameters
        elif kind == "call":  # a function
            methods["__init__"] = f"static {rest}"
    if site.member and site.member not in methods and site.member not in fields:
        return f"{site.thing} has no {site.member}"
    if site.call is None:
        return ""
    count, names = site.call
    name = site.member or "__init__"
    if name in methods:
        own = 0 if methods[name].startswith("static ") else 1
        try:
            signature(methods[name]).bind(*[None] * (count + own), **dict.fromkeys(names))
        except TypeError as error:
            return f"{site.thing}.{name}({methods[name]}): {error}"
        return ""
    if count:
        return f"{site.thing} is made of fields, and {count} are given by position"
    wrong = set(names) - set(fields)
    missing = {f for f, last in fields.items() if last != "="} - set(names) if site.thing not in PARTIAL else set()
    return f"{site.thing} has no {sorted(wrong)}, wants {sorted(missing)}" if wrong or missing else ""


PARTIAL = {"vllm.inputs.TokensPrompt"}
"""dictionaries whose other keys need not be there"""


def files() -> list[Path]:
    return sorted(path for path in (ROOT / "async_rl").rglob("*vllm*.py") if path.name != "vllm_release.py")


def sites(path: Path) -> Iterator[Site]:
    """Everything of vLLM that a file names."""
    tree = ast.parse(path.read_text())
    imported: dict[str, str] = {}
    inside = {
        id(node): owner.name for owner in tree.body if isinstance(owner, ast.ClassDef) for node in ast.walk(owner)
    }
    for node in ast.walk(tree):
        line = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        place = {"where": line, "inside": inside.get(id(node), "")}
        match node:
            case ast.ImportFrom(module=module, names=names) if module and module.split(".")[0] == "vllm":
                for alias in names:
                    if f"{module}.{alias.name}" in MODULES:
                        continue
                    thing = f"{module}.{alias.name}"
                    imported[alias.asname or alias.name] = SAME.get(thing, thing)
                    yield Site(thing=SAME.get(thing, thing), **place)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        line = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        place = {"where": line, "inside": inside.get(id(node), "")}
        call = called.get(id(node))
        arguments = None
        if call is not None and not any(k.arg is None for k in call.keywords):
            arguments = (len(call.args), tuple(k.arg for k in call.keywords if k.arg))
        match node:
            case ast.Name(id=name) if name in imported and call is not None:
                yield Site(thing=imported[name], call=arguments, **place)
            case ast.Attribute(value=ast.Name(id=name), attr=member) if name in imported:
                yield Site(thing=imported[name], member=member, call=arguments, **place)
            case ast.Attribute(value=value, attr=member):
                thing = INSTANCES.get((path.name, ast.unparse(value)))
                own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
                if thing is not None and member not in OURS | own:
                    yield Site(thing=thing, member=member, call=arguments, **place)


MODULES = {"vllm.outputs"}
SAME = {"vllm.SamplingParams": "vllm.sampling_params.SamplingParams"}
"""other names of a thing"""


def vllm_options(**changes: Any) -> VllmOptions:
    """Of an engine that is never started."""
    given: dict[str, Any] = {
        "model": Path("m"),
        "max_sequences": 4,
        "max_context": 64,
        "dtype": "float32",
        "device": "cpu",
        "kv_on_update": "keep",
        "kv_cache_bytes": 1 << 20,
        "memory_share": 0.5,
        "tensor_parallel": 1,
        "layout": {},
    }
    return VllmOptions(**given | changes)
