"""The daemon as a process: how it starts, refuses to, reloads, drains and becomes another user."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import pwd
import re
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import unavailable
from tests.daemons import PATIENCE_S, ROOT, Daemon, NotStarted, for_user, until
from tests.servers import short_folder
from upq import __version__
from upq.daemon import DAMAGED

JOBS = {
    "echo": "def run(self):\n    return self.jobdata",
    "hold": """
def run(self):
    note("start", self.jobid)
    gate("go", lambda: self.cancelled)
    note("end", self.jobid)
    return not self.cancelled
""",
    "stubborn": """
def run(self):
    note("start", self.jobid)
    gate("go")
""",
    "brief": """
def run(self):
    note("start", self.jobid)
    time.sleep(0.3)
""",
    "parent": """
def run(self):
    child = self.submit("hold")
    note("start", self.jobid)
    child.finished.wait()
    return child.state
""",
    "facts": """
def run(self):
    import os, threading
    (FOLDER / "made-by-job").touch()
    return [os.getuid(), os.getgid(), os.getgroups(), os.getcwd()]
""",
}
SECTIONS = "\n".join(f"[job {name}]\nconcurrent = 4" for name in JOBS)
COMMANDS = """
[job waits]
command = sh -c 'echo start >> "$0/ledger"; until [ -e "$0/go" ]; do sleep 0.02; done' {folder}
[job deaf]
command = sh -c 'trap "" TERM; echo start >> "$0/ledger"; until [ -e "$0/go" ]; do sleep 0.02; done' {folder}
"""  # noqa: E501


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    """Configured with the jobs above, not started."""
    made = Daemon(short_tmp, SECTIONS, **JOBS)
    yield made
    made.kill9()
    made.has_behaved()


@pytest.fixture
def other() -> Iterator[Daemon]:
    """A second one, in a folder of its own."""
    folder = short_folder()
    made = Daemon(folder, SECTIONS, **JOBS)
    yield made
    made.kill9()
    shutil.rmtree(folder)


def set_(daemon: Daemon, section: str, **settings: object) -> None:
    """Settings of a section in place of those that are there."""
    text = daemon.config.read_text()
    for name, value in settings.items():
        text = re.sub(rf"(?m)^{name} = .*\n", "", text)
        if f"[{section}]\n" not in text:
            text += f"[{section}]\n"
        text = text.replace(f"[{section}]\n", f"[{section}]\n{name} = {value}\n")
    daemon.config.write_text(text)


def refused(daemon: Daemon, status: int, words: str, within_s: float = 2.0) -> None:
    """A start has to end with this exit status and these words, soon."""
    began = time.monotonic()
    ended = daemon.attempt()
    assert time.monotonic() - began < within_s
    assert (ended.returncode, bool(re.search(words, ended.stderr))) == (status, True), ended.stderr
    assert "Traceback" not in ended.stderr


# Start conflicts (T12) -------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize("shared", ["database", "socket", "both"])
def test_a_second_daemon_on_one_database_or_socket_is_refused_and_the_first_lives_on(
    daemon: Daemon, other: Daemon, shared: str
) -> None:
    daemon.start()
    inode = os.stat(daemon.folder / "s").st_ino
    if shared != "socket":
        set_(other, "db", url=f"sqlite:///{daemon.folder}/state/upq.db")
    if shared != "database":
        set_(other, "paths", socket=f"{daemon.folder}/s")
    refused(other, 75, "another|already")
    assert os.stat(daemon.folder / "s").st_ino == inode
    assert daemon.run("echo")["state"] == "done"
    daemon.end()
    other.start()


@pytest.mark.alone
def test_two_daemons_on_one_folder_are_one_too_many(daemon: Daemon) -> None:
    daemon.start()
    refused(daemon, 75, "another upq daemon")
    assert daemon.run("echo")["state"] == "done"


@pytest.mark.alone
def test_a_stale_socket_and_a_stale_pidfile_with_the_pid_of_somebody_else_are_taken_over(
    daemon: Daemon,
) -> None:
    pidfile = daemon.folder / "pid"
    set_(daemon, "daemon", pidfile="pid")
    daemon.start()
    daemon.kill9()
    assert (daemon.folder / "s").is_socket()
    pidfile.write_text(f"{os.getpid()}\n")  # alive, and no daemon
    assert daemon.start() < 2
    assert pidfile.read_text() == f"{daemon.process.pid if daemon.process else 0}\n"
    assert daemon.run("echo")["state"] == "done"
    assert daemon.end() == 0
    assert not pidfile.exists()
    assert not (daemon.folder / "s").exists()


@pytest.mark.alone
def test_a_pidfile_that_a_living_daemon_holds_is_left_alone(daemon: Daemon, other: Daemon) -> None:
    set_(daemon, "daemon", pidfile="pid")
    set_(other, "daemon", pidfile=daemon.folder / "pid")
    daemon.start()
    before = (daemon.folder / "pid").read_text()
    refused(other, 75, "pidfile")
    assert (daemon.folder / "pid").read_text() == before


@pytest.mark.alone
@pytest.mark.parametrize("what", ["file", "folder", "link to nothing", "link to a socket"])
def test_what_is_no_socket_is_never_removed(daemon: Daemon, what: str) -> None:
    path = daemon.folder / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(daemon.folder / "elsewhere"))
        match what:
            case "file":
                path.write_text("precious")
            case "folder":
                path.mkdir()
            case "link to nothing":
                path.symlink_to(daemon.folder / "nothing")
            case _:
                path.symlink_to(daemon.folder / "elsewhere")
        before = os.lstat(path)
        refused(daemon, 73, r"socket = .*/s")
        assert os.path.samestat(os.lstat(path), before)
        assert (daemon.folder / "elsewhere").is_socket()


@pytest.mark.alone
def test_a_socket_that_some_other_program_answers_is_not_stolen(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(daemon.folder / "s"))
        listening.listen()
        refused(daemon, 75, "answers")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(daemon.folder / "s"))
        # Also one whose backlog is full.
        listening.listen(0)
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.connect(str(daemon.folder / "s"))
            refused(daemon, 75, "listens")
    daemon.start()  # nobody answers any more


# Exit codes and --check ------------------------------------------------------------------------


def test_all_faults_of_a_configuration_are_told_at_once(daemon: Daemon) -> None:
    set_(daemon, "daemon", grace="soon")
    set_(daemon, "logging", loglevl="info")
    daemon.config.write_text(daemon.config.read_text() + "[nonsense]\n[job cancel]\n")
    for args in ((), ("--check",)):
        ended = daemon.attempt(*args)
        assert ended.returncode == 78
        said = ended.stderr + ended.stdout
        faults = re.findall(rf"(?m){re.escape(str(daemon.config))}:[0-9]+: .*", said)
        assert len(faults) == 4
        for words in ("grace: 'soon'", "loglevl.*loglevel", r"\[nonsense\]", "cancel is a verb"):
            assert any(re.search(words, fault) for fault in faults), words
    assert not (daemon.folder / "state").exists()


def test_exit_codes_say_what_was_wrong(daemon: Daemon) -> None:
    good = daemon.config.read_text()
    assert daemon.attempt("--nonsense").returncode == 64
    assert daemon.attempt("--version").returncode == daemon.attempt("--help").returncode == 0
    for section, name, value, status, words in (
        ("logging", "logfile", "/proc/no/upq.log", 73, "logfile"),
        ("paths", "state_dir", "/proc/no/state", 73, "/proc/no/state"),
        ("paths", "socket", "/proc/no/socket", 73, "/proc/no"),
        ("daemon", "pidfile", "/proc/no/pid", 73, "/proc/no/pid"),
        ("db", "url", f"sqlite:///{daemon.folder}/upq.cfg", 69, "upq.cfg"),
        ("db", "url", "sqlite:////proc/no/upq.db", 69, "/proc/no"),
        ("db", "url", f"mysql://root:hunter2@/x?unix_socket={daemon.folder}/no", 69, "mysql"),
        ("db", "url", f"postgresql://u:hunter2@/x?host={daemon.folder}", 69, "postgresql"),
    ):
        set_(daemon, section, **{name: value})
        ended = daemon.attempt()
        assert (ended.returncode, words in ended.stderr) == (status, True), (name, ended.stderr)
        assert "Traceback" not in ended.stderr and "hunter2" not in ended.stderr
        daemon.config.write_text(good)
    daemon.config.unlink()
    assert daemon.attempt().returncode == 78
    daemon.config.write_text(good)


def test_check_reports_broken_job_files_with_their_line_and_starts_nothing(daemon: Daemon) -> None:
    assert daemon.attempt("--check").returncode == 0
    (daemon.folder / "jobs/echo.py").write_text("x = 1\nfrom upq import NoSuchThing\n")
    (daemon.folder / "jobs/hold.py").write_text("class Hold(:\n")
    (daemon.folder / "jobs/brief.py").write_text("import sys\nsys.exit(0)\n")
    ended = daemon.attempt("--check")
    assert ended.returncode == 78
    for words in (
        r"echo\.py:2: ImportError",
        r"hold\.py:1: SyntaxError",
        r"brief\.py:2: SystemExit",
    ):
        assert re.search(rf"upq\.cfg:[0-9]+: \[job [a-z]+\] .*{words}", ended.stdout), words
    assert len(ended.stdout.splitlines()) == 3
    assert not (daemon.folder / "state").exists()


def test_settings_are_printed_without_a_configuration(daemon: Daemon) -> None:
    daemon.config.unlink()
    told = daemon.attempt("--settings")
    assert (told.returncode, told.stderr) == (0, "")
    assert "[listen] idle = 5m  (duration) Close a connection" in told.stdout
    assert "--settings" in daemon.attempt("--help").stdout


def test_who_reads_only_the_beginning_sees_no_traceback(daemon: Daemon) -> None:
    for words in "--settings", "--check":
        told = subprocess.run(
            ["sh", "-c", f'"$@" {words} | true', "sh", *daemon.command()], check=False,
            env=daemon.environment(), capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert told.stderr == ""


def test_check_may_be_asked_beside_a_running_daemon(daemon: Daemon) -> None:
    daemon.start()
    assert daemon.attempt("--check").returncode == 0
    assert daemon.run("echo")["state"] == "done"


def test_from_the_source_tree_it_finds_what_make_has_fetched(short_tmp: Path) -> None:
    shutil.copy(ROOT / "upq.py", short_tmp)
    (short_tmp / "upq").symlink_to(ROOT / "upq")
    bare = [sys.executable, "-S", f"{short_tmp}/upq.py", "--version"]  # finds no packages
    told = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout) == (1, "")
    assert re.fullmatch("upq: Python has no module [a-z]+; `make run` .*\n", told.stderr)
    (short_tmp / ".venv").symlink_to(sys.prefix)
    told = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout) == (0, f"upq {__version__}\n"), told.stderr


def test_on_a_terminal_it_says_that_it_is_ready_and_where_its_log_is(daemon: Daemon) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", 0) as terminal, os.fdopen(theirs, "wb") as stderr:
        started = subprocess.Popen(
            daemon.command("--foreground"), env=daemon.environment(), stderr=stderr
        )
        try:
            said = ""
            while not said.endswith("\n"):
                assert select.select([terminal], [], [], PATIENCE_S)[0]
                said += terminal.read(4096).decode()
            assert said == f"upq: ready; the log is {daemon.folder}/upq.log\r\n"
            assert daemon.ask("ping")
        finally:
            started.kill()
            started.wait()


# Signals and notices ---------------------------------------------------------------------------


def test_systemd_is_told_when_it_is_ready_and_when_it_stops(daemon: Daemon) -> None:
    daemon.start()
    daemon.signal(signal.SIGTERM)
    daemon.until_heard("STOPPING=1")
    assert daemon.until_ended() == 0


def test_systemd_hears_a_watchdog_and_a_reload(daemon: Daemon) -> None:
    daemon.env["WATCHDOG_USEC"] = "200000"
    daemon.start()
    for _ in range(3):
        daemon.listen_for_notices()
        daemon.until_heard("WATCHDOG=1")
    daemon.signal(signal.SIGHUP)
    daemon.until_heard("RELOADING=1\nMONOTONIC_USEC=")
    daemon.until_heard("READY=1")


def test_systemd_hears_the_watchdog_while_a_chore_takes_long(daemon: Daemon) -> None:
    daemon.env["WATCHDOG_USEC"] = "200000"
    hang = "def hang(*_):\n    note('chore')\n    gate('go')\n\n"
    daemon.add_job("slow", f"from upq.queue import Queue\n\n{hang}Queue.tend_health = hang")
    daemon.configure("[job slow]\n")
    daemon.start()
    daemon.until_noted("chore")
    for _ in range(3):
        daemon.listen_for_notices()
        daemon.until_heard("WATCHDOG=1")
    daemon.open_gate()


def test_hup_takes_over_a_good_configuration_and_keeps_the_old_one_when_it_is_not(
    daemon: Daemon,
) -> None:
    daemon.start()
    good = daemon.config.read_text()
    daemon.config.write_text(good + "[job newcomer]\ncommand = true\n")
    daemon.signal(signal.SIGHUP)
    until(lambda: "reloaded " in daemon.log)
    assert daemon.run("newcomer")["state"] == "done"
    daemon.config.write_text(good.replace("[job echo]", "[job echo]\nretries = many") + "[non")
    daemon.signal(signal.SIGHUP)
    stays = r"the old configuration stays: .*upq\.cfg:[0-9]+: "
    until(lambda: re.search(f"{stays}retries: 'many'", daemon.log))
    until(lambda: re.search(f"{stays}.*non", daemon.log))
    assert daemon.run("newcomer")["state"] == daemon.run("echo")["state"] == "done"
    assert daemon.say("reload").startswith("ERR refused ")
    daemon.config.write_text(good)
    told = daemon.ask("reload")
    assert [one["text"] for one in told["changes"]] == ["[job newcomer] removed"]
    assert (told["reloaded"], told["warnings"]) == (True, [])
    assert daemon.say("newcomer").startswith("ERR unknown_command ")
    daemon.forgiven = ["retries: 'many'", "non", "not reloaded"]


def test_usr1_reloads_too_and_usr2_tells_what_every_thread_does(daemon: Daemon) -> None:
    daemon.start()
    set_(daemon, "job echo", concurrent=3)
    daemon.signal(signal.SIGUSR1)
    until(lambda: "reloaded " in daemon.log)
    assert daemon.run("echo")["state"] == "done"
    daemon.signal(signal.SIGUSR2)
    until(lambda: "Current thread" in (daemon.folder / "stderr").read_text())
    assert "claimer.py" in (daemon.folder / "stderr").read_text()
    assert daemon.run("echo")["state"] == "done"


def test_a_reload_says_what_needs_a_restart(daemon: Daemon) -> None:
    daemon.start()
    set_(daemon, "paths", socket="elsewhere")
    (warning,) = daemon.ask("reload")["warnings"]
    assert "paths" in warning and "restart" in warning
    assert daemon.run("echo")["state"] == "done"
    assert daemon.ask("reload")["warnings"] == [warning], "it still does"


def test_what_a_reload_takes_over_needs_no_restart(daemon: Daemon) -> None:
    daemon.start()
    set_(daemon, "daemon", grace="1s")
    set_(daemon, "listen", max_queue="100")
    set_(daemon, "db", keep_done="1h", debug="yes")
    assert daemon.ask("reload")["warnings"] == []
    set_(daemon, "db", durability="relaxed")
    assert daemon.ask("reload")["warnings"] == ["[db] durability needs a restart"]


def test_statements_are_logged_without_what_is_in_them_while_debug_is_on(daemon: Daemon) -> None:
    set_(daemon, "db", debug="yes")
    daemon.start()
    secret = f"hunter{time.time_ns()}"
    daemon.job(daemon.run(f"echo word:{secret} @key:{secret}")["id"])
    for words in ("INSERT INTO upq_job ", "UPDATE upq_job ", "SELECT upq_event.n, upq_event.job"):
        assert re.search(f" DEBUG   .*{words}", daemon.log), words
    assert secret not in daemon.log
    set_(daemon, "db", debug="no")
    daemon.ask("reload")
    before = daemon.log.count("INSERT INTO upq_job ")
    daemon.run("echo")
    assert daemon.log.count("INSERT INTO upq_job ") == before


def test_a_rotated_log_is_left_and_a_new_one_begun(daemon: Daemon) -> None:
    daemon.start()
    (daemon.folder / "upq.log").rename(daemon.folder / "upq.log.1")
    daemon.signal(signal.SIGHUP)
    until(lambda: "reloaded" in daemon.log)
    id = daemon.run("echo")["id"]
    until(lambda: f"(echo:{id})" in daemon.log)
    assert f"(echo:{id})" not in (daemon.folder / "upq.log.1").read_text()


def test_a_logfile_given_on_the_command_line_stays_after_a_reload(daemon: Daemon) -> None:
    given = daemon.folder / "given.log"
    daemon.start("-l", str(given))
    daemon.ask("reload")
    id = daemon.run("echo")["id"]
    until(lambda: f"(echo:{id})" in given.read_text(), 5)
    assert daemon.log == ""


def test_the_log_tells_what_that_of_the_first_upq_told(daemon: Daemon) -> None:
    set_(daemon, "logging", loglevel="debug")
    daemon.start()
    id = daemon.run("echo fid:1")["id"]
    held = daemon.submit("hold")
    daemon.until_noted(f"start {held}")
    daemon.restart()
    daemon.open_gate()
    daemon.wait(held)
    assert daemon.end() == 0
    for words in (
        rf"\(echo:{id}\) .*(added to queue|queued)",
        rf"\(echo:{id}\) .*starting",
        rf"\(echo:{id}\) finished: done",
        rf"\(hold:{held}\) finished: done in [0-9.]+ s\n",
        "created new queue .*hold",
        r"Starting 1 unfinished jobs found in DB\.",
        "Shutting down socket server",
        r"Good bye\.",
    ):
        assert re.search(words, daemon.log), words


# Drain -----------------------------------------------------------------------------------------


def set_commands(daemon: Daemon, grace: str) -> None:
    set_(daemon, "daemon", grace=grace)
    commands = COMMANDS.replace("{folder}", str(daemon.folder))
    daemon.config.write_text(daemon.config.read_text() + commands)


def starts(daemon: Daemon) -> int:
    return sum(line.startswith("start") for line in daemon.ledger)


def test_a_damaged_database_is_found_after_a_crash_and_no_start_helps(daemon: Daemon) -> None:
    daemon.forgiven.append("the database file is damaged")
    daemon.start()
    daemon.kill9()
    file = daemon.folder / "state/upq.db"
    connection = sqlite3.connect(file)
    with connection:
        connection.execute("CREATE TABLE t (n)")
        connection.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 200)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with file.open("r+b") as raw:
        raw.seek(-8 * 4096, 2)
        raw.write(b"\xff" * 4096)
    for _ in range(2):
        daemon.start()
        assert daemon.until_ended() == DAMAGED
    assert daemon.log.count("the database file is damaged: ") == 2
    assert "; restore it from a backup" in daemon.log


def test_an_idle_daemon_ends_at_once(daemon: Daemon) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        daemon.start()
        daemon.run("echo")
        daemon.signal(signum)
        assert daemon.until_ended(10) == 0, "long before the grace is over"
        assert not (daemon.folder / "s").exists()


def test_jobs_that_end_within_the_grace_are_waited_for(daemon: Daemon) -> None:
    daemon.start()
    ids = [daemon.submit("hold") for _ in range(6)]
    until(lambda: starts(daemon) == 4)
    daemon.signal(signal.SIGTERM)
    daemon.until_heard("STOPPING=1")
    daemon.open_gate()
    assert daemon.until_ended() == 0
    daemon.start()
    states = [daemon.wait(id) for id in ids]
    assert [job["state"] for job in states] == ["done"] * 6
    assert starts(daemon) == 6, "none was started twice"
    assert all(daemon.history(id) == ["queued", "running", "done"] for id in ids)


def test_jobs_that_do_not_end_are_interrupted_and_run_again_after_the_restart(
    daemon: Daemon,
) -> None:
    set_commands(daemon, "500ms")
    daemon.start()
    types = ["hold", "stubborn", "waits", "deaf", "hold", "stubborn"]
    ids = [daemon.submit(name) for name in types]
    parent = daemon.submit("parent")
    last = daemon.submit("waits")  # has not started
    until(lambda: starts(daemon) == 8)
    assert daemon.end(10) == 0, "what is stubborn would never let it"
    left = subprocess.run(["pgrep", "-f", f"{daemon.folder}$"], capture_output=True, check=False)
    assert left.stdout == b"", "commands are gone with the daemon"
    daemon.start()
    until(lambda: starts(daemon) == 16)
    for id in ids:
        job = daemon.job(id)
        assert (job["state"], job["attempt"], job["crashes"]) == ("running", 1, 0)
        assert daemon.history(id) == ["queued", "running", "queued interrupted", "running"]
    assert daemon.job(last)["state"] == "queued"
    daemon.open_gate()
    for id in (*ids, parent, last):
        assert daemon.wait(id)["state"] == "done"
    assert starts(daemon) == 17
    assert len(daemon.ask(f"show {parent}")["children"]) == 1


@pytest.mark.parametrize("name", ["hold", "deaf"])
def test_a_second_term_does_not_wait_for_the_grace(daemon: Daemon, name: str) -> None:
    set_commands(daemon, "60s")
    daemon.start()
    id = daemon.submit(name)
    until(lambda: starts(daemon) == 1)
    daemon.signal(signal.SIGTERM)
    daemon.until_heard("STOPPING=1")
    time.sleep(0.1)
    assert daemon.is_alive
    daemon.signal(signal.SIGTERM)
    assert daemon.until_ended(10) == 0
    daemon.start()
    assert daemon.history(id)[:3] == ["queued", "running", "queued interrupted"]


def test_a_hup_while_it_stops_changes_nothing(daemon: Daemon) -> None:
    set_(daemon, "daemon", grace="60s")
    daemon.start()
    id = daemon.submit("hold")
    daemon.until_noted(f"start {id}")
    daemon.signal(signal.SIGTERM)
    daemon.until_heard("STOPPING=1")
    daemon.signal(signal.SIGHUP)
    time.sleep(0.3)
    assert daemon.is_alive
    daemon.open_gate()
    assert daemon.until_ended(10) == 0
    daemon.start()
    assert daemon.history(id) == ["queued", "running", "done"]


def test_while_it_stops_submits_are_refused_and_questions_answered(daemon: Daemon) -> None:
    daemon.start()
    id = daemon.submit("hold")
    daemon.until_noted(f"start {id}")
    with daemon.talk() as talk, daemon.talk() as waiting:
        waiting.send(f"wait {id}\n")
        daemon.signal(signal.SIGTERM)
        daemon.until_heard("STOPPING=1")
        until(lambda: talk.say("echo").startswith("ERR stopping "))
        assert json.loads(talk.say("status").removeprefix("OK "))["state"] == "stopping"
        assert daemon.say("echo").startswith("ERR stopping "), "new connections, too"
        daemon.open_gate()
        assert '"state":"done"' in waiting.read()
    assert daemon.until_ended(10) == 0


def test_a_stop_while_it_is_busy_loses_nothing(daemon: Daemon) -> None:
    """Submits go on while the daemon stops and starts: what has an ACK is done in the end."""
    daemon.start()
    acked: list[int] = []
    over = threading.Event()

    def submit() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), daemon.talk() as talk:
                while not over.wait(0.001) and (reply := talk.say("echo")):
                    if reply.startswith("ACK "):
                        acked.append(int(reply.split()[1]))

    clients = [threading.Thread(target=submit) for _ in range(2)]
    for client in clients:
        client.start()
    for _ in range(3):
        wanted = len(acked) + 50
        until(lambda wanted=wanted: len(acked) > wanted)  # type: ignore[misc]
        assert daemon.end() == 0
        daemon.start()
    over.set()
    for client in clients:
        client.join()
    assert len(set(acked)) == len(acked)

    def is_idle() -> bool:
        jobs = daemon.ask("status")["jobs"]
        return not jobs["queued"] and not jobs["running"]

    until(is_idle)
    done = {job["id"] for job in daemon.ask("jobs state:done limit:10000")["jobs"]}
    assert set(acked) <= done


# Doors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["600", "660", "666"])
def test_the_socket_has_the_mode_that_was_asked_for_whatever_the_umask(
    daemon: Daemon, mode: str
) -> None:
    set_(daemon, "paths", socket_chmod=mode)
    for umask in ("000", "077"):
        set_(daemon, "daemon", umask=umask)
        daemon.start()
        assert stat.S_IMODE(os.stat(daemon.folder / "s").st_mode) == int(mode, 8)
        daemon.end()


def test_the_socket_is_never_wider_open_than_that_not_for_a_moment(daemon: Daemon) -> None:
    if not shutil.which("strace"):
        unavailable("no program strace (Debian: apt-get install strace)")
    set_(daemon, "paths", socket_chmod="600")
    trace = daemon.folder / "trace"
    calls = "trace=bind,umask,chmod,fchmod,fchmodat,listen"
    python, *args = daemon.command()
    command = ["strace", "-f", "-e", calls, "-o", str(trace), python, *args]
    daemon.command = lambda *_: command  # type: ignore[method-assign]
    daemon.start()
    pid = int(daemon.ask("status")["pid"])
    os.kill(pid, signal.SIGTERM)
    daemon.until_ended()
    lines = trace.read_text().splitlines()
    bind = next(n for n, line in enumerate(lines) if f'"{daemon.folder}/s"' in line)
    assert "bind(" in lines[bind] and "umask(0177)" in lines[bind - 1]
    assert not [line for line in lines if f'{daemon.folder}/s"' in line and "chmod" in line]


SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[2], sys.argv[2:])
"""


