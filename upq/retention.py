"""Deletes jobs that have ended long ago; how long ago is said by `[db]`, or by their types."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from upq import when
from upq.batch import Batch
from upq.clauses import CHUNK
from upq.job import CANCELLED, DONE, EXPIRED, FAILED, FINAL
from upq.jobsettings import JobSettings
from upq.queue import Queue
from upq.settings import Db, Settings
from upq.statements import retention as st
from upq.statements.jobs import KEEP_LAST_EVENT
from upq.statements.waits import DELETE_OWN_EDGES, PLAIN_STATES_OF

#: Seconds that one step may take; then others get their turn.
STEP_S = 1.0
#: Seconds after which a walk begins again: what was waited for then may go now.
AGAIN_S = 3600.0


def always(type: str) -> bool:
    return True


@dataclass(slots=True)
class Walk:
    """A way through the jobs of one final state, from the first that ended on."""

    #: Whether jobs of this type are to go.
    due: Callable[[str], bool] = always
    #: The end and the id of the last job seen.
    mark: tuple[int, int] = (-1, 0)
    #: Nothing is left that ended before the time given.
    is_over: bool = False


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
                purge(self._queue, group.state, before, group.walk)
                if group.walk.is_over or time.monotonic() > over_s:
                    break
                if pause(0.02):
                    return


def purge(queue: Queue, state: str, before: int, walk: Walk | None = None) -> int:
    """Delete jobs of a final state that ended before a time, with their history.

    Looks at no more than CHUNK jobs, the next of the walk; returns how many it has deleted.
    Kept is what others wait for, and children of a parent that has not ended or may be retried.
    """
    on = walk or Walk()

    def run(batch: Batch) -> tuple[int, list[Any]]:
        ended_at, above = on.mark
        page = batch.tx.fetch(st.ENDED_ALIKE, state=state, ended_at=ended_at, above=above)
        if len(page) < CHUNK:
            page += batch.tx.fetch(st.ENDED_LATER, state=state, ended_at=ended_at, before=before)[
                : CHUNK - len(page)
            ]
        ids = [(id,) for id, type, at in page if at < before and on.due(type)]
        old = unneeded(batch, state, sorted(ids)) if ids else []
        ids = sorted((row[0],) for row in old)
        if ids:
            if not queue.shared:
                batch.tx.run(KEEP_LAST_EVENT)
            for sql in (
                st.DELETE_EVENTS,
                st.DELETE_OUTPUTS,
                st.DELETE_STEPS,
                DELETE_OWN_EDGES,
                st.DELETE_JOBS,
            ):
                batch.tx.run_rows(sql, ids)
            for _, lane_id, *_ in old:
                batch.tally[lane_id, state] -= 1
        return len(ids), page

    count, page = queue.act(run)
    if page:
        on.mark = (page[-1][2], page[-1][0])
    on.is_over = len(page) < CHUNK
    return int(count)


def unneeded(batch: Batch, state: str, ids: list[tuple[int]]) -> list[Any]:
    """Of these jobs, locked, those in the state that no parent and no other job needs.

    A parent that has ended badly needs what it has queued: it may be retried.
    """
    found = [row for row in batch.tx.fetch_rows(st.LOCK_ENDED, ids) if row[2] == state]
    parents = sorted({(row[3],) for row in found if row[3] is not None})
    states = dict(batch.tx.fetch_rows(PLAIN_STATES_OF, parents)) if parents else {}
    awaited = {row[0] for row in batch.tx.fetch_rows(st.AWAITED_OF, ids)}

    def is_needed(row: Any) -> bool:
        state = states.get(row[3], DONE)
        return row[0] in awaited or state not in FINAL or (row[4] is not None and state != DONE)

    return [row for row in found if not is_needed(row)]


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
