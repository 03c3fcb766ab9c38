"""Batches through a real daemon: requests, rights, what is shown, both clients."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import batches
from tests.conftest import GIVEN, note_database
from tests.daemons import ROOT, Daemon, acting_as, until
from tests.servers import Server, short_folder
from upq.client import AsyncClient, Client, job
from upq.errors import UnknownCommand

WORK = """
def run(self):
    if self.jobdata.get("bad"):
        return False
    if self.jobdata.get("once"):
        return (FOLDER / "mended").exists()
    if gate_ := self.jobdata.get("gate"):
        gate(gate_)
    note("work", self.jobdata.get("n", ""))
"""
REPORT = """
def check(self):
    return "no" not in self.jobdata

def run(self):
    note("report", self.jobid)
    return self.jobdata["batch"]
"""
CONFIG = """
[paths]
socket_chmod = 0666
[job work]
concurrent = 4
[job report]
[job strict]
params = day:int
[job closed]
submit = root
[job answers]
"""
JOBS = {
    "work": WORK,
    "report": REPORT,
    "strict": "def run(self):\n    return self.jobdata['day'] + self.jobdata['batch']['done']",
    "closed": WORK,
    "answers": "queued = False\n\ndef check(self):\n    self.msg('yes')",
}
NONE = {"failed": 0, "cancelled": 0, "expired": 0, "ids": []}


@pytest.fixture(scope="module", params=["sqlite", "mariadb", "postgres"])
def shared(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """One daemon for each database."""
    folder = short_folder()
    if request.param == "sqlite":
        with Daemon(folder, CONFIG, **JOBS) as daemon:
            yield daemon
        shutil.rmtree(folder)
        return
    given = os.environ.get(GIVEN[request.param])
    server: Server = Server(given) if given else request.getfixturevalue(request.param)
    with server.database() as url, Daemon(folder, CONFIG, url, **JOBS) as daemon:
        yield daemon
    shutil.rmtree(folder)


@pytest.fixture
def daemon(shared: Daemon, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    note_database(request, shared.ask("status")["database"])
    yield shared
    shared.has_behaved()


def many(daemon: Daemon, **request: Any) -> dict[str, Any]:
    return dict(json.loads(daemon.say(json.dumps(request))))


def work(n: int, **params: Any) -> list[dict[str, Any]]:
    return [{"submit": "work", "params": {"n": i, **params}} for i in range(n)]


def test_a_batch_is_queued_worked_and_followed(daemon: Daemon) -> None:
    reply = many(daemon, submit_many=work(20), then={"submit": "report", "params": {"of": 1}})
    assert reply.keys() == {"ok", "batch", "duplicate", "open", "members", "jobs"}
    assert (reply["duplicate"], reply["open"], reply["members"]) == (False, False, 20)
    ended = daemon.wait(reply["batch"])
    assert ended["result"] == {"members": 20, "done": 20, **NONE}
    assert ended["params"] == {"of": 1}
    for member in reply["jobs"]:
        assert daemon.job(member["id"])["parent"] == reply["batch"]
    assert daemon.history(reply["batch"]) == [
        "blocked waits for its members",
        "queued",
        "running",
        "done",
    ]


def test_members_and_follow_up_may_be_lines_of_text(daemon: Daemon) -> None:
    lines = ['work n:1 msg:"two words" @priority:high', {"submit": "work"}, 'work {"n": 5}']
    reply = many(daemon, submit_many=lines, then="strict day:7")
    assert daemon.wait(reply["batch"])["result"] == 10
    first = daemon.job(reply["jobs"][0]["id"])
    assert (first["params"], first["priority"]) == ({"n": "1", "msg": "two words"}, 10)


def test_a_batch_is_filled_by_several_requests_and_closed(daemon: Daemon) -> None:
    id = many(daemon, then="report", open=True)["batch"]
    for n in range(3):
        reply = many(daemon, submit_many=work(5), batch=id)
        assert (reply["batch"], reply["members"], reply["open"]) == (id, 5 * (n + 1), True)
    for member in reply["jobs"]:
        daemon.wait(member["id"])
    assert daemon.job(id)["reason"] == "batch is open"
    assert many(daemon, batch=id, close=True)["open"] is False
    assert daemon.wait(id)["result"]["done"] == 15


def test_why_and_show_tell_how_a_batch_is(daemon: Daemon) -> None:
    jobs = work(30, gate="shown")
    id = many(daemon, submit_many=jobs, then="report", open=True)["batch"]
    why = daemon.why(id)
    assert "batch is open; it needs " in why
    assert " and 22 more; " in why
    assert daemon.ask(f"show {id}")["batch"] == {
        "open": True, "when": "done", "members": 30, "left": 30,
    }  # fmt: skip
    listed = [
        one for one in daemon.ask("jobs state:blocked type:report")["jobs"] if one["id"] == id
    ]
    assert [one["reason"] for one in listed] == ["batch is open"]
    many(daemon, batch=id, close=True)
    assert "waits for its members" in daemon.why(id)
    daemon.open_gate("shown")
    daemon.wait(id)
    assert daemon.ask(f"show {id}")["batch"]["left"] == 0
    assert "batch" not in daemon.ask(f"show {id + 1}")


def test_a_member_that_failed_is_named_and_its_retry_lets_the_batch_go_on(daemon: Daemon) -> None:
    reply = many(daemon, submit_many=[*work(2), "work bad:1"], then="report")
    id, bad = reply["batch"], reply["jobs"][2]["id"]
    daemon.wait(bad)
    until(lambda: f"`retry {bad}` lets it go on" in daemon.why(id))
    until(lambda: f"it needs {bad} (failed); " in daemon.why(id))
    daemon.ask(f"cancel {id}")
    assert daemon.job(id)["state"] == "cancelled"


@pytest.mark.parametrize("when", ["done", "ended"])
def test_a_batch_is_cancelled_and_retried_as_a_whole(daemon: Daemon, when: str) -> None:
    daemon.ask("pause work")
    reply = many(daemon, submit_many=work(1100), then="report", when=when)
    id = reply["batch"]
    assert daemon.ask(f"cancel {id}")["below"] == 1100
    assert {daemon.job(one["id"])["state"] for one in reply["jobs"][:5]} == {"cancelled"}
    assert daemon.ask(f"retry {id}") == {"id": id, "state": "blocked", "below": 1100}
    daemon.ask("resume work")
    assert daemon.wait(id)["result"] == {"members": 1100, "done": 1100, **NONE}


def test_a_batch_that_has_expired_takes_its_members_with_it_and_brings_them_back(
    daemon: Daemon,
) -> None:
    daemon.ask("pause work")
    reply = many(daemon, submit_many=work(1100), then="report @expires:1s")
    id = reply["batch"]
    assert daemon.wait(id)["state"] == "expired"
    told = daemon.ask(f"wait {id} whole:yes timeout:20s")["whole"]
    assert (told["state"], told["counts"]) == ("expired", {"expired": 1, "cancelled": 1100})
    assert daemon.ask(f"retry {id}") == {"id": id, "state": "blocked", "below": 1100}
    daemon.ask("resume work")
    assert daemon.wait(id)["result"] == {"members": 1100, "done": 1100, **NONE}


def test_retry_of_a_batch_retries_the_members_that_hold_it(daemon: Daemon) -> None:
    reply = many(daemon, submit_many=[*work(2), "work once:1"], then="report")
    daemon.wait(reply["jobs"][2]["id"])
    until(lambda: "lets it go on" in daemon.why(reply["batch"]))
    daemon.open_gate("mended")
    assert daemon.ask(f"retry {reply['batch']}")["below"] == 1
    assert daemon.wait(reply["batch"])["result"]["done"] == 3


def test_when_ended_the_follow_up_is_told_of_what_failed(daemon: Daemon) -> None:
    jobs = [*work(2), "work bad:1", "work bad:1"]
    reply = many(daemon, submit_many=jobs, then="report", when="ended")
    ended = daemon.wait(reply["batch"])
    ids = [one["id"] for one in reply["jobs"][2:]]
    counts = {"members": 4, "done": 2, "failed": 2, "cancelled": 0, "expired": 0}
    assert ended["result"] == {**counts, "ids": ids}


@pytest.mark.parametrize("when", ["done", "ended"])
def test_an_open_batch_goes_on_whatever_has_failed(daemon: Daemon, when: str) -> None:
    reply = many(daemon, submit_many=["work bad:1"], then="report", when=when, open=True)
    id = reply["batch"]
    daemon.wait(reply["jobs"][0]["id"])
    assert daemon.ask(f"show {id}")["whole"]["state"] == "running"
    assert daemon.say(f"wait {id} whole:yes timeout:100ms").startswith("ERR timeout")
    many(daemon, batch=id, close=True)
    whole = daemon.ask(f"wait {id} whole:yes timeout:20s")["whole"]
    assert whole["state"] == {"done": "failed", "ended": "done"}[when]


def test_a_batch_that_is_never_closed_is_found_and_cancelled(daemon: Daemon) -> None:
    id = many(daemon, submit_many=work(1), then="report", open=True)["batch"]
    blocked = daemon.ask("jobs state:blocked limit:1000")["jobs"]
    assert id in [one["id"] for one in blocked if one["reason"] == "batch is open"]
    daemon.ask(f"cancel {id}")
    refused = many(daemon, submit_many=work(1), batch=id)
    assert (refused["error"], refused["message"]) == ("wrong_state", f"batch {id} is cancelled")


def test_what_is_refused_says_which_job_and_queues_nothing(daemon: Daemon) -> None:
    before = sum(daemon.ask("status")["jobs"].values())
    ok = {"submit_many": work(2), "then": "report"}
    for request, code, text in (
        ({**ok, "submit_many": ["work", "nonsense"]}, "unknown_command", "job 2 of 2: no job type"),
        ({**ok, "then": "nonsense"}, "unknown_command", "then: no job type"),
        ({**ok, "then": "report no:1"}, "refused", "then: "),
        ({**ok, "then": "strict"}, "bad_params", "then: "),
        ({**ok, "then": "answers"}, "bad_params", "then: answers is answered"),
        ({**ok, "then": "report batch:1"}, "bad_params", "then: batch is what upq tells"),
        ({**ok, "then": "report @after:1"}, "bad_params", "then: it comes after its members"),
        ({**ok, "then": "ping"}, "bad_params", "a line that submits a job belongs here"),
        ({**ok, "then": ""}, "bad_params", "a line that submits a job belongs here"),
        ({**ok, "when": "maybe"}, "bad_params", "when: done or ended"),
        ({**ok, "open": 1}, "bad_params", "open: yes or no"),
        ({**ok, "batch": 1}, "bad_params", "a new batch takes submit_many, then, when, open; not"),
        ({"submit_many": [], "batch": 1}, "bad_params", "it is empty"),
        ({"submit_many": []}, "bad_params", "it is empty"),
        ({"submit_many": ["work"], "when": "done"}, "bad_params", "without then or batch takes"),
        ({"batch": 987654321, "close": True}, "not_found", "no job 987654321"),
        ({"submit_many": ["{}"]}, "bad_params", "a line that submits"),
        ({**ok, "submit_many": ["work n:\x01"]}, "bad_text", "control character"),
        ({**ok, "submit_many": ["work " + "x" * 70_000]}, "too_long", "65536"),
    ):  # fmt: skip
        reply = many(daemon, **request)
        assert (reply.get("error"), text in reply.get("message", "")) == (code, True), request
    assert sum(daemon.ask("status")["jobs"].values()) == before


def test_only_the_submitter_and_admins_add_and_close(daemon: Daemon) -> None:
    with acting_as("nobody"):
        theirs = many(daemon, submit_many=work(1), then="report", open=True)
        assert theirs["ok"]
        assert many(daemon, submit_many=["closed"], batch=theirs["batch"])["error"] == "denied"
    with acting_as("daemon"):
        for request in ({"submit_many": work(1)}, {"close": True}):
            refused = many(daemon, batch=theirs["batch"], **request)
            assert refused["error"] == "denied"
            assert "may not add to a job of nobody" in refused["message"]
    assert many(daemon, batch=theirs["batch"], close=True)["ok"], "root is admin"
    assert daemon.wait(theirs["batch"])["state"] == "done"


def test_a_request_with_a_key_is_answered_the_same_again(daemon: Daemon) -> None:
    request = {
        "submit_many": [*work(3), {"submit": "work", "options": {"key": "own"}}],
        "then": {"submit": "report", "options": {"key": "once"}},
    }
    first = many(daemon, **request)
    again = many(daemon, **request)
    assert again == {
        **first, "duplicate": True,
        "jobs": [{**one, "duplicate": True} for one in first["jobs"]],
    }  # fmt: skip
    request["submit_many"][0]["params"]["n"] = 99
    assert many(daemon, **request)["error"] == "key_conflict"
    assert daemon.wait(first["batch"])["result"]["members"] == 4


def test_an_addition_with_a_key_is_made_once(daemon: Daemon) -> None:
    id = many(daemon, then="report", open=True)["batch"]
    part = {"batch": id, "submit_many": work(4), "key": "part 1"}
    first = many(daemon, **part)
    again = many(daemon, **part)
    assert [one["id"] for one in again["jobs"]] == [one["id"] for one in first["jobs"]]
    assert again["members"] == 4
    assert many(daemon, **{**part, "key": "part 2"}, close=True)["members"] == 8
    assert many(daemon, **{**part, "key": "part 2"}, close=True)["members"] == 8
    assert daemon.wait(id)["result"]["done"] == 8


def test_batches_survive_a_kill(daemon: Daemon) -> None:
    daemon.ask("pause work")
    id = many(daemon, submit_many=work(3), then="report", open=True)["batch"]
    daemon.restart()
    many(daemon, submit_many=work(3), batch=id)
    daemon.restart()
    many(daemon, batch=id, close=True)
    daemon.restart()
    daemon.ask("resume work")
    assert daemon.wait(id)["result"] == {"members": 6, "done": 6, **NONE}
    assert daemon.ledger.count(f"report {id}") == 1


def test_batches_are_whole_after_kills_at_random(url: str, short_tmp: Path) -> None:
    """The short form of `python -m tests.batches --kills 100`."""
    with batches.run(short_tmp, url) as daemon:
        found = batches.kill_at_random(daemon, 6, random.Random(4))
    assert found.batches > 0
    assert (found.not_once, found.not_whole) == ([], [])


@pytest.mark.alone
def test_ten_thousand_members_and_their_follow_up_take_five_seconds(
    url: str, short_tmp: Path
) -> None:
    with batches.run(short_tmp, url) as daemon:
        cost = batches.measure(daemon, 10_000)
    print(cost._replace(acks=sorted(cost.acks)[-3:], starts=sorted(cost.starts)[-3:]))
    assert (cost.done, cost.reports) == (10_000, 1)
    assert cost.followed_s <= batches.GOAL_S
    assert cost.grown_mib <= 30


# Clients


def test_the_client_submits_a_batch(daemon: Daemon) -> None:
    with Client(f"{daemon.folder}/s") as upq:
        acks = upq.submit_many([job("work", {"n": n}) for n in range(5)], then=job("report"))
        assert acks.batch
        assert (len(acks), acks.batch.members) == (5, 5)
        assert upq.wait(acks.batch.id, 20)["result"]["done"] == 5
        assert upq.submit_many([job("work")]).batch is None


def test_the_client_fills_a_batch_of_any_size(daemon: Daemon) -> None:
    with Client(f"{daemon.folder}/s") as upq:
        with upq.batch(job("report", {"of": "a day"}), when="ended") as batch:
            for n in range(2500):
                batch.add("work", {"n": n})
            batch.put("work bad:1")
        assert (batch.id > 0, batch.members) == (True, 2501)
        result = upq.wait(batch.id, 60)["result"]
        assert (result["done"], result["failed"]) == (2500, 1)


def test_an_exception_cancels_the_batch_that_is_being_filled(daemon: Daemon) -> None:
    with Client(f"{daemon.folder}/s") as upq:
        with pytest.raises(ZeroDivisionError), upq.batch(job("report")) as batch:
            batch.add("work")
            batch.send()
            raise ZeroDivisionError
        assert upq.show(batch.id)["job"]["state"] == "cancelled"
        with pytest.raises(UnknownCommand, match="job 2 of 2"), upq.batch("report") as batch:
            batch.add("work")
            batch.add("nonsense")
        assert batch.id == 0


def test_a_program_that_died_fills_its_batch_again_from_the_start(daemon: Daemon) -> None:
    then = job("report", key="a day's report")

    def fill(stop: bool) -> int:
        with Client(f"{daemon.folder}/s") as upq:
            batch = upq.batch(then)
            for n in range(30):
                batch.add("work", {"n": n})
                if n % 10 == 9:
                    batch.send()
            if not stop:
                batch.close()
            return batch.id

    id = fill(stop=True)
    assert fill(stop=False) == id
    assert daemon.wait(id)["result"]["done"] == 30
    assert fill(stop=False) == id
    assert daemon.ledger.count(f"report {id}") == 1


def test_the_asynchronous_client_submits_a_batch(daemon: Daemon) -> None:
    async def talk() -> None:
        async with AsyncClient(f"{daemon.folder}/s") as upq:
            acks = await upq.submit_many(["work n:1", job("work")], then="report")
            assert acks.batch
            assert (await upq.wait(acks.batch.id, 20))["result"]["done"] == 2

    asyncio.run(talk())


def cli(daemon: Daemon, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "upq-cli.py"), "-s", f"{daemon.folder}/s", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_the_command_line_makes_a_batch_of_its_lines(daemon: Daemon) -> None:
    lines = "".join(f"work n:{n}\n" for n in range(2100)) + '{"submit": "work"}\n'
    done = cli(daemon, "--then", "report of:today", "--wait", "-", stdin=lines)
    id = int(done.stdout.split()[1])
    assert done.stdout.splitlines()[:2] == [f"ACK {id} follows 2101 jobs", f"job {id} done"]
    assert json.loads(done.stdout.splitlines()[2])["done"] == 2101
    assert (done.returncode, done.stderr) == (0, "")
    failed = cli(
        daemon, "--then", "report", "--when", "ended", "--wait", "-q", "-", stdin="work bad:1"
    )
    assert (failed.returncode, failed.stdout.strip().isdecimal()) == (0, True)


def test_the_command_line_cancels_a_batch_with_a_line_that_is_refused(daemon: Daemon) -> None:
    lines = "work\n" * 250 + "nonsense\n"
    done = cli(daemon, "--then", "report", "-", stdin=lines)
    assert done.returncode == 1
    assert (
        "ERR unknown_command job 1 of 1: no job type nonsense (did you mean nodes?) (after 250"
        in done.stderr
    )
    id = int(done.stderr.split("batch ")[1].split()[0])
    assert daemon.job(id)["state"] == "cancelled"
    assert cli(daemon, "--then", "report", "work").returncode == 2


def test_the_command_line_sends_batches_as_json(daemon: Daemon) -> None:
    request = json.dumps({"submit_many": ["work", "work"], "then": "report"})
    done = cli(daemon, "--wait", "--json", request)
    assert json.loads(done.stdout)["job"]["result"]["done"] == 2
    id = int(cli(daemon, "-q", request).stdout)
    assert daemon.wait(id)["type"] == "report"
