"""`executor = process`: the same class, with nothing of its to break but its own child."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import PATIENCE_S, Daemon, until
from tests.servers import short_folder
from upq import config, vault
from upq.attempt import INTERRUPTED, Report
from upq.child import Lines
from upq.job import CANCELLED, DONE
from upq.jobtypes import JobTypes
from upq.loader import Loader
from upq.pipes import closing
from upq.process import (
    LIVES_APART,
    MOST_APART_S,
    Interpreter,
    Pace,
    Processes,
    ProcessJob,
    ending,
)

SECRET = "not-for-children"

API = """
def check(self):
    self.seen = "by check"
    if (FOLDER / "closed").exists():
        self.msg("closed")
        return False

def run(self):
    self.logger.warning("a line from %s", self.jobid)
    print("to output", file=self.output)
    print("bare")
    self.progress(1, 2, "half")
    self.msg("said ")
    self.jobdata["left"] = [1, 2]
    self.append_job("after", {"more": 1})
    one = self.submit("echo", n=1)
    same = self.enqueue_newjob("echo", {"n": 2})
    done = one.finished.wait(), one.finished.is_set(), one.state, one.result, one.msgstr
    with self.db.begin() as db:
        db.exec_driver_sql("CREATE TABLE IF NOT EXISTS mine (n INTEGER)")
        db.exec_driver_sql("INSERT INTO mine VALUES (5)")
        rows = db.exec_driver_sql("SELECT n FROM mine").scalar()
    return [done, self.gather([one, same]), self.seen, self.retries, self.jobcfg["colour"],
            self.args, rows, self.cancelled]
"""
WAYS = """
def run(self):
    import ctypes, os, sys
    from upq import Abort, Retry
    note("start", self.jobid)
    how = self.jobdata["how"]
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "exit":
        os._exit(1)
    elif how == "kill":
        os.kill(os.getpid(), 9)
    elif how == "memory":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        return len(bytearray(1 << 40))
    elif how == "sys.exit":
        sys.exit(3)
    elif how == "raise":
        raise ValueError("bad")
    elif how == "untold":
        raise type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})
    elif how == "false":
        self.msg("no such")
        return False
    elif how == "retry":
        raise Retry("again", after=3600)
    elif how == "abort":
        raise Abort("for good")
    elif how == "unfit":
        return {1, 2}
    elif how == "refused":
        self.submit("nothing_of_the_kind")
    elif how == "garbage":
        for fd in range(3, 100):
            try:
                os.write(fd, b"what is this?\\n")
            except OSError:
                pass
"""
CONFIG = """
[job api]
executor = process
colour = green
[job after]
[job echo]
[job ways]
executor = process
concurrent = 2
retries = 1
[job who]
executor = process
max_jobs_per_child = 3
[job waits]
executor = process
[job sleeps]
executor = process
timeout = 1h
"""


@pytest.fixture(scope="module")
def one() -> Iterator[Daemon]:
    with folder_of_its_own() as folder:
        daemon = Daemon(
            folder,
            CONFIG,
            api=API,
            after="def run(self): return self.jobdata",
            echo="def run(self): self.msg('hi'); return self.jobdata['n']",
            ways=WAYS,
            who="""
def run(self):
    import os
    folder = "/proc/self/fd"
    links = [f"{folder}/{fd}" for fd in os.listdir(folder) if os.path.exists(f"{folder}/{fd}")]
    fds = [os.readlink(link).split(":")[0] for link in links]
    return {"pid": os.getpid(), "fds": fds, "env": dict(os.environ),
            "adj": open("/proc/self/oom_score_adj").read()}
""",
            waits="""
def run(self):
    n = self.jobdata["n"]
    return self.gather([self.submit("waits", n=n - 1)]) if n else "deep"
