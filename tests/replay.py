"""T07, DJZ-23: daemons are killed in the middle of A -> (B1, B2, B3) -> C with a mail at the end.

python -m tests.replay [--db sqlite|postgres|mariadb] [--kills N]

Prints a line for each figure with its goal; the exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import sqlalchemy as sa
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from tests import daemons
from tests.chaos import Findings, Report, Step, Store, new_store
from tests.servers import free_port
from upq import schema
from upq.job import DONE, FINAL, RUNNING
from upq.nodes import DEATHS

# The jobs ----------------------------------------------------------------------------------------

#: What all of them do: note each start and each beginning of a step, with the time.
NOTING = """
def draw(self, name):
    import random
    note("step", self.jobid, name, time.time())
    time.sleep(0.005)
    return random.random()

def begin(self):
    import random
    note("start", self.jobid, "-", time.time())
    time.sleep(random.uniform(0, 0.03))
"""
WHOLE = """
def run(self):
    self.begin()
    n = self.jobdata["n"]
    plan = self.step("plan", self.draw, "plan")
    first = self.submit("a", n=n).wait()
    branches = self.gather([self.submit("b", n=n, part=part) for part in range(3)])
    fee = self.step("fee", self.draw, "fee")
    last = self.submit("c", n=n, queue=f"c_{first['place']}")
    return {"plan": plan, "fee": fee, "a": first, "b": branches, "c": last.wait()}
"""
A = """
def run(self):
    self.begin()
    return {"place": self.jobid % 2, "drawn": self.step("plan", self.draw, "plan")}
"""
B = """
def run(self):
    self.begin()
    leaf = self.submit("leaf")
    drawn = self.step("plan", self.draw, "plan")
    return [drawn, leaf.wait()]
"""
LEAF = """
def run(self):
    self.begin()
    return self.jobid
