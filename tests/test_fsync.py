"""An ACK is sent after its job is on disk: seen with strace, and asked of the servers."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import chaos
from tests.conftest import unavailable
from tests.servers import Postgres, PrivateServer, short_folder
from upq.db import Database

#: What strace is told: whole pages are shown, since a row may stand anywhere in one.
STRACE = (
    *("strace", "-f", "--seccomp-bpf", "-y", "-s", "4096"),
    *("-e", "trace=fdatasync,fsync,write,pwrite64,sendto,sendmsg"),
)
LINE = re.compile(r"(\d+) +(.*)")
#: A call on a file or socket, as far as its arguments tell.
CALL = re.compile(r"(\w+)\(\d+<([^>]*)>(.*)")
RESUMED = re.compile(r"<\.\.\. (\w+) resumed>")


@dataclass
class Trace:
    """What matters of a trace, as numbers of its lines: calls begin and end at one."""

    #: By the marker of the job: the first write to the log of SQLite that holds it.
    written: dict[str, int] = field(default_factory=dict)
    #: By the id of the job: the first send of its ACK.
    acked: dict[int, int] = field(default_factory=dict)
    #: Begin and end of each sync of the log that succeeded.
    synced: list[tuple[int, int]] = field(default_factory=list)


def read_trace(lines: Iterable[str]) -> Trace:
    trace = Trace()
    unfinished: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines):
        found = LINE.match(line)
        if not found:
            continue
        thread, text = found.groups()
        begin = number
        if RESUMED.match(text):
            begin, start = unfinished.pop(thread, (number, ""))
            text = start + text
        elif text.endswith("<unfinished ...>"):
            unfinished[thread] = (number, text)
            note_send(trace, number, text)
            continue
        note(trace, begin, number, text)
    return trace


def note(trace: Trace, begin: int, end: int, text: str) -> None:
    call = CALL.match(text)
    if not call:
        return
    name, file, rest = call.groups()
    if name in ("fdatasync", "fsync") and file.endswith("-wal") and rest.endswith("= 0"):
        trace.synced.append((begin, end))
    elif name == "pwrite64" and file.endswith("-wal"):
        for marker in re.findall(r"mark\d+x", rest):
            trace.written.setdefault(marker, end)
    note_send(trace, begin, text)


def note_send(trace: Trace, begin: int, text: str) -> None:
    """An ACK may be with the client as soon as its send has begun."""
    if text.startswith(("sendto", "sendmsg")):
        for id in re.findall(r"ACK (\d+)", text):
            trace.acked.setdefault(int(id), begin)


def violations(trace: Trace, markers: dict[int, str]) -> list[str]:
    """ACKs sent before the log was synced with their job in it."""
    found = []
    for id, marker in markers.items():
        written, acked = trace.written[marker], trace.acked[id]
        if not any(written < begin and end < acked for begin, end in trace.synced):
            found.append(f"job {id} written at {written}, ACK at {acked}")
    return found


def submit_all(path: Path, clients: int, n: int) -> dict[int, str]:
    """Clients that each wait for each ACK; the marker of each job by its id."""
    markers: dict[int, str] = {}
    left = iter(range(n))
    waits: dict[socket.socket, str] = {}
    with contextlib.ExitStack() as stack:

        def send(sock: socket.socket) -> None:
            for number in left:
                waits[sock] = f"mark{number}x"
                sock.sendall(f"ledger n:{waits[sock]}\n".encode())
                return

        for _ in range(clients):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(str(path))
            send(sock)
        while waits:
            for sock in select.select(list(waits), [], [], 30)[0]:
                word, id, *_ = sock.recv(4096).decode().split()
                assert word == "ACK"
                markers[int(id)] = waits.pop(sock)
                send(sock)
    return markers


class Traced(chaos.Victim):
    """A daemon under strace, which ends with it."""

    def command(self, *args: str) -> list[str]:
        return [*STRACE, "-o", f"{self.folder}/trace", *super().command(*args)]

    def signal(self, signum: signal.Signals) -> None:
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            os.kill(int(child), signum)

    def kill9(self) -> None:
        if self.is_alive:
            self.signal(signal.SIGKILL)
            self.until_ended()


def submits(
    folder: Path, clients: int, n: int = 2000, durability: str = "full"
) -> tuple[Trace, dict[int, str]]:
    """The trace of n submits, and the marker of each job; the jobs do not run."""
    with Traced(folder, f"sqlite:///{folder}/upq.db", durability) as daemon:
        daemon.ask("pause ledger")
        markers = submit_all(folder / "s", clients, n)
        assert daemon.end() == 0
    with open(folder / "trace", errors="replace") as lines:
        return read_trace(lines), markers


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    if not shutil.which("strace"):
        unavailable("no program strace")
    return short_tmp


@pytest.mark.parametrize("clients", [1, 8, 32])
def test_no_ack_leaves_before_its_job_is_on_disk(folder: Path, clients: int) -> None:
    trace, markers = submits(folder, clients)
    assert violations(trace, markers) == []
    assert len(markers) == 2000
    if clients == 32:
        assert len(trace.synced) <= 0.25 * len(markers)


def test_acks_that_are_not_on_disk_are_seen(folder: Path) -> None:
    trace, markers = submits(folder, 8, 200, durability="relaxed")
    assert len(violations(trace, markers)) > 100


@pytest.mark.parametrize(
    "order, faults",
    [
        ("write sync send", 0),
        ("write send sync", 1),
        ("sync write send", 1),
        ("write begin send end", 1),
        ("begin write end send", 1),
        ("write begin end send", 0),
        ("write failed send", 1),
    ],
)
def test_the_trace_is_read_right(order: str, faults: int) -> None:
    lines = {
        "write": '7 pwrite64(9</x/upq.db-wal>, "..mark1x..", 4096, 0) = 4096',
        "sync": "7 fdatasync(9</x/upq.db-wal>) = 0",
        "failed": "7 fdatasync(9</x/upq.db-wal>) = -1 EIO (Input/output error)",
        "begin": "8 fdatasync(9</x/upq.db-wal> <unfinished ...>",
        "end": "8 <... fdatasync resumed>) = 0",
        "send": '7 sendto(5<UNIX-STREAM:[1->2]>, "ACK 1\\n", 6, 0, NULL, 0) = 6',
    }
    trace = read_trace(lines[word] for word in order.split())
    assert len(violations(trace, {1: "mark1x"})) == faults


# Servers ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def weakened(server: PrivateServer, name: str, value: str) -> Iterator[None]:
    """A server with a setting that may lose commits."""
    good, server.settings[name] = server.settings[name], value
    server.restart()
    try:
        yield
    finally:
        server.settings[name] = good
        server.restart()


@pytest.mark.parametrize(
    "kind, name, value",
    [
        ("postgres", "fsync", "off"),
        ("postgres", "full_page_writes", "off"),
        ("mariadb", "innodb_flush_log_at_trx_commit", "2"),
    ],
)
def test_a_server_that_may_lose_commits_is_refused_unless_that_is_wanted(
    request: pytest.FixtureRequest, short_tmp: Path, kind: str, name: str, value: str
) -> None:
    server: PrivateServer = request.getfixturevalue(kind)
    with server.database() as url, weakened(server, name, value):
        refused = chaos.Victim(short_tmp, url).attempt()
        assert refused.returncode == 69
        assert f"{name} = {value}" in refused.stderr
        assert "durability = relaxed" in refused.stderr
        relaxed = chaos.Victim(short_tmp, url, durability="relaxed")
        relaxed.forgiven = ["not started: "]
        with relaxed as daemon:
            daemon.submit("ledger n:1")
            assert daemon.ask("status")["durable"] is False


def test_postgresql_is_told_to_wait_for_its_disk(postgres: Postgres) -> None:
    with postgres.database() as url, weakened(postgres, "synchronous_commit", "off"):
        database = Database(url)
        database.prepare()
        raw = database.raw()
        cursor = raw.cursor()
        cursor.execute("SHOW synchronous_commit")
        assert cursor.fetchone() == ("on",)
        raw.close()
        database.close()


def main() -> None:
    for clients in 1, 8, 32:
        folder = short_folder()
        trace, markers = submits(folder, clients)
        early, syncs = len(violations(trace, markers)), len(trace.synced) / len(markers)
        print(f"{clients:2} clients: {early} of {len(markers)} ACKs before their fdatasync, goal 0;"
              f" {syncs:.3f} fdatasync a job")  # fmt: skip
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
