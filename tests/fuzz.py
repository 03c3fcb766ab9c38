"""Lines of every kind at a daemon (T23): `python -m tests.fuzz [lines] [seed]`.

Each complete line gets exactly one reply, in order; nothing of it ends in a traceback, and the
next good line is served.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemons import PATIENCE_S, Daemon
from tests.servers import short_folder

#: Good lines, as they are and to be spoilt. None waits, and none changes what the daemon does.
GOOD = [
    "noop fid:50 path:/tmp/x",
    "noop msg:\"two words\" 'one word' 50 url:http://a:80/x",
    'noop {"fid": 50, "deep": {"a": [1, 2.5, null, true, "\\u00e4"]}}',
    "noop n:1 @in:1h @priority:high @key:some-key @retries:3",
    "noop @at:2036-12-01T02:00:00Z @after:1,2",
    '{"submit": "noop", "params": {"fid": 50}, "options": {"priority": "low"}}',
    '{"submit_many": [{"submit": "noop"}, {"submit": "noop", "params": {"a": 1}}]}',
    '{"verb": "show", "id": 1}',
    "typed fid:50 level:b",
    "check typed fid:x",
    "ping",
    "help",
    "status",
    "queues",
    "jobs state:done type:noop limit:3",
    "show 1",
    "why 1",
    "output 1",
    "cancel 1",
    "retry 1",
    "version",
    "nodes",
    "watch since:0",
    "claim noop n:1 ttl:60s",
]
CONFIG = """
[listen]
max_connections = 500
max_per_peer = 500
[job noop]
concurrent = 2
[job typed]
params = fid:int level:choice(a,b)=a
command = true
"""
SPOILERS = (b"", b"\xff", b"\xc3", b"\0", *(bytes([c]) for c in b"\"'{}[:@ \\9\r"))
LONG = (65_500, 65_536, 65_537, 70_000, 200_000)


def random_bytes(dice: random.Random) -> bytes:
    return dice.randbytes(dice.randint(1, 200)).replace(b"\n", b"\r")


def random_text(dice: random.Random) -> bytes:
    letters = "abc:@\"'\\{}[],.0-9 \t\u00e4\u3000\u2028\U0001f600\x00\x1b\x85"
    return "".join(dice.choices(letters, k=dice.randint(1, 80))).encode()


def spoilt(dice: random.Random) -> bytes:
    line = bytearray(dice.choice(GOOD).encode())
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(line) + 1)
        line[at : at + dice.randint(0, 3)] = dice.choice(
            [
                b"",
                b"\xff",
                b"\xc3",
                b"\0",
                b'"',
                b"'",
                b"{",
                b"}",
                b"[",
                b":",
                b"@",
                b" ",
                b"\\",
                b"9",
            ]
        )
    return bytes(line)


def nested(dice: random.Random) -> bytes:
    depth = dice.choice([2, 31, 32, 33, 100, 20_000])
    return b'noop {"a": ' + b"[" * depth + b"]" * depth + b"}"


def long(dice: random.Random) -> bytes:
    size = dice.choice(LONG)
    return (b"noop text:" if dice.random() < 0.7 else b'{"submit": "noop", "x": "') + b"x" * size


def good(dice: random.Random) -> bytes:
    return dice.choice(GOOD).encode()


KINDS = (random_bytes, random_text, spoilt, nested, long, good)
WEIGHTS = (20, 20, 35, 1, 0.2, 24)


@dataclass
class Script:
    """What one client sends, and where in the replies its own words have to come back."""

    data: bytes = b""
    replies: int = 0
    #: The number of a reply, and the word in it.
    marks: dict[int, str] = field(default_factory=dict)
    #: In what pieces it is sent.
    pieces: int = 1 << 16

    def add(self, line: bytes, dice: random.Random) -> None:
        self.data += line + (b"\r\n" if dice.random() < 0.1 else b"\n")
        self.replies += 1


def script(dice: random.Random, lines: int, number: int) -> Script:
    made = Script(pieces=dice.choice([7, 1000, 1 << 16, 1 << 20]))
    while made.replies < lines:
        if made.replies % 10 == 9:
            made.marks[made.replies] = word = f"zz{number}x{made.replies}"
            made.add(word.encode(), dice)
        else:
            line = dice.choices(KINDS, WEIGHTS)[0](dice)
            if line.strip(b" \t\r"):  # an empty one ends the talk
                made.add(line, dice)
    if number == 1:
        made.pieces = 1 << 16  # or the line takes longer than it may
        made.add(b"x" * (10 << 20), dice)
        made.add(b'{"submit": "' + b"x" * (3 << 20), dice)
    # How it ends: an empty line, half a line, or nothing.
    made.data += dice.choice([b"\n", b"\r\n", b" \t\n", b"noop half:", b"\xff", b""])
    return made


@dataclass
class Report:
    lines: int = 0
    words: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    growth_mib: float = 0.0


def play(daemon: Daemon, sent: Script) -> list[bytes]:
    """Send a script; returns what came back, to the end."""
    with daemon.connect() as sock:
        sock.settimeout(PATIENCE_S)

        def send() -> None:
            for start in range(0, len(sent.data), sent.pieces):
                sock.sendall(sent.data[start : start + sent.pieces])
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        received = b"".join(iter(lambda: sock.recv(1 << 18), b""))
        sender.join()
    return received.split(b"\n")


def judge(sent: Script, replies: list[bytes]) -> Counter[str]:
    """Raise AssertionError when the replies are not those of the lines; else count their kinds."""
    assert replies.pop() == b"", "the last reply is whole"
    assert len(replies) == sent.replies, f"{len(replies)} replies to {sent.replies} lines"
    for at, word in sent.marks.items():
        assert word.encode() in replies[at], f"reply {at}: {replies[at][:200]!r}, wanted {word}"
    return Counter(kind(reply) for reply in replies)


def kind(reply: bytes) -> str:
    """ACK, OK or the code of an error; raises ValueError when it is no reply."""
    if reply.startswith(b"{"):
        fields = json.loads(reply)
        return "JSON" if fields["ok"] else f"JSON {fields['error']}"
    word, _, rest = reply.decode().partition(" ")
    if word == "OK":
        json.loads(rest)
    elif word == "ACK":
        int(rest.partition(" ")[0])
    elif word == "ERR":
        return f"ERR {rest.partition(' ')[0]}"
    else:
        raise ValueError(f"not a reply: {reply[:80]!r}")
    return word


def fuzz(daemon: Daemon, lines: int, seed: int, clients: int = 4) -> Report:
    """Send about so many lines from several clients at a time. Raises AssertionError."""
    dice = random.Random(seed)
    report = Report()
    scripts: list[Script] = []
    while report.lines < lines:
        scripts.append(script(dice, dice.randint(1, 400), len(scripts)))
        report.lines += scripts[-1].replies
    began_s = time.perf_counter()
    before_mib = 0.0
    with ThreadPoolExecutor(clients) as pool:
        for number, replies in enumerate(pool.map(lambda one: play(daemon, one), scripts)):
            try:
                report.words += judge(scripts[number], replies)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, client {number}: {error}") from error
            if number == len(scripts) // 10:  # warm by now
                before_mib = daemon.rss_mib()
    report.seconds = time.perf_counter() - began_s
    report.growth_mib = daemon.rss_mib() - before_mib
    assert daemon.say("ping").startswith("OK "), "the next good line is served"
    assert daemon.run("noop")["state"] == "done"
    assert "Traceback" not in daemon.log
    return report


def make(folder: Path) -> Daemon:
    return Daemon(folder, CONFIG, noop="def run(self):\n    pass")


def main() -> None:
    lines = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 1_000_000
    print(f"seed {seed}", flush=True)
    folder = short_folder()
    try:
        with make(folder) as daemon:
            report = fuzz(daemon, lines, seed)
    finally:
        shutil.rmtree(folder)
    print(f"{report.lines:,} lines, as many replies in order, {report.seconds:.0f} s;"
          f" memory grew by {report.growth_mib:.1f} MiB; no traceback")  # fmt: skip
    for word, count in report.words.most_common():
        print(f"  {count:>8,}  {word}")


if __name__ == "__main__":
    main()
