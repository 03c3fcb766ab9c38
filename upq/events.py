"""What has happened, told to whoever watches. Subscribers cannot fail or delay a job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

log = logging.getLogger(__name__)


class Event(NamedTuple):
    """One committed change of a job's state; also a row of the history, without its number."""

    job: int
    lane: int
    at: int
    state: str
    reason: str
    message: str
    attempt: int
    node: str
    who: str


Subscriber = Callable[[Sequence[Event]], None]


class Bus:
    """Hands committed events to subscribers, in the thread that committed them.

    Subscribers only take note and return; one that raises is logged and hurts nobody.
    """

    def __init__(self) -> None:
        self._subscribers: tuple[Subscriber, ...] = ()

    def subscribe(self, subscriber: Subscriber) -> None:
        self._subscribers += (subscriber,)

    def publish(self, events: Sequence[Event]) -> None:
        for subscriber in self._subscribers:
            try:
                subscriber(events)
            except Exception:
                log.exception("an event subscriber failed")
