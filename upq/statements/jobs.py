"""Jobs and their lanes: inserted, claimed and ended, with events, counts and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import ClauseElement

from upq.clauses import CHUNK, CLAIMED, big, insert_into, lock_jobs, over_ids, word
from upq.job import QUEUED, RUNNING
from upq.schema import counter, event, job, lane, limit, output, step, tally
from upq.sql import Sql, rows

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


def insert_jobs(**given: type) -> Callable[[str], ClauseElement]:
    def build(dialect: str) -> ClauseElement:
        r = rows(dialect, **given)
        columns = [*given, *AS_NEW]
        fixed = [sa.literal(value) for value in AS_NEW.values()]
        chosen = sa.select(*r.c, *fixed).where(r.c.id.is_not(None))
        return sa.insert(job).from_select(columns, chosen, include_defaults=False)

    return build


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


def by_key(column: sa.Column[Any]) -> Callable[[str], ClauseElement]:
    def build(dialect: str) -> ClauseElement:
        r = rows(dialect, k=str)
        return sa.select(column, job.c.id, job.c.type, job.c.params).where(column == r.c.k)

    return build


def cancelled_of(dialect: str) -> ClauseElement:
    """Of these jobs, those that somebody wants to end."""
    r = over_ids(dialect)
    asked = sa.select(job.c.id).where(job.c.id == r.c.id, job.c.cancel_asked == 1)
    return asked.with_for_update(of=job)


def make_ready(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return (
        sa.update(job)
        .values({job.c.ready: job.c.lane, job.c.due_at: sa.null()})
        .where(job.c.id == r.c.id)
    )


INSERT_JOBS = Sql(insert_jobs(**SUBMITTED), each=True)
INSERT_LIMITED = Sql(insert_jobs(**SUBMITTED, **LIMITED), each=True)
INSERT_EVENTS = insert_into(
    event, n=int, job=int, lane=int, at=int, state=str, reason=str, message=str, attempt=int,
    node=str, who=str,
)  # fmt: skip
INSERT_OUTPUTS = insert_into(output, job=int, attempt=int, text=str, size_bytes=int, truncated=int)
CHANGE_TALLY = Sql(change_tally, each=True)
TAKE_NUMBERS = Sql(take_numbers)
PICK_CLAIMABLE = Sql(pick_claimable)
PICK_ABOVE = Sql(pick_above)
RUNNING_OF_TYPES = Sql(running_of_types)
START_JOBS = Sql(start_jobs, each=True)
END_ATTEMPTS = Sql(end_attempts, each=True)
BY_IDEM_KEY = Sql(by_key(job.c.idem_key), each=True)
BY_CHILD_KEY = Sql(by_key(job.c.child_key), each=True)
STATES_OF = Sql(lock_jobs(job.c.state), each=True)
CANCELLED_OF = Sql(cancelled_of, each=True)
MAKE_READY = Sql(make_ready, each=True)
#: Whether the batch whose first event this would be was committed.
PROOF = Sql(
    sa.select(event.c.n).where(
        event.c.n == big("n"), event.c.job == big("job"), event.c.at == big("at")
    )
)
#: The state that a claim's own end has left.
OWN_END = Sql(sa.select(job.c.state).where(job.c.id == big("id"), job.c.token == -big("token")))
COUNT_CRASH = Sql(sa.update(job).values(crashes=job.c.crashes + 1).where(job.c.id == big("id")))


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

LOCK_LIMIT = Sql(sa.select(limit.c.at).where(limit.c.name == word("name")).with_for_update())
ADD_LIMIT = Sql(sa.insert(limit).values(name=word("name"), at=big("at")))
SET_LIMIT = Sql(sa.update(limit).values(at=big("at")).where(limit.c.name == word("name")))

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
OVERDUE = Sql(
    sa.select(*CLAIMED)
    .where(job.c.expires_at <= big("now"))
    .order_by(job.c.expires_at)
    .limit(CHUNK)
)

#: What this daemon runs that somebody wants to end.
ASKED_TO_END = Sql(
    sa.select(job.c.lane, job.c.token).where(
        job.c.state == RUNNING, job.c.owner == word("owner"), job.c.cancel_asked == 1
    )
)

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
MAKE_TALLY = insert_into(tally, lane=int, state=str, n=int)

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
