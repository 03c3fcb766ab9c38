"""What a running job may ask of the daemon: queue other jobs and wait for them, show progress.

It is handed down to the jobs, so that calls only go down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Engine

from upq import log as logs
from upq.census import Census
from upq.errors import (
    IsCancelled,
    KeyTaken,
    NotFound,
    RequestError,
    Unavailable,
    Uncertain,
    UpqError,
    WrongState,
)
from upq.events import Event
from upq.intake import Intake
from upq.job import FINAL, Accepted, Job, NewJob
from upq.joins import waits_reason
from upq.plugins import UpqJob, wait_for
from upq.pool import Pool
from upq.queue import Queue
from upq.record import canonical, child_key, step_key
from upq.views import End, Views

log = logging.getLogger(__name__)

#: Seconds between two looks at a job that may end without a word, as when another daemon ends it.
LOOK_S = 5.0
#: Seconds between two tries to reach a database that is away.
AWAY_RETRY_S = 1.0
#: How often a step is tried to be stored that the database, which is there, does not take.
STEP_TRIES = 3
#: From so many waiting parents on, children are submitted by a few threads for all: one that has
#: committed by itself keeps 11 KiB in malloc's cache for as long as it lives.
CROWD, CLERKS = 32, 4


class Ends:
    """Lets threads wait for the end of a job; a subscriber of the bus."""

    def __init__(self, views: Views) -> None:
        self._views = views
        self._lock = threading.Lock()
        self._waiting: dict[int, list[threading.Event]] = {}

    def hear(self, events: Sequence[Event]) -> None:
        if not self._waiting:
            return
        with self._lock:
            woken = [w for e in events if e.state in FINAL for w in self._waiting.get(e.job, ())]
        for waiter in woken:
            waiter.set()

    def wait(
        self, id: int, timeout_s: float | None = None, alive: Callable[[], bool] | None = None
    ) -> End | None:
        """How the job has ended; None when the time is over or `alive` says False before.

        `alive` is asked once a second. Raises NotFound, Unavailable.
        """
        woken = threading.Event()
        over_s = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        step_s = LOOK_S if alive is None else 1.0
        with self._lock:
            self._waiting.setdefault(id, []).append(woken)
        try:
            while True:
                woken.clear()
                end = self._views.end(id)
                if end is not None:
                    return end
                looked_s = time.monotonic()
                while not woken.is_set():
                    now_s = time.monotonic()
                    if now_s >= over_s or (alive is not None and not alive()):
                        return None
                    if now_s - looked_s >= LOOK_S:
                        break
                    woken.wait(min(over_s - now_s, step_s))
        finally:
            with self._lock:
                self._waiting[id].remove(woken)
                if not self._waiting[id]:
                    del self._waiting[id]


class ChildEnd:
    """`finished` of a child: wait() gives the parent's place back meanwhile."""

    def __init__(self, desk: JobDesk, parent: UpqJob, id: int) -> None:
        self._desk = desk
        self._parent = parent
        self._id = id

    def is_set(self) -> bool:
        return self._desk.end(self._id) is not None

    def wait(self, timeout: float | None = None) -> bool:
        """True once the child has ended; False when `timeout` seconds are over. Never raises,
        unless the waiting job itself is ended meanwhile.
        """
        return self._desk.wait(self._parent, [self._id], timeout)


