"""The proof that nothing is lost: daemons and databases are killed under load, then all is counted.

python -m tests.chaos [--db sqlite|postgres|mariadb] [--kills N] [--quick]

Prints a line for each figure with its goal; the exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import sqlalchemy as sa

from tests import bench, daemons
from tests.servers import MariaDB, Postgres, PrivateServer, short_folder
from upq import schema
from upq.job import BLOCKED, CANCELLED, DONE, FAILED, FINAL, QUEUED, RUNNING

# The jobs ----------------------------------------------------------------------------------------

LEDGER = """
def run(self):
    import os
    claim = self.jobid, self.token, os.getpid()
    note("start", *claim, time.monotonic())
    {work}
    note("end", *claim, time.monotonic())
"""
SHORT = LEDGER.format(work='time.sleep(float(self.jobdata.get("s", 0)))')
FAMILY = LEDGER.format(
    work="""n = self.jobdata["n"]
    for child in [self.enqueue_newjob("child", {"n": n, "i": i}) for i in range(3)]:
        child.finished.wait()"""
)
#: Job types: places, body, and more settings.
TYPES: Mapping[str, tuple[int, str, str]] = {
    "ledger": (4, SHORT, ""),
    "family": (2, FAMILY, "subjobs = last"),
    "child": (2, SHORT, ""),
    "first": (1, SHORT, "subjobs = second third"),
    "second": (1, SHORT, ""),
    "third": (2, SHORT, "notify_success = syslog"),
    "last": (1, SHORT, "notify_success = syslog"),
}
#: What must follow a job of a type that is done: types, and how many of each.
FOLLOWS: Mapping[str, Mapping[str, int]] = {
    "first": {"second": 1},
    "second": {"third": 1},
    "family": {"child": 3, "last": 1},
    "third": {"notify": 1},
    "last": {"notify": 1},
}
#: Types that clients submit, and how often among a hundred.
MIX = {"ledger": 84, "ledger s:0.05": 6, "first": 6, "family": 4}


class Victim(daemons.Daemon):
    """A daemon with jobs that leave marks, to be killed at will."""

    def __init__(self, folder: Path, url: str, durability: str = "full") -> None:
        sections = [f"[db]\ndurability = {durability}"]
        sections += [f"[job {t}]\nconcurrent = {n}\n{more}" for t, (n, _, more) in TYPES.items()]
        sections += [f"[job notify]\nsyslog_address = {folder}/log\nretry_delay = 1s\n"]
        bodies = {type: body for type, (_, body, _) in TYPES.items()}
        super().__init__(folder, "\n".join(sections), url, **bodies)
        shutil.copy(daemons.ROOT / "jobs/notify.py", folder / "jobs")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def drain(self, seconds: float) -> None:
        """Wait until every job has ended."""
        open_ = QUEUED, BLOCKED, RUNNING
        daemons.until(lambda: not any(self.ask("status")["jobs"][s] for s in open_), seconds)


# The clients -------------------------------------------------------------------------------------


@dataclass
class Try:
    """One submit as its client remembers it; one with a key is repeated until it is ACKed."""

    n: int
    line: bytes
    keyed: bool
    ids: list[int] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    doubts: int = 0
    sent_s: float = 0.0


class Client:
    """One connection: sends a few lines at once, then waits for all their replies."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.sent: deque[Try] = deque()
        self.rest = b""
        self.wake_s = 0.0


