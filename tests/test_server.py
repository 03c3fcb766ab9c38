"""The doors under bad input and too much of it: a limit is told in one line, nobody else minds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fuzz
from tests.daemons import PATIENCE_S, Daemon, Talk, acting_as, until
from tests.servers import short_folder
from upq import server
from upq.settings import Listen

JOBS = {
    "echo": "def run(self):\n    return self.jobdata",
    "hold": "def run(self):\n    gate('go', lambda: self.cancelled)",
    "says": "def check(self):\n    self.msg(self.jobdata['msg'])",
    "big": "def run(self):\n    return 'r' * (1 << 19)",
}
SECTIONS = "\n".join(f"[job {name}]" for name in JOBS)


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A daemon with the limits that it has by itself."""
    folder = short_folder()
    with Daemon(folder, f"[listen]\ntcp = 127.0.0.1:0\n{SECTIONS}", **JOBS) as daemon:
        yield daemon
    shutil.rmtree(folder)


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    yield shared
    shared.has_behaved()
    assert shared.say("ping").startswith("OK ")


@pytest.fixture
def tight(short_tmp: Path) -> Iterator[Daemon]:
    """A daemon to be configured with limits of the test's own, not started."""
    made = Daemon(short_tmp, **JOBS)
    yield made
    until(lambda: answers(made))
    made.kill9()
    made.has_behaved()


def start(daemon: Daemon, **limits: Any) -> None:
    lines = "\n".join(f"{name} = {value}" for name, value in limits.items())
    daemon.configure(f"[listen]\n{lines}\n{SECTIONS}")
    daemon.start()


def tcp(daemon: Daemon) -> Talk:
    port = int(re.findall(r"127\.0\.0\.1\W+([0-9]+)", daemon.log)[-1])
    return Talk(socket.create_connection(("127.0.0.1", port)))


def sockets(daemon: Daemon) -> int:
    """How many the daemon has open; its database comes and goes with other descriptors."""
    folder = f"/proc/{daemon.ask('status')['pid']}/fd"
    found = 0
    for fd in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"{folder}/{fd}").startswith("socket:")
    return found


def threads(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.ask('status')['pid']}/task"))


# Lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("pieces", [1 << 20, 65_535, 1000])
def test_a_line_of_64_kib_is_taken_and_a_longer_one_is_told(
    daemon: Daemon, end: str, pieces: int
) -> None:
    longest = "echo text:" + "x" * (65_536 - len("echo text:"))
    data = f"{longest}{end}{longest}x{end}ping{end}".encode()
    with daemon.talk() as talk:
        for at in range(0, len(data), pieces):
            talk.send(data[at : at + pieces])
        assert talk.read().startswith("ACK ")
        assert talk.read().startswith("ERR too_long ")
        assert talk.read().startswith("OK ")


def test_a_json_line_may_have_a_mebibyte(daemon: Daemon) -> None:
    line = json.dumps({"submit": "echo", "params": {"text": ""}})
    longest = line.replace('""', '"' + "x" * ((1 << 20) - len(line)) + '"')
    with daemon.talk() as talk:
        assert json.loads(talk.say(longest))["ok"]
        assert json.loads(talk.say(longest.replace("x", "xx", 1)))["error"] == "too_long"
        assert talk.say("ping").startswith("OK ")


def test_a_json_line_without_an_end_is_refused_in_json_once(daemon: Daemon) -> None:
    with daemon.talk() as talk:
        talk.send('{"submit": "' + "x" * (3 << 20) + "\nping\n")
        assert json.loads(talk.read())["error"] == "too_long"
        assert talk.read().startswith("OK ")


def test_ten_mebibytes_without_a_line_end_are_one_error_and_no_memory(daemon: Daemon) -> None:
    before = daemon.rss_mib()
    with daemon.talk() as talk:
        for _ in range(10):
            talk.send(b"x" * (1 << 20))
        talk.send("\nping\n")
        assert talk.read().startswith("ERR too_long ")
        assert talk.read().startswith("OK ")
    assert daemon.rss_mib() - before < 4