def launch_with_socket(daemon: Daemon, listening: socket.socket) -> None:
    """Start it as systemd does with a socket unit: the socket as descriptor 3."""
    passed = str(listening.fileno())
    command = [sys.executable, "-c", SYSTEMD, passed, *daemon.command()]
    daemon.command = lambda *_: command  # type: ignore[method-assign]
    daemon.how = {"pass_fds": [listening.fileno()]}


def test_a_socket_of_systemd_outlives_the_daemon_and_no_client_is_turned_away(
    daemon: Daemon,
) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(daemon.folder / "s"))
        listening.listen(100)
        launch_with_socket(daemon, listening)
        with daemon.talk() as early:
            early.send("echo n:0\n")
            daemon.start()
            assert early.read().startswith("ACK "), "who came before the daemon"
        ids = [daemon.submit("echo n:1")]
        inode = os.stat(daemon.folder / "s").st_ino
        assert daemon.end() == 0
        assert os.stat(daemon.folder / "s").st_ino == inode
        with contextlib.ExitStack() as stack:
            talks = [stack.enter_context(daemon.talk()) for _ in range(10)]
            for n, talk in enumerate(talks):
                talk.send(f"echo n:{n}\n")
            daemon.start()
            ids += [int(talk.read().split()[1]) for talk in talks]
        assert daemon.end() == 0
        daemon.start()
        assert {daemon.wait(id)["state"] for id in ids} == {"done"}


