"""Sets limits on itself and becomes a command: what runs between the daemon and a limited command.

Run as a file by an interpreter without site packages (`-I -S`); it imports nothing of upq and as
little else as it can, because every start of such a command pays for it (7 ms). A function between
fork and exec (preexec_fn) would deadlock in a daemon with threads, and limits set from outside
would come after the first children of the command.

    shim.py error=11 group=13 fd=12:3 nice=5 memory=1073741824 -- program argument ...

What goes wrong is told on descriptor `error` as `errno text`; it closes when the program runs.
"""

import errno
import fcntl
import os
import resource
import signal
import sys

#: From the first signal of cpu_limit, SIGXCPU, to SIGKILL.
CPU_GRACE_S = 5

_RLIMITS = {
    "memory": (resource.RLIMIT_AS, 0),
    "cpu": (resource.RLIMIT_CPU, CPU_GRACE_S),
    "file": (resource.RLIMIT_FSIZE, 0),
    "open": (resource.RLIMIT_NOFILE, 0),
}


def limit(name: str, soft: int) -> None:
    """What is allowed already is not raised."""
    which, more = _RLIMITS[name]
    _, most = resource.getrlimit(which)
    if most != resource.RLIM_INFINITY:
        soft = min(soft, most)
    hard = soft + more
    resource.setrlimit(which, (soft, hard if most == resource.RLIM_INFINITY else min(hard, most)))


def take(name: str, value: str) -> None:
    if name == "nice":
        os.setpriority(os.PRIO_PROCESS, 0, max(int(value), os.nice(0)))
    elif name == "group":
        os.write(int(value), b"0")
        os.close(int(value))
    elif name == "fd":
        here, _, there = value.partition(":")
        os.dup2(int(here), int(there))
        os.close(int(here))
    else:
        limit(name, int(value))


def become(words: list[str]) -> None:
    """Never returns."""
    at = words.index("--")
    facts = [word.partition("=")[::2] for word in words[:at]]
    error_fd = int(dict(facts)["error"])
    fcntl.fcntl(error_fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    # Python ignores these, and a program would inherit that.
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_DFL)
    doing = ""
    try:
        for name, value in facts:
            if name != "error":
                doing = name
                take(name, value)
        doing = ""
        os.execvp(words[at + 1], words[at + 1 :])
    except (OSError, MemoryError) as error:
        number = getattr(error, "errno", errno.ENOMEM)
        os.write(error_fd, f"{number} {doing}".encode())
        os._exit(127)


if __name__ == "__main__":
    become(sys.argv[1:])