class Load(threading.Thread):
    """Clients that submit until they are told to stop, driven by one thread."""

    def __init__(self, path: Path, rng: random.Random, clients: int, pause_s: float) -> None:
        super().__init__(name="load", daemon=True)
        self.tries: list[Try] = []
        #: The longest wait for a reply.
        self.slowest_s = 0.0
        #: When the latest line was sent that was ACKed.
        self.good_s = 0.0
        #: Set when a submit is refused.
        self.refused = False
        self._path = str(path)
        self._rng = rng
        self._clients = [Client() for _ in range(clients)]
        self._pause_s = pause_s
        self._again: deque[Try] = deque()
        self._selector = selectors.DefaultSelector()
        self._ending = False

    def finish(self, seconds: float) -> None:
        """Submit nothing new; wait for what is open, and for every key to be ACKed."""
        self._ending = True
        self.join(seconds)
        assert not self.is_alive(), "submits that were never answered"

    def run(self) -> None:
        while not (self._ending and not self._again and not any(c.sent for c in self._clients)):
            for client in self._clients:
                if not client.sent and time.monotonic() >= client.wake_s:
                    self._send(client)
            for key, _ in self._selector.select(0.005):
                self._receive(key.data)
        for client in self._clients:
            self._close(client)

    def _next(self) -> Iterator[Try]:
        """A few lines to send: what is in doubt first, then new ones."""
        for _ in range(self._rng.choice((1, 1, 1, 8))):
            if self._again:
                yield self._again.popleft()
            elif not self._ending:
                (line,) = self._rng.choices(list(MIX), list(MIX.values()))
                n, keyed = len(self.tries), self._rng.random() < 0.5
                line += f" n:{n}" + (f" @key:{n}\n" if keyed else "\n")
                self.tries.append(Try(n, line.encode(), keyed))
                yield self.tries[-1]

    def _send(self, client: Client) -> None:
        now_s = time.monotonic()
        client.wake_s = now_s + self._rng.expovariate(1 / self._pause_s)
        if client.sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(self._path)
            except OSError:
                sock.close()
                return
            client.sock = sock
            self._selector.register(sock, selectors.EVENT_READ, client)
        client.sent.extend(self._next())
        for one in client.sent:
            one.sent_s = now_s
        try:
            client.sock.sendall(b"".join(one.line for one in client.sent))
        except OSError:
            self._close(client)

    def _receive(self, client: Client) -> None:
        assert client.sock is not None
        try:
            data = client.sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._close(client)
            return
        *replies, client.rest = (client.rest + data).split(b"\n")
        for reply in replies:
            self._hear(client.sent.popleft(), reply.decode())

    def _hear(self, one: Try, reply: str) -> None:
        self.slowest_s = max(self.slowest_s, time.monotonic() - one.sent_s)
        self.refused = self.refused or not reply.startswith("ACK ")
        word, rest = reply.split(" ", 1)
        if word == "ACK":
            one.ids.append(int(rest.split()[0]))
            self.good_s = max(self.good_s, one.sent_s)
        elif rest.startswith("uncertain "):
            self._doubt(one)
        else:
            one.refusals.append(rest)
            if one.keyed:
                self._again.append(one)

    def _doubt(self, one: Try) -> None:
        one.doubts += 1
        if one.keyed:
            self._again.append(one)

    def _close(self, client: Client) -> None:
        if client.sock is not None:
            self._selector.unregister(client.sock)
            client.sock.close()
        for one in client.sent:
            self._doubt(one)
        client.sock, client.rest = None, b""
        client.sent.clear()


class Syslog:
    """Receives notifications; knows how many came for each job."""

    def __init__(self, path: Path) -> None:
        self.told: Counter[int] = Counter()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        threading.Thread(target=self._listen, name="syslog", daemon=True).start()

    def _listen(self) -> None:
        while data := self._sock.recv(4096):
            found = re.search(rb": job (\d+) ", data)
            assert found, data
            self.told[int(found[1])] += 1

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


# What is found afterwards ------------------------------------------------------------------------


class Row(NamedTuple):
    """A job as its table has it."""

    id: int
    type: str
    state: str
    reason: str
    starts: int
    crashes: int
    token: int
    parent: int | None
    params: str
    message: str | None = None

    @property
    def n(self) -> int:
        """The number of the submit that it comes from; -1 when it tells about a job."""
        return int(json.loads(self.params).get("n", -1))

    @property
    def above(self) -> int | None:
        """The job that it follows, or tells about."""
        if self.type == "notify":
            return int(json.loads(self.params)["job"]["jobid"])
        return self.parent


class Step(NamedTuple):
    """A change of state, from the history."""

    job: int
    at: int
    state: str
    reason: str


class Mark(NamedTuple):
    """A line that a job has written into the ledger."""

    what: str
    job: int
    token: int
    pid: int
    at_s: float


class Life(NamedTuple):
    """A daemon from its start to READY."""

    pid: int
    took_s: float
    ready_s: float


