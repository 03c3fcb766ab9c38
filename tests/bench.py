"""What upq costs on this machine: `make bench` prints one line per figure, durable settings.

python -m tests.bench [sqlite|postgres|mariadb]
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import servers

ROOT = Path(__file__).resolve().parent.parent
NOOP = "from upq import UpqJob\n\n\nclass Noop(UpqJob):\n    def run(self):\n        return True\n"
STAMP = """import time

from upq import UpqJob


class Stamp(UpqJob):
    def run(self):
        return time.time() - float(self.jobdata["sent"])
"""
#: A CPU-bound job of about 50 ms.
BURN = """from upq import UpqJob


class {name}(UpqJob):
    def run(self):
        return sum(n * n for n in range(600_000))
"""
APART = """[job apart]
executor = process
concurrent = 2
[job burn]
concurrent = 2
[job burn_apart]
executor = process
concurrent = 2
"""
CONFIG = """[logging]
logfile = upq.log
[paths]
socket = s
state_dir = state
jobs_dir = jobs
[db]
url = {url}
[job noop]
concurrent = {concurrent}
[job stamp]
concurrent = 4
"""


class Daemon:
    """A daemon in a folder of its own, and connections to it."""

    #: Where in the folder its configuration has the socket.
    SOCKET = "s"

    def __init__(self, folder: Path, url: str, concurrent: int = 4, more: str = "") -> None:
        self.folder = folder
        (folder / "jobs").mkdir(exist_ok=True)
        (folder / "jobs/noop.py").write_text(NOOP)
        (folder / "jobs/stamp.py").write_text(STAMP)
        (folder / "upq.cfg").write_text(CONFIG.format(url=url, concurrent=concurrent) + more)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Seconds to READY, as systemd would see it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            path = str(self.folder / "n")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            notify.bind(path)
            began = time.perf_counter()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "upq", "-c", str(self.folder / "upq.cfg")],
                env={**os.environ, "NOTIFY_SOCKET": path, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
            )
            notify.settimeout(60)
            while b"READY=1" not in notify.recv(4096):
                pass
            return time.perf_counter() - began

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.folder / self.SOCKET))
        return sock

    def ask(self, line: str) -> Any:
        with self.connect() as sock:
            sock.sendall(line.encode() + b"\n")
            reply = sock.makefile().readline()
        return json.loads(reply.removeprefix("OK "))

    def done(self) -> int:
        return int(self.ask("status")["jobs"]["done"])

    def proc(self, name: str) -> str:
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/{name}").read_text()

    def rss_mib(self) -> float:
        line = next(x for x in self.proc("status").splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def cpu_s(self) -> float:
        fields = self.proc("stat").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one_at_a_time(daemon: Daemon, seconds: float) -> int:
    """Submits by one client that waits for each ACK. Returns how many."""
    n, end = 0, time.perf_counter() + seconds
    with daemon.connect() as sock:
        while time.perf_counter() < end:
            sock.sendall(b"noop fid:50\n")
            assert sock.recv(4096).startswith(b"ACK ")
            n += 1
    return n


def many_clients(daemon: Daemon, clients: int, seconds: float) -> int:
    """Clients that each wait for each ACK, driven by one thread. Returns the submits."""
    socks = [daemon.connect() for _ in range(clients)]
    poll = select.epoll()
    by_fd = {sock.fileno(): sock for sock in socks}
    for sock in socks:
        poll.register(sock, select.EPOLLIN)
        sock.sendall(b"noop fid:50\n")
    n, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for fd, _ in poll.poll(1):
            assert by_fd[fd].recv(4096).startswith(b"ACK ")
            by_fd[fd].sendall(b"noop fid:50\n")
            n += 1
    for sock in socks:
        sock.close()
    return n


def pipelined(daemon: Daemon, n: int, line: bytes = b"noop fid:50\n") -> float:
    """Seconds for n submits sent without waiting for their ACKs."""
    with daemon.connect() as sock:
        began = time.perf_counter()
        sender = threading.Thread(target=sock.sendall, args=(line * n,))
        sender.start()
        got = 0
        while got < n:
            data = sock.recv(1 << 18)
            assert data and b"ERR" not in data, data[:200]
            got += data.count(b"\n")
        sender.join()
        return time.perf_counter() - began


def wait_done(daemon: Daemon, n: int, every_s: float = 0.05) -> None:
    end = time.perf_counter() + 60
    while daemon.done() < n:
        assert time.perf_counter() < end, daemon.ask("status")
        time.sleep(every_s)


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


def report(name: str, value: str, goal: str = "") -> None:
    print(f"{name:<58} {value:>14}  {goal}", flush=True)


@contextlib.contextmanager
def fresh(url: str, **options: Any) -> Iterator[Daemon]:
    folder = Path(tempfile.mkdtemp(prefix="upq", dir=os.environ.get("UPQ_BENCH_DIR")))
    daemon = Daemon(folder, url.format(folder=folder), **options)
    try:
        yield daemon
    finally:
        daemon.stop()
        shutil.rmtree(folder, ignore_errors=True)


def bench_submits(url: str) -> None:
    with fresh(url) as daemon:
        daemon.start()
        daemon.ask("pause noop")
        one_at_a_time(daemon, 0.5)
        rate = one_at_a_time(daemon, 3) / 3
        report("durable submits/s, one client, one at a time", f"{rate:,.0f}", "goal 2,500")
        rate = many_clients(daemon, 8, 3) / 3
        report("durable submits/s, 8 clients, one at a time", f"{rate:,.0f}", "goal 8,000")
        n = 60_000
        report(
            "durable submits/s, one client, pipelined",
            f"{n / pipelined(daemon, n):,.0f}",
            "goal 30,000",
        )


def bench_jobs(url: str) -> None:
    with fresh(url) as daemon:
        daemon.start()
        pipelined(daemon, 500)
        wait_done(daemon, 500)
        n, began = 20_000, time.perf_counter()
        pipelined(daemon, n)
        wait_done(daemon, 500 + n, 0.02)
        report("no-op jobs/s, concurrent = 4, submitted and run at once",
               f"{n / (time.perf_counter() - began):,.0f}", "goal 8,000")  # fmt: skip
        daemon.ask("pause noop")
        pipelined(daemon, n)
        began = time.perf_counter()
        daemon.ask("resume noop")
        wait_done(daemon, 500 + 2 * n, 0.02)
        report("no-op jobs/s, concurrent = 4, drain of 20,000 queued",
               f"{n / (time.perf_counter() - began):,.0f}", "goal 10,000")  # fmt: skip


def bench_process(url: str) -> None:
    with fresh(url, more=APART) as daemon:
        jobs = daemon.folder / "jobs"
        (jobs / "apart.py").write_text(NOOP.replace("Noop", "Apart"))
        for name in "burn", "burn_apart":
            (jobs / f"{name}.py").write_text(BURN.format(name=name.capitalize()))
        daemon.start()

        def took_s(type: str, n: int) -> float:
            before, line = daemon.done(), f"{type}\n".encode()
            pipelined(daemon, 4, line)
            wait_done(daemon, before + 4)
            began = time.perf_counter()
            pipelined(daemon, n, line)
            wait_done(daemon, before + 4 + n, 0.02)
            return time.perf_counter() - began

        n = 10_000
        report("no-op jobs/s in 2 child processes", f"{n / took_s('apart', n):,.0f}", "goal 2,000")
        threads_s, processes_s = took_s("burn", 60), took_s("burn_apart", 60)
        report("CPU-bound jobs, 2 child processes against 2 threads",
               f"{threads_s / processes_s:.2f} times", "goal 1.8")  # fmt: skip


def bench_latency(url: str) -> None:
    with fresh(url) as daemon:
        daemon.start()
        ids = []
        with daemon.connect() as sock:
            for _ in range(200):
                sock.sendall(f"stamp sent:{time.time()}\n".encode())
                ids.append(int(sock.recv(4096).split()[1]))
                time.sleep(0.05)
        time.sleep(0.5)
        waits = [1000 * daemon.ask(f"show {id}")["job"]["result"] for id in ids[5:]]
        report("submit to start at 20 jobs/s, p50", f"{percentile(waits, 0.5):.2f} ms", "goal 2 ms")
        report(
            "submit to start at 20 jobs/s, p99", f"{percentile(waits, 0.99):.2f} ms", "goal 6 ms"
        )


def bench_idle(url: str, seconds: float = 30) -> None:
    with fresh(url) as daemon:
        daemon.start()
        one_at_a_time(daemon, 0.1)
        time.sleep(2)
        before = daemon.cpu_s()
        time.sleep(seconds)
        used = (daemon.cpu_s() - before) * 60 / seconds
        report("idle daemon, CPU a minute", f"{used:.3f} s", "goal 0.1 s")
        report("idle daemon, memory", f"{daemon.rss_mib():.0f} MiB", "goal 60 MiB")


#: A backlog as a million submits would leave it, but with no history.
BACKLOG = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
INSERT INTO upq_job (id, lane, type, queue, ready, rank, ord, state, reason, params, attempt,
  starts, crashes, token, cancel_asked, waits, root, submitter, created_at, ended_at)
SELECT {first} + i, {lane}, 'noop', 'noop', {ready}, 0, {first} + i, '{state}', '',
  '{{"fid":"50"}}', 0, 0, 0, 0, 0, 0, {first} + i, 'root', {now} - {rows} + i, {ended} FROM n
"""