""",
            sleeps="def run(self): note('start', self.jobid); time.sleep(1000)",
        )
        daemon.env["UPQ_SECRET"] = SECRET
        with daemon:
            yield daemon


@contextlib.contextmanager
def folder_of_its_own() -> Iterator[Path]:
    folder = short_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class Shop:
    """Job types of a folder, and the executor for them without a daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "jobs").mkdir()
        self.processes = Processes()

    def offer(self, run: str = "pass", **settings: str) -> JobTypes:
        """The one type `work`, with the body of its run() in one line."""
        text = "import os, time\nfrom upq import UpqJob\n\nclass Work(UpqJob):\n"
        (self.folder / "jobs/work.py").write_text(f"{text}    def run(self): {run}\n")
        values = "".join(f"{key} = {value}\n" for key, value in settings.items())
        file = self.folder / "upq.cfg"
        file.write_text(f"[paths]\njobs_dir = jobs\n[job work]\nexecutor = process\n{values}")
        return JobTypes(config.load(file))

    def make(self, types: JobTypes) -> ProcessJob:
        job = self.processes.make(types.get("work"), {}, None, {})
        assert isinstance(job, ProcessJob)
        job.token = 1
        return job

    def run(self, types: JobTypes) -> Report:
        return self.processes.perform(types.get("work"), self.make(types))


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.processes.close()


def test_the_class_sees_the_same_api(one: Daemon) -> None:
    job = one.run("api word")
    assert job["state"] == "done"
    assert job["result"] == [
        [True, True, "done", 1, "hi"],
        [1, 2],
        "by check",
        0,
        "green",
        ["word"],
        5,
        False,
    ]
    assert job["message"] == "said "
    assert job["progress"] == {"done": 1, "total": 2, "text": "half"}
    assert job["jobdata"] == {"word": "", "left": [1, 2], "more": 1}
    assert one.ask(f"output {job['id']}")["text"] == "to output\nbare\n"
    assert re.search(rf"WARNING \(api:{job['id']}\) a line from {job['id']}", one.log)
    after = until(lambda: [j for j in one.ask("jobs type:after")["jobs"] if j["state"] == "done"])
    assert after[0]["result"] == job["jobdata"]


@pytest.mark.parametrize(
    ("how", "state", "reason", "message"),
    [
        ("sys.exit", "queued", "retry 1 of 1", "jobs/ways.py:21: SystemExit: 3"),
        ("raise", "queued", "retry 1 of 1", "jobs/ways.py:23: ValueError: bad"),
        ("untold", "queued", "retry 1 of 1", "jobs/ways.py:25: Odd: its text cannot be had"),
        ("memory", "queued", "retry 1 of 1", "MemoryError"),
        ("false", "queued", "retry 1 of 1", "no such"),
        ("retry", "queued", "retry 1 of 1", "again"),
        ("refused", "queued", "retry 1 of 1", "jobs/ways.py:36: unknown_command no job type"),
        ("abort", "failed", "aborted", "for good"),
        ("unfit", "failed", "", "the result is no JSON"),
    ],
)
def test_every_way_to_fail_means_what_it_means_in_a_thread(
    one: Daemon, how: str, state: str, reason: str, message: str
) -> None:
    id = one.submit(f"ways how:{how}")
    until(lambda: one.job(id)["started_at"] and one.job(id)["state"] != "running")
    job = one.job(id)
    assert (job["state"], job["reason"]) == (state, reason)
    assert message in job["message"]


def test_check_runs_again_in_the_child(one: Daemon) -> None:
    one.ask("pause api")
    id = one.submit("api")
    one.open_gate("closed")
    one.ask("resume api")
    job = one.wait(id)
    assert (job["state"], job["reason"], job["message"]) == ("failed", "refused", "closed")
    (one.folder / "closed").unlink()


@pytest.mark.parametrize(
    ("how", "ended"),
    [
        ("segfault", "was killed by SIGSEGV"),
        ("exit", "exited with 1"),
        ("kill", "was killed by SIGKILL"),
        ("garbage", "was killed"),
    ],
)
def test_a_job_that_kills_its_child_is_started_three_times_and_hurts_nobody(
    one: Daemon, how: str, ended: str
) -> None:
    """T13, process mode."""
    assert one.run("ways how:well")["state"] == "done"
    pid = one.ask("status")["pid"]
    bystander = one.submit("sleeps")
    one.until_noted(f"start {bystander}")
    job = one.run(f"ways how:{how}")
    assert (job["state"], job["reason"]) == ("failed", "crashed")
    assert ended in job["message"]
    assert one.ledger.count(f"start {job['id']}") == 3
    assert (job["starts"], job["crashes"]) == (3, 3)
    assert one.history(job["id"]) == [
        "queued", *["running", "queued crashed"] * 2, "running", "failed crashed"
    ]  # fmt: skip
    assert one.job(bystander)["state"] == "running"
    assert one.ask("status")["pid"] == pid
    one.ask(f"cancel {bystander}")
    assert one.wait(bystander)["state"] == "cancelled"


