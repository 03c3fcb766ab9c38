"""The doors of the line protocol: UNIX and TCP sockets.

A door lets clients in, within the limits; the lobby reads and answers them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upq import wire
from upq.access import Peer, peer_of
from upq.errors import AlreadyRunning, Busy, CannotCreate, RequestError
from upq.lobby import Lobby
from upq.settings import Listen

log = logging.getLogger(__name__)

#: Seconds that accept pauses when the process has no file descriptor left.
FULL_PAUSE_S = 0.5


@dataclass(frozen=True)
class Place:
    """Where a door is, and the inode it made, so that only its own is removed."""

    path: Path | None
    inode: int = 0


class Door:
    """One listening socket: lets clients into the lobby, within the limits."""

    def __init__(self, sock: socket.socket, lobby: Lobby, limits: Listen, place: Place) -> None:
        self._sock = sock
        self._lobby = lobby
        self._limits = limits
        self._place = place
        self._lock = threading.Lock()
        self._per_peer: Counter[str] = Counter()
        self._open: set[socket.socket] = set()
        self._closed = False
        # Given up for a moment when there is no descriptor left, to tell one client so.
        self._spare: int | None = open_spare()
        self._stop_r, self._stop_w = os.pipe()

    def start(self) -> None:
        threading.Thread(target=self._accept_all, name=f"accept-{self}", daemon=True).start()

    def __str__(self) -> str:
        if self._place.path or self._sock.family == socket.AF_UNIX:
            return str(self._place.path or self._sock.getsockname())
        host, port, *_ = self._sock.getsockname()
        return f"{host}:{port}"

    def close(self) -> None:
        """Accept nothing more. Connections go on until `hang_up`."""
        if self._closed:
            return
        os.write(self._stop_w, b"x")  # before: who accepts closes this pipe when it sees that
        self._closed = True
        path = self._place.path
        if path is not None and self._place.inode:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == self._place.inode:
                    path.unlink()

    @property
    def outlives_us(self) -> bool:
        """Whether systemd keeps the socket when the daemon goes."""
        return self._place.path is None and self._sock.family == socket.AF_UNIX

    def hang_up(self) -> None:
        """End the connections that are still open; replies under way get a second to leave."""
        self._shut(socket.SHUT_RD)
        over_s = time.monotonic() + 1.0
        while self._open and time.monotonic() < over_s:
            time.sleep(0.005)
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(how)

    def _accept_all(self) -> None:
        with self._sock:
            while not self._closed:
                watched: list[Any] = [self._sock, self._stop_r]
                if self._stop_r in select.select(watched, [], [])[0]:
                    break
                try:
                    self._accept()
                except Exception:
                    log.exception("accepting on %s failed", self)
        os.close(self._stop_r)
        os.close(self._stop_w)
        if self._spare is not None:
            os.close(self._spare)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._refuse_without_descriptors()
            return
        try:
            peer = peer_of(sock)
            self._admit(sock, peer)
        except (RequestError, OSError) as error:
            turn_away(sock, error)

    def _admit(self, sock: socket.socket, peer: Peer) -> None:
        sock.setblocking(True)
        with self._lock:
            if len(self._open) >= self._limits.max_connections:
                raise Busy(f"{len(self._open)} connections are open, the limit of this socket")
            if self._per_peer[peer.name] >= self._limits.max_per_peer:
                raise Busy(f"{peer.name} has {self._per_peer[peer.name]} connections, the limit")
            self._open.add(sock)
            self._per_peer[peer.name] += 1
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._lobby.admit(sock, peer, self._limits, lambda: self._forget(sock, peer))
        except BaseException:
            self._forget(sock, peer)
            raise

    def _forget(self, sock: socket.socket, peer: Peer) -> None:
        with self._lock:
            self._open.discard(sock)
            self._per_peer[peer.name] -= 1
            if not self._per_peer[peer.name]:
                del self._per_peer[peer.name]

    def _refuse_without_descriptors(self) -> None:
        log.error("no file descriptors left (raise LimitNOFILE)")
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        with contextlib.suppress(OSError):
            sock, _ = self._sock.accept()
            turn_away(sock, Busy("no file descriptors left"))
        with contextlib.suppress(OSError):
            self._spare = open_spare()
        select.select([self._stop_r], [], [], FULL_PAUSE_S)


def open_spare() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def turn_away(sock: socket.socket, error: Exception) -> None:
    """One ERR line, if the client takes it at once, and good-bye."""
    with contextlib.suppress(OSError), sock:
        if isinstance(error, RequestError):
            sock.setblocking(False)
            sock.send(wire.err(error.code, str(error)))


# Binding ----------------------------------------------------------------------------------------


def bind_unix(path: Path, mode: int) -> tuple[socket.socket, Place]:
    """Listen at a path; never wider open than `mode`, not for a moment.

    The caller holds the lock on the path. What lies there already goes only when it is a socket
    that nobody answers. Raises AlreadyRunning or CannotCreate.
    """
    try:
        clear(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(1024)
    except OSError as error:
        why = "the path is longer than 107 bytes" if "too long" in str(error) else error.strerror
        raise CannotCreate(f"[paths] socket = {path}: {why}") from error
    return sock, Place(path, path.stat().st_ino)


def clear(path: Path) -> None:
    """Make way at a socket's path. Raises AlreadyRunning, CannotCreate."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise CannotCreate(f"[paths] socket = {path}: there is something that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            raise AlreadyRunning(f"{path}: somebody listens there, but: {error}") from error
    raise AlreadyRunning(f"{path}: another daemon answers there")


def bind_tcp(host: str, port: int) -> tuple[socket.socket, Place]:
    """Listen on a loopback address. Raises CannotCreate."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        raise CannotCreate(f"[listen] tcp = {host}:{port}: {error.strerror}") from error
    return sock, Place(None)
