"""What a run on Ray shows: as any run, without telling the user to start what Ray starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from async_rl.config import Settings
from async_rl.config.cluster import bounds_of
from async_rl.events import Event, TrainerAwaited
from async_rl.observe.console import Console


class RayConsole(Console):
    """Its lines go to the actor, which passes them on to the command."""

    def start(self, settings: Settings, folder: Path, notes: Iterable[str]) -> None:
        """Print what is run; Ray's generators count as the run's own."""
        fewest, _ = bounds_of(settings.cluster, settings.generator.count)
        shown = replace(settings, generator=replace(settings.generator, count=fewest))
        super().start(shown, folder, notes)

    def event(self, event: Event) -> None:
        """Print what is worth a line."""
        if not isinstance(event, TrainerAwaited):
            super().event(event)
