"""Jobs that wait for jobs of their own, and the steps of their work, through a real daemon."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import AWAY
from tests.daemons import Daemon, until
from tests.servers import Postgres
from tests.test_process import folder_of_its_own
from upq import vault

#: A parent of each kind that this file is about; `how` says what it does.
PARENT = """
def run(self):
    return getattr(self, self.jobdata["how"])()

def well(self):
    job = self.submit("child", n=1)
    return [job.wait(), job.result, self.gather([job, self.submit("child", {"n": 2}, more=3)])]

def badly(self):
    from upq import ChildFailed
    try:
        self.submit("child", n=-1).wait()
    except ChildFailed as error:
        return [error.type, error.id, error.state, error.message, str(error)]

def unheeded(self):
    self.submit("child", n=-1).wait()

def late(self):
    from upq import TimedOut
    job = self.submit("child", n=1, queue="shut")
    try:
        job.wait(0.05)
    except TimedOut as error:
        return str(error)

def tells(self):
    job = self.submit("child", queue="held")
    self.progress(1, 3, "first")
    self.progress(2, 3, "second")
    job.wait()

def some_badly(self):
    from upq import ChildFailed
    jobs = [self.submit("child", n=n) for n in (-1, 2, -3)]
    try:
        self.gather(jobs)
    except ChildFailed as error:
        named = [str(one) for one in (error, *error.others)]
        assert all(one in str(error) for one in named)
    found = self.gather(jobs, return_failed=True)
    return [one.message if isinstance(one, ChildFailed) else one for one in found]

def to_queues(self):
    jobs = [self.submit("child", {"queue": "mine"}, n=1, queue="special"),
            self.submit("child", {"jobname": "x", "params": 1, "n": 1})]
    self.gather(jobs)
    return [job.jobid for job in jobs]

def twice(self):
    return [self.step("draw", lambda: (1, 2)), self.step("draw", max, 1, -3, key=abs)]

def fault(self, what):
    try:
        what()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def faults(self):
    import threading
    said = []
    inside = lambda: said.append(self.fault(lambda: self.step("inner", int)))
    queues = lambda: said.append(self.fault(lambda: self.submit("child")))
    appends = lambda: said.append(self.fault(lambda: self.append_job("child")))
    self.step("outer", inside)
    self.step("queues", queues)
    self.step("appends", appends)
    helper = threading.Thread(target=lambda: said.append(self.fault(lambda: self.step("far", int))))
    helper.start()
    helper.join()
    said.append(self.fault(lambda: self.step("a set", lambda: {1})))
    said.append(self.fault(lambda: self.step("nan", lambda: float("nan"))))
    said.append(self.fault(lambda: self.step("much", lambda: "x" * (1 << 20))))
    said.append(self.fault(lambda: self.step("", int)))
    said.append(self.fault(lambda: self.submit("child", {"n": Path("/")})))
    return said
"""
CHILD = """
def run(self):
    n = self.jobdata.get("n")
    if n and n < 0:
        self.msg(f"no {n}")
        return False
    return n
