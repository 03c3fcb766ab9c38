"""The trip of a line: from a client through a real daemon to the end of the job, and after."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GIVEN, note_database, private, unavailable
from tests.daemons import PATIENCE_S, ROOT, Daemon, NotStarted, Talk, acting_as, until
from tests.servers import MariaDB, Postgres, PrivateServer, Server, short_folder
from upq import when

# The jobs --------------------------------------------------------------------------------------

JOBS = {
    # Answers with all that it has been given.
    "echo": """
        def run(self):
            self.msg(f"echo of {self.jobid}")
            self.result = {
                "data": self.jobdata, "cfg": dict(self.jobcfg), "args": self.args,
                "none": self.getcfg("absent", "default"), "thread": self.thread,
            }
            return "loses against self.result"
        """,
    # Is at work until its gate is open, or until it is cancelled.
    "hold": """
        def run(self):
            note("start", self.jobid)
            gate(self.jobdata.get("gate", "go"), lambda: self.cancelled)
            note("end", self.jobid)
            return not self.cancelled
        """,
    "other": """
        def run(self):
            note("other", self.jobid)
        """,
    "number": """
        def run(self):
            note(self.jobdata["n"])
            return int(self.jobdata["n"])
        """,
    "raising": """
        def run(self):
            self.msg("got so far: ")
            raise ValueError("broken on purpose")
        """,
    "exits": """
        def run(self):
            raise SystemExit(3)
        """,
    "unfit": """
        def run(self):
            return {1, 2}
        """,
    "careful": """
        def check(self):
            if "no" in self.jobdata:
                self.msg("not today")
                return False
            if "oops" in self.jobdata:
                raise KeyError("lost")
            self.msg("gladly")
            self.found = f"found {self.jobdata.get('fid')}"

        def run(self):
            self.enqueue_job()
            return self.found
        """,
    "big": """
        def run(self):
            self.msg("m" * int(self.jobdata.get("message", 0)))
            return "r" * int(self.jobdata.get("result", 0))
        """,
    # The steps of chains.
    "first": """
        def run(self):
            note("first", sorted(self.jobdata))
            self.jobdata["added"] = "by first"
        """,
    "second": """
        def check(self):
            return "refused" not in self.jobdata

        def run(self):
            note("second", sorted(self.jobdata))
            return self.jobdata.get("stop") != "second"
        """,
    "third": """
        def run(self):
            note("third", sorted(self.jobdata))
        """,
    "appends": """
        def run(self):
            note("appends")
            self.append_job("second", {"appended": "too"})
        """,
    # Parents.
    "parent": """
        def run(self):
            job = self.enqueue_newjob("number", {"n": self.jobdata.get("n", 7)})
            before = job.jobid > self.jobid, job.jobname
            ended = job.finished.wait()
            return [*before, ended, job.finished.is_set(), job.state, job.result]
        """,
    "many": """
        def run(self):
            jobs = [self.submit("number", n=n) for n in range(int(self.jobdata["n"]))]
            return [job.result for job in jobs if job.finished.wait()]
        """,
    "deep": """
        def run(self):
            n = int(self.jobdata["n"])
            if not n:
                return 0
            job = self.enqueue_newjob("deep", {"n": n - 1})
            job.finished.wait()
            return job.result + 1
        """,
    "deserter": """
        def run(self):
            job = self.enqueue_newjob("hold", {"gate": "never"})
            return [job.finished.wait(0.05), job.result, job.state]
        """,
    "unruly": """
        def run(self):
            return self.enqueue_newjob("no_such_type", {}).jobid
        """,
    "talks": """
        def run(self):
            self.output.write("one line\\n")
            print("two lines", file=self.output)
            self.progress(3, 4, "nearly")
        """,
    "chatty": """
        queued = False

        def check(self):
            self.msg("here I am")
        """,
}  # fmt: skip
JOBS = {name: "\n".join(line[8:] for line in body.split("\n")) for name, body in JOBS.items()}

CONFIG = """
[logging]
loglevel = debug
[paths]
uploads = up
[listen]
tcp = 127.0.0.1:0
[job test]
[job hold]
concurrent = 2
[job echo]
colour = blue
concurrent = 2
[job other]
[job number]
[job raising]
[job exits]
[job unfit]
[job careful]
[job big]
[job first]
subjobs = second third
[job second]
[job third]
[job appends]
subjobs = third
[job listed]
subjobs = first third
command = true
[job parent]
[job many]
[job deep]
[job deserter]
[job unruly]
[job talks]
[job chatty]
[job idle]
enabled = no
command = true
[job typed]
params = fid:int level:choice(a,b)=a
command = echo {fid} {level}
[job sleeper]
params = seconds
command = sleep {seconds}
concurrent = 2
[job login]
params = user password
secret = password
command = echo {user}
[job told]
params = code
command = sh -c 'echo some words; exit "$1"' sh {code}
notify_fail = syslog:local3 mail:one@example.org,two@example.org
notify_success = syslog
[job notify]
syslog_address = {folder}/syslog
[mail]
server = 127.0.0.1:1
from = upq@example.org
"""


def url_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """As the fixture `url`, for a daemon that serves more than one test."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/upq.db"
        return
    given = os.environ.get(GIVEN[kind])
    server: Server = Server(given) if given else request.getfixturevalue(kind)
    with server.database() as fresh:
        yield fresh