def test_clients_that_come_while_it_drains_are_served_by_the_next_daemon(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(daemon.folder / "s"))
        listening.listen(100)
        launch_with_socket(daemon, listening)
        daemon.start()
        id = daemon.submit("hold")
        daemon.until_noted(f"start {id}")
        daemon.signal(signal.SIGTERM)
        daemon.until_heard("STOPPING=1")
        with daemon.talk() as late:
            late.send("echo n:1\n")
            daemon.open_gate()
            assert daemon.until_ended() == 0
            daemon.start()
            assert late.read().startswith("ACK ")


def test_a_socket_of_systemd_may_be_tcp(daemon: Daemon) -> None:
    with socket.socket(socket.AF_INET) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        launch_with_socket(daemon, listening)
        daemon.start()
        with socket.create_connection(listening.getsockname()) as client:
            client.sendall(b"echo\n")
            assert client.recv(100).startswith(b"ACK ")
        assert daemon.run("echo")["state"] == "done"


# Becoming a daemon, and somebody else ----------------------------------------------------------


def proc(pid: int, name: str) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


@contextlib.contextmanager
def detached(daemon: Daemon) -> Iterator[tuple[int, int]]:
    """Start a daemon that goes to the background; its process id, and a descriptor of it."""
    set_(daemon, "daemon", detach_process="yes", pidfile="pid")
    ended = daemon.attempt()
    assert (ended.returncode, ended.stderr) == (0, "")
    pid = int((daemon.folder / "pid").read_text())
    pidfd = os.pidfd_open(pid)
    try:
        yield pid, pidfd
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def check_detached(daemon: Daemon, uid: int) -> None:
    with detached(daemon) as (pid, pidfd):
        assert daemon.run("facts")["result"][0] == uid
        status = proc(pid, "status")
        assert status["Uid"] == [str(uid)] * 4
        assert os.getsid(pid) not in (os.getsid(0), pid), "in a session that it does not lead"
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{n}") for n in range(3)} == {"/dev/null"}
        again = daemon.attempt()
        assert (again.returncode, "pidfile" in again.stderr) == (75, True)
        assert daemon.run("echo")["state"] == "done"
        os.kill(pid, signal.SIGTERM)
        assert select.select([pidfd], [], [], PATIENCE_S)[0], "it does not end"
        assert not (daemon.folder / "pid").exists()
        assert not (daemon.folder / "s").exists()


