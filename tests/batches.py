"""Batches: what 10,000 members cost, what others feel of it, and kill -9 while they are filled.

python -m tests.batches [sqlite|postgres|mariadb] [--members N] [--kills N] [--seed N]

Prints a line for each figure with its goal; the exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from tests.bench import percentile, report
from tests.daemons import Daemon, until
from tests.servers import MariaDB, Postgres, short_folder
from upq import schema
from upq.client import Client, job
from upq.errors import RequestError

#: What 10,000 members may take from the first line to the start of the follow-up.
GOAL_S = 5.0
#: Seconds between two jobs of the others.
EVERY_S = 0.02
#: Members of a batch that is killed, and of each of its additions.
KILLED, PART = 120, 20
CONFIG = """
[job noop]
concurrent = 4
[job report]
[job stamp]
concurrent = 4
"""
JOBS = {
    "noop": "def run(self): return True",
    "report": "def run(self):\n    note('report', self.jobid)\n    return self.jobdata['batch']",
    "stamp": "def run(self): return time.time() - float(self.jobdata['sent'])",
}


class Cost(NamedTuple):
    """What one batch took."""

    filled_s: float
    followed_s: float
    cpu_s: float
    grown_mib: float
    done: int
    reports: int
    #: Milliseconds to the ACK of others' submits, and to the start of their jobs.
    acks: list[float]
    starts: list[float]


class Others:
    """Another client, which submits a job of another type every EVERY_S."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._over = threading.Event()
        self._ids: list[int] = []
        self.acks: list[float] = []

    def _submit(self) -> None:
        with Client(f"{self._daemon.folder}/s") as upq:
            while not self._over.wait(EVERY_S):
                sent_s, sent = time.perf_counter(), time.time()
                self._ids.append(upq.submit("stamp", {"sent": sent}).id)
                self.acks.append(1000 * (time.perf_counter() - sent_s))

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        submitter = threading.Thread(target=self._submit)
        submitter.start()
        try:
            yield
        finally:
            self._over.set()
            submitter.join()

    def starts(self) -> list[float]:
        return [1000 * self._daemon.wait(id)["result"] for id in self._ids]


def at_rest(daemon: Daemon) -> Others:
    others = Others(daemon)
    with others.at_work():
        time.sleep(3)
    return others


def measure(daemon: Daemon, members: int) -> Cost:
    """Fill a batch from one client, work its members, start its follow-up."""
    others = Others(daemon)
    with others.at_work(), Client(f"{daemon.folder}/s", 60) as upq:
        before, cpu_s, rss_mib = daemon.ledger, daemon.cpu_s(), daemon.rss_mib()
        began_s = time.perf_counter()
        with upq.batch(job("report")) as batch:
            for n in range(members):
                batch.add("noop", {"n": n})
        filled_s = time.perf_counter() - began_s
        ended = upq.wait(batch.id, 600)
        followed_s = time.perf_counter() - began_s
        cost_cpu_s, grown_mib = daemon.cpu_s() - cpu_s, daemon.rss_mib() - rss_mib
    reports = daemon.ledger[len(before) :].count(f"report {batch.id}")
    done = ended["result"]["done"] if ended["state"] == "done" else 0
    return Cost(filled_s, followed_s, cost_cpu_s, grown_mib, done, reports,
                others.acks, others.starts())  # fmt: skip


# Kills


class Killed(NamedTuple):
    """What was found after the kills."""

    batches: int
    kills: int
    #: Batches whose follow-up was not done once, or was there twice.
    not_once: list[int]
    #: Batches with members that are missing or doubled.
    not_whole: list[int]
    #: Follow-ups that were started again, since the daemon died while they ran.
    again: int
    #: Jobs that ran at three kills in a row, failed for that and were retried.
    retried: int


def kill_at_random(daemon: Daemon, kills: int, rng: random.Random) -> Killed:
    """Fill one batch after the other while the daemon is killed at random instants."""
    over = threading.Event()
    done = [0]

    def kill() -> None:
        while done[0] < kills:
            time.sleep(rng.uniform(0, 0.5))
            daemon.kill9()
            done[0] += 1
            daemon.start()
        over.set()

    killer = threading.Thread(target=kill)
    killer.start()
    ids: list[int] = []
    while not over.is_set():
        ids.append(fill(daemon, len(ids)))
    killer.join()

    def is_over() -> bool:
        counts = daemon.ask("status")["jobs"]
        return not counts["queued"] + counts["running"]

    until(is_over)
    # What ran at three kills in a row has failed for that.
    retried = sum(daemon.ask(f"retry type:{one} state:failed")["n"] for one in ("noop", "report"))
    for id in ids:
        daemon.wait(id)
    return judge(daemon, ids, done[0], retried)


def fill(daemon: Daemon, nth: int) -> int:
    """Fill a batch, whatever happens to the daemon; every other time from the start."""
    while True:
        try:
            return fill_once(daemon, nth)
        except (OSError, RequestError):
            time.sleep(0.02)


