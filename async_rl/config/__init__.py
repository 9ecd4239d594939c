"""WHAT A RUN IS TOLD. Every setting with its meaning, unit, default and bounds (settings.py), the relations between
them (checks.py), and how they are read from a file and the command line (schema.py, load.py).

In: a YAML file and `name=value` words. Out: one frozen `Settings`, checked: a value out of bounds, settings that
contradict each other or would do nothing are refused here, before anything starts. Nobody waits.
"""

from async_rl.config.checks import check
from async_rl.config.derived import default_window, pace_of
from async_rl.config.load import load_settings, load_with_notes
from async_rl.config.settings import (
    CriticSettings,
    GuardSettings,
    ModelSettings,
    OptimizerSettings,
    ReferenceSettings,
    Settings,
    StalenessSettings,
    UpdatesSettings,
    WireSettings,
)

__all__ = [
    "CriticSettings",
    "GuardSettings",
    "ModelSettings",
    "OptimizerSettings",
    "ReferenceSettings",
    "Settings",
    "StalenessSettings",
    "UpdatesSettings",
    "WireSettings",
    "check",
    "default_window",
    "load_settings",
    "load_with_notes",
    "pace_of",
]
