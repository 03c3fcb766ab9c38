"""Chains through a real daemon: branches and joins, kills in between, failures, delays."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chain_bench
from tests.daemons import Daemon, until
from upq.when import instant

JOBS = {
    "start": """
        def run(self):
            note("start", self.jobid)
            return {"seed": self.jobid}
        """,
    "left": """
        def run(self):
            note("left", self.jobid)
            gate("go_left")
            return {"made": self.jobid}
        """,
    "right": """
        def run(self):
            note("right", self.jobid)
            if "more" in self.jobdata:
                self.append_job("extra", {"added": 1})
            return self.jobid
        """,
    "extra": """
        def run(self):
            note("extra", self.jobid)
            return "extra"
        """,
    "join": """
        def run(self):
            note("join", self.jobid)
            return self.jobdata
        """,
    "last": """
        def run(self):
            note("last", self.jobid)
            return self.jobdata
        """,
    "report": """
        def run(self):
            return self.jobdata
        """,
    "dies": """
        def run(self):
            import os
            self.output.write("last words")
            self.output.flush()
            os._exit(7)
        """,
    "slow": """
        def run(self):
            self.output.write("begun")
            gate("never", lambda: self.cancelled)
        """,
    "late": """
        def run(self):
            note("late", self.jobid)
        """,
}  # fmt: skip
JOBS = {name: "\n".join(line[8:] for line in body.split("\n")) for name, body in JOBS.items()}
FORK = """
[job start]
subjobs = (left right) join last
[job left]
[job right]
[job extra]
[job join]
[job last]
"""


@pytest.fixture
def daemon(short_tmp: Path, url: str) -> Iterator[Daemon]:
    """A daemon on each kind of database, not started."""
    one = Daemon(short_tmp, FORK, url, **JOBS)
    yield one
    one.kill9()
    one.has_behaved()


def of_type(daemon: Daemon, type: str) -> list[dict[str, Any]]:
    """All jobs of a type, the oldest first."""
    return list(reversed(daemon.ask(f"jobs type:{type} limit:1000")["jobs"]))


def only(daemon: Daemon, type: str) -> dict[str, Any]:
    """The one job of a type, once it is there and has ended."""
    (job,) = until(lambda: of_type(daemon, type))
    return daemon.wait(job["id"])


def test_a_fork_goes_on_where_it_was_after_kill_9(daemon: Daemon) -> None:
    daemon.start()
    id = daemon.submit("start x:1")
    until(lambda: any(line.startswith("left") for line in daemon.ledger))
    right = only(daemon, "right")
    (join,) = of_type(daemon, "join")
    left = of_type(daemon, "left")[0]["id"]
    assert (join["state"], join["parent"], join["root"]) == ("blocked", id, id)
    assert f"it needs {left} (running)" in daemon.why(join["id"])
    daemon.restart()
    assert daemon.job(join["id"])["jobdata"]["right"] == right["id"]
    daemon.open_gate("go_left")
    last = only(daemon, "last")
    result = {"x": "1", "seed": id, "left": {"made": left}, "right": right["id"]}
    assert last["result"] == result | {"x": "1"}
    assert Counter(line.split()[0] for line in daemon.ledger) == Counter(
        start=1, left=2, right=1, join=1, last=1
    )
    assert daemon.history(join["id"]) == [
        f"blocked waits for {left}, {right['id']}", "queued", "running", "done",
    ]  # fmt: skip


def test_kills_at_any_instant_neither_lose_nor_double_a_branch(daemon: Daemon) -> None:
    n, rng = 40, random.Random(4)
    daemon.open_gate("go_left")
    daemon.start()
    for _ in range(4):
        enough = len(daemon.ledger) + rng.randrange(8, 50)
        for _ in range(n // 4):
            daemon.submit("start more:1")
        until(lambda enough=enough: len(daemon.ledger) >= enough)
        daemon.restart()

    def are_done() -> bool:
        # One that three kills have met is failed as their cause.
        for one in daemon.ask("jobs state:failed")["jobs"]:
            assert one["reason"] == "crashed", one
            daemon.ask(f"retry {one['id']}")
        return [one["state"] for one in of_type(daemon, "last")] == ["done"] * n

    until(are_done, 60)
    for type in "start", "left", "right", "extra", "join":
        jobs = of_type(daemon, type)
        assert Counter(one["state"] for one in jobs) == {"done": n}, type
    roots = {one["root"] for one in of_type(daemon, "start")}
    by_root = {one["root"]: one["id"] for one in of_type(daemon, "left")}
    assert by_root.keys() == roots
    for one in of_type(daemon, "last"):
        left = {"made": by_root[one["root"]]}
        assert {"seed": one["root"], "left": left, "right": "extra"}.items() <= one[
            "result"
        ].items()


@pytest.mark.alone
def test_a_chain_of_three_costs_little_more_than_three_jobs() -> None:
    """The goal is a fifth, and `python -m tests.chain_bench` prints it; machines are not quiet."""
    with chain_bench.started("sqlite:///{folder}/upq.db") as daemon:
        assert chain_bench.compare(daemon, "chain", 1500, 5) <= 1.4


def test_what_a_child_process_appends_and_returns_goes_the_same_way(daemon: Daemon) -> None:
    processes = "".join(f"[job {name}]\nexecutor = process\n" for name in ("left", "right", "join"))
    daemon.configure(
        f"[job start]\nsubjobs = (left right) join last\nexecutor = process\n{processes}"
        "[job extra]\n[job last]"
    )
    daemon.open_gate("go_left")
    daemon.start()
    id = daemon.submit("start more:1")
    result = only(daemon, "last")["result"]
    left = of_type(daemon, "left")[0]["id"]
    assert result == {"more": "1", "seed": id, "left": {"made": left}, "right": "extra"}


def test_on_fail_hears_of_a_timeout_and_of_a_process_that_dies(daemon: Daemon) -> None:
    daemon.configure(
        "[job slow]\ntimeout = 1s\non_fail = report\n"
        "[job dies]\nexecutor = process\non_fail = report\n[job report]"
    )
    daemon.start()
    ids = daemon.submit("slow x:1"), daemon.submit("dies x:2")
    until(lambda: len(of_type(daemon, "report")) == 2)
    told = {
        daemon.wait(one["id"])["result"]["id"]: one["params"] for one in of_type(daemon, "report")
    }
    slow, dies = (told[id] for id in ids)
    assert (slow["type"], slow["state"], slow["reason"]) == ("slow", "failed", "timeout")
    assert (slow["message"], slow["output"]) == ("timed out after 1 s", "begun")
    assert (dies["type"], dies["reason"], dies["params"]) == ("dies", "crashed", {"x": "2"})
    assert "its process exited with 7" in dies["message"]


def test_on_fail_hears_of_a_job_that_kills_its_daemon(daemon: Daemon) -> None:
    daemon.configure("[job left]\non_fail = report\n[job report]")
    daemon.start()
    id = daemon.submit("left")
    for n in range(1, 4):
        until(lambda n=n: daemon.ledger == [f"left {id}"] * n)
        daemon.restart()
    told = only(daemon, "report")["result"]
    assert (told["id"], told["state"], told["reason"]) == (id, "failed", "crashed")


def test_secrets_are_masked_in_all_that_is_handed_on(daemon: Daemon) -> None:
    daemon.add_job("left", "def run(self):\n    return {'token': 'hunter2', 'said': 'is hunter2'}")
    daemon.add_job("right", "def run(self):\n    raise ValueError(self.jobdata['token'])")
    daemon.configure(
        FORK.replace("[job right]", "[job right]\non_fail = report")
        + "[job report]\n[job keeper]\nparams = token\nsecret = token\ncommand = true"
    )
    daemon.start()
    daemon.submit("start token:hunter2")
    report = only(daemon, "report")
    join = until(lambda: of_type(daemon, "join"))[0]
    until(lambda: "left" in daemon.job(join["id"])["jobdata"])
    shown = daemon.job(join["id"])
    assert shown["jobdata"]["left"] == {"token": "***", "said": "is ***"}
    assert report["params"]["params"]["token"] == report["result"]["params"]["token"] == "***"
    for id in join["id"], report["id"]:
        assert "hunter2" not in daemon.say(f"show {id}")
    assert "hunter2" not in daemon.log


def test_a_join_of_a_type_that_is_gone_waits_for_it(daemon: Daemon) -> None:
    daemon.configure(FORK.replace("[job join]", "[job join]\nenabled = no"))
    daemon.open_gate("go_left")
    daemon.start()
    daemon.submit("start")
    (join,) = until(lambda: of_type(daemon, "join"))
    until(lambda: daemon.job(join["id"])["reason"].startswith("join is disabled"))
    daemon.configure(FORK)
    daemon.ask("reload")
    assert daemon.wait(join["id"])["state"] == "done"
    assert only(daemon, "last")["result"]["right"]


def test_a_delay_holds_no_place_and_a_submit_may_say_otherwise(daemon: Daemon) -> None:
    daemon.configure(
        "[job start]\non_done = late\n[job late]\ndelay = {up}\nparams = up seed:int?\n"
        "[job parent]\n"
    )
    daemon.add_job(
        "parent",
        """
