"""The database: how it is reached, that it is durable, and of the right version.

What is written goes through `writer`; jobs' own tables are reached through `Database.jobs`.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event as sa_event
from sqlalchemy.engine import URL, Connection, Engine, make_url

from upq import log, schema
from upq.errors import AlreadyRunning, DatabaseUnusable, Unavailable

#: Seconds for a connection to be made or found alive, and for a statement to be answered.
CONNECT_S, STATEMENT_S = 5, 10
#: Seconds after which a server ends a transaction of ours in which nothing happens: its client was
#: frozen, or is behind a line that was cut, and holds locks. Ours last some milliseconds.
IDLE_S = 60
#: What finds dead a connection that is not in use: seconds of silence, seconds between two
#: questions, how many of them.
KEEPALIVE_S, KEEPALIVE_STEP_S, KEEPALIVES = 30, 10, 3
SQLITE_MIN = (3, 38, 0)
#: What SQLite says of a file that is damaged, or none of its own.
DAMAGED_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
MARIADB_MIN = (10, 6)
MYSQL_MIN = (8, 0)

#: Held by a connection while it migrates, and gone with it.
MIGRATION_LOCKS = {"postgresql": "pg_advisory_lock(8797)", "mysql": "GET_LOCK('upq', 86400)"}

#: What a read raises when the database is away, ends its connection, or has none left.
AWAY = (
    sa.exc.OperationalError,
    sa.exc.InterfaceError,
    sa.exc.InternalError,
    sa.exc.TimeoutError,
)

#: Statements that a connection to SQLite keeps prepared.
PREPARED = 512
PRAGMAS = {
    "journal_mode": "wal",
    "synchronous": 2,
    "busy_timeout": 5000,
    "foreign_keys": 1,
    "trusted_schema": 0,
    "mmap_size": 0,
}


class Database:
    """The engines of one database URL. `prepare()` comes first; `close()` may be called twice."""

    def __init__(self, url: str, *, durable: bool = True, jobs_file: Path | None = None) -> None:
        self.url = read_url(url)
        self.durable = durable
        self.kind = self.url.get_backend_name().replace("mariadb", "mysql")
        self._lock_fd: int | None = None
        #: On SQLite, the number of the latest event, once it is known; for whoever writes.
        self.last_event: int | None = None
        try:
            self._engine = self._make(self.url, pool_size=1, idle_s=IDLE_S, by_key=True)
            self.readers = self._make(self.url, pool_size=4, idle_s=IDLE_S, readonly=True)
            jobs_url = self.url
            if self.kind == "sqlite":
                self.file = Path(self.url.database or "")
                jobs_url = URL.create("sqlite", database=str(jobs_file or self.file))
            #: For the jobs' own tables; on SQLite a file of its own.
            self.jobs = self._make(jobs_url, pool_size=5)
            for engine in (self._engine, self.readers, self.jobs):
                sa_event.listen(engine, "before_cursor_execute", _log_statement)
        except (ImportError, sa.exc.ArgumentError) as error:
            raise DatabaseUnusable(f"[db] url = {self}: {error}") from error

    def __str__(self) -> str:
        """The URL without its password, wherever that stands."""
        hidden = {k: "***" if "passw" in k.lower() else v for k, v in self.url.query.items()}
        return self.url.set(query=hidden).render_as_string(hide_password=True)

    @property
    def dialect(self) -> sa.Dialect:
        return self._engine.dialect

    def _make(
        self,
        url: URL,
        pool_size: int,
        *,
        readonly: bool = False,
        by_key: bool = False,
        limited: bool = True,
        idle_s: int = 0,
    ) -> Engine:
        """An engine whose connections give up a server that is silent, unless not `limited`."""
        options: dict[str, Any] = {
            "pool_size": pool_size,
            "max_overflow": 4,
            "pool_timeout": CONNECT_S,
        }
        if self.kind == "sqlite":
            args: dict[str, Any] = {
                "check_same_thread": False,
                "timeout": CONNECT_S,
                "isolation_level": None,
                "cached_statements": PREPARED,
            }
            engine = sa.create_engine(url, connect_args=args, poolclass=sa.QueuePool, **options)
            sa_event.listen(engine, "connect", lambda c, _: self._set_pragmas(c, readonly))
            if not readonly:
                # SQLite takes its write lock late: two readers that both go on to write would
                # lose updates or fail, so every transaction says at once that it writes.
                sa_event.listen(
                    engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE") and None
                )
            return engine
        options |= {"pool_pre_ping": True, "isolation_level": "READ COMMITTED"}
        statement_s = STATEMENT_S if limited else 0
        if self.kind == "mysql":
            args = {
                "connect_timeout": CONNECT_S,
                "read_timeout": CONNECT_S,
                "write_timeout": CONNECT_S,
                "charset": "utf8mb4",
            }
            engine = sa.create_engine(url, connect_args=args, **options)
            sa_event.listen(engine, "connect", lambda c, _: _set_mysql(c, idle_s))
            _limit(engine, statement_s, "_read_timeout", "_write_timeout")
            return engine
        if self.kind == "postgresql":
            settings = (
                f"-c statement_timeout={statement_s * 1000}"
                f" -c lock_timeout={statement_s * 500}"
                f" -c synchronous_commit={'on' if self.durable else 'off'}"
            )
            if idle_s:
                settings += f" -c idle_in_transaction_session_timeout={idle_s * 1000}"
            if by_key:
                # The writer finds its rows by key. A plan made while the table was small would
                # read all of it, long after it has grown.
                # The costs that this pretends must not start the compiler, either.
                settings += " -c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off"
                settings += " -c jit=off"
            args = {
                "connect_timeout": CONNECT_S,
                "tcp_user_timeout": STATEMENT_S * 1000,
                "keepalives_idle": KEEPALIVE_S,
                "keepalives_interval": KEEPALIVE_STEP_S,
                "keepalives_count": KEEPALIVES,
                "options": settings,
            }
            engine = sa.create_engine(url, connect_args=args, **options)
            make = _psycopg_connection().connect
            sa_event.listen(engine, "do_connect", lambda d, r, given, kw: make(*given, **kw))
            _limit(engine, statement_s, "limit_s")
            return engine
        raise DatabaseUnusable(f"[db] url = {self}: SQLite, MariaDB/MySQL or PostgreSQL it must be")

    def _set_pragmas(self, connection: Any, readonly: bool) -> None:
        wanted = dict(PRAGMAS) if self.durable else {**PRAGMAS, "synchronous": 1}
        for name, value in wanted.items():
            connection.execute(f"PRAGMA {name}={value}")
            found = connection.execute(f"PRAGMA {name}").fetchone()
            if found and found[0] != value:
                raise DatabaseUnusable(f"{self}: PRAGMA {name} is {found[0]}, not {value}")
        if readonly:
            connection.execute("PRAGMA query_only=ON")

    # Start and end

    def prepare(self) -> None:
        """Lock, connect, verify durability and bring the tables to this version.

        Raises AlreadyRunning, or DatabaseUnusable with advice.
        """
        if self.kind == "sqlite":
            self._lock_file()
        try:
            with self._engine.connect() as connection:
                self._verify(connection)
            self._migrate()
        except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
            cause = getattr(error, "orig", None) or error
            advice = ""
            if getattr(cause, "sqlite_errorcode", None) in DAMAGED_CODES:
                advice = (
                    "; it is left as it is: restore it from a backup, or see what `sqlite3"
                    " FILE .recover` finds"
                )
            raise DatabaseUnusable(f"{self}: {one_line(cause)}{advice}") from error

    def close(self) -> None:
        for engine in (self._engine, self.readers, self.jobs):
            engine.dispose()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _lock_file(self) -> None:
        """Hold `<file>.lock` for life: SQLite serves one daemon."""
        path = f"{self.file}.lock"
        refusal = (
            f"{self.file}: another upq daemon uses this database; SQLite serves one"
            " (several daemons share a MariaDB or PostgreSQL database)"
        )
        try:
            self._lock_fd = hold_file(path, refusal)
        except OSError as error:
            raise DatabaseUnusable(f"{path}: {error.strerror}") from error

    def _verify(self, connection: Connection) -> None:
        def ask(question: str) -> str:
            return str(connection.exec_driver_sql(question).scalar())

        if self.kind == "sqlite":
            if sqlite3.sqlite_version_info < SQLITE_MIN:
                raise DatabaseUnusable(f"SQLite {sqlite3.sqlite_version} is too old: 3.38 or newer")
            return
        if self.kind == "postgresql":
            needed = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
            found = {name: ask(f"SHOW {name}") for name in needed}
        else:
            words = ask("SELECT VERSION()")
            least = MARIADB_MIN if "mariadb" in words.lower() else MYSQL_MIN
            if tuple(int(n) for n in words.split("-")[0].split(".")[:2]) < least:
                raise DatabaseUnusable(
                    f"{self}: {words} is too old: {least[0]}.{least[1]} or newer"
                )
            needed = {"innodb_flush_log_at_trx_commit": "1"}
            if ask("SELECT @@log_bin") == "1":
                # What is not in the log after a crash of the machine, the server undoes.
                needed["sync_binlog"] = "1"
            found = {name: ask(f"SELECT @@{name}") for name in needed}
        weak = [f"{name} = {found[name]}" for name in needed if found[name] != needed[name]]
        if weak and self.durable:
            raise DatabaseUnusable(
                f"{self}: {', '.join(weak)} loses acknowledged jobs in a crash; mend it or set"
                " durability = relaxed in [db]"
            )

    def _migrate(self) -> None:
        """Make the tables, or step an older version up to ours; under a lock, resumable."""
        with self._migrating() as connection:
            found = self._version(connection)
            if self.kind == "mysql":
                is_mariadb = getattr(connection.dialect, "is_mariadb", True)
                schema.collate(schema.MARIADB_COLLATION if is_mariadb else schema.MYSQL_COLLATION)
            if found is None:
                schema.meta.create_all(connection)
                for table in schema.meta.tables.values():
                    for index in table.indexes:
                        # A start that was cut off may have made the table only.
                        index.create(connection, checkfirst=True)
                connection.execute(sa.insert(schema.version).values(version=schema.VERSION))
                connection.commit()
            elif found > schema.VERSION:
                raise DatabaseUnusable(
                    f"{self}: its tables are of version {found}, this upq knows {schema.VERSION};"
                    " install the newer upq again"
                )
            elif found < schema.VERSION:
                # It imports alembic: 180 ms that are seldom due.
                from upq import migrations  # noqa: PLC0415

                migrations.upgrade(connection, found)

    def _version(self, connection: Connection) -> int | None:
        """The version of the tables; None when they are not there, or not all of them yet."""
        if not sa.inspect(connection).has_table(schema.version.name):
            return None
        found = connection.execute(sa.select(schema.version.c.version)).scalar_one_or_none()
        connection.commit()
        return found

    @contextmanager
    def _migrating(self) -> Iterator[Connection]:
        """A connection without time limits that holds the lock on migrations while it is open."""
        if self.kind == "sqlite":
            with self._engine.connect() as connection:
                yield connection
            return
        engine = self._make(self.url, 1, limited=False)
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql(f"SELECT {MIGRATION_LOCKS[self.kind]}")
                connection.commit()
                yield connection
        finally:
            engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection to read from, in any thread. Raises Unavailable, also when none answers."""
        try:
            with self.readers.connect() as connection:
                yield connection
        except AWAY as error:
            cause = one_line(getattr(error, "orig", None) or error)
            raise Unavailable(f"the database cannot be read: {cause}") from error

    def raw(self) -> Any:
        """A connection for the writer, on which it runs the driver's own cursors."""
        return self._engine.raw_connection()

    def quick_check(self) -> str | None:
        """What SQLite finds wrong with the file, or None. Reads all of it."""
        with self.read() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        return None if found == "ok" else str(found)


