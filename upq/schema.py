"""The tables, the same for SQLite, MariaDB/MySQL and PostgreSQL. What they mean is in `queue`.

Times are integers, microseconds since 1970 UTC. Booleans are 0 and 1.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.mysql import LONGTEXT
from sqlalchemy.schema import SchemaItem

#: Raised with each step of `upq.migrations`.
VERSION = 5

#: The default of MariaDB takes `abc`, `ABC` and `abc ` for one, and so does MySQL's.
MARIADB_COLLATION, MYSQL_COLLATION = "utf8mb4_nopad_bin", "utf8mb4_0900_bin"

meta = MetaData()
# Only INTEGER is SQLite's own row id.
Big = BigInteger().with_variant(Integer(), "sqlite")
Long = Text().with_variant(LONGTEXT(), "mysql", "mariadb")
OPTIONS: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": MARIADB_COLLATION,
}


def table(name: str, *parts: SchemaItem) -> Table[Any]:
    made: Table[Any] = Table(f"upq_{name}", meta, *parts, **OPTIONS)
    return made


version = table("version", Column("version", Integer, primary_key=True, autoincrement=False))


def collate(name: str) -> None:
    """Have the tables made with another collation."""
    for one in meta.tables.values():
        one.dialect_options["mysql"]["collate"] = name


#: Numbers handed out: `job` ids in blocks ahead, `event` numbers at the end of each transaction.
counter = table(
    "counter",
    Column("name", String(16), primary_key=True),
    Column("n", Big, nullable=False),
)

#: One row for each queue and type; `paused` is a fact of a lane, never of a million jobs.
lane = table(
    "lane",
    Column("id", Big, primary_key=True, autoincrement=True),
    Column("queue", String(255), nullable=False),
    Column("type", String(64), nullable=False),
    Column("node", String(255), nullable=False),
    Column("paused", SmallInteger, nullable=False),
    UniqueConstraint("queue", "type", "node", name="upq_lane_name"),
)

job = table(
    "job",
    Column("id", Big, primary_key=True, autoincrement=False),
    Column("lane", Big, nullable=False),
    Column("type", String(64), nullable=False),
    Column("queue", String(255), nullable=False),
    # The lane's id while the job can be claimed, else NULL: what is not due costs a claim nothing.
    Column("ready", Big),
    # Minus the priority: both columns ascend, or MariaDB sorts and locks the whole lot.
    Column("rank", Integer, nullable=False),
    # The root's id: a tree's children go before younger roots.
    Column("ord", Big, nullable=False),
    Column("state", String(10), nullable=False),
    Column("reason", String(255), nullable=False),
    Column("params", Long, nullable=False),
    # jobdata as the last attempt left it; NULL while it is the params.
    Column("data", Long),
    Column("options", Long),
    # When it may start, as users see it; `due_at` is the same while a chore has to wake the job.
    Column("run_at", Big),
    Column("due_at", Big),
    Column("expires_at", Big),
    Column("attempt", Integer, nullable=False),
    Column("starts", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("token", Big, nullable=False),
    Column("owner", String(32)),
    Column("lease_until", Big),
    Column("cancel_asked", SmallInteger, nullable=False),
    Column("idem_key", String(64)),
    # Set while another job with the same key is refused: see `unique`; until when it stays set
    # after the end.
    Column("uniq_key", String(64)),
    Column("uniq_until", Big),
    # Jobs of one key take turns, in the order of their ids: only the first is ever `ready`. NULL
    # once the turn is over: at the end, or with a rate at the start.
    Column("serial_key", String(64)),
    Column("waits", Integer, nullable=False),
    Column("parent", Big),
    Column("root", Big, nullable=False),
    Column("child_key", String(64)),
    Column("submitter", String(255), nullable=False),
    Column("result", Long),
    Column("message", Long),
    Column("progress", Text),
    Column("created_at", Big, nullable=False),
    Column("started_at", Big),
    Column("ended_at", Big),
)


def partial(name: str, *columns: str, unique: bool = False) -> None:
    """An index over the rows whose first column is not NULL; MariaDB keeps the others too."""
    only = job.c[columns[0]].is_not(None)
    Index(
        name, *(job.c[c] for c in columns), unique=unique,
        sqlite_where=only, postgresql_where=only,
    )  # fmt: skip


partial("upq_job_ready", "ready", "rank", "ord", "id")
partial("upq_job_due", "due_at")
partial("upq_job_expires", "expires_at")
partial("upq_job_serial", "serial_key", "id")
partial("upq_job_parent", "parent")
Index("upq_job_state", job.c.state, job.c.ended_at, job.c.id)
Index("upq_job_type", job.c.type, job.c.id)
partial("upq_job_idem_key", "idem_key", unique=True)
partial("upq_job_child_key", "child_key", unique=True)
partial("upq_job_uniq_key", "uniq_key", unique=True)

#: Every change of state and every attempt, numbered in the order of the commits.
event = table(
    "event",
    Column("n", Big, primary_key=True, autoincrement=False),
    Column("job", Big, nullable=False),
    Column("lane", Big, nullable=False),
    Column("at", Big, nullable=False),
    Column("state", String(10), nullable=False),
    Column("reason", String(255), nullable=False),
    Column("message", Text),
    Column("attempt", Integer, nullable=False),
    Column("node", String(255), nullable=False),
    Column("who", String(255), nullable=False),
    Index("upq_event_job", "job", "n"),
)

#: Captured output, one row an attempt that wrote any.
output = table(
    "output",
    Column("job", Big, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("text", Long, nullable=False),
    Column("size_bytes", Big, nullable=False),
    Column("truncated", SmallInteger, nullable=False),
)

#: `job` waits for `needs`.
edge = table(
    "edge",
    Column("job", Big, primary_key=True, autoincrement=False),
    Column("needs", Big, primary_key=True, autoincrement=False),
    Index("upq_edge_needs", "needs"),
)

#: What pieces of a parent's own work have returned, so that none is done again; and the ids of jobs
#: that stand in for its children (unique), or for members of a batch.
step = table(
    "step",
    Column("job", Big, primary_key=True, autoincrement=False),
    # A digest of the name and of how many of that name came before; or the child's key; or
    # "member " and the id of the other job.
    Column("key", String(64), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("result", Long),
    Column("at", Big, nullable=False),
)

#: Cancels that are not through, one row each until they are; there are never many.
cancel = table(
    "cancel",
    # A random number.
    Column("id", Big, primary_key=True, autoincrement=False),
    # When the latest step was made.
    Column("at", Big, nullable=False),
    # JSON: below which jobs all is to end, and who wants that; and what is still to be looked at.
    Column("goal", Long, nullable=False),
    Column("pages", Long, nullable=False),
)

#: Rates: when the next start of what the name stands for is due.
limit = table(
    "limit",
    Column("name", String(64), primary_key=True),
    Column("at", Big, nullable=False),
)

#: Times at which a schedule has fired, or has been passed over; `job` is NULL then. The row at 0 is
#: the schedule itself: daemons lock it, and its `job` is a digest of the expression.
slot = table(
    "slot",
    Column("schedule", String(255), primary_key=True),
    Column("at", Big, primary_key=True, autoincrement=False),
    Column("job", Big),
)

#: How a job type has fared lately, for those that are told only of every so many failures.
health = table(
    "health",
    Column("type", String(64), primary_key=True),
    # Failures in a row, when the first of them was, and those nobody was told of.
    Column("failures", Integer, nullable=False),
    Column("failing_since", Big),
    Column("untold", Integer, nullable=False),
    Column("told_at", Big),
    Column("done_at", Big),
    # One word for a group of failures, in all that is told of it.
    Column("thread", String(64), nullable=False),
    # Since when it is watched; when the alerts that are not over were sent.
    Column("known_at", Big, nullable=False),
    Column("queue_alert_at", Big),
    Column("silence_alert_at", Big),
    # JSON: of the failures nobody was told of, times, ids and the latest message.
    Column("latest", Long),
)

#: One row for each start of a daemon; `id` is its incarnation.
node = table(
    "node",
    Column("id", String(32), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("machine", String(64), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started_at", Big, nullable=False),
    Column("beat_at", Big, nullable=False),
)

#: How many jobs a lane has in each state, changed in the transaction that changes the job.
tally = table(
    "tally",
    Column("lane", Big, primary_key=True, autoincrement=False),
    Column("state", String(10), primary_key=True),
    Column("n", Big, nullable=False),
)
