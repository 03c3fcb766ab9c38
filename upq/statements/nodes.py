"""Who of the daemons on one database is alive, and what each of them runs."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.sql import ClauseElement

from upq.clauses import CHUNK, CLAIMED, big, lock_jobs, word
from upq.job import RUNNING
from upq.schema import job, node
from upq.sql import Sql, rows


def requeue_jobs(dialect: str) -> ClauseElement:
    """Running jobs of the dead: back to the queue, or failed when they crashed too often."""
    r = rows(
        dialect, id=int, token=int, state=str, reason=str, message=str, ready=int, crashes=int,
        ended_at=int,
    )  # fmt: skip
    return (
        sa.update(job)
        .values(
            {
                job.c.state: r.c.state,
                job.c.reason: r.c.reason,
                job.c.message: sa.func.coalesce(r.c.message, job.c.message),
                job.c.ready: r.c.ready,
                job.c.crashes: r.c.crashes,
                job.c.attempt: job.c.attempt - 1,
                job.c.token: 0,
                job.c.ended_at: r.c.ended_at,
                job.c.owner: sa.null(),
                job.c.lease_until: sa.null(),
            }
        )
        .where(job.c.id == r.c.id, job.c.token == r.c.token)
    )


ADD_NODE = Sql(
    sa.insert(node).values(
        id=word("owner"),
        name=word("name"),
        machine=word("machine"),
        pid=big("pid"),
        started_at=big("now"),
        beat_at=big("now"),
    )
)
DROP_NODE = Sql(sa.delete(node).where(node.c.id == word("owner")))
BEAT_NODE = Sql(sa.update(node).values(beat_at=big("now")).where(node.c.id == word("owner")))
BEAT_JOBS = Sql(
    sa.update(job)
    .values(lease_until=big("lease"))
    .where(job.c.state == RUNNING, job.c.owner == word("owner"))
)
NODES = Sql(sa.select(node.c.id, node.c.name, node.c.machine))
OWNERS = Sql(sa.select(job.c.owner).where(job.c.state == RUNNING).distinct())
RUNNING_OF = Sql(
    sa.select(*CLAIMED, job.c.token, job.c.reason)
    .where(job.c.state == RUNNING, job.c.owner == word("owner"), job.c.id > big("above"))
    .order_by(job.c.id)
    .limit(CHUNK)
)
#: Locked: a commit of the dead may still be under way.
TOKENS_OF = Sql(lock_jobs(job.c.token), each=True)
REQUEUE_JOBS = Sql(requeue_jobs)
