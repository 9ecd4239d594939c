"""The shape of the code, kept by reading it: who may import whom, what must not appear, how long things get."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"async_rl": ROOT / "async_rl", "async_rl_kernels": ROOT / "kernels" / "async_rl_kernels"}

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        # what everything stands on, each importing only those before it
        "version errors finding stall_timer steady_clock tidying",
        "trajectory",
        "config",
        "events process_spec",
        "run_folder",
        "process",
        # rooms
        "async_rl_kernels",
        "wire task model",
        "buffer objective",
        "weights",
        "generator trainer",
        "observe",
        # what starts them, and instruments that study them
        "run",
        "cluster",
        "instruments",
        "doctor",
        "api",
        "cli",
        "__main__ __init__",
    )
)
"""A room (a folder or a file of async_rl, or the kernels) imports rooms of earlier lines only: never one
beside it, never a later one. So generator and trainer do not know each other."""

ONLY = {
    "omegaconf": r"async_rl/config/schema\.py",
    "shtab": r"async_rl/cli/.*",
    "zmq": r"async_rl/wire/.*",
    "triton": r"kernels/async_rl_kernels/.*",
    "vllm": r".*vllm.*",
    "ray": r"async_rl/cluster/ray_(cluster|actors)\.py",
    "transformers": r"async_rl/model/(huggingface|importing|plain_tokenizer)\.py",
}
"""packages that may be imported by some files only"""
WITHOUT_TORCH = ("buffer", "wire", "trajectory", "task", "observe")
HEAVY = ("torch", "vllm", "transformers")
EXECUTABLE_FORMATS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve")
UNSAFE_YAML = ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all", "Loader")
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}

LONGEST_FILE = 600
LONGER_FILES: dict[str, str] = {
    "async_rl/wire/messages.py": "the list of all messages, each declared once",
    "async_rl/events.py": "the list of all events, each declared once",
}
"""exceptions, each with its reason"""
LONGEST_FUNCTION = 75


@cache
def sources() -> tuple[Path, ...]:
    return tuple(sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    """ "buffer" for async_rl/buffer/core.py, "launch" for async_rl/run/launcher.py."""
    if path.is_relative_to(PACKAGES["async_rl_kernels"]):
        return "async_rl_kernels"
    return path.relative_to(PACKAGES["async_rl"]).with_suffix("").parts[0]


def module_of(path: Path) -> str:
    """ "async_rl.buffer" for its __init__.py, "async_rl.buffer.core" for core.py."""
    package = "async_rl_kernels" if path.is_relative_to(PACKAGES["async_rl_kernels"]) else "async_rl"
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in the file, for types or not."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_imported(name: str) -> str | None:
    """The room behind `async_rl.buffer.core`; None for other packages and for `async_rl` itself."""
    first, *rest = name.split(".")
    if first == "async_rl_kernels":
        return first
    if first != "async_rl" or not rest:
        return None
    return rest[0]


def test_every_room_has_its_place_among_the_layers() -> None:
    rooms = {room_of(path) for path in sources()}
    placed = frozenset().union(*LAYERS)
    assert rooms <= placed, f"{sorted(rooms - placed)}: say in LAYERS what it may import"


def test_imports_point_one_way() -> None:
    height = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    wrong = sorted(
        {
            f"{name_of(path)} imports {there}"
            for path in sources()
            for there in map(room_imported, imports(path))
            if there is not None and there != room_of(path) and height[there] >= height[room_of(path)]
        }
    )
    assert not wrong, wrong


def test_nothing_of_the_core_imports_instruments() -> None:
    """Names in strings count, too: `importlib.import_module` and `python -m` take them."""
    there = "async_rl.instruments"
    users = {
        name_of(path)
        for path in sources()
        if any(name == there or name.startswith(f"{there}.") for name in imports(path))
        or any(isinstance(node, ast.Constant) and there in str(node.value) for node in ast.walk(tree(path)))
    }
    assert users
    core = sorted(name for name in users if not re.match(r"async_rl/(instruments|cli|doctor)/", name))
    assert not core, core


@pytest.mark.parametrize("package", ONLY)
def test_a_foreign_package_is_imported_in_its_own_place_only(package: str) -> None:
    importing = {name_of(path) for path in sources() for name in imports(path) if name.split(".")[0] == package}
    strangers = sorted(name for name in importing if not re.fullmatch(ONLY[package], name))
    assert not strangers, f"{package} is imported by {strangers}"


def test_buffer_wire_trajectory_task_and_observe_run_without_torch() -> None:
    modules = []
    for path in sources():
        inside = name_of(path).removeprefix("async_rl/")
        if inside.startswith(WITHOUT_TORCH) and path.name != "__main__.py":
            modules.append(name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    assert len(modules) > 20
    script = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_nothing_that_is_read_can_execute_code() -> None:
    found = []
    for path in sources():
        found += [f"{name_of(path)}: {n}" for n in imports(path) if n.split(".")[0] in EXECUTABLE_FORMATS]
        for node in ast.walk(tree(path)):
            match node:
                case ast.Call(func=ast.Name(id="eval" | "exec" as called)):
                    found.append(f"{name_of(path)}:{node.lineno}: {called}")
                case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "jit" | "package" as read):
                    found.append(f"{name_of(path)}:{node.lineno}: torch.{read}")
                case ast.Attribute(value=ast.Name(id="yaml"), attr=read) if read in UNSAFE_YAML:
                    found.append(f"{name_of(path)}:{node.lineno}: yaml.{read}")
                case ast.keyword(arg="allow_pickle" | "trust_remote_code" as allowed):
                    found.append(f"{name_of(path)}:{node.value.lineno}: {allowed}")
    assert not found, found


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = [name_of(path) for path in sources() if EMPTY_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)]
    assert not empty, empty


def test_there_is_no_root_package_named_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "transformers imports another package of that name"


def test_every_room_says_what_it_is_for() -> None:
    for folder in sorted({path.parent for path in sources()}):
        entry = folder / "__init__.py"
        assert entry.exists(), f"{name_of(folder)} has no __init__.py"
        assert ast.get_docstring(tree(entry)), f"{name_of(entry)} has no docstring"


def test_modules_import_each_other_in_no_circle() -> None:
    """Imports inside functions and for types count. A kernel and its Triton twin are one thing in two files."""
    files = {module_of(path): path for path in sources()}
    arrows = {
        name: {found for found in imports(path) if found in files and found != name and found != f"{name}_triton"}
        for name, path in files.items()
    }
    while free := [name for name, there in arrows.items() if not there & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows, {name: sorted(there & arrows.keys()) for name, there in arrows.items()}


def test_files_stay_readable() -> None:
    others = [*(ROOT / "bench").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    length = {name_of(path): path.read_text().count("\n") for path in (*sources(), *others)}
    long = {name: lines for name, lines in length.items() if lines > LONGEST_FILE and name not in LONGER_FILES}
    assert not long, long
    needless = [name for name in LONGER_FILES if length.get(name, 0) <= LONGEST_FILE]
    assert not needless, f"{needless} need no exception any more"


def test_functions_stay_short() -> None:
    long = {}
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long[f"{name_of(path)}:{node.name}"] = lines
    assert not long, long


def test_no_path_of_a_developers_machine_is_published() -> None:
    published = [ROOT / "README.md", *(ROOT / "docs").rglob("*"), *(ROOT / "configs").rglob("*")]
    found = []
    for path in published:
        if path.is_file() and path.suffix in (".md", ".yaml", ".yml", ".py", ".toml", ".txt", ".html"):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                if re.search(r"(?<![\w.~])/(tmp|root|work|home)\b", line):
                    found.append(f"{name_of(path)}:{number}: {line.strip()}")
    assert not found, found


WALL_CLOCK = {
    "async_rl/steady_clock.py": "where it is read once",
    "async_rl/run_folder.py": "events, for people",
    "async_rl/run/liveness.py": "live.json, which another process compares with its own clock",
    "async_rl/observe/top.py": "the same, on the other side",
    "async_rl/observe/report.py": "when a report was made",
    "async_rl/observe/tracker.py": "an event of a tracker",
    "async_rl/trainer/alarm.py": "when a run went back",
    "async_rl/generator/chat_request.py": "the date of an answer in OpenAI's form",
    "async_rl/generator/answer_stream.py": "the same, of a piece of one",
}
"""files that may ask for the time on the wall, which is set back and forth. Nothing is measured with it."""


def test_nothing_is_measured_with_the_clock_on_the_wall() -> None:
    found = {
        name_of(path)
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "time"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("time", "clock")
    }
    assert found <= WALL_CLOCK.keys()
