"""Which appserver a site goes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deploylib.settings import TaskError

#: Seconds after which a figure tells nothing any more.
STALE_S = 600.0


@dataclass(frozen=True)
class Seen:
    """What was last seen of an appserver."""

    server: int
    #: Of the last minute, for each of its processors.
    load: float
    healthy: bool
    #: Seconds ago.
    age_s: float


def choose(servers: Iterable[Seen]) -> int:
    """The number of the healthy one with the least load. Raises TaskError when there is none."""
    known = list(servers)
    usable = [one for one in known if one.healthy and one.age_s <= STALE_S]
    if not usable:
        raise TaskError(f"none of {len(known)} appservers is healthy")
    return min(usable, key=lambda one: (one.load, one.server)).server
