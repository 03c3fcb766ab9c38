"""What systemd and the daemon tell each other: readiness, watchdog, passed sockets.

Everything here is silent and empty when the daemon was not started by systemd.
"""

from __future__ import annotations

import os
import socket
import time

#: The first passed descriptor, fixed by sd_listen_fds(3).
FIRST_FD = 3
#: Seconds that systemd may take to read what it is told; a daemon does not hang with it.
SEND_S = 5.0


def notify(*assignments: str) -> bool:
    """Send `READY=1`, `STATUS=...`, `STOPPING=1`, `WATCHDOG=1`; False when nobody could be told.

    All assignments of one call travel in one datagram.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    lines = (assignment.replace("\n", " ") for assignment in assignments)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(SEND_S)
            sock.connect(address)
            sock.sendall("\n".join(lines).encode())
    except OSError:
        return False
    return True


def notify_reloading() -> bool:
    """Say that a reload has begun; `notify("READY=1")` says that it is over."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval_s() -> float | None:
    """Seconds between two `WATCHDOG=1`: half of what systemd allows. None when it does not ask."""
    pid = os.environ.get("WATCHDOG_PID", "")
    usec = os.environ.get("WATCHDOG_USEC", "")
    if pid not in ("", str(os.getpid())) or not usec.isdecimal() or int(usec) == 0:
        return None
    return int(usec) / 2e6


def listen_fds() -> dict[str, list[socket.socket]]:
    """The sockets of the socket unit by FileDescriptorName; one unit may pass several.

    The variables are unset: the sockets are handed out once, and never to a child.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    sockets: dict[str, list[socket.socket]] = {}
    if pid != str(os.getpid()) or not count.isdecimal():
        return sockets
    for index in range(int(count)):
        os.set_inheritable(FIRST_FD + index, False)
        name = names[index] if index < len(names) else ""
        sockets.setdefault(name, []).append(socket.socket(fileno=FIRST_FD + index))
    return sockets