def test_children_that_die_again_and_again_start_apart(short_tmp: Path) -> None:
    """T13: what they leave free is for the others."""
    body = """
def run(self):
    import os
    note(time.monotonic())
    if self.jobdata["how"] != "well":
        os._exit(1)
"""
    config = "[job dies]\nexecutor = process\nconcurrent = 2"
    with Daemon(short_tmp, config, dies=body) as daemon:
        ids = [daemon.submit("dies how:badly") for _ in range(2)]
        assert {daemon.wait(id)["starts"] for id in ids} == {3}
        at_s = sorted(map(float, daemon.ledger))
        # Of the first two nobody knew yet.
        apart_s = [b - a for a, b in itertools.pairwise(at_s[2:])]
        assert len(apart_s) == 3 and min(apart_s) > 0.1

        ids = [daemon.submit("dies how:badly") for _ in range(8)]
        for id in ids:
            daemon.ask(f"cancel {id}")
        assert {daemon.wait(id)["state"] for id in ids} == {"cancelled"}
        daemon.ask("reload")
        assert daemon.run("dies how:well")["state"] == "done"
        *_, died_s, began_s = map(float, daemon.ledger)
        assert began_s - died_s < MOST_APART_S, "what died before the reload keeps it waiting"


def test_the_next_child_waits_by_the_life_of_the_last() -> None:
    pace = Pace()
    assert pace.take(0.0) == 0.0
    pace.died(10.0, 10.1)
    assert pace.take(10.1) == pytest.approx(LIVES_APART * 0.1)
    assert pace.take(10.6) == 0.0
    assert pace.take(10.6) == pytest.approx(LIVES_APART * 0.1)
    pace.died(10.6, 10.7)
    assert pace.take(10.7) == pytest.approx(2 * LIVES_APART * 0.1)
    pace.died(20.0, 3620.0)
    assert pace.take(3620.0) == MOST_APART_S


def test_a_child_inherits_nothing_and_is_used_again(one: Daemon) -> None:
    seen = [one.run("who")["result"] for _ in range(5)]
    # max_jobs_per_child = 3
    assert [s["pid"] == seen[0]["pid"] for s in seen] == [True] * 3 + [False] * 2
    assert SECRET not in json.dumps(seen)
    assert not any(name.startswith(("UPQ_SECRET", "NOTIFY")) for name in seen[0]["env"])
    assert seen[0]["adj"] == "500\n"
    files = [fd for fd in seen[0]["fds"] if fd not in ("/dev/null", "socket")]
    assert [fd for fd in files if not fd.startswith("/proc")] == []
    until(lambda: not Path(f"/proc/{seen[0]['pid']}").exists())


def test_parents_in_processes_hold_no_place_while_they_wait(one: Daemon) -> None:
    assert one.run('waits {"n": 4}')["result"] == [[[["deep"]]]]


def test_children_die_with_the_daemon_and_its_jobs_go_on(short_tmp: Path) -> None:
    body = "def run(self): import os; note(os.getpid()); gate('go')"
    with Daemon(short_tmp, "[job held]\nexecutor = process", held=body) as daemon:
        id = daemon.submit("held")
        until(lambda: daemon.ledger)
        daemon.kill9()
        until(lambda: not Path(f"/proc/{daemon.ledger[0]}").exists())
        daemon.start()
        until(lambda: len(daemon.ledger) == 2)
        daemon.open_gate()
        assert daemon.wait(id)["state"] == "done"
        daemon.end()
        until(lambda: not Path(f"/proc/{daemon.ledger[1]}").exists())


