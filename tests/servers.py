"""Database servers for tests and figures: a private PostgreSQL and MariaDB, both durable.

Each listens on a UNIX socket in a folder of its own under /tmp, and is gone with the process that
started it, however that one ends. A server that is already on the machine is never touched.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from sqlalchemy import NullPool, create_engine, make_url
from sqlalchemy.exc import OperationalError

#: Where Debian keeps server programs, besides $PATH; the newest version first.
PROGRAM_FOLDERS = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))[::-1]), "/usr/sbin"]

#: Waits until its standard input ends, that is until we have closed it or died; then ends all that
#: works in the folder, as every process of a server does, and removes the folder. Before it kills,
#: it asks: a PostgreSQL that is killed leaves a segment of shared memory behind.
UNDERTAKER = """
pids() {
    for process in /proc/[0-9]*; do
        case $(readlink "$process/cwd") in "$folder"*) echo "${process#/proc/}";; esac
    done
}
folder=$1
cat
met=$(pids)
kill -QUIT $met
kill -CONT $met
[ "$met" ] && sleep 1
kill -KILL $(pids)
rm -rf "$folder"
"""


class Missing(Exception):
    """A server program is not installed."""


def program(name: str, package: str) -> str:
    """The path of a server program. Raises Missing."""
    path = os.pathsep.join([*PROGRAM_FOLDERS, os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise Missing(f"no program {name} (Debian: apt-get install {package})")
    return found


def free_port() -> int:
    """A port of loopback that nobody listens on, and that no connection is given as its own end."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)  # below those that the kernel gives
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def short_folder() -> Path:
    """A new folder whose path leaves room for the name of a UNIX socket."""
    return Path(tempfile.mkdtemp(prefix="upq-", dir="/tmp"))


def open_pidfds(pids: Iterable[int]) -> list[int]:
    """A descriptor for each of these processes that still lives; it is readable when that ends."""
    opened = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            opened.append(os.pidfd_open(pid))
    return opened


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to each of these processes that still lives."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_stopped(pid: int) -> bool:
    """Whether none of its threads runs: a signal takes its time to reach them all."""
    with contextlib.suppress(OSError):  # one has ended meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            if (thread / "stat").read_text().rpartition(")")[2].split()[0] not in "TtZX":
                return False
    return True


