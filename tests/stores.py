"""A store to test with: a prepared database with one queue on it, and many rows quickly.

The fixtures are for tests that share one database: to make one takes longer than most of them.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Collection, Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple, Self

import pytest
import sqlalchemy as sa

from tests.servers import Server
from upq import schema
from upq import statements as folder
from upq.batch import Act
from upq.db import Database
from upq.errors import RequestError
from upq.events import Bus, Event
from upq.job import Accepted, Job, NewJob
from upq.lists import Filter, Lists
from upq.queue import Queue, value_of
from upq.retention import purge
from upq.sql import Sql
from upq.views import Views

#: Rows that `Store.copy` inserts with one statement.
COPIED = 20_000


class Store:
    """What a daemon has of the database. As a context manager it is closed in the end."""

    def __init__(self, at: str | Database, node: str = "node", machine: str = "machine") -> None:
        self._owns = isinstance(at, str)
        self.database = Database(at) if isinstance(at, str) else at
        if self._owns:
            self.database.prepare()
        self.events: list[Event] = []
        bus = Bus()
        bus.subscribe(self.events.extend)
        self.queue = Queue(self.database, bus, node, machine)
        self.queue.open()
        self.views = Views(self.database, lambda lane: "", frozenset)
        self.lists = Lists(self.views)

    @property
    def settles(self) -> list[str]:
        """The statements that end a transaction."""
        return [*(["TAKE_NUMBERS"] if self.queue.shared else []), "INSERT_EVENTS"]

    def beside(self) -> Store:
        """Another daemon on the same database; a second queue where only one is served."""
        if self.queue.shared:
            return Store(self.database.url.render_as_string(hide_password=False), "other node")
        other = Store(self.database, "other node")
        for one in (self, other):
            one._wait_long()
        return other

    def _wait_long(self) -> None:
        """SQLite's lock has no line: of two queues that both want it always, one may starve."""
        pragma = f"PRAGMA busy_timeout={60 * 1000}"
        self.queue.act(lambda batch: batch.tx.cursor.execute(pragma).fetchall())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.queue.close()
        if self._owns:
            self.database.close()

    def crash(self) -> None:
        """Leave everything as it is, as a daemon that was killed."""
        self.queue.writer.close()
        self.database.close()

    def accepted(self, *jobs: NewJob) -> list[Accepted]:
        """Submit jobs, all or none. Raises what the queue answers."""
        return list(value_of(self.queue.submit([jobs])[0]))

    def submit(self, type: str = "hash", /, **fields: Any) -> int:
        """Submit one job; returns its id."""
        return self.accepted(NewJob(type, fields.pop("params", {}), **fields))[0].id

    def claim(self, n: int = 1, type: str = "hash", queue: str = "") -> list[Job]:
        return self.queue.claim([(self.queue.lane(queue or type, type).id, n)])

    def claim_one(self, type: str = "hash") -> Job:
        (job,) = self.claim(1, type)
        return job

    def jobs(
        self, lanes: Collection[int], limit: int = 20, lists: Lists | None = None, **wanted: Any
    ) -> list[dict[str, Any]]:
        """The first page of those that are wanted, as a Filter has it."""
        return (lists or self.lists).page(lanes, Filter(**wanted), limit).jobs

    def purge(self, state: str, before: int) -> int:
        return purge(self.queue, state, before)

    def flush(self, deadline_s: float = 20) -> None:
        """Commit what was posted, when the database has been away, too."""
        over_s = time.monotonic() + deadline_s
        while self.queue.writer.pending:
            try:
                self.queue.claim([])
            except RequestError:
                if time.monotonic() > over_s:
                    raise
                time.sleep(0.1)

    def fetch(self, query: sa.Select[Any]) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.execute(query))

    def row(self, id: int) -> Any:
        """A job's row as it is stored."""
        (found,) = self.fetch(sa.select(schema.job).where(schema.job.c.id == id))
        return found

    def copy(self, id: int, n: int) -> range:
        """Make n jobs like one that is there, in its state; returns their ids."""
        first = self.queue.reserve_ids(n)
        self._copy(id, first - id, 1)
        made = 1
        while made < n:
            k = min(made, n - made, COPIED)
            self._copy(first, made, k)
            made += k
        one = self.row(id)
        mine = sa.and_(schema.tally.c.lane == one.lane, schema.tally.c.state == one.state)
        self.change(sa.update(schema.tally).values(n=schema.tally.c.n + n).where(mine))
        return range(first, first + n)

    def _copy(self, first: int, distance: int, k: int) -> None:
        job = schema.job
        new = {c.name: c for c in job.c} | dict.fromkeys(("id", "ord", "root"), job.c.id + distance)
        rows = sa.select(*new.values()).where(job.c.id.between(first, first + k - 1))
        self.change(sa.insert(job).from_select(list(new), rows, include_defaults=False))

    def change(self, statement: sa.Insert | sa.Update | sa.Delete) -> None:
        """Run a statement as the writer does."""
        value_of(self.queue.writer.run([Act(lambda batch: batch.tx.run(Sql(statement)))])[0])


def statements() -> list[tuple[str, Sql]]:
    """All statements of the store, by their names."""
    files = [one.name for one in iter_modules(folder.__path__)]
    modules = [import_module(f"upq.statements.{name}") for name in files]
    found = [named for module in modules for named in vars(module).items()]
    return [(name, sql) for name, sql in found if isinstance(sql, Sql)]


def wipe(url: str) -> None:
    """Delete all rows of a database that has the tables."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        tables = sa.inspect(connection).get_table_names()
        for table in schema.meta.sorted_tables:
            if table is not schema.version and table.name in tables:
                connection.execute(sa.delete(table))


class Kept(NamedTuple):
    """A database that outlives a test."""

    url: str
    name: str


@pytest.fixture(scope="module", params=["sqlite", "mariadb", "postgres"])
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kept]:
    """One database of each kind for all the tests of a file."""
    if request.param == "sqlite":
        folder = tmp_path_factory.mktemp("store")
        yield Kept(f"sqlite:///{folder}/upq.db", f"SQLite {sqlite3.sqlite_version}")
        return
    given = os.environ.get(
        {"mariadb": "UPQ_TEST_MARIADB_URL", "postgres": "UPQ_TEST_PG_URL"}[request.param]
    )
    server: Server = Server(given) if given else request.getfixturevalue(request.param)
    with server.database() as url:
        yield Kept(url, server.version)


@pytest.fixture
def url(request: pytest.FixtureRequest, database: Kept) -> str:
    """The database's URL; the rows of earlier tests are gone."""
    request.node.user_properties.append(("database", database.name))
    wipe(database.url)
    return database.url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store(url) as opened:
        yield opened