"""
#: Job types: places, body, and more settings.
TYPES = {
    "whole": (3, WHOLE, "notify_success = mail:ops@example.org"),
    "a": (2, A, ""),
    "b": (3, B, ""),
    "c": (2, A, "executor = process"),
    "leaf": (2, LEAF, ""),
}
#: The children of a job that is done: types, and how many of each.
CHILDREN = {"whole": {"a": 1, "b": 3, "c": 1}, "b": {"leaf": 1}}
#: Workflows that are under way at a time.
ABREAST = 6
#: Seconds from READY to the kill.
LIVES_S = (0.02, 0.8)


class Postbox:
    """What a mail server has received: how many mails about each job."""

    def __init__(self) -> None:
        self.told = Counter[int]()

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        content = envelope.content
        assert isinstance(content, bytes)
        subject = re.search(rb"^Subject: \[upq\] whole (\d+) done ", content, re.MULTILINE)
        assert subject, content
        self.told[int(subject[1])] += 1
        return "250 OK"


class Victim(daemons.Daemon):
    """A daemon with these jobs, to be killed at will."""

    def __init__(self, folder: Path, url: str, port: int) -> None:
        mail = f"[mail]\nserver = 127.0.0.1:{port}\nfrom = upq@example.org"
        sections = [mail, "[job notify]\nretry_delay = 1s\n"]
        sections += [f"[job {t}]\nconcurrent = {n}\n{more}" for t, (n, _, more) in TYPES.items()]
        bodies = {type: NOTING + body for type, (_, body, _) in TYPES.items()}
        super().__init__(folder, "\n".join(sections), url, **bodies)
        shutil.copy(daemons.ROOT / "jobs/notify.py", folder / "jobs")

    def list(self, what: str) -> list[dict[str, Any]]:
        return list(self.ask(f"jobs {what} limit:1000")["jobs"])


# What is found afterwards ------------------------------------------------------------------------


class Row(NamedTuple):
    """A job as its table has it."""

    id: int
    type: str
    state: str
    starts: int
    parent: int | None
    result: str | None


class Kept(NamedTuple):
    """What a step has returned."""

    job: int
    name: str
    result: str
    at: int


class Mark(NamedTuple):
    """A line that a job has written into the ledger: a start, or the beginning of a step."""

    what: str
    job: int
    step: str
    at_s: float

    @classmethod
    def of(cls, line: str) -> Mark:
        what, job, step, at_s = line.split()
        return cls(what, int(job), step, float(at_s))


@dataclass
class Facts:
    """All that is known after a trial."""

    rows: dict[int, Row]
    #: Changes of state, in the order of the commits.
    changes: list[Step]
    kept: list[Kept]
    marks: list[Mark] = field(default_factory=list)
    submitted: int = 0
    told: Counter[int] = field(default_factory=Counter)
    retried: list[str] = field(default_factory=list)


def read_facts(url: str) -> Facts:
    """What the database says."""
    job, event, step = schema.job.c, schema.event.c, schema.step.c
    changes = sa.select(event.job, event.at, event.state, event.reason).order_by(event.n)
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as db:
        return Facts(
            {r.id: Row(*r) for r in db.execute(sa.select(*(job[name] for name in Row._fields)))},
            [Step(*change) for change in db.execute(changes)],
            [Kept(*r) for r in db.execute(sa.select(*(step[name] for name in Kept._fields)))],
        )


class Audit(Findings):
    """What must hold after a trial. `found` says what does not, by rule."""

    RULES = (
        "workflows that are not complete",
        "submits that became several workflows",
        "missing or doubled children",
        "children whose end was committed, run again",
        "steps whose end was committed, run again",
        "results unlike those of children and steps",
        "workflows without a mail",
        "workflows failed for another reason than three deaths",
    )

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self._kept = {(one.job, one.name): json.loads(one.result) for one in facts.kept}
        self._below: dict[int | None, list[Row]] = defaultdict(list)
        for row in facts.rows.values():
            self._below[row.parent].append(row)
        wholes = [row for row in facts.rows.values() if row.type == "whole"]
        self._want(
            len(wholes) == facts.submitted,
            "submits that became several workflows",
            facts.submitted,
            len(wholes),
        )
        for row in wholes:
            self._want(row.state == DONE, "workflows that are not complete", row)
            self._want(facts.told[row.id] > 0, "workflows without a mail", row)
        for row in facts.rows.values():
            if row.type in TYPES:
                self._audit_children(row)
        self._audit_ends()
        for message in facts.retried:
            self._want(
                DEATHS in message,
                "workflows failed for another reason than three deaths",
                message,
            )

    def _audit_children(self, row: Row) -> None:
        below = sorted(one for one in self._below[row.id] if one.type in TYPES)
        found = Counter(one.type for one in below)
        expected = CHILDREN.get(row.type, {})
        good = found == expected if row.state == DONE else found <= Counter(expected)
        self._want(good, "missing or doubled children", row, found)
        if row.state == DONE and good:
            wanted = self._expected(row, below)
            same = json.loads(row.result or "null") == wanted
            self._want(same, "results unlike those of children and steps", row, wanted)

    def _expected(self, row: Row, below: list[Row]) -> Any:
        """What a job has to return, by what is stored of its children and steps."""
        results = [json.loads(one.result or "null") for one in below]
        if row.type == "whole":
            a, *b, c = results
            steps = {name: self._kept.get((row.id, name)) for name in ("plan", "fee")}
            return {**steps, "a": a, "b": b, "c": c}
        if row.type == "leaf":
            return row.id
        drawn = self._kept.get((row.id, "plan"))
        return [drawn, *results] if row.type == "b" else {"place": row.id % 2, "drawn": drawn}

    def _audit_ends(self) -> None:
        done: dict[int, int] = {}
        for change in self.facts.changes:
            again = change.job in done and change.state == RUNNING
            self._want(not again, "children whose end was committed, run again", change)
            if change.state == DONE:
                done[change.job] = change.at
        kept = {(one.job, one.name): one.at for one in self.facts.kept}
        for mark in self.facts.marks:
            at = done.get(mark.job) if mark.what == "start" else kept.get((mark.job, mark.step))
            late = at is not None and mark.at_s * 1e6 > at
            what = "children" if mark.what == "start" else "steps"
            self._want(not late, f"{what} whose end was committed, run again", mark, at)


# A trial -----------------------------------------------------------------------------------------


class Trial:
    """Workflows on a daemon that is killed again and again."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rng = random.Random()
        self.postbox = Postbox()
        self._server = Controller(self.postbox, hostname="127.0.0.1", port=free_port())
        self._server.start()
        self.daemon = Victim(store.folder, store.url, self._server.port)
        self.submitted = 0
        #: Jobs that three kills have met and that were retried.
        self.retried: list[str] = []

    def __enter__(self) -> Self:
        self.daemon.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.kill9()
        self._server.stop()

    def kill(self, kills: int) -> None:
        for number in range(kills):
            self._fill()
            time.sleep(self.rng.uniform(*LIVES_S))
            self.daemon.kill9()
            if number % 5 == 4:
                self.daemon.stillborn(self.rng.uniform(0.1, 0.6))
            self.daemon.start()

    def _fill(self) -> None:
        """Have ABREAST workflows under way."""
        self._retry_the_dead()
        ended = Counter(job["state"] in FINAL for job in self.daemon.list("type:whole"))
        for _ in range(ABREAST - ended[False]):
            self.daemon.submit(f"whole n:{self.submitted} @key:{self.submitted}")
            self.submitted += 1

    def _retry_the_dead(self) -> None:
        """As an operator would: upq runs no job again that has met three deaths of the daemon."""
        for type in "whole", "notify":
            for job in self.daemon.list(f"type:{type} state:failed"):
                self.retried.append(job["message"])
                self.daemon.ask(f"retry {job['id']}")

    def settle(self) -> Facts:
        """Let all end; what is to be seen then."""

        def is_over() -> bool:
            self._retry_the_dead()
            jobs = self.daemon.ask("status")["jobs"]
            return not any(n for state, n in jobs.items() if state not in FINAL)

        with contextlib.suppress(AssertionError):  # the audit says which are stuck
            daemons.until(is_over, 60)
        assert self.daemon.end() == 0
        self.daemon.has_behaved()
        facts = read_facts(self.store.url)
        facts.marks = [Mark.of(line) for line in self.daemon.ledger]
        facts.told, facts.submitted, facts.retried = self.postbox.told, self.submitted, self.retried
        return facts


