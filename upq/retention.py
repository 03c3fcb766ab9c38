"""Deletes jobs that have ended long ago; how long ago is said by `[db]`, or by their types."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from upq import when
from upq.job import CANCELLED, DONE, EXPIRED, FAILED
from upq.jobsettings import JobSettings
from upq.queue import Queue, Walk
from upq.settings import Db, Settings

#: Seconds that one step may take; then others get their turn.
STEP_S = 1.0
#: Seconds after which a walk begins again: what was waited for then may go now.
AGAIN_S = 3600.0


@dataclass(slots=True)
class Group:
    """Jobs of one final state that are kept equally long."""

    state: str
    keep_s: float
    walk: Walk
    #: When the walk has begun, by time.monotonic.
    began_s: float = field(default_factory=time.monotonic)


class Retention:
    """What is kept how long. A row is looked at once by each group of its state in an hour."""

    def __init__(self, queue: Queue, settings: Settings) -> None:
        self._queue = queue
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over a configuration, at the start or on reload."""
        groups = []
        for state in (DONE, FAILED, CANCELLED, EXPIRED):
            own = {name: kept_s(job, settings.db, state) for name, job in settings.jobs.items()}
            usual_s = kept_s(None, settings.db, state)
            for keep_s in sorted({usual_s, *own.values()}):
                groups.append(Group(state, keep_s, Walk(member(own, usual_s, keep_s))))
        self._groups = groups

    def step(self, pause: Callable[[float], bool]) -> None:
        """Delete what is due, for STEP_S at the most; `pause` says whether the daemon stops."""
        over_s = time.monotonic() + STEP_S
        for group in self._groups:
            now_s = time.monotonic()
            if now_s - group.began_s > AGAIN_S and group.walk.is_over:
                group.walk, group.began_s = Walk(group.walk.due), now_s
            before = when.now() - round(group.keep_s * 1e6)
            while True:
                self._queue.purge(group.state, before, group.walk)
                if group.walk.is_over or time.monotonic() > over_s:
                    break
                if pause(0.02):
                    return


def kept_s(job: JobSettings | None, db: Db, state: str) -> float:
    """How long jobs of a type are kept in a final state; of a type that is gone, too.

    Not less than they are unique for: the row is what a repeated submit meets.
    """
    usual_s = db.keep_done_s if state == DONE else db.keep_failed_s
    if job is None:
        return usual_s
    own = job.keep_done_s if state == DONE else job.keep_failed_s
    said = next((keep_s for keep_s in (own, job.keep_s) if keep_s is not None), usual_s)
    return max(said, job.unique.for_s if job.unique is not None else 0.0)


def member(own: Mapping[str, float], usual_s: float, keep_s: float) -> Callable[[str], bool]:
    return lambda type: own.get(type, usual_s) == keep_s
