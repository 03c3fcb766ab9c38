"""A daemon that is killed in the middle of a cancel of many: what lives on, and what starts.

`python -m tests.cancels --kills N` runs it and prints what is found.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from tests.daemons import Daemon, until
from tests.servers import MariaDB, Postgres
from upq import schema
from upq.job import CANCELLED, FINAL, RUNNING, encode

job = schema.job

DATABASES = ("sqlite", "postgres", "mariadb")
#: Parents that queue children for as long as they are let.
GROWER = """
def run(self):
    note("start", self.jobid)
    while not self.cancelled:
        self.submit("member", n=time.monotonic())
        time.sleep(0.005)
    return False
"""
MEMBER = """
def run(self):
    note("start", self.jobid)
    self.cancel_event.wait(0.02)
    return not self.cancelled
"""
CONFIG = """
[node]
name = {name}
[job member]
concurrent = 2
[job grower]
concurrent = 2
[job tell]
"""
JOBS = {"member": MEMBER, "grower": GROWER, "tell": "def run(self):\n    note('told')"}
#: Members that one request has.
PART = 5000
#: What a cancel of many may take to come to its end, seconds.
END_S = 120.0
#: How often a kill that came too late, when all was cancelled, is made again.
TRIES = 5


class Figures(NamedTuple):
    #: At each kill in the middle of a cancel, how many jobs were cancelled.
    cancelled: list[int]
    #: Jobs that had not ended in the end; starts after the restart; those in another daemon between
    #: the kill and its next look.
    survived: int
    started: int
    unheard: int
    #: The longest from the restart to READY, and from then on until all had ended.
    ready_s: float
    over_s: float


@contextlib.contextmanager
def database(folder: Path, name: str) -> Iterator[str]:
    if name == "sqlite":
        yield f"sqlite:///{folder}/upq.db"
        return
    with {"postgres": Postgres, "mariadb": MariaDB}[name]() as server, server.database() as url:
        yield url


def run(folder: Path, name: str, jobs: int, kills: int, *, beside: bool = False) -> Figures:
    """Kill at so many points of a cancel of a batch, from its begin to near its end."""
    found: list[Figures] = []
    with database(folder, name) as url, contextlib.ExitStack() as stack:
        one = made(folder / "a", url)
        other = stack.enter_context(made(folder / "b", url)) if beside else None
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        stack.enter_context(one)
        for n in range(kills):
            target = 1 + round(jobs * 0.9 * n / max(kills - 1, 1))
            for _ in range(TRIES):
                found.append(kill(one, other, engine, jobs, target))
                if found[-1].cancelled:
                    break
    sums = [sum(column) for column in list(zip(*(each[1:4] for each in found), strict=True))]
    longest = [max(column) for column in list(zip(*(each[4:] for each in found), strict=True))]
    return Figures([n for each in found for n in each.cancelled], *sums, *longest)


def made(folder: Path, url: str) -> Daemon:
    folder.mkdir()
    return Daemon(folder, CONFIG.format(name=folder.name), url, **JOBS)


def kill(one: Daemon, other: Daemon | None, engine: sa.Engine, jobs: int, target: int) -> Figures:
    one.ask("pause member")
    batch = filled(one, jobs)
    runs = job.c.state == RUNNING
    until(lambda: count(engine, batch, runs, job.c.type == "grower") == 2)
    one.ask("resume member")
    until(lambda: count(engine, batch, runs, job.c.type == "member"))
    cancel = threading.Thread(target=lambda: one.say(f"cancel {batch}"))
    cancel.start()
    until(lambda: count(engine, batch, job.c.state == CANCELLED) >= target)
    one.kill9()
    cancel.join()
    cancelled = count(engine, batch, job.c.state == CANCELLED)
    in_the_middle = cancelled < jobs and open_cancels(engine)
    unheard = 0
    if other is not None:
        before = len(starts(other))
        # What the dead one runs is left to its next start.
        wait_until(lambda: not unfinished(engine, batch, running=False))
        unheard = len(starts(other)) - before
    before = len(starts(one))
    ready_s = one.start()
    began_s = time.monotonic()
    wait_until(lambda: not unfinished(engine, batch) and not open_cancels(engine))
    over_s = time.monotonic() - began_s
    time.sleep(0.5)
    started = len(starts(one)) - before
    met = [cancelled] if in_the_middle else []
    return Figures(met, unfinished(engine, batch), started, unheard, ready_s, over_s)


def filled(one: Daemon, jobs: int) -> int:
    """A batch of so many jobs, with two more that grow; a cancel comes to those last."""
    reply = one.say(encode({"then": "tell", "open": True}))
    batch = int(json.loads(reply)["batch"])
    lines = [f"member n:{n}" for n in range(jobs)] + ["grower"] * 2
    for start in range(0, len(lines), PART):
        part = {"batch": batch, "submit_many": lines[start : start + PART]}
        assert '"ok":true' in one.say(encode(part))
    return batch


def starts(one: Daemon) -> list[str]:
    return [line for line in one.ledger if line.startswith("start ")]


def wait_until(is_so: Any) -> None:
    with contextlib.suppress(AssertionError):
        until(is_so, END_S)


def count(engine: sa.Engine, batch: int, *where: sa.ColumnElement[bool]) -> int:
    """How many jobs of a batch are so."""
    query = sa.select(sa.func.count()).select_from(schema.job)
    with engine.connect() as connection:
        return int(connection.execute(query.where(job.c.root == batch, *where)).scalar_one())


def unfinished(engine: sa.Engine, batch: int, *, running: bool = True) -> int:
    return count(engine, batch, job.c.state.not_in(FINAL if running else FINAL | {RUNNING}))


def open_cancels(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return len(connection.execute(sa.select(schema.cancel.c.id)).all())