def run(self):
    child = self.submit("late", up="300ms")
    child.finished.wait()
    return child.state
""",
    )
    daemon.start()
    assert daemon.say("late") == "ERR bad_params up: is missing"
    assert daemon.say("late up:soon").startswith("ERR bad_params delay = {up}: 'soon' is not a")
    long = daemon.job(daemon.submit("late up:1h"))
    assert long["state"] == "queued"
    wait_us = instant(long["run_at"]) - instant(long["created_at"])
    assert 3_599_000_000 < wait_us <= 3_600_000_000
    assert daemon.run("late up:1h @in:0s")["state"] == "done", "one place, and it is free"
    assert daemon.ask("check late up:1h")["run_at"] is not None
    first = daemon.run("start up:200ms")
    (job,) = daemon.ask(f"show {first['id']}")["children"]
    job = daemon.wait(job["id"])
    assert instant(job["started_at"]) - instant(job["created_at"]) >= 200_000
    assert daemon.run("parent")["result"] == "done"
    blocked = daemon.submit(f"late up:200ms @after:{long['id']}")
    assert daemon.job(blocked)["run_at"] is None
    daemon.ask(f"cancel {long['id']}")
    daemon.ask(f"retry {long['id']}")
    done = daemon.wait(long["id"])
    late = daemon.wait(blocked)
    assert instant(late["started_at"]) - instant(done["ended_at"]) >= 200_000