"""
CONFIG = """
[job parent]
executor = {executor}
[job child]
concurrent = 2
"""


@pytest.fixture(scope="module", params=["thread", "process"])
def one(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with folder_of_its_own() as folder:
        config = CONFIG.format(executor=request.param)
        with Daemon(folder, config, parent=PARENT, child=CHILD) as daemon:
            yield daemon


# Waiting


def test_wait_and_gather_return_what_children_have_returned(one: Daemon) -> None:
    job = one.run("parent how:well")
    assert (job["state"], job["result"]) == ("done", [1, 1, [1, 2]])


def test_a_child_that_fails_is_an_exception_with_what_it_has_said(one: Daemon) -> None:
    job = one.run("parent how:badly")
    type, id, state, message, text = job["result"]
    assert (type, state, message) == ("child", "failed", "no -1")
    assert text == f"child {id} is failed: no -1"
    assert one.job(id)["parent"] == job["id"]


def test_a_parent_that_does_not_catch_it_fails_with_the_childs_words(one: Daemon) -> None:
    job = one.run("parent how:unheeded")
    assert job["state"] == "failed"
    assert job["message"].startswith("child ") and job["message"].endswith(" is failed: no -1")


def test_a_child_that_kills_its_daemon_fails_its_parent_with_that(short_tmp: Path) -> None:
    body = "def run(self): note('begun'); gate('never')"
    parent = "def run(self): self.submit('held').wait()"
    with Daemon(short_tmp, "[job parent]\n[job held]", held=body, parent=parent) as daemon:
        id = daemon.submit("parent")
        for deaths in range(3):
            until(lambda n=deaths: len(daemon.ledger) == n + 1)  # type: ignore[misc]
            daemon.restart()
        told = daemon.wait(id)["message"]
        assert told.endswith(" is failed: the daemon died each of the 3 times that it ran")


def test_a_wait_whose_time_is_over_says_so(one: Daemon) -> None:
    job = one.submit("child @queue:shut")
    one.wait(job)
    one.ask("pause shut")
    result = one.run("parent how:late")["result"]
    assert result.startswith("child ") and result.endswith(" is still blocked")


def test_what_a_parent_has_said_last_is_shown_while_it_waits(one: Daemon) -> None:
    one.run("child @queue:held")
    one.ask("pause held")
    id = one.submit("parent how:tells")
    until(lambda: (one.job(id)["progress"] or {}).get("text") == "second")
    assert one.job(id)["state"] == "running"
    one.ask("resume held")
    assert one.wait(id)["state"] == "done"


def test_gather_waits_for_all_and_names_each_that_failed(one: Daemon) -> None:
    job = one.run("parent how:some_badly")
    assert (job["state"], job["result"]) == ("done", ["no -1", 2, "no -3"])


def test_submit_takes_a_queue_and_any_name_of_a_parameter(one: Daemon) -> None:
    special, plain = (one.job(id) for id in one.run("parent how:to_queues")["result"])
    assert (special["queue"], special["params"]) == ("special", {"queue": "mine", "n": 1})
    assert (plain["queue"], plain["params"]) == ("child", {"jobname": "x", "params": 1, "n": 1})


# Steps


def test_a_step_returns_what_its_function_does_as_json_has_it(one: Daemon) -> None:
    assert one.run("parent how:twice")["result"] == [[1, 2], -3]


def test_what_is_no_step_is_an_error_that_names_it(one: Daemon) -> None:
    job = one.run("parent how:faults")
    assert job["state"] == "done", job
    assert job["result"] == [
        "UpqError: step inner: not inside step outer",
        "UpqError: enqueue_newjob: not inside step queues",
        "UpqError: append_job: not inside step appends",
        "UpqError: step far: only the job's own thread may take steps",
        "UpqError: step a set: what it returns is no JSON: Object of type set is not JSON"
        " serializable",
        "UpqError: step nan: what it returns is no JSON: Out of range float values are not JSON"
        " compliant",
        "TooLong: step much: what it returns has 1048578 bytes, more than 1048576",
        "UpqError: step: a name of 1 to 200 characters, not ''",
        "BadParams: child: its params are no JSON: Object of type PosixPath is not JSON"
        " serializable",
    ]


ONE_OF_MANY = """
def run(self):
    if "n" in self.jobdata:
        return self.jobdata["n"]
    return self.submit("waits", n=self.jobid, queue="shut").wait() == self.jobid
