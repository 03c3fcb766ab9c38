"""Command jobs: a line in the ini file in place of a class; no value ever meets a shell."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath
from typing import IO, Any, cast

from upq import params
from upq.cgroup import Group, GroupLimits, Groups
from upq.errors import Abort
from upq.job import RESULT_LIMIT_BYTES
from upq.log import one_line
from upq.pipes import Reports, Sink, Tail, Watch, closing
from upq.plugins import UpqJob
from upq.spawn import Limits, pipe, start
from upq.trees import GRACE_S, KILL_WAIT_S, TICK_S, TOKEN, Lifeline, Tree, signal_groups

#: What a command sees of the daemon's environment, besides LC_* and what `env` names.
PASSED = frozenset(("PATH", "HOME", "LANG", "TZ", "TMPDIR"))
#: Where reports of progress are read: not at all, in standard output, or on a descriptor (3 to 9).
NOWHERE, STDOUT = 0, 1

#: How long the output of a command that has ended may stay open: a grandchild may hold it.
_EOF_WAIT_S = 2.0
_LAST_LINE_CHARS = 200


Popen = subprocess.Popen[bytes]
#: What is read, and where to.
Pipes = dict[int, Sink]


class CommandJob(UpqJob):
    """Runs one program in a session of its own and waits for it; see `command_type`.

    Success is an exit code out of `success_codes`; the result is `{"exit_code": n}`, negative for
    a signal. Standard output and errors go to the job's output. What a command that ended by
    itself left running is left alone, unless it has a control group; a timeout and `cancel()` end
    all of it.
    """

    words: tuple[str, ...] = ()
    #: Parameters whose values may begin with "-".
    free: Collection[str] = ()
    success_codes: Collection[int] = (0,)
    #: When given, only these exit codes are tried again.
    retry_codes: Collection[int] = ()
    #: These are never tried again.
    abort_codes: Collection[int] = ()
    #: Templates by name; None passes the daemon's own on.
    env: Mapping[str, str | None] | None = None
    #: A template, as is `stdin`; "" for none.
    cwd: str = ""
    stdin: str = ""
    limits: Limits = Limits()
    group_limits: GroupLimits = GroupLimits()
    groups: Groups | None = None
    progress_on: int = NOWHERE
    #: The last line of JSON in standard output is the result.
    json_result: bool = False
    #: 0 for no limit.
    timeout_s: float = 0.0
    #: From TERM to KILL.
    grace_s: float = GRACE_S
    lifeline: Lifeline | None = None

    #: "cancel" or "timeout" when `run()` ended the command; None when it ended by itself.
    ended_by: str | None = None

    _wake: int | None = None
    _wake_lock = threading.Lock()
    _tail: Tail | None = None
    _group: Group | None = None
    # The setting of its group of which it wanted more than there is.
    _hit: str = ""

    def check(self) -> bool:
        """Raises BadParams when the parameters do not make a command."""
        self._argv()
        self._environment()
        params.folder(self.cwd, self.jobdata)
        params.filled(self.stdin, self.jobdata)
        return True

    def run(self) -> bool:
        """Raises Abort when the exit code says that another attempt would do no good."""
        self.check()
        argv = self._argv()
        if self.cancelled:
            self.ended_by = "cancel"
            self.msg("cancelled")
            return False
        with contextlib.ExitStack() as stack:
            if self.lifeline:
                stack.enter_context(self.lifeline.guard(self.token))
            try:
                self._group = self._enter_group(stack)
                process, pipes = self._start(argv, stack)
            except (OSError, ValueError) as error:
                self.msg(_start_fault(argv[0], error))
                return False
            try:
                self._follow(process.pid, pipes)
            except BaseException:
                signal_groups({process.pid}, signal.SIGKILL)
                process.wait()
                raise
        return self._judge(PurePath(argv[0]).name, process.poll())

    def cancel(self) -> None:
        """Ask for the end, from any thread; `run()` returns within the grace and a second."""
        self.cancel_event.set()
        with self._wake_lock:
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)

    # The start

    def _argv(self) -> list[str]:
        return params.argv(self.words, self.jobdata, self.free)

    def _environment(self) -> dict[str, str]:
        passed = {
            name: value
            for name, value in os.environ.items()
            if name in PASSED or name.startswith("LC_")
        }
        for name, template in (self.env or {}).items():
            if template is None:
                value = os.environ.get(name)
            else:
                value = params.filled(template, self.jobdata)
            if value is not None:
                passed[name] = value
        own = {
            "UPQ_JOB_ID": str(self.jobid),
            "UPQ_JOB_TYPE": self.jobname,
            "UPQ_JOB_QUEUE": self.jobqueue,
            TOKEN: str(self.token),
        }
        return {"PATH": os.defpath, **passed, **own}

    def _enter_group(self, stack: contextlib.ExitStack) -> Group | None:
        """The control group it is to run in, if it has limits of one: until the stack is closed."""
        if self.groups is None or not self.group_limits.needs():
            return None
        name = f"{self.jobid}-{self.token:x}"
        return stack.enter_context(self.groups.hold(name, self.group_limits))

    def _start(self, argv: list[str], stack: contextlib.ExitStack) -> tuple[Popen, Pipes]:
        """The process, and what is read of it until the stack is closed."""
        pipes: Pipes = {}
        reads_stdout = self.json_result or self.progress_on == STDOUT
        give = {}
        with contextlib.ExitStack() as theirs:
            if self.progress_on > STDOUT:
                reports, give[self.progress_on] = pipe()
                stack.callback(os.close, reports)
                theirs.callback(os.close, give[self.progress_on])
                pipes[reports] = self._reports(stack)
            door = None
            if self._group is not None:
                door = theirs.enter_context(closing(self._group.door()))
            process = start(
                argv,
                self.limits,
                give,
                door,
                stdin=theirs.enter_context(_as_file(params.filled(self.stdin, self.jobdata))),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if reads_stdout else subprocess.STDOUT,
                bufsize=0,
                cwd=params.folder(self.cwd, self.jobdata) or None,
                env=self._environment(),
            )
        out, err = cast("IO[bytes]", process.stdout), process.stderr
        pipes[stack.enter_context(out).fileno()] = self._sink(stack)
        if err:
            pipes[stack.enter_context(err).fileno()] = self.capture().write_bytes
        return process, pipes

    def _sink(self, stack: contextlib.ExitStack) -> Sink:
        """Where standard output goes."""
        sinks: list[Sink] = [self.capture().write_bytes]
        if self.progress_on == STDOUT:
            sinks.append(self._reports(stack))
        if self.json_result:
            self._tail = Tail(RESULT_LIMIT_BYTES)
            sinks.append(self._tail)

        def all_(data: bytes) -> None:
            for sink in sinks:
                sink(data)

        return sinks[0] if len(sinks) == 1 else all_

    def _reports(self, stack: contextlib.ExitStack) -> Sink:
        reports = Reports(self.progress)
        stack.callback(reports.end)
        return reports

    @contextlib.contextmanager
    def _waking(self) -> Iterator[int]:
        """A descriptor that `cancel()` makes readable."""
        wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._wake_lock:
            self._wake = wake
        try:
            if self.cancelled:
                os.eventfd_write(wake, 1)
            yield wake
        finally:
            with self._wake_lock:
                self._wake = None
                os.close(wake)

    # The end

    def _follow(self, pid: int, pipes: Pipes) -> None:
        """Copy the output until the process has ended, by itself or by us.

        Waits for the process, not for the end of its output.
        """
        with self._waking() as wake, closing(os.pidfd_open(pid)) as exit_:
            watch = Watch(pipes, exit_, wake)
            watch.until(lambda: bool(watch.ready & {exit_, wake}), self.timeout_s or math.inf)
            if exit_ not in watch.ready:
                self.ended_by = "cancel" if wake in watch.ready else "timeout"
                self._end(pid, watch, exit_)
            if self._group is not None:
                self._hit = self._group.hit()
                self._group.kill()
            if exit_ in watch.ready:
                watch.until(lambda: watch.drained, _EOF_WAIT_S)

    def _end(self, pid: int, watch: Watch, exit_: int) -> None:
        """End the process, and all that it has started.

        The process is not reaped yet, so its number cannot have passed to another.
        """
        tree = Tree({self.token} - {0}, pid)
        group = self._group
        for signum, wait_s in ((signal.SIGTERM, self.grace_s), (signal.SIGKILL, KILL_WAIT_S)):
            reached = tree.signal(signum)
            if group is not None and signum == signal.SIGKILL:
                group.kill()
            elif group is not None:
                group.signal(signum, spared=reached)
            if watch.until(
                lambda: (
                    exit_ in watch.ready and not tree.groups() and (group is None or group.is_empty)
                ),
                wait_s,
                TICK_S,
            ):
                return

    def _judge(self, program: str, code: int | None) -> bool:
        self.result = {"exit_code": code}
        if self.ended_by:
            late = self.ended_by == "timeout"
            self.msg(f"timed out after {self.timeout_s:g} s" if late else "cancelled")
            if code is None:
                self.msg(f"; {program} could not be ended")
            return False
        code = code or 0
        if code in self.success_codes:
            self._take_result()
            return True
        last_line = self._last_line()
        self.msg(f"{program} {self._ending(code)}" + (f": {last_line}" if last_line else ""))
        final = code in self.abort_codes or (self.retry_codes and code not in self.retry_codes)
        if final and code > 0:
            raise Abort
        return False

    def _take_result(self) -> None:
        if self._tail is None:
            return
        found = self._tail.last_json()
        if found is None:
            self.msg("no line of JSON in its output")
        else:
            (self.result,) = found

    def _ending(self, code: int) -> str:
        if code >= 0:
            return f"exited with {code}" + (f" ({self._hit})" if self._hit else "")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            return f"was killed by signal {-code}"
        limits = {"SIGXCPU": "cpu_limit", "SIGXFSZ": "file_limit", "SIGKILL": self._hit}
        limit = limits.get(name)
        return f"was killed by {name}" + (f" ({limit})" if limit else "")

    def _last_line(self) -> str:
        output = self.captured()
        text = output.text.rstrip() if output else ""
        line = text.rpartition("\n")[2].rpartition("\r")[2]
        return one_line(line.strip()[:_LAST_LINE_CHARS])


def command_type(name: str, words: tuple[str, ...], **facts: Any) -> type[CommandJob]:
    """The class of a `[job name]` with `command =`; `words` are those of `params.split_command`.

    facts: what CommandJob declares.
    """
    assert facts.keys() <= CommandJob.__annotations__.keys()
    return type(name.capitalize(), (CommandJob,), {"words": words, **facts})


def _start_fault(program: str, error: Exception) -> str:
    if not isinstance(error, OSError):
        return f"cannot start {program}: {error}"
    culprit = "" if error.filename in (None, program) else f": {error.filename}"
    return f"cannot start {program}: {error.strerror}{culprit}"


@contextlib.contextmanager
def _as_file(text: str | None) -> Iterator[int]:
    """A descriptor to read the text from; a file in memory, so that nobody has to feed it."""
    if not text:
        yield subprocess.DEVNULL
        return
    with closing(os.memfd_create("stdin")) as fd:
        with open(fd, "wb", closefd=False) as file:
            file.write(text.encode("utf-8", "replace"))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
