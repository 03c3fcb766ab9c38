"""Command jobs: a line in the ini file in place of a class; never through a shell.

Also what ends commands that nobody waits for any more: `Lifeline` when the daemon dies, and
`end_orphans` at the next start.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, cast

from upq import params
from upq.log import one_line
from upq.plugins import Clipped, UpqJob

#: What a command sees of the daemon's environment, besides LC_*.
PASSED = frozenset(("PATH", "HOME", "LANG", "TZ", "TMPDIR"))
#: The variable that tells which claim a process works for; its children inherit it.
TOKEN = "UPQ_JOB_TOKEN"
GRACE_S = 5.0

#: How long the output of a command that has ended may stay open: a grandchild may hold it.
_EOF_WAIT_S = 2.0
#: How long a killed process may take to go.
_KILL_WAIT_S = 1.0
_TICK_S = 0.05
#: What a pipe holds.
_READ_BYTES = 1 << 16
_LAST_LINE_CHARS = 200

log = logging.getLogger(__name__)


class CommandJob(UpqJob):
    """Runs one program in a process group of its own and waits for it; see `command_type`.

    Success is an exit code out of `success_codes`; the result is `{"exit_code": n}`, negative for
    a signal. Standard output and errors go to the job's output. What a command that ended by
    itself left running is left alone; a timeout and `cancel()` end all of it.
    """

    words: tuple[str, ...] = ()
    success_codes: Collection[int] = (0,)
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    #: 0 for no limit.
    timeout_s: float = 0.0
    #: From TERM to KILL.
    grace_s: float = GRACE_S
    lifeline: Lifeline | None = None

    #: "cancel" or "timeout" when `run()` ended the command; None when it ended by itself.
    ended_by: str | None = None

    _wake: int | None = None
    _wake_lock = threading.Lock()

    def check(self) -> bool:
        """Raises BadParams when the parameters do not make a command line."""
        params.argv(self.words, self.jobdata)
        return True

    def run(self) -> bool:
        argv = params.argv(self.words, self.jobdata)
        if self.cancelled:
            self.ended_by = "cancel"
            self.msg("cancelled")
            return False
        with self.lifeline.guard(self.token) if self.lifeline else contextlib.nullcontext():
            try:
                process = self._start(argv)
            except (OSError, ValueError) as error:
                self.msg(_start_fault(argv[0], error))
                return False
            try:
                with cast("IO[bytes]", process.stdout) as pipe:
                    self._follow(process.pid, pipe.fileno())
            except BaseException:
                _signal_groups({process.pid}, signal.SIGKILL)
                process.wait()
                raise
        return self._judge(PurePath(argv[0]).name, process.poll())

    def cancel(self) -> None:
        """Ask for the end, from any thread; `run()` returns within the grace and a second."""
        self.cancel_event.set()
        with self._wake_lock:
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)

    def _start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=self.cwd,
            env=self._environment(),
            start_new_session=True,
        )

    def _environment(self) -> dict[str, str]:
        passed = {
            name: value
            for name, value in os.environ.items()
            if name in PASSED or name.startswith("LC_")
        }
        own = {"UPQ_JOB_ID": str(self.jobid), "UPQ_JOB_TYPE": self.jobname, TOKEN: str(self.token)}
        return {"PATH": os.defpath, **passed, **(self.env or {}), **own}

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

    def _follow(self, pid: int, pipe: int) -> None:
        """Copy the output until the process has ended, by itself or by us.

        Waits for the process, not for the end of its output.
        """
        with self._waking() as wake, _closing(os.pidfd_open(pid)) as exit_:
            watch = Watch(pipe, self.capture(), exit_, wake)
            watch.until(lambda: bool(watch.ready & {exit_, wake}), self.timeout_s or math.inf)
            if exit_ not in watch.ready:
                self.ended_by = "cancel" if wake in watch.ready else "timeout"
                self._end(pid, watch, exit_)
            if exit_ in watch.ready:
                watch.until(lambda: pipe in watch.ready, _EOF_WAIT_S)

    def _end(self, pid: int, watch: Watch, exit_: int) -> None:
        """End the process, its group and what has left the group.

        The process is not reaped yet, so the group's number cannot have passed to another.
        """
        tokens = {self.token} - {0}
        for signum, wait_s in ((signal.SIGTERM, self.grace_s), (signal.SIGKILL, _KILL_WAIT_S)):
            _signal_groups({pid} | living_groups(tokens), signum)
            if watch.until(
                lambda: exit_ in watch.ready and not living_groups(tokens, pid), wait_s, _TICK_S
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
        if code in self.success_codes:
            return True
        last_line = self._last_line()
        self.msg(f"{program} {_ending(code or 0)}" + (f": {last_line}" if last_line else ""))
        return False

    def _last_line(self) -> str:
        output = self.captured()
        text = output.text.rstrip() if output else ""
        line = text.rpartition("\n")[2].rpartition("\r")[2]
        return one_line(line.strip()[:_LAST_LINE_CHARS])


def command_type(
    name: str,
    words: tuple[str, ...],
    *,
    success_codes: Collection[int] = (0,),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 0.0,
    grace_s: float = GRACE_S,
    lifeline: Lifeline | None = None,
) -> type[CommandJob]:
    """The class of a `[job name]` with `command =`; `words` are those of `params.split_command`."""
    facts = {
        "words": words,
        "success_codes": frozenset(success_codes),
        "env": env,
        "cwd": cwd,
        "timeout_s": timeout_s,
        "grace_s": grace_s,
        "lifeline": lifeline,
    }
    return type(name.capitalize(), (CommandJob,), facts)


def _start_fault(program: str, error: Exception) -> str:
    if not isinstance(error, OSError):
        return f"cannot start {program}: {error}"
    culprit = "" if error.filename in (None, program) else f": {error.filename}"
    return f"cannot start {program}: {error.strerror}{culprit}"


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


class Watch:
    """Copies a pipe into `sink` while waiting for other descriptors."""

    def __init__(self, pipe: int, sink: Clipped, *others: int) -> None:
        #: Those that have become readable; the pipe when it has come to its end.
        self.ready: set[int] = set()
        self._pipe = pipe
        self._sink = sink
        self._poll = select.poll()
        for fd in (pipe, *others):
            self._poll.register(fd, select.POLLIN)

    def until(self, done: Callable[[], bool], wait_s: float, tick_s: float = 3600.0) -> bool:
        """Copy until `done()`, asked at each event and tick; False when the time is over."""
        deadline = time.monotonic() + wait_s
        while not done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            self._step(min(left_s, tick_s))
        return True

    def _step(self, wait_s: float) -> None:
        for fd, _ in self._poll.poll(math.ceil(wait_s * 1000)):
            data = os.read(fd, _READ_BYTES) if fd == self._pipe else b""
            if data:
                self._sink.write_bytes(data)
            else:
                self._poll.unregister(fd)
                self.ready.add(fd)


def living_groups(tokens: Collection[int], leader: int = 0) -> set[int]:
    """This user's process groups in which something runs: that of `leader`, if it is given, and
    every one with a process that carries one of the tokens. Never the group we are in ourselves.
    """
    wanted = {f"{TOKEN}={token}".encode() for token in tokens}
    groups: set[int] = set()
    if not wanted and not leader:
        return groups
    spared = {0, 1, os.getpgrp()}
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            group = os.getpgid(pid)
            if group in groups or group in spared:
                continue
            if (group == leader and not _is_zombie(pid)) or _carries(pid, wanted):
                groups.add(group)
    return groups


def _is_zombie(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return stat.rpartition(b")")[2].split()[0] in b"ZX"


def _carries(pid: int, wanted: set[bytes]) -> bool:
    folder = f"/proc/{pid}"
    if not wanted or os.stat(folder).st_uid != os.geteuid():
        return False
    with open(f"{folder}/environ", "rb", buffering=0) as file:
        return not wanted.isdisjoint(file.read().split(b"\0"))


def _signal_groups(groups: Collection[int], signum: int) -> None:
    for group in groups:
        # Gone already, or setuid and out of our reach.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signum)


def end_orphans(tokens: Collection[int], grace_s: float = GRACE_S) -> int:
    """End the commands that claims with these tokens left running; says how many groups.

    For the start, before such jobs are queued again. Takes at most `grace_s` and 1 s.
    """
    ended: set[int] = set()
    for signum, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_WAIT_S)):
        deadline = time.monotonic() + wait_s
        groups = living_groups(tokens)
        ended |= groups
        _signal_groups(groups, signum)
        while living_groups(tokens) and time.monotonic() < deadline:
            time.sleep(_TICK_S)
    return len(ended)


class Lifeline:
    """Ends the running commands when the daemon dies, even by SIGKILL. One for the whole daemon.

    A helper process, started with the first command, reads their tokens from a pipe that nobody
    else holds: when the pipe ends, so has the daemon.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._tokens: set[int] = set()
        self._helper: subprocess.Popen[bytes] | None = None
        self._broken = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def guard(self, token: int) -> Iterator[None]:
        """What carries the token and is started inside the block ends with the daemon."""
        with self._lock:
            self._tokens.add(token)
            self._tell(f"+{token}\n")
        try:
            yield
        finally:
            with self._lock:
                self._tokens.discard(token)
                self._tell(f"-{token}\n")

    def close(self) -> None:
        """End what is still guarded, as the death of the daemon would, and wait for it."""
        with self._lock:
            helper, self._helper = self._helper, None
        if helper is not None:
            helper.communicate()

    def _tell(self, line: str) -> None:
        if self._broken:
            return
        try:
            if self._helper is None or self._helper.poll() is not None:
                if self._helper is not None:
                    log.warning("the lifeline's helper has died, starting another")
                self._helper = self._start()
                line = "".join(f"+{token}\n" for token in self._tokens)
            cast("IO[bytes]", self._helper.stdin).write(line.encode())
        except OSError as error:  # in a chroot, say; the next start still ends them
            self._broken = True
            log.warning("commands will not end when the daemon is killed: %s", error)

    def _start(self) -> subprocess.Popen[bytes]:
        code = "import sys; sys.path.insert(0, sys.argv[1]); from upq.command import stand_by"
        return subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", "-c", f"{code}; stand_by({self._grace_s})"),
                str(Path(__file__).parent.parent),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={},
            start_new_session=True,
        )


def stand_by(grace_s: float) -> None:
    """The helper's whole life: learn tokens until the pipe ends, then end what carries them."""
    tokens: set[int] = set()
    for line in sys.stdin:
        (tokens.add if line[0] == "+" else tokens.discard)(int(line[1:]))
    end_orphans(tokens, grace_s)
