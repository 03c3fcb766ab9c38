"""Unique, serial, expires, max_queue and when_busy as a client of a real daemon meets them."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import stores
from tests.daemons import PATIENCE_S, Daemon, until
from upq.config import load
from upq.errors import ConfigError

database, url = stores.database, stores.url

HOLD = """
def run(self):
    note("start", self.jobid)
    gate(self.jobdata.get("gate", "go"), lambda: self.cancelled)
    note("end", self.jobid)
"""
#: Notes when it has its turn; some fail at the first attempt.
VM = """
def run(self):
    key, n = self.jobdata["vm"], int(self.jobdata["n"])
    note("+", key, self.jobid)
    time.sleep(0.001)
    note("-", key, self.jobid)
    return n % 17 != 5 or self.retries > 0
"""
PARENT = """
def run(self):
    job = self.enqueue_newjob("solo", {"fid": self.jobdata["fid"]})
    job.finished.wait()
    self.result = job.jobid
"""
CONFIG = """
[job solo]
params = fid:int gate=go
unique = fid
concurrent = 4
[job parent]
concurrent = 4
[job selfish]
[job turn]
serial = vm:{id}
concurrent = 4
[job other]
serial = vm:{id}
[job soon]
expires = 1h
notify_fail = syslog
[job full]
max_queue = 2
[job alone]
when_busy = reject
[job latest]
when_busy = replace
"""
SELFISH = """
def run(self):
    self.enqueue_newjob("turn", {"id": 1}).finished.wait()
    return True
