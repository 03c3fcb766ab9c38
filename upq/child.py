"""A child process: runs the jobs of one type for the daemon, one after the other.

JSON lines go over a socket it has inherited: a job comes in; what the job asks and shows goes out,
and in the end the report. A second socket carries requests to end, and closes with the daemon.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upq.attempt import BROKEN, INTERRUPTED, Report, left, perform, said, with_fault
from upq.errors import RequestError, UpqError
from upq.interrupt import Door, Interrupted
from upq.job import FINAL
from upq.keeper import Keeper
from upq.loader import Loader, blame
from upq.output import Clipped
from upq.plugins import UpqJob, follow_up, wait_for
from upq.trees import TOKEN

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from upq.db import Database

#: Bytes that one line may have.
LINE_LIMIT_BYTES = 16 << 20
#: Characters of output that wait for the end of their line.
LINE_CHARS = 8192

_ERRORS = {error.code: error for error in RequestError.__subclasses__()}
_dumps = json.JSONEncoder(separators=(",", ":")).encode


class Lines:
    """JSON objects, one a line, both ways over a socket. Any thread may send, one reads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._whole: deque[bytes] = deque()
        self._rest = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        data = _dumps(message).encode() + b"\n"
        with self._sending:
            self._sock.sendall(data)

    def take(self) -> dict[str, Any] | None:
        """The next message that is here already. Raises ValueError when it is none."""
        if not self._whole:
            return None
        message = json.loads(self._whole.popleft())
        if not isinstance(message, dict):
            raise ValueError("no JSON object")
        return message

    def fill(self) -> bool:
        """Wait for more; False at the end. Raises ValueError for a line without end."""
        try:
            data = self._sock.recv(1 << 16)
        except ConnectionResetError:
            return False
        head, newline, tail = data.rpartition(b"\n")
        if newline:
            self._whole.extend((bytes(self._rest) + head).split(b"\n"))
            self._rest = bytearray(tail)
        else:
            self._rest += data
        if len(self._rest) > LINE_LIMIT_BYTES:
            raise ValueError("a line without end")
        return bool(data)

    def next(self) -> dict[str, Any] | None:
        """Wait for the next message; None at the end."""
        while (message := self.take()) is None:
            if not self.fill():
                return None
        return message

    def close(self) -> None:
        self._sock.close()


class Sent(Clipped):
    """`self.output` here: goes to the daemon, which keeps head and tail of it."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines
        self._waiting: list[str] = []
        self._chars = 0
        self._adding = threading.Lock()

    def write(self, text: str, /) -> int:
        with self._adding:
            self._waiting.append(text)
            self._chars += len(text)
            if "\n" in text or self._chars > LINE_CHARS:
                self._send()
        return len(text)

    def write_bytes(self, data: bytes) -> None:
        self.write(data.decode("utf-8", "replace"))

    def flush(self) -> None:
        with self._adding:
            self._send()

    def _send(self) -> None:
        text = "".join(self._waiting)
        self._waiting.clear()
        self._chars = 0
        for start in range(0, len(text), 1 << 16):
            self._lines.send({"output": text[start : start + (1 << 16)]})


class Printed(io.TextIOBase):
    """Standard output and errors: what a job prints is its output."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        job = self._worker.job
        return job.output.write(text) if job is not None else len(text)


class Logged(logging.Handler):
    """Log lines go to the daemon's log."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception as error:  # a job's mistake in a log call: its text still gets out
            text = f"{record.msg!s} [not formatted: {error!r}]"
        trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
        trace += record.stack_info or ""
        self._lines.send({"log": [record.name, record.levelno, text, trace]})


class RemoteDesk:
    """What a job may ask of the daemon, asked over the socket. One question at a time."""

    def __init__(self, lines: Lines) -> None:
        #: Of the job that runs.
        self.door: Door | None = None
        self._lines = lines
        self._asking = threading.Lock()
        self._database: Database | None = None

    def ask(self, what: str, *args: Any) -> Any:
        """Raises what the daemon's own desk would raise."""
        with self._asking:
            self._lines.send({"ask": what, "args": args})
            answer = self._lines.next()
        if answer is None:
            os._exit(1)  # the daemon is gone
        if "error" in answer:
            raise _ERRORS.get(answer["error"], UpqError)(answer["text"])
        if answer["broken_off"] and self.door is not None:
            self.door.come_out()
        return answer["value"]

    @property
    def db(self) -> Engine:
        if self._database is None:
            # Late: it takes long to import, and most jobs have no tables.
            from upq.db import Database  # noqa: PLC0415

            self._database = Database(self.ask("db"))
        return self._database.jobs

    def enqueue(
        self, parent: UpqJob, jobname: str, params: dict[str, Any], queue: str = ""
    ) -> RemoteJob:
        return RemoteJob(self, parent, self.ask("enqueue", jobname, params, queue), jobname)

    def wait(self, parent: UpqJob, ids: Sequence[int], timeout_s: float | None = None) -> bool:
        parent.show_progress()
        return bool(self.ask("wait", list(ids), timeout_s))

    def left_behind(self, parent: UpqJob) -> list[Any]:
        return []  # asked in the daemon only, once the attempt is over

    def find_step(self, job: UpqJob, name: str, nth: int) -> list[Any] | None:
        found: list[Any] | None = self.ask("find_step", name, nth)
        return found

    def keep_step(self, job: UpqJob, name: str, nth: int, result: Any) -> None:
        self.ask("keep_step", name, nth, result)

    def progress(self, job: UpqJob, progress: dict[str, Any]) -> None:
        self._lines.send({"progress": progress})

    def list_queues(self) -> list[dict[str, Any]]:
        return list(self.ask("list_queues"))

    def list_jobs(self, queue: str, limit: int) -> list[dict[str, Any]]:
        return list(self.ask("list_jobs", queue, limit))