def fill(file: Path, rows: int) -> None:
    """As many queued and as many finished jobs, put straight into the SQLite file."""
    now = time.time_ns() // 1000
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA synchronous=OFF")
        lane = db.execute("SELECT id FROM upq_lane WHERE type = 'noop'").fetchone()[0]
        for first, state, ready, ended in (
            (10**7, "queued", lane, "NULL"),
            (2 * 10**7, "done", "NULL", now),
        ):
            db.execute(
                BACKLOG.format(
                    rows=rows,
                    first=first,
                    lane=lane,
                    ready=ready,
                    state=state,
                    now=now,
                    ended=ended,
                )
            )
            db.execute(
                "UPDATE upq_tally SET n = n + ? WHERE lane = ? AND state = ?", (rows, lane, state)
            )
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def bench_million(url: str, rows: int = 1_000_000) -> None:
    if not url.startswith("sqlite"):
        return
    with fresh(url) as daemon:
        daemon.start()
        daemon.ask("pause noop")
        daemon.stop()
        fill(daemon.folder / "upq.db", rows)
        report(
            f"start to READY, {rows:,} queued and {rows:,} finished",
            f"{daemon.start():.2f} s",
            "goal 2 s",
        )
        for verb in ("status", "queues", "jobs limit:20", "jobs state:failed", "why 10000500"):
            began = time.perf_counter()
            daemon.ask(verb)
            report(f"  `{verb}` then", f"{1000 * (time.perf_counter() - began):.1f} ms")
        daemon.ask("resume noop")
        wait_done(daemon, rows + 5000)
        daemon.ask("pause noop")
        report("  memory after 5,000 of them ran", f"{daemon.rss_mib():.0f} MiB", "goal 100 MiB")


SERVERS = {"postgres": servers.Postgres, "mariadb": servers.MariaDB}
BENCHES = (bench_submits, bench_jobs, bench_process, bench_latency, bench_million, bench_idle)


@contextlib.contextmanager
def database(kind: str) -> Iterator[str]:
    """The URL of an empty database; that of SQLite is to be filled with a folder."""
    if kind == "sqlite":
        yield "sqlite:///{folder}/upq.db"
        return
    with SERVERS[kind]() as server, server.database() as url:
        yield url


def main() -> None:
    kind, *wanted = sys.argv[1:] or ["sqlite"]
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    print(f"{machine}, {versions}: {kind}")
    for bench in BENCHES:
        if not wanted or bench.__name__.removeprefix("bench_") in wanted:
            with database(kind) as url:
                bench(url)


if __name__ == "__main__":
    main()
