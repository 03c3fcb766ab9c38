"""Trees that are cancelled at random while they grow, in one daemon or in two, and queued again.

`python -m tests.cancels --trees N` runs it and prints what is found.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tests.daemons import PATIENCE_S, Daemon, until
from tests.servers import Postgres

#: Parents that queue children, wait for some of them and not for others, the same ones each time.
TREE = """
def run(self):
    import random
    note("start", self.jobid)
    rng, deep = random.Random(self.jobid), int(self.jobdata["deep"])
    jobs = []
    for n in range(rng.randrange(1, 6)):
        kind = rng.choice(("tree", "tree", "chain", "step") if deep else ("chain", "step"))
        jobs.append(self.submit(kind, deep=deep - 1, n=n))
        if rng.random() < 0.4:
            jobs[-1].finished.wait()
    for job in jobs:
        job.finished.wait()
    if self.cancelled or any(job.state != "done" for job in jobs):
        return False
    note("end", self.jobid)
"""
STEP = """
def run(self):
    import random
    note("start", self.jobid)
    if self.cancel_event.wait(random.Random(self.jobid).choice((0, 0, 0.001, 0.01, 0.05))):
        return False
    note("end", self.jobid)
"""
CONFIG = """
[node]
name = {name}
[job tree]
concurrent = 6
[job chain]
subjobs = step (left right) step
concurrent = 3
[job step]
concurrent = 4
[job left]
concurrent = 2
[job right]
concurrent = 2
"""
JOBS = {"tree": TREE, "chain": STEP, "step": STEP, "left": STEP, "right": STEP}


class Figures(NamedTuple):
    """Ids of roots, or of jobs, where something was not as it must be."""

    trees: int
    jobs: int
    #: How the wholes ended.
    states: Counter[str]
    #: Roots below which something had not ended, and jobs that were claimed after the cancel.
    survived: list[int]
    started: list[int]
    #: Roots whose whole was not what the answer had said.
    untrue: list[int]
    #: Roots that did not come to their end after a retry, and jobs that were done twice.
    unfinished: list[int]
    twice: list[int]
    slowest_s: float

    @property
    def bad(self) -> list[int]:
        return [*self.survived, *self.started, *self.untrue, *self.unfinished, *self.twice]


@contextlib.contextmanager
def daemons(folder: Path, shared: bool) -> Iterator[list[Daemon]]:
    """One on SQLite, or two on one PostgreSQL."""
    if not shared:
        with Daemon(folder, CONFIG.format(name="a"), **JOBS) as one:
            yield [one]
        return
    with Postgres() as server, server.database() as url, contextlib.ExitStack() as stack:
        made = []
        for name in "ab":
            (folder / name).mkdir()
            made.append(Daemon(folder / name, CONFIG.format(name=name), url, **JOBS))
            stack.enter_context(made[-1])
        yield made


def run(folder: Path, trees: int, seed: int, *, shared: bool = False) -> Figures:
    rng = random.Random(seed)
    with daemons(folder, shared) as them:
        roots: dict[int, tuple[float, str]] = {}
        slowest_s = 0.0
        for _ in range(trees):
            first = rng.choice(them)
            id = first.submit(rng.choice(("tree deep:2", "tree deep:1", "chain deep:0")))
            time.sleep(rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.3))))
            reply = rng.choice(them).say(f"cancel {id}")
            roots[id] = time.time(), reply
            whole_of(first, id)
            slowest_s = max(slowest_s, time.time() - roots[id][0])
        return judge(them, roots, slowest_s)


def whole_of(daemon: Daemon, id: int) -> dict[str, Any]:
    return dict(daemon.ask(f"wait {id} timeout:{PATIENCE_S - 1:g}s whole:yes")["whole"])


def judge(them: list[Daemon], roots: dict[int, tuple[float, str]], slowest_s: float) -> Figures:
    one = them[0]
    survived, untrue, late, unfinished = [], [], [], []
    states = Counter[str]()
    jobs = 0
    for id, (replied_s, reply) in roots.items():
        shown = one.ask(f"show {id}")
        states[shown["whole"]["state"]] += 1
        jobs += shown["whole"]["total"]
        began = [change for change in shown["log"] if change["state"] == "running"]
        late += [change["job"] for change in began if seconds(change["at"]) > replied_s]
        if not shown["whole"]["counts"].keys() <= {"done", "failed", "cancelled"}:
            survived.append(id)
        said = "cancelled" if reply.startswith("OK") else "done"
        if shown["whole"]["state"] not in {said, "done"}:
            untrue.append(id)
    for id in roots:
        if one.ask(f"show {id}")["whole"]["state"] != "done":
            one.ask(f"retry {id}")
    for id in roots:
        if whole_of(one, id)["state"] != "done":
            unfinished.append(id)
    until(lambda: one.ask("status")["jobs"]["running"] == 0)
    ended = Counter(int(line.split()[1]) for line in notes(them, "end"))
    twice = [id for id, n in ended.items() if n > 1]
    return Figures(len(roots), jobs, states, survived, late, untrue, unfinished, twice,
                   slowest_s)  # fmt: skip


def seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def notes(them: list[Daemon], word: str) -> list[str]:
    return [line for one in them for line in one.ledger if line.startswith(f"{word} ")]