def test_it_goes_to_the_background_and_comes_back_only_when_it_is_ready(daemon: Daemon) -> None:
    check_detached(daemon, os.geteuid())


def test_an_unprivileged_user_may_run_it_in_the_background(daemon: Daemon) -> None:
    for_user(daemon, "nobody")
    check_detached(daemon, pwd.getpwnam("nobody").pw_uid)


def test_a_start_that_fails_in_the_background_is_told_in_the_foreground(daemon: Daemon) -> None:
    set_(daemon, "daemon", detach_process="yes", pidfile="pid")
    (daemon.folder / "s").mkdir()
    ended = daemon.attempt()
    assert (ended.returncode, "no socket" in ended.stderr) == (73, True)
    assert not (daemon.folder / "pid").exists()
    (daemon.folder / "s").rmdir()
    set_(daemon, "logging", logfile="/proc/no/upq.log")
    ended = daemon.attempt()
    assert (ended.returncode, "logfile" in ended.stderr) == (73, True)


def test_foreground_wins_over_detach_process(daemon: Daemon) -> None:
    set_(daemon, "daemon", detach_process="yes", pidfile="pid")
    daemon.start("--foreground")
    assert daemon.process
    assert int((daemon.folder / "pid").read_text()) == daemon.process.pid


def test_an_unprivileged_user_needs_no_more_than_its_own_folder(daemon: Daemon) -> None:
    for_user(daemon, "nobody")
    daemon.start()
    nobody = pwd.getpwnam("nobody")
    uid, gid, groups, _ = daemon.run("facts")["result"]
    assert (uid, gid, groups) == (nobody.pw_uid, nobody.pw_gid, [])
    assert daemon.job(daemon.submit("echo"))["submitter"] == "root"
    assert daemon.end() == 0
    assert "WARNING" not in daemon.log


