"""Real FTP servers for tests, with and without TLS, which misbehave as they are told."""

from __future__ import annotations

import datetime
import ipaddress
import threading
from pathlib import Path
from typing import Any, ClassVar, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import DTPHandler, FTPHandler, TLS_DTPHandler, TLS_FTPHandler
from pyftpdlib.ioloop import IOLoop
from pyftpdlib.servers import FTPServer

USER, PASSWORD = "upq", "hunter2!"


class Faults:
    """What a server does wrong from now on."""

    def __init__(self) -> None:
        #: Hang up in the middle of an upload, after so many bytes of it.
        self.cut_after: int | None = None
        #: Answers in place of what a command does: `{"STOR": "552 No space left"}`.
        self.answers: dict[str, str] = {}
        #: Swap bits of what is stored.
        self.spoils = False
        #: Go on with what is there of an upload.
        self.appends = True
        #: Rename nothing over another file.
        self.keeps_names = False
        #: Take no more of an upload after so many bytes, and say so.
        self.stall_after: int | None = None
        self.stalled = threading.Event()


class _Data:
    """Of both kinds of data connections."""

    def handle_read_event(self) -> None:
        faults: Faults = self.cmd_channel.faults
        super().handle_read_event()
        if not self.receive:
            return
        if faults.stall_after is not None and self.tot_bytes_received >= faults.stall_after:
            self.file_obj.flush()
            self.del_channel()
            faults.stalled.set()
        if faults.cut_after is not None and self.tot_bytes_received >= faults.cut_after:
            self.file_obj.flush()
            self.cmd_channel.close()

    def recv(self, size: int) -> bytes:
        chunk = super().recv(size)
        if self.cmd_channel.faults.spoils and chunk:
            return bytes([chunk[0] ^ 1]) + chunk[1:]
        return chunk


class _Control:
    """Of both kinds of control connections."""

    use_sendfile = False
    faults: ClassVar[Faults]
    said: ClassVar[list[str]]

    def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
        self.said.append(f"{cmd} {arg}".strip())
        taken = self.faults.keeps_names and cmd == "RNTO" and self.fs.lexists(self.fs.ftp2fs(arg))
        answer = "550 File exists." if taken else self.faults.answers.get(cmd)
        if cmd == "STOR" and self._restart_position and not self.faults.appends:
            self._restart_position = 0
            answer = "451 Append/Restart not permitted"
        if answer:
            self.respond(answer)
        else:
            super().pre_process_command(line, cmd, arg)


class Data(_Data, DTPHandler):
    pass


class TlsData(_Data, TLS_DTPHandler):
    pass


class Control(_Control, FTPHandler):
    dtp_handler = Data


class TlsControl(_Control, TLS_FTPHandler):
    dtp_handler = TlsData
    tls_control_required = tls_data_required = True


class FtpServer:
    """Serves a folder to USER."""

    def __init__(self, folder: Path, certificate: Path | None = None, **settings: Any) -> None:
        self.folder = folder
        self.faults = Faults()
        #: All commands that it was given.
        self.said: list[str] = []
        authorizer = DummyAuthorizer()
        authorizer.add_user(USER, PASSWORD, str(folder), perm="elradfmwMT")
        more = {"authorizer": authorizer, "faults": self.faults, "said": self.said, **settings}
        if certificate is not None:
            more["certfile"] = str(certificate)
        self.handler = type("Handler", (TlsControl if certificate else Control,), more)
        self._server = FTPServer(("127.0.0.1", 0), self.handler, ioloop=IOLoop())
        self.port = int(self._server.socket.getsockname()[1])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        return f"ftp://{USER}@127.0.0.1:{self.port}"

    def _serve(self) -> None:
        while not self._over.is_set():
            self._server.ioloop.loop(timeout=0.02, blocking=False)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._server.close_all()

    def did(self, command: str) -> int:
        """How often it was given a command."""
        return sum(line.partition(" ")[0] == command for line in self.said)


def make_certificate(file: Path, address: str = "127.0.0.1") -> Path:
    """A key and a certificate of its own for an address, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "upq test")])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=2))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return file
