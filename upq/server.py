"""The doors of the line protocol: UNIX and TCP sockets, a thread for each connection.

A door reads lines, calls the front desk and writes one reply a line, in order.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upq import protocol, wire
from upq.access import Peer, peer_of
from upq.config import Listen
from upq.dispatcher import Dispatcher
from upq.errors import AlreadyRunning, Busy, CannotCreate, RequestError, TimedOut
from upq.protocol import Request

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
#: Bytes of replies at which they are sent without waiting for the others.
SEND_BYTES = 1 << 16
#: Submits that are stored together when a client pipelines.
RUN_LIMIT = 256
#: Seconds that accept pauses when the process has no file descriptor left.
FULL_PAUSE_S = 0.5


class Lines:
    """Cuts what arrives into lines; of a line over its limit only the beginning is kept."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def is_partial(self) -> bool:
        return bool(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """Whole lines without their LF; one that was too long is still too long."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[: wire.limit_bytes(rest) + 2]
        return lines


class Connection:
    """One client, in its own thread."""

    def __init__(self, sock: socket.socket, peer: Peer, desk: Dispatcher, limits: Listen) -> None:
        self._sock = sock
        self._peer = peer
        self._desk = desk
        self._limits = limits
        self._waits_s = 0.0
        self._out = bytearray()
        self._submits: list[Request] = []

    def serve(self) -> None:
        """Answer until the client leaves, is silent for too long, or sends an empty line."""
        lines = Lines()
        set_timeout(self._sock, socket.SO_SNDTIMEO, self._limits.write_s)
        over_s: float | None = None  # until when the line that has begun must be whole
        goes_on = True
        while goes_on:
            try:
                self._patience(over_s)
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                what = "nothing was asked" if over_s is None else "a line did not come to its end"
                self._refuse(TimedOut(f"{what} in time"), json=False)
                self._flush()
                return
            goes_on = data != b"" and self._answer_all(lines.feed(data))
            if not lines.is_partial:
                over_s = None
            elif over_s is None or b"\n" in data:
                over_s = time.monotonic() + self._limits.line_s

    def _patience(self, over_s: float | None) -> None:
        """Have the next read wait as long as it may. Raises BlockingIOError when that is over."""
        seconds = self._limits.idle_s if over_s is None else over_s - time.monotonic()
        if seconds <= 0:
            raise BlockingIOError
        if seconds != self._waits_s:
            set_timeout(self._sock, socket.SO_RCVTIMEO, seconds)
            self._waits_s = seconds

    def _answer_all(self, lines: list[bytes]) -> bool:
        """Reply to whole lines; False when one of them ends the talk."""
        goes_on = True
        for line in lines:
            try:
                request = protocol.parse(line)
            except RequestError as error:
                self._submit()
                self._refuse(error, wire.is_json(line))
                continue
            if request is None:
                goes_on = False
                break
            if request.kind == protocol.SUBMIT:
                self._submits.append(request)
                if len(self._submits) < RUN_LIMIT:
                    continue
                self._submit()
            else:
                self._submit()
                if request.verb == "wait":
                    self._flush()
                self._answer(request)
            if len(self._out) > SEND_BYTES:
                self._flush()
        self._submit()
        self._flush()
        return goes_on

    def _submit(self) -> None:
        """Store the submits read so far together, and queue their replies."""
        submits, self._submits = self._submits, []
        if not submits:
            return
        acks = 0
        for request, answer in zip(submits, self._stored(submits), strict=True):
            if isinstance(answer, RequestError):
                self._out += wire.err(answer.code, str(answer), json=request.json)
            else:
                acks += 1
                self._out += wire.ack(
                    answer.id, answer.message, duplicate=answer.duplicate, json=request.json
                )
        self._desk.count(acks, len(submits) - acks)

    def _stored(self, submits: list[Request]) -> list[wire.Ack | RequestError]:
        try:
            return self._desk.submit_all(submits, self._peer)
        except Exception as error:
            log.exception("a submit failed")
            return [RequestError(f"a fault of upq: {error}")] * len(submits)

    def _answer(self, request: Request) -> None:
        try:
            if request.kind == protocol.SUBMIT_MANY:
                acks = self._desk.submit_many(request.many, self._peer)
                self._desk.count(len(acks), 0)
                self._out += wire.acks(acks)
            else:
                data = self._desk.answer(request, self._peer, self._is_there)
                self._out += wire.ok(data, json=request.json)
        except RequestError as error:
            self._refuse(error, request.json)
        except Exception as error:
            log.exception("answering %s failed", request.verb)
            self._refuse(RequestError(f"a fault of upq: {error}"), request.json)

    def _refuse(self, error: RequestError, json: bool) -> None:
        self._desk.count(0, 1)
        self._out += wire.err(error.code, str(error), json=json)

    def _flush(self) -> None:
        if self._out:
            self._sock.sendall(self._out)
            self._out.clear()

    def _is_there(self) -> bool:
        """Whether the client still listens, asked while it waits; it may have sent all it will."""
        poll = select.poll()
        poll.register(self._sock, 0)
        return not poll.poll(0)


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """A time limit in the kernel: unlike settimeout it costs no system call on each read."""
    whole = int(seconds)
    sock.setsockopt(
        socket.SOL_SOCKET, option, struct.pack("@ll", whole, int((seconds - whole) * 1e6))
    )


@dataclass(frozen=True)
class Place:
    """Where a door is, and the inode it made, so that only its own is removed."""

    path: Path | None
    inode: int = 0


class Door:
    """One listening socket: accepts within the limits and starts a thread a connection."""

    def __init__(self, sock: socket.socket, desk: Dispatcher, limits: Listen, place: Place) -> None:
        self._sock = sock
        self._desk = desk
        self._limits = limits
        self._place = place
        self._lock = threading.Lock()
        self._per_peer: Counter[str] = Counter()
        self._open: set[socket.socket] = set()
        self._closed = False
        self._made = 0
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
        self._closed = True
        os.write(self._stop_w, b"x")
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
            self._made += 1
        threading.Thread(
            target=self._serve, args=(sock, peer), name=f"C-{self._made}", daemon=True
        ).start()

    def _serve(self, sock: socket.socket, peer: Peer) -> None:
        try:
            with sock:
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                Connection(sock, peer, self._desk, self._limits).serve()
        except OSError as error:
            log.debug("connection of %s ended: %s", peer.name, error)
        except Exception:
            log.exception("a connection of %s failed", peer.name)
        finally:
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
