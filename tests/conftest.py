"""What every test may ask for: a fresh database of each kind, its server, a short path."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest
from hypothesis import settings

from tests.servers import MariaDB, Missing, Postgres, PrivateServer, Server, short_folder

# How long an example takes is up to the machine. All else stays as it is, in CI and elsewhere.
settings.register_profile("upq", deadline=None)
settings.load_profile("upq")

S = TypeVar("S", bound=PrivateServer)

#: Servers of the user's own, for the `url` fixture.
GIVEN = {"mariadb": "UPQ_TEST_MARIADB_URL", "postgres": "UPQ_TEST_PG_URL"}


def unavailable(reason: str) -> NoReturn:
    """What a test needs cannot be had: a skip at home, a failure in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def private(kind: type[S]) -> Iterator[S]:
    try:
        server = kind()
    except Missing as missing:
        unavailable(str(missing))
    with server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A private PostgreSQL. A test may leave it stopped: `database()` and `url` start it again."""
    yield from private(Postgres)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    """A private MariaDB, on the same terms."""
    yield from private(MariaDB)


@pytest.fixture(params=["sqlite", "mariadb", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The SQLAlchemy URL of a fresh, empty database: the test runs once for each kind."""
    kind = request.param
    if kind == "sqlite":
        note_database(request, f"SQLite {sqlite3.sqlite_version}")
        yield f"sqlite:///{tmp_path}/upq.db"
        return
    given = os.environ.get(GIVEN[kind])
    server: Server = Server(given) if given else request.getfixturevalue(kind)
    with server.database() as fresh:
        note_database(request, server.version)
        yield fresh


def note_database(request: pytest.FixtureRequest, name: str) -> None:
    request.node.user_properties.append(("database", name))


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder with a path short enough for UNIX sockets, as tmp_path's is not."""
    folder = short_folder()
    yield folder
    shutil.rmtree(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell which databases the tests really met."""
    tests = Counter(
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "database"
    )
    if tests:
        terminalreporter.section("databases")
        for name, count in sorted(tests.items()):
            terminalreporter.line(f"{name}: {count} tests")
