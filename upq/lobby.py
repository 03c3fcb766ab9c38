"""Connections, and the one thread that reads those that rest.

What many clients submit at the same moment is read, stored and answered together, without waking
a thread for each. What may take its time goes to a thread of the connection's own: a verb, a job
type with a check(), a long pipeline, a client that does not take its replies.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from upq import protocol, wire
from upq.access import Peer
from upq.dispatcher import Dispatcher
from upq.errors import Busy, RequestError, TimedOut
from upq.intake import Intake
from upq.protocol import Request
from upq.settings import Listen
from upq.wire import Ack

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
#: Bytes of replies at which they are sent without waiting for the others.
SEND_BYTES = 1 << 16
#: Submits that are stored together when a client pipelines.
RUN_LIMIT = 256
#: What the lobby reads of a client at a time; one with more to say gets a thread.
SIP_BYTES = 1 << 12
#: Seconds of silence after which a connection gives its thread back.
REST_S = 1.0
#: Seconds for which a single client is expected to ask again, when nothing else is going on: one
#: that waits for each ACK does so before this thread has gone to sleep and was woken.
SPIN_S = 0.0001
#: Seconds that the lobby may take over one round before another thread takes its place.
ROUND_S = 0.25


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
    """One client. It rests in the lobby, or is served by a thread; never both."""

    def __init__(  # noqa: PLR0917, the lobby makes it
        self,
        sock: socket.socket,
        peer: Peer,
        intake: Intake,
        desk: Dispatcher,
        limits: Listen,
        on_close: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._on_close = on_close
        self._peer = peer
        self._intake = intake
        self._desk = desk
        self._limits = limits
        self._lines = Lines()
        self._waits_s = 0.0
        self._out = bytearray()
        self._submits: list[Request] = []
        # What the lobby has read for the thread that is to answer it.
        self._unread: list[bytes] = []
        #: The client has left.
        self.is_over = False
        self._heard_s = time.monotonic()
        set_timeout(sock, socket.SO_SNDTIMEO, limits.write_s)

    def __str__(self) -> str:
        return f"connection of {self._peer.name}"

    @property
    def fd(self) -> int:
        return self._sock.fileno()

    # In the lobby: nothing here waits

    @property
    def until_s(self) -> float:
        """When its silence is over its limit."""
        return self._heard_s + self._limits.idle_s

    def sip(self) -> Sequence[tuple[Request, Peer]] | None:
        """Read what has come: submits that are quickly answered; None when it needs a thread.

        Raises OSError.
        """
        try:
            data = self._sock.recv(SIP_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return ()
        self._unread = self._lines.feed(data)
        self.is_over = data == b""
        if self.is_over:
            return ()
        if self._lines.is_partial:
            return None
        self._heard_s = time.monotonic()
        for line in self._unread:
            try:
                request = protocol.parse(line)
            except RequestError:
                request = None
            if request is None or not self._intake.is_quick(request):
                self._submits.clear()
                return None
            self._submits.append(request)
        self._unread = []
        return [(request, self._peer) for request in self._submits]

    def reply(self, answers: Sequence[Ack | RequestError]) -> bool:
        """Reply to what `sip` returned; False when the client does not take it at once."""
        self._put(answers)
        with contextlib.suppress(BlockingIOError):
            del self._out[: self._sock.send(self._out, socket.MSG_DONTWAIT)]
        return not self._out

    def dismiss(self, why: RequestError) -> None:
        """Tell the client why it is not served any longer."""
        self._refuse(why, json=False)
        with contextlib.suppress(OSError):
            self._sock.send(self._out, socket.MSG_DONTWAIT)

    def close(self) -> None:
        self._sock.close()
        self._on_close()

    # In a thread of its own

    def serve(self) -> bool:
        """Answer; True when the client says nothing for a while, False when the talk is over."""
        lines, self._unread = self._unread, []
        over_s: float | None = None  # until when the line that has begun must be whole
        while self._answer_all(lines):
            self._heard_s = time.monotonic()
            if not self._lines.is_partial:
                over_s = None
            elif over_s is None:
                over_s = self._heard_s + self._limits.line_s
            try:
                self._patience(
                    min(self._heard_s + REST_S, self.until_s) if over_s is None else over_s
                )
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                if over_s is not None:
                    self._refuse(TimedOut("a line did not come to its end in time"), json=False)
                    self._flush()
                return over_s is None
            if data == b"":
                break
            if b"\n" in data:
                over_s = None
            lines = self._lines.feed(data)
        return False

    def _patience(self, until_s: float) -> None:
        """Have the next read wait no longer than that. Raises BlockingIOError when it is over."""
        seconds = round(until_s - time.monotonic(), 2)
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
        if self._submits:
            answers = stored(self._intake, [(request, self._peer) for request in self._submits])
            self._put(answers)

    def _put(self, answers: Sequence[Ack | RequestError]) -> None:
        """Queue the replies to the submits that were read."""
        submits, self._submits = self._submits, []
        acks = 0
        for request, answer in zip(submits, answers, strict=True):
            if isinstance(answer, RequestError):
                self._out += wire.err(answer.code, str(answer), json=request.json)
            else:
                acks += 1
                self._out += wire.ack(
                    answer.id, answer.message, duplicate=answer.duplicate, json=request.json
                )
        self._desk.count(acks, len(submits) - acks)

    def _answer(self, request: Request) -> None:
        try:
            if request.kind == protocol.SUBMIT_MANY:
                acks, batch = self._intake.submit_many(request, self._peer)
                self._desk.count(len(acks), 0)
                self._out += wire.acks(acks, batch)
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


def stored(intake: Intake, submits: Sequence[tuple[Request, Peer]]) -> Sequence[Ack | RequestError]:
    try:
        return intake.submit_all(submits)
    except Exception as error:
        log.exception("a submit failed")
        return [RequestError(f"a fault of upq: {error}")] * len(submits)


class Lobby:
    """Where connections rest, all read by one thread.

    When a round takes long, because the database does, another thread takes its place, so that
    nobody waits for what others have asked.
    """

    def __init__(self, intake: Intake, desk: Dispatcher) -> None:
        self._intake = intake
        self._desk = desk
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._here: dict[int, Connection] = {}
        #: When the silence of the first of them is over its limit, or before.
        self._sweep_s = float("inf")
        # Raised when another thread takes over; each knows its own.
        self._shift = 0
        # What the reading thread answers just now, and since when.
        self._in_hand: list[Connection] = []
        self._since_s: float | None = None
        # Whom nobody reads until the thread has answered that had them in hand when another took
        # over, with that thread's shift.
        self._away: dict[Connection, int] = {}
        self._made = 0
        #: When it last looked whether somebody asks for something.
        self.ticked_s = time.monotonic()

    def start(self) -> None:
        """Read for as long as the process lives."""
        self._take_over()
        threading.Thread(target=self._watch, name="lobby-watch", daemon=True).start()

    def admit(
        self, sock: socket.socket, peer: Peer, limits: Listen, on_close: Callable[[], None]
    ) -> None:
        """Serve a client from now on. Raises OSError."""
        self._rest(Connection(sock, peer, self._intake, self._desk, limits, on_close))

    def _rest(self, connection: Connection) -> None:
        """Have a connection read here from now on."""
        with self._lock:
            self._here[connection.fd] = connection
            self._sweep_s = min(self._sweep_s, connection.until_s)
            self._epoll.register(connection.fd, select.EPOLLIN)

    def _leave(self, connection: Connection) -> None:
        with self._lock:
            del self._here[connection.fd]
            self._away.pop(connection, None)
            with contextlib.suppress(FileNotFoundError):  # taken over meanwhile
                self._epoll.unregister(connection.fd)

    # The reading thread

    def _take_over(self) -> bool:
        """Have another thread read; False when none can be started."""
        name = f"lobby-{self._shift}"
        reader = threading.Thread(target=self._read, args=(self._shift,), name=name, daemon=True)
        try:
            reader.start()
        except RuntimeError as error:
            log.error("%s: %s (raise TasksMax)", name, error)
            return False
        return True

    def _read(self, shift: int) -> None:
        hand: list[Connection] = []
        while True:
            expected = len(hand) == 1 and self._desk.is_idle
            found = (self._at_once() if expected else None) or self._epoll.poll(REST_S)
            with self._lock:
                if shift != self._shift:
                    return
                hand = [self._here[fd] for fd, _ in found if fd in self._here]
                self._in_hand, self._since_s = hand, time.monotonic()
                self.ticked_s = self._since_s
            try:
                self._serve(hand)
                if time.monotonic() >= self._sweep_s:
                    self._sweep()
            except Exception:
                log.exception("reading connections failed")
            with self._lock:
                if shift != self._shift:
                    self._come_back(shift)
                    return
                self._since_s = None

    def _at_once(self) -> list[tuple[int, int]]:
        """What comes before it is worth while to sleep."""
        until_s = time.monotonic() + SPIN_S
        found: list[tuple[int, int]] = []
        while not found and time.monotonic() < until_s:
            found = self._epoll.poll(0)
        return found

    def _come_back(self, shift: int) -> None:
        for connection in [one for one, of in self._away.items() if of == shift]:
            del self._away[connection]
            self._epoll.register(connection.fd, select.EPOLLIN)

    def _watch(self) -> None:
        while True:
            time.sleep(ROUND_S)
            with self._lock:
                since_s = self._since_s
                if since_s is None or time.monotonic() - since_s < ROUND_S:
                    continue
                for connection in self._in_hand:
                    if self._here.get(connection.fd) is connection:
                        self._epoll.unregister(connection.fd)
                        self._away[connection] = self._shift
                self._shift += 1
                self._since_s = None
            while not self._take_over():
                time.sleep(ROUND_S)

    def _serve(self, hand: list[Connection]) -> None:
        asked: list[tuple[Request, Peer]] = []
        parts: list[tuple[Connection, int]] = []
        for connection in hand:
            try:
                sip = connection.sip()
            except OSError as error:
                self._close(connection, error)
                continue
            if sip is None:
                self._give_thread(connection)
            elif connection.is_over:
                self._close(connection)
            elif sip:
                asked += sip
                parts.append((connection, len(sip)))
        answers = stored(self._intake, asked) if asked else ()
        at = 0
        for connection, n in parts:
            try:
                if not connection.reply(answers[at : at + n]):
                    self._give_thread(connection)
            except OSError as error:
                self._close(connection, error)
            at += n

    def _sweep(self) -> None:
        """Dismiss those that were silent for too long."""
        with self._lock:
            here = [one for one in self._here.values() if one not in self._away]
        now_s = time.monotonic()
        for connection in here:
            if connection.until_s <= now_s:
                connection.dismiss(TimedOut("nothing was asked in time"))
                self._close(connection)
        with self._lock:
            waiting = [connection.until_s for connection in self._here.values()]
            self._sweep_s = min(waiting, default=float("inf"))

    def _close(self, connection: Connection, error: OSError | None = None) -> None:
        if error is not None:
            log.debug("%s ended: %s", connection, error)
        self._leave(connection)
        connection.close()

    # Threads of their own

    def _give_thread(self, connection: Connection) -> None:
        self._leave(connection)
        self._made += 1
        try:
            threading.Thread(
                target=self._serve_alone, args=(connection,), name=f"C-{self._made}", daemon=True
            ).start()
        except RuntimeError as error:
            log.error("%s: %s (raise TasksMax)", connection, error)
            connection.dismiss(Busy("no thread can be started to answer this"))
            connection.close()

    def _serve_alone(self, connection: Connection) -> None:
        try:
            if connection.serve():
                self._rest(connection)
                return
        except OSError as error:
            log.debug("%s ended: %s", connection, error)
        except Exception:
            log.exception("%s failed", connection)
        connection.close()


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """A time limit in the kernel: unlike settimeout it costs no system call on each read."""
    whole = int(seconds)
    sock.setsockopt(
        socket.SOL_SOCKET, option, struct.pack("@ll", whole, int((seconds - whole) * 1e6))
    )
