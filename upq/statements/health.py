"""How types fare: the row of each, and how long its jobs have waited."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql import ClauseElement

from upq.clauses import big, word
from upq.schema import health, job
from upq.sql import Sql

#: Jobs of one rank that are looked at for the oldest: children and retries may stand before it.
OLDEST_LOOKS = 100
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
