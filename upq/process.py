"""`executor = process`: attempts run in child processes, which nothing else dies with.

A child is a fresh interpreter, made by exec; it runs the jobs of one type one after the other.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upq.attempt import AWAY, BROKEN, CRASHED, INTERRUPTED, Report
from upq.child import Lines
from upq.command import PASSED
from upq.errors import UpqError
from upq.executor import judged
from upq.job import DONE
from upq.jobtypes import JobType
from upq.keeper import ASK_S, GRACE_S
from upq.plugins import Child, Desk, UpqJob
from upq.secret import scrub
from upq.trees import CHILD_TOKEN, KILL_WAIT_S, Lifeline, end_orphans

log = logging.getLogger(__name__)

#: Seconds that a child stays when there is nothing to do.
IDLE_S = 60.0
#: Seconds that a child may take to read what it is sent, and to leave when it is told so.
SEND_S, LEAVE_S = 10, 5
#: Seconds that are waited for a child's words at a time: poll() takes 24 days at most.
MOST_S = 86400.0
#: Seconds for a dead child's exit status to arrive.
STATUS_S = 1.0
#: Where children die of their first job the next starts so many of their lives later, then twice as
#: long, up to so many seconds: what dies again and again leaves the machine to the others.
LIVES_APART, MOST_APART_S = 4, 5.0
#: Seconds between two looks whether it is still so.
LOOK_S = 0.1

_START = "import sys; sys.path.insert(0, sys.argv[1]); from upq.child import main"


class Interpreter:
    """One child process and the way to talk to it. Raises OSError when it cannot be started."""

    def __init__(
        self, kind: JobType, terms: dict[str, Any], age: int, lifeline: Lifeline | None
    ) -> None:
        self.jobs = 0
        #: Whose jobs it runs; never those of the same type as a later reload has made it.
        self.kind = kind
        #: How often the configuration was read when it was made; `kind` may be of earlier.
        self.age = age
        #: When it last became idle, or was told to leave; by time.monotonic.
        self.since_s = time.monotonic()
        #: True once it is dead and buried.
        self.is_over = False
        #: True once KILL has not ended it in time, as what hangs in the kernel.
        self.is_stuck = False
        self._killed_s = math.inf
        # Not a claim's: what it starts carries this, too, and is found by it.
        self._token = int.from_bytes(os.urandom(8), "big") >> 1
        with contextlib.ExitStack() as held:
            near, far = map(held.enter_context, socket.socketpair())
            self._control, far_control = map(held.enter_context, socket.socketpair())
            self._control.setblocking(False)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            held.callback(os.close, self._wake)
            if lifeline is not None:
                held.enter_context(lifeline.guard(self._token))
            fds = far.fileno(), far_control.fileno()
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-c", f"{_START}; main{fds}"),
                    str(Path(__file__).parent.parent),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=self._environment(),
                pass_fds=fds,
                start_new_session=True,
            )
            self._exit = os.pidfd_open(self._process.pid)
            held.callback(os.close, self._exit)
            far.close()
            far_control.close()
            self._near = near.fileno()
            self.lines = Lines(near)
            self._poll = select.poll()
            for fd in (self._near, self._wake, self._exit):
                self._poll.register(fd, select.POLLIN)
            self._held = held.pop_all()
        try:
            self.lines.send(terms)
        except BaseException:
            self.end()
            raise

    def _environment(self) -> dict[str, str]:
        passed = {
            name: value
            for name, value in os.environ.items()
            if name in PASSED or name.startswith("LC_")
        }
        return {"PATH": os.defpath, **passed, CHILD_TOKEN: str(self._token)}

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def listen(self, wait_s: float) -> bool:
        """Wait for its words, or to be woken; False when it says no more."""
        wait_ms = None if wait_s == math.inf else math.ceil(min(max(wait_s, 0), MOST_S) * 1000)
        ready = {fd for fd, _ in self._poll.poll(wait_ms)}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._near in ready:
            return self.lines.fill()
        return self._exit not in ready

    def ask_to_end(self, token: int) -> None:
        """Have the job of this claim end, and `listen` return; from any thread."""
        with contextlib.suppress(OSError):
            self._control.send(b"%d\n" % token)
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def leave(self) -> None:
        """Let it end by itself; `bury` has to follow. What it has started is left alone."""
        self.since_s = time.monotonic()
        self._control.close()

    def await_end(self, wait_s: float) -> str:
        """How it has ended; "" when it has not within `wait_s`."""
        try:
            return ending(self._process.wait(max(wait_s, 0)))
        except subprocess.TimeoutExpired:
            return ""

    def kill(self) -> None:
        self._killed_s = min(self._killed_s, time.monotonic())
        self._process.kill()

    def bury(self, wait_s: float = 0.0) -> str:
        """See that it is gone; says how it had ended, if it did so within `wait_s`.

        What KILL does not end within KILL_WAIT_S becomes `is_stuck`, to be buried another time.
        """
        ended = self.await_end(wait_s)
        if not ended:
            self.kill()
            if not self.await_end(self._killed_s + KILL_WAIT_S - time.monotonic()):
                if not self.is_stuck:
                    log.error("process %d cannot be killed", self._process.pid)
                self.is_stuck = True
                return "cannot be killed"
            ended = "was killed"
        self.is_over = True
        self._held.close()
        return ended

    def end(self, wait_s: float = 0.0) -> str:
        """`bury`, together with all that it has started."""
        if self.is_over:
            return "has ended"
        ended = self.bury(wait_s)
        end_orphans({self._token}, 0.0)
        return ended


class ProcessJob(UpqJob):
    """Stands in the daemon for a job whose class runs in a child."""

    #: From the request to end to KILL.
    grace_s = GRACE_S

    def __init__(self, *args: Any, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self._interpreter: Interpreter | None = None
        self._asked_s = self._over_s = math.inf
        self._queued: dict[int, Child] = {}
        self._asking = threading.Lock()

    def cancel(self) -> None:
        """Ask the job to end; the child is killed when the grace is over."""
        self.cancel_event.set()
        self._ask_to_end("cancel")

    def may_wait(self) -> bool:
        """Asked once a second while the job waits for another: the child is not listened to."""
        now_s = time.monotonic()
        self._look(now_s)
        alive = self._interpreter is None or self._interpreter.is_alive
        return alive and now_s < self._asked_s + min(ASK_S, self.grace_s)

    def carry(self, interpreter: Interpreter) -> Report:
        """Have the child run the attempt, and do for it what it asks, to its end."""
        if self.timeout_s:
            self._over_s = time.monotonic() + self.timeout_s
        with self._asking:
            self._interpreter = interpreter
        try:
            return self._converse(interpreter)
        except OSError:
            return self._lost(interpreter)
        except (ValueError, LookupError, TypeError) as error:
            log.warning("what its process says is not to be understood: %s", error)
            return self._lost(interpreter)
        finally:
            with self._asking:
                self._interpreter = None

    def _converse(self, interpreter: Interpreter) -> Report:
        lines = interpreter.lines
        lines.send({"id": self.jobid, "token": self.token, "data": self.jobdata,
                    "chain": self._chain, "attempt": self.retries + 1,
                    "queue": self.jobqueue})  # fmt: skip
        if self.cancelled:
            interpreter.ask_to_end(self.token)
        while True:
            message = lines.take()
            if message is not None:
                if "report" in message:
                    return self._reported(message)
                self._heed(message, lines)
                continue
            now_s = time.monotonic()
            self._look(now_s)
            until_s = self._asked_s + self.grace_s if self._asked_s < math.inf else self._over_s
            if now_s >= until_s:
                interpreter.end()
                return Report(INTERRUPTED)
            if not interpreter.listen(until_s - now_s):
                return self._lost(interpreter)

    def _lost(self, interpreter: Interpreter) -> Report:
        """The child has died, or may as well; also of what it was told to end by."""
        with self._asking:  # its descriptors are closed, and the numbers go to others
            self._interpreter = None
        ended = interpreter.end(STATUS_S)
        if self._asked_s < math.inf:
            return Report(INTERRUPTED)
        return Report(CRASHED, f"its process {ended}")

    def _look(self, now_s: float) -> None:
        if now_s >= self._over_s:
            self._ask_to_end("timeout")

    def _ask_to_end(self, by: str) -> None:
        with self._asking:
            if self._asked_s < math.inf:
                return
            self._asked_s = time.monotonic()
            self.ended_by = by
            if self._interpreter is not None:
                self._interpreter.ask_to_end(self.token)

    def _reported(self, message: dict[str, Any]) -> Report:
        end, text, result, after_s = message["report"]
        if message.get("data") is not None:
            self.jobdata = message["data"]
        if end == DONE:
            self._chain = message["chain"]
        self._notify_asked = message.get("notify", [])
        if shown := message.get("shown"):
            self.last_progress = self._told(shown)
        return Report(end, text, result, after_s)

    def _told(self, progress: dict[str, Any]) -> dict[str, Any]:
        """What the child says of its progress, without secrets: it does not know them."""
        return {**progress, "text": scrub(str(progress.get("text", "")), self.hidden)}

    def _heed(self, message: dict[str, Any], lines: Lines) -> None:
        if "output" in message:
            self.capture().write(message["output"])
        elif "log" in message:
            self._log(*message["log"])
        elif "progress" in message:
            self.last_progress = self._told(message["progress"])
            self._need_desk().progress(self, self.last_progress)
        else:
            lines.send(self._answer(message["ask"], message["args"]))

    def _log(self, name: str, level: int, text: str, trace: str) -> None:
        # By one logger, whatever name the child gives: they are never forgotten.
        if self.logger.isEnabledFor(level):
            record = logging.LogRecord(name, level, "", 0, "%s", (text,), None, sinfo=trace or None)
            self.logger.handle(record)

    def _answer(self, what: str, args: list[Any]) -> dict[str, Any]:
        asks: dict[str, Callable[..., Any]] = {
            "db": self._database_url,
            "enqueue": self._enqueue,
            "wait": self._wait,
            "look": self._look_at,
            "find_step": lambda name, nth: self._need_desk().find_step(self, name, nth),
            "keep_step": lambda name, nth, value: self._need_desk().keep_step(
                self, name, nth, value
            ),
            "list_queues": self._need_desk().list_queues,
            "list_jobs": self._need_desk().list_jobs,
        }
        try:
            value = asks[what](*args)
            return {"value": value, "broken_off": what == "wait" and not self.may_wait()}
        except UpqError as error:
            return {"error": error.code, "text": str(error)}

    def _wait(self, ids: list[int], timeout: float | None) -> bool:
        return self._need_desk().wait(self, [self._queued[id].jobid for id in ids], timeout)

    def _look_at(self, id: int) -> list[Any]:
        job = self._queued[id]
        return [job.state, job.result, job.msgstr, job.reason]

    def _enqueue(self, jobname: str, params: dict[str, Any], queue: str) -> int:
        job = self.enqueue_newjob(jobname, params, queue=queue)
        self._queued[job.jobid] = job
        return job.jobid

    def _database_url(self) -> str:
        return self.db.url.render_as_string(hide_password=False)


class Pace:
    """When the next child of a type may start whose children die."""

    def __init__(self) -> None:
        self._apart_s = self._next_s = 0.0
        self._lock = threading.Lock()

    def died(self, born_s: float, now_s: float) -> None:
        with self._lock:
            apart_s = max(2 * self._apart_s, LIVES_APART * (now_s - born_s))
            self._apart_s = min(apart_s, MOST_APART_S)
            self._next_s = max(self._next_s, now_s + self._apart_s)

    def take(self, now_s: float) -> float:
        """0.0: one may start now, and the next later; else the seconds until then."""
        with self._lock:
            if now_s < self._next_s:
                return self._next_s - now_s
            self._next_s = now_s + self._apart_s
            return 0.0


class Processes:
    """The executor: keeps children between jobs, as many as have run at a time."""

    def __init__(self, lifeline: Lifeline | None = None) -> None:
        self._lifeline = lifeline
        self._lock = threading.Lock()
        #: Children that have nothing to do, by type; the last used last.
        self._idle: dict[str, list[Interpreter]] = {}
        self._leaving: list[Interpreter] = []
        #: Of types whose last child has died of its first job.
        self._paces: dict[str, Pace] = {}
        # How often the configuration was read.
        self._age = 0

    def make(
        self, kind: JobType, data: dict[str, Any], desk: Desk | None, facts: dict[str, Any]
    ) -> UpqJob:
        kind.runnable()
        limit = kind.cfg.output_limit_bytes
        return ProcessJob(
            kind.name, data, kind.jobcfg, desk=desk, output_limit_bytes=limit, **facts
        )

    def perform(self, kind: JobType, plugin: UpqJob) -> Report:
        assert isinstance(plugin, ProcessJob)
        try:
            interpreter = self._find(kind, plugin)
        except OSError as error:
            log.error("no child process for %s: %s", kind.name, error)
            return Report(AWAY, f"no child process: {error}")
        if interpreter is None:
            return judged(plugin, Report(INTERRUPTED))
        try:
            report = plugin.carry(interpreter)
        except BaseException:
            interpreter.end()
            self._take_back(kind, interpreter, spoilt=True)
            raise
        if report.end != CRASHED:
            self._paces.pop(kind.name, None)
        elif not interpreter.jobs:
            self._paces.setdefault(kind.name, Pace()).died(interpreter.since_s, time.monotonic())
        self._take_back(kind, interpreter, spoilt=bool(plugin.ended_by) or report.end == BROKEN)
        return judged(plugin, report)

    def renew(self) -> None:
        """Children that are idle leave; those that work do when they are done."""
        with self._lock:
            self._age += 1
            self._paces.clear()
            kept, self._idle = self._idle, {}
            self._dismiss([one for idle in kept.values() for one in idle])

    def tidy(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            for name, idle in self._idle.items():
                self._idle[name] = [one for one in idle if now_s - one.since_s < IDLE_S]
                self._dismiss([one for one in idle if now_s - one.since_s >= IDLE_S])
            gone = [
                one
                for one in self._leaving
                if not one.is_alive or (now_s - one.since_s >= LEAVE_S and not one.is_stuck)
            ]
            self._leaving = [one for one in self._leaving if one not in gone]
        self._bury(gone)

    def close(self) -> None:
        self.renew()
        gone, self._leaving = self._leaving, []
        self._bury(gone, LEAVE_S)

    def _bury(self, ones: list[Interpreter], wait_s: float = 0.0) -> None:
        """All of them in the time that one may take; who is stuck stays among those that leave."""
        over_s = time.monotonic() + wait_s
        for one in ones:
            if not one.await_end(over_s - time.monotonic()):
                one.kill()
        for one in ones:
            one.bury()
        with self._lock:
            self._leaving += [one for one in ones if one.is_stuck and not one.is_over]

    def _find(self, kind: JobType, plugin: UpqJob) -> Interpreter | None:
        """A child for this job, in time; None when the job is to end before there is one."""
        while True:
            if one := self._idle_one(kind):
                return one
            pace = self._paces.get(kind.name)
            wait_s = pace.take(time.monotonic()) if pace is not None else 0.0
            if not wait_s:
                return Interpreter(kind, self._terms(kind), self._age, self._lifeline)
            if plugin.cancel_event.wait(min(wait_s, LOOK_S)):
                return None

    def _terms(self, kind: JobType) -> dict[str, Any]:
        """What a child has to know of its type, besides the jobs."""
        return {
            "path": sys.path,
            "jobs_dir": str(kind.file.parent),
            "type": kind.name,
            "jobcfg": dict(kind.jobcfg),
            "level": logging.getLogger().level,
        }

    def _idle_one(self, kind: JobType) -> Interpreter | None:
        with self._lock:
            idle = self._idle.setdefault(kind.name, [])
            while idle:
                one = idle.pop()
                if one.kind is kind and one.is_alive:
                    return one
                self._dismiss([one])
        return None

    def _take_back(self, kind: JobType, one: Interpreter, spoilt: bool) -> None:
        if one.is_over:
            return
        if one.is_stuck:
            with self._lock:
                self._leaving.append(one)
            return
        one.jobs += 1
        one.since_s = time.monotonic()
        with self._lock:
            if spoilt or one.jobs >= kind.cfg.max_jobs_per_child or one.age != self._age:
                self._dismiss([one])
            else:
                self._idle.setdefault(kind.name, []).append(one)

    def _dismiss(self, ones: list[Interpreter]) -> None:
        for one in ones:
            one.leave()
        self._leaving += ones


def ending(code: int) -> str:
    """How a process ended, after its name."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