def test_a_mistyped_verb_is_told_what_it_may_be(daemon: Daemon) -> None:
    told = "ERR unknown_command no job type stauts (did you mean status?)"
    assert daemon.say("stauts") == told


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"\xff\xfe\xfd", "bad_text"),
        (b"echo x:\xc3", "bad_text"),
        (b"echo x:a\0b", "bad_text"),
        (b"echo x:\x1b[31m", "bad_text"),
        (b"echo x:a\rb", "bad_text"),
        ("echo x:\x85".encode(), "bad_text"),
        (b'echo {"x": "a\\u0000b"}', "bad_text"),
        (b'echo {"x": "\\ud800"}', "bad_text"),
        (b'echo {"x": 1e999}', "bad_params"),
        (b'echo {"x": 1, "x": 2}', "bad_params"),
        (b"echo " + b'{"x": ' + b"[" * 40 + b"]" * 40 + b"}", "bad_params"),
        (b"ECHO", "unknown_command"),
        (b"../echo", "unknown_command"),
        (b"\x00", "bad_text"),
        (b"watch", "unknown_command"),
    ],
)
def test_what_is_no_text_or_no_request_is_told_and_the_connection_stays(
    daemon: Daemon, line: bytes, code: str
) -> None:
    with daemon.talk() as talk:
        talk.send(line + b"\nping\n")
        assert talk.read().startswith(f"ERR {code} ")
        assert talk.read().startswith("OK ")


def test_a_reply_is_one_line_whatever_the_job_says(daemon: Daemon) -> None:
    with daemon.talk() as talk:
        talk.send(json.dumps({"submit": "says", "params": {"msg": "a\nb\r\n\u2028c"}}) + "\n")
        assert json.loads(talk.read())["message"] == "a\nb\r\n\u2028c"
        assert talk.say(r'says msg:"a\nERR b"').endswith(r" a\nERR b")
        assert len(talk.say("says msg:" + "ä" * 32_000)) < 1 << 16
        assert talk.say("ping").startswith("OK ")


def test_a_thousand_lines_at_once_have_a_thousand_replies_in_their_order(daemon: Daemon) -> None:
    lines = [("echo n:%d", "zz%d", "ping")[n % 3] for n in range(1000)]
    text = "".join(f"{line % n if '%' in line else line}\n" for n, line in enumerate(lines))
    with daemon.talk() as talk:
        talk.send(text)
        replies = [talk.read() for _ in lines]
    assert all(f"zz{n}" in replies[n] for n in range(1, 1000, 3))
    assert all(replies[n].startswith("OK ") for n in range(2, 1000, 3))
    ids = [int(replies[n].split()[1]) for n in range(0, 1000, 3)]
    assert ids == sorted(set(ids))


def test_a_line_may_come_byte_by_byte(daemon: Daemon) -> None:
    with daemon.talk() as talk:
        for byte in "echo x:ä\r\n".encode():
            talk.send(bytes([byte]))
        id = int(talk.read().split()[1])
    assert daemon.wait(id)["result"] == {"x": "ä"}


def test_half_a_line_is_nothing(daemon: Daemon) -> None:
    before = sum(daemon.ask("status")["jobs"].values())
    with daemon.talk() as talk:
        talk.send("echo n:1\necho n:2")
        talk.sock.shutdown(socket.SHUT_WR)
        assert talk.read().startswith("ACK ")
        assert talk.read() == ""
    assert sum(daemon.ask("status")["jobs"].values()) == before + 1


def test_a_client_that_leaves_without_a_word_is_forgotten(daemon: Daemon) -> None:
    before = sockets(daemon)
    for _ in range(20):
        with daemon.talk() as talk:
            talk.send("echo n:1\nstatus\n")
    until(lambda: sockets(daemon) <= before)


def test_a_client_that_leaves_while_it_waits_is_forgotten(daemon: Daemon) -> None:
    id = daemon.submit("hold")
    before = sockets(daemon)
    with daemon.talk() as talk:
        talk.send(f"wait {id}\n")
        until(lambda: sockets(daemon) > before)
    until(lambda: sockets(daemon) <= before)
    daemon.open_gate()
    daemon.wait(id)


# Limits ----------------------------------------------------------------------------------------


def test_a_line_that_does_not_end_in_time_is_told_and_the_connection_closed(tight: Daemon) -> None:
    start(tight, line="300ms")
    with tight.talk() as talk:
        assert talk.say("ping").startswith("OK ")
        talk.send("echo n")
        assert talk.read().startswith("ERR timeout ")
        assert talk.read() == ""