@dataclass
class Facts:
    """All that is known after a trial."""

    rows: dict[int, Row]
    #: In the order of the commits.
    steps: list[Step]
    #: How many jobs each (lane, state) has: as upq keeps it, and as the table has it.
    tally: dict[tuple[int, str], int]
    counted: dict[tuple[int, str], int]
    marks: list[Mark] = field(default_factory=list)
    tries: list[Try] = field(default_factory=list)
    #: Messages that came for each job.
    told: Mapping[int, int] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)
    #: From, to (wall clock): when a job may have been interrupted.
    troubles: list[tuple[float, float]] = field(default_factory=list)

    @property
    def acked(self) -> int:
        return sum(bool(one.ids) for one in self.tries)


def read_facts(url: str) -> Facts:
    """What the database says."""
    job, event, tally = schema.job.c, schema.event.c, schema.tally.c
    steps = sa.select(event.job, event.at, event.state, event.reason).order_by(event.n)
    kept = sa.select(tally.lane, tally.state, tally.n).where(tally.n != 0)
    real = sa.select(job.lane, job.state, sa.func.count()).group_by(job.lane, job.state)
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as db:
        return Facts(
            {r.id: Row(*r) for r in db.execute(sa.select(*(job[name] for name in Row._fields)))},
            [Step(*step) for step in db.execute(steps)],
            {(lane, state): n for lane, state, n in db.execute(kept)},
            {(lane, state): n for lane, state, n in db.execute(real)},
        )


def read_mark(line: str) -> Mark:
    what, job, token, pid, at_s = line.split()
    return Mark(what, int(job), int(token), int(pid), float(at_s))


#: Reasons of going back to the queue before the job's code was begun.
GIVEN_BACK = ("claimed ahead", "drained", "released")
#: Reasons of refusals that a client may meet.
REFUSALS = ("unavailable", "stopping")
NEXT: Mapping[str | None, tuple[str, ...]] = {
    None: (QUEUED, BLOCKED),
    QUEUED: (RUNNING, CANCELLED),
    BLOCKED: (QUEUED, CANCELLED),
    RUNNING: (QUEUED, DONE, FAILED, CANCELLED),
}


