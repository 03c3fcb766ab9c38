from __future__ import annotations

import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.conftest import unavailable
from tests.proxy import Proxy
from tests.servers import MariaDB, Missing, Postgres, PrivateServer, Server
from upq import db, schema
from upq.db import Database
from upq.errors import AlreadyRunning, DatabaseUnusable, StartError, Unavailable

ROOT = Path(__file__).parent.parent
SECRET = "Pa55-w.rd"


@contextmanager
def prepared(url: str, **options: bool) -> Iterator[Database]:
    database = Database(url, **options)
    try:
        database.prepare()
        yield database
    finally:
        database.close()


def refusal(url: str) -> StartError:
    """What a start on the database is refused with."""
    with pytest.raises(StartError) as refused, prepared(url):
        pass
    return refused.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "upq.db"


# Durable


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_postgres_that_may_lose_jobs_is_refused(postgres: Postgres, setting: str) -> None:
    with postgres.database() as url, changed(postgres, setting):
        assert f"{setting} = off" in str(refusal(url))
        with prepared(url, durable=False):
            pass


@contextmanager
def changed(postgres: Postgres, setting: str) -> Iterator[None]:
    # The command line wins over ALTER SYSTEM: the server is started anew.
    kept = postgres.settings.pop(setting)
    postgres.settings[setting] = "off"
    postgres.restart()
    try:
        yield
    finally:
        postgres.settings[setting] = kept
        postgres.restart()


def test_a_mariadb_that_may_lose_jobs_is_refused(mariadb: MariaDB) -> None:
    setting = "innodb_flush_log_at_trx_commit"
    with mariadb.database() as url:
        mariadb.execute(f"SET GLOBAL {setting} = 2")
        try:
            assert f"{setting} = 2" in str(refusal(url))
            with prepared(url, durable=False):
                pass
        finally:
            mariadb.execute(f"SET GLOBAL {setting} = 1")


def test_a_mariadb_whose_binary_log_may_be_behind_is_refused() -> None:
    """What it does not find there after a crash of the machine, it undoes."""
    try:
        server = MariaDB(log_bin="binlog")
    except Missing as missing:
        unavailable(str(missing))
    with server, server.database() as url:
        assert "sync_binlog = 0 loses acknowledged jobs" in str(refusal(url))
        server.execute("SET GLOBAL sync_binlog = 1")
        with prepared(url):
            pass


def test_the_daemon_commits_durably_where_the_database_default_says_not(
    postgres: Postgres,
) -> None:
    with postgres.database() as url:
        name = sa.make_url(url).database
        postgres.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
        with prepared(url) as database:
            raw = database.raw()
            cursor = raw.cursor()
            cursor.execute("SHOW synchronous_commit")
            assert cursor.fetchone() == ("on",)
            raw.close()


def test_every_connection_to_sqlite_is_durable(file: Path) -> None:
    with prepared(f"sqlite:///{file}") as database:
        for engine in (database.readers, database.jobs, database._engine):
            with engine.connect() as connection:
                found = {
                    name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                    for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
                }
            assert found == {
                "journal_mode": "wal", "synchronous": 2, "busy_timeout": 5000, "foreign_keys": 1,
            }  # fmt: skip


def test_a_pragma_that_does_not_take_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(db.PRAGMAS, "journal_mode", "nonsense")
    assert "PRAGMA journal_mode is delete" in str(refusal(f"sqlite:///{file}"))


@pytest.mark.parametrize("least", ["SQLITE_MIN", "MARIADB_MIN"])
def test_an_old_version_is_refused(
    request: pytest.FixtureRequest, file: Path, monkeypatch: pytest.MonkeyPatch, least: str
) -> None:
    monkeypatch.setattr(db, least, (99, 0))
    if least == "SQLITE_MIN":
        assert "too old" in str(refusal(f"sqlite:///{file}"))
        return
    server: Server = request.getfixturevalue("mariadb")
    with server.database() as url:
        assert "too old: 99.0 or newer" in str(refusal(url))


