"""WHAT A RUN IS TOLD. Every setting with its meaning, unit, default (run.py, wire.py, guard.py) and range (ranges.py).

In: a YAML file and `name=value` words. Out: one frozen `Settings`, checked: a value out of range, settings that
contradict each other or would do nothing are refused here, before anything starts. Nobody waits.
"""

from async_rl.config.settings import (
    CriticSettings,
    GuardSettings,
    ModelSettings,
    OptimizerSettings,
    Settings,
    StalenessSettings,
    WireSettings,
    check,
    default_window,
    load_settings,
    pace_of,
)

__all__ = [
    "CriticSettings",
    "GuardSettings",
    "ModelSettings",
    "OptimizerSettings",
    "Settings",
    "StalenessSettings",
    "WireSettings",
    "check",
    "default_window",
    "load_settings",
    "pace_of",
]
