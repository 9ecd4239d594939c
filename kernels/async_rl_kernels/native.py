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
from ctypes import POINTER, Structure, c_float, c_int, c_long, c_void_p
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
MOST = 16384
"""elements of a row"""
HEAD_SIZES = (16, 32, 64, 96, 128)
"""of attention"""
WIDTH, DEPTH = 16, 64
"""keys that are looked at together; runs of a tree above each other"""
COMPILE_S = 120.0


class Attention(Structure):
    """The argument of `attend` in native.c."""

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
    """The argument of `tree_forward` and `tree_backward` in native.c."""

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
}
RETURNS = {"tree_forward": c_int, "tree_backward": c_int}


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


def _compiled() -> Path:
    """The library's file, made if it is not there. Raises OSError or SubprocessError."""
    compiler = shutil.which(os.environ.get("CC", "") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_S, check=True).stdout
    name = sha256(b"\0".join((SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _processor()))).hexdigest()[:24]
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
