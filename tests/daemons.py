"""A real daemon in a folder of its own: started, asked, killed, and held to what it says."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent
from typing import Any, Self, TypeVar

from tests import bench
from tests.conftest import unavailable

T = TypeVar("T")

ROOT = bench.ROOT
#: How long anything may take before a test gives up on it.
PATIENCE_S = 30.0
#: What a configuration starts with, where the test says nothing else.
BASE = {
    "logging": "logfile = upq.log",
    "paths": "socket = s\nstate_dir = state\njobs_dir = jobs",
}
#: What the jobs of tests share: a ledger of what they did, and gates that hold them up.
KIT = """
import time
from pathlib import Path

from upq import UpqJob

FOLDER = Path(__file__).parents[1]


def note(*words):
    with open(FOLDER / "ledger", "a") as ledger:
        ledger.write(" ".join(map(str, words)) + "\\n")


def gate(name, go_on=lambda: False):
    while not (FOLDER / name).exists() and not go_on():
        time.sleep(0.005)
"""


class NotStarted(Exception):
    """The daemon has ended before it was ready."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"exit status {status}: {said}")
        self.status = status
        self.said = said


def until(is_so: Callable[[], T], timeout_s: float = PATIENCE_S) -> T:
    """Ask until the answer is true, and return it; fail when the time is over."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := is_so()):
        assert time.monotonic() < deadline_s, f"not so within {timeout_s:g} s: {is_so}"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def acting_as(user: str) -> Iterator[None]:
    """Connections that are made inside the block come from this user."""
    if os.geteuid() != 0:
        unavailable("only root can act as another user")
    account = pwd.getpwnam(user)
    os.setegid(account.pw_gid)
    os.seteuid(account.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def for_user(daemon: Daemon, user: str, *, starts_as_root: bool = False) -> None:
    """Have a daemon run as this user, with an interpreter and sources that it can read.

    The folder becomes the user's. With `starts_as_root` the daemon has to become that user itself.
    """
    if os.geteuid() != 0:
        unavailable("only root can start programs as another user")
    account = pwd.getpwnam(user)
    who: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    source = daemon.folder / "source"
    shutil.copytree(ROOT / "upq", source / "upq", ignore=shutil.ignore_patterns("__pycache__"))
    daemon.env["PYTHONPATH"] = f"{source}:{sysconfig.get_path('purelib')}"
    for python in (sys.executable, "/usr/bin/python3"):
        command = [python, "-c", "import alembic, daemon, sqlalchemy, upq.daemon"]
        with contextlib.suppress(OSError):
            if not subprocess.run(command, env=daemon.environment(), cwd="/", check=False,
                                  capture_output=True, **who).returncode:  # fmt: skip
                break
    else:
        unavailable(f"no Python with what upq needs that {user} can run")
    daemon.python = python
    shutil.chown(daemon.folder, user, account.pw_gid)
    if not starts_as_root:
        daemon.how = who


class Talk:
    """One connection: lines go out, reply lines come in."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE_S)
        self.sock = sock
        self._replies = sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._replies.close()
        self.sock.close()

    def send(self, data: str | bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # turned away already: `read` tells why
            self.sock.sendall(data.encode() if isinstance(data, str) else data)

    def read(self) -> str:
        """The next reply without its line end; "" when the daemon has closed."""
        try:
            return self._replies.readline().decode().removesuffix("\n")
        except ConnectionResetError:
            return ""

    def say(self, line: str) -> str:
        self.send(line + "\n")
        return self.read()


class Daemon(bench.Daemon):
    """One daemon after the other in the same folder, and connections to them.

    As a context manager: started, and in the end killed. `jobs` are bodies of job classes by name,
    in which `note()` and `gate()` may be called.
    """

    #: Where in the folder its configuration has the log.
    LOG = "upq.log"

    def __init__(self, folder: Path, config: str = "", url: str = "", **jobs: str) -> None:
        self.folder = folder
        self.url = url
        self.process: subprocess.Popen[bytes] | None = None
        self.python = sys.executable
        self.env: dict[str, str] = {}
        #: What else Popen is told.
        self.how: dict[str, Any] = {}
        #: Patterns of log lines that are errors and meant to be.
        self.forgiven: list[str] = []
        self._heard = b""
        self._notify: socket.socket | None = None
        self._log_end = 0
        folder.chmod(0o755)  # every user may come in
        (folder / "jobs").mkdir(exist_ok=True)
        (folder / "jobs/kit.py").write_text(KIT)
        shutil.copy(ROOT / "jobs/test.py", folder / "jobs")
        for name, body in jobs.items():
            self.add_job(name, body)
        self.configure(config)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.kill9()
        if error is None:
            self.has_behaved()

    # What it is made of

    @property
    def config(self) -> Path:
        return self.folder / "upq.cfg"

    def configure(self, config: str) -> None:
        """Write upq.cfg: what is given, and the usual paths."""
        base = dict(BASE)
        if self.url:
            base["db"] = f"url = {self.url}"
        for section, lines in base.items():
            head = f"[{section}]\n"
            if head not in config:
                config = head + config
            config = config.replace(head, f"{head}{lines}\n", 1)
        self.config.write_text(config.rstrip("\n") + "\n")

    def add_job(self, name: str, body: str) -> None:
        head = f"from upq_jobs.kit import *\n\n\nclass {name[:1].upper()}{name[1:]}(UpqJob):\n"
        (self.folder / f"jobs/{name}.py").write_text(head + indent(body.strip("\n"), "    ") + "\n")

    def open_gate(self, name: str = "go") -> None:
        (self.folder / name).touch()

    @property
    def ledger(self) -> list[str]:
        """What the jobs have noted."""
        file = self.folder / "ledger"
        return file.read_text().splitlines() if file.exists() else []

    # Its life

    def command(self, *args: str) -> list[str]:
        return [self.python, "-m", "upq", "-c", str(self.config), *args]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), **self.env}

    def attempt(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end: a start that is to fail, --check."""
        self.forgiven.append("not started: ")
        return subprocess.run(
            self.command(*args), env=self.environment(), timeout=PATIENCE_S, check=False,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, **self.how,
        )  # fmt: skip

    def start(self, *args: str) -> float:
        """Seconds to READY, as systemd would see it. Raises NotStarted."""
        self.listen_for_notices()
        began_s = time.perf_counter()
        with open(self.folder / "stderr", "wb") as said:
            how = {"stdin": subprocess.DEVNULL, "stderr": said, **self.how}
            env = {**self.environment(), "NOTIFY_SOCKET": f"{self.folder}/n"}
            self.process = subprocess.Popen(self.command(*args), env=env, **how)
        self.until_heard("READY=1")
        return time.perf_counter() - began_s

    def listen_for_notices(self) -> None:
        if self._notify is None:
            self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._notify.bind(f"{self.folder}/n")
            (self.folder / "n").chmod(0o666)
        self._notify.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self._notify.recv(4096):  # of the one before
                pass
        self._heard = b""

    def until_heard(self, notice: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait for what systemd would be told. Raises NotStarted when the daemon ends before."""
        assert self.process and self._notify
        deadline_s = time.monotonic() + timeout_s
        pidfd = os.pidfd_open(self.process.pid)
        watched: list[Any] = [self._notify, pidfd]
        try:
            while notice.encode() not in self._heard:
                left_s = max(deadline_s - time.monotonic(), 0)
                ready, _, _ = select.select(watched, [], [], left_s)
                assert ready, f"no {notice} within {timeout_s:g} s"
                if self._notify in ready:
                    self._heard += self._notify.recv(4096) + b"\n"
                else:
                    self.forgiven.append("not started: ")
                    raise NotStarted(self.process.wait(), (self.folder / "stderr").read_text())
        finally:
            os.close(pidfd)

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, signum: signal.Signals) -> None:
        assert self.process
        self.process.send_signal(signum)

    def until_ended(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status."""
        assert self.process
        return self.process.wait(timeout_s)

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Ask for an orderly end; returns the exit status."""
        self.signal(signal.SIGTERM)
        return self.until_ended(timeout_s)

    def kill9(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stillborn(self, seconds: float) -> None:
        """Start, and be killed so many seconds later, READY or not."""
        with subprocess.Popen(self.command(), env=self.environment()) as process:
            time.sleep(seconds)
            process.kill()

    def restart(self) -> None:
        """As after a power cut."""
        self.kill9()
        self.start()

    # What it says

    @property
    def log(self) -> str:
        file = self.folder / self.LOG
        return file.read_text() if file.exists() else ""

    def has_behaved(self) -> None:
        """No error in the log since the last time, but those that were meant to be."""
        new = self.log[self._log_end :]
        self._log_end += len(new)
        errors = [
            line for line in new.splitlines()
            if re.search(" (ERROR|CRITICAL) ", line)
            and not any(re.search(pattern, line) for pattern in self.forgiven)
        ]  # fmt: skip
        assert errors == []
        stderr = self.folder / "stderr"
        assert not stderr.exists() or "Traceback" not in stderr.read_text()

    def talk(self) -> Talk:
        return Talk(self.connect())

    def say(self, line: str) -> str:
        """The reply to one line on a connection of its own."""
        with self.talk() as talk:
            return talk.say(line)

    def ask(self, line: str) -> Any:
        """What a verb answers."""
        reply = self.say(line)
        assert reply.startswith("OK "), f"{line}: {reply}"
        return json.loads(reply.removeprefix("OK "))

    def submit(self, line: str) -> int:
        """The id of a job that is accepted."""
        reply = self.say(line)
        assert reply.startswith("ACK "), f"{line}: {reply}"
        return int(reply.split()[1])

    def job(self, id: int) -> dict[str, Any]:
        return dict(self.ask(f"show {id}")["job"])

    def history(self, id: int) -> list[str]:
        """The states a job went through, each with the reason where there is one."""
        events = self.ask(f"show {id}")["history"]
        return [f"{e['state']} {e['reason']}".strip() for e in events]

    def why(self, id: int) -> str:
        return str(self.ask(f"why {id}")["why"])

    def wait(self, id: int) -> dict[str, Any]:
        """The job, once it has ended."""
        return dict(self.ask(f"wait {id} timeout:{PATIENCE_S - 1:g}s")["job"])

    def run(self, line: str) -> dict[str, Any]:
        """Submit a job and see it end."""
        return self.wait(self.submit(line))

    def until_state(self, id: int, state: str) -> dict[str, Any]:
        until(lambda: self.job(id)["state"] == state)
        return self.job(id)

    def until_noted(self, line: str) -> None:
        """Wait until a job has written that to the ledger."""
        until(lambda: line in self.ledger)
