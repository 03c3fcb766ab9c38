"""The tables of the platform, in the database that upq gives to jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData()

#: What check_repo has guessed of a repository.
guess = sa.Table(
    "dz_guess", metadata,
    sa.Column("job", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("repo", sa.String(500), nullable=False),
    sa.Column("guesses", sa.JSON, nullable=False),
)  # fmt: skip

#: How each appserver was when it was last asked; `load` is that of one processor.
appserver = sa.Table(
    "dz_appserver", metadata,
    sa.Column("server", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("load", sa.Float, nullable=False),
    sa.Column("healthy", sa.Boolean, nullable=False),
    sa.Column("seen_s", sa.Float, nullable=False),
)  # fmt: skip

#: What was published; `release` is the number of the job that did it.
release = sa.Table(
    "dz_release", metadata,
    sa.Column("release", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("app", sa.String(31), nullable=False, index=True),
    sa.Column("server", sa.Integer, nullable=False),
    sa.Column("address", sa.String(255), nullable=False),
    sa.Column("port", sa.Integer, nullable=False),
    sa.Column("commit", sa.String(64), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("zoombuild", sa.Text, nullable=False),
)  # fmt: skip


@contextmanager
def tables(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction in which the tables exist."""
    with engine.begin() as connection:
        metadata.create_all(connection)
        yield connection


def put(connection: sa.Connection, table: sa.Table, **row: Any) -> None:
    """Write a row, in the place of the one with the same key."""
    key = next(iter(table.primary_key))
    connection.execute(sa.delete(table).where(key == row[key.name]))
    connection.execute(sa.insert(table).values(**row))


def servers(connection: sa.Connection) -> list[tuple[int, float, bool, float]]:
    """Number, load, health and age in seconds of each appserver."""
    now_s = time.time()
    rows = connection.execute(sa.select(appserver))
    return [(row.server, row.load, row.healthy, now_s - row.seen_s) for row in rows]


def published(connection: sa.Connection, app: str) -> list[dict[str, Any]]:
    """The releases of an application, the newest first."""
    query = sa.select(release).where(release.c.app == app).order_by(release.c.release.desc())
    return [dict(row) for row in connection.execute(query).mappings()]
