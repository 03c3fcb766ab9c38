"""What a job is made of: the class `UpqJob`, and finding `jobs/name.py` with its class `Name`.

Which types exist is said by the configuration; running them is the runner's.
"""

from __future__ import annotations

import grp
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import pwd
import re
import stat
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from upq.errors import BadParams, Broken, ChildFailed, TimedOut, TooLong, UpqError
from upq.interrupt import Door
from upq.job import DONE, FINAL, RESULT_LIMIT_BYTES, Chain, Output, encode
from upq.params import ParamSpec
from upq.secret import MASK, SHORT, open_end, scrub
from upq.steps import Steps

if TYPE_CHECKING:
    from sqlalchemy import Engine

#: Characters that the messages of one attempt may add up to.
MESSAGE_LIMIT = 1 << 20
#: Bytes of captured output kept of one attempt: half of it head, half of it tail.
OUTPUT_LIMIT_BYTES = 1 << 20
#: Characters of a write that are made bytes at a time.
WRITE_CHARS = 1 << 16
#: Seconds between two progress reports that are stored.
PROGRESS_S = 0.5
#: Characters that the name of a step may have.
STEP_CHARS = 200
#: The private package that job modules live in: a job called `json` is not the library.
PACKAGE = "upq_jobs"

log = logging.getLogger(__name__)


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


class Piece(NamedTuple):
    """A part of an output: text, the byte at which the next part begins, and all that there is."""

    text: str
    next: int
    size_bytes: int


def gap(left_out: int) -> bytes:
    return f"\n[... {left_out or 'some'} bytes left out ...]\n".encode()


def piece(head: bytes, tail: bytes, size: int, start: int) -> Piece:
    """An output from byte `start` on, of which head and tail were kept."""
    tail_start = size - len(tail)
    found = bytes(head[start:])
    if start < tail_start:
        left_out = tail_start - max(start, len(head))
        found += (gap(left_out) if left_out else b"") + tail
    else:
        found += tail[start - tail_start :]
    # Half a character is for the next time.
    for back in range(1, min(3, len(found)) + 1):
        if found[-back] >= 0xC0:
            if back < 2 + (found[-back] >= 0xE0) + (found[-back] >= 0xF0):
                found, size = found[:-back], size - back
            break
        if found[-back] < 0x80:
            break
    return Piece(found.decode("utf-8", "replace"), max(size, start), max(size, start))


def stored_piece(text: str, size: int, start: int) -> Piece:
    """The same of an output that was stored."""
    for found in re.finditer(r"\n\[\.\.\. ([0-9]+) bytes left out \.\.\.\]\n", text):
        head, tail = text[: found.start()].encode(), text[found.end() :].encode()
        if len(head) + int(found[1]) + len(tail) == size:
            return piece(head, tail, size, start)
    return piece(text.encode(), b"", len(text.encode()), start)


