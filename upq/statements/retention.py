"""What is old, and its removal with all that is kept of it."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.sql import ClauseElement

from upq.clauses import CHUNK, big, delete_by, over_ids, word
from upq.schema import edge, event, job, output, step
from upq.sql import Sql

DELETE_JOBS = Sql(delete_by(job.c.id))
DELETE_EVENTS = Sql(delete_by(event.c.job))
DELETE_OUTPUTS = Sql(delete_by(output.c.job))
DELETE_STEPS = Sql(delete_by(step.c.job))
#: Jobs of a final state in the order of their ends, from one on: what a walk reads at a time.
ENDED_ALIKE = Sql(
    sa.select(job.c.id, job.c.type, job.c.ended_at)
    .where(job.c.state == word("state"), job.c.ended_at == big("ended_at"), job.c.id > big("above"))
    .order_by(job.c.id)
    .limit(CHUNK)
)


def ended_later(dialect: str) -> ClauseElement:
    found = (
        sa.select(job.c.id, job.c.type, job.c.ended_at)
        .where(
            job.c.state == word("state"),
            job.c.ended_at > big("ended_at"),
            job.c.ended_at < big("before"),
        )
        .order_by(job.c.ended_at, job.c.id)
        .limit(CHUNK)
    )
    # MariaDB would go through all of the state that have ended before.
    return found.with_hint(job, "FORCE INDEX (upq_job_state)") if dialect == "mysql" else found


def lock_ended(dialect: str) -> ClauseElement:
    """Another daemon may purge or retry the same jobs. Nobody can begin to wait for them then.

    The state is no condition, or the rows would be looked for by it.
    """
    r = over_ids(dialect)
    chosen = sa.select(job.c.id, job.c.lane, job.c.state, job.c.parent, job.c.child_key)
    return chosen.where(job.c.id == r.c.id).with_for_update(skip_locked=True, of=job)


def awaited_of(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return sa.select(edge.c.needs).where(edge.c.needs == r.c.id)


ENDED_LATER = Sql(ended_later)
LOCK_ENDED = Sql(lock_ended)
AWAITED_OF = Sql(awaited_of)