@pytest.fixture(scope="module", params=["sqlite", "mariadb", "postgres"])
def shared(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon for all tests that leave it as they found it, once on each kind of database."""
    folder = short_folder()
    with contextlib.contextmanager(url_of)(request.param, folder, request) as url:
        config = CONFIG.replace("{folder}", str(folder))
        daemon = Daemon(folder, config, url, **JOBS)
        shutil.copy(ROOT / "jobs/notify.py", folder / "jobs")
        daemon.forgiven = [r"check\(\) of careful failed"]
        with daemon:
            yield daemon
    shutil.rmtree(folder)


@pytest.fixture
def trip(shared: Daemon, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    note_database(request, shared.ask("status")["database"])
    for leftover in ("ledger", "go", "a", "b"):
        (shared.folder / leftover).unlink(missing_ok=True)
    yield shared
    for name in ("go", "a", "b"):
        shared.open_gate(name)
    until_idle(shared)
    shared.has_behaved()


def until_idle(daemon: Daemon) -> None:
    """Until nothing is left to do. Notifications would wait for a mail server for hours."""

    def is_idle() -> bool:
        daemon.ask("cancel type:notify")
        return not any(q["queued"] or q["running"] for q in daemon.ask("queues")["queues"])

    until(is_idle)


def total(daemon: Daemon) -> int:
    """How many jobs there are."""
    return sum(daemon.ask("status")["jobs"].values())


@pytest.fixture
def fresh(short_tmp: Path, url: str) -> Iterator[Daemon]:
    """A daemon of the test's own, not started; with the jobs, configured by the test."""
    daemon = Daemon(short_tmp, "", url, **JOBS)
    yield daemon
    daemon.kill9()
    daemon.has_behaved()


@pytest.fixture
def lone(short_tmp: Path) -> Iterator[Daemon]:
    """The same on SQLite only, for what does not touch the store."""
    daemon = Daemon(short_tmp, "", **JOBS)
    yield daemon
    daemon.kill9()
    daemon.has_behaved()


def in_(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


# One line --------------------------------------------------------------------------------------


def test_a_line_is_acknowledged_with_its_id_and_the_job_is_done(trip: Daemon) -> None:
    with trip.talk() as talk:
        reply = talk.say("echo fid:50")
    assert re.fullmatch("ACK [0-9]+( .*)?", reply)
    job = trip.wait(int(reply.split()[1]))
    assert (job["state"], job["type"], job["queue"], job["attempt"]) == ("done", "echo", "echo", 1)
    assert job["message"] == f"echo of {job['id']}"
    assert job["params"] == {"fid": "50"}
    assert job["created_at"] <= job["started_at"] <= job["ended_at"]
    assert job["submitter"] == "root" or os.geteuid() != 0
    assert trip.history(job["id"]) == ["queued", "running", "done"]


def test_tcp_does_what_the_unix_socket_does(trip: Daemon) -> None:
    port = int(re.findall(r"127\.0\.0\.1\W+([0-9]+)", trip.log)[0])
    with Talk(socket.create_connection(("127.0.0.1", port))) as talk:
        id = int(talk.say("echo over:tcp").split()[1])
        assert talk.say("ping").startswith("OK ")
        assert talk.say("drain").startswith("ERR denied ")
    assert trip.wait(id)["result"]["data"] == {"over": "tcp"}
    assert trip.job(id)["submitter"] == "tcp:127.0.0.1"


def test_params_are_split_at_blanks_and_the_first_colon_and_quotes_keep_blanks(
    trip: Daemon,
) -> None:
    line = """echo  url:http://a:80/x\t50 msg:"two \\"words\\"" 'one word' e: q:it's"""
    result = trip.run(line)["result"]
    assert result["data"] == {
        "url": "http://a:80/x", "50": "", "msg": 'two "words"', "one word": "", "e": "",
        "q": "it's",
    }  # fmt: skip
    assert result["args"] == ["50", "one word", "e"]


def test_an_argument_may_be_a_json_object(trip: Daemon) -> None:
    data = {"fid": 50, "nested": {"a": [1, None, 2.5, True]}, "text": "ä\n\U0001f600 ' \" :"}
    assert trip.run(f"echo {json.dumps(data)}")["result"]["data"] == data
    assert trip.job(trip.submit(f"echo {json.dumps(data)}"))["params"] == data


def test_a_job_sees_its_section_and_defaults_for_what_is_not_there(trip: Daemon) -> None:
    result = trip.run("echo")["result"]
    assert {"colour": "blue", "concurrent": "2"}.items() <= result["cfg"].items()
    assert result["cfg"]["uploads"] == f"{trip.folder}/up"
    assert result["none"] == "default"


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("nonsense fid:1", "ERR unknown_command .*nonsense"),
        ("ecko fid:1", "ERR unknown_command .*did you mean echo"),
        ("idle", "ERR disabled .*idle"),
        ("careful no:1", "ERR refused not today"),
        ("careful oops:1", "ERR refused .*KeyError"),
        ("typed fid:x", "ERR bad_params fid: 'x' is not a whole number"),
        ("typed fid:1 level:c", "ERR bad_params level: .*a, b"),
        ("typed fid:1 fit:2", "ERR bad_params .*fit.*did you mean fid"),
        ("echo subjobs:first", "ERR bad_params subjobs.*"),
        ("notify mail:x@y.org", "ERR (denied|refused) .*notify"),
        ("notify target:syslog", "ERR (denied|refused) .*notify"),
        ("echo @after:999999999", "ERR not_found .*999999999"),
        ("echo @in:soon", "ERR bad_params @in.*soon"),
        ("echo @nonsense:1", "ERR bad_params .*@nonsense"),
        ('echo msg:"open', "ERR bad_params .*quote"),
        ("show 999999999", "ERR not_found .*999999999"),
        ("wait 999999999", "ERR not_found .*999999999"),
        ("pause nowhere", "ERR not_found .*nowhere"),
        ("show", "ERR bad_params usage: show <id>"),
    ],
)
def test_a_refusal_is_one_line_with_a_code_and_leaves_no_job(
    trip: Daemon, line: str, reply: str
) -> None:
    before = total(trip)
    with trip.talk() as talk:
        assert re.fullmatch(reply + ".*", talk.say(line))
        assert talk.say("ping").startswith("OK "), "the connection stays open"
    assert total(trip) == before


def test_what_check_says_comes_with_the_ack_and_what_it_finds_is_there_in_run(trip: Daemon) -> None:
    reply = trip.say("careful fid:3")
    assert re.fullmatch("ACK [0-9]+ gladly", reply)
    job = trip.wait(int(reply.split()[1]))
    assert (job["state"], job["result"], job["message"]) == ("done", "found 3", "")


def test_replies_come_in_the_order_of_the_lines_and_an_empty_line_ends_the_talk(
    trip: Daemon,
) -> None:
    with trip.talk() as talk:
        talk.send("echo n:1\nnonsense\nping\r\necho n:2\n\nping\n")
        replies = [talk.read() for _ in range(5)]
    assert [reply[:4] for reply in replies] == ["ACK ", "ERR ", "OK {", "ACK ", ""]
    assert int(replies[0].split()[1]) < int(replies[3].split()[1])


def test_an_answered_type_queues_nothing(trip: Daemon) -> None:
    before = total(trip)
    assert trip.say("chatty") == "ACK 0 here I am"
    assert total(trip) == before


# Ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "state", "message", "result"),
    [
        ("test msg:hello result:12", "done", "hello", "12"),
        ("number n:4", "done", "", 4),
        ("other", "done", "", None),
        ("test fail:1", "failed", "failing, 0 times more to come", None),
        ("raising", "failed", r"got so far: .*/raising\.py:\d+: ValueError: broken on .*", None),
        ("exits", "failed", r".*/exits\.py:\d+: SystemExit: 3", None),
        ("unfit", "failed", "the result is no JSON: .*set.*", None),
        ("told code:3", "failed", "sh exited with 3: some words", {"exit_code": 3}),
    ],
)
def test_how_a_run_ends_is_how_the_job_ends(
    trip: Daemon, line: str, state: str, message: str, result: Any
) -> None:
    job = trip.run(line)
    assert (job["state"], job["result"]) == (state, result)
    assert re.fullmatch(message, job["message"])
    assert trip.history(job["id"]) == ["queued", "running", state]


def test_a_message_and_a_result_of_a_mebibyte_are_kept(trip: Daemon) -> None:
    size = (1 << 20) - 2  # and two quotes
    job = trip.run(f"big message:{1 << 20} result:{size}")
    assert (job["state"], len(job["message"]), len(job["result"])) == ("done", 1 << 20, size)


def test_a_result_over_a_mebibyte_fails_the_job_with_that_reason(trip: Daemon) -> None:
    job = trip.run(f"big result:{(1 << 20) - 1}")
    assert job["state"] == "failed"
    assert "1048577 bytes, more than 1048576" in job["message"]


def test_a_message_over_a_mebibyte_is_cut_and_hurts_nobody(trip: Daemon) -> None:
    job = trip.run(f"big message:{3 << 20}")
    assert (job["state"], len(job["message"])) == ("done", 1 << 20)


def test_output_and_progress_are_kept(trip: Daemon) -> None:
    job = trip.run("talks")
    assert job["progress"] == {"done": 3, "total": 4, "text": "nearly"}
    output = trip.ask(f"output {job['id']}")
    assert output["text"] == "one line\ntwo lines\n"
    assert (output["size_bytes"], output["truncated"]) == (19, False)
    assert trip.say(f"output {trip.run('other')['id']}").startswith("ERR not_found ")
    assert trip.ask(f"output {trip.run('typed fid:7')['id']}")["text"] == "7 a\n"


