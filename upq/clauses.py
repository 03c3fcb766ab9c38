"""What the store's statements are made of: parameters, and what they do to rows given by id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import ClauseElement

from upq.schema import job
from upq.sql import Sql, rows

#: Rows that a chore changes in one transaction.
CHUNK = 1000
#: What a claim reads of a job.
CLAIMED = (job.c.id, job.c.lane, job.c.type, job.c.queue, job.c.params, job.c.data, job.c.options,
           job.c.rank, job.c.run_at, job.c.attempt, job.c.starts, job.c.crashes, job.c.parent,
           job.c.root, job.c.submitter, job.c.created_at, job.c.cancel_asked)  # fmt: skip


def big(name: str) -> sa.BindParameter[int]:
    return sa.bindparam(name, None, type_=sa.BigInteger)


def word(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, None, type_=sa.String)


def insert_into(table: sa.Table[Any], **columns: type) -> Sql:
    def build(dialect: str) -> ClauseElement:
        r = rows(dialect, **columns)
        chosen = sa.select(*r.c).where(next(iter(r.c)).is_not(None))
        return sa.insert(table).from_select(list(columns), chosen, include_defaults=False)

    return Sql(build, each=True)


def over_ids(dialect: str) -> Any:
    return rows(dialect, id=int)


def of_jobs(*columns: Any) -> Callable[[str], sa.Select[Any]]:
    """Their ids and these columns."""

    def build(dialect: str) -> sa.Select[Any]:
        return sa.select(job.c.id, *columns).where(job.c.id == over_ids(dialect).c.id)

    return build


def lock_jobs(*columns: Any) -> Callable[[str], ClauseElement]:
    """Their ids and these columns, which nobody changes before the commit."""
    read = of_jobs(*columns)
    return lambda dialect: read(dialect).with_for_update(of=job)


def delete_by(column: sa.Column[Any]) -> Callable[[str], ClauseElement]:
    def build(dialect: str) -> ClauseElement:
        r = over_ids(dialect)
        if dialect == "sqlite":  # which has no DELETE over a join; MariaDB scans for a subselect
            return sa.delete(column.table).where(column.in_(sa.select(r.c.id)))
        return sa.delete(column.table).where(column == r.c.id)

    return build
