"""Operations between matrix products as C functions (native.c), compiled once where there is a C compiler.

In torch each of them is five to twenty passes over memory, or as many calls. Where no compiler is found, tensors are
elsewhere than on a CPU or of another dtype, torch's operations serve: results differ in the last bits. Functions here
let go of Python's lock.

The library lies in the user's cache folder, under a name made of its source, the compiler and the processor.
ASYNC_RL_NATIVE=0 in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_long, c_void_p
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
PARTS = tuple(Path(__file__).with_name(name) for name in ("tree.c", "layers.c", "stack.c", "decode.c"))
"""what it includes"""
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
MOST = 16384
"""elements of a row"""
HEAD_SIZES = (16, 32, 64, 96, 128)
"""of attention"""
WIDTH, DEPTH = 16, 64
"""keys that are looked at together; runs of a tree above each other"""
COMPILE_S = 120.0


class Attention(Structure):
    """The argument of `attend` in decode.c."""

    _fields_ = (
        ("query", c_void_p),
        ("stride", c_long),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("table", c_void_p),
        ("columns", c_long),
        ("length", c_void_p),
        ("filled", c_void_p),
        ("first", c_void_p),
        ("slot", c_void_p),
        ("position", c_void_p),
        ("tokens", c_long),
        ("heads", c_long),
        ("kv_heads", c_long),
        ("size", c_long),
        ("window", c_long),
        ("threads", c_long),
        ("scale", c_float),
        ("out", c_void_p),
    )


class Tree(Structure):
    """The argument of `tree_forward` and `tree_backward` in tree.c."""

    _fields_ = (
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("query_stride", c_long),
        ("key_stride", c_long),
        ("value_stride", c_long),
        ("runs", c_void_p),
        ("count", c_long),
        ("rows", c_long),
        ("heads", c_long),
        ("kv_heads", c_long),
        ("size", c_long),
        ("longest", c_long),
        ("scale", c_float),
        ("threads", c_int),
        ("out", c_void_p),
        ("log_sum", c_void_p),
        ("gradient", c_void_p),
        ("gradient_stride", c_long),
        ("of_query", c_void_p),
        ("of_key", c_void_p),
        ("of_value", c_void_p),
    )


class Before(Structure):
    """The argument of `before_forward` and `before_backward` in layers.c."""

    _fields_ = (
        ("gemm", c_void_p),
        *((name, c_long) for name in ("rows", "hidden", "heads", "kv_heads", "size", "block")),
        ("threads", c_int),
        ("eps", c_float),
        ("x", c_void_p),
        ("x_stride", c_long),
        *((name, c_void_p) for name in ("norm", "query_weight", "key_weight", "value_weight")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "cos", "sin", "scale", "query_in", "key_in")),
        *((name, c_void_p) for name in ("query", "key", "value", "room", "of_query", "of_key", "of_value")),
        *((name, c_long) for name in ("of_query_stride", "of_key_stride", "of_value_stride")),
        *((name, c_void_p) for name in ("of_x", "of_norm", "of_query_norm", "of_key_norm")),
        *((name, c_void_p) for name in ("of_query_weight", "of_key_weight", "of_value_weight")),
        ("keep", c_int),
        ("more", c_void_p),
    )


class After(Structure):
    """The argument of `after_forward` and `after_backward` in layers.c."""

    _fields_ = (
        ("gemm", c_void_p),
        *((name, c_long) for name in ("rows", "hidden", "attended", "inner", "block")),
        ("threads", c_int),
        ("eps", c_float),
        *((name, c_void_p) for name in ("x", "out")),
        *((name, c_long) for name in ("x_stride", "out_stride")),
        *((name, c_void_p) for name in ("out_weight", "norm", "gate_weight", "up_weight", "down_weight")),
        *((name, c_void_p) for name in ("middle", "scale", "gate", "up", "y", "room", "of_y")),
        ("of_y_stride", c_long),
        *((name, c_void_p) for name in ("of_x", "of_out", "of_norm")),
        *((name, c_void_p) for name in ("of_out_weight", "of_gate_weight", "of_up_weight", "of_down_weight")),
        ("keep", c_int),
    )


class Stack(Structure):
    """The argument of `stack_forward` and `stack_backward` in stack.c."""

    _fields_ = (
        ("gemm", c_void_p),
        *((name, c_long) for name in ("rows", "hidden", "heads", "kv_heads", "size", "inner", "layers")),
        *((name, c_long) for name in ("block", "widest")),
        ("threads", c_int),
        ("eps", c_float),
        *((name, c_void_p) for name in ("x", "cos", "sin", "parts")),
        ("count", c_long),
        ("runs", c_void_p),
        ("longest", c_long),
        ("scale", c_float),
        *((name, c_void_p) for name in ("asked", "layer", "room", "of_y", "of_x")),
    )


class DecodeLayer(Structure):
    """A layer of `Decode`."""

    _fields_ = (
        *((name, c_void_p) for name in ("first_norm", "query_key_value", "out", "second_norm", "gate_up", "down")),
        *((name, c_void_p) for name in ("norms", "keys", "values")),
        ("window", c_long),
    )


class Decode(Structure):
    """The argument of `decode` in decode.c."""

    _fields_ = (
        ("gemm", c_void_p),
        *((name, c_long) for name in ("tokens", "hidden", "heads", "kv_heads", "size", "inner")),
        *((name, c_long) for name in ("layers", "vocabulary", "wanted", "block_rows")),
        ("threads", c_int),
        ("eps", c_float),
        *((name, c_void_p) for name in ("token", "position", "block", "place", "last")),
        *((name, c_void_p) for name in ("embedding", "final_norm", "head", "rotation")),
        ("layer", POINTER(DecodeLayer)),
        ("attention", POINTER(Attention)),
        *((name, c_void_p) for name in ("room", "logits")),
    )


class Steps(Structure):
    """The argument of `take_steps` in decode.c."""

    _fields_ = (
        ("decode", POINTER(Decode)),
        ("attention", POINTER(Attention)),
        ("most", c_long),
        ("seconds", c_double),
        *((name, c_void_p) for name in ("token", "position", "place", "block", "uniform", "heat", "log_prob", "drawn")),
        *((name, c_void_p) for name in ("tokens", "versions", "log_probs")),
        ("context", c_long),
        *((name, c_void_p) for name in ("known", "limit", "rule", "seed", "temperature")),
        ("version", c_int),
        *((name, c_void_p) for name in ("ends", "maybe", "filled", "cached", "block_tokens")),
    )


P, N, F, T = c_void_p, c_long, c_float, c_int
SIGNATURES = {
    "rms_norm": (P, N, P, F, P, N, P, N, N, T),
    "rms_norm_backward": (P, N, P, N, P, P, P, N, P, N, N, N, T),
    "turn_heads": (P, N, P, P, N, F, P, P, N, P, P, N, N, N, N, T),
    "turn_heads_back": (P, N, P, P, P, N, N, N, N, T),
    "swiglu": (P, N, P, N, P, N, N, N, T),
    "swiglu_backward": (P, N, P, N, P, N, P, P, N, N, N, T),
    "write_cache": (P, P, N, P, P, P, P, N, N, N),
    "attend": (POINTER(Attention),),
    "turn_matrix": (P, N, N, P, N, T),
    "tree_forward": (POINTER(Tree),),
    "tree_backward": (POINTER(Tree),),
    "before_forward": (POINTER(Before),),
    "before_backward": (POINTER(Before),),
    "after_forward": (POINTER(After),),
    "after_backward": (POINTER(After),),
    "stack_room": (POINTER(Stack),),
    "stack_forward": (POINTER(Stack),),
    "stack_backward": (POINTER(Stack),),
    "decode": (POINTER(Decode),),
    "draw": (P, P, P, P, P, N, N),
    "take_steps": (POINTER(Steps),),
}
RETURNS = {
    "tree_forward": c_int,
    "tree_backward": c_int,
    "stack_room": c_long,
    "stack_forward": c_int,
    "stack_backward": c_int,
    "take_steps": c_long,
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be had."""
    if os.environ.get("ASYNC_RL_NATIVE", "1") == "0":
        return None
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, RETURNS.get(name)
    return found


