"""Runs jobs of `jobs/` as the daemon does, without a daemon."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine

from upq import Abort, Retry, UpqJob
from upq.db import Database
from upq.errors import Refused
from upq.loader import Loader

JOBS_DIR = Path(__file__).parents[1] / "jobs"
#: Modules there that are no jobs.
SHARED = {"catalogue", "ftp", "moving", "places", "web"}


class FakeDesk:
    """What a job may ask of the daemon; remembers what was asked."""

    def __init__(self, db: Engine) -> None:
        self.db = db
        self.enqueued: list[tuple[str, dict[str, Any]]] = []
        self.progressed: list[dict[str, Any]] = []
        self.queues: list[dict[str, Any]] = []
        self.jobs: list[dict[str, Any]] = []
        #: Says why a job that is enqueued is refused; "" when it is not.
        self.judge: Callable[[str, dict[str, Any]], str] = lambda jobname, params: ""

    def enqueue(self, parent: UpqJob, jobname: str, params: dict[str, Any], queue: str = "") -> Any:
        if why := self.judge(jobname, params):
            raise Refused(why)
        self.enqueued.append((jobname, params))

    def progress(self, job: UpqJob, progress: dict[str, Any]) -> None:
        self.progressed.append(progress)

    def list_queues(self) -> list[dict[str, Any]]:
        return self.queues

    def list_jobs(self, queue: str, limit: int) -> list[dict[str, Any]]:
        return [job for job in self.jobs if job["queue"] == queue][:limit]


class Ended(NamedTuple):
    #: "done", "failed" (False), "retry" or "abort" (raised), "refused" (by check).
    state: str
    message: str
    result: Any
    #: jobdata as the run left it: what the next attempt and the next step of a chain get.
    data: dict[str, Any]


class Jobs:
    """The shipped jobs over one database."""

    def __init__(self, db: Engine) -> None:
        self.desk = FakeDesk(db)
        self.loader = Loader(JOBS_DIR)

    def make(self, name: str, params: dict[str, Any], jobid: int = -1, **jobcfg: str) -> UpqJob:
        # Through JSON, as params reach a job that was stored.
        data = json.loads(json.dumps(params))
        return self.loader.load(name)(name, data, jobcfg, jobid=jobid, desk=self.desk)

    def submit(self, name: str, params: dict[str, Any] | None = None, **jobcfg: str) -> str:
        """What the submit is answered: "" when the job is accepted, the reason when it is not."""
        job = self.make(name, params or {}, -1, **jobcfg)
        return "" if job.check() is not False else job.msgstr

    def run(
        self, name: str, params: dict[str, Any] | None = None, jobid: int = 1, **jobcfg: str
    ) -> Ended:
        """One attempt of a job that was queued."""
        return perform(self.make(name, params or {}, jobid, **jobcfg))


def perform(job: UpqJob) -> Ended:
    if job.check() is False:
        return Ended("refused", job.msgstr, None, job.jobdata)
    state, said = "done", ""
    try:
        if job.run() is False:
            state = "failed"
    except (Retry, Abort) as error:
        state, said = type(error).__name__.lower(), str(error)
    data = json.loads(json.dumps(job.jobdata))
    return Ended(state, job.msgstr + said, json.loads(json.dumps(job.result)), data)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """The shipped jobs over SQLite, with an engine as the daemon makes it."""
    database = Database(f"sqlite:///{tmp_path}/upq.db", jobs_file=tmp_path / "jobs.db")
    yield Jobs(database.jobs)
    database.close()