@pytest.mark.parametrize("setting", ["uid", "gid", "chroot_directory"])
def test_an_unprivileged_user_cannot_become_another(daemon: Daemon, setting: str) -> None:
    for_user(daemon, "nobody")
    value = daemon.folder if setting == "chroot_directory" else "root"
    set_(daemon, "daemon", **{setting: value})
    ended = daemon.attempt()
    assert (ended.returncode, "[daemon]" in ended.stderr) == (77, True), ended.stderr
    assert "Traceback" not in ended.stderr


def test_root_becomes_the_user_and_group_that_it_is_told_to(daemon: Daemon) -> None:
    for_user(daemon, "nobody", starts_as_root=True)
    nobody = pwd.getpwnam("nobody")
    set_(daemon, "daemon", uid="nobody", gid="daemon", umask="077", pidfile="pid")
    daemon.start()
    assert daemon.process
    gid = pwd.getpwnam("daemon").pw_gid
    status = proc(daemon.process.pid, "status")
    assert status["Uid"] == [str(nobody.pw_uid)] * 4
    assert status["Gid"] == [str(gid)] * 4
    assert "0" not in status["Groups"]
    assert status["CapEff"] == ["0000000000000000"]
    assert daemon.run("facts")["result"][:2] == [nobody.pw_uid, gid]
    made = daemon.folder / "made-by-job"
    assert (made.stat().st_uid, stat.S_IMODE(made.stat().st_mode)) == (nobody.pw_uid, 0o600)
    for name in ("state/upq.db", "upq.log", "pid", "s"):
        info = (daemon.folder / name).stat()
        assert (info.st_uid, info.st_gid) == (nobody.pw_uid, gid), name
        assert name == "s" or not info.st_mode & 0o077, name
    assert daemon.end() == 0
    assert not (daemon.folder / "pid").exists()


