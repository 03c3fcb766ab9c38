"""What a job is made of: the class `UpqJob`, and what it may ask of others.

Which types exist is said by the configuration; running them is the runner's.
"""

from __future__ import annotations

import io
import json
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from upq.errors import BadParams, ChildFailed, TimedOut, TooLong, UpqError
from upq.interrupt import Door
from upq.job import DONE, FINAL, RESULT_LIMIT_BYTES, Chain, Output, encode
from upq.output import OUTPUT_LIMIT_BYTES, Clipped, Piece
from upq.params import ParamSpec
from upq.secret import scrub
from upq.steps import Steps

if TYPE_CHECKING:
    from sqlalchemy import Engine

#: Characters that the messages of one attempt may add up to.
MESSAGE_LIMIT = 1 << 20
#: Seconds between two progress reports that are stored.
PROGRESS_S = 0.5
#: Characters that the name of a step may have.
STEP_CHARS = 200


class Finished(Protocol):
    """What a job sees of another's end."""

    def is_set(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool: ...


class Child(Protocol):
    """A job that another one has queued, as `enqueue_newjob` returns it."""

    @property
    def jobid(self) -> int: ...
    @property
    def jobname(self) -> str: ...
    @property
    def finished(self) -> Finished: ...
    @property
    def state(self) -> str: ...
    @property
    def result(self) -> Any: ...
    @property
    def msgstr(self) -> str: ...
    @property
    def reason(self) -> str: ...
    def wait(self, timeout: float | None = None) -> Any: ...


class Desk(Protocol):
    """What a running job may ask of the daemon; handed down to it, so that calls only go down."""

    @property
    def db(self) -> Engine: ...
    def enqueue(
        self, parent: UpqJob, jobname: str, params: dict[str, Any], queue: str = ""
    ) -> Child: ...
    def wait(self, parent: UpqJob, ids: Sequence[int], timeout_s: float | None = None) -> bool: ...
    def left_behind(self, parent: UpqJob) -> list[Any]: ...
    def find_step(self, job: UpqJob, name: str, nth: int) -> list[Any] | None: ...
    def keep_step(self, job: UpqJob, name: str, nth: int, result: Any) -> None: ...
    def progress(self, job: UpqJob, progress: dict[str, Any]) -> None: ...
    def list_queues(self) -> list[dict[str, Any]]: ...
    def list_jobs(self, queue: str, limit: int) -> list[dict[str, Any]]: ...


class Flag:
    """A threading.Event that is made only when somebody waits for it: few jobs do."""

    __slots__ = ("_event", "_is_set")
    _making = threading.Lock()

    def __init__(self) -> None:
        self._is_set = False
        self._event: threading.Event | None = None

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        if self._event is not None:
            self._event.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set, at the latest after so many seconds."""
        if not self._is_set:
            with self._making:
                if self._event is None:
                    self._event = threading.Event()
            if not self._is_set:  # it was not before the event could be seen
                self._event.wait(timeout)
        return self._is_set


def wait_for(job: Child, timeout_s: float | None) -> Any:
    """Wait for a child; its result. Raises ChildFailed, or TimedOut when the time is over."""
    job.finished.wait(timeout_s)
    state = job.state
    if state not in FINAL:
        raise TimedOut(f"{job.jobname} {job.jobid} is still {state}")
    if state != DONE:
        raise failure(job)
    return job.result


def failure(job: Child) -> ChildFailed:
    return ChildFailed(job.jobid, job.jobname, job.state, job.msgstr or job.reason)


class UpqJob(Steps):
    """Base of every job: override `run()`, and `check()` where a job may be refused.

    An instance lives for one `check()`, or for one `check()` and `run()` in the same thread.
    """

    #: False for a type that is answered from its `check()` and never queued.
    queued = True
    #: The queue it has come from: one type may mean different things in different queues.
    jobqueue: str = ""
    #: Seconds that an attempt may take; 0 for no limit.
    timeout_s: float = 0.0
    #: "cancel" or "timeout", once upq has begun to end the attempt for that.
    ended_by: str | None = None
    #: Where it can be interrupted, if it runs in a thread.
    door: Door | None = None
    #: What the class's annotations declare, each of them an attribute of the job: see `Loader`.
    declared: ParamSpec | None = None

    def __init__(
        self,
        jobname: str,
        jobdata: dict[str, Any],
        jobcfg: Mapping[str, str] | None = None,
        *,
        jobid: int = -1,
        desk: Desk | None = None,
        chain: Chain = (),
        attempt: int = 1,
        output_limit_bytes: int = OUTPUT_LIMIT_BYTES,
    ) -> None:
        self.jobname = jobname
        #: The parameters; what `run()` changes here reaches the next attempt and the subjobs.
        self.jobdata = jobdata
        #: Every variable of the type's section in the ini file, as text, and the names of its
        #: own that [paths] has.
        self.jobcfg: Mapping[str, str] = jobcfg or {}
        #: -1 until the job is queued.
        self.jobid = jobid
        #: What `msg()` has collected; it goes into the reply, the log and the notification.
        self.msgstr = ""
        #: Stored with the job (JSON, at most 1 MiB); wins over what `run()` returns.
        self.result: Any = None
        #: Attempts before this one.
        self.retries = attempt - 1
        self.finished = Flag()
        #: Set when somebody asked for this job to end; long jobs look at it now and then.
        self.cancel_event = Flag()
        #: Set by a daemon that stops: the attempt will be made again and does not count.
        self.interrupted = False
        #: The claim, while it runs; a command's processes carry it.
        self.token = 0
        #: How many jobs of each kind this attempt has queued: what names them after a crash.
        self.asked: dict[str, int] = defaultdict(int)
        #: These jobs.
        self.children: set[int] = set()
        self._steps: dict[str, int] = defaultdict(int)
        self._chain = list(chain)
        self._desk = desk
        self._output_limit_bytes = output_limit_bytes
        self._output: Clipped | None = None
        self._notify_asked: list[bool] = []
        #: Texts that its output must not hold: what secret parameters are.
        self.hidden: Sequence[str] = ()
        self._thread_ident = threading.get_ident()
        self._progress_at_s = 0.0
        self.last_progress: dict[str, Any] | None = None
        #: The last report, if it came too soon to be stored.
        self._unshown: dict[str, Any] | None = None
        #: Sees to it that the job ends once `cancel()` has asked for it.
        self.ender: Callable[[UpqJob], None] | None = None
        if self.declared is not None:
            self._set_params(self.declared)

    def _set_params(self, declared: ParamSpec) -> None:
        for param in declared.params:
            value = self.jobdata.get(param.name)
            is_path = param.type == "path" and isinstance(value, str)
            setattr(self, param.name, Path(str(value)) if is_path else value)

    # What a job class overrides.

    def check(self) -> Any:
        """Say whether the job can be accepted: False, with `msg()`, refuses; all else accepts.

        Runs before the ACK, and again just before `run()` on the object that runs. Quick, and
        changes nothing.
        """
        return True

    def run(self) -> Any:
        """Do the work. False or an exception is failure; anything else, None too, is success.

        What is returned (other than True and None) becomes the result unless `self.result` is set.
        """
        return True

    # What a job class calls.

    @property
    def logger(self) -> logging.Logger:
        return logging.getLogger(f"upq.jobs.{self.jobname}")

    @property
    def thread(self) -> str:
        return threading.current_thread().name

    @property
    def args(self) -> list[str]:
        """The words given without a colon: `50` in `verify_local_file 50`."""
        return [key for key, value in self.jobdata.items() if value == ""]

    @property
    def in_own_thread(self) -> bool:
        """Whether the caller is the thread that runs the job."""
        return self._thread_ident == threading.get_ident()

    @property
    def cancelled(self) -> bool:
        """True once somebody asked for this job to end."""
        return self.cancel_event.is_set()

    @property
    def output(self) -> io.TextIOBase:
        """A text file kept with the job, head and tail up to the type's limit."""
        return self.capture()

    def capture(self) -> Clipped:
        if self._output is None:
            self._output = Clipped(self._output_limit_bytes, self.hidden)
        return self._output

    def written(self, start: int) -> Piece:
        """What the job has written from byte `start` on; any thread may ask while it runs."""
        return self._output.since(start) if self._output is not None else Piece("", 0, 0)

    def captured(self) -> Output | None:
        return self._output.kept() if self._output is not None else None

    @property
    def db(self) -> Engine:
        """An SQLAlchemy engine for the job's own tables; never the file the queue is in."""
        return self._need_desk().db

    def cancel(self) -> None:
        """Ask the job to end, from any thread; it sees that as `self.cancelled`."""
        self.cancel_event.set()
        if self.ender is not None:
            self.ender(self)

    def may_wait(self) -> bool:
        """Whether a wait for another job may go on: not when this one is to be interrupted."""
        return self.door is None or not self.door.wanted

    def must_end(self) -> None:
        """After such a wait, in the job's own thread: raises Interrupted when it was broken off."""
        if self.door is not None and self.door.wanted:
            self.door.come_out()

    def msg(self, text: object) -> None:
        """Add to the job's message; never raises, and what is over the limit is left out."""
        room = MESSAGE_LIMIT - len(self.msgstr)
        self.msgstr += str(text)[: max(room, 0)]

    def getcfg(self, name: str, default: Any = None) -> Any:
        """A variable of the type's section, or the default."""
        return self.jobcfg.get(name, default)

    def progress(self, done: float, total: float | None = None, text: str = "") -> None:
        """Show how far the job is. Cheap to call often: two a second are stored, and the last.

        What was said before a wait for another job is stored, too.
        """
        for number in (done, total):
            if number is not None and not (
                isinstance(number, int | float) and math.isfinite(number)
            ):
                self.logger.warning("progress(%r, %r): no numbers, left out", done, total)
                return
        text = scrub(str(text), self.hidden)
        self.last_progress = self._unshown = {"done": done, "total": total, "text": text}
        if time.monotonic() - self._progress_at_s >= PROGRESS_S:
            self.show_progress()

    def show_progress(self) -> None:
        """Have the last report stored, however soon it came: none may follow for long."""
        if self._unshown is not None:
            self._need_desk().progress(self, self._unshown)
            self._unshown, self._progress_at_s = None, time.monotonic()

    def append_job(self, jobname: str, params: Mapping[str, Any] | None = None) -> None:
        """Put a step in front of those that follow this job; params join the shared jobdata."""
        self._must_be_outside("append_job")
        self._chain.insert(0, jobname)
        self.jobdata.update(params or {})

    def enqueue_newjob(
        self, jobname: str, params: Mapping[str, Any] | None = None, *, queue: str = ""
    ) -> Child:
        """Queue another job and return it; `finished.wait()` on it gives this job's place back.

        queue: instead of the one that its type's section says.

        Only the job's own thread may call it. After a crash the same calls return the same jobs.
        """
        if not self.in_own_thread:
            raise UpqError("enqueue_newjob: only the job's own thread may queue jobs")
        self._must_be_outside("enqueue_newjob")
        given = dict(params or {})
        try:
            encode(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadParams(f"{jobname}: its params are no JSON: {error}") from None
        return self._need_desk().enqueue(self, jobname, given, queue)

    def submit(
        self,
        jobname: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        queue: str = "",
        **more: Any,
    ) -> Child:
        """`enqueue_newjob` with the params as keywords; one called `queue` comes in `params`."""
        return self.enqueue_newjob(jobname, {**(params or {}), **more}, queue=queue)

    def gather(self, jobs: Iterable[Child], *, return_failed: bool = False) -> list[Any]:
        """Wait for children; their results in the order given. All have ended then, in any case.

        Raises ChildFailed, which names each that is not done; with return_failed there is one in
        the list for each of them.
        """
        jobs = list(jobs)
        self._need_desk().wait(self, [job.jobid for job in jobs])
        ends = [job.result if job.state == DONE else failure(job) for job in jobs]
        failed = [end for end in ends if isinstance(end, ChildFailed)]
        if failed and not return_failed:
            first = failed[0]
            raise ChildFailed(first.id, first.type, first.state, first.message, failed[1:])
        return ends

    def enqueue_job(self) -> None:
        """Kept for jobs of the first upq: a check() that does not refuse queues by itself."""

    def notify(self, succeed: bool) -> None:
        """Also send the type's notifications for success or failure when this attempt ends."""
        self._notify_asked.append(bool(succeed))

    def find_step(self, name: str) -> tuple[int, list[Any] | None]:
        if not isinstance(name, str) or not 0 < len(name) <= STEP_CHARS:
            raise UpqError(f"step: a name of 1 to {STEP_CHARS} characters, not {name!r:.300}")
        if not self.in_own_thread:
            raise UpqError(f"step {name}: only the job's own thread may take steps")
        self._must_be_outside(f"step {name}")
        desk = self._need_desk()
        self._steps[name] += 1
        return self._steps[name], desk.find_step(self, name, self._steps[name])

    def keep_step(self, name: str, nth: int, result: Any) -> Any:
        try:
            text = encode(result)
        except (TypeError, ValueError, RecursionError) as error:
            raise UpqError(f"step {name}: what it returns is no JSON: {error}") from None
        if len(text) > RESULT_LIMIT_BYTES:
            raise TooLong(
                f"step {name}: what it returns has {len(text)} bytes, more than"
                f" {RESULT_LIMIT_BYTES}"
            )
        value = json.loads(text)
        self._need_desk().keep_step(self, name, nth, value)
        return value

    def _must_be_outside(self, what: str) -> None:
        """What a step does besides its work would be missing when its result is only looked up."""
        if self.in_step:
            raise UpqError(f"{what}: not inside step {self.in_step}")

    def _need_desk(self) -> Desk:
        if self._desk is None:
            raise UpqError(f"{self.jobname}: this object does not run in a daemon")
        if self.door is not None and self.door.given_up:
            raise UpqError(f"job {self.jobid} was given up: it can ask for nothing any more")
        return self._desk

    def __str__(self) -> str:
        return f"Job: {self.jobname} id:{self.jobid} thread: {self.thread}"


#: What every job has; no parameter of a class can be called so.
ATTRIBUTES = frozenset((*dir(UpqJob), *vars(UpqJob("", {}))))


def follow_up(job: UpqJob) -> tuple[Chain, list[bool]]:
    """The steps still to come after this job, and the notifications it asked for itself."""
    return job._chain, job._notify_asked
