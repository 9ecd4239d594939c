"""bench/kernels.py, the rows for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SECTIONS: dict[str, Callable[[int], dict[str, Any]]] = {}
