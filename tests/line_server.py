"""A server that speaks the protocol and answers as a test says, for the tests of its clients."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from upq import protocol, wire
from upq.errors import RequestError
from upq.protocol import Request

#: The reply to a request; None closes the connection without one.
Answer = Callable[[Request], bytes | None]


class LineServer:
    """Listens on a UNIX socket, or with a port on TCP, and keeps what was asked."""

    def __init__(self, path: Path | None, answer: Answer | None = None) -> None:
        self.answer: Answer = answer or Desk().answer
        self.lines: list[bytes] = []
        #: When set, a connection gets this and nothing more.
        self.greeting = b""
        keeper = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                if keeper.greeting:
                    self.wfile.write(keeper.greeting)
                    return
                for line in self.rfile:
                    keeper.lines.append(line)
                    reply = keeper.reply(line.removesuffix(b"\n"))
                    if reply is None:
                        return
                    self.wfile.write(reply)

        class Quiet:
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that leaves in the middle is part of the tests."""

        class Unix(Quiet, socketserver.ThreadingUnixStreamServer):
            pass

        class Tcp(Quiet, socketserver.ThreadingTCPServer):
            pass

        self._server = Unix(str(path), Handler) if path else Tcp(("127.0.0.1", 0), Handler)
        if path:
            self.address = str(path)
        else:
            host, port = self._server.server_address[:2]
            self.address = f"{host!s}:{port}"

    def reply(self, line: bytes) -> bytes | None:
        try:
            request = protocol.parse(line)
            return self.answer(request) if request else None
        except RequestError as error:
            return wire.err(error.code, str(error), json=wire.is_json(line))

    def __enter__(self) -> Self:
        # Looks for the end often: the tests are many.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Desk:
    """Accepts every submit, gives out ids from 1 on, and ends each job at once."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.keys: dict[str, int] = {}

    def answer(self, request: Request) -> bytes:
        if request.kind == protocol.SUBMIT_MANY:
            return wire.acks([self.submit(each) for each in request.many])
        if request.kind == protocol.SUBMIT:
            ack = self.submit(request)
            return wire.ack(ack.id, ack.message, duplicate=ack.duplicate, json=request.json)
        return wire.ok(getattr(self, request.verb)(**request.params), json=request.json)

    def submit(self, request: Request) -> wire.Ack:
        key = request.options.key
        if key is not None and key in self.keys:
            return wire.Ack(self.keys[key], "duplicate", True)
        self.jobs.append(job(len(self.jobs) + 1, request.verb, request.params))
        if key is not None:
            self.keys[key] = len(self.jobs)
        return wire.Ack(len(self.jobs), "queued")

    def wait(self, id: int, timeout: float | None = None, whole: bool = False) -> Any:
        one = self.jobs[id - 1]
        return {"job": one, **({"whole": whole_of(one)} if whole else {})}

    def ping(self) -> Any:
        return {"pong": "2026-11-22T00:05:11.123456Z"}


def whole_of(one: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """How a job with nothing below it is as a whole."""
    return {
        "state": one["state"],
        "total": 1,
        "expected": 1,
        "counts": {one["state"]: 1},
        "progress": 1.0,
        "ended_at": one["ended_at"],
        "more": False,
        "left_out": 0,
        "log_cut": False,
        **fields,
    }


def job(id: int, type: str = "hash", params: Any = None, **fields: Any) -> dict[str, Any]:
    """A job as the daemon shows it; it fails when its params say so."""
    params = params or {}
    state = "failed" if "fail" in params else "done"
    return {
        "id": id,
        "type": type,
        "queue": type,
        "state": state,
        "reason": "",
        "params": params,
        "jobdata": params,
        "result": {"n": 1} if state == "done" else None,
        "message": "all is well" if state == "done" else "it broke",
        "progress": None,
        "created_at": "2026-11-22T00:05:11.123456Z",
        "started_at": "2026-11-22T00:05:11.223456Z",
        "ended_at": "2026-11-22T00:05:12.123456Z",
        "run_at": None,
        "attempt": 1,
        "submitter": "root",
        "parent": None,
        **fields,
    }