class JobChild:
    """A job that another one has queued."""

    def __init__(self, desk: JobDesk, parent: UpqJob, id: int, name: str) -> None:
        self.jobid = id
        self.jobname = name
        self.finished = ChildEnd(desk, parent, id)
        self._desk = desk
        self._ended: End | None = None

    @property
    def state(self) -> str:
        end = self._end()
        return end.state if end else self._desk.state(self.jobid)

    @property
    def result(self) -> Any:
        """What the child has stored; None before its end."""
        end = self._end()
        if end is not None and end.locked:
            raise Unavailable(end.locked)
        return end.result if end else None

    @property
    def msgstr(self) -> str:
        end = self._end()
        return end.message if end else ""

    @property
    def reason(self) -> str:
        """Why it has ended, where its state does not say it: "timeout", "crashed"."""
        end = self._end()
        return end.reason if end else ""

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for its end; its result. Raises ChildFailed; TimedOut after `timeout` seconds."""
        return wait_for(self, timeout)

    def _end(self) -> End | None:
        if self._ended is None:
            self._ended = self._desk.end(self.jobid)
        return self._ended


class JobDesk:
    """One for all jobs of a daemon."""

    def __init__(  # noqa: PLR0917, the daemon wires it
        self,
        queue: Queue,
        views: Views,
        ends: Ends,
        pools: Callable[[str, int], Pool | None],
        intake: Intake,
        census: Census,
    ) -> None:
        self._queue = queue
        self._views = views
        self._ends = ends
        self._pools = pools
        self._intake = intake
        self._census = census
        self._clerks = ThreadPoolExecutor(CLERKS, "clerk")
        self._counting = threading.Lock()
        # Parents that wait.
        self._waiting = 0

    @property
    def db(self) -> Engine:
        return self._queue.database.jobs

    def list_queues(self) -> list[dict[str, Any]]:
        return self._census.list_queues()

    def list_jobs(self, queue: str, limit: int) -> list[dict[str, Any]]:
        return self._census.list_jobs(queue, limit)

    def end(self, id: int) -> End | None:
        return self._views.end(id)

    def state(self, id: int) -> str:
        return str(self._views.job(id)["state"])

    def enqueue(
        self, parent: UpqJob, jobname: str, params: dict[str, Any], queue: str = ""
    ) -> JobChild:
        """Queue a child, or find the one that an interrupted run of the parent has queued.

        The n-th of the same type and params is the same job each time the parent runs.
        """
        job = self._running(parent, "enqueue_newjob")
        kind = f"{jobname} {canonical(params)}"
        parent.asked[kind] += 1
        key = child_key(parent.jobid, jobname, params, parent.asked[kind])
        try:
            id = self._find_child(job, key) if job.starts > 1 else None
            if id is None:
                new = NewJob(jobname, params, queue, submitter=job.submitter, parent=job.id,
                             root=job.root, child_key=key)  # fmt: skip
                id = self._submit(parent, new).id
        except IsCancelled:
            # Somebody has cancelled it by way of another daemon, and nobody here knows it yet.
            parent.cancel()
            raise
        parent.children.add(id)
        return JobChild(self, parent, id, jobname)

    def _submit(self, parent: UpqJob, new: NewJob) -> Accepted:
        def submit() -> Accepted:
            with logs.job(parent.jobname, parent.jobid, new.root):
                return self._intake.submit_child(new)

        return submit() if self._waiting < CROWD else self._clerks.submit(submit).result()

    def _find_child(self, job: Job, key: str) -> int | None:
        """What an earlier run has queued; queued again when it has failed and is to run again."""
        found = self._views.child(key)
        if found is None:
            return self._views.repeated(job.id, key)
        id, again = found
        if again:
            try:
                self._queue.retry(id, job.submitter, parent=job.id)
            except KeyTaken as taken:
                self._queue.check_repeat(job.id, taken.holder)
                return taken.holder
            except IsCancelled:
                raise
            except WrongState:
                log.debug("job %d was queued again by somebody else", id)
        return id

    def left_behind(self, parent: UpqJob) -> list[tuple[int, str, str]]:
        """Children of earlier runs that are unfinished and were not asked for in this one: id,
        type, state.
        """
        unfinished = self._views.unfinished_children(parent.jobid)
        return [one for one in unfinished if one[0] not in parent.children]

    def find_step(self, job: UpqJob, name: str, nth: int) -> list[Any] | None:
        """What the n-th step of this name has returned in an earlier run, in a list."""
        running = self._running(job, f"step {name}")
        return self._views.step(job.jobid, step_key(name, nth)) if running.starts > 1 else None

    def keep_step(self, job: UpqJob, name: str, nth: int, result: Any) -> None:
        """Store what a step has returned, once the database is there. Raises WrongState when the
        job's claim is lost.
        """
        running = self._running(job, f"step {name}")
        tries = 0
        while True:
            try:
                return self._queue.keep_step(running, step_key(name, nth), name, result)
            except (Unavailable, Uncertain):
                job.must_end()
                tries += not self._queue.writer.trouble
                if tries == STEP_TRIES or not job.may_wait():
                    raise
                time.sleep(AWAY_RETRY_S)

    def progress(self, job: UpqJob, progress: dict[str, Any]) -> None:
        self._queue.set_progress(job.jobid, job.token, progress)

    def wait(self, parent: UpqJob, ids: Sequence[int], timeout_s: float | None = None) -> bool:
        """Wait for the ends of jobs; the parent's place is free meanwhile. False when the time is
        over, or one of them is gone.
        """
        try:
            ids = self._views.unfinished(ids)
        except RequestError:
            log.warning("looking for the ends of jobs failed", exc_info=True)
        if not ids:
            return True
        job, pool = self._job(parent), self._pools(parent.jobname, parent.token)
        if job is None or pool is None or not parent.in_own_thread:
            # A helper thread of the job holds no place that could be given back.
            return self._wait_out(parent, ids, timeout_s)
        parent.show_progress()
        self._queue.set_reason(job, waits_reason(ids))
        self._count(1)
        pool.park(parent.token)
        try:
            return self._wait_out(parent, ids, timeout_s)
        finally:
            self._count(-1)
            pool.unpark(parent.token, at_once=lambda: not parent.may_wait())
            self._queue.set_reason(job, "")
            parent.must_end()

    def _count(self, more: int) -> None:
        with self._counting:
            self._waiting += more

    def _wait_out(self, parent: UpqJob, ids: Sequence[int], timeout_s: float | None) -> bool:
        over_s = None if timeout_s is None else time.monotonic() + timeout_s
        return all([self._wait_for(parent, id, over_s) for id in ids])

    def _wait_for(self, parent: UpqJob, id: int, over_s: float | None) -> bool:
        while True:
            left_s = None if over_s is None else max(over_s - time.monotonic(), 0)
            try:
                return self._ends.wait(id, left_s, parent.may_wait) is not None
            except NotFound:
                return False
            except RequestError:  # the database is away: go on waiting
                if left_s == 0 or not parent.may_wait():
                    return False
                time.sleep(AWAY_RETRY_S)

    def _running(self, parent: UpqJob, what: str) -> Job:
        job = self._job(parent)
        if job is None:
            raise UpqError(f"{what}: this job does not run")
        return job

    def _job(self, parent: UpqJob) -> Job | None:
        pool = self._pools(parent.jobname, parent.token)
        return pool.job(parent.token) if pool else None