def test_a_line_that_comes_drop_by_drop_has_no_more_time(tight: Daemon) -> None:
    start(tight, line="500ms")
    with tight.talk() as talk:
        talk.sock.settimeout(0.1)
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 4:
                talk.send("x")
                with contextlib.suppress(TimeoutError):
                    if not talk.sock.recv(100):
                        break
        assert time.monotonic() - began < 3


def test_an_idle_connection_is_told_and_closed_but_not_while_it_waits(tight: Daemon) -> None:
    start(tight, idle="1s")
    id = tight.submit("hold")
    with tight.talk() as waiting, tight.talk() as idle:
        waiting.send(f"wait {id}\n")
        assert idle.read().startswith("ERR timeout ")
        assert idle.read() == ""
        tight.open_gate()
        assert waiting.read().startswith("OK ")
        waiting.read()
        assert waiting.read() == ""


def test_one_user_has_so_many_connections_and_others_have_theirs(tight: Daemon) -> None:
    tight.configure(
        f"[listen]\nmax_per_peer = 3\ntcp = 127.0.0.1:0\n[paths]\nsocket_chmod = 666\n{SECTIONS}"
    )
    tight.start()
    with contextlib.ExitStack() as stack:
        talks = [stack.enter_context(tight.talk()) for _ in range(3)]
        assert all(talk.say("ping").startswith("OK ") for talk in talks)
        with tight.talk() as late:
            assert re.fullmatch("ERR busy .*3 connections.*", late.read())
            assert late.read() == ""
        with acting_as("nobody"), tight.talk() as other:
            assert other.say("ping").startswith("OK ")
        for _ in range(3):
            assert stack.enter_context(tcp(tight)).say("ping").startswith("OK ")
        with tcp(tight) as late:
            assert late.read().startswith("ERR busy tcp:127.0.0.1 ")
        assert talks[0].say("ping").startswith("OK ")
    until(lambda: answers(tight))


def test_a_door_has_so_many_connections_in_all(tight: Daemon) -> None:
    start(tight, max_connections=3)
    with contextlib.ExitStack() as stack:
        talks = [stack.enter_context(tight.talk()) for _ in range(3)]
        assert all(talk.say("ping").startswith("OK ") for talk in talks)
        with tight.talk() as late:
            late.send("ping\n")
            assert late.read().startswith("ERR busy ")
            assert late.read() == ""
        assert talks[2].say("ping").startswith("OK ")
    until(lambda: answers(tight))


def test_a_client_that_never_reads_is_left_behind(tight: Daemon) -> None:
    start(tight, write="500ms")
    tight.run("big")
    before = sockets(tight)
    with tight.talk() as deaf:
        deaf.send("show 1\n" * 40)  # 20 MiB of replies
        assert tight.run("echo")["state"] == "done"
        until(lambda: sockets(tight) <= before, 5)
        assert tight.run("echo")["state"] == "done"


def test_replies_that_nobody_reads_take_no_memory(tight: Daemon) -> None:
    start(tight, write="2s")
    tight.run("big")
    before = tight.rss_mib()
    with tight.talk() as deaf:
        deaf.send("show 1\n" * 200)  # 100 MiB of replies
        most = 0.0
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            most = max(most, tight.rss_mib() - before)
            time.sleep(0.02)
    assert most < 32


def test_a_full_queue_is_busy(tight: Daemon) -> None:
    start(tight, max_queue=5)
    ids = [tight.submit("hold") for _ in range(6)]  # one of them runs

    def refusal() -> str:
        reply = tight.say("hold")
        if reply.startswith("ACK "):
            ids.append(int(reply.split()[1]))
        return reply if reply.startswith("ERR ") else ""

    assert until(refusal).startswith("ERR busy ")
    tight.open_gate()
    for id in ids:
        tight.wait(id)
    until(lambda: tight.say("echo").startswith("ACK "))


