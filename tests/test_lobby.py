"""Connections that rest are read by one thread; none of them waits for what others have asked."""

from __future__ import annotations

import select
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemons import Daemon, Talk, until
from upq import protocol
from upq.access import peer_of
from upq.lobby import Lobby
from upq.settings import Listen
from upq.wire import Ack

JOBS = {
    "quick": "def run(self):\n    return True",
    "slow": "def check(self):\n    gate('check')\ndef run(self):\n    return True",
}
SECTIONS = "\n".join(f"[job {name}]" for name in JOBS)


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with Daemon(short_tmp, SECTIONS, **JOBS) as daemon:
        yield daemon
        daemon.has_behaved()


@contextmanager
def locked(daemon: Daemon) -> Iterator[None]:
    """While this lasts the database takes no change: no submit is answered."""
    file = sqlite3.connect(next(daemon.folder.rglob("upq.db")), isolation_level=None)
    file.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        file.execute("ROLLBACK")
        file.close()


def threads(daemon: Daemon) -> int:
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("Threads")).split()[1])


def test_a_submit_that_waits_for_the_database_delays_no_other_client(daemon: Daemon) -> None:
    with daemon.talk() as stuck, daemon.talk() as other, daemon.talk() as late:
        other.say("ping")
        time.sleep(1.2)  # all three rest
        with locked(daemon):
            stuck.send("quick n:1\n")
            time.sleep(0.1)
            for talk in (other, late):
                began_s = time.monotonic()
                assert talk.say("ping").startswith("OK ")
                assert time.monotonic() - began_s < 4.5  # the submit is given up after 5 s
            # What it says meanwhile is answered afterwards, in order.
            stuck.send("ping\nquick n:2\n")
        assert stuck.read().startswith("ACK ")
        assert stuck.read().startswith("OK ")
        assert stuck.read().startswith("ACK ")
        assert stuck.say("quick n:3").startswith("ACK ")


def test_a_check_that_takes_long_delays_no_other_client(daemon: Daemon) -> None:
    with daemon.talk() as stuck, daemon.talk() as other:
        stuck.send("slow\n")
        assert other.say("quick").startswith("ACK ")
        daemon.open_gate("check")
        assert stuck.read().startswith("ACK ")


def test_without_threads_a_client_is_told_so_and_its_place_is_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Desk:
        is_idle = False

        def is_quick(self, request: object) -> bool:
            return False

        def count(self, acks: int, errs: int) -> None:
            pass

    monkeypatch.setattr("upq.lobby.ROUND_S", 60)  # another shift would need a thread, too
    desk = Desk()
    lobby = Lobby(desk, desk)  # type: ignore[arg-type]
    lobby.start()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(3):
        ours, theirs = socket.socketpair()
        closed: list[bool] = []
        with ours:
            lobby.admit(theirs, peer_of(theirs), Listen(), lambda: closed.append(True))  # noqa: B023
            ours.settimeout(10)
            ours.sendall(b"ping\n")
            assert ours.recv(100).startswith(b"ERR busy no thread can be started")
            assert ours.recv(100) == b""
            until(lambda: closed == [True])  # noqa: B023


def test_who_rested_again_meanwhile_is_left_alone_by_a_thread_that_was_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored, turns = threading.Event(), iter([0])

    class Desk:
        is_idle = False

        def is_quick(self, request: protocol.Request) -> bool:
            return request.kind == protocol.SUBMIT

        def submit_all(self, asked: Sequence[object]) -> list[Ack]:
            if next(turns, None) is not None:
                stored.wait()
            return [Ack(17, "") for _ in asked]

        def answer(self, *_: object) -> object:
            return {}

        def count(self, acks: int, errs: int) -> None:
            pass

    monkeypatch.setattr("upq.lobby.ROUND_S", 0.1)
    monkeypatch.setattr("upq.lobby.REST_S", 0.1)
    desk = Desk()
    lobby = Lobby(desk, desk)  # type: ignore[arg-type]
    asks, submits = (socket.socketpair() for _ in range(2))
    with asks[0] as asking, submits[0] as submitting:
        for ours, theirs in asks, submits:
            ours.settimeout(10)
            lobby.admit(theirs, peer_of(theirs), Listen(), lambda: None)
        asking.sendall(b"ping\n")
        submitting.sendall(b"quick\n")
        lobby.start()  # finds both
        assert asking.recv(100) == b"OK {}\n"
        until(lambda: lobby._shift == 1 and len(lobby._here) == 2)
        stored.set()
        for _ in range(2):
            assert submitting.recv(100) == b"ACK 17\n"
            submitting.sendall(b"quick\n")
            asking.sendall(b"ping\n")
            assert asking.recv(100) == b"OK {}\n"