class Clipped(io.TextIOBase):
    """A text file that keeps the first and the last half of its limit and counts the rest.

    Any thread may write; memory stays below twice the limit whatever is written. What holds one
    of the `hidden` texts has *** in its place, also when it comes in several writes.
    """

    def __init__(self, limit_bytes: int = OUTPUT_LIMIT_BYTES, hidden: Sequence[str] = ()) -> None:
        self._hidden = [text.encode("utf-8", "replace") for text in hidden]
        # The end of what was written, which may be the beginning of a hidden text.
        self._pending = b""
        self._half = max(limit_bytes // 2, 1)
        self._head = bytearray()
        self._tail = bytearray()
        self._size = 0
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        for start in range(0, len(text), WRITE_CHARS):
            self.write_bytes(text[start : start + WRITE_CHARS].encode("utf-8", "replace"))
        return len(text)

    def write_bytes(self, data: bytes) -> None:
        with self._lock:
            if self._hidden:
                data = self._pending + data
                for text in self._hidden:
                    data = data.replace(text, MASK.encode())
                cut = len(data) - open_end(data, self._hidden)
                data, self._pending = data[:cut], data[cut:]
            rest = memoryview(data)  # so that no part of it is copied on the way
            self._size += len(data)
            room = self._half - len(self._head)
            if room > 0:
                self._head += rest[:room]
                rest = rest[room:]
            self._tail += rest[-2 * self._half :]
            if len(self._tail) > 2 * self._half:
                del self._tail[: -self._half]

    def kept(self) -> Output | None:
        """What was written, or None when nothing was."""
        with self._lock:
            end = self._pending if len(self._pending) <= SHORT else MASK.encode()
            size, half = self._size + len(end), self._half
            if not size:
                return None
            head, tail = bytes(self._head), bytes((self._tail + end)[-half:])
        left_out = size - len(head) - len(tail)
        if not left_out:
            whole = readable(head + tail)
            if len(whole) <= 2 * half:
                return Output(whole.decode(), size, False)
        text = readable(head)[:half] + gap(left_out) + readable(tail)[-half:]
        return Output(text.decode("utf-8", "ignore"), size, True)

    def since(self, start: int) -> Piece:
        """What was written from byte `start` on, as far as it is kept."""
        with self._lock:
            return piece(bytes(self._head), bytes(self._tail), self._size, start)


def readable(data: bytes) -> bytes:
    """As text that every database takes; what is binary may get longer by that."""
    return data.decode("utf-8", "replace").replace("\0", "\\0").encode()


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


class SourceLoader(importlib.machinery.SourceFileLoader):
    """Reads and writes no `__pycache__`, which others might be able to write."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError("never cached")


class JobFinder:
    """Imports `upq_jobs.<name>` from one folder, and only files that others cannot change.

    Never looks at sys.path. One at a time is installed, by `Loader`.
    """

    def __init__(self, jobs_dir: Path) -> None:
        self.jobs_dir = jobs_dir

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != PACKAGE or not name:
            return None
        file = self.jobs_dir / f"{name}.py"
        if not file.exists():
            return None
        refuse_unsafe(file, self.jobs_dir)
        loader = SourceLoader(fullname, str(file))
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


def refuse_unsafe(file: Path, jobs_dir: Path) -> None:
    """Raise Broken when anyone but root and this user could have written the file."""
    real = file.resolve()
    if not real.is_relative_to(jobs_dir.resolve()):
        raise Broken(f"{file}: leads out of {jobs_dir}")
    for part in (real, *real.parents):
        info = part.stat()
        sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
        shared = info.st_mode & stat.S_IWGRP and not is_private_group(info.st_uid, info.st_gid)
        if (shared or info.st_mode & stat.S_IWOTH) and not sticky:
            raise Broken(f"{part}: others can write it (chmod go-w)")
        if info.st_uid not in (0, os.getuid()):
            raise Broken(f"{part}: owned by uid {info.st_uid}, not by root or uid {os.getuid()}")


def is_private_group(uid: int, gid: int) -> bool:
    """Whether the group is the user's own, as Debian makes one for each user."""
    try:
        group = grp.getgrgid(gid)
        return group.gr_name == pwd.getpwuid(uid).pw_name and not group.gr_mem
    except KeyError:
        return False


class Loader:
    """Loads job classes from one folder, each guarded: a broken module disables its own type."""

    def __init__(self, jobs_dir: Path) -> None:
        self.jobs_dir = jobs_dir
        self._install()

    def has(self, name: str) -> bool:
        return (self.jobs_dir / f"{name}.py").exists()

    def load(self, name: str) -> type[UpqJob]:
        """The class `Name` of `name.py`. Raises Broken, which names file and line."""
        module_name = f"{PACKAGE}.{name}"
        file = self.jobs_dir / f"{name}.py"
        if not file.exists():
            raise Broken(f"{file}: no such file")
        try:
            module = importlib.import_module(module_name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # even sys.exit() at import breaks only its own type
            raise Broken(blame(error, file)) from error
        found = getattr(module, name[:1].upper() + name[1:], None)
        if not (isinstance(found, type) and issubclass(found, UpqJob)):
            raise Broken(f"{file}: no class {name[:1].upper() + name[1:]}(UpqJob)")
        try:
            found.declared = ParamSpec.of(found, ATTRIBUTES)
        except ValueError as error:
            raise Broken(f"{file}:{line_of(found, str(error))}: {error}") from None
        return found

    def _install(self) -> None:
        """Forget the modules of an earlier loader: a reload finds the files as they are now."""
        for name in [n for n in sys.modules if n.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, JobFinder)]
        package = ModuleType(PACKAGE)
        package.__path__ = [str(self.jobs_dir)]
        sys.modules[PACKAGE] = package
        sys.meta_path.insert(0, JobFinder(self.jobs_dir))


def blame(error: BaseException, file: Path) -> str:
    """`file:line: what`, with the line in the job's own file where there is one."""
    if isinstance(error, Broken):
        return str(error)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    try:
        text = str(error)
    except Exception:  # of the job's own making
        text = "its text cannot be had"
    return f"{raised_at(error, file) or file}: {type(error).__name__}: {text}"


def raised_at(error: BaseException, file: Path) -> str:
    """`file:line` of the job's own code that an error came through last; "" when none did."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if Path(frame.filename).parent == file.parent]
    return f"{lines[-1].filename}:{lines[-1].lineno}" if lines else ""


def line_of(cls: type, fault: str) -> int:
    """The line of the annotation that a fault begins with, else that of the class."""
    try:
        lines, start = inspect.getsourcelines(cls)
    except (OSError, TypeError):
        return 1
    name = fault.partition(":")[0]
    found = [n for n, line in enumerate(lines, start) if line.strip().startswith(f"{name}:")]
    return found[0] if found else start


def follow_up(job: UpqJob) -> tuple[Chain, list[bool]]:
    """The steps still to come after this job, and the notifications it asked for itself."""
    return job._chain, job._notify_asked