def test_without_file_descriptors_clients_are_told_and_served_again_later(tight: Daemon) -> None:
    start(tight, max_connections=500, max_per_peer=500)
    tight.forgiven = ["no file descriptors left"]
    pid = tight.ask("status")["pid"]
    assert tight.run("echo")["state"] == "done"
    limit = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 6
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(tight.talk())
        assert first.say("ping").startswith("OK ")
        refused = 0
        for _ in range(30):
            talk = stack.enter_context(tight.talk())
            talk.send("ping\n")
            if refused < 2 and not talk.read().startswith("OK "):
                refused += 1
        assert refused == 2
        assert first.say("ping").startswith("OK "), "who is in stays in"
        assert re.match("ACK |ERR ", first.say("echo"))
        assert 1 <= tight.log.count("no file descriptors left") < 10
    until(lambda: answers(tight), 10)
    assert tight.run("echo")["state"] == "done"


def answers(daemon: Daemon) -> bool:
    with contextlib.suppress(OSError):
        return daemon.say("ping").startswith("OK ")
    return False


def test_a_door_that_cannot_have_its_spare_descriptor_back_takes_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A number that was given up may be somebody else's by the next time."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")
        listening.listen()
        listening.setblocking(False)
        door = server.Door(listening, None, Listen(), server.Place(None))  # type: ignore[arg-type]
        spare = door._spare
        monkeypatch.setattr(server, "FULL_PAUSE_S", 0)

        def full(*_: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", full)
            door._refuse_without_descriptors()
        theirs = os.open(__file__, os.O_RDONLY)
        assert theirs == spare, "the test needs the number to be taken"
        door._refuse_without_descriptors()
        assert os.path.samestat(os.fstat(theirs), os.stat(__file__))
        os.close(theirs)


# Much at once ----------------------------------------------------------------------------------


@pytest.mark.alone
def test_a_good_client_is_served_beside_three_hundred_idle_and_slow_ones(tight: Daemon) -> None:
    start(tight, max_connections=400, max_per_peer=400, line="3s")
    before = sockets(tight), threads(tight), tight.rss_mib()
    crowd = [tight.talk() for _ in range(300)]
    for n, talk in enumerate(crowd):
        talk.send(("", "e", "ping\n", "status\n" * 10 + "ec")[n % 4])
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.2):
            for talk in crowd[1::12]:
                with contextlib.suppress(OSError):
                    talk.send("x")

    slow = threading.Thread(target=drip)
    slow.start()
    times = []
    with tight.talk() as good:
        for n in range(200):
            began = time.perf_counter()
            assert good.say(f"echo n:{n}").startswith("ACK ")
            times.append(time.perf_counter() - began)
    stop.set()
    slow.join()
    growth = tight.rss_mib() - before[2]
    for talk in crowd:
        talk.close()
    assert sorted(times)[197] < 0.1
    assert growth < 64
    until(lambda: sockets(tight) <= before[0] + 5, 15)
    until(lambda: threads(tight) <= before[1] + 5, 15)


def test_lines_of_every_kind_have_one_reply_each_in_order(short_tmp: Path) -> None:
    with fuzz.make(short_tmp) as daemon:
        report = fuzz.fuzz(daemon, 5000, seed=1)
    assert report.lines >= 5000
    assert {"ACK", "OK", "JSON", "ERR bad_text", "ERR too_long", "ERR bad_params"} <= set(
        report.words
    )
    assert report.growth_mib < 20


def test_what_fuzz_calls_a_fault_is_one() -> None:
    """The judge of the test above sees a reply too few, one too many, and two exchanged."""
    sent = fuzz.Script(b"", 2, {1: "zz1"})
    good = [b"ACK 1", b"ERR unknown_command no job type zz1", b""]
    assert fuzz.judge(sent, list(good)).total() == 2
    for bad in ([good[0], b""], [*good[:2], b"OK {}", b""], [good[1], good[0], b""], good[:2]):
        with pytest.raises(AssertionError):
            fuzz.judge(sent, list(bad))
    with pytest.raises(ValueError, match="not a reply"):
        fuzz.judge(sent, [b"HELLO", good[1], b""])


def test_a_flood_of_connections_that_come_and_go_leaves_nothing(daemon: Daemon) -> None:
    before = sockets(daemon), threads(daemon)
    deadline = time.monotonic() + PATIENCE_S
    for n in range(500):
        assert time.monotonic() < deadline
        with daemon.talk() as talk:
            if n % 3:
                talk.send("ping\n")
            if n % 3 == 2:
                talk.read()
    until(lambda: sockets(daemon) <= before[0] + 2)
    until(lambda: threads(daemon) <= before[1] + 2)
