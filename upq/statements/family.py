"""Jobs with all that is below them: cancelled, queued again, read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import ClauseElement

from upq.clauses import big, of_jobs, over_ids, word
from upq.job import CANCELLED, DONE, FINAL
from upq.schema import cancel, job
from upq.sql import Sql, rows


def marks_of(dialect: str) -> ClauseElement:
    """Whether somebody wants these jobs to end, or has ended them; locked."""
    r = over_ids(dialect)
    chosen = sa.select(job.c.id, job.c.state, job.c.cancel_asked).where(job.c.id == r.c.id)
    return chosen.with_for_update(of=job)


def below(dialect: str, columns: Sequence[Any]) -> ClauseElement:
    """Children of these jobs, in the order of their ids, from one id on.

    Read by the index on parents, whatever a planner makes of a tree with very many.
    """
    r, most = over_ids(dialect), big("most")
    # An expression, or all jobs would be gone through in the order of their ids.
    n = (job.c.id + 0).label("n")
    children = sa.select(*columns).where(n > big("above"))
    if dialect == "mysql":  # MySQL would begin with all jobs
        children = children.prefix_with("STRAIGHT_JOIN").select_from(r)
    if dialect != "postgresql":
        return children.where(job.c.parent == r.c.id).order_by(n).limit(most)
    # Parent by parent, or it joins with the whole table. That few have the same parent it believes
    # of a range, not of a value that it has counted.
    of_one = children.where(job.c.parent.between(r.c.id, r.c.id)).add_columns(n)
    each = of_one.order_by(n).limit(most).lateral()
    chosen = sa.select(*list(each.c)[:-1]).select_from(r.join(each, sa.true()))
    return chosen.order_by(each.c.n).limit(most)


MARKS_OF = Sql(marks_of, each=True)
CHILDREN_OF = Sql(lambda dialect: below(dialect, [job.c.id]))
#: What is read of each job of a tree; of one that is done, little is asked, and they are many.
MEMBER = (
    job.c.id,
    job.c.parent,
    job.c.state,
    job.c.ended_at,
    *(
        sa.case((job.c.state != DONE, column)).label(column.name)
        for column in (job.c.type, job.c.child_key, job.c.started_at, job.c.progress, job.c.options)
    ),
)
MEMBERS_OF = Sql(lambda dialect: below(dialect, MEMBER))
#: Children of a parent that runs anew: those that have ended badly are to run again when asked for.
AGAIN = "parent runs again"


def again_below(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    # The state is no condition, or SQLite would look for the rows by it.
    ended_badly = job.c.state.in_(FINAL - {DONE})
    reason = sa.case((ended_badly, AGAIN), else_=job.c.reason)
    # Members of a batch and steps of a chain have no key; nor is that a column to look for.
    asked_for = sa.func.coalesce(job.c.child_key, "") != ""
    return sa.update(job).values({job.c.reason: reason}).where(job.c.parent == r.c.id, asked_for)


AGAIN_BELOW = Sql(again_below)


def these_jobs(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return (
        sa.select(
            job.c.id,
            job.c.state,
            job.c.lane,
            job.c.attempt,
            job.c.waits,
            job.c.token,
            job.c.options,
        )
        .where(job.c.id == r.c.id)
        .with_for_update(of=job)
    )


def cancel_waiting(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return (
        sa.update(job)
        .values(
            {
                job.c.state: CANCELLED,
                job.c.reason: "",
                job.c.ready: sa.null(),
                job.c.due_at: sa.null(),
                job.c.expires_at: sa.null(),
                job.c.ended_at: big("now"),
                job.c.message: word("message"),
            }
        )
        .where(job.c.id == r.c.id)
    )


def ask_cancel(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return sa.update(job).values({job.c.cancel_asked: 1}).where(job.c.id == r.c.id)


def reopen(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, state=str, ready=int, reason=str)
    return (
        sa.update(job)
        .values(
            {
                job.c.state: r.c.state,
                job.c.reason: r.c.reason,
                job.c.ready: r.c.ready,
                job.c.due_at: sa.null(),
                job.c.run_at: sa.null(),
                job.c.ended_at: sa.null(),
                job.c.result: sa.null(),
                job.c.progress: sa.null(),
                job.c.cancel_asked: 0,
                job.c.attempt: 0,
                job.c.crashes: 0,
            }
        )
        .where(job.c.id == r.c.id)
    )


#: Jobs to be cancelled or retried, locked until that is done.
THESE_JOBS = Sql(these_jobs)
CANCEL_WAITING = Sql(cancel_waiting)
ASK_CANCEL = Sql(ask_cancel)
REOPEN = Sql(reopen)
#: Cancels that are not through; of those who go on with one, each waits for the one before.
CANCELS = Sql(sa.select(cancel.c.id, cancel.c.at, cancel.c.goal))
ADD_CANCEL = Sql(
    sa.insert(cancel).values(id=big("id"), at=big("now"), goal=word("goal"), pages=word("pages"))
)
LOCK_CANCEL = Sql(
    sa.select(cancel.c.goal, cancel.c.pages).where(cancel.c.id == big("id")).with_for_update()
)
SET_CANCEL = Sql(
    sa.update(cancel).values(at=big("now"), pages=word("pages")).where(cancel.c.id == big("of"))
)
DROP_CANCEL = Sql(sa.delete(cancel).where(cancel.c.id == big("id")))
PARENTS_OF = Sql(of_jobs(job.c.parent))
ROOTS_OF = Sql(of_jobs(job.c.root))