def test_root_and_the_daemons_own_user_are_admins_after_it_has_changed(daemon: Daemon) -> None:
    from tests.daemons import acting_as

    for_user(daemon, "nobody", starts_as_root=True)
    set_(daemon, "daemon", uid="nobody", gid="nogroup")
    set_(daemon, "paths", socket_chmod="666")
    daemon.start()
    daemon.ask("drain")
    with acting_as("nobody"):
        daemon.ask("resume")
    with acting_as("daemon"):
        assert daemon.say("drain").startswith("ERR denied ")


def test_it_works_inside_a_chroot(daemon: Daemon) -> None:
    if os.geteuid() != 0:
        unavailable("only root can change the root")
    root = daemon.folder / "root"
    (root / "dev").mkdir(parents=True)
    shutil.move(daemon.folder / "jobs", root / "jobs")
    try:
        os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        unavailable("no devices can be made here")
    daemon.config.write_text(
        re.sub(
            r"(?m)^(logfile|socket|state_dir|jobs_dir) = ", r"\1 = root/", daemon.config.read_text()
        )
    )
    set_(daemon, "daemon", chroot_directory=root)
    # Where it says that it is ready, as seen from inside.
    notices = Path(f"{root}/{daemon.folder}/n")
    notices.parent.mkdir(parents=True)
    daemon.listen_for_notices()
    os.link(daemon.folder / "n", notices)
    for _ in range(2):
        daemon.start()
        assert daemon.process
        assert os.readlink(f"/proc/{daemon.process.pid}/root") == str(root)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(str(root / "s"))
            sock.sendall(b"facts\n")
            id = sock.recv(100).split()[1]
            sock.sendall(b"wait %b\n" % id)
            assert b'"state":"done"' in sock.recv(65536)
            assert (root / "made-by-job").exists()
            sock.sendall(b"reload\n")
            assert sock.recv(65536)
        assert daemon.end() == 0
    assert (root / "state/upq.db").exists()
    assert "Good bye." in (root / "upq.log").read_text()