# Locked


def test_a_second_daemon_on_a_sqlite_file_is_refused_at_once(file: Path) -> None:
    with prepared(f"sqlite:///{file}"):
        began = time.monotonic()
        error = refusal(f"sqlite:///{file}")
        assert time.monotonic() - began < 2
        assert isinstance(error, AlreadyRunning)
        assert error.exit_status == 75
    with prepared(f"sqlite:///{file}"):
        pass


def test_two_daemons_that_make_the_tables_at_once_both_start(url: str) -> None:
    if url.startswith("sqlite"):
        pytest.skip("SQLite serves one daemon")
    failed: list[BaseException] = []

    def start() -> None:
        try:
            with prepared(url):
                pass
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    with prepared(url) as database, database.read() as connection:
        assert connection.execute(sa.select(schema.version)).all() == [(schema.VERSION,)]


@pytest.mark.parametrize("kind", ["mariadb", "postgres"])
def test_a_start_waits_for_another_that_migrates_longer_than_a_statement_may_take(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(db, "STATEMENT_S", 1)
    server: Server = request.getfixturevalue(kind)
    with server.database() as url:
        other = Database(url)
        with other._migrating():
            started: list[StartError | None] = []
            thread = threading.Thread(target=lambda: started.append(try_to_start(url)))
            thread.start()
            thread.join(2)
            assert started == []
        thread.join(20)
        other.close()
        assert started == [None]


def try_to_start(url: str) -> StartError | None:
    try:
        with prepared(url):
            return None
    except StartError as error:
        return error


# Reached


@pytest.mark.parametrize(
    "url",
    [
        "oracle://somewhere/upq",
        "nonsense",
        "",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "mysql+nosuchdriver://u:{secret}@localhost/upq",
        "postgresql+psycopg://u:{secret}@localhost:notaport/upq",
        "postgresql+psycopg://u:{secret}@127.0.0.1:1/upq",
        "mysql+pymysql://u:{secret}@127.0.0.1:1/upq",
        "postgresql+psycopg://u@127.0.0.1:1/upq?password={secret}",
        "mysql+pymysql://u@127.0.0.1:1/upq?password={secret}",
        "mysql+pymysql://u:{secret}/x@127.0.0.1:1/upq",
        "sqlite:////no/such/folder/upq.db",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(
    url: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    error = refusal(url.format(secret=SECRET))
    assert isinstance(error, DatabaseUnusable)
    assert error.exit_status == 69
    assert SECRET not in str(error)
    assert SECRET not in repr(error)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("fault", ["password", "database"])
@pytest.mark.parametrize("kind", ["mariadb", "postgres"])
def test_what_the_server_refuses_is_told_without_the_password(
    request: pytest.FixtureRequest, kind: str, fault: str
) -> None:
    server: Server = request.getfixturevalue(kind)
    url = sa.make_url(server.url("no_such_database"))
    if fault == "password":
        url = sa.make_url(server.url("postgres" if kind == "postgres" else "mysql"))
        url = url.set(username="nobody")
    error = refusal(url.set(password=SECRET).render_as_string(hide_password=False))
    assert ("nobody" if fault == "password" else "no_such_database") in str(error)
    assert SECRET not in str(error)


def test_a_password_is_hidden_in_the_name_of_the_database() -> None:
    assert SECRET not in str(Database(f"postgresql+psycopg://u:{SECRET}@h/d"))


@pytest.mark.parametrize("name", ["a b", "ü", "100%", "what?", "a#b", "%20", "x&y=z"])
def test_a_sqlite_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    with prepared(f"sqlite:///{tmp_path}/{name}.db"):
        assert (tmp_path / f"{name}.db").exists()


@pytest.mark.parametrize(
    "content", [b"this is no database, " * 500, b"SQLite format 3\0" + b"x" * 9000]
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    found = refusal(f"sqlite:///{file}")
    assert isinstance(found, DatabaseUnusable)
    assert "is left as it is: restore it from a backup" in str(found)
    assert file.read_bytes() == content


def test_reading_while_the_server_is_away_is_unavailable(postgres: Postgres) -> None:
    with postgres.database() as url, prepared(url) as database:

        def read() -> None:
            with database.read() as connection:
                connection.execute(sa.select(schema.version))

        read()
        postgres.stop()
        with pytest.raises(Unavailable):
            read()
        postgres.start()
        read()


# Silent


@pytest.fixture(params=["mariadb", "postgres"])
def server(request: pytest.FixtureRequest) -> Iterator[PrivateServer]:
    found: PrivateServer = request.getfixturevalue(request.param)
    yield found
    found.resume()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits short enough to be met."""
    monkeypatch.setattr(db, "CONNECT_S", 2)  # psycopg takes no less
    monkeypatch.setattr(db, "STATEMENT_S", 4)
    monkeypatch.setattr(db, "IDLE_S", 1)


def read(database: Database) -> None:
    with database.read() as connection:
        connection.execute(sa.select(schema.version))


@contextmanager
def unavailable_within(seconds: float) -> Iterator[None]:
    began_s = time.monotonic()
    with pytest.raises(Unavailable, match="cannot be read: "):
        yield
    assert time.monotonic() - began_s < seconds


@pytest.mark.alone
@pytest.mark.usefixtures("hasty")
@pytest.mark.timeout(60)
def test_a_read_is_over_in_time_when_the_server_hangs_and_goes_on_at_once_after(
    server: PrivateServer,
) -> None:
    with server.database() as url, prepared(url) as database:
        with unavailable_within(5.5), database.read() as connection:  # the statement waits
            connection.execute(sa.select(schema.version))
            server.pause()
            connection.execute(sa.select(schema.version))
        with unavailable_within(3.5):  # there is no connection to be had
            read(database)
        server.resume()
        with ThreadPoolExecutor() as pool:
            list(pool.map(read, [database] * 4))
        server.pause()
        with unavailable_within(5.5):  # a connection that has rested, and then no other one
            read(database)
        server.resume()
        began_s = time.monotonic()
        read(database)
        assert time.monotonic() - began_s < 1.5


@pytest.mark.usefixtures("hasty")
@pytest.mark.timeout(60)
def test_however_many_read_when_the_server_hangs_all_are_told_in_time(
    server: PrivateServer,
) -> None:
    with server.database() as url, prepared(url) as database:
        read(database)
        server.pause()

        def fail(_: int) -> None:
            with unavailable_within(15):  # in turn, they would take 25 s
                read(database)

        with ThreadPoolExecutor(100) as pool:
            list(pool.map(fail, range(100)))
        server.resume()
        with ThreadPoolExecutor(30) as pool:
            list(pool.map(read, [database] * 30))


@pytest.mark.usefixtures("hasty")
@pytest.mark.timeout(60)
def test_a_connection_that_is_dead_without_a_word_is_replaced(
    server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "STATEMENT_S", 30)
    with server.database() as url, Proxy(server) as proxy, prepared(proxy.url(url)) as database:
        read(database)
        proxy.lose()
        began_s = time.monotonic()
        read(database)
        assert time.monotonic() - began_s < 20


def test_a_dead_line_is_noticed_by_the_system_too(server: PrivateServer) -> None:
    wanted = {
        socket.TCP_KEEPIDLE: 30,
        socket.TCP_KEEPINTVL: 10,
        socket.TCP_KEEPCNT: 3,
        socket.TCP_USER_TIMEOUT: 10_000,
    }
    with server.database() as url, Proxy(server) as proxy, prepared(proxy.url(url)) as database:
        for engine in (database.readers, database.jobs, database._engine):
            with engine.connect() as connection:
                made: Any = connection.connection.dbapi_connection
                fd = made._sock.fileno() if isinstance(server, MariaDB) else made.fileno()
                with socket.socket(fileno=os.dup(fd)) as sock:
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                    assert {n: sock.getsockopt(socket.IPPROTO_TCP, n) for n in wanted} == wanted


FROZEN = """
import sys
from upq import db
db.STATEMENT_S = 1
database = db.Database(sys.argv[1])
with database.read() as connection:
    print("asks", flush=True)
    print(connection.exec_driver_sql(sys.argv[2]).scalar(), flush=True)
"""


def test_an_answer_that_came_while_we_were_frozen_is_taken(server: PrivateServer) -> None:
    sleep = "SELECT sleep(0.5)" if isinstance(server, MariaDB) else "SELECT 0 FROM pg_sleep(0.5)"
    with server.database() as url:
        command = [sys.executable, "-c", FROZEN, url, sleep]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "asks\n"
            time.sleep(0.2)
            reader.send_signal(signal.SIGSTOP)
            time.sleep(2)
            reader.send_signal(signal.SIGCONT)
            assert reader.communicate(timeout=20)[0] == "0\n"
            assert reader.wait(20) == 0


@pytest.mark.usefixtures("hasty")
def test_a_read_that_rested_too_long_is_unavailable_and_jobs_may_rest(
    server: PrivateServer,
) -> None:
    with server.database() as url, prepared(url) as database, database.jobs.connect() as job:
        job.execute(sa.select(schema.version))
        with unavailable_within(5), database.read() as connection:
            connection.execute(sa.select(schema.version))
            time.sleep(2)
            connection.execute(sa.select(schema.version))
        read(database)
        job.execute(sa.select(schema.version))


def test_a_job_may_listen_as_long_as_it_likes(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "STATEMENT_S", 1)
    with postgres.database() as url, prepared(url) as database, database.jobs.connect() as job:
        listener: Any = job.connection.dbapi_connection
        job.exec_driver_sql("LISTEN news")
        job.commit()
        began_s = time.monotonic()
        assert list(listener.notifies(timeout=1.5)) == []
        assert 1.4 < time.monotonic() - began_s < 3


# Files


def test_readers_cannot_write_to_sqlite(file: Path) -> None:
    with (
        prepared(f"sqlite:///{file}") as database,
        pytest.raises(Unavailable, match="readonly"),
        database.read() as connection,
    ):
        connection.execute(sa.delete(schema.version))


def test_jobs_have_a_sqlite_file_of_their_own(file: Path, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{file}", jobs_file=tmp_path / "jobs.db")
    with database.jobs.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE mine (n INTEGER)")
    database.close()
    assert (tmp_path / "jobs.db").exists()
    assert not file.exists()


def test_jobs_that_write_at_once_lose_nothing(file: Path, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{file}", jobs_file=tmp_path / "jobs.db")
    with database.jobs.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE mine (n INTEGER)")
        connection.exec_driver_sql("INSERT INTO mine VALUES (0)")

    def count() -> None:
        for _ in range(20):
            with database.jobs.begin() as connection:
                n = connection.exec_driver_sql("SELECT n FROM mine").scalar_one()
                connection.exec_driver_sql(f"UPDATE mine SET n = {n + 1}")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with database.jobs.connect() as connection:
        assert connection.exec_driver_sql("SELECT n FROM mine").scalar_one() == 80
    database.close()


def test_quick_check_finds_a_damaged_page(file: Path) -> None:
    with prepared(f"sqlite:///{file}") as database:
        assert database.quick_check() is None
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE t (n)")
        connection.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 200)
    connection.close()
    with file.open("r+b") as raw:
        raw.seek(-8 * 4096, 2)
        raw.write(b"\xff" * 4096)
    with prepared(f"sqlite:///{file}") as database:
        assert database.quick_check()


def test_close_may_be_called_twice_or_first(url: str) -> None:
    database = Database(url)
    database.close()
    with prepared(url) as database:
        pass
    database.close()