def fill_once(daemon: Daemon, nth: int) -> int:
    with Client(f"{daemon.folder}/s") as upq:
        batch = upq.batch(job("report", {"nth": nth}, key=f"batch {nth}"))
        for n in range(KILLED):
            batch.add("noop", {"n": n})
            if n % PART == PART - 1:
                persist(upq, batch.send, nth)
        persist(upq, batch.close, nth)
        return batch.id


def persist(upq: Client, send: object, nth: int) -> None:
    """Send, and go on after a lost connection; every other batch gives up and begins again."""
    while True:
        try:
            send()  # type: ignore[operator]
            return
        except (OSError, RequestError):
            if nth % 2:
                raise
            time.sleep(0.02)
            with contextlib.suppress(OSError):
                upq.connect()


def judge(daemon: Daemon, ids: list[int], kills: int, retried: int) -> Killed:
    """Look into the tables: what is there, how often, and how it has ended."""
    url = daemon.url or f"sqlite:///{daemon.folder}/state/upq.db"
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    table = schema.job.c
    query = sa.select(table.id, table.type, table.state, table.parent, table.params)
    with engine.connect() as connection:
        rows = list(connection.execute(query))
    of_batch: dict[int, Counter[str]] = {}
    for row in rows:
        if row.parent is not None:
            of_batch.setdefault(row.parent, Counter())[row.params] += row.state == "done"
    reports = {row.id: row.state for row in rows if row.params.startswith('{"nth":')}
    members = {f'{{"n":{n}}}' for n in range(KILLED)}
    not_whole = [
        id for id in ids
        if of_batch.get(id, Counter()) != dict.fromkeys(members, 1)
    ]  # fmt: skip
    ended = Counter(line for line in daemon.ledger if line.startswith("report "))
    not_once = [id for id in ids if reports.get(id) != "done" or not ended[f"report {id}"]]
    not_once += sorted(reports.keys() - set(ids))
    again = sum(ended[f"report {id}"] - 1 for id in ids)
    return Killed(len(ids), kills, not_once, not_whole, again, retried)


# What it prints


@contextlib.contextmanager
def stores(kinds: list[str]) -> Iterator[list[tuple[str, str]]]:
    """The databases that are wanted, each with its URL."""
    with contextlib.ExitStack() as stack:
        found = []
        for kind in kinds:
            url = ""
            if kind != "sqlite":
                server = stack.enter_context((Postgres if kind == "postgres" else MariaDB)())
                url = stack.enter_context(server.database())
            found.append((kind, url))
        yield found


def report_cost(kind: str, daemon: Daemon, members: int) -> bool:
    calm = at_rest(daemon)
    cost = measure(daemon, members)
    print(f"{kind}: a batch of {members}")
    report("filled", f"{cost.filled_s:.2f} s")
    fast = cost.followed_s <= GOAL_S * members / 10_000
    report("follow-up has ended", f"{cost.followed_s:.2f} s", f"goal {GOAL_S:g} s for 10,000")
    report("CPU of the daemon", f"{cost.cpu_s:.2f} s")
    report("memory growth of the daemon", f"{cost.grown_mib:.1f} MiB")
    report("members done", str(cost.done), f"goal {members}")
    report("times that the follow-up ran", str(cost.reports), "goal 1")
    for name, rest, now in (
        ("ACK", calm.acks, cost.acks), ("start", calm.starts(), cost.starts),
    ):  # fmt: skip
        at = {part: f"{percentile(now, part):.1f} ms" for part in (0.5, 0.99)}
        quiet = f"at rest {percentile(rest, 0.5):.1f} and {percentile(rest, 0.99):.1f} ms"
        report(f"others' {name} meanwhile, p50", at[0.5], quiet)
        report(f"others' {name} meanwhile, p99", at[0.99])
    return fast and cost.done == members and cost.reports == 1


def report_kills(kind: str, daemon: Daemon, kills: int, seed: int) -> bool:
    found = kill_at_random(daemon, kills, random.Random(seed))
    print(f"{kind}: {found.kills} kills while {found.batches} batches were filled, seed {seed}")
    report("batches whose follow-up was not done once", str(len(found.not_once)), "goal 0")
    report("batches with members missing or doubled", str(len(found.not_whole)), "goal 0")
    report("follow-ups begun again: killed while they ran", str(found.again))
    report("jobs failed after three kills, and retried", str(found.retried))
    return not found.not_once and not found.not_whole


def run(folder: Path, url: str = "") -> Daemon:
    return Daemon(folder, CONFIG, url, **JOBS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["sqlite", "postgres", "mariadb"])
    parser.add_argument("--members", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    good = True
    with stores(args.kinds) as found:
        for kind, url in found:
            folder = short_folder()
            try:
                with run(folder, url) as daemon:
                    good &= report_cost(kind, daemon, args.members)
                    if args.kills:
                        good &= report_kills(kind, daemon, args.kills, args.seed)
            finally:
                shutil.rmtree(folder)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