def test_an_end_of_a_type_that_tells_people_queues_a_notification_for_each_target(
    trip: Daemon,
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(f"{trip.folder}/syslog")
        syslog.settimeout(PATIENCE_S)
        bad = trip.run("told code:3")["id"]
        line = syslog.recv(4096).decode()
        assert line.startswith(f"<{19 * 8 + 3}>upq[")  # local3, err
        assert f"job {bad} told failed: sh exited with 3" in line
        good = trip.run("told code:0")["id"]
        line = syslog.recv(4096).decode()
        assert line.startswith(f"<{3 * 8 + 6}>upq[")  # daemon, info
        assert f"job {good} told done" in line
    (trip.folder / "syslog").unlink()
    rows = trip.ask("jobs type:notify limit:3")["jobs"]
    mail = next(row for row in rows if row["params"]["target"].startswith("mail:"))
    trip.until_state(mail["id"], "queued")
    told = mail["params"]["job"]
    assert mail["params"]["target"] == "mail:one@example.org,two@example.org"
    assert (told["jobid"], told["jobname"], told["state"]) == (bad, "told", "failed")
    assert (told["jobdata"], told["output"]) == ({"code": "3"}, "some words\n")
    until(lambda: "retry 1 of" in trip.job(mail["id"])["reason"])
    assert "mail server: " in trip.why(mail["id"])
    trip.ask(f"cancel {mail['id']}")


# Order -----------------------------------------------------------------------------------------


def test_a_repeated_key_answers_the_first_id_and_other_params_conflict(trip: Daemon) -> None:
    key = f"k{time.time_ns()}"
    first = trip.say(f"echo n:1 @key:{key}")
    id = first.split()[1]
    assert trip.say(f"echo n:1 @key:{key}") == f"ACK {id} duplicate"
    assert trip.say(f"echo n:2 @key:{key}").startswith(f"ERR key_conflict job {id} ")
    assert trip.say(f"echo n:1 @key:{key.upper()}").split()[1] != id, "keys are told apart by case"
    assert trip.say(f"other n:1 @key:{key}").split()[1] != id, "and by the type"
    with trip.talk() as talk:
        talk.send(f"echo n:3 @key:{key}x\n" * 20)
        assert len({talk.read().split()[1] for _ in range(20)}) == 1
    trip.wait(int(id))
    assert trip.say(f"echo n:1 @key:{key}") == f"ACK {id} duplicate", "also when it is done"


def test_a_delayed_job_starts_when_it_is_due_and_not_before(trip: Daemon) -> None:
    late = trip.submit("other @in:1h")
    waiting, why = trip.job(late), trip.why(late)
    trip.ask(f"cancel {late}")
    assert waiting["state"] == "queued"
    assert "not to start before" in why
    began = time.time()
    at, after = trip.submit(f"other @at:{in_(0.4)}"), trip.submit("other @in:300ms")
    for id, delay_s in ((at, 0.4), (after, 0.3)):
        started = when.instant(trip.wait(id)["started_at"]) / 1e6
        assert delay_s <= started - began < delay_s + 10
    assert trip.run(f"other @at:{in_(-3600)}")["state"] == "done", "a time that is over"


def test_a_job_after_others_starts_when_all_are_done(trip: Daemon) -> None:
    one, two = trip.submit("hold gate:a"), trip.submit("hold gate:b")
    last = trip.submit(f"other @after:{one},{two}")
    assert trip.job(last)["state"] == "blocked"
    trip.open_gate("a")
    trip.wait(one)
    assert trip.job(last)["state"] == "blocked"
    assert str(two) in trip.why(last)
    trip.open_gate("b")
    assert trip.wait(last)["state"] == "done"
    assert trip.ledger.index(f"end {two}") < trip.ledger.index(f"other {last}")
    assert trip.run(f"other @after:{one},{last}")["state"] == "done", "they are done already"
    assert trip.history(last)[-3:] == ["queued", "running", "done"]


def test_a_job_after_one_that_failed_stays_blocked_until_that_is_retried(trip: Daemon) -> None:
    failed = trip.run("test fail:1")["id"]  # the second time it is well
    late = trip.submit(f"other @after:{failed}")
    held = trip.submit("hold")
    early = trip.submit(f"other @after:{held}")
    trip.ask(f"cancel {held}")
    trip.wait(held)
    for id, predecessor, state in ((late, failed, "failed"), (early, held, "cancelled")):
        trip.until_state(id, "blocked")
        until(lambda id=id, state=state: state in trip.job(id)["reason"])  # type: ignore[misc]
        assert str(predecessor) in trip.why(id)
    trip.open_gate()
    for id in (failed, held):
        assert trip.say(f"retry {id}").startswith("OK ")
    assert trip.wait(late)["state"] == trip.wait(early)["state"] == "done"


def test_urgent_jobs_go_first_and_equals_in_the_order_of_their_submits(trip: Daemon) -> None:
    blockers = [trip.submit("number n:0")]
    trip.ask("pause number")
    try:
        lines = ["n:1", "n:2 @priority:low", "n:3 @priority:7", "n:4 @priority:high", "n:5"]
        ids = [trip.submit(f"number {line}") for line in (*lines, "n:6 @priority:-3")]
        assert [trip.job(id)["priority"] for id in ids] == [0, -10, 7, 10, 0, -3]
    finally:
        trip.ask("resume number")
    for id in blockers + ids:
        trip.wait(id)
    assert trip.ledger[-6:] == ["4", "3", "1", "5", "6", "2"]


def test_submit_many_queues_all_jobs_or_none(trip: Daemon) -> None:
    before = total(trip)
    good = [{"submit": "echo", "params": {"n": n}} for n in range(300)]
    for bad in (
        {"submit": "nonsense"},
        {"submit": "careful", "params": {"no": 1}},
        {"submit": "echo", "options": {"after": [999999999]}},
    ):
        reply = json.loads(trip.say(json.dumps({"submit_many": [*good, bad]})))
        assert not reply["ok"]
        assert total(trip) == before
    key = {"submit": "echo", "params": {"n": 0}, "options": {"key": f"many{time.time_ns()}"}}
    reply = json.loads(trip.say(json.dumps({"submit_many": [*good, key, key]})))
    assert reply["ok"]
    ids = [job["id"] for job in reply["jobs"]]
    assert [job["duplicate"] for job in reply["jobs"]] == [False] * 301 + [True]
    assert ids == [*range(ids[0], ids[0] + 301), ids[300]]
    assert total(trip) == before + 301
    assert trip.wait(ids[-1])["state"] == "done"


def test_json_lines_are_answered_in_json(trip: Daemon) -> None:
    with trip.talk() as talk:
        submit = {"submit": "echo", "params": {"x": [1, "two"]}, "options": {"priority": "high"}}
        reply = json.loads(talk.say(json.dumps(submit)))
        assert reply == {"ok": True, "id": reply["id"], "message": "", "duplicate": False}
        ask = {"verb": "wait", "id": reply["id"], "timeout": 20}
        ended = json.loads(talk.say(json.dumps(ask)))["data"]["job"]
        assert (ended["state"], ended["result"]["data"]) == ("done", {"x": [1, "two"]})
        refused = json.loads(talk.say('{"submit": "nonsense"}'))
        assert (refused["ok"], refused["error"]) == (False, "unknown_command")
        assert json.loads(talk.say("{nonsense}"))["error"] == "bad_params"
        long = {"submit": "echo", "params": {"text": "x" * 900_000}}
        assert json.loads(talk.say(json.dumps(long)))["ok"]


# Steps -----------------------------------------------------------------------------------------


def test_a_chain_runs_in_its_order_and_each_step_sees_what_earlier_ones_added(
    trip: Daemon,
) -> None:
    id = trip.run("first fid:50")["id"]
    until(lambda: len(trip.ledger) == 3)
    assert trip.ledger == ["first ['fid']", "second ['added', 'fid']", "third ['added', 'fid']"]
    until_idle(trip)
    shown = trip.ask(f"show {id}")
    assert shown["job"]["params"] == {"fid": "50"}
    assert shown["job"]["jobdata"] == {"fid": "50", "added": "by first"}
    (second,) = shown["children"]
    assert (second["type"], second["parent"], second["root"]) == ("second", id, id)
    (third,) = trip.ask(f"show {second['id']}")["children"]
    assert (third["type"], third["root"], third["submitter"]) == ("third", id, second["submitter"])


@pytest.mark.parametrize("how", ["stop:second", "refused:1"])
def test_a_chain_ends_with_a_step_that_fails_or_is_refused(trip: Daemon, how: str) -> None:
    id = trip.run(f"first {how}")["id"]
    until_idle(trip)
    (second,) = trip.ask(f"show {id}")["children"]
    assert second["state"] == "failed"
    assert trip.ask(f"show {second['id']}")["children"] == []
    assert [line.split()[0] for line in trip.ledger] == (
        ["first", "second"] if how.startswith("stop") else ["first"]
    )


def test_an_appended_step_runs_next(trip: Daemon) -> None:
    trip.run("appends fid:1")
    until(lambda: len(trip.ledger) == 3)
    assert trip.ledger == [
        "appends", "second ['appended', 'fid']", "third ['appended', 'fid']",
    ]  # fmt: skip


def test_the_list_of_the_run_wins_over_the_lists_of_its_steps(trip: Daemon) -> None:
    trip.run("listed")
    until(lambda: len(trip.ledger) == 2)
    until_idle(trip)
    assert [line.split()[0] for line in trip.ledger] == ["first", "third"]


def test_a_new_file_goes_through_the_chain_of_the_first_upq(lone: Daemon) -> None:
    for name in ("new_file", "hash", "catalogue"):
        shutil.copy(ROOT / f"jobs/{name}.py", lone.folder / "jobs")
    steps = ["extract_metadata", "createtorrent", "upload", "sf_sync"]
    for name in steps:
        lone.add_job(name, f"def run(self):\n    note('{name}', self.jobdata['fid'])")
    sections = "".join(f"[job {name}]\n" for name in ("hash", *steps))
    chain = "extract_metadata hash createtorrent upload sf_sync"
    lone.configure(f"[job new_file]\nsubjobs = {chain}\n{sections}")
    lone.start()
    job = lone.run(f"new_file file:{lone.config}")
    lone.until_noted("sf_sync 1")
    assert lone.ledger == [f"{name} 1" for name in steps]
    types = []
    while children := lone.ask(f"show {job['id']}")["children"]:
        (job,) = children
        types.append(job["type"])
    assert types == chain.split()


# Parents ---------------------------------------------------------------------------------------


def test_a_parent_uses_the_result_of_its_child(trip: Daemon) -> None:
    job = trip.run("parent n:12")
    assert job["result"] == [True, "number", True, True, "done", 12]
    (child,) = trip.ask(f"show {job['id']}")["children"]
    assert (child["parent"], child["params"], child["submitter"]) == (
        job["id"], {"n": "12"}, job["submitter"],
    )  # fmt: skip
    assert trip.run("many n:20")["result"] == list(range(20))


def test_fifty_jobs_of_one_type_wait_for_each_other_in_one_place(trip: Daemon) -> None:
    assert trip.run("deep n:50")["result"] == 50


def test_a_waiting_parent_says_so_and_its_place_is_free(trip: Daemon) -> None:
    trip.ask("pause number")
    try:
        one, two = trip.submit("parent"), trip.submit("parent")
        until(lambda: trip.job(one)["reason"].startswith("waits for "))
        until(lambda: trip.job(two)["reason"].startswith("waits for "))
        assert trip.job(one)["state"] == trip.job(two)["state"] == "running"
    finally:
        trip.ask("resume number")
    assert trip.wait(one)["state"] == trip.wait(two)["state"] == "done"
    assert trip.job(one)["reason"] == ""


def test_a_wait_for_a_child_may_be_cut_short(trip: Daemon) -> None:
    job = trip.run("deserter")
    assert job["result"] in ([False, None, "running"], [False, None, "queued"])
    (child,) = trip.ask(f"show {job['id']}")["children"]
    trip.ask(f"cancel {child['id']}")


def test_a_child_of_an_unknown_type_fails_the_parent_with_that_reason(trip: Daemon) -> None:
    job = trip.run("unruly")
    assert job["state"] == "failed"
    assert "unknown_command no job type no_such_type" in job["message"]


# Verbs -----------------------------------------------------------------------------------------


def test_wait_answers_when_the_job_ends_and_says_when_it_does_not(trip: Daemon) -> None:
    id = trip.submit("hold")
    assert re.fullmatch(f"ERR timeout .*{id}.*", trip.say(f"wait {id} timeout:50ms"))
    with trip.talk() as talk:
        talk.send(f"wait {id}\nping\n")
        trip.until_noted(f"start {id}")
        trip.open_gate()
        assert json.loads(talk.read().removeprefix("OK "))["job"]["state"] == "done"
        assert talk.read().startswith("OK "), "what was sent behind it"
    assert trip.ask(f"wait {id} timeout:0")["job"]["state"] == "done"


def test_a_client_that_has_sent_all_it_wants_to_say_still_hears_the_end(trip: Daemon) -> None:
    id = trip.submit("hold")
    with trip.talk() as talk:
        talk.send(f"wait {id}\n")
        talk.sock.shutdown(socket.SHUT_WR)  # as `printf ... | nc -N` does
        trip.until_noted(f"start {id}")
        trip.open_gate()
        assert talk.read().startswith("OK ")


def test_why_tells_what_a_job_waits_for(trip: Daemon) -> None:
    ids = [trip.submit("hold") for _ in range(4)]
    for id in ids[:2]:
        trip.until_noted(f"start {id}")
    assert "runs since" in trip.why(ids[0])
    assert re.search(f"2 of 2 places.*{ids[0]}.*1 jobs? (are|is) ahead", trip.why(ids[3]))
    trip.ask("pause hold")
    assert "queue hold is paused" in trip.why(ids[3])
    trip.ask("resume hold")
    trip.open_gate()
    trip.wait(ids[3])
    assert "done since" in trip.why(ids[3])


def test_lists_show_what_was_asked_for(trip: Daemon) -> None:
    ids = [trip.submit("hold") for _ in range(3)]
    for id in ids[:2]:
        trip.until_noted(f"start {id}")
    failed = trip.run("test fail:1")["id"]

    def listed(words: str) -> list[int]:
        return [job["id"] for job in trip.ask(f"jobs {words}")["jobs"]]

    assert listed("state:running") == [ids[1], ids[0]]
    assert listed("state:queued type:hold") == [ids[2]]
    assert listed("queue:hold limit:2") == [ids[2], ids[1]]
    assert listed("state:failed limit:1") == [failed]
    (queue,) = [q for q in trip.ask("queues")["queues"] if q["queue"] == "hold"]
    assert (queue["queued"], queue["running"], queue["concurrent"], queue["threads"]) == (
        1,
        2,
        2,
        2,
    )
    assert queue["oldest_queued_s"] >= 0
    status = trip.ask("status")
    assert (status["jobs"]["running"], status["state"], status["pid"]) == (
        2, "running", trip.process.pid if trip.process else 0,
    )  # fmt: skip
    trip.open_gate()
    trip.wait(ids[2])


def test_counts_agree_with_the_jobs_that_there_are(trip: Daemon) -> None:
    until_idle(trip)
    jobs = trip.ask("jobs limit:10000")["jobs"]
    for state, count in trip.ask("status")["jobs"].items():
        assert count == sum(job["state"] == state for job in jobs), state


def test_a_cancelled_job_that_waits_never_starts(trip: Daemon) -> None:
    holders = [trip.submit("hold"), trip.submit("hold")]
    id = trip.submit("hold")
    later = trip.submit("other @in:1h")
    for one in (id, later):
        assert trip.ask(f"cancel {one}")["state"] == "cancelled"
        assert trip.wait(one)["state"] == "cancelled"
        assert trip.say(f"cancel {one}").startswith("ERR wrong_state ")
    trip.open_gate()
    for one in holders:
        trip.wait(one)
    assert f"start {id}" not in trip.ledger
    assert trip.history(id)[-1].startswith("cancelled")


def test_a_running_job_that_looks_at_the_flag_is_cancelled(trip: Daemon) -> None:
    id = trip.submit("hold")
    trip.until_noted(f"start {id}")
    assert trip.ask(f"cancel {id}")["state"] == "running"
    job = trip.wait(id)
    assert (job["state"], job["cancel_asked"]) == ("cancelled", True)
    assert f"end {id}" in trip.ledger


def test_cancel_ends_a_running_command_with_all_its_processes(trip: Daemon) -> None:
    seconds = 1000 + time.time_ns() % 1000
    id = trip.submit(f"sleeper seconds:{seconds}")

    def is_there() -> bool:
        pattern = f"sleep {seconds}"
        return (
            subprocess.run(["pgrep", "-f", pattern], capture_output=True, check=False).stdout != b""
        )

    until(is_there)
    trip.ask(f"cancel {id}")
    began = time.monotonic()
    assert trip.wait(id)["state"] == "cancelled"
    assert time.monotonic() - began < 5
    assert not is_there()


def test_a_timeout_ends_a_command(trip: Daemon) -> None:
    job = trip.run("sleeper seconds:1000 @timeout:100ms")
    assert (job["state"], job["message"]) == ("failed", "timed out after 0.1 s")


def test_retry_makes_a_new_job_of_a_failed_one(trip: Daemon) -> None:
    id = trip.run("test fail:1")["id"]
    assert trip.ask(f"retry {id}")["state"] == "queued"
    job = trip.wait(id)
    assert (job["state"], job["message"], job["attempt"]) == ("done", "", 1)
    history = trip.ask(f"show {id}")["history"]
    assert [event["state"] for event in history] == [
        "queued", "running", "failed", "queued", "running", "done",
    ]  # fmt: skip
    assert history[3]["who"] == job["submitter"]
    assert trip.say(f"retry {id}").startswith("ERR wrong_state ")


def test_a_failed_job_is_tried_again_as_often_as_the_submit_says(trip: Daemon) -> None:
    with trip.talk() as talk:
        options = {"retries": 2}
        line = {"submit": "test", "params": {"fail": 2}, "options": options}
        id = json.loads(talk.say(json.dumps(line)))["id"]
    until(lambda: "retry 1 of 2" in trip.job(id)["reason"])
    assert trip.job(id)["state"] == "queued"
    assert "not to start before" in trip.why(id)
    trip.ask(f"cancel {id}")


def test_check_says_what_would_be_and_queues_nothing(trip: Daemon) -> None:
    before = total(trip)
    told = trip.ask("check careful fid:3 @priority:high")
    assert (told["accepted"], told["type"], told["queue"]) == (True, "careful", "careful")
    assert (told["params"], told["priority"], told["message"]) == ({"fid": "3"}, 10, "gladly")
    for line, reply in (
        ("careful no:1", "ERR refused not today"),
        ("nonsense", "ERR unknown_command "),
        ("status", "ERR bad_params "),
        ("typed fid:x", "ERR bad_params "),
    ):
        assert trip.say(f"check {line}").startswith(reply)
    assert total(trip) == before


def test_secrets_are_shown_nowhere(trip: Daemon) -> None:
    secret = f"hunter{time.time_ns()}"
    id = trip.run(f"login user:me password:{secret}")["id"]
    told = trip.ask(f"check login user:me password:{secret}")
    assert told["params"] == {"user": "me", "password": "***"}
    assert trip.job(id)["params"] == {"user": "me", "password": "***"}
    refusal = trip.say(f"login user:me password:{secret} pasword:{secret}")
    shown = [trip.say(line) for line in (f"show {id}", "jobs", f"why {id}", f"output {id}")]
    assert all(secret not in text for text in shown)
    assert refusal.startswith("ERR bad_params ") and secret not in refusal
    assert secret not in trip.log


def test_help_names_all_verbs_and_types(trip: Daemon) -> None:
    told = trip.ask("help")
    assert {"status", "show <id>", "wait <id> [timeout:30s] [whole:yes]"} <= set(told["verbs"])
    assert told["types"]["typed"]["params"] == ["fid", "level"]
    assert "notify" not in told["types"]


# Places ----------------------------------------------------------------------------------------


def test_no_more_jobs_run_at_once_than_the_type_allows(trip: Daemon) -> None:
    ids = [trip.submit(f"hold gate:{'a' if n < 2 else 'go'}") for n in range(5)]
    for id in ids[:2]:
        trip.until_noted(f"start {id}")
    assert trip.run("other")["state"] == "done", "other types go on meanwhile"
    assert len(trip.ledger) == 3
    trip.open_gate("a")
    trip.open_gate("go")
    for id in ids:
        trip.wait(id)
    running = most = 0
    for line in trip.ledger:
        running += line.startswith("start") - line.startswith("end")
        most = max(most, running)
    assert most == 2


def test_there_are_never_more_threads_than_places(trip: Daemon) -> None:
    with trip.talk() as talk:
        for _ in range(20):
            talk.send("echo\n" * 20)
            for _ in range(20):
                talk.read()
    (queue,) = [queue for queue in trip.ask("queues")["queues"] if queue["queue"] == "echo"]
    assert 1 <= queue["threads"] <= queue["concurrent"] == 2


def test_each_job_of_a_type_at_work_has_a_thread_of_its_own(trip: Daemon) -> None:
    holders = [trip.submit("hold"), trip.submit("hold")]
    for id in holders:
        trip.until_noted(f"start {id}")
    assert trip.run("echo")["result"]["thread"].startswith("T-echo-")
    threads = {line for line in os.listdir(f"/proc/{trip.ask('status')['pid']}/task")}
    assert len(threads) > 4
    trip.open_gate()
    for id in holders:
        trip.wait(id)


# The PHP client, and others that are no more than a line ---------------------------------------

PHP = """
function upq_run($cmd) {
    $fp = fsockopen("unix://%s", 0, $errno, $errstr, 5);
    if (!$fp) return "cannot connect: $errstr";
    stream_set_timeout($fp, 5);
    fwrite($fp, "$cmd\\n");
    $res = fgets($fp);
    fclose($fp);
    return $res;
}
echo upq_run($argv[1]);
"""


def test_the_client_of_the_first_upq_in_php_works_unchanged(lone: Daemon) -> None:
    if not shutil.which("php"):
        unavailable("no program php (Debian: apt-get install php-cli)")
    lone.configure("[job test]")
    lone.start()
    told = subprocess.run(
        ["php", "-r", PHP % f"{lone.folder}/s", "--", "test msg:php"],
        capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    assert re.fullmatch("ACK [0-9]+\n", told)
    assert lone.wait(int(told.split()[1]))["message"] == "php"


def test_nc_is_a_client(lone: Daemon) -> None:
    lone.configure("[job test]")
    lone.start()
    for flag in ("-N", "-q5"):
        told = subprocess.run(
            ["nc", flag, "-U", f"{lone.folder}/s"],
            input="test\n", capture_output=True, check=True, text=True, timeout=PATIENCE_S,
        ).stdout  # fmt: skip
        assert re.fullmatch("ACK [0-9]+\n", told)


# Restarts --------------------------------------------------------------------------------------


def test_after_kill_9_running_and_queued_jobs_are_done_and_finished_ones_are_left_alone(
    fresh: Daemon,
) -> None:
    fresh.configure("[job hold]\nconcurrent = 3\n[job other]")
    fresh.start()
    finished = fresh.run("other")["id"]
    ids = [fresh.submit("hold") for _ in range(8)]
    for id in ids[:3]:
        fresh.until_noted(f"start {id}")
    key = fresh.say("other @key:once").split()[1]
    fresh.wait(int(key))
    fresh.restart()
    assert "Starting 3 unfinished jobs found in DB." in fresh.log
    fresh.open_gate()
    for id in ids:
        assert fresh.wait(id)["state"] == "done"
    starts = [line for line in fresh.ledger if line.startswith("start")]
    assert sorted(starts) == sorted(
        [f"start {id}" for id in ids] + [f"start {id}" for id in ids[:3]]
    )
    assert fresh.ledger.count(f"other {finished}") == 1
    assert fresh.history(ids[0]) == ["queued", "running", "queued interrupted", "running", "done"]
    assert (fresh.job(ids[0])["attempt"], fresh.job(ids[0])["crashes"]) == (1, 1)
    assert fresh.say("other @key:once") == f"ACK {key} duplicate"
    assert fresh.ask("status")["jobs"]["done"] == 10


def test_a_job_that_kills_its_daemon_is_failed_the_third_time(fresh: Daemon) -> None:
    fresh.add_job("poison", "def run(self):\n    note('poison')\n    import os\n    os._exit(1)")
    fresh.configure("[job poison]\nretries = 5\n[job other]")
    fresh.start()
    id = fresh.submit("poison @in:200ms")  # at once, it could die before its ACK is out
    for _ in range(3):
        fresh.until_ended()
        with contextlib.suppress(NotStarted):  # it may die before it has said that it is ready
            fresh.start()
    job = fresh.wait(id)
    assert (job["state"], job["reason"], fresh.ledger.count("poison")) == ("failed", "crashed", 3)
    assert fresh.ask(f"why {id}")["why"].endswith("the daemon died each of the 3 times that it ran")
    assert fresh.run("other")["state"] == "done"


def test_after_kill_9_a_parent_meets_the_children_it_had(fresh: Daemon) -> None:
    fresh.add_job(
        "family",
        """
def run(self):
    note("family", self.jobid)
    done = self.submit("number", n=1)
    done.finished.wait()
    held = self.submit("hold")
    held.finished.wait()
    again = self.submit("number", n=1)
    again.finished.wait()
    return [done.jobid, held.jobid, again.jobid, done.result, again.state]
""",
    )
    fresh.configure("[job family]\n[job number]\n[job hold]")
    fresh.start()
    id = fresh.submit("family")
    until(lambda: any(line.startswith("start") for line in fresh.ledger))
    before = [child["id"] for child in fresh.ask(f"show {id}")["children"]]
    until(lambda: fresh.job(id)["reason"] == f"waits for {before[1]}")
    fresh.restart()
    fresh.open_gate()
    job = fresh.wait(id)
    assert job["state"] == "done"
    assert job["result"][:2] == before
    assert job["result"][3:] == [1, "done"]
    children = fresh.ask(f"show {id}")["children"]
    assert [child["id"] for child in children] == job["result"][:3]
    assert fresh.ledger.count(f"family {id}") == 2
    assert fresh.ledger.count("1") == 2, "two children of the same kind, each run once"
    assert job["crashes"] == 0, "it only waited"


def test_a_retried_parent_has_its_failed_child_run_again(fresh: Daemon) -> None:
    fresh.add_job(
        "trusting",
        """
def run(self):
    child = self.submit("test", fail=1)
    child.finished.wait()
    return child.state == "done" and child.jobid
""",
    )
    fresh.configure("[job trusting]\n[job test]")
    fresh.start()
    id = fresh.run("trusting")["id"]
    assert fresh.job(id)["state"] == "failed"
    (child,) = fresh.ask(f"show {id}")["children"]
    fresh.ask(f"retry {id}")
    job = fresh.wait(id)
    assert (job["state"], job["result"]) == ("done", child["id"])
    assert len(fresh.ask(f"show {id}")["children"]) == 1


def test_a_chain_goes_on_after_kill_9_where_it_was(fresh: Daemon) -> None:
    fresh.configure("[job first]\nsubjobs = hold third\n[job hold]\n[job third]")
    fresh.start()
    fresh.submit("first fid:1")
    until(lambda: any(line.startswith("start") for line in fresh.ledger))
    fresh.restart()
    fresh.open_gate()
    fresh.until_noted("third ['added', 'fid']")
    assert [line.split()[0] for line in fresh.ledger] == ["first", "start", "start", "end", "third"]


def test_what_check_found_is_there_after_a_restart_too(fresh: Daemon) -> None:
    fresh.configure("[job careful]")
    fresh.start()
    fresh.ask("pause careful")
    id = fresh.submit("careful fid:9")
    fresh.restart()
    fresh.ask("resume careful")
    assert fresh.wait(id)["result"] == "found 9"


def test_delays_and_keys_and_blocks_survive_a_restart(fresh: Daemon) -> None:
    fresh.configure("[job other]\n[job hold]")
    fresh.start()
    held = fresh.submit("hold")
    blocked = fresh.submit(f"other @after:{held}")
    delayed = fresh.submit("other @in:1s")
    fresh.until_noted(f"start {held}")
    fresh.restart()
    assert fresh.job(blocked)["state"] == "blocked"
    assert fresh.wait(delayed)["state"] == "done"
    assert fresh.job(blocked)["state"] == "blocked"
    fresh.open_gate()
    assert fresh.wait(blocked)["state"] == "done"


def test_a_paused_queue_stays_paused_after_a_restart(fresh: Daemon) -> None:
    fresh.configure("[job echo]\n[job other]")
    fresh.start()
    assert fresh.ask("pause echo") == {"queue": "echo", "paused": True}
    id = fresh.submit("echo")
    fresh.restart()
    assert fresh.run("other")["state"] == "done"
    job = fresh.job(id)
    assert (job["state"], job["reason"]) == ("blocked", "queue echo is paused")
    assert [job["id"] for job in fresh.ask("jobs state:blocked")["jobs"]] == [id]
    assert fresh.ask("jobs state:queued")["jobs"] == []
    assert fresh.ask("status")["jobs"]["blocked"] == 1
    (queue,) = [queue for queue in fresh.ask("queues")["queues"] if queue["queue"] == "echo"]
    assert (queue["paused"], queue["reason"]) == (True, "queue echo is paused")
    fresh.ask("resume echo")
    assert fresh.wait(id)["state"] == "done"


def test_a_drained_daemon_takes_submits_and_starts_nothing_until_resumed(fresh: Daemon) -> None:
    fresh.configure("[job other]")
    fresh.start()
    fresh.ask("drain")
    id = fresh.submit("other")
    assert fresh.ask("status")["state"] == "drained"
    assert "drained" in fresh.why(id)
    assert fresh.say(f"wait {id} timeout:200ms").startswith("ERR timeout ")
    fresh.ask("resume")
    assert fresh.wait(id)["state"] == "done"
    assert fresh.ask("status")["state"] == "running"


def test_jobs_of_a_type_that_is_gone_wait_and_stop_nobody(fresh: Daemon) -> None:
    config = "[job echo]\n[job first]\n[job other]\n"
    fresh.configure(config)
    fresh.start()
    fresh.ask("pause echo")
    fresh.ask("pause first")
    gone, disabled = fresh.submit("echo"), fresh.submit("first")
    fresh.ask("resume echo")
    fresh.wait(gone)
    fresh.ask("pause echo")
    gone = fresh.submit("echo")
    fresh.kill9()
    fresh.configure("[job first]\nenabled = no\n[job other]\n")
    fresh.start()
    assert fresh.run("other")["state"] == "done"
    assert (fresh.job(gone)["state"], fresh.job(gone)["reason"]) == (
        "blocked", "no such job type: echo",
    )  # fmt: skip
    assert fresh.job(disabled)["state"] == "blocked"
    assert "disabled" in fresh.why(disabled)
    assert fresh.say("echo").startswith("ERR unknown_command ")
    fresh.configure(config)
    fresh.ask("reload")
    fresh.ask("resume echo")
    fresh.ask("resume first")
    assert fresh.wait(gone)["state"] == fresh.wait(disabled)["state"] == "done"


# A database that hangs ---------------------------------------------------------------------------


@pytest.mark.timeout(90)
@pytest.mark.parametrize("kind", [MariaDB, Postgres])
def test_while_the_database_hangs_every_question_is_answered_in_time(
    short_tmp: Path, kind: type[PrivateServer]
) -> None:
    def timed(line: str) -> tuple[str, float]:
        began_s = time.monotonic()
        return daemon.say(line), time.monotonic() - began_s

    with (
        contextlib.contextmanager(private)(kind) as server,  # the other daemon of `trip` lives on
        server.database() as url,
        Daemon(short_tmp, "[job echo]", url, **JOBS) as daemon,
    ):
        daemon.forgiven = ["cannot be written to"]
        id = daemon.run("echo")["id"]
        lines = ["status", "queues", "jobs", "nodes", f"show {id}", f"why {id}", f"output {id}"]
        with ThreadPoolExecutor(len(lines)) as pool:
            assert not any("unavailable" in reply for reply, _ in pool.map(timed, lines))
            server.pause()
            try:
                for reply, took_s in pool.map(timed, lines):
                    assert reply.startswith("ERR unavailable the database cannot be read: ")
                    assert took_s < 15  # 5 to find a connection dead, and 5 to make another
            finally:
                server.resume()
            for reply, took_s in pool.map(timed, lines):
                assert not reply.startswith("ERR unavailable ")
                assert took_s < 5
        until(lambda: daemon.say("echo").startswith("ACK "))


# Plugins ---------------------------------------------------------------------------------------

BROKEN = {
    "from upq import UpqJob\n\nclass Echo(UpqJob)\n    pass\n": r"echo\.py:3: SyntaxError",
    "import os\nimport no_such_module\n": r"echo\.py:2: ModuleNotFoundError: .*no_such_module",
    "from upq import UpqJob\n\nclass Ecko(UpqJob):\n    pass\n": r"echo\.py: no class Echo\(",
    "class Echo:\n    pass\n": r"echo\.py: no class Echo\(UpqJob\)",
    "import sys\n\nsys.exit('bye')\n": r"echo\.py:3: SystemExit: bye",
    "x = 1 / 0\n": r"echo\.py:1: ZeroDivisionError",
}


@pytest.mark.parametrize("source", BROKEN, ids=lambda text: BROKEN[text].split(": ")[1][:16])
def test_a_broken_job_file_disables_its_own_type_and_its_jobs_wait_until_it_is_mended(
    lone: Daemon, source: str
) -> None:
    lone.forgiven = ["is broken"]
    lone.configure("[job echo]\n[job other]")
    lone.start()
    lone.ask("pause echo")
    id = lone.submit("echo")
    good = (lone.folder / "jobs/echo.py").read_text()
    (lone.folder / "jobs/echo.py").write_text(source)
    lone.restart()
    lone.ask("resume echo")
    assert re.fullmatch(f"ERR broken .*{BROKEN[source]}.*", lone.say("echo"))
    assert lone.run("other")["state"] == "done"
    assert lone.job(id)["state"] == "blocked"
    assert re.search(BROKEN[source], lone.why(id))
    assert re.search(BROKEN[source], lone.ask("status")["broken"]["echo"])
    (lone.folder / "jobs/echo.py").write_text(good)
    assert lone.say("echo").startswith("ERR broken "), "until somebody says reload"
    lone.ask("reload")
    assert lone.wait(id)["state"] == "done"
    assert lone.run("echo")["state"] == "done"


def test_a_job_file_that_breaks_keeps_its_jobs(lone: Daemon) -> None:
    lone.forgiven = ["is broken"]
    lone.configure("[job echo]\n[job hold]")
    lone.start()
    held = lone.submit("hold")
    lone.until_noted(f"start {held}")
    (lone.folder / "jobs/hold.py").write_text("1 / 0")
    lone.ask("reload")
    waits = lone.say("hold")
    assert waits.startswith("ERR broken ")
    lone.open_gate()
    assert lone.wait(held)["state"] == "done", "what runs is left alone"


def test_a_job_may_have_the_name_of_a_library_module(lone: Daemon) -> None:
    for name in ("json", "logging", "upq"):
        lone.add_job(name, f"def run(self):\n    return 'the job {name}'")
    lone.configure("[job json]\n[job logging]\n[job upq]")
    lone.start()
    for name in ("json", "logging", "upq"):
        assert lone.run(name)["result"] == f"the job {name}"


def test_a_file_without_a_section_is_not_a_job_type(lone: Daemon) -> None:
    (lone.folder / "jobs/echo.py").write_text("raise RuntimeError('loaded')")
    lone.configure("[job other]")
    lone.start()
    assert lone.say("echo").startswith("ERR unknown_command ")
    assert "loaded" not in lone.log


def test_a_new_job_type_needs_a_file_a_section_and_a_reload(lone: Daemon) -> None:
    lone.configure("[job other]")
    lone.start()
    lone.add_job("newcomer", "def run(self):\n    return self.getcfg('colour')")
    lone.configure("[job newcomer]\ncolour = red")
    lone.ask("reload")
    assert lone.run("newcomer")["result"] == "red"
    assert lone.say("other").startswith("ERR unknown_command ")
    lone.configure("[job newcomer]\ncolour = green\nconcurrent = 3")
    lone.ask("reload")
    assert lone.run("newcomer")["result"] == "green"
    (queue,) = [q for q in lone.ask("queues")["queues"] if q["queue"] == "newcomer"]
    assert queue["concurrent"] == 3


def test_a_job_of_the_first_upq_runs_with_no_more_than_the_edits_of_python_3(lone: Daemon) -> None:
    (lone.folder / "jobs/old.py").write_text(
        """from upq import UpqJob


class Old(UpqJob):
    def check(self):
        assert self.jobid == -1 or self.thread
        if 'file' not in self.jobdata:
            self.msg("Either file or fid has to be set!")
            return False
        self.enqueue_job()
        return True

    def run(self):
        self.logger.debug("at work on %s", self.jobdata['file'])
        self.msg("Filename: " + self.jobdata['file'] + " " + self.getcfg('suffix', '.sd7'))
        job = self.enqueue_newjob("number", {"n": 3})
        job.finished.wait()
        self.result = job.result + self.retries + len(self.jobcfg['suffix'])
        self.append_job("third", {"by": self.jobname})
        self.notify(True)
        return True
"""
    )
    lone.configure("[job old]\nsuffix = .x\n[job number]\n[job third]")
    lone.start()
    assert lone.say("old") == "ERR refused Either file or fid has to be set!"
    job = lone.run("old file:/a")
    assert (job["message"], job["result"]) == ("Filename: /a .x", 5)
    lone.until_noted("third ['by', 'file']")


@pytest.mark.parametrize(
    "body",
    [
        "def check(self):\n    raise SystemExit",
        "def check(self):\n    pass\n\ndef __init__(self, *words, **more):\n    raise RuntimeError",
        "def check(self):\n    pass\n\ndef __init__(self):\n    pass",
    ],
    ids=["check_exits", "init_raises", "init_takes_nothing"],
)
def test_a_job_class_that_fails_when_it_is_asked_is_an_answer_and_not_a_fault(
    lone: Daemon, body: str
) -> None:
    lone.forgiven = [r"check\(\) of rude failed", "rude"]
    lone.add_job("rude", body)
    lone.configure("[job rude]\n[job other]")
    lone.start()
    with lone.talk() as talk:
        talk.send("other\nrude\nother\nping\n")
        assert talk.read().startswith("ACK "), "its neighbours are not to blame"
        assert re.match("ERR (refused|broken) ", talk.read())
        assert talk.read().startswith("ACK ")
        assert talk.read().startswith("OK ")


@pytest.mark.parametrize(
    "body",
    [
        "def check(self):\n    if self.jobid > 0:\n        raise SystemExit",
        "def __init__(self, *words, **more):\n    super().__init__(*words, **more)\n"
        "    if self.jobid > 0:\n        raise RuntimeError('not today')",
        "def __init__(self, *words, **more):\n    super().__init__(*words, **more)\n"
        "    if self.jobid > 0:\n        raise SystemExit",
        "def captured(self):\n    raise RuntimeError('not today')",
    ],
    ids=["check_exits", "init_raises", "init_exits", "captured_raises"],
)
def test_a_job_class_that_fails_when_it_is_run_fails_the_job_and_keeps_its_place(
    lone: Daemon, body: str
) -> None:
    lone.forgiven = ["rude"]
    lone.add_job("rude", body)
    lone.configure("[job rude]")
    lone.start()
    for _ in range(2):
        assert lone.run("rude")["state"] == "failed"


# Threads and queues ----------------------------------------------------------------------------


def test_queues_are_there_from_the_start_and_list_queue_tells_them(lone: Daemon) -> None:
    shutil.copy(ROOT / "jobs/list_queue.py", lone.folder / "jobs")
    lone.configure("[job list_queue]\n[job hold]\n[job other]")
    lone.start()
    assert {queue["queue"] for queue in lone.ask("queues")["queues"]} >= {"hold", "other"}
    assert lone.say("list_queue other") == (
        "ACK 0 Queue 'other' contains 0 jobs: Queue is empty."
    )  # fmt: skip
    for n in range(2):
        lone.submit(f"hold n:{n}")
    until(lambda: len(lone.ledger) == 1)
    told = lone.say("list_queue hold")
    assert re.fullmatch(r"""ACK 0 Queue 'hold' contains 2 jobs: 'hold' : '{"n": "0"}', .*""", told)
    lone.configure("[job list_queue]\nformat = %(jobid)s:%(jobname)s:%(status)s\n"
                   "[job hold]\n[job other]")  # fmt: skip
    lone.ask("reload")
    told = lone.say("list_queue hold")
    assert re.fullmatch("ACK 0 .* jobs: [0-9]+:hold:running, [0-9]+:hold:queued", told)
    later, after = lone.submit("other @in:1h"), lone.submit("other @after:1")
    told = lone.say("list_queue other")
    assert told.endswith(f"contains 2 jobs: {later}:other:queued, {after}:other:blocked")


def test_idle_threads_retire_but_one(lone: Daemon) -> None:
    lone.configure("[job hold]\nconcurrent = 5")
    lone.start()

    def threads() -> int:
        return int(lone.ask("queues")["queues"][0]["threads"])

    assert threads() == 0
    ids = [lone.submit("hold") for _ in range(5)]
    until(lambda: len(lone.ledger) == 5)
    assert threads() == 5
    lone.open_gate()
    for id in ids:
        lone.wait(id)
    until(lambda: threads() == 1)


# Rights ----------------------------------------------------------------------------------------

RIGHTS = """
[job echo]
[job other]
submit = root
[job first]
submit = nobody
[job hold]
"""


@pytest.fixture
def guarded(lone: Daemon) -> Iterator[Daemon]:
    with acting_as("nobody"):
        pass
    yield lone


def start_for(daemon: Daemon, access: str) -> None:
    config = f"[access]\n{access}\n{RIGHTS}".replace("[access]\n\n", "")
    daemon.configure(config.replace("[job echo]", "[paths]\nsocket_chmod = 666\n[job echo]", 1))
    daemon.start()


def test_by_default_whoever_opens_the_socket_reads_submits_and_ends_what_is_its_own(
    guarded: Daemon,
) -> None:
    start_for(guarded, "")
    roots = guarded.submit("hold")
    with acting_as("nobody"):
        own = guarded.submit("hold")
        assert guarded.job(own)["submitter"] == "nobody"
        assert guarded.job(roots)["submitter"] == "root"
        assert guarded.ask(f"cancel {own}")["state"] == "cancelled"
        assert guarded.ask(f"retry {own}")["state"] == "queued"
        for line in (
            f"cancel {roots}",
            f"retry {roots}",
            "pause echo",
            "resume",
            "drain",
            "reload",
        ):
            assert guarded.say(line).startswith("ERR denied "), line
        assert guarded.say("other").startswith("ERR denied nobody may not submit other")
        assert guarded.say("first").startswith("ACK ")
        for line in ("status", "queues", "jobs", "nodes", "ping", f"why {roots}"):
            assert guarded.say(line).startswith("OK "), line
    assert guarded.say("first").startswith("ACK "), "root may all"
    assert guarded.ask(f"cancel {own}")["state"] == "cancelled"
    guarded.ask(f"cancel {roots}")


def test_roles_are_given_by_user_and_group(guarded: Daemon) -> None:
    start_for(guarded, "read = daemon\nsubmit = @daemon\nadmin = www-data")
    roots = guarded.submit("echo")
    with acting_as("nobody"):
        for line in ("status", "queues", "jobs", f"show {roots}", f"wait {roots}", "echo"):
            assert guarded.say(line).startswith("ERR denied "), line
        assert guarded.say("check echo").startswith("ERR denied ")
        own = guarded.submit("first")  # the type's own list wins
        assert guarded.wait(own)["state"] == "done", "and one's own job needs no right"
        assert guarded.say("ping").startswith("OK ")
    with acting_as("daemon"):
        assert guarded.say("jobs").startswith("OK ")
        assert guarded.say("echo").startswith("ACK ")
        assert guarded.say("pause echo").startswith("ERR denied ")
    with acting_as("www-data"):
        assert guarded.say("pause echo").startswith("OK ")
        assert guarded.say("other").startswith("ACK "), "an admin may all"


def test_the_socket_lets_in_only_whom_its_mode_lets_in(guarded: Daemon) -> None:
    guarded.configure("[paths]\nsocket_chmod = 600\n[job echo]")
    guarded.start()
    with acting_as("nobody"), pytest.raises(PermissionError):
        guarded.say("ping")
    assert guarded.say("ping").startswith("OK ")


def test_what_these_tests_saw_was_durable(trip: Daemon) -> None:
    assert trip.ask("status")["durable"] is True