"""


@pytest.mark.alone
def test_a_thousand_parents_wait_with_one_place(short_tmp: Path) -> None:
    with Daemon(short_tmp, "[job waits]", waits=ONE_OF_MANY) as daemon:

        def many(n: int) -> None:
            asked = {"submit_many": [{"submit": "waits"}] * n}
            assert json.loads(daemon.say(json.dumps(asked)))["ok"]

        def jobs() -> dict[str, int]:
            return dict(daemon.ask("status")["jobs"])

        many(20)
        until(lambda: jobs()["done"] == 40)
        daemon.ask("pause shut")
        before_mib = daemon.rss_mib()
        many(1000)
        until(lambda: jobs()["running"] == 1000, 120)
        grown_mib = daemon.rss_mib() - before_mib
        began_s = time.monotonic()
        daemon.ask("resume shut")
        until(lambda: jobs()["done"] == 2040, 120)
        took_s = time.monotonic() - began_s
        grown_mib = max(grown_mib, daemon.rss_mib() - before_mib)
        print(f"1,000 waiting parents: {grown_mib:.0f} MiB more, all ended after {took_s:.1f} s")
        assert grown_mib <= 50
        assert took_s < 30
        found = daemon.ask("jobs type:waits limit:1000")["jobs"]
        assert all(job["result"] is True for job in found if job["parent"] is None)


#: Notes each thing that it does itself; waits where the test likes.
DURABLE = """
def run(self):
    note("run")
    drawn = [self.step("draw", self.draw, n) for n in range(2)]
    jobs = [self.submit("child", n=n) for n in range(2)]
    found = self.gather(jobs)
    gate(self.jobdata["gate"])
    return drawn, self.step("last", self.draw, 9), found, [job.jobid for job in jobs]

def draw(self, n):
    note("draw", n)
    return [n, self.jobid]
"""
NOTING = """
def run(self):
    note("child", self.jobdata["n"])
    return self.jobdata["n"]
"""


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_after_a_crash_steps_and_children_are_there_and_not_run_again(
    short_tmp: Path, url: str, executor: str
) -> None:
    config = CONFIG.format(executor=executor)
    with Daemon(short_tmp, config, url, parent=DURABLE, child=NOTING) as daemon:
        id = daemon.submit("parent gate:go")
        until(lambda: daemon.ledger.count("run") == 1 and children_done(daemon) == 2)
        daemon.restart()
        until(lambda: daemon.ledger.count("run") == 2)
        daemon.open_gate()
        job = daemon.wait(id)
        drawn, last, found, ids = job["result"]
        assert (drawn, last, found) == ([[0, id], [1, id]], [9, id], [0, 1])
        assert ids == [child["id"] for child in daemon.ask("jobs type:child")["jobs"]][::-1]
        once = sorted(line for line in daemon.ledger if line != "run")
        assert once == ["child 0", "child 1", "draw 0", "draw 1", "draw 9"]


def children_done(daemon: Daemon) -> int:
    return len(daemon.ask("jobs type:child state:done")["jobs"])


RETRIED = """
def run(self):
    note("run")
    drawn = self.step("draw", self.draw)
    if not (FOLDER / "opened").exists():
        self.step("open", self.open)
    good = self.submit("child", n=1).wait()
    return [drawn, good, self.submit("child", n=-1).wait()]

def draw(self):
    note("draw")
    return self.jobid

def open(self):
    (FOLDER / "opened").touch()
    raise ValueError("half done")
"""
UNSTEADY = """
def run(self):
    n = self.jobdata["n"]
    note("child", n)
    if n < 0 and not (FOLDER / "mended").exists():
        self.msg(f"no {n}")
        return False
    return n
"""


def test_retry_of_a_parent_goes_on_where_it_has_failed(short_tmp: Path, url: str) -> None:
    config = CONFIG.format(executor="thread")
    with Daemon(short_tmp, config, url, parent=RETRIED, child=UNSTEADY) as daemon:
        id = daemon.submit("parent")
        assert "ValueError: half done" in daemon.wait(id)["message"]
        daemon.ask(f"retry {id}")
        assert daemon.wait(id)["message"].endswith(" is failed: no -1")
        bad = daemon.ask("jobs type:child state:failed")["jobs"][0]["id"]
        daemon.open_gate("mended")
        daemon.ask(f"retry {id}")
        assert daemon.wait(id)["result"] == [id, 1, -1]
        assert daemon.job(bad)["state"] == "done"
        assert daemon.ledger.count("run") == 3
        assert sorted(set(daemon.ledger)) == ["child -1", "child 1", "draw", "run"]
        assert [daemon.ledger.count(line) for line in ("draw", "child 1", "child -1")] == [1, 1, 2]
        assert len(daemon.ask("jobs type:child")["jobs"]) == 2


CHANGING = """
def run(self):
    first = not (FOLDER / "begun").exists()
    (FOLDER / "begun").touch()
    self.submit("child", n=1 if first else 2, queue="shut" if first else "")
    if first:
        note("waits")
        gate("never")
    return "well"
