"""Talk to the daemon from Python: `Client`, and `AsyncClient` for asyncio.

Needs nothing but the standard library. A refusal raises the error of `upq.errors` that has its
code. A connection that fails raises OSError and is closed: whether the last request was carried
out is not known then, and only a submit with a `key` is safe to repeat.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from upq import wire
from upq.errors import RequestError, TooLong
from upq.wire import Ack, Batch, Reply

if TYPE_CHECKING:
    import asyncio

#: Where the daemon listens when no configuration can be read.
DEFAULT_SOCKET = "/run/upq/upq.sock"
#: What one of many is: made by `job`, or a line of text.
Submit = Mapping[str, Any] | str
#: Members of a batch that are sent together, and the bytes at which they are.
FILLED_AT_ONCE, FILLED_BYTES = 250, wire.JSON_LIMIT_BYTES // 2
_CLOSED = "the connection was closed after an error; connect() opens it again"


def job(type: str, params: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """One submit, as `submit_many` takes them.

    Options are those of the protocol: in_, at, priority, key, queue, node, timeout, retries,
    expires, after. Durations are seconds, text or timedelta, times text or datetime; None leaves
    an option out.
    """
    given = {name.rstrip("_"): _plain(value) for name, value in options.items()}
    return {
        "submit": type,
        "params": dict(params or {}),
        "options": {name: value for name, value in given.items() if value is not None},
    }


class Acks(list[Ack]):
    """The answers to a submit_many."""

    #: The batch that the jobs are members of; None when they are for none.
    batch: Batch | None = None

    @classmethod
    def of(cls, reply: Reply) -> Acks:
        made = cls(reply.acks)
        made.batch = reply.batch
        return made


class Filling:
    """A batch that is being filled: what `Client.batch` returns.

    Members are sent by the hundred, and the rest when the `with` block ends; then it is closed. An
    exception in the block cancels it. After an OSError `connect()` and `send()` go on where it was;
    a program that has died leaves the batch open: where its follow-up has a key of the program's
    own, the same members in the same order fill it from the start, and none is queued twice.
    """

    def __init__(self, client: Client, then: Submit, when: str) -> None:
        #: The id of the follow-up; 0 before the first members are sent.
        self.id = 0
        #: How many jobs the batch has.
        self.members = 0
        self._client = client
        self._opening = {"then": _with_key(then), "when": when, "open": True}
        self._held: list[Submit] = []
        self._size = self._sent = 0

    def add(self, type: str, params: Mapping[str, Any] | None = None, **options: Any) -> None:
        """One more member, as `submit` takes it."""
        self.put(job(type, params, **options))

    def put(self, member: Submit) -> None:
        """One more, made by `job` or as a line."""
        size = len(wire.encode(member))
        if len(self._held) == FILLED_AT_ONCE or self._size + size > FILLED_BYTES:
            self.send()
        self._held.append(member)
        self._size += size

    def send(self, *, close: bool = False) -> Acks:
        """Queue the members that are held back; returns when they are on disk."""
        request: dict[str, Any] = {"submit_many": self._held}
        if not self.id:
            request |= {**self._opening, "open": not close}
        else:
            request |= {"batch": self.id, "key": f"part {self._sent}", "close": close}
        acks = self._client.many(request)
        self._held, self._size = [], 0
        self._sent += 1
        if acks.batch:
            self.id, self.members = acks.batch.id, acks.batch.members
        return acks

    def close(self) -> Acks:
        """Queue the rest: nothing more comes. The follow-up starts when the members have ended."""
        return self.send(close=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.close()
                return
        except RequestError:
            self._cancel()
            raise
        self._cancel()

    def _cancel(self) -> None:
        if self.id:
            with suppress(OSError, RequestError):
                self._client.cancel(self.id)


def _plain(value: Any) -> Any:
    if hasattr(value, "total_seconds"):
        return value.total_seconds()
    return value.astimezone().isoformat() if hasattr(value, "astimezone") else value


class Client:
    """A connection to the daemon at `address`: the path of a UNIX socket, or `host:port`.

    For one thread at a time. After an OSError, `connect()` opens it again.
    """

    def __init__(self, address: str | os.PathLike[str], timeout_s: float | None = 5) -> None:
        self.address = os.fspath(address)
        #: Seconds to wait for the connection and for each reply; None waits for ever.
        self.timeout_s = timeout_s
        self.connect()

    def connect(self) -> None:
        self._socket = _connect(self.address, self.timeout_s)
        self._replies = self._socket.makefile("rb")

    def close(self) -> None:
        self._replies.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, type: str, params: Mapping[str, Any] | None = None, **options: Any) -> Ack:
        """Queue a job; it is safe on disk when this returns. `job` tells of the options."""
        return self._ask(job(type, params, **options)).acks[0]

    def submit_many(
        self, jobs: Iterable[Submit], then: Submit | None = None, when: str = "done"
    ) -> Acks:
        """Queue what `job` made: all of it or nothing.

        then: a job that follows when all of them are done, or with `when="ended"` when all have
        ended, however. Its id is `.batch.id` of what is returned.
        """
        return self.many({"submit_many": list(jobs), **_followed(then, when)})

    def batch(self, then: Submit, when: str = "done") -> Filling:
        """A batch to be filled: `with client.batch(job("report")) as batch: batch.add("hash")`."""
        return Filling(self, then, when)

    def many(self, request: Mapping[str, Any]) -> Acks:
        """What a submit_many of the protocol answers."""
        return Acks.of(self._ask(request))

    def verb(self, name: str, **arguments: Any) -> Any:
        """What a control verb answers; arguments that are None are left out."""
        return self._ask(_verb(name, arguments)).data

    def wait(self, id: int, timeout_s: float | None = None, *, whole: bool = False) -> Any:
        """The job when it has ended. Raises TimedOut if that takes longer than `timeout_s`.

        whole: when it and all below it have; `whole` of the job then tells how.
        """
        return _waited(self._ask(_wait(id, timeout_s, whole), extra_s=timeout_s))

    def show(self, id: int) -> Any:
        """The job with its history, and with the tree, the state and the log of all below it."""
        return self.verb("show", id=id)

    def jobs(self, **filters: Any) -> Any:
        """A list of jobs by `state`, `type` and `queue`, at most `limit`."""
        return self.verb("jobs", **filters)["jobs"]

    def queues(self) -> Any:
        return self.verb("queues")["queues"]

    def status(self) -> Any:
        return self.verb("status")

    def cancel(self, id: int) -> Any:
        return self.verb("cancel", id=id)

    def retry(self, id: int) -> Any:
        return self.verb("retry", id=id)

    def request(self, line: str) -> Reply:
        """Send one line as it is; a refusal is returned, not raised."""
        return self._exchange(line.encode(errors="surrogateescape") + b"\n", self.timeout_s)

    def pipeline(self, chunks: Iterable[bytes]) -> Iterator[Reply]:
        """Send chunks of whole lines without waiting for replies, and yield these in order.

        Waits for chunks and replies for ever.
        """
        from queue import SimpleQueue  # noqa: PLC0415, few need it
        from threading import Thread  # noqa: PLC0415

        expected: SimpleQueue[int | Exception | None] = SimpleQueue()

        # Has a thread of its own, because a server whose replies are not read stops reading.
        def send() -> None:
            try:
                for chunk in chunks:
                    expected.put(chunk.count(b"\n"))
                    self._socket.sendall(chunk)
                expected.put(None)
            except Exception as error:
                expected.put(error)

        try:
            self._socket.settimeout(None)
            Thread(target=send, daemon=True).start()
            while (count := expected.get()) is not None:
                if isinstance(count, Exception):
                    raise count
                for _ in range(count):
                    yield _reply(self._replies.readline())
        except BaseException:
            self.close()
            raise

    def _ask(self, request: Mapping[str, Any], extra_s: float | None = 0) -> Reply:
        return _accepted(self._exchange(_encoded(request), _sum(self.timeout_s, extra_s)))

    def _exchange(self, request: bytes, timeout_s: float | None) -> Reply:
        if self._replies.closed:
            raise ConnectionError(_CLOSED)
        try:
            self._socket.settimeout(timeout_s)
            # A server that has no place for us says so and closes: that can still be read.
            with suppress(BrokenPipeError, ConnectionResetError):
                self._socket.sendall(request)
            return _reply(self._replies.readline())
        except BaseException:
            self.close()
            raise


class AsyncClient:
    """The same for asyncio: `async with AsyncClient(address) as client: await client.submit(...)`.

    Requests of several tasks wait for each other; one that waits for a job holds up the rest.
    """

    def __init__(self, address: str | os.PathLike[str], timeout_s: float | None = 5) -> None:
        self.address = os.fspath(address)
        self.timeout_s = timeout_s
        self._turn: asyncio.Lock

    async def connect(self) -> None:
        import asyncio  # noqa: PLC0415, four times the cost of the rest

        limit_bytes = 1 << 30
        self._turn = asyncio.Lock()
        async with asyncio.timeout(self.timeout_s):
            if tcp := _tcp(self.address):
                streams = await asyncio.open_connection(*tcp, limit=limit_bytes)
            else:
                streams = await asyncio.open_unix_connection(self.address, limit=limit_bytes)
        self._replies, self._requests = streams

    async def close(self) -> None:
        self._requests.close()
        with suppress(OSError):
            await self._requests.wait_closed()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def submit(
        self, type: str, params: Mapping[str, Any] | None = None, **options: Any
    ) -> Ack:
        return (await self._ask(job(type, params, **options))).acks[0]

    async def submit_many(
        self, jobs: Iterable[Submit], then: Submit | None = None, when: str = "done"
    ) -> Acks:
        return await self.many({"submit_many": list(jobs), **_followed(then, when)})

    async def many(self, request: Mapping[str, Any]) -> Acks:
        return Acks.of(await self._ask(request))

    async def verb(self, name: str, **arguments: Any) -> Any:
        return (await self._ask(_verb(name, arguments))).data

    async def wait(self, id: int, timeout_s: float | None = None, *, whole: bool = False) -> Any:
        return _waited(await self._ask(_wait(id, timeout_s, whole), extra_s=timeout_s))

    async def _ask(self, request: Mapping[str, Any], extra_s: float | None = 0) -> Reply:
        import asyncio  # noqa: PLC0415

        line = _encoded(request)
        async with self._turn:
            if self._requests.is_closing():
                raise ConnectionError(_CLOSED)
            try:
                async with asyncio.timeout(_sum(self.timeout_s, extra_s)):
                    self._requests.write(line)
                    reply = _reply(await self._replies.readline())
            except BaseException:
                self._requests.close()
                raise
        return _accepted(reply)


def _connect(address: str, timeout_s: float | None) -> socket.socket:
    if tcp := _tcp(address):
        return socket.create_connection(tcp, timeout_s)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def _tcp(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    is_tcp = host and port.isdecimal() and "/" not in address
    return (host.strip("[]"), int(port)) if is_tcp else None


def _verb(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: _plain(value) for name, value in arguments.items() if value is not None}
    return {"verb": name, **given}


def _wait(id: int, timeout_s: float | None, whole: bool) -> dict[str, Any]:
    return _verb("wait", {"id": id, "timeout": timeout_s, "whole": whole or None})


def _waited(reply: Reply) -> Any:
    """The job, with the whole if that was asked for."""
    data = reply.data
    return data["job"] | {name: data[name] for name in ("whole",) if name in data}


def _encoded(request: Mapping[str, Any]) -> bytes:
    line = wire.encode(request)
    if len(line) > wire.JSON_LIMIT_BYTES:
        raise TooLong(f"a request may have {wire.JSON_LIMIT_BYTES} bytes; this has {len(line)}")
    return line


def _with_key(then: Submit) -> Submit:
    """The submit with a key, so that it is safe to repeat."""
    from uuid import uuid4  # noqa: PLC0415, few need it

    if isinstance(then, str):
        return then if "@key:" in then else f"{then} @key:{uuid4()}"
    return {**then, "options": {"key": str(uuid4()), **then.get("options", {})}}


def _followed(then: Submit | None, when: str) -> dict[str, Any]:
    return {} if then is None else {"then": then, "when": when}


def _sum(timeout_s: float | None, extra_s: float | None) -> float | None:
    return None if timeout_s is None or extra_s is None else timeout_s + extra_s


def _reply(line: bytes) -> Reply:
    if not line.endswith(b"\n"):
        raise ConnectionResetError("the daemon closed the connection before it answered")
    try:
        return wire.read_reply(line)
    except ValueError as error:
        raise ConnectionAbortedError(str(error)) from None


_ERRORS = {error.code: error for error in RequestError.__subclasses__()}


def _accepted(reply: Reply) -> Reply:
    if not reply.code:
        return reply
    error = _ERRORS.get(reply.code, RequestError)(reply.message)
    error.code = reply.code
    raise error


def find_socket(
    config: str | None = None, env: Mapping[str, str] = os.environ, cwd: str = "."
) -> str:
    """Where the daemon listens: what `config` or $UPQ_CONFIG says, else $UPQ_SOCKET, else what
    the first readable upq.cfg says: in `cwd`, the user's own, the one in /etc/upq.

    Raises OSError or ValueError for a named file that cannot be read.
    """
    if named := config or env.get("UPQ_CONFIG"):
        return _socket_in(named, env)
    if named := env.get("UPQ_SOCKET"):
        return named
    user = env.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for folder in (cwd, os.path.join(user, "upq"), "/etc/upq"):
        # A configuration that holds passwords may be closed to those whom the socket serves.
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            return _socket_in(os.path.join(folder, "upq.cfg"), env)
    return DEFAULT_SOCKET


def _socket_in(path: str, env: Mapping[str, str]) -> str:
    """What one configuration says of the socket; whether the rest of it is right is not asked."""
    import re  # noqa: PLC0415, only needed here, as the next two
    from configparser import Error, RawConfigParser  # noqa: PLC0415
    from glob import glob  # noqa: PLC0415

    folder = os.path.dirname(os.path.abspath(path))
    parser = RawConfigParser(strict=False, allow_no_value=True)
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
        parser.read(sorted(glob(f"{folder}/upq.d/*.cfg")), encoding="utf-8-sig")
    except (Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None

    def setting(key: str) -> str:
        text = env.get(f"UPQ_PATHS__{key.upper()}") or parser.get("paths", key, fallback="") or ""
        return re.sub(r"\$\{(\w+)\}", lambda name: env.get(name[1], name[0]), text)

    socket_path = setting("socket") or os.path.join(setting("state_dir") or "var", "upq.sock")
    return os.path.join(folder, socket_path)
