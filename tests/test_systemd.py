"""What systemd would say and hear, with real sockets and a real child process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from upq import systemd

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["file", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The end of NOTIFY_SOCKET that systemd reads."""
    abstract = request.param == "abstract"
    name = f"upq-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name if abstract else name)
        sock.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        yield sock


def test_assignments_travel_in_one_datagram(manager: socket.socket) -> None:
    assert systemd.notify("READY=1", "STATUS=17 jobs,\nall well")
    assert manager.recv(4096) == b"READY=1\nSTATUS=17 jobs, all well"


def test_a_reload_tells_the_time_it_began(manager: socket.socket) -> None:
    before = time.monotonic_ns() // 1000
    assert systemd.notify_reloading()
    first, second = manager.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    name, _, usec = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(usec) <= time.monotonic_ns() // 1000


def test_who_does_not_read_holds_nobody_up(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "SEND_S", 0.1)
    waiting = 0
    while systemd.notify("WATCHDOG=1"):
        waiting += 1
    assert waiting and manager.recv(4096) == b"WATCHDOG=1"
    assert systemd.notify("WATCHDOG=1")


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "/no/such/socket", "@upq-none"])
def test_nobody_to_tell_is_no_fault(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert systemd.notify("READY=1") is False


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [
        ("30000000", "", 15.0),
        ("30000000", "our own", 15.0),
        ("30000000", "1", None),
        ("0", "", None),
        ("soon", "", None),
        ("", "", None),
    ],
)
def test_the_watchdog_is_fed_at_half_its_time(
    usec: str, pid: str, interval_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "our own" else pid)
    assert systemd.watchdog_interval_s() == interval_s


def test_no_sockets_are_passed_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert systemd.listen_fds() == {}


def test_sockets_of_another_process_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert systemd.listen_fds() == {}
    assert "LISTEN_FDS" not in os.environ


CHILD = """
import json, os
from upq import systemd
found = systemd.listen_fds()
print(json.dumps({
    "found": {name: [(s.family, s.getsockname()) for s in group] for name, group in found.items()},
    "inheritable": [s.get_inheritable() for group in found.values() for s in group],
    "left": [name for name in os.environ if name.startswith("LISTEN_")],
    "again": len(systemd.listen_fds()),
}))
"""
#: As systemd does: the sockets at 3, 4, ..., and LISTEN_PID set by the process itself.
EXEC = """
import os, sys
os.dup2(int(sys.argv[1]), 100), os.dup2(int(sys.argv[2]), 101)
os.dup2(100, 3), os.dup2(101, 4), os.closerange(5, 200)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES=sys.argv[3])
os.execv(sys.executable, [sys.executable, "-c", sys.argv[4]])
"""


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        ("line:http", {"line": [0], "http": [1]}),
        ("line:line", {"line": [0, 1]}),
        ("", {"": [0, 1]}),
    ],
)
def test_passed_sockets_come_with_their_names(
    names: str, shape: dict[str, list[int]], tmp_path: Path
) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(path)
        fds = (unix.fileno(), tcp.fileno())
        done = subprocess.run(
            [sys.executable, "-c", EXEC, *map(str, fds), names, CHILD],
            pass_fds=fds,
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        passed = [[socket.AF_UNIX, path], [socket.AF_INET, list(tcp.getsockname())]]
    seen = json.loads(done.stdout)
    assert seen["found"] == {name: [passed[at] for at in ats] for name, ats in shape.items()}
    assert seen["inheritable"] == [False, False]
    assert seen["left"] == []
    assert seen["again"] == 0
