"""Lists of jobs, long or short: filtered, paged, read to be changed, in the order of the claims."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from upq.clauses import CHUNK
from upq.errors import NotFound
from upq.job import BLOCKED, FINAL, QUEUED, STATES
from upq.schema import job
from upq.views import LIST_LIMIT, LISTED, Views

#: Rows that are looked at together where no index has what is asked for, and seconds that all the
#: looking may take before the rest is left to another page.
LOOK_ROWS, LOOK_S = 5000, 1.0
#: What is read of a job to see whether it is meant, where no index says so.
FOUND = (job.c.id, job.c.lane, job.c.type, job.c.state, job.c.submitter, job.c.ended_at)


class Filter(NamedTuple):
    """Which jobs are meant; None leaves it open."""

    state: str | None = None
    type: str | None = None
    #: Lanes of one queue.
    lanes: frozenset[int] | None = None
    submitter: str | None = None


class Page(NamedTuple):
    """A part of a list of jobs."""

    jobs: list[dict[str, Any]]
    #: The id after which the next part begins; None at the end of the list.
    next: int | None


class Found(NamedTuple):
    """A job that many are changed with."""

    id: int
    lane: int
    submitter: str


class Lists:
    """The lists of what can be seen. Any thread may ask; all raise Unavailable."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def page(
        self, lanes: Collection[int], wanted: Filter, limit: int = 20, before: int | None = None
    ) -> Page:
        """The newest first, from the one after job `before` on; ended jobs by their end.

        `lanes` are all there are: blocked is said of lanes, not of rows. The list may end early,
        with `next` to go on from, where much had to be looked through. Raises NotFound.
        """
        limit = min(limit, LIST_LIMIT)
        held = frozenset(lane for lane in lanes if self._views.blocked(lane))
        parts = [wanted]
        if wanted.state == BLOCKED and held:
            mine = held if wanted.lanes is None else held & wanted.lanes
            parts.append(wanted._replace(state=QUEUED, lanes=mine))
        elif wanted.state == QUEUED and held:
            free = frozenset(lanes) - held
            mine = free if wanted.lanes is None else free & wanted.lanes
            parts = [wanted._replace(lanes=mine)]
        over_s = time.monotonic() + LOOK_S
        rows: list[Any] = []
        left: list[int] = []
        for part in parts:
            found, next_ = self._look(part, limit, before, over_s)
            rows += found
            left += [next_] if next_ is not None else []
        if len(parts) > 1:
            # What the one part has not come to yet is not skipped by the other.
            rows = sorted((r for r in rows if not left or r.id >= max(left)), key=lambda r: -r.id)
        cut, rows = len(rows) > limit, rows[:limit]
        end = rows[-1].id if cut and rows else max(left, default=None)
        return Page([self._views.shown(row) for row in self._whole(rows)], end)

    def _whole(self, rows: list[Any]) -> list[Any]:
        """The rows with all that a list shows; those of FOUND are read again."""
        short = [row.id for row in rows if len(row) == len(FOUND)]
        if not short:
            return rows
        query = sa.select(*LISTED).where(job.c.id.in_(short))
        known = {row.id: row for row in self._views.rows(query)}
        whole = [row if len(row) > len(FOUND) else known.get(row.id) for row in rows]
        return [row for row in whole if row is not None]

    def _look(
        self, wanted: Filter, limit: int, before: int | None, over_s: float
    ) -> tuple[list[Any], int | None]:
        """The first rows of a list, and after which id to go on, if that is not all."""
        ended = wanted.state in FINAL
        key: tuple[int | None, int] | None = None
        if before is not None:
            key = (self._ended_at(before) if ended else None, before)
        all_ = self._how_many(wanted) if before is None else None
        if all_ == 0 or limit == 0:
            return [], None
        is_exact = wanted.lanes is None and wanted.submitter is None
        is_exact = is_exact and (wanted.state is None or wanted.type is None)
        found: list[Any] = []
        # One more than is asked for shows that the list goes on.
        n = limit + 1 if is_exact else min(10 * limit, LOOK_ROWS)
        while True:
            rows = self._window(LISTED if is_exact else FOUND, wanted, key, n)
            found += [row for row in rows if _fits(wanted, row)]
            if len(found) > limit:
                return found[:limit], found[limit - 1].id
            if len(rows) < n or len(found) == all_:
                return found, None
            key = (rows[-1].ended_at if ended else None, rows[-1].id)
            if time.monotonic() > over_s:
                return found, rows[-1].id
            n = min(4 * n, LOOK_ROWS)

    def _window(
        self,
        columns: Sequence[sa.ColumnElement[Any]],
        wanted: Filter,
        key: tuple[int | None, int] | None,
        n: int,
    ) -> list[Any]:
        """The next n rows in the order of the list, by the index that has most of what is asked."""
        query = sa.select(*columns)
        if wanted.state in FINAL:
            query = query.where(job.c.state == wanted.state)
            query = query.order_by(job.c.ended_at.desc(), job.c.id.desc())
            for dialect in ("mysql", "mariadb"):  # which would go through the ids
                query = query.with_hint(job, "FORCE INDEX (upq_job_state)", dialect)
            if key is None:
                return self._views.rows(query.limit(n))
            # Those that ended at the same moment, then all before: an OR would read past the key.
            at, id = key
            rows = self._views.rows(query.where(job.c.ended_at == at, job.c.id < id).limit(n))
            if len(rows) < n:
                rows += self._views.rows(query.where(job.c.ended_at < at).limit(n - len(rows)))
            return rows
        if wanted.state is not None:
            # Jobs that have not ended have no ended_at: the index on states gives them by id.
            query = query.where(job.c.state == wanted.state, job.c.ended_at.is_(None))
        elif wanted.type is not None:
            query = query.where(job.c.type == wanted.type)
        if key is not None:
            query = query.where(job.c.id < key[1])
        return self._views.rows(query.order_by(job.c.id.desc()).limit(n))

    def _ended_at(self, id: int) -> int:
        found = self._views.rows(sa.select(job.c.ended_at).where(job.c.id == id))
        if not found or found[0][0] is None:
            raise NotFound(f"before: job {id} is not in this list")
        return int(found[0][0])

    def _how_many(self, wanted: Filter) -> int | None:
        """How many jobs there are of the kind, if the counts know it."""
        if wanted.submitter is not None or wanted.lanes is None:
            return None
        states = STATES if wanted.state is None else (wanted.state,)
        counts = self._views.counts()
        return sum(counts.get(lane, {}).get(s, 0) for lane in wanted.lanes for s in states)

    def chunks(
        self, wanted: Filter, since_at: int | None, until_at: int
    ) -> Iterator[Sequence[Found]]:
        """Jobs in one state to be changed, the oldest first, at most CHUNK at a time.

        since_at, until_at: for a final state when they ended, else when they were submitted.
        """
        if wanted.lanes is not None and not wanted.lanes:
            return
        columns = sa.select(*FOUND, job.c.created_at).where(job.c.state == wanted.state)
        by_end = wanted.state in FINAL
        at, id = since_at or 0, 0
        rows: list[Any] = []
        while not rows or len(rows) == LOOK_ROWS:
            if by_end:
                query = columns.where(job.c.ended_at.between(at, until_at))
                query = query.where(sa.or_(job.c.ended_at > at, job.c.id > id))
                query = query.order_by(job.c.ended_at, job.c.id)
            else:
                query = columns.where(job.c.ended_at.is_(None), job.c.id > id).order_by(job.c.id)
            rows = self._views.rows(query.limit(LOOK_ROWS))
            if not rows:
                return
            found = [
                Found(row.id, row.lane, row.submitter)
                for row in rows
                if _fits(wanted, row) and (by_end or (since_at or 0) <= row.created_at <= until_at)
            ]
            for start in range(0, len(found), CHUNK):
                yield found[start : start + CHUNK]
            at, id = (rows[-1].ended_at if by_end else at), rows[-1].id

    def next_jobs(self, lane: int, limit: int) -> list[dict[str, Any]]:
        """The jobs of a lane that can be claimed, in the order of the claims."""
        query = sa.select(*LISTED).where(job.c.ready == lane)
        query = query.order_by(job.c.rank, job.c.ord, job.c.id).limit(limit)
        return [self._views.shown(row) for row in self._views.rows(query)]


def _fits(wanted: Filter, row: Any) -> bool:
    return (
        (wanted.type is None or row.type == wanted.type)
        and (wanted.lanes is None or row.lane in wanted.lanes)
        and (wanted.submitter is None or row.submitter == wanted.submitter)
    )
