"""The store's statements, each built once with SQLAlchemy Core for all three databases.

Those over `rows()` do a whole batch at once. Guards stand in the statement: a row that is not in
the state it should be in is left alone, and the count says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.sql import ClauseElement

from upq import schema
from upq.job import BLOCKED, CANCELLED, DONE, FINAL, QUEUED, RUNNING
from upq.sql import Sql, rows

#: Rows that a chore changes in one transaction.
CHUNK = 1000
#: Jobs of one rank that are looked at for the oldest: children and retries may stand before it.
OLDEST_LOOKS = 100

job, event, lane, edge = schema.job, schema.event, schema.lane, schema.edge
tally, counter, output, node = schema.tally, schema.counter, schema.output, schema.node
limit, step = schema.limit, schema.step
slot, cancel = schema.slot, schema.cancel
health = schema.health

SUBMITTED: dict[str, type] = {
    "id": int, "lane": int, "type": str, "queue": str, "ready": int, "rank": int, "ord": int,
    "state": str, "reason": str, "params": str, "options": str, "run_at": int, "due_at": int,
    "idem_key": str, "waits": int, "parent": int, "root": int, "child_key": str,
    "submitter": str, "created_at": int,
}  # fmt: skip
#: Length of their rows.
PLAIN = len(SUBMITTED)
#: What follows in the rows of jobs that have limits.
LIMITED: dict[str, type] = {
    "expires_at": int, "uniq_key": str, "uniq_until": int, "serial_key": str,
}  # fmt: skip
AT = {name: i for i, name in enumerate([*SUBMITTED, *LIMITED])}
AS_NEW = {"attempt": 0, "starts": 0, "crashes": 0, "token": 0, "cancel_asked": 0}


def big(name: str) -> sa.BindParameter[int]:
    return sa.bindparam(name, None, type_=sa.BigInteger)


def word(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, None, type_=sa.String)


def insert_jobs(**given: type) -> Callable[[str], ClauseElement]:
    def build(dialect: str) -> ClauseElement:
        r = rows(dialect, **given)
        columns = [*given, *AS_NEW]
        fixed = [sa.literal(value) for value in AS_NEW.values()]
        chosen = sa.select(*r.c, *fixed).where(r.c.id.is_not(None))
        return sa.insert(job).from_select(columns, chosen, include_defaults=False)

    return build


def insert_into(table: sa.Table[Any], **columns: type) -> Sql:
    def build(dialect: str) -> ClauseElement:
        r = rows(dialect, **columns)
        chosen = sa.select(*r.c).where(next(iter(r.c)).is_not(None))
        return sa.insert(table).from_select(list(columns), chosen, include_defaults=False)

    return Sql(build, each=True)


def change_tally(dialect: str) -> ClauseElement:
    r = rows(dialect, lane=int, state=str, n=int)
    return (
        sa.update(tally)
        .values({tally.c.n: tally.c.n + r.c.n})
        .where(tally.c.lane == r.c.lane, tally.c.state == r.c.state)
    )


def take_numbers(dialect: str) -> ClauseElement:
    n = counter.c.n + big("k")
    name = counter.c.name == word("name")
    if dialect == "mysql":
        return sa.update(counter).values(n=sa.func.last_insert_id(n)).where(name)
    return sa.update(counter).values(n=n).where(name).returning(counter.c.n)


#: What a claim reads of a job.
CLAIMED = (job.c.id, job.c.lane, job.c.type, job.c.queue, job.c.params, job.c.data, job.c.options,
           job.c.rank, job.c.run_at, job.c.attempt, job.c.starts, job.c.crashes, job.c.parent,
           job.c.root, job.c.submitter, job.c.created_at, job.c.cancel_asked)  # fmt: skip


def pick_claimable(_: str) -> ClauseElement:
    return (
        sa.select(*CLAIMED)
        .where(job.c.ready == big("lane"))
        .order_by(job.c.rank, job.c.ord, job.c.id)
        .limit(big("free"))
        .with_for_update(skip_locked=True)
    )


def pick_above(_: str) -> ClauseElement:
    """As `pick_claimable`, of lower priorities only."""
    return (
        sa.select(*CLAIMED)
        .where(job.c.ready == big("lane"), job.c.rank > big("above"))
        .order_by(job.c.rank, job.c.ord, job.c.id)
        .limit(big("free"))
        .with_for_update(skip_locked=True)
    )


def running_of_types(dialect: str) -> ClauseElement:
    """How many jobs of each type run, whoever runs them and in whatever queue they were."""
    r = rows(dialect, type=str)
    return (
        sa.select(lane.c.type, sa.func.sum(tally.c.n))
        .where(lane.c.type == r.c.type, tally.c.lane == lane.c.id, tally.c.state == RUNNING)
        .group_by(lane.c.type)
    )


def start_jobs(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, token=int)
    return (
        sa.update(job)
        .values(
            {
                job.c.state: RUNNING,
                job.c.reason: "",
                job.c.ready: sa.null(),
                job.c.attempt: job.c.attempt + 1,
                job.c.starts: job.c.starts + 1,
                job.c.token: r.c.token,
                job.c.owner: word("owner"),
                job.c.lease_until: big("lease"),
                job.c.started_at: big("now"),
            }
        )
        .where(job.c.id == r.c.id)
    )


def end_attempts(dialect: str) -> ClauseElement:
    """The token alone is the fence: it is above 0 only while its claim runs the job.

    A guard on the state as well would lead SQLite and PostgreSQL to look for the rows by it.
    """
    r = rows(dialect, id=int, token=int, state=str, reason=str, message=str, result=str, data=str,
             ready=int, run_at=int, due_at=int, ended_at=int, given_back=int,
             progress=str)  # fmt: skip
    return (
        sa.update(job)
        .values(
            {
                job.c.state: r.c.state,
                job.c.reason: r.c.reason,
                job.c.message: r.c.message,
                job.c.result: r.c.result,
                job.c.data: sa.func.coalesce(r.c.data, job.c.data),
                job.c.progress: sa.func.coalesce(r.c.progress, job.c.progress),
                job.c.ready: r.c.ready,
                job.c.run_at: sa.func.coalesce(r.c.run_at, job.c.run_at),
                job.c.due_at: r.c.due_at,
                job.c.ended_at: r.c.ended_at,
                job.c.attempt: job.c.attempt - r.c.given_back,
                job.c.token: -job.c.token,
                job.c.owner: sa.null(),
                job.c.lease_until: sa.null(),
            }
        )
        .where(job.c.id == r.c.id, job.c.token == r.c.token)
    )


def over_ids(dialect: str) -> Any:
    return rows(dialect, id=int)


def of_jobs(*columns: Any) -> Callable[[str], ClauseElement]:
    """Their ids and these columns."""

    def build(dialect: str) -> ClauseElement:
        return sa.select(job.c.id, *columns).where(job.c.id == over_ids(dialect).c.id)

    return build


def by_key(column: sa.Column[Any]) -> Callable[[str], ClauseElement]:
    def build(dialect: str) -> ClauseElement:
        r = rows(dialect, k=str)
        return sa.select(column, job.c.id, job.c.type, job.c.params).where(column == r.c.k)

    return build


def states_of(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return sa.select(job.c.id, job.c.state).where(job.c.id == r.c.id).with_for_update(of=job)


def cancelled_of(dialect: str) -> ClauseElement:
    """Of these jobs, those that somebody wants to end."""
    r = over_ids(dialect)
    asked = sa.select(job.c.id).where(job.c.id == r.c.id, job.c.cancel_asked == 1)
    return asked.with_for_update(of=job)


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


def set_data(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, data=str)
    return sa.update(job).values({job.c.data: r.c.data}).where(job.c.id == r.c.id)


def block_jobs(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, reason=str)
    return sa.update(job).values({job.c.reason: r.c.reason}).where(job.c.id == r.c.id)


def make_ready(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return (
        sa.update(job)
        .values({job.c.ready: job.c.lane, job.c.due_at: sa.null()})
        .where(job.c.id == r.c.id)
    )


def requeue_jobs(dialect: str) -> ClauseElement:
    """Running jobs of the dead: back to the queue, or failed when they crashed too often."""
    r = rows(
        dialect, id=int, token=int, state=str, reason=str, ready=int, crashes=int, ended_at=int
    )
    return (
        sa.update(job)
        .values(
            {
                job.c.state: r.c.state,
                job.c.reason: r.c.reason,
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


def delete_by(column: sa.Column[Any]) -> Callable[[str], ClauseElement]:
    def build(dialect: str) -> ClauseElement:
        r = over_ids(dialect)
        if dialect == "sqlite":  # which has no DELETE over a join; MariaDB scans for a subselect
            return sa.delete(column.table).where(column.in_(sa.select(r.c.id)))
        return sa.delete(column.table).where(column == r.c.id)

    return build


INSERT_JOBS = Sql(insert_jobs(**SUBMITTED), each=True)
INSERT_LIMITED = Sql(insert_jobs(**SUBMITTED, **LIMITED), each=True)
INSERT_EVENTS = insert_into(
    event, n=int, job=int, lane=int, at=int, state=str, reason=str, message=str, attempt=int,
    node=str, who=str,
)  # fmt: skip
INSERT_OUTPUTS = insert_into(output, job=int, attempt=int, text=str, size_bytes=int, truncated=int)
INSERT_EDGES = insert_into(edge, job=int, needs=int)
CHANGE_TALLY = Sql(change_tally, each=True)
TAKE_NUMBERS = Sql(take_numbers)
PICK_CLAIMABLE = Sql(pick_claimable)
PICK_ABOVE = Sql(pick_above)
RUNNING_OF_TYPES = Sql(running_of_types)
START_JOBS = Sql(start_jobs, each=True)
END_ATTEMPTS = Sql(end_attempts, each=True)
BY_IDEM_KEY = Sql(by_key(job.c.idem_key), each=True)
BY_CHILD_KEY = Sql(by_key(job.c.child_key), each=True)
STATES_OF = Sql(states_of, each=True)
CANCELLED_OF = Sql(cancelled_of, each=True)
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


NEEDS_OF = Sql(needs_of)


def awaited_by(dialect: str) -> ClauseElement:
    """What these jobs wait for, with its state."""
    r = over_ids(dialect)
    chosen = sa.select(edge.c.job, edge.c.needs, job.c.state)
    return chosen.where(edge.c.job == r.c.id, job.c.id == edge.c.needs)


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
MAKE_READY = Sql(make_ready, each=True)
REQUEUE_JOBS = Sql(requeue_jobs)
DELETE_JOBS = Sql(delete_by(job.c.id))
DELETE_EVENTS = Sql(delete_by(event.c.job))
DELETE_OUTPUTS = Sql(delete_by(output.c.job))
DELETE_EDGES = Sql(delete_by(edge.c.needs), each=True)
DELETE_STEPS = Sql(delete_by(step.c.job))
DELETE_OWN_EDGES = Sql(delete_by(edge.c.job))

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

#: Whether the batch whose first event this would be was committed.
PROOF = Sql(
    sa.select(event.c.n).where(
        event.c.n == big("n"), event.c.job == big("job"), event.c.at == big("at")
    )
)


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
#: The state that a claim's own end has left.
OWN_END = Sql(sa.select(job.c.state).where(job.c.id == big("id"), job.c.token == -big("token")))
COUNT_CRASH = Sql(sa.update(job).values(crashes=job.c.crashes + 1).where(job.c.id == big("id")))
#: What this daemon runs that somebody wants to end.
ASKED_TO_END = Sql(
    sa.select(job.c.lane, job.c.token).where(
        job.c.state == RUNNING, job.c.owner == word("owner"), job.c.cancel_asked == 1
    )
)


def of_claim(column: str) -> Sql:
    """Set one column of a running job, for the claim that owns it."""
    return Sql(
        sa.update(job)
        .values({column: word("value")})
        .where(job.c.id == big("id"), job.c.token == big("token"), job.c.state == RUNNING)
    )


SET_REASON = of_claim("reason")
SET_PROGRESS = of_claim("progress")

#: A running job, locked, if it is still this claim's.
LOCK_CLAIM = Sql(
    sa.select(job.c.id).where(job.c.id == big("id"), job.c.token == big("token")).with_for_update()
)
FIND_STEP = Sql(sa.select(step.c.at).where(step.c.job == big("job"), step.c.key == word("key")))
ADD_STEP = Sql(
    sa.insert(step).values(
        job=big("job"), key=word("key"), name=word("name"), result=word("result"), at=big("now")
    )
)
DROP_STEP = Sql(sa.delete(step).where(step.c.job == big("job"), step.c.key == word("key")))

LANES = Sql(sa.select(lane.c.id, lane.c.queue, lane.c.type, lane.c.paused))
LADEN_LANES = Sql(sa.select(tally.c.lane).where(tally.c.state == QUEUED, tally.c.n > 0))
FIND_LANE = Sql(
    sa.select(lane.c.id).where(
        lane.c.queue == word("queue"), lane.c.type == word("type"), lane.c.node == ""
    )
)
MAKE_LANE = Sql(
    sa.insert(lane).values(queue=word("queue"), type=word("type"), node="", paused=big("paused"))
)
PAUSED_QUEUE = Sql(sa.select(sa.func.max(lane.c.paused)).where(lane.c.queue == word("queue")))
PAUSE = Sql(sa.update(lane).values(paused=big("paused")).where(lane.c.queue == word("name")))


LOCK_LIMIT = Sql(sa.select(limit.c.at).where(limit.c.name == word("name")).with_for_update())
ADD_LIMIT = Sql(sa.insert(limit).values(name=word("name"), at=big("at")))
SET_LIMIT = Sql(sa.update(limit).values(at=big("at")).where(limit.c.name == word("name")))

MAKE_TALLY = insert_into(tally, lane=int, state=str, n=int)

DUE = Sql(
    sa.select(job.c.id, job.c.lane)
    .where(job.c.due_at <= big("now"))
    .order_by(job.c.due_at)
    .limit(CHUNK)
    .with_for_update(skip_locked=True)
)
#: When the next job is due, and when the next expires. The conditions are those of the indexes,
#: which SQLite and PostgreSQL else do not use.
NEXT_DUE = Sql(
    sa.select(
        *(
            sa.select(sa.func.min(column)).where(column.is_not(None)).scalar_subquery()
            for column in (job.c.due_at, job.c.expires_at)
        )
    )
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

FIND_COUNTER = Sql(sa.select(counter.c.n).where(counter.c.name == word("name")))
#: On SQLite the counter of events is behind; it only remembers what is deleted.
_last_event = sa.func.max(
    counter.c.n, sa.func.coalesce(sa.select(sa.func.max(event.c.n)).scalar_subquery(), 0)
)
LAST_EVENT = Sql(sa.select(_last_event).where(counter.c.name == "event"))
KEEP_LAST_EVENT = Sql(sa.update(counter).values(n=_last_event).where(counter.c.name == "event"))
ADD_COUNTER = Sql(sa.insert(counter).values(name=word("name"), n=0))
GIVE_BACK_IDS = Sql(
    sa.update(counter)
    .values(n=big("first"))
    .where(counter.c.name == "job", counter.c.n == big("last"))
)


HEALTH = tuple(health.c)
LOCK_HEALTH = Sql(sa.select(*HEALTH).where(health.c.type == word("type")).with_for_update())


def add_health(dialect: str) -> ClauseElement:
    """Another daemon may add the same row at the same moment."""
    values: dict[str, Any] = {
        "type": word("type"), "known_at": big("now"), "failures": 0, "untold": 0, "thread": "",
    }  # fmt: skip
    if dialect == "mysql":
        return sa.insert(health).prefix_with("IGNORE").values(**values)
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(health).values(**values).on_conflict_do_nothing()


ADD_HEALTH = Sql(add_health)
SET_HEALTH = Sql(
    sa.update(health)
    .values({c: sa.bindparam(c.name, None, type_=c.type) for c in HEALTH if c.name != "type"})
    .where(health.c.type == word("of"))
)
#: The first jobs of the next rank that can be claimed in a lane.
OLDEST_OF_RANK = Sql(
    sa.select(job.c.rank, job.c.created_at, job.c.run_at)
    .where(job.c.ready == big("lane"), job.c.rank > big("above"))
    .order_by(job.c.rank, job.c.ord, job.c.id)
    .limit(OLDEST_LOOKS)
)


# Limits


def by_uniq_key(dialect: str) -> ClauseElement:
    r = rows(dialect, k=str)
    found = sa.select(job.c.uniq_key, job.c.id, job.c.state, job.c.uniq_until, job.c.serial_key)
    return found.where(job.c.uniq_key == r.c.k)


def set_over_ids(where: sa.ColumnElement[bool], **values: Any) -> Callable[[str], ClauseElement]:
    def build(dialect: str) -> ClauseElement:
        r = over_ids(dialect)
        return sa.update(job).values(values).where(job.c.id == r.c.id, where)

    return build


def start_limited(dialect: str) -> ClauseElement:
    """What has started does not expire, and may be unique no more."""
    r = rows(dialect, id=int, frees=int)
    kept = sa.case((r.c.frees == 0, job.c.uniq_key))
    values = {job.c.expires_at: sa.null(), job.c.uniq_key: kept}
    return sa.update(job).values(values).where(job.c.id == r.c.id)


def expire_again(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, expires_at=int)
    return sa.update(job).values(expires_at=r.c.expires_at).where(job.c.id == r.c.id)


def take_keys(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, uniq_key=str, serial_key=str)
    values = {job.c.uniq_key: r.c.uniq_key, job.c.serial_key: r.c.serial_key}
    return sa.update(job).values(values).where(job.c.id == r.c.id)


def waiting(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return (
        sa.select(job.c.id, job.c.lane, job.c.state, job.c.attempt, job.c.options, job.c.expires_at)
        .where(job.c.id == r.c.id)
        .with_for_update(of=job)
    )


def lock_limits(dialect: str) -> ClauseElement:
    """Make rows of `limit` that are missing, and lock all of them until the commit."""
    chosen = sa.select(rows(dialect, name=str).c.name, sa.literal(0)).where(sa.true())
    if dialect == "mysql":
        chosen_in = mysql.insert(limit).from_select(["name", "at"], chosen, include_defaults=False)
        return chosen_in.on_duplicate_key_update(at=limit.c.at)
    kind: Any = sqlite if dialect == "sqlite" else postgresql
    new: Any = kind.insert(limit).from_select(["name", "at"], chosen, include_defaults=False)
    made: ClauseElement = new.on_conflict_do_update(
        index_elements=["name"], set_={"at": limit.c.at}
    )
    return made


#: Before the key of a line in the names of `limit`; `at` is the job whose turn it is.
LINE = "line:"
#: Before the key of a line that has a rate; `at` is when the next one may start: one interval after
#: the last start.
RATE = "rate:"


def lines(dialect: str) -> ClauseElement:
    """Of each key the job whose turn it is, and the first of its unfinished jobs."""
    r = rows(dialect, k=str, name=str)
    holder = sa.select(job.c.id).where(
        limit.c.name == r.c.name, job.c.id == limit.c.at, job.c.serial_key == r.c.k
    )
    first = sa.select(sa.func.min(job.c.id)).where(job.c.serial_key == r.c.k)
    return sa.select(
        r.c.k, holder.correlate(r).scalar_subquery(), first.correlate(r).scalar_subquery()
    )


def who_waits(dialect: str) -> ClauseElement:
    """Who waits for these unfinished jobs: by `@after`, as their parent, or behind them in a line.

    Each with the job it waits for.
    """
    r = over_ids(dialect)
    that = job.alias("that")
    found = sa.select(r.c.id.label("of"), job.c.id, job.c.state, job.c.serial_key)
    after = found.where(edge.c.needs == r.c.id, job.c.id == edge.c.job)
    above = found.where(
        that.c.id == r.c.id, that.c.child_key.is_not(None), job.c.id == that.c.parent
    )
    behind = found.where(
        that.c.id == r.c.id,
        job.c.serial_key == that.c.serial_key,
        job.c.id != that.c.id,
        sa.or_(job.c.id > that.c.id, that.c.state == RUNNING),
    )
    unfinished = job.c.state.in_([QUEUED, BLOCKED, RUNNING])
    parts = [part.where(unfinished) for part in (after, above, behind)]
    return sa.union_all(*parts).limit(CHUNK)


def give_turns(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, ready=int, due_at=int)
    values = {job.c.ready: r.c.ready, job.c.due_at: r.c.due_at, job.c.reason: ""}
    return sa.update(job).values(values).where(job.c.id == r.c.id, job.c.state == QUEUED)


def set_limits(dialect: str) -> ClauseElement:
    r = rows(dialect, name=str, n=int)
    return sa.update(limit).values({limit.c.at: r.c.n}).where(limit.c.name == r.c.name)


def limits_at(dialect: str) -> ClauseElement:
    r = rows(dialect, name=str)
    return sa.select(limit.c.name, limit.c.at).where(limit.c.name == r.c.name)


def put_in_line(dialect: str) -> ClauseElement:
    """Have queued jobs wait for their turn that could have been claimed."""
    r = rows(dialect, id=int, serial_key=str, reason=str)
    values = {
        job.c.ready: sa.null(), job.c.due_at: sa.null(), job.c.serial_key: r.c.serial_key,
        job.c.reason: r.c.reason,
    }  # fmt: skip
    return sa.update(job).values(values).where(job.c.id == r.c.id)


def drop_limits(dialect: str) -> ClauseElement:
    r = rows(dialect, name=str)
    if dialect == "sqlite":
        return sa.delete(limit).where(limit.c.name.in_(sa.select(r.c.name)))
    return sa.delete(limit).where(limit.c.name == r.c.name)


BY_UNIQ_KEY = Sql(by_uniq_key, each=True)
#: The key was kept for a time after the end, and that is over.
FREE_OLD_KEYS = Sql(set_over_ids(job.c.ended_at.is_not(None), uniq_key=sa.null()))
#: A job has ended: its turn is over, and it is unique no more unless that was for a time.
FREE_KEYS = Sql(
    set_over_ids(
        sa.true(),
        serial_key=sa.null(),
        uniq_key=sa.case((job.c.uniq_until > big("now"), job.c.uniq_key)),
    )
)
START_LIMITED = Sql(start_limited)
EXPIRE_AGAIN = Sql(expire_again)
NEVER_EXPIRE = Sql(set_over_ids(sa.true(), expires_at=sa.null()))
TAKE_KEYS = Sql(take_keys)
SET_OPTIONS = Sql(sa.update(job).values(options=word("text")).where(job.c.id == big("id")))
WAITING = Sql(waiting)
END_WAITING = Sql(
    set_over_ids(
        job.c.state.in_([QUEUED, BLOCKED]),
        state=word("ended"),
        reason=word("why"),
        message=word("said"),
        ready=sa.null(),
        due_at=sa.null(),
        expires_at=sa.null(),
        ended_at=big("now"),
    )
)
LOCK_LIMITS = Sql(lock_limits)
LINES = Sql(lines)
HEADS = Sql(of_jobs(job.c.serial_key, job.c.lane, job.c.state, job.c.run_at, job.c.attempt))
GIVE_TURNS = Sql(give_turns)
SET_LIMITS = Sql(set_limits)
DROP_LIMITS = Sql(drop_limits)
LIMITS_AT = Sql(limits_at)
PUT_IN_LINE = Sql(put_in_line)
LEAVE_LINES = Sql(set_over_ids(sa.true(), serial_key=sa.null()))
DROP_OLD_RATES = Sql(
    sa.delete(limit).where(limit.c.name.like(RATE + "%"), limit.c.at < big("before"))
)
OVERDUE = Sql(
    sa.select(*CLAIMED)
    .where(job.c.expires_at <= big("now"))
    .order_by(job.c.expires_at)
    .limit(CHUNK)
)
#: Counts of a type, lane by lane.
TALLY_OF = Sql(
    sa.select(tally.c.lane, tally.c.state, tally.c.n).where(
        tally.c.lane == lane.c.id, lane.c.type == word("type")
    )
)
ABOVE = Sql(sa.select(job.c.parent, job.c.state, job.c.serial_key).where(job.c.id == big("id")))
WHO_WAITS = Sql(who_waits)
WAITING_IN_LINE = Sql(
    sa.select(job.c.id).where(job.c.serial_key == word("key"), job.c.state.in_([QUEUED, BLOCKED]))
)
#: What waits of a type, without a look at what has ended.
WAITING_OF = Sql(
    sa.union(
        sa.select(job.c.id).where(job.c.ready == lane.c.id, lane.c.type == word("type")),
        sa.select(job.c.id).where(job.c.state == BLOCKED, job.c.type == word("type")),
        sa.select(job.c.id).where(job.c.due_at.is_not(None), job.c.type == word("type")),
    )
)
#: Keys whose line nobody moves: nobody has the turn, and the first could take it. There are none,
#: unless somebody has meddled with the tables.
STUCK_LINES = Sql(
    sa.select(limit.c.name)
    .where(limit.c.name.like(LINE + "%"))
    .where(
        ~sa.exists().where(
            job.c.id == limit.c.at, sa.literal(LINE).concat(job.c.serial_key) == limit.c.name
        )
    )
    .limit(CHUNK)
)


# Batches


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
PLAIN_STATES_OF = Sql(of_jobs(job.c.state))
AWAITED_OF = Sql(awaited_of)

# Schedules. The row of a schedule at 0 is its head.


def insert_if_new(dialect: str) -> ClauseElement:
    r = rows(dialect, schedule=str, at=int, job=int)
    chosen = sa.select(*r.c).where(sa.true())  # or SQLite takes ON for that of a join
    columns = ["schedule", "at", "job"]
    if dialect == "mysql":
        return (
            sa.insert(slot)
            .prefix_with("IGNORE")
            .from_select(columns, chosen, include_defaults=False)
        )
    made: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect](slot)
    found: ClauseElement = made.from_select(
        columns, chosen, include_defaults=False
    ).on_conflict_do_nothing()
    return found


def heads_of(dialect: str, *, others_first: bool) -> ClauseElement:
    r = rows(dialect, schedule=str)
    return (
        sa.select(slot.c.schedule, slot.c.job)
        .where(slot.c.schedule == r.c.schedule, slot.c.at == 0)
        .order_by(slot.c.schedule)
        .with_for_update(skip_locked=not others_first, of=slot)
    )


def last_slots(dialect: str) -> ClauseElement:
    r = rows(dialect, schedule=str)
    newest = (
        sa.select(slot.c.at)
        .where(slot.c.schedule == r.c.schedule, slot.c.at <= big("until"))
        .order_by(slot.c.at.desc())
        .limit(1)
    )
    return sa.select(r.c.schedule, newest.correlate(r).scalar_subquery())


ADD_SLOTS = Sql(insert_if_new)
INSERT_SLOTS = insert_into(slot, schedule=str, at=int, job=int)
#: The heads of schedules, locked: by whoever comes first, or else left out; or waited for.
HEADS_FREE = Sql(lambda dialect: heads_of(dialect, others_first=False))
SCHEDULE_HEADS = Sql(lambda dialect: heads_of(dialect, others_first=True))
SET_HEAD = Sql(
    sa.update(slot)
    .values(job=big("digest"))
    .where(slot.c.schedule == word("schedule"), slot.c.at == 0)
)
LAST_SLOTS = Sql(last_slots)
#: From one schedule to the next: one look into the index for each.
NEXT_SCHEDULE = Sql(
    sa.select(slot.c.schedule)
    .where(slot.c.schedule > word("after"))
    .order_by(slot.c.schedule)
    .limit(1)
)
LAST_FIRED = Sql(
    sa.select(slot.c.at)
    .where(slot.c.schedule == word("schedule"), slot.c.at > 0, slot.c.job.is_not(None))
    .order_by(slot.c.at.desc())
    .limit(1)
)
OLD_SLOTS = Sql(
    sa.select(slot.c.at)
    .where(slot.c.schedule == word("schedule"), slot.c.at > 0, slot.c.at < big("before"))
    .order_by(slot.c.at)
    .limit(CHUNK)
)
DELETE_SLOTS = Sql(
    sa.delete(slot).where(
        slot.c.schedule == word("schedule"), slot.c.at > 0, slot.c.at <= big("upto")
    )
)