def test_a_child_that_is_killed_from_outside_while_idle_costs_no_attempt(one: Daemon) -> None:
    pid = one.run("who")["result"]["pid"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in _state(pid))
    assert one.run("who")["crashes"] == 0


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def test_reload_brings_new_code_to_new_children_and_running_ones_finish(short_tmp: Path) -> None:
    body = "def run(self): note('start'); gate(self.jobdata['gate']); return {}"
    with Daemon(
        short_tmp, "[job held]\nexecutor = process\nconcurrent = 2", held=body.format(1)
    ) as daemon:
        old = daemon.submit("held gate:a")
        daemon.until_noted("start")
        daemon.add_job("held", body.format(2))
        daemon.ask("reload")
        daemon.open_gate("b")
        assert daemon.run("held gate:b")["result"] == 2
        daemon.open_gate("a")
        assert daemon.wait(old)["result"] == 1
        assert daemon.run("held gate:a")["result"] == 2


def test_a_class_that_does_not_load_in_the_child_is_told_as_in_a_thread(short_tmp: Path) -> None:
    with Daemon(short_tmp, "[job late]\nexecutor = process", late="def run(self): pass") as daemon:
        daemon.add_job("late", "def run(self): pass\nx = 1 / 0")
        job = daemon.run("late")
        assert job["state"] == "failed"
        assert re.search(r"jobs/late\.py:6: ZeroDivisionError", job["message"])
        daemon.add_job("late", "def run(self): return 7")
        assert daemon.run("late")["result"] == 7


def test_a_stop_interrupts_a_child_and_the_attempt_does_not_count(short_tmp: Path) -> None:
    body = "def run(self): note('start'); gate('go')"
    config = "[daemon]\ngrace = 0\n[job held]\nexecutor = process"
    with Daemon(short_tmp, config, held=body) as daemon:
        id = daemon.submit("held")
        daemon.until_noted("start")
        assert daemon.end() == 0
        daemon.open_gate()
        daemon.start()
        job = daemon.wait(id)
        assert (job["state"], job["attempt"], job["crashes"]) == ("done", 1, 0)


def test_a_command_has_no_executor(short_tmp: Path) -> None:
    daemon = Daemon(short_tmp, "[job a]\ncommand = true\nexecutor = process")
    said = daemon.attempt("--check")
    assert said.returncode == 78
    assert re.search(r"upq.cfg:\d+: executor: a command is a process anyway", said.stderr)


def test_lines_come_whole_however_they_are_cut() -> None:
    near, far = socket.socketpair()
    with near, far:
        lines = Lines(near)
        far.sendall(b'{"a": 1}\n{"b"')
        assert lines.next() == {"a": 1}
        assert lines.take() is None
        far.sendall(b": 2}\n" + b'{"c": "' + b"x" * 100 + b'"}\n')
        assert lines.next() == {"b": 2}
        assert lines.next() == {"c": "x" * 100}
        far.sendall(b"[1]\n")
        with pytest.raises(ValueError, match="no JSON object"):
            lines.next()
        far.close()
        assert lines.next() is None


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "exited with 0"), (-11, "was killed by SIGSEGV"), (-99, "was killed by signal 99")],
)
def test_how_a_process_ended_is_told(code: int, text: str) -> None:
    assert ending(code) == text


def test_progress_of_a_child_tells_no_secret(short_tmp: Path) -> None:
    folder = short_tmp
    vault.add_key(str(folder / "keys"))
    config = "[db]\nkey_file = keys\n[job tells]\nexecutor = process\nsecret = word\n"
    body = "def run(self):\n    self.progress(1, 2, 'with ' + self.jobdata['word'])"
    with Daemon(folder, config, tells=body) as daemon:
        job = daemon.run("tells word:sesame-open")
        assert job["state"] == "done" and job["progress"]["text"] == "with ***"
        daemon.end()
        stored = b"".join(one.read_bytes() for one in (folder / "state").iterdir())
        assert b"with ***" in stored and b"sesame" not in stored


def test_a_reload_that_is_still_at_its_imports_fails_no_job(shop: Shop) -> None:
    types = shop.offer("return 7")
    Loader(shop.folder)  # as a reload begins: all modules are forgotten
    report = shop.run(types)
    assert (report.end, report.result) == (DONE, 7)