class Findings:
    """What an audit has found that does not hold, by rule."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    @property
    def text(self) -> str:
        """What was found: a line for each rule, with its first case."""
        return "\n".join(f"{rule}, {len(w)} times: {w[0]}" for rule, w in self.found.items())

    def _want(self, good: bool, rule: str, *what: object) -> None:
        if not good:
            self.found.setdefault(rule, []).append(" ".join(map(str, what)))


class Audit(Findings):
    """What must hold after a trial. `found` says what does not, by rule."""

    RULES = (
        "ACKed jobs lost",
        "jobs that did not end",
        "refused submits that were queued",
        "refusals for an unknown reason",
        "submits that became several jobs",
        "keys with several ids",
        "unexplained starts",
        "changes after the end",
        "impossible changes of state",
        "starts unlike the history",
        "claims that ran twice",
        "runs of what was given back",
        "done without having run to its end",
        "failed without three crashes",
        "failed and never begun",
        "missing or doubled successors",
        "parents that ended before a child",
        "missing notifications",
        "counts unlike the table",
    )

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self._steps: dict[int, list[Step]] = defaultdict(list)
        self._ended: dict[int, int] = {}
        for number, step in enumerate(facts.steps):
            self._steps[step.job].append(step)
            self._ended[step.job] = number
        self._marks: dict[int, list[Mark]] = defaultdict(list)
        for mark in facts.marks:
            self._marks[mark.job].append(mark)
        self._below: dict[int | None, list[Row]] = defaultdict(list)
        for row in facts.rows.values():
            self._below[row.above].append(row)
        self._audit_submits()
        for row in facts.rows.values():
            self._audit_history(row)
            self._audit_runs(row)
            self._audit_what_follows(row)
        same = facts.tally == facts.counted
        self._want(same, "counts unlike the table", facts.tally, facts.counted)

    def _audit_submits(self) -> None:
        of: dict[int, list[int]] = defaultdict(list)
        for row in self.facts.rows.values():
            if row.above is None:
                of[row.n].append(row.id)
        for one in self.facts.tries:
            found = of[one.n]
            self._want(set(one.ids) <= {*found}, "ACKed jobs lost", one, found)
            self._want(len(found) <= 1, "submits that became several jobs", one, found)
            self._want(len({*one.ids}) <= 1, "keys with several ids", one)
            refused = bool(one.refusals) and not one.doubts and not one.ids
            self._want(not (found and refused), "refused submits that were queued", one)
            known = all(text.startswith(REFUSALS) for text in one.refusals)
            self._want(known, "refusals for an unknown reason", one)

    def _audit_history(self, row: Row) -> None:
        steps = self._steps[row.id]
        self._want(row.state in FINAL, "jobs that did not end", row, steps)
        was: str | None = None
        for step in steps:
            if was in FINAL:
                self._want(False, "changes after the end", row, steps)
                break
            self._want(step.state in NEXT[was], "impossible changes of state", row, steps)
            if (was, step.state) == (RUNNING, QUEUED):
                self._want(self._is_explained(step), "unexplained starts", row, steps)
            was = step.state
        starts = sum(step.state == RUNNING for step in steps)
        same = (starts, was) == (row.starts, row.state)
        self._want(same, "starts unlike the history", row, steps)
        if row.state == FAILED:
            deaths = sum(step.reason in ("interrupted", "crashed") for step in steps)
            good = row.reason == "crashed" and row.crashes == 3 <= deaths
            self._want(good, "failed without three crashes", row, steps)

    def _is_explained(self, step: Step) -> bool:
        """Whether a running job had to go back to the queue."""
        if step.reason == "interrupted":
            return any(begin <= step.at / 1e6 <= end for begin, end in self.facts.troubles)
        return step.reason in GIVEN_BACK

    def _audit_runs(self, row: Row) -> None:
        if row.type not in TYPES:
            return
        marks, steps = self._marks[row.id], self._steps[row.id]
        begun = [mark.token for mark in marks if mark.what == "start"]
        self._want(len({*begun}) == len(begun), "claims that ran twice", row, marks, steps)
        self._want(bool(begun) or row.state != FAILED, "failed and never begun", row)
        given_back = sum(step.reason in GIVEN_BACK for step in steps)
        good = len(begun) <= row.starts - given_back
        self._want(good, "runs of what was given back", row, marks, steps)
        if row.state == DONE:
            ends = [mark.token for mark in marks if mark.what == "end"]
            self._want(abs(row.token) in ends, "done without having run to its end", row, marks)

    def _audit_what_follows(self, row: Row) -> None:
        below = self._below[row.id]
        found = Counter(one.type for one in below)
        done = row.state == DONE
        for type, n in FOLLOWS.get(row.type, {}).items():
            # Children come before the end, and some may be there of a parent that has crashed.
            good = found[type] == n if done else found[type] <= (n if type == "child" else 0)
            self._want(good, "missing or doubled successors", row, found)
            if done and type == "notify":
                self._want(self.facts.told.get(row.id, 0) > 0, "missing notifications", row)
        for child in below:
            if child.type == "child" and done:
                early = self._ended[child.id] > self._ended[row.id]
                self._want(not early, "parents that ended before a child", row, child)


# Trials ------------------------------------------------------------------------------------------

#: Seconds after an outage in which jobs may still be interrupted by it.
AFTERMATH_S = 10.0
#: What the log may say of an outage.
AWAY = ["cannot be written to"]


class CannotMount(Exception):
    """Not root, or in a container that must not."""


@dataclass(frozen=True)
class Store:
    """A database, the folder of its daemon, and what is behind it."""

    folder: Path
    url: str
    #: None for SQLite.
    server: PrivateServer | None = None

    @property
    def file(self) -> Path:
        return Path(sa.make_url(self.url).database or "")


@contextlib.contextmanager
def new_store(kind: str) -> Iterator[Store]:
    """A new database: sqlite, postgres, mariadb, or disk: SQLite on a small disk of its own."""
    folder = short_folder()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        if kind in ("postgres", "mariadb"):
            server = stack.enter_context(Postgres() if kind == "postgres" else MariaDB())
            yield Store(folder, stack.enter_context(server.database()), server)
            return
        if kind == "disk":
            stack.enter_context(small_disk(folder / "disk"))
        yield Store(folder, f"sqlite:///{folder}/{'disk/' if kind == 'disk' else ''}upq.db")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 8 MiB. Raises CannotMount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "upq-chaos", str(folder)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        raise CannotMount(f"a small disk cannot be mounted: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Trial:
    """A daemon under load: to be hurt, and then to be audited."""

    def __init__(self, store: Store, clients: int = 16, pause_s: float = 0.05) -> None:
        self.store = store
        self.rng = random.Random()
        self.daemon = Victim(store.folder, store.url)
        self.load = Load(store.folder / "s", self.rng, clients, pause_s)
        self.lives: list[Life] = []
        self.troubles: list[tuple[float, float]] = []
        self._syslog = Syslog(store.folder / "log")

    def __enter__(self) -> Self:
        self.begin()
        self.load.start()
        daemons.until(lambda: self.load.good_s)
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.kill9()
        self._syslog.close()

    def begin(self) -> None:
        """Start the daemon and wait for READY."""
        took_s = self.daemon.start()
        self.lives.append(Life(self.daemon.pid, took_s, time.monotonic()))

    @contextlib.contextmanager
    def trouble(self, aftermath_s: float = 0.0) -> Iterator[None]:
        """A time in which jobs may be interrupted."""
        began_at = time.time()
        yield
        self.troubles.append((began_at, time.time() + aftermath_s))

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """A time without a database; submits have been refused when it ends."""
        self.daemon.forgiven = AWAY
        self.load.refused = False
        with self.trouble(AFTERMATH_S):
            yield

    def until_refused(self) -> None:
        daemons.until(lambda: self.load.refused)

    def recovery_s(self) -> float:
        """Seconds from now, when the database is back, to the first new ACK."""
        up_s = time.monotonic()
        daemons.until(lambda: self.load.good_s > up_s)
        return self.load.good_s - up_s

    def settle(self) -> Facts:
        """Let all jobs end and the daemon stop; what is to be seen then."""
        self.load.finish(60)
        with contextlib.suppress(AssertionError):  # the audit says which jobs are stuck
            self.daemon.drain(60)
        assert self.daemon.end() == 0
        self.daemon.has_behaved()
        facts = read_facts(self.store.url)
        facts.marks = [read_mark(line) for line in self.daemon.ledger]
        facts.tries, facts.told = self.load.tries, self._syslog.told
        facts.lives, facts.troubles = self.lives, self.troubles
        return facts


def kill_daemon(trial: Trial, kills: int, lives_s: tuple[float, float] = (0.02, 1.5)) -> None:
    """kill -9 again and again, at any time after READY; each fifth time once more before it."""
    for number in range(kills):
        time.sleep(trial.rng.uniform(*lives_s))
        trial.daemon.kill9()
        with trial.trouble():
            if number % 5 == 4:
                trial.daemon.stillborn(trial.rng.uniform(0.1, 0.6))
            trial.begin()


# Outages: each returns the seconds from the end of the trouble to the first new ACK.


def crash_server(trial: Trial, life_s: tuple[float, float] = (2, 5)) -> float:
    """End the database as a crash would; PostgreSQL as `pg_ctl restart -m immediate` does."""
    server = trial.store.server
    assert server is not None and server.pid is not None
    time.sleep(trial.rng.uniform(*life_s))
    with trial.outage():
        if isinstance(server, Postgres):
            os.kill(server.pid, signal.SIGQUIT)
            daemons.until(lambda: server.pid is None)
        else:
            server.kill9()
        time.sleep(trial.rng.uniform(0, 2))
        server.start()
    return trial.recovery_s()


def hang_server(trial: Trial, seconds: float = 15) -> float:
    """Freeze the database for a while: connections stay open and nothing answers."""
    assert trial.store.server is not None
    with trial.outage():
        trial.store.server.pause()
        time.sleep(seconds)
        trial.store.server.resume()
    return trial.recovery_s()


def forbid_writing(trial: Trial) -> float:
    """A PostgreSQL whose transactions may not write."""
    server = trial.store.server
    assert server is not None
    with trial.outage():
        server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        server.execute("SELECT pg_reload_conf()")
        trial.until_refused()
        time.sleep(2)
        server.execute("ALTER SYSTEM RESET default_transaction_read_only")
        server.execute("SELECT pg_reload_conf()")
    return trial.recovery_s()


def fill_disk(trial: Trial) -> float:
    """Fill the disk until submits are refused, and later make room."""
    ballast = trial.store.file.with_name("ballast")

    def is_refused() -> bool:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        return trial.load.refused

    with trial.outage():
        with ballast.open("wb", buffering=0) as file:
            daemons.until(is_refused)
        time.sleep(2)
        ballast.unlink()
    return trial.recovery_s()


@contextlib.contextmanager
def failing(pid: int, calls: str, error: str, database: Path) -> Iterator[None]:
    """Let system calls of a process on the database's files fail meanwhile.

    A file system with open files cannot be made read-only; for the daemon this is the same.
    """
    files = [f"--trace-path={database}{suffix}" for suffix in ("", "-wal")]
    how = ["-f", "-o", "/dev/null", *files, f"--inject={calls}:error={error}", "-p", str(pid)]
    with subprocess.Popen(["strace", *how], stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        while b"attached" not in strace.stderr.readline():
            assert strace.poll() is None, "strace cannot attach"
        yield
        strace.send_signal(signal.SIGINT)
        strace.communicate()


def break_disk(trial: Trial, calls: str, error: str) -> float:
    """Let system calls of the daemon fail for a while."""
    with trial.outage(), failing(trial.daemon.pid, calls, error, trial.store.file):
        trial.until_refused()
        time.sleep(2)
    return trial.recovery_s()


def forbid_disk(trial: Trial) -> float:
    return break_disk(trial, "pwrite64", "EROFS")


def break_fsync(trial: Trial) -> float:
    return break_disk(trial, "fdatasync,fsync", "EIO")


#: What a daemon has to survive: how, on which stores, how often in full size.
OUTAGES: Mapping[Callable[[Trial], float], tuple[str, int]] = {
    fill_disk: ("disk", 3),
    forbid_disk: ("sqlite", 3),
    break_fsync: ("sqlite", 10),
    crash_server: ("postgres mariadb", 30),
    hang_server: ("postgres mariadb", 3),
    forbid_writing: ("postgres", 3),
}

# Keys


def race_for_keys(
    daemon: daemons.Daemon, clients: int = 16, keys: int = 200
) -> dict[str, set[int]]:
    """Everybody submits all keys at once, in an order of their own; the ids by key."""
    found: dict[str, set[int]] = defaultdict(set)
    rng = random.Random()
    with contextlib.ExitStack() as stack:
        talks = [stack.enter_context(daemon.talk()) for _ in range(clients)]
        orders = [rng.sample(range(keys), keys) for _ in talks]
        for talk, order in zip(talks, orders, strict=True):
            talk.send("".join(f"ledger n:{n} @key:race{n}\n" for n in order))
        for talk, order in zip(talks, orders, strict=True):
            for n in order:
                word, id, *_ = talk.read().split()
                assert word == "ACK"
                found[f"race{n}"].add(int(id))
    return found


# Figures -----------------------------------------------------------------------------------------


def first_starts(facts: Facts) -> list[float]:
    """Seconds from READY to the first start of a job that had started before, for each life."""
    ready = {life.pid: life.ready_s for life in facts.lives}
    seen: set[int] = set()
    found: dict[int, float] = {}
    for mark in facts.marks:
        if mark.what == "start":
            if mark.job in seen and mark.pid in ready:
                found.setdefault(mark.pid, max(mark.at_s - ready[mark.pid], 0.0))
            seen.add(mark.job)
    return list(found.values())


class Report:
    """Prints figures; knows which goals were missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def fact(self, name: str, *values: object) -> None:
        print(f"  {name:<60} {' / '.join(map(str, values)):>16}", flush=True)

    def figure(self, name: str, value: float, goal: float, unit: str = "", note: str = "") -> None:
        """A figure that must not be above its goal."""
        mark = " "
        if value > goal:
            mark = "!"
            self.missed.append(name)
        text = f"{value:,.3f}" if value % 1 else f"{value:,.0f}"
        print(f"{mark} {name:<60} {text + unit:>16}  goal {goal:g}{unit} {note}", flush=True)

    def audit(self, facts: Facts) -> None:
        rows, steps = facts.rows.values(), facts.steps
        self.fact("submits / ACKed / in doubt for a while / refused", len(facts.tries), facts.acked,
                  sum(one.doubts > 0 for one in facts.tries),
                  sum(bool(one.refusals) for one in facts.tries))  # fmt: skip
        self.fact("jobs / starts / interrupted / given back", len(rows),
                  sum(row.starts for row in rows),
                  sum(step.reason == "interrupted" for step in steps),
                  sum(step.reason in GIVEN_BACK for step in steps))  # fmt: skip
        done = Counter(row.type for row in rows if row.state == DONE)
        self.fact("chains / parents / notifications done",
                  done["first"], done["family"], done["notify"])  # fmt: skip
        self.fact("failed after three crashes", sum(row.reason == "crashed" for row in rows))
        found = Audit(facts).found
        for rule in Audit.RULES:
            faults = found.get(rule, [])
            lost = rule == "ACKed jobs lost" and facts.acked
            bound = f"(95 %: at most {3 / facts.acked:.1e} a job)" if lost else ""
            self.figure(rule, len(faults), 0, note=bound)
            for what in faults[:3]:
                print(f"      {what[:1000]}")

    def kills(self, store: Store, kills: int) -> None:
        with Trial(store) as trial:
            kill_daemon(trial, kills)
            facts = trial.settle()
        self.audit(facts)
        ready = [life.took_s for life in facts.lives]
        self.figure("start to READY, p99", bench.percentile(ready, 0.99), 2, " s")
        first = first_starts(facts)
        note = f"({len(first)} times)"
        self.figure("READY to the first resumed job, worst", max(first, default=0), 1, " s", note)

    def keys(self, store: Store) -> None:
        with Victim(store.folder, store.url) as daemon:
            ids = race_for_keys(daemon, 64, 1000)
            daemon.drain(60)
            assert daemon.end() == 0
        self.figure("keys with several ids", sum(len(found) > 1 for found in ids.values()), 0)
        self.figure("jobs too many", len(read_facts(store.url).rows) - len(ids), 0)

    def outage(self, store: Store, hurt: Callable[[Trial], float], times: int) -> None:
        with Trial(store, clients=8) as trial:
            recoveries = [hurt(trial) for _ in range(times)]
            self.figure("daemons that died", not trial.daemon.is_alive, 0)
            facts = trial.settle()
        self.audit(facts)
        self.figure("slowest reply", trial.load.slowest_s, REPLY_S, " s")
        self.figure("back to the first new ACK, worst", max(recoveries), 5, " s")


