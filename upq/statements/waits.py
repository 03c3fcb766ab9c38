"""Jobs that wait for others: the edges between them, and what one gets of those before it."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.sql import ClauseElement

from upq.clauses import big, delete_by, insert_into, of_jobs, over_ids, word
from upq.job import QUEUED
from upq.schema import edge, job
from upq.sql import Sql, rows


def dependents_of(dialect: str) -> ClauseElement:
    """Who waits for these jobs; cancelled ones too, they may be queued again."""
    r = over_ids(dialect)
    return sa.select(edge.c.job, edge.c.needs, job.c.state).where(
        edge.c.needs == r.c.id, job.c.id == edge.c.job
    )


def lower_waits(dialect: str) -> ClauseElement:
    """Locks the rows, so that what is read of them next stays true."""
    r = rows(dialect, id=int, n=int)
    return sa.update(job).values({job.c.waits: job.c.waits - r.c.n}).where(job.c.id == r.c.id)


def free_jobs(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, ready=int, due_at=int, run_at=int)
    return (
        sa.update(job)
        .values(
            {
                job.c.state: QUEUED,
                job.c.reason: "",
                job.c.ready: r.c.ready,
                job.c.due_at: r.c.due_at,
                job.c.run_at: r.c.run_at,
            }
        )
        .where(job.c.id == r.c.id, job.c.waits == 0)
    )


def needs_of(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return sa.select(edge.c.job, edge.c.needs).where(edge.c.job == r.c.id)


def awaited_by(dialect: str) -> ClauseElement:
    """What these jobs wait for, with its state."""
    r = over_ids(dialect)
    chosen = sa.select(edge.c.job, edge.c.needs, job.c.state)
    return chosen.where(edge.c.job == r.c.id, job.c.id == edge.c.needs)


def set_data(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, data=str)
    return sa.update(job).values({job.c.data: r.c.data}).where(job.c.id == r.c.id)


def block_jobs(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, reason=str)
    return sa.update(job).values({job.c.reason: r.c.reason}).where(job.c.id == r.c.id)


INSERT_EDGES = insert_into(edge, job=int, needs=int)
NEEDS_OF = Sql(needs_of)
AWAITED_BY = Sql(awaited_by)
DEPENDENTS_OF = Sql(dependents_of, each=True)
LOWER_WAITS = Sql(lower_waits, each=True)
WAITS_OF = Sql(
    of_jobs(job.c.lane, job.c.run_at, job.c.attempt, job.c.waits, job.c.state, job.c.options),
    each=True,
)
FREE_JOBS = Sql(free_jobs, each=True)
BLOCK_JOBS = Sql(block_jobs, each=True)
RESULTS_OF = Sql(of_jobs(job.c.result), each=True)
DATA_OF = Sql(of_jobs(sa.func.coalesce(job.c.data, job.c.params)), each=True)
SET_DATA = Sql(set_data, each=True)
DELETE_EDGES = Sql(delete_by(edge.c.needs), each=True)
DELETE_OWN_EDGES = Sql(delete_by(edge.c.job))
SET_OPTIONS = Sql(sa.update(job).values(options=word("text")).where(job.c.id == big("id")))
PLAIN_STATES_OF = Sql(of_jobs(job.c.state))
