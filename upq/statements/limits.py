"""Jobs that are unique, take turns or expire, and the rows by which daemons agree on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.sql import ClauseElement

from upq.clauses import CHUNK, big, of_jobs, over_ids, word
from upq.job import BLOCKED, QUEUED, RUNNING
from upq.schema import edge, job, lane, limit, tally
from upq.sql import Sql, rows


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