class Server:
    """A database server that somebody else runs; `url` names any database of it."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)

    def start(self) -> None:
        """Nothing to start: it answers, or the first statement says why not."""

    def url(self, database: str) -> str:
        return self._url.set(database=database).render_as_string(hide_password=False)

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run one statement as the server's owner, on a new connection, without a transaction."""
        engine = create_engine(self._url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.exec_driver_sql(statement)
            return [tuple(row) for row in result] if result.returns_rows else []

    @cached_property
    def version(self) -> str:
        return str(self.execute("SELECT version()")[0][0]).split(" on ")[0]

    def create_database(self, name: str) -> None:
        self.execute(f"CREATE DATABASE {name}")

    def drop_database(self, name: str) -> None:
        """Drop it, whoever is still connected to it."""
        if self._url.get_backend_name() == "postgresql":
            self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            return
        users = f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"
        for (connection,) in self.execute(users):
            with contextlib.suppress(OperationalError):  # it has left by itself
                self.execute(f"KILL {connection}")
        self.execute(f"DROP DATABASE IF EXISTS {name}")

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new, empty database; it is dropped in the end, also when the server died."""
        name = f"upq_test_{secrets.token_hex(4)}"
        self.start()
        self.create_database(name)
        try:
            yield self.url(name)
        finally:
            self.start()
            self.drop_database(name)


class PrivateServer(Server):
    """A server of our own, in a folder of its own. As a context manager: started, and then gone.

    Settings given by name win over SETTINGS, as in `Postgres(fsync="off")`.
    """

    #: What the server is told at every start.
    SETTINGS: ClassVar[Mapping[str, str]]
    #: Accounts to run as when we are root, which both servers refuse to be; the first that exists.
    ACCOUNTS: ClassVar[tuple[str, ...]]
    #: The signal that ends it in good order, without waiting for its clients.
    STOP: ClassVar[signal.Signals]

    def __init__(self, **settings: str) -> None:
        self.settings = {**self.SETTINGS, **settings}
        self._find_programs()
        self.folder = short_folder()
        super().__init__(self._own_url())
        self._server: subprocess.Popen[bytes] | None = None
        self._undertaker = subprocess.Popen(
            ["sh", "-c", UNDERTAKER, "undertaker", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # out of the reach of Ctrl-C
        )
        if os.geteuid() == 0:
            shutil.chown(self.folder, self._account.pw_uid, self._account.pw_gid)
        with self._spawn(self._install_command()) as installation:
            if installation.wait():
                raise RuntimeError(self._log_tail())

    def _find_programs(self) -> None:
        """Look up what the commands below need. Raises Missing."""
        raise NotImplementedError

    def _own_url(self) -> str:
        raise NotImplementedError

    def _install_command(self) -> list[str]:
        raise NotImplementedError

    def _server_command(self) -> list[str]:
        raise NotImplementedError

    @property
    def pid(self) -> int | None:
        """The process id of the server while it runs."""
        return self._server.pid if self._server and self._server.poll() is None else None

    def start(self) -> None:
        """Make it run and answer, whatever it did before: stopped, killed, paused or running."""
        if self.pid is None:
            self._server = self._spawn(self._server_command())
        else:
            self.resume()
        deadline = time.monotonic() + 30
        while True:
            try:
                self.execute("SELECT 1")
                return
            except OperationalError as error:
                if self.pid is None or time.monotonic() > deadline:
                    raise RuntimeError(self._log_tail()) from error
                time.sleep(0.02)

    def stop(self) -> None:
        """End it in good order; its clients are cut off."""
        if self._server:
            self.resume()
            self._server.send_signal(self.STOP)
            self._server.wait(30)

    def kill9(self) -> None:
        """End it as a power cut would, and wait until nothing of it is left."""
        self.pause()  # it starts no child while we count them
        pids = self.pids()
        ends = open_pidfds(pids)
        send(pids, signal.SIGKILL)
        for end in ends:
            if not select.select([end], [], [], 30)[0]:
                raise TimeoutError("a killed process lives on")
            os.close(end)
        if self._server:
            self._server.wait(30)

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        if self._server:
            self._server.send_signal(signal.SIGSTOP)
        send(self.pids(), signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while not all(map(is_stopped, self.pids())) and time.monotonic() < deadline:
            time.sleep(0.001)

    def resume(self) -> None:
        send(self.pids(), signal.SIGCONT)

    def close(self) -> None:
        """End it and remove its folder. It cannot be started again."""
        assert self._undertaker.stdin is not None
        try:
            self.stop()
        finally:
            self._undertaker.stdin.close()
            self._undertaker.wait(30)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _account(self) -> pwd.struct_passwd:
        known = {entry.pw_name: entry for entry in pwd.getpwall()}
        return next(known[name] for name in self.ACCOUNTS if name in known)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        other: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = self._account
            other = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **other,
            )

    def pids(self) -> list[int]:
        """Its processes, known by the folder they work in: PostgreSQL's are no process group."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is somebody else's
                if (process / "cwd").readlink().is_relative_to(self.folder):
                    found.append(int(process.name))
        return found

    def _log_tail(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]


class Postgres(PrivateServer):
    SETTINGS: ClassVar[Mapping[str, str]] = {
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "listen_addresses": "",
        "max_connections": "100",
        "shared_buffers": "64MB",
    }
    ACCOUNTS = ("postgres", "nobody")
    STOP = signal.SIGINT

    def _find_programs(self) -> None:
        self._initdb = program("initdb", "postgresql")
        self._postgres = program("postgres", "postgresql")

    def _own_url(self) -> str:
        return f"postgresql+psycopg://postgres@/postgres?host={self.folder}"

    def _install_command(self) -> list[str]:
        return [
            *(self._initdb, "--no-sync", "--username=postgres", "--auth=trust"),
            *("--encoding=UTF8", "--locale=C", f"--pgdata={self.folder}/data"),
        ]

    def _server_command(self) -> list[str]:
        settings = {**self.settings, "unix_socket_directories": str(self.folder)}
        return [
            *(self._postgres, "-D", f"{self.folder}/data"),
            *(f"--{name}={value}" for name, value in settings.items()),
        ]

    def kill9(self) -> None:
        super().kill9()
        # They name the dead one: another process with that number would keep it from starting.
        for left in "data/postmaster.pid", ".s.PGSQL.5432.lock":
            (self.folder / left).unlink(missing_ok=True)


class MariaDB(PrivateServer):
    SETTINGS: ClassVar[Mapping[str, str]] = {
        "innodb_flush_log_at_trx_commit": "1",
        "innodb_buffer_pool_size": "64M",
        "max_connections": "100",
        "skip_name_resolve": "ON",
        "skip_networking": "ON",
        # As Debian configures it; what is compiled in is latin1.
        "character_set_server": "utf8mb4",
        "collation_server": "utf8mb4_general_ci",
    }
    ACCOUNTS = ("mysql", "nobody")
    STOP = signal.SIGTERM

    def _find_programs(self) -> None:
        self._install_db = program("mariadb-install-db", "mariadb-server-core mariadb-client-core")
        self._mariadbd = program("mariadbd", "mariadb-server-core")

    def _own_url(self) -> str:
        return f"mysql+pymysql://root@localhost/mysql?unix_socket={self.folder}/socket"

    def _install_command(self) -> list[str]:
        return [
            *(self._install_db, "--no-defaults", "--auth-root-authentication-method=normal"),
            *("--skip-test-db", "--skip-name-resolve", f"--datadir={self.folder}/data"),
            f"--tmpdir={self.folder}",  # a server that starts removes what others have in /tmp
        ]

    def _server_command(self) -> list[str]:
        # Its temporary tables lie in its own folder, too: two servers must not share them in /tmp.
        files = {
            "datadir": f"{self.folder}/data",
            "tmpdir": str(self.folder),
            "socket": f"{self.folder}/socket",
        }
        settings = {**self.settings, **files, "pid_file": f"{self.folder}/mariadbd.pid"}
        return [
            *(self._mariadbd, "--no-defaults"),
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