"""


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    jobs = dict.fromkeys(("solo", "turn", "other", "soon", "full", "alone", "latest"), HOLD)
    with Daemon(short_tmp, CONFIG, parent=PARENT, selfish=SELFISH, **jobs) as running:
        yield running


def test_a_repeated_submit_is_a_duplicate_in_text_and_json(daemon: Daemon) -> None:
    first = daemon.submit("solo fid:5")
    assert daemon.say("solo fid:05 gate:other") == f"ACK {first} duplicate"
    answer = json.loads(daemon.say('{"submit": "solo", "params": {"fid": 5}}'))
    assert answer == {"ok": True, "id": first, "message": "duplicate", "duplicate": True}
    many = {"submit_many": [{"submit": "solo", "params": {"fid": n}} for n in (5, 6, 6)]}
    jobs = json.loads(daemon.say(json.dumps(many)))["jobs"]
    assert [one["duplicate"] for one in jobs] == [True, False, True]
    daemon.open_gate()
    daemon.wait(first)
    assert daemon.submit("solo fid:5") > first


def test_a_parent_gets_the_job_that_is_there(daemon: Daemon) -> None:
    first = daemon.submit("solo fid:5")
    parents = [daemon.submit("parent fid:5") for _ in range(3)]
    daemon.until_noted(f"start {first}")
    for id in parents:
        until(lambda id=id: daemon.job(id)["reason"] == f"waits for {first}")  # type: ignore[misc]
    daemon.open_gate()
    assert [daemon.wait(id)["result"] for id in parents] == [first] * 3


def test_a_retry_finds_its_key_taken(daemon: Daemon) -> None:
    first = daemon.submit("solo fid:5 @in:1h")
    daemon.ask(f"cancel {first}")
    second = daemon.submit("solo fid:5")
    assert re.match(
        f"ERR wrong_state job {first} .* job {second} has", daemon.say(f"retry {first}")
    )


def test_turns_cross_types_and_why_tells_of_them(daemon: Daemon) -> None:
    first = daemon.submit("turn id:5 gate:one")
    second, third = daemon.submit("other id:5"), daemon.submit("turn id:5")
    beside = daemon.submit("turn id:6")
    daemon.until_noted(f"start {beside}")
    assert f": its turn comes after that of job {first} (key vm:5);" in daemon.why(third)
    assert daemon.ask(f"show {second}")["why"] == daemon.why(second)
    assert (daemon.job(second)["state"], daemon.job(second)["reason"]) == (
        "queued", "waits for its turn: vm:5",
    )  # fmt: skip
    assert daemon.say("turn") == "ERR bad_params id: is missing, serial = vm:{id} asks for it"
    assert daemon.say("check turn").startswith("ERR bad_params")
    daemon.open_gate("one")
    daemon.until_noted(f"start {second}")
    assert f"start {third}" not in daemon.ledger
    daemon.open_gate()
    daemon.wait(third)


def test_a_child_that_would_wait_for_its_parent_is_refused(daemon: Daemon) -> None:
    daemon.forgiven.append("run\\(\\) raised")
    outer = daemon.config.read_text().replace("[job selfish]", "[job selfish]\nserial = vm:1")
    daemon.config.write_text(outer)
    daemon.ask("reload")
    ended = daemon.run("selfish")
    assert ended["state"] == "failed"
    assert "has the turn that the child needs" in ended["message"]


def test_what_has_not_started_in_time_is_expired_and_told(daemon: Daemon) -> None:
    daemon.submit("turn id:5")
    assert "; it expires at 2" in daemon.why(daemon.submit("other id:5 @expires:1h"))
    late = daemon.submit("other id:5 @expires:300ms")
    after = daemon.submit(f"other id:6 @after:{late}")
    assert daemon.wait(late)["state"] == "expired"
    assert daemon.job(after)["reason"].startswith(f"job {late} is expired")
    soon = daemon.submit(
        "soon @expires:100ms @queue:x" if False else "soon @after:1 @expires:200ms"
    )
    assert daemon.wait(soon)["message"] == "it has not started in time"
    assert daemon.ask(f"show {soon}")["history"][-1]["state"] == "expired"
    never = daemon.submit("soon @in:2h @expires:0")
    assert daemon.job(never)["expires_at"] is None
    assert daemon.say("soon @in:2h @expires:1h").startswith("ERR bad_params @expires:")
    shown = daemon.job(daemon.submit("soon @in:2h"))
    assert shown["expires_at"] > shown["run_at"]


def test_a_full_queue_and_a_busy_type_are_told(daemon: Daemon) -> None:
    daemon.until_noted(f"start {daemon.submit('full')}")
    assert [daemon.say("full")[:4] for _ in range(3)] == ["ACK ", "ACK ", "ERR "]
    assert daemon.say("full") == "ERR busy 2 jobs of full wait already, max_queue = 2"
    daemon.submit("alone")
    assert daemon.say("alone") == "ERR busy a job of alone is not finished, when_busy = reject"
    running = daemon.submit("latest")
    daemon.until_noted(f"start {running}")
    old, new = daemon.submit("latest"), daemon.submit("latest")
    assert daemon.job(old)["reason"] == f"replaced by {new}"
    daemon.open_gate()
    assert [daemon.wait(id)["state"] for id in (running, old, new)] == ["done", "cancelled", "done"]


def test_1000_jobs_over_20_keys_at_16_places(url: str, short_tmp: Path) -> None:
    """The figure of the issue, with kills in the middle, retries, cancels, delays and @after."""
    vm = "[job vm]\nserial = vm:{vm}\nconcurrent = 16\nretries = 2\nretry_delay = 20ms\n"
    with Daemon(short_tmp, vm, url, vm=VM) as daemon:
        ids: list[int] = []
        again: set[int] = set()
        kills = 0
        for n in range(0, 1000, 50):
            with daemon.talk() as talk:
                for k in range(n, n + 50):
                    after = f" @after:{ids[-1]}" if k % 31 == 7 else ""
                    later = " @in:30ms" if k % 23 == 3 else after
                    ids.append(int(talk.say(f"vm vm:{k % 20} n:{k}{later}").split()[1]))
                if n % 150 == 0:
                    # The one that has a turn, if it has not ended, and one that waits.
                    for id in (ids[n], ids[-4]):
                        talk.say(f"cancel {id}")
                        if talk.say(f"retry {id}").startswith("OK"):
                            again.add(id)
            if n in (200, 450, 700):
                daemon.restart()
                kills += 1

        def drained() -> bool:
            for one in daemon.ask("jobs state:blocked limit:1000")["jobs"]:
                # What waits for a job that was cancelled holds up its line.
                if " is cancelled; " in one["reason"]:
                    daemon.say(f"cancel {one['id']}")
            return not left(daemon)

        until(drained, 3 * PATIENCE_S)
        ledger = daemon.ledger
        cancelled = daemon.ask("jobs state:cancelled limit:1000")["jobs"]
        assert judge(ledger, again, {one["id"] for one in cancelled}) == []
        states = Counter(one["state"] for one in daemon.ask("jobs limit:1000")["jobs"])
        assert states.keys() <= {"done", "cancelled"}
        assert states["done"] > 950
        starts = sum(line.startswith("+") for line in ledger)
        print(f"{dict(states)}, {starts} starts, {kills} kills: overlaps 0, inversions 0")


def left(daemon: Daemon) -> int:
    counts = daemon.ask("status")["jobs"]
    return int(counts["queued"] + counts["running"] + counts["blocked"])


def judge(ledger: list[str], again: set[int], cancelled: set[int]) -> list[str]:
    """Two of a key at once, or one before another of the key that was submitted before it.

    A start without an end was cut off by a kill: then the same job is the next, unless it was
    cancelled. Those that were cancelled and retried have lost their place.
    """
    faults: list[str] = []
    holder: dict[str, int] = {}
    began: dict[str, list[int]] = defaultdict(list)
    for line in ledger:
        sign, key, word, *_ = line.split()
        id = int(word)
        if sign == "+":
            if holder.get(key) in cancelled:
                del holder[key]
            if holder.setdefault(key, id) != id:
                faults.append(f"{id} started while {holder[key]} ran ({key})")
            if id not in began[key] and id not in again:
                began[key].append(id)
        elif holder.pop(key, None) != id:
            faults.append(f"{id} ended and had not the turn ({key})")
    return faults + [f"{key}: {ids}" for key, ids in began.items() if ids != sorted(ids)]


def test_64_connections_race_for_1000_keys(url: str, short_tmp: Path) -> None:
    """T11 with `unique`: one job a key, and all callers get the same id."""
    config = "[job solo]\nunique = fid\nconcurrent = 4\n[listen]\nmax_per_peer = 100\n"
    with Daemon(short_tmp, config, url, solo=HOLD) as daemon:

        def race(n: int) -> list[str]:
            order = [(k * 7 + n * 13) % 1000 for k in range(1000)]
            with daemon.talk() as talk:
                talk.send("".join(f"solo fid:{k}\n" for k in order))
                answers = {k: talk.read() for k in order}
            return [answers[k].split()[1] for k in range(1000)]

        with ThreadPoolExecutor(64) as threads:
            answers = list(threads.map(race, range(64)))
        assert [len(set(each)) for each in zip(*answers, strict=True)] == [1] * 1000
        assert len(set(answers[0])) == 1000 == sum(daemon.ask("status")["jobs"].values())
        daemon.kill9()
        daemon.start()
        again = race(0)
        assert again == answers[0]
        daemon.open_gate()
        until(lambda: not left(daemon), 4 * PATIENCE_S)
        assert not set(race(1)) & set(again), "the keys are usable again"


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("unique = fid,pth", "unique: no parameter 'pth' (did you mean path?)"),
        ("unique = params,fid", "unique: names parameters, or `params` for all"),
        ("unique = while queued", "unique: names parameters, or `params` for all"),
        ("unique = fid while running", "unique: while running: is neither while queued nor"),
        ("unique = fid for ever", "unique: 'ever' is not a duration"),
        ("unique = fid for 0", "unique: has to be above 0"),
        ("serial = vm:{vm}", "serial: no parameter 'vm'"),
        ("serial = vm:{fid", "serial: 'vm:{fid' has a lone brace"),
        ("serial = {path}\nsecret = path", "serial: path is secret"),
        ("when_busy = wait", "when_busy: 'wait' is none of queue, reject, replace"),
        ("max_queue = -1", "max_queue: -1 is not between"),
        ("expires = soon", "expires: 'soon' is not a duration"),
    ],
)
def test_faults_have_file_and_line(tmp_path: Path, lines: str, fault: str) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/a.py").touch()
    file = tmp_path / "upq.cfg"
    file.write_text(f"[job a]\nparams = fid:int path:path\n{lines}\n")
    with pytest.raises(ConfigError) as found:
        load(file, {})
    assert re.fullmatch(rf".*upq\.cfg:3: {re.escape(fault)}.*", str(found.value))


def test_what_unique_says() -> None:
    from upq.kinds import UNIQUE, Unique

    def read(text: str) -> Any:
        return UNIQUE.read(text)

    assert read("params") == read("params while unfinished") == Unique()
    assert read("path, fid") == read("fid path") == Unique(("fid", "path"))
    assert read("fid while queued") == Unique(("fid",), until_start=True)
    assert read("fid for 1h") == Unique(("fid",), for_s=3600.0)
