"""A TCP proxy before a private server: a line that can be cut without a word to either end."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

from sqlalchemy import make_url

from tests.servers import Postgres, PrivateServer


class Proxy:
    """Forwards to the server's UNIX socket. While it is cut, connections stay open and are silent.

    `cut_at`, once a client has sent it, cuts the line before it arrives.
    """

    def __init__(self, server: PrivateServer) -> None:
        self._server = server
        name = ".s.PGSQL.5432" if isinstance(server, Postgres) else "socket"
        self._target = f"{server.folder}/{name}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._flows = threading.Event()
        self._flows.set()
        self._lost: list[threading.Event] = []
        self._socks: list[socket.socket] = []
        self.cut_at: bytes | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.mend()
        for sock in (self._listener, *self._socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for flows in self._lost:
            flows.set()

    def url(self, url: str) -> str:
        """The URL of a database of the server, with the way through here."""
        port = self._listener.getsockname()[1]
        through = make_url(url).set(host="127.0.0.1", port=port, query={})
        return through.render_as_string(hide_password=False)

    def cut(self) -> None:
        self._flows.clear()

    def mend(self) -> None:
        """What was sent meanwhile arrives."""
        self.cut_at = None
        self._flows.set()

    def lose(self) -> None:
        """Nothing ever comes through the connections that are there; new ones are well."""
        self._flows.clear()
        self._lost.append(self._flows)
        self._flows = threading.Event()
        self._flows.set()

    @property
    def is_cut(self) -> bool:
        return not self._flows.is_set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target)
            except OSError:  # the server is away: so it is for the client
                client.close()
                server.close()
                continue
            self._socks += [client, server]
            for pair in ((client, server), (server, client)):
                args = (*pair, self._flows)
                threading.Thread(target=self._forward, args=args, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, flows: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self.cut_at is not None and self.cut_at in data:
                    flows.clear()
                flows.wait()
                sink.sendall(data)
            flows.wait()
            sink.shutdown(socket.SHUT_WR)
