"""Lets the tests of this room import the fakes that lie in tests/, and makes hypothesis repeatable."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.append(str(Path(__file__).parents[1]))
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