class RemoteEnd:
    """`finished` of a job that this one has queued."""

    def __init__(self, job: RemoteJob) -> None:
        self._job = job

    def is_set(self) -> bool:
        return self._job.state in FINAL

    def wait(self, timeout: float | None = None) -> bool:
        return self._job.desk.wait(self._job.parent, [self._job.jobid], timeout)


class RemoteJob:
    """A job that this one has queued."""

    def __init__(self, desk: RemoteDesk, parent: UpqJob, id: int, name: str) -> None:
        self.jobid = id
        self.jobname = name
        self.finished = RemoteEnd(self)
        self.desk = desk
        self.parent = parent
        self._ended: Sequence[Any] | None = None

    @property
    def state(self) -> str:
        return str(self._look()[0])

    @property
    def result(self) -> Any:
        return self._look()[1]

    @property
    def msgstr(self) -> str:
        return str(self._look()[2])

    @property
    def reason(self) -> str:
        return str(self._look()[3])

    def wait(self, timeout: float | None = None) -> Any:
        return wait_for(self, timeout)

    def _look(self) -> Sequence[Any]:
        seen: Sequence[Any] = self._ended or self.desk.ask("look", self.jobid)
        if seen[0] in FINAL:
            self._ended = seen
        return seen


class Worker:
    """Runs what comes in. `terms` are the type's: see `Processes` in `process`."""

    def __init__(self, lines: Lines, terms: dict[str, Any]) -> None:
        #: What runs now.
        self.job: UpqJob | None = None
        self._lines = lines
        self._terms = terms
        self._desk = RemoteDesk(lines)
        self._keeper = Keeper()
        self._cls: type[UpqJob] | None = None
        # The claim that is to end; asked for, maybe, before its job has come in.
        self._unwanted = 0

    def run(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One attempt: its report, as a message."""
        os.environ[TOKEN] = str(asked["token"])
        file = Path(self._terms["jobs_dir"], f"{self._terms['type']}.py")
        try:
            job = self._make(asked)
        except BaseException as error:  # even sys.exit() at import
            return {"report": Report(BROKEN, blame(error, file))}
        job.token, job.jobqueue = asked["token"], asked["queue"]
        output = job._output = Sent(self._lines)
        door = job.door = self._desk.door = Door()
        job.ender = self._keeper.cancel
        self.job = job
        if self._unwanted == job.token:
            job.cancel()
        checks = type(job).check is not UpqJob.check
        try:
            report = door.run(perform, job, file, checks)
        except Interrupted:
            report = Report(INTERRUPTED, said(job))
        self._keeper.forget(job)
        self.job = None
        output.flush()
        data, fault = left(job, {})
        chain, notify = follow_up(job)
        return {
            "report": with_fault(report, fault),
            "data": data,
            "chain": chain,
            "notify": notify,
            "shown": job.last_progress,
        }

    def _make(self, asked: dict[str, Any]) -> UpqJob:
        terms = self._terms
        if self._cls is None:
            self._cls = Loader(Path(terms["jobs_dir"])).load(terms["type"])
        return self._cls(
            terms["type"],
            asked["data"],
            terms["jobcfg"],
            jobid=asked["id"],
            desk=self._desk,
            chain=asked["chain"],
            attempt=asked["attempt"],
        )

    def listen(self, control: socket.socket) -> None:
        """Hear which claim is to end, and the end of the daemon."""
        with control.makefile("rb") as requests:
            for line in requests:
                self._unwanted = int(line)
                job = self.job
                if job is not None and job.token == self._unwanted:
                    job.cancel()
        os._exit(1)


def main(data_fd: int, control_fd: int) -> None:
    """The whole life of a child."""
    for fd in (data_fd, control_fd):
        os.set_inheritable(fd, False)
    with contextlib.suppress(OSError):  # when memory is short, this one goes before the daemon
        Path("/proc/self/oom_score_adj").write_text("500")
    lines = Lines(socket.socket(fileno=data_fd))
    terms = lines.next()
    if terms is None:
        return
    sys.path[:] = terms["path"]
    worker = Worker(lines, terms)
    sys.stdout = sys.stderr = Printed(worker)
    logging.basicConfig(level=terms["level"], handlers=[Logged(lines)])
    control = socket.socket(fileno=control_fd)
    threading.Thread(target=worker.listen, args=(control,), name="listen", daemon=True).start()
    while (asked := lines.next()) is not None:
        lines.send(worker.run(asked))
    os._exit(0)