def hold_file(path: str, refusal: str) -> int:
    """Hold a lock file for life. Raises AlreadyRunning, or OSError when it cannot be opened."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise AlreadyRunning(refusal) from error
    return fd


def read_url(url: str) -> URL:
    """Raises DatabaseUnusable, which does not repeat what may hold a password."""
    # A file's path is taken as it stands: make_url would read `%`, `?` and `#` in it.
    before, _, file = url.partition("sqlite:///")
    if file and not before:
        return URL.create("sqlite", database=file)
    try:
        return make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise DatabaseUnusable(
            "[db] url: this is no URL; it looks like postgresql://user@host/name"
        ) from error


def _log_statement(_: object, cursor: object, statement: str, *more: object) -> None:
    log.statement(statement)


def _limit(engine: Engine, statement_s: int, *names: str) -> None:
    """Have statements answered in time (0: whenever), by what the driver's connections call it.

    While a connection rests in the pool the limit is CONNECT_S: for the question whether it lives.
    """

    def set_to(seconds: int | None, connection: Any) -> None:
        for name in names if connection is not None else ():
            setattr(connection, name, seconds)

    sa_event.listen(engine, "checkout", lambda c, record, fairy: set_to(statement_s or None, c))
    sa_event.listen(engine, "checkin", lambda c, record: set_to(CONNECT_S, c))


def _set_mysql(connection: Any, idle_s: int) -> None:
    sock = connection._sock
    if sock.family != socket.AF_UNIX:
        for option, value in (
            (socket.TCP_KEEPIDLE, KEEPALIVE_S),
            (socket.TCP_KEEPINTVL, KEEPALIVE_STEP_S),
            (socket.TCP_KEEPCNT, KEEPALIVES),
            (socket.TCP_USER_TIMEOUT, STATEMENT_S * 1000),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    settings = "SET SESSION innodb_lock_wait_timeout = 5, SESSION sql_mode = 'TRADITIONAL'"
    if idle_s:
        # A comment for MySQL, which has no such limit.
        settings += f" /*M! , SESSION idle_transaction_timeout = {idle_s} */"
    with connection.cursor() as cursor:
        cursor.execute(settings)


@cache
def _psycopg_connection() -> Any:
    """The class of connections that give up a server which does not answer within `limit_s`.

    psycopg itself would wait for ever: its time limits are the server's.
    """
    # An extra, for PostgreSQL only.
    import psycopg  # noqa: PLC0415
    from psycopg.waiting import Ready, Wait  # noqa: PLC0415

    class Connection(psycopg.Connection[Any]):
        limit_s: float | None = CONNECT_S

        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs:
                # It says itself how long, as `notifies()` does, which may listen for ever.
                return super().wait(gen, *args, **kwargs)
            over_s = None if self.limit_s is None else time.monotonic() + self.limit_s
            try:
                wanted = next(gen)
                while True:
                    wanted = gen.send(self._until_ready(wanted, over_s))
            except StopIteration as end:
                return end.value

        def _until_ready(self, wanted: int, over_s: float | None) -> int:
            events = (wanted & Wait.R and select.POLLIN) | (wanted & Wait.W and select.POLLOUT)
            poll = select.poll()
            poll.register(self.pgconn.socket, events)
            # What has come is taken, however late: it may be we who were frozen.
            left_s = None if over_s is None else max(over_s - time.monotonic(), 0)
            for _, event in poll.poll(left_s and left_s * 1000):
                readable, writable = event & ~select.POLLOUT, event & select.POLLOUT
                return (readable and Ready.R) | (writable and Ready.W)
            self.close()
            raise psycopg.OperationalError(f"the server has not answered for {self.limit_s} s")

    return Connection


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
