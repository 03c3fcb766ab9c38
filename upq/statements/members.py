"""Batches: which jobs are members, what waits for them, what it is told."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.sql import ClauseElement

from upq.clauses import big, of_jobs, over_ids, word
from upq.job import DONE, FINAL
from upq.schema import edge, job, step
from upq.sql import Sql, rows


def among_members(dialect: str) -> ClauseElement:
    """Which of these jobs are in a batch already: as its own, as what it waits for, or as one that
    is kept by this key, whatever has become of it.
    """
    r = rows(dialect, id=int, k=str)
    awaited = sa.exists().where(edge.c.job == big("batch"), edge.c.needs == r.c.id)
    kept = sa.exists().where(step.c.job == big("batch"), step.c.key == r.c.k)
    own = sa.or_(job.c.parent == big("batch"), awaited, kept)
    return sa.select(job.c.id).where(job.c.id == r.c.id, own)


def keep_members(dialect: str) -> ClauseElement:
    r = rows(dialect, k=str)
    chosen = sa.select(big("batch"), r.c.k, sa.literal("member"), big("now"))
    columns = ["job", "key", "name", "at"]
    return sa.insert(step).from_select(columns, chosen, include_defaults=False)


def untold(dialect: str) -> ClauseElement:
    """Of these jobs, those that can start and whose data are their params still."""
    r = over_ids(dialect)
    return sa.select(job.c.id, job.c.params).where(
        job.c.id == r.c.id, job.c.data.is_(None), job.c.waits == 0
    )


def still_blocked(dialect: str) -> ClauseElement:
    """As BLOCK_JOBS, of those that have to wait."""
    r = rows(dialect, id=int, reason=str)
    waits = sa.case((job.c.waits > 0, r.c.reason), else_=job.c.reason)
    return sa.update(job).values({job.c.reason: waits}).where(job.c.id == r.c.id)


bad_members = sa.and_(
    edge.c.job == big("batch"), job.c.id == edge.c.needs, job.c.state.in_(FINAL - {DONE})
)
LOCK_BATCH = Sql(
    sa.select(job.c.state, job.c.options).where(job.c.id == big("batch")).with_for_update()
)
AMONG_MEMBERS = Sql(among_members)
KEEP_MEMBERS = Sql(keep_members)
STILL_BLOCKED = Sql(still_blocked)
BAD_COUNTS = Sql(sa.select(job.c.state, sa.func.count()).where(bad_members).group_by(job.c.state))
BAD_MEMBERS = Sql(
    sa.select(job.c.id, job.c.state).where(bad_members).order_by(edge.c.needs).limit(big("n"))
)
FILL = Sql(
    sa.update(job)
    .values(waits=job.c.waits + big("more"), options=word("text"), reason=word("why"))
    .where(job.c.id == big("batch"))
)
OPTIONS_OF = Sql(of_jobs(job.c.options))
UNTOLD = Sql(untold)