def test_a_cancel_does_not_write_to_a_child_that_is_buried(shop: Shop) -> None:
    types = shop.offer("os._exit(1)")
    job = shop.make(types)
    asked = []

    class Dying(Interpreter):
        def ask_to_end(self, token: int) -> None:
            asked.append(token)

        def end(self, wait_s: float = 0.0) -> str:
            ended = super().end(wait_s)
            job.cancel()  # while others look for what the child has started
            return ended

    kind = types.get("work")
    one = Dying(kind, shop.processes._terms(kind), 0, None)
    assert job.carry(one).end == INTERRUPTED
    assert (one.is_over, job.ended_by, asked) == (True, "cancel", [])


def test_what_a_killed_daemons_job_has_started_is_gone_before_the_job_runs_again(
    short_tmp: Path,
) -> None:
    body = """
def run(self):
    import subprocess
    file = FOLDER / "program"
    if file.exists():
        try:
            state = Path(f"/proc/{file.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "?"
        return {"state": state}
    program = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"],
                               stdout=subprocess.PIPE, start_new_session=True)
    program.stdout.readline()
    file.write_text(str(program.pid))
    note("started")
    gate("never")
"""
    config = "[job starts]\nexecutor = process\n"
    with Daemon(short_tmp, config, starts=body) as daemon:
        id = daemon.submit("starts")
        daemon.until_noted("started")
        daemon.restart()
        job = daemon.wait(id)
        assert (job["state"], job["result"]["state"] in "ZX?") == ("done", True)


@pytest.mark.parametrize("at_work", [True, False])
def test_a_child_that_cannot_be_killed_holds_up_nobody(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at_work: bool
) -> None:
    types, processes = shop.offer("return os.getpid()"), shop.processes
    pid = shop.run(types).result
    os.kill(pid, signal.SIGSTOP)
    until(lambda: _state(pid) == "T")
    reports = []

    def see_it_end() -> None:
        if at_work:
            job = shop.make(types)
            job.grace_s = 0.0
            job.cancel()
            reports.append(processes.perform(types.get("work"), job).end)
        else:
            processes.renew()
            monkeypatch.setattr("upq.process.LEAVE_S", 0)
        for _ in range(3):
            processes.tidy()

    try:
        with monkeypatch.context() as patch:
            patch.setattr("upq.process.subprocess.Popen.kill", lambda process: None)
            patch.setattr("upq.process.end_orphans", lambda tokens, grace_s: 0)
            thread = threading.Thread(target=see_it_end, daemon=True)
            thread.start()
            until(lambda: not thread.is_alive())
        assert reports == [CANCELLED] * at_work
        assert [record.message for record in caplog.records] == [f"process {pid} cannot be killed"]
        assert [one.is_over for one in processes._leaving] == [False]
        left = os.pidfd_open(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
    with closing(left):
        assert select.select([left], [], [], PATIENCE_S)[0]
    processes.tidy()
    assert processes._leaving == []


def test_a_child_with_the_settings_before_a_reload_gets_no_job_after_it(shop: Shop) -> None:
    run = 'return [self.jobcfg["colour"], os.getpid()]'
    old = shop.offer(run, colour="green")
    before = shop.make(old)
    new = shop.offer(run, colour="red")  # the reload comes when the job has its type already
    shop.processes.renew()
    assert shop.processes.perform(old.get("work"), before).result[0] == "green"
    first, second = (shop.run(new).result for _ in range(2))
    assert first[0] == "red" and first == second


def test_a_timeout_may_be_longer_than_poll_can_wait(shop: Shop) -> None:
    types = shop.offer("time.sleep(0.1); return 7")
    job = shop.make(types)
    job.timeout_s = 30 * 86400.0
    report = shop.processes.perform(types.get("work"), job)
    assert (report.end, report.result) == (DONE, 7)


def fds_and_children() -> tuple[int, set[str]]:
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return len(os.listdir("/proc/self/fd")), set(children.split())


def test_a_conversation_that_fails_leaves_no_child_and_no_descriptor(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = shop.offer("print(7)")
    shop.processes.perform(types.get("work"), shop.make(types))
    shop.processes.close()
    fds, children = fds_and_children()

    def fail(*args: object) -> None:
        raise RuntimeError

    for place in ("ProcessJob._heed", "Lines.send"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(f"upq.process.{place}", fail)
            shop.run(types)
        now_fds, now_children = fds_and_children()
        # Fewer, when something of another test goes meanwhile.
        assert now_fds <= fds and now_children <= children
