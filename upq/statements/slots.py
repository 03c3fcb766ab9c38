"""Schedules: which of their times are taken. The row of a schedule at 0 is its head."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql import ClauseElement

from upq.clauses import CHUNK, big, insert_into, word
from upq.schema import slot
from upq.sql import Sql, rows


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