@cache
def gemm() -> int | None:
    """The address of `sgemm` of the library that torch multiplies with, as Fortran calls it; None where torch does not
    show it. It uses as many threads as torch does in the thread that calls it."""
    try:
        return ctypes.cast(ctypes.CDLL(str(TORCH)).sgemm_, c_void_p).value
    except (OSError, AttributeError):
        return None


def _compiled() -> Path:
    """The library's file, made if it is not there. Raises OSError or SubprocessError."""
    compiler = shutil.which(os.environ.get("CC", "") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_S, check=True).stdout
    sources = (file.read_bytes() for file in (SOURCE, *PARTS))
    name = sha256(b"\0".join((*sources, version, " ".join(FLAGS).encode(), _processor()))).hexdigest()[:24]
    for folder in _folders():
        file = folder / f"native-{name}.so"
        if file.is_file() and file.stat().st_uid == os.getuid():
            return file
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                made = Path(place) / "native.so"
                tuned = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
                command = [compiler, *FLAGS, tuned, "-o", str(made), str(SOURCE)]
                try:
                    subprocess.run([*command, "-fopenmp"], capture_output=True, timeout=COMPILE_S, check=True)
                except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
                    subprocess.run(command, capture_output=True, timeout=COMPILE_S, check=True)
                made.replace(file)  # several processes may be at it
        except PermissionError:
            continue
        return file
    raise PermissionError("no folder for the compiled library")


def _folders() -> list[Path]:
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    found = [Path(cache_home) / "async_rl"] if cache_home else []
    if os.environ.get("HOME"):
        found.append(Path(os.environ["HOME"]) / ".cache" / "async_rl")
    return [*found, Path(tempfile.gettempdir()) / f"async_rl-{os.getuid()}"]


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(kept)).encode()


def usable(*tensors: Tensor) -> bool:
    """Whether functions here take these: float32 on a CPU, rows of contiguous elements, not inside torch.compile."""
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
        and not torch.compiler.is_compiling()
        and library() is not None
    )