#: Seconds in which every submit is answered, whatever the database does.
REPLY_S = 12


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--db", choices=("sqlite", "postgres", "mariadb"), action="append")
    parser.add_argument("--kills", type=int, help="500 on SQLite, 200 on the others; quick: 25, 10")
    parser.add_argument(
        "--quick", action="store_true", help="about the size of tests/test_chaos.py"
    )
    args = parser.parse_args()
    report = Report()
    for kind in args.db or ("sqlite", "postgres", "mariadb"):
        kills = args.kills or {False: (500, 200), True: (25, 10)}[args.quick][kind != "sqlite"]
        print(f"{kind}: kill -9, {kills} times")
        with new_store(kind) as store:
            report.kills(store, kills)
        print(f"{kind}: 64 connections ask for 1,000 keys at once")
        with new_store(kind) as store:
            report.keys(store)
        for hurt, (kinds, times) in OUTAGES.items():
            where = next((k for k in kinds.split() if k.replace("disk", "sqlite") == kind), None)
            if where:
                times = 1 + times // 10 if args.quick else times
                print(f"{kind}: {hurt.__name__.replace('_', ' ')}, {times} times")
                with new_store(where) as store:
                    report.outage(store, hurt, times)
    print(f"missed: {', '.join(report.missed)}" if report.missed else "all goals reached")
    return bool(report.missed)


if __name__ == "__main__":
    sys.exit(main())