# Figures -----------------------------------------------------------------------------------------


def tell(report: Report, facts: Facts, kills: int) -> None:
    """What was seen, and whether it is as it has to be."""
    audit = Audit(facts)
    of = Counter(row.type for row in facts.rows.values())
    begun = Counter((mark.job, mark.step) for mark in facts.marks if mark.what == "step")
    report.fact("kills / workflows / jobs / steps", kills, of["whole"], of.total(), len(facts.kept))
    report.fact(
        "runs cut off: workflows / other jobs / steps",
        *(sum(r.starts - 1 for r in facts.rows.values() if (r.type == "whole") == w)
          for w in (True, False)),
        begun.total() - len(facts.kept),
    )  # fmt: skip
    report.fact("jobs that three deaths met, retried", len(facts.retried))
    report.fact("mails / doubled", facts.told.total(), facts.told.total() - len(facts.told))
    done = sum(row.type == "whole" and row.state == DONE for row in facts.rows.values())
    report.fact("complete", f"{100 * done / max(facts.submitted, 1):g} %")
    for rule in Audit.RULES:
        report.figure(rule, len(audit.found.get(rule, ())), 0)
        for what in audit.found.get(rule, ())[:3]:
            print(f"      {what[:1000]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.replay", description=__doc__)
    parser.add_argument("--db", choices=("sqlite", "postgres", "mariadb"), action="append")
    parser.add_argument("--kills", type=int, default=200)
    args = parser.parse_args()
    report = Report()
    for kind in args.db or ("sqlite", "postgres", "mariadb"):
        print(f"{kind}: kill -9, {args.kills} times")
        with new_store(kind) as store, Trial(store) as trial:
            trial.kill(args.kills)
            tell(report, trial.settle(), args.kills)
    print(f"missed: {', '.join(report.missed)}" if report.missed else "all goals reached")
    return bool(report.missed)


if __name__ == "__main__":
    sys.exit(main())
