"""The processes that a command has started, however far they have gone: found, signalled, ended.

`Tree` knows those of one job; `end_orphans` ends what an earlier daemon left, and `Lifeline` what
this one leaves when it dies. They carry the token of the claim in their environment, or that of
the child process they come from, or both.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

#: The variable that tells which claim a process works for; its children inherit it.
TOKEN = "UPQ_JOB_TOKEN"
#: The same for a child process, which works for one claim after the other.
CHILD_TOKEN = "UPQ_CHILD_TOKEN"
#: From TERM to KILL.
GRACE_S = 5.0
#: How long a killed process may take to go.
KILL_WAIT_S = 1.0
#: Between two looks at what is left.
TICK_S = 0.05

log = logging.getLogger(__name__)


class _Process(NamedTuple):
    pid: int
    parent: int
    group: int
    session: int
    is_alive: bool


class Tree:
    """The processes of some claims: all that carry one of the tokens or are of the session of
    `leader`, all that these have started, and whatever was one of them at an earlier look.

    So the only way out is to leave the session, empty one's environment and lose one's parent, all
    of it between two looks. Never the group that we are in ourselves.
    """

    def __init__(self, tokens: Collection[int], leader: int = 0) -> None:
        """leader: a process that leads a session of its own and is not reaped yet; 0 for none."""
        names = TOKEN, CHILD_TOKEN
        self._wanted = {f"{name}={token}".encode() for token in tokens for name in names}
        self._leader = leader
        self._known: set[int] = set()

    def groups(self) -> set[int]:
        """The process groups of the tree in which something runs."""
        if not self._wanted and not self._leader:
            return set()
        spared = {0, 1, os.getpgrp()}
        all_ = {one.pid: one for one in _processes() if one.group not in spared}
        found = {pid for pid, one in all_.items() if self._has(one)}
        while more := {p for p, one in all_.items() if one.parent in found and p not in found}:
            found |= more
        # A group that is empty now is forgotten: its number may pass to others.
        self._known = {all_[pid].group for pid in found if all_[pid].is_alive}
        return set(self._known)

    def signal(self, signum: int) -> set[int]:
        """Send it to every group of the tree; returns them."""
        groups = self.groups()
        signal_groups(groups, signum)
        return groups

    def _has(self, one: _Process) -> bool:
        if one.group in self._known or (self._leader and one.session == self._leader):
            return True
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            return _carries(one.pid, self._wanted)
        return False


def _processes() -> Iterator[_Process]:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
                state, parent, group, session, *_ = file.read().rpartition(b")")[2].split()
            is_alive = state not in (b"Z", b"X")
            yield _Process(int(pid), int(parent), int(group), int(session), is_alive)


def _carries(pid: int, wanted: set[bytes]) -> bool:
    """Root sees and ends what has become another user's; others only what is their own."""
    folder = f"/proc/{pid}"
    if not wanted or os.geteuid() not in (0, os.stat(folder).st_uid):
        return False
    with open(f"{folder}/environ", "rb", buffering=0) as file:
        return not wanted.isdisjoint(file.read().split(b"\0"))


def signal_groups(groups: Collection[int], signum: int) -> None:
    for group in groups:
        # Gone already, or setuid and out of our reach.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signum)


def end_orphans(tokens: Collection[int], grace_s: float = GRACE_S) -> int:
    """End the commands that claims with these tokens left running; says how many groups.

    For the start, before such jobs are queued again. Takes at most `grace_s` and 1 s.
    """
    tree = Tree(tokens)
    ended: set[int] = set()
    for signum, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_WAIT_S)):
        deadline = time.monotonic() + wait_s
        ended |= tree.signal(signum)
        while (left := tree.groups()) and time.monotonic() < deadline:
            time.sleep(TICK_S)
        if not ended and not left:
            break  # as nearly always when a process has died: two looks have found nothing
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
        code = "import sys; sys.path.insert(0, sys.argv[1]); from upq.trees import stand_by"
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
