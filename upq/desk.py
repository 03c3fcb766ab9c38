"""What a running job may ask of the daemon: queue other jobs and wait for them, show progress.

It is handed down to the jobs, so that calls only go down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sqlalchemy import Engine

from upq.errors import IsCancelled, KeyTaken, NotFound, RequestError, Unavailable, UpqError
from upq.events import Event
from upq.job import FINAL, Accepted, Job, NewJob
from upq.plugins import UpqJob
from upq.pool import Pool
from upq.queue import Queue
from upq.record import canonical, child_key
from upq.views import End, Views

log = logging.getLogger(__name__)

#: Seconds between two looks at a job that may end without a word, as when another daemon ends it.
LOOK_S = 5.0


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
            woken = [self._waiting.get(e.job, []) for e in events if e.state in FINAL]
        for waiters in woken:
            for waiter in waiters:
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


class FrontDesk(Protocol):
    """The part of the dispatcher that jobs reach, handed down."""

    def submit_child(self, new: NewJob) -> Accepted: ...
    def list_queues(self) -> list[dict[str, Any]]: ...
    def list_jobs(self, queue: str, limit: int) -> list[dict[str, Any]]: ...


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
        return self._desk.wait(self._parent, self._id, timeout)


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

    def _end(self) -> End | None:
        if self._ended is None:
            self._ended = self._desk.end(self.jobid)
        return self._ended


class JobDesk:
    """One for all jobs of a daemon."""

    def __init__(
        self,
        queue: Queue,
        views: Views,
        ends: Ends,
        pools: Callable[[str, int], Pool | None],
        front: FrontDesk,
    ) -> None:
        self._queue = queue
        self._views = views
        self._ends = ends
        self._pools = pools
        self._front = front

    @property
    def db(self) -> Engine:
        return self._queue.database.jobs

    def list_queues(self) -> list[dict[str, Any]]:
        return self._front.list_queues()

    def list_jobs(self, queue: str, limit: int) -> list[dict[str, Any]]:
        return self._front.list_jobs(queue, limit)

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
        job = self._job(parent)
        if job is None:
            raise UpqError("enqueue_newjob: this job does not run")
        try:
            return self._enqueue(parent, job, jobname, params, queue)
        except IsCancelled:
            # Somebody has cancelled it by way of another daemon, and nobody here knows it yet.
            parent.cancel()
            raise

    def _enqueue(
        self, parent: UpqJob, job: Job, jobname: str, params: dict[str, Any], queue: str
    ) -> JobChild:
        kind = f"{jobname} {canonical(params)}"
        parent.asked[kind] += 1
        key = child_key(parent.jobid, jobname, params, parent.asked[kind])
        if job.starts > 1:
            found = self._views.child(key)
            if found is not None:
                id, again = found
                if again:
                    try:
                        self._queue.retry(id, job.submitter, parent=job.id)
                    except KeyTaken as taken:
                        id = taken.holder
                        self._queue.check_repeat(job.id, id)
                return JobChild(self, parent, id, jobname)
        new = NewJob(jobname, params, queue, submitter=job.submitter, parent=job.id, root=job.root,
                     child_key=key)  # fmt: skip
        return JobChild(self, parent, self._front.submit_child(new).id, jobname)

    def progress(self, job: UpqJob, progress: dict[str, Any]) -> None:
        self._queue.set_progress(job.jobid, job.token, progress)

    def wait(self, parent: UpqJob, id: int, timeout_s: float | None) -> bool:
        """Wait for a job's end; the parent's place is free meanwhile."""
        try:
            if self._views.end(id) is not None:
                return True
        except RequestError:
            log.warning("looking for the end of job %d failed", id, exc_info=True)
        job, pool = self._job(parent), self._pools(parent.jobname, parent.token)
        if job is None or pool is None or not parent.in_own_thread:
            # A helper thread of the job holds no place that could be given back.
            return self._wait_out(parent, id, timeout_s)
        self._queue.set_reason(job, f"waits for {id}")
        pool.park(parent.token)
        try:
            return self._wait_out(parent, id, timeout_s)
        finally:
            pool.unpark(parent.token, at_once=not parent.may_wait())
            self._queue.set_reason(job, "")
            parent.must_end()

    def _wait_out(self, parent: UpqJob, id: int, timeout_s: float | None) -> bool:
        over_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if over_s is None else max(over_s - time.monotonic(), 0)
            try:
                return self._ends.wait(id, left_s, parent.may_wait) is not None
            except NotFound:
                return False
            except RequestError:  # the database is away: go on waiting
                if left_s == 0 or not parent.may_wait():
                    return False
                time.sleep(1.0)

    def _job(self, parent: UpqJob) -> Job | None:
        pool = self._pools(parent.jobname, parent.token)
        return pool.job(parent.token) if pool else None
