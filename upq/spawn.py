"""What a command may use: set by `shim` on itself before it becomes the command.

Only a command that has limits, or a descriptor of its own, goes through the shim.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upq.pipes import closing

#: Added to oom_score_adj of every command: when memory is short they go before the daemon.
OOM_SCORE = 500

#: Descriptors from here on are never asked for by a program.
_FREE_FD = 10
_SHIM = str(Path(__file__).with_name("shim.py"))

if sys.version_info < (3, 11, 6):
    # Without cpython's gh-104372 vfork keeps Python's lock until the child has found its folder and
    # its program: on a mount that hangs all threads would stand still.
    subprocess._USE_VFORK = False  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Limits:
    """0 and "" stand for none."""

    nice: int = 0
    #: "idle", or "best-effort:7".
    ionice: str = ""
    memory_bytes: int = 0
    cpu_s: float = 0.0
    file_bytes: int = 0
    open_files: int = 0

    def facts(self) -> list[str]:
        """What the shim is told."""
        found = {
            "nice": self.nice,
            "file": self.file_bytes,
            "open": self.open_files,
            "cpu": math.ceil(self.cpu_s),
            "memory": self.memory_bytes,
        }
        return [f"{name}={value}" for name, value in found.items() if value]

    def io_words(self) -> list[str]:
        """The program of util-linux that sets the class, and then becomes what follows."""
        kind, _, level = self.ionice.partition(":")
        if kind == "idle":
            return ["ionice", "-c", "3"]
        return ["ionice", "-c", "2", "-n", level or "4"] if kind else []


def start(
    words: list[str],
    limits: Limits,
    give: Mapping[int, int],
    group: int | None = None,
    **how: Any,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, under limits; it has become it at the return.

    give: by the number it sees (3 to 9), descriptors of ours. group: `Group.door` of the control
    group it runs in. Raises OSError as Popen does; for a limit that cannot be set it names that in
    place of a file.
    """
    facts = limits.facts() + [f"fd={here}:{there}" for there, here in give.items()]
    more = [*give.values()]
    if group is not None:
        facts.insert(0, f"group={group}")
        more.append(group)
    io_words = limits.io_words()
    if not facts and not io_words:
        process = subprocess.Popen(words, start_new_session=True, **how)
        first_to_go(process.pid)
        return process
    error_r, error_w = pipe()
    with open(error_r, "rb") as told:
        try:
            process = subprocess.Popen(
                [*io_words, sys.executable, "-I", "-S", _SHIM, f"error={error_w}", *facts, "--",
                 *words],
                pass_fds=(error_w, *more),
                start_new_session=True,
                **how,
            )  # fmt: skip
        finally:
            os.close(error_w)
        first_to_go(process.pid)
        number, _, what = told.read().decode().partition(" ")
    if number:
        with process:  # it has ended
            raise OSError(int(number), os.strerror(int(number)), what or None)
    return process


def pipe() -> tuple[int, int]:
    """Read and write end; what is passed on is above the numbers that a program may ask for."""
    read, low = os.pipe()
    with closing(low):
        return read, fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FREE_FD)


def first_to_go(pid: int) -> None:
    """Have the kernel end this process before the daemon when memory is short."""
    with contextlib.suppress(OSError):  # it has ended, or is setuid
        own = int(Path("/proc/self/oom_score_adj").read_text())
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(min(own + OOM_SCORE, 1000)))
