"""Control groups of version 2: what a command and all that it has started may use together.

Whoever starts the daemon has to hand it a group (`Delegate=` in a unit of systemd). `Groups` is
that one, `Group` the one of an attempt below it, which is also how nothing of it escapes its end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

#: The controllers that limits need.
CPU, MEMORY, PIDS = "cpu", "memory", "pids"
#: The daemon's own place: a group that passes controllers on may hold no process itself.
OWN = "daemon"
#: How long a killed process may take to go, and the time between two looks.
KILL_WAIT_S, TICK_S = 1.0, 0.01

_JOB = "job-"
_PERIOD_US = 100_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """0 stands for none."""

    memory_bytes: int = 0
    #: 1.0 is one processor.
    cpus: float = 0.0
    tasks: int = 0

    def needs(self) -> dict[str, str]:
        """The controllers it takes, with the names of the settings."""
        found = {
            MEMORY: self.memory_bytes and "memory_max",
            CPU: self.cpus and "cpu_quota",
            PIDS: self.tasks and "tasks_max",
        }
        return {controller: name for controller, name in found.items() if name}

    def files(self, controllers: Collection[str]) -> Iterator[tuple[str, str]]:
        """What is written into the files of a group that has these controllers."""
        if self.memory_bytes and MEMORY in controllers:
            yield "memory.max", str(self.memory_bytes)
            # On disk it would go on, only a thousand times slower, and the machine with it.
            yield "memory.swap.max", "0"
            yield "memory.oom.group", "1"
        if self.cpus and CPU in controllers:
            yield "cpu.max", f"{round(self.cpus * _PERIOD_US)} {_PERIOD_US}"
        if self.tasks and PIDS in controllers:
            yield "pids.max", str(self.tasks)


class Group:
    """The group of one attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def door(self) -> int:
        """A descriptor: whoever writes "0" to it comes in. To be closed."""
        return os.open(self.folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    @property
    def is_empty(self) -> bool:
        return "populated 0" in _read(self.folder / "cgroup.events")

    def pids(self) -> list[int]:
        return [
            int(pid)
            for folder, _, _ in os.walk(self.folder)
            for pid in _read(Path(folder, "cgroup.procs")).split()
        ]

    def signal(self, signum: int, spared: Collection[int] = ()) -> None:
        """To all in it but those of these process groups."""
        for pid in self.pids():
            # It has ended meanwhile, or has become another user's.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) not in spared:
                    os.kill(pid, signum)

    def kill(self) -> None:
        """All in it, at once, so that none can start another meanwhile."""
        try:
            _write(self.folder / "cgroup.kill", "1")
        except OSError:  # a kernel before 5.14
            self.signal(signal.SIGKILL)

    def hit(self) -> str:
        """The setting of which more was wanted than there is; "" for none."""
        if _count(self.folder / "memory.events", "oom_kill"):
            return "memory_max"
        return "tasks_max" if _count(self.folder / "pids.events", "max") else ""

    def remove(self, wait_s: float = KILL_WAIT_S) -> bool:
        """End what is left in it, and take it away; False when something does not go."""
        deadline_s = time.monotonic() + wait_s
        while not self._is_gone():
            self.kill()
            if time.monotonic() > deadline_s:
                return False
            time.sleep(TICK_S)
        return True

    def _is_gone(self) -> bool:
        try:
            for folder, _, _ in os.walk(self.folder, topdown=False):
                os.rmdir(folder)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


class Groups:
    """The group that was handed to this daemon, or why there is none."""

    def __init__(
        self, folder: Path | None, controllers: Collection[str] = (), why: str = ""
    ) -> None:
        self.controllers = frozenset(controllers)
        #: Why limits do not hold; "" when they do.
        self.why = why
        self._folder = folder
        # Of attempts that have ended, but whose processes did not go at once.
        self._left: list[Group] = []

    @classmethod
    def take(cls) -> Groups:
        """Take over the group that this process is in, if it was handed to it alone."""
        folder = own_folder()
        if folder is None:
            return cls(None, why="no control groups of version 2 are mounted here")
        try:
            found = _settle(folder)
        except OSError as error:
            return cls(None, why=f"upq has no control group of its own: {folder}: {error.strerror}")
        missing = ", ".join(sorted({CPU, MEMORY, PIDS} - found))
        return cls(folder, found, f"{folder} was handed over without {missing}" if missing else "")

    def lacking(self, limits: GroupLimits) -> list[str]:
        """The settings that cannot hold here."""
        return [name for key, name in limits.needs().items() if key not in self.controllers]

    @contextlib.contextmanager
    def hold(self, name: str, limits: GroupLimits) -> Iterator[Group | None]:
        """A group under these limits, and the end of all that is in it; None where there is none.

        Raises OSError when it cannot be made.
        """
        if self._folder is None or not self.controllers & limits.needs().keys():
            yield None
            return
        left, self._left = self._left, []
        self._left += [one for one in left if not one.remove(0)]
        group = Group(self._folder / f"{_JOB}{name}")
        group.folder.mkdir()
        try:
            for file, text in limits.files(self.controllers):
                with contextlib.suppress(FileNotFoundError):  # memory.swap.max: built without swap
                    _write(group.folder / file, text)
            yield group
        finally:
            if not group.remove():
                log.warning("a killed command does not go, %s stays for now", group.folder)
                self._left.append(group)

    def sweep(self) -> None:
        """Before the first job: end and remove what an earlier daemon has left."""
        if self._folder is not None:
            for folder in self._folder.glob(f"{_JOB}*"):
                Group(folder).remove()


def own_folder() -> Path | None:
    """The group of this process in the file system."""
    path = next(
        (line[3:] for line in _read(Path("/proc/self/cgroup")).splitlines() if line[:3] == "0::"),
        None,
    )
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        if path is not None and after.split()[0] == "cgroup2" and _is_below(path, root):
            return Path(mount, os.path.relpath(path, root))
    return None


def _is_below(path: str, root: str) -> bool:
    return ".." not in path and os.path.commonpath((path, root)) == root


def _settle(folder: Path) -> set[str]:
    """Go into a group below this one, which then passes on what it can. Raises OSError."""
    if not (folder / "cgroup.events").exists():
        raise PermissionError(0, "it is the root of all")
    _write(folder / "cgroup.subtree_control", "")  # is it ours?
    if others := set(_read(folder / "cgroup.procs").split()) - {str(os.getpid())}:
        raise PermissionError(0, f"{len(others)} other processes are in it")
    wanted = {CPU, MEMORY, PIDS} & set(_read(folder / "cgroup.controllers").split())
    (folder / OWN).mkdir(exist_ok=True)
    _write(folder / OWN / "cgroup.procs", "0")
    try:
        _write(folder / "cgroup.subtree_control", " ".join(f"+{name}" for name in wanted))
    except OSError:
        _write(folder / "cgroup.procs", "0")
        raise
    return wanted


def _count(file: Path, name: str) -> int:
    """The number behind a name in a file of events."""
    words = _read(file).split()
    return int(words[words.index(name) + 1]) if name in words else 0


def _read(file: Path) -> str:
    """ "" for a file that is not there, because its group or its controller is not."""
    with contextlib.suppress(OSError):
        return file.read_text()
    return ""


def _write(file: Path, text: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