def test_connections_that_rest_have_no_threads(daemon: Daemon) -> None:
    before = threads(daemon)
    talks = [daemon.talk() for _ in range(50)]
    for n, talk in enumerate(talks):
        assert talk.say(f"quick n:{n}").startswith("ACK ")
    assert threads(daemon) <= before + 3
    for talk in talks:
        assert talk.say("ping").startswith("OK ")
    until(lambda: threads(daemon) <= before + 3)
    for n, talk in enumerate(talks):
        assert talk.say(f"quick n:{n}").startswith("ACK ")
        talk.close()


def test_replies_keep_their_order_wherever_they_are_made(daemon: Daemon) -> None:
    """Submits are answered in the lobby, the rest in a thread, and it comes in pieces."""

    def talk_on(failures: list[str]) -> None:
        with daemon.talk() as talk:
            for turn in range(30):
                words = ["quick", "ping", "nonsense", "quick n:", "version"]
                talk.send(f"quick n:{turn}\nquick @key:k")
                time.sleep(0.001)
                talk.send(f"{turn}\n" + "\n".join([*words[turn % 5 :], "ping"]) + "\n")
                starts = {"quick": "ACK ", "ping": "OK ", "nonse": "ERR ", "versi": "OK "}
                expected = ["ACK ", "ACK "] + [starts[w[:5]] for w in words[turn % 5 :]] + ["OK "]
                for start in expected:
                    reply = talk.read()
                    if not reply.startswith(start):
                        failures.append(f"{turn}: {start!r} expected, {reply!r} came")

    failures: list[str] = []
    clients = [threading.Thread(target=talk_on, args=(failures,)) for _ in range(6)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60)
        assert not client.is_alive()
    assert failures == []


def test_a_client_that_reads_no_replies_delays_no_other(daemon: Daemon) -> None:
    with daemon.talk() as deaf, daemon.talk() as other:
        filler = threading.Thread(target=stuff, args=(deaf,), daemon=True)
        filler.start()
        while filler.is_alive():
            began_s = time.monotonic()
            assert other.say("quick").startswith("ACK ")
            # For so long the daemon waits for a client to take its replies.
            assert time.monotonic() - began_s < Listen().write_s - 1


def stuff(talk: Talk) -> None:
    """Ask without reading, a little at a time, until nothing more is taken."""
    try:
        talk.sock.settimeout(1.0)
        for _ in range(20_000):
            talk.send("quick n:1\n" * 20)
    except OSError:
        return


def test_many_at_once_share_commits(daemon: Daemon) -> None:
    """Sixteen clients that each wait for their ACK need fewer commits than there are ACKs."""
    before = daemon.ask("status")["counters"]["commits"]
    daemon.say("pause quick")

    def submit() -> None:
        with daemon.talk() as talk:
            for n in range(100):
                assert talk.say(f"quick n:{n}").startswith("ACK ")

    clients = [threading.Thread(target=submit) for _ in range(16)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60)
    assert daemon.ask("status")["jobs"]["blocked"] == 1600  # the queue is paused
    assert daemon.ask("status")["counters"]["commits"] - before < 1200


@pytest.mark.parametrize("idle", [True, False])
def test_one_that_asks_again_at_once_is_expected_when_no_job_runs(
    idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Desk:
        is_idle = idle

        def is_quick(self, request: object) -> bool:
            return True

        def submit_all(self, asked: Sequence[object]) -> list[Ack]:
            return [Ack(17, "") for _ in asked]

        def count(self, acks: int, errs: int) -> None:
            pass

    monkeypatch.setattr("upq.lobby.SPIN_S", 0.5)
    desk = Desk()
    lobby = Lobby(desk, desk)  # type: ignore[arg-type]
    slept: list[float] = []

    class Poll:
        def __init__(self, epoll: select.epoll) -> None:
            self.register, self.unregister = epoll.register, epoll.unregister
            self._poll = epoll.poll

        def poll(self, seconds: float) -> list[tuple[int, int]]:
            if seconds:
                slept.append(seconds)
            return self._poll(seconds)

    lobby._epoll = Poll(lobby._epoll)  # type: ignore[assignment]
    ours, theirs = socket.socketpair()
    with ours:
        lobby.admit(theirs, peer_of(theirs), Listen(), lambda: None)
        lobby.start()
        for _ in range(50):
            ours.sendall(b"quick\n")
            assert ours.recv(100) == b"ACK 17\n"
        assert (len(slept) < 25) == idle