def test_it_starts_with_its_standard_streams_closed(daemon: Daemon) -> None:
    for closed in ("<&-", "<&- >&- 2>&-"):
        python, *args = Daemon.command(daemon)
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", python, *args]
        daemon.command = lambda *_, command=command: command  # type: ignore[method-assign]
        daemon.start()
        assert daemon.run("echo")["state"] == "done"
        assert daemon.end() == 0


def test_the_folders_of_paths_are_made(daemon: Daemon) -> None:
    set_(daemon, "paths", uploads="made/up", files="made/files", jobs_dir="made/jobs")
    (daemon.folder / "upq.cfg").write_text(
        re.sub(r"(?ms)^\[job .*", "[job true]\ncommand = true\n", daemon.config.read_text())
    )
    daemon.start()
    assert daemon.run("true")["state"] == "done"
    assert {path.name for path in (daemon.folder / "made").iterdir()} == {"up", "files", "jobs"}


def test_it_lives_anywhere(daemon: Daemon) -> None:
    home = daemon.folder / "an ödd (1) 'place' %41 #;$x"
    home.mkdir()
    shutil.copytree(ROOT / "upq", home / "upq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("upq.py", "upq-cli.py"):
        shutil.copy(ROOT / name, home)
    for name in ("jobs", "upq.cfg"):
        shutil.move(daemon.folder / name, home / name)
    set_config = home / "upq.cfg"
    daemon.command = lambda *_: [daemon.python, str(home / "upq.py"), "-c", str(set_config)]  # type: ignore[method-assign]
    daemon.env["PYTHONPATH"] = ""
    daemon.start()
    told = subprocess.run(
        [daemon.python, home / "upq-cli.py", "-c", set_config, "--wait", "facts"],
        capture_output=True, check=True, text=True, cwd="/",
    ).stdout  # fmt: skip
    assert "done" in told
    assert (home / "made-by-job").exists()
    assert (home / "state/upq.db").exists()
    assert daemon.end() == 0


@pytest.mark.alone
def test_a_start_that_fails_leaves_nothing_that_stops_the_next(daemon: Daemon) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        set_(daemon, "listen", tcp=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(NotStarted) as failed:
            daemon.start()
        assert (failed.value.status, "tcp" in failed.value.said) == (73, True)
    assert daemon.start() < 2
    assert daemon.run("echo")["state"] == "done"


# No test boots a real systemd in namespaces: on 2026-11-22 one did, and its tmpfiles service
# removed all of the machine's /tmp, since the root was shared. test_packaging checks the units.
