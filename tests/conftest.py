"""Puts the tests folder on the path, so that tests can import the `support_*` modules in it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
