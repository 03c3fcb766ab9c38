"""Mirrors that are filled by FTP, with TLS unless told otherwise, for jobs. Not a job."""

from __future__ import annotations

import contextlib
import ftplib
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import PurePosixPath
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from upq_jobs import web

from upq import Abort, Retry
from upq.kinds import YES_NO
from upq.when import duration

BLOCK_BYTES = 1 << 16
#: Bytes before the place where an upload is to go on that have to be the same on both sides.
SEAM_BYTES = 1 << 20
#: Seconds between two looks whether the job is cancelled, and those that it then has to say so.
LOOK_S, GRACE_S = 0.25, 1.0
#: What some servers say to a login that may work later, with a code that means "for ever".
FULL = re.compile(r"530.*(too many|maximum)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Mirror:
    """One of the `mirrors` of a section."""

    name: str
    host: str
    port: int
    user: str
    password: str = field(repr=False)
    #: Where the login leads, or a folder from there on; with a `/` in front one from the top.
    folder: str
    #: "yes", "no", "unverified", or the file of the authorities to trust.
    tls: str
    passive: bool
    timeout_s: float
    #: Whether all of a copy is read back, even where the server can tell its size.
    reads_back: bool
    #: The address that others find its files below; "" for none.
    web: str


def mirrors(getcfg: Callable[..., Any]) -> dict[str, Mirror]:
    """All mirrors of a job's section. Raises ValueError.

    `eu_tls` is a setting of the mirror eu, and `tls` of all that have none of their own.
    """
    names = str(getcfg("mirrors", "")).replace(",", " ").split()
    if not names:
        raise ValueError("mirrors has to be set")
    for name in names:
        if not re.fullmatch("[a-z0-9][a-z0-9_]{0,63}", name):
            raise ValueError(f"mirrors: {name!r} is not a-z, 0-9 and _")
    return {name: mirror(name, getcfg) for name in names}


def mirror(name: str, getcfg: Callable[..., Any]) -> Mirror:
    def setting(key: str, default: str) -> str:
        return str(getcfg(f"{name}_{key}") or getcfg(key) or default).strip()

    try:
        url = urlsplit(setting("url", ""))
        port = url.port or ftplib.FTP_PORT
    except ValueError as error:
        raise ValueError(f"{name}_url: {error}") from None
    user, folder = unquote(url.username or ""), unquote(url.path.removeprefix("/"))
    if url.scheme != "ftp" or not url.hostname or not (user + folder).isprintable():
        raise ValueError(f"{name}_url has to be set, as ftp://user@host/folder")
    if url.password is not None:
        raise ValueError(f"{name}_url: the password belongs into {name}_password_file")
    address = setting("web", "")
    if address and (fault := web.fault(address)):
        raise ValueError(f"{name}_web: {fault}")
    verify = setting("verify", "size")
    if verify not in ("size", "content"):
        raise ValueError(f"{name}_verify: {verify!r} is not size or content")
    try:
        return Mirror(
            name,
            url.hostname,
            port,
            user,
            setting("password", ""),
            folder,
            tls(setting("tls", "yes")),
            YES_NO.read(setting("passive", "yes")),
            duration(setting("ftp_timeout", "30s")),
            verify == "content",
            address,
        )
    except ValueError as error:
        raise ValueError(f"mirror {name}: {error}") from None


def tls(text: str) -> str:
    """`yes`, `no`, `unverified`, or the file of `verify FILE`. Raises ValueError."""
    word, _, file = text.partition(" ")
    if word == "verify":
        if not os.path.isabs(file):
            raise ValueError(f"tls: {file!r} is not the absolute path of a file")
        return file
    if text not in ("yes", "no", "unverified"):
        raise ValueError(f"tls: {text!r} is not yes, no, unverified or verify /a/file")
    return text


def context(tls: str) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=tls if os.path.isabs(tls) else None)
    if tls == "unverified":
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    return made


class Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Line(ftplib.FTP_TLS):
    """A control connection, with TLS where `login` is told so."""

    data: socket.socket | None = None

    def ntransfercmd(self, cmd: str, rest: int | str | None = None) -> tuple[socket.socket, Any]:
        conn, size = ftplib.FTP.ntransfercmd(self, cmd, rest)
        self.data = conn
        if self._prot_p:
            # Many servers take only data connections of the session that has logged in.
            session = self.sock.session
            conn = self.context.wrap_socket(conn, server_hostname=self.host, session=session)
            self.data = conn
        return conn, size

    def hang_up(self) -> None:
        """Wake the thread that waits for the server; any other thread may call it."""
        for sock in (self.sock, self.data):
            if sock is not None:
                with contextlib.suppress(OSError):
                    # That of SSLSocket is not for a thread that does not own it.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def begin_in(self, folder: str) -> None:
        """Go into a folder that has to be there."""
        try:
            self.cwd(folder)
        except ftplib.error_perm as error:
            raise ftplib.error_perm(f"{error} (the folder {folder} of its url)") from None

    def enter(self, folder: PurePosixPath) -> None:
        """Go into a folder below this one; what is missing of it is made."""
        for name in map(literal, folder.parts):
            try:
                self.cwd(name)
            except ftplib.error_perm:
                self._make(name)

    def _make(self, name: str) -> None:
        try:
            self.mkd(name)
        except ftplib.error_perm as refused:
            # Somebody may have been quicker.
            try:
                self.cwd(name)
            except ftplib.error_perm:
                raise refused from None
            return
        self.cwd(name)

    def size_of(self, name: str) -> int | None:
        """None when there is no such file, or a server that does not tell."""
        self.voidcmd("TYPE I")
        try:
            return self.size(name)
        except ftplib.error_perm:
            return None

    @contextlib.contextmanager
    def reading(self, name: str, start: int = 0) -> Iterator[BufferedReader]:
        """What a file on the server holds from a byte on; to be read to its end."""
        self.voidcmd("TYPE I")
        with self._broken_off():
            conn = self.transfercmd(f"RETR {name}", start or None)
            with conn, conn.makefile("rb") as file:
                yield file
        self.voidresp()

    def store(self, name: str, source: Source, start: int = 0) -> None:
        with self._broken_off():
            self.storbinary(f"STOR {name}", source, BLOCK_BYTES, rest=start or None)

    @contextlib.contextmanager
    def _broken_off(self) -> Iterator[None]:
        """When it is us who end a transfer, the server says what it thinks of that."""
        try:
            yield
        except Abort:
            with contextlib.suppress(*ftplib.all_errors):
                self.voidresp()
            raise

    def replace(self, old: str, name: str) -> None:
        """Rename a file, over another one where there is one."""
        name = literal(name)
        try:
            self.rename(old, name)
        except ftplib.error_perm:
            if self.size_of(name) is None:
                raise
            # Some servers rename nothing over a file.
            self.delete(name)
            self.rename(old, name)


def literal(name: str) -> str:
    """A name in which no server finds somebody's home or an option."""
    return f"./{name}" if name.startswith(("~", "-")) else name


@contextlib.contextmanager
def session(mirror: Mirror, cancelled: threading.Event) -> Iterator[Line]:
    """A connection that is logged in and in the mirror's folder; it ends when the event is set.

    Raises Abort for what will not pass and Retry for what may, whatever goes wrong in the block.
    """
    line = Line(context=context(mirror.tls), timeout=mirror.timeout_s)
    line.set_pasv(mirror.passive)
    try:
        with ended_by(cancelled, line):
            line.connect(mirror.host, mirror.port)
            keep_alive(line.sock)
            line.login(mirror.user, mirror.password, secure=mirror.tls != "no")
            if mirror.tls != "no":
                line.prot_p()
            if mirror.folder:
                line.begin_in(mirror.folder)
            yield line
            with contextlib.suppress(*ftplib.all_errors):  # all is done, whatever comes now
                line.quit()
    except (*ftplib.all_errors, ValueError) as error:
        raise Abort("cancelled") if cancelled.is_set() else judged(mirror, error) from error
    finally:
        line.close()


def keep_alive(sock: socket.socket) -> None:
    """Nothing passes here while a file does, and gateways forget such connections."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 60)


@contextlib.contextmanager
def ended_by(cancelled: threading.Event, line: Line) -> Iterator[None]:
    """Hang up when the event is set, should the thread not come out by itself."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            if cancelled.is_set() and not over.wait(GRACE_S):
                line.hang_up()

    watcher = threading.Thread(target=watch, name=f"ftp {line.host}", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def judged(mirror: Mirror, error: Exception) -> Abort | Retry:
    """Whether another try makes sense."""
    text = f"{mirror.name}: {' '.join(str(error).split()) or 'the server hung up'}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return Abort(f"{mirror.name}: its certificate is not trusted: {error.verify_message}")
    if isinstance(error, UnicodeError):
        return Abort(f"{mirror.name}: the server does not speak UTF-8")
    if isinstance(error, ftplib.error_perm) and not FULL.match(str(error)):
        return Abort(text)
    return Retry(text)
