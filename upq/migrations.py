"""Steps an older schema up to `schema.VERSION`.

A step and its version number are one transaction, so one that was cut off has not happened. But
MariaDB and MySQL commit each change of a table by itself: a step must do no harm when it is
repeated, and asks the helpers here what is there already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.engine import Connection

from upq import schema
from upq.errors import DatabaseUnusable

log = logging.getLogger(__name__)

Step = Callable[[Operations], None]


def index_only_keys(op: Operations) -> None:
    """Version 2: jobs without a key no longer stand in the indexes of keys."""
    for column in ("idem_key", "child_key"):
        name = f"upq_job_{column}"
        if op.get_bind().dialect.name not in ("mysql", "mariadb"):  # they have no such indexes
            op.drop_index(name, "upq_job")
            only = sa.text(f"{column} IS NOT NULL")
            op.create_index(
                name, "upq_job", [column], unique=True, sqlite_where=only, postgresql_where=only
            )


def add_limits(op: Operations) -> None:
    """Version 3: unique jobs, jobs that take turns, rates, schedules, how a type fares."""
    for name in ("uniq_key", "uniq_until", "serial_key"):
        if not has_column(op, "upq_job", name):
            op.add_column("upq_job", sa.Column(name, schema.job.c[name].type))
    for index in sorted(schema.job.indexes, key=lambda index: str(index.name)):
        if not has_index(op, "upq_job", str(index.name)):
            index.create(op.get_bind())
    schema.meta.create_all(op.get_bind(), [schema.limit, schema.slot, schema.health])


def add_steps(op: Operations) -> None:
    """Version 4: the steps of parents."""
    schema.meta.create_all(op.get_bind(), [schema.step])


def add_cancels(op: Operations) -> None:
    """Version 5: what is left of cancels."""
    schema.meta.create_all(op.get_bind(), [schema.cancel])


#: The step that leads to each version; version 1 was the first. A step may use `schema` only for
#: what no later version changes.
STEPS: dict[int, Step] = {2: index_only_keys, 3: add_limits, 4: add_steps, 5: add_cancels}


def upgrade(connection: Connection, found: int) -> None:
    """Bring the tables from version `found` to ours. The caller holds the lock for it."""
    versions = range(found + 1, schema.VERSION + 1)
    missing = [version for version in versions if version not in STEPS]
    if missing:
        raise DatabaseUnusable(f"no way from version {found} of the tables to {missing[0]}")
    for version in versions:
        with connection.begin():
            STEPS[version](Operations(MigrationContext.configure(connection)))
            connection.execute(sa.update(schema.version).values(version=version))
        log.info("the database's tables are of version %d now", version)


def has_table(op: Operations, table: str) -> bool:
    return sa.inspect(op.get_bind()).has_table(table)


def has_column(op: Operations, table: str, column: str) -> bool:
    return any(c["name"] == column for c in sa.inspect(op.get_bind()).get_columns(table))


def has_index(op: Operations, table: str, index: str) -> bool:
    return sa.inspect(op.get_bind()).has_index(table, index)
