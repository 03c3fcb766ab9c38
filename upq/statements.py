"""The store's statements, each built once with SQLAlchemy Core for all three databases.

Those over `rows()` do a whole batch at once. Guards stand in the statement: a row that is not in
the state it should be in is left alone, and the count says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
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
health = schema.health

SUBMITTED: dict[str, type] = {
    "id": int, "lane": int, "type": str, "queue": str, "ready": int, "rank": int, "ord": int,
    "state": str, "reason": str, "params": str, "options": str, "run_at": int, "due_at": int,
    "idem_key": str, "waits": int, "parent": int, "root": int, "child_key": str,
    "submitter": str, "created_at": int,
}  # fmt: skip
AT = {name: i for i, name in enumerate(SUBMITTED)}
AS_NEW = {"attempt": 0, "starts": 0, "crashes": 0, "token": 0, "cancel_asked": 0}


def big(name: str) -> sa.BindParameter[int]:
    return sa.bindparam(name, None, type_=sa.BigInteger)


def word(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, None, type_=sa.String)


def insert_jobs(dialect: str) -> ClauseElement:
    r = rows(dialect, **SUBMITTED)
    columns = [*SUBMITTED, *AS_NEW]
    fixed = [sa.literal(value) for value in AS_NEW.values()]
    return sa.insert(job).from_select(columns, sa.select(*r.c, *fixed), include_defaults=False)


def insert_into(table: sa.Table[Any], **columns: type) -> Sql:
    def build(dialect: str) -> ClauseElement:
        chosen = sa.select(*rows(dialect, **columns).c)
        return sa.insert(table).from_select(list(columns), chosen, include_defaults=False)

    return Sql(build)


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


def by_key(column: sa.Column[Any]) -> Callable[[str], ClauseElement]:
    def build(dialect: str) -> ClauseElement:
        r = rows(dialect, k=str)
        return sa.select(column, job.c.id, job.c.type, job.c.params).where(column == r.c.k)

    return build


def states_of(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return sa.select(job.c.id, job.c.state).where(job.c.id == r.c.id).with_for_update(of=job)


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


def waits_of(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    return sa.select(
        job.c.id, job.c.lane, job.c.run_at, job.c.attempt, job.c.waits, job.c.state
    ).where(job.c.id == r.c.id)


def free_jobs(dialect: str) -> ClauseElement:
    r = rows(dialect, id=int, ready=int, due_at=int)
    return (
        sa.update(job)
        .values(
            {
                job.c.state: QUEUED,
                job.c.reason: "",
                job.c.ready: r.c.ready,
                job.c.due_at: r.c.due_at,
            }
        )
        .where(job.c.id == r.c.id, job.c.waits == 0)
    )


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


INSERT_JOBS = Sql(insert_jobs)
INSERT_EVENTS = insert_into(
    event, n=int, job=int, lane=int, at=int, state=str, reason=str, message=str, attempt=int,
    node=str, who=str,
)  # fmt: skip
INSERT_OUTPUTS = insert_into(output, job=int, attempt=int, text=str, size_bytes=int, truncated=int)
INSERT_EDGES = insert_into(edge, job=int, needs=int)
CHANGE_TALLY = Sql(change_tally)
TAKE_NUMBERS = Sql(take_numbers)
PICK_CLAIMABLE = Sql(pick_claimable)
START_JOBS = Sql(start_jobs)
END_ATTEMPTS = Sql(end_attempts)
BY_IDEM_KEY = Sql(by_key(job.c.idem_key))
BY_CHILD_KEY = Sql(by_key(job.c.child_key))
STATES_OF = Sql(states_of)
DEPENDENTS_OF = Sql(dependents_of)
LOWER_WAITS = Sql(lower_waits)
WAITS_OF = Sql(waits_of)
FREE_JOBS = Sql(free_jobs)
BLOCK_JOBS = Sql(block_jobs)
MAKE_READY = Sql(make_ready)
REQUEUE_JOBS = Sql(requeue_jobs)
DELETE_JOBS = Sql(delete_by(job.c.id))
DELETE_EVENTS = Sql(delete_by(event.c.job))
DELETE_OUTPUTS = Sql(delete_by(output.c.job))
DELETE_EDGES = Sql(delete_by(edge.c.needs))
DELETE_OWN_EDGES = Sql(delete_by(edge.c.job))

#: Children of a parent that runs anew: those that have ended badly are to run again when asked for.
AGAIN = "parent runs again"


def again_below(dialect: str) -> ClauseElement:
    r = over_ids(dialect)
    # The state is no condition, or SQLite would look for the rows by it.
    ended_badly = job.c.state.in_(FINAL - {DONE})
    reason = sa.case((ended_badly, AGAIN), else_=job.c.reason)
    return sa.update(job).values({job.c.reason: reason}).where(job.c.parent == r.c.id)


AGAIN_BELOW = Sql(again_below)

#: Whether the batch whose first event this would be was committed.
PROOF = Sql(
    sa.select(event.c.n).where(
        event.c.n == big("n"), event.c.job == big("job"), event.c.at == big("at")
    )
)
ONE_JOB = Sql(
    sa.select(job.c.state, job.c.lane, job.c.attempt, job.c.waits, job.c.token)
    .where(job.c.id == big("id"))
    .with_for_update()
)
#: The state that a claim's own end has left.
OWN_END = Sql(sa.select(job.c.state).where(job.c.id == big("id"), job.c.token == -big("token")))
CANCEL_WAITING = Sql(
    sa.update(job)
    .values(
        state=CANCELLED,
        reason="",
        ready=sa.null(),
        due_at=sa.null(),
        ended_at=big("now"),
        message=word("message"),
    )
    .where(job.c.id == big("id"), job.c.state.in_([QUEUED, BLOCKED]))
)
ASK_CANCEL = Sql(
    sa.update(job).values(cancel_asked=1).where(job.c.id == big("id"), job.c.state == RUNNING)
)
REOPEN = Sql(
    sa.update(job)
    .values(
        state=word("state"),
        reason=word("reason"),
        ready=big("ready"),
        due_at=sa.null(),
        run_at=sa.null(),
        ended_at=sa.null(),
        result=sa.null(),
        progress=sa.null(),
        cancel_asked=0,
        attempt=0,
        crashes=0,
    )
    .where(job.c.id == big("id"), job.c.state == word("was"))
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

LANES = Sql(sa.select(lane.c.id, lane.c.queue, lane.c.type, lane.c.paused))
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

DUE = Sql(
    sa.select(job.c.id, job.c.lane)
    .where(job.c.due_at <= big("now"))
    .order_by(job.c.due_at)
    .limit(CHUNK)
    .with_for_update(skip_locked=True)
)
#: The condition is that of the index, which SQLite and PostgreSQL else do not use.
NEXT_DUE = Sql(sa.select(sa.func.min(job.c.due_at)).where(job.c.due_at.is_not(None)))

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


def _outdated() -> ClauseElement:
    above = sa.alias(job)
    kept_for_parent = sa.exists().where(above.c.id == job.c.parent, above.c.state.not_in(FINAL))
    awaited = sa.exists().where(edge.c.needs == job.c.id)
    return (
        sa.select(job.c.id, job.c.lane)
        .where(job.c.state == word("state"), job.c.ended_at < big("before"))
        .where(~kept_for_parent, ~awaited)
        .order_by(job.c.ended_at)
        .limit(CHUNK)
        # Another daemon may purge or retry the same jobs.
        .with_for_update(skip_locked=True, of=job)
    )


OUTDATED = Sql(_outdated())
