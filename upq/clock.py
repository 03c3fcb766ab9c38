"""Chores with their seconds: one tick does all that is due and says when it wants the next."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Clock:
    """What is done every so often. `now` tells seconds that only grow."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._chores: list[tuple[str, float, Callable[[], object]]] = []
        self._due: dict[str, float] = {}

    def every(self, seconds: float, name: str, chore: Callable[[], object]) -> None:
        """Have a chore done first after `seconds`, then every so often."""
        self._chores.append((name, seconds, chore))

    def tick(self) -> float:
        """Do what is due; returns the seconds until the next. A chore that fails is logged."""
        for name, seconds, chore in self._chores:
            now = self._now()  # the one before may have taken long
            if now < self._due.setdefault(name, now + seconds):
                continue
            self._due[name] = now + seconds
            try:
                chore()
            except Exception as error:
                log.warning("chore %s: %s", name, error)
        now = self._now()
        return max(min(self._due.values(), default=now + 1.0) - now, 0.0)
