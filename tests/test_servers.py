"""The servers of the tests are durable, can be killed, and die with who started them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.exc import OperationalError

from tests.conftest import unavailable
from tests.servers import MariaDB, Missing, Postgres, PrivateServer, Server, open_pidfds, program

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["mariadb", "postgres"])
def server(request: pytest.FixtureRequest) -> Iterator[PrivateServer]:
    server: PrivateServer = request.getfixturevalue(request.param)
    server.start()
    yield server
    server.start()


@pytest.fixture
def fresh(server: PrivateServer) -> Iterator[Server]:
    """A new database of that server, to run statements in."""
    with server.database() as url:
        yield Server(url)


def test_postgres_is_durable(postgres: Postgres) -> None:
    for setting in "fsync", "full_page_writes", "synchronous_commit":
        assert postgres.execute(f"SHOW {setting}") == [("on",)]


def test_mariadb_is_durable(mariadb: MariaDB) -> None:
    assert mariadb.execute("SELECT @@innodb_flush_log_at_trx_commit") == [(1,)]


def test_a_setting_given_by_name_wins() -> None:
    with Postgres(fsync="off") as postgres:
        assert postgres.execute("SHOW fsync") == [("off",)]


def test_only_its_owner_reaches_it(server: PrivateServer) -> None:
    assert server.folder.stat().st_mode & 0o077 == 0


def test_what_was_committed_is_there_after_kill_9(server: PrivateServer, fresh: Server) -> None:
    fresh.execute("CREATE TABLE t (n integer)")
    fresh.execute("INSERT INTO t VALUES (7)")
    server.kill9()
    assert server.pids() == []
    with pytest.raises(OperationalError):
        fresh.execute("SELECT 1")
    server.start()
    assert fresh.execute("SELECT n FROM t") == [(7,)]


def test_stop_cuts_off_clients_and_restart_makes_it_answer(server: PrivateServer) -> None:
    with create_engine(server.url("")).connect() as client:
        server.stop()
        with pytest.raises(OperationalError):
            client.exec_driver_sql("SELECT 1")
        with pytest.raises(OperationalError):
            server.execute("SELECT 1")
    server.restart()
    assert server.execute("SELECT 1") == [(1,)]


def test_a_paused_server_does_not_answer_until_resumed(server: PrivateServer) -> None:
    code = "import sys; from tests.servers import Server; Server(sys.argv[1]).execute('SELECT 1')"
    server.pause()
    client = subprocess.Popen([sys.executable, "-c", code, server.url("")], cwd=ROOT)
    with pytest.raises(subprocess.TimeoutExpired):
        client.wait(1)
    server.resume()
    assert client.wait(30) == 0


def test_drop_does_not_wait_for_a_client_in_a_transaction(server: PrivateServer) -> None:
    with server.database() as url:
        client = create_engine(url).connect()
        client.exec_driver_sql("CREATE TABLE t (n integer)")
        client.exec_driver_sql("SELECT * FROM t")
    client.invalidate()
    assert make_url(url).database not in {name for (name,) in databases(server)}


def databases(server: Server) -> list[tuple[str]]:
    mariadb = isinstance(server, MariaDB)
    return server.execute("SHOW DATABASES" if mariadb else "SELECT datname FROM pg_database")


@pytest.mark.parametrize("turn", ["first", "second"])
def test_each_url_is_an_empty_database(url: str, turn: str) -> None:
    engine = create_engine(url)
    assert inspect(engine).get_table_names() == []
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE left_over (n integer)")
    engine.dispose()


@pytest.mark.parametrize("state", ["running", "paused"])
def test_a_server_dies_with_a_killed_test_process(server: PrivateServer, state: str) -> None:
    code = f"""
from tests.servers import {type(server).__name__}
server = {type(server).__name__}()
server.start()
{"server.pause()" if state == "paused" else ""}
print(server.folder, *server.pids(), flush=True)
input()
"""
    tests = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert tests.stdout is not None
    folder, *pids = tests.stdout.readline().split()
    ends = open_pidfds(map(int, pids))
    assert ends
    tests.kill()
    tests.communicate()
    for end in ends:
        assert select.select([end], [], [], 30)[0], "a process of the server lives on"
        os.close(end)
    deadline = time.monotonic() + 30
    while Path(folder).exists():
        assert time.monotonic() < deadline, "the folder of the server is still there"
        time.sleep(0.02)


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(Missing, match=r"no program no-such-server .*apt-get install some-package"):
        program("no-such-server", "some-package")


def test_what_is_missing_is_a_skip_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no server"):
        unavailable("no server")


def test_what_is_missing_is_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no server"):
        unavailable("no server")