"""


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize(
    ("on_change", "state", "reason"), [("fail", "failed", "changed"), ("continue", "done", "")]
)
def test_a_child_that_is_not_asked_for_again_is_told(
    short_tmp: Path, executor: str, on_change: str, state: str, reason: str
) -> None:
    config = CONFIG.format(executor=f"{executor}\nretries = 5\non_change = {on_change}")
    with Daemon(short_tmp, config, parent=CHANGING, child=CHILD) as daemon:
        daemon.run("child @queue:shut")
        daemon.ask("pause shut")
        id = daemon.submit("parent")
        daemon.until_noted("waits")
        daemon.restart()
        job = daemon.wait(id)
        assert (job["state"], job["reason"], job["result"]) == (state, reason, "well")
        left = daemon.ask("jobs state:blocked")["jobs"][0]["id"]
        told = f"an earlier run has queued child {left} (queued), and this one has not asked again"
        assert told in job["message"]
        until(lambda: told in daemon.log)
        assert ("on_change = fail" in job["message"]) == (on_change == "fail")
        daemon.ask("resume shut")
        daemon.wait(left)
        if state == "failed":
            daemon.ask(f"retry {id}")
            assert daemon.wait(id)["state"] == "done"


# What is kept of steps


def test_secrets_in_what_a_step_returns_are_encrypted(short_tmp: Path) -> None:
    vault.add_key(str(short_tmp / "keys"))
    config = "[db]\nkey_file = keys\n[job keeps]\nsecret = word\n"
    body = """
def run(self):
    word = self.jobdata["word"]
    made = self.step("make", lambda: {"word": "sesame-open", "told": "it is " + word})
    note("run")
    gate("go")
    return made["word"] == "sesame-open" and made["told"] == "it is thistle"
"""
    with Daemon(short_tmp, config, keeps=body) as daemon:
        id = daemon.submit("keeps word:thistle")
        daemon.until_noted("run")
        daemon.restart()
        until(lambda: daemon.ledger.count("run") == 2)
        daemon.open_gate()
        assert daemon.wait(id)["state"] == "done"
        daemon.end()
        stored = b"".join(one.read_bytes() for one in (short_tmp / "state").iterdir())
        assert b"make" in stored and b"sesame" not in stored and b"thistle" not in stored


def test_a_step_waits_for_a_database_that_is_away_and_is_not_done_again(
    postgres: Postgres, short_tmp: Path
) -> None:
    body = """
def run(self):
    return self.step("work", self.work)

def work(self):
    note("work")
    gate("go")
    return 7
"""
    with (
        postgres.database() as url,
        Daemon(short_tmp, "[job works]", url, works=body) as daemon,
    ):
        daemon.forgiven += AWAY
        id = daemon.submit("works")
        daemon.until_noted("work")
        postgres.kill9()
        daemon.open_gate()
        until(lambda: "cannot be written to" in daemon.log)
        postgres.start()
        until(lambda: not daemon.ask("status")["trouble"])
        job = daemon.wait(id)
        assert (job["result"], job["starts"], daemon.ledger) == (7, 1, ["work"])


def test_a_job_can_be_ended_inside_a_step(short_tmp: Path) -> None:
    body = """
def run(self):
    self.step("long", self.long)

def long(self):
    while True:
        time.sleep(0.01)
"""
    with Daemon(short_tmp, "[job slow]\ntimeout = 0.2s", slow=body) as daemon:
        assert daemon.run("slow")["message"] == "timed out after 0.2 s"
