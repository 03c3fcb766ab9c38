"""Named queues, pools, limits and gates as users meet them: a real daemon on each database."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import sqlalchemy as sa

from tests.daemons import ROOT, Daemon, until
from tests.servers import Postgres
from tests.stores import Store
from tests.test_shared import most_tokens, most_within, starts_us
from upq import schema
from upq.job import RUNNING
from upq.rates import BURST_US

WAIT = "def run(self):\n    note(self.jobdata['n'])\n    gate('go')"
NOTE = "def run(self):\n    note(self.jobdata.get('n', self.jobid))"
STORAGE = """
[pool storage]
queues = storage.*.high storage.*.default storage.*.low
concurrent = 1
[job hold]
queue = storage.{pool}.{prio}
params = n pool prio=default
[job note]
queue = storage.{pool}.low
"""


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    return short_tmp


def test_a_queue_is_named_by_the_parameters_and_drained_in_order(url: str, folder: Path) -> None:
    with Daemon(folder, STORAGE, url, hold=WAIT, note=NOTE) as daemon:
        first = daemon.submit("hold n:first pool:fast")
        daemon.until_noted("first")
        low = daemon.submit("note n:low pool:fast @priority:high")
        default = daemon.submit("hold n:default pool:slow")
        high = daemon.submit("hold n:high pool:new prio:high")
        asked = daemon.submit("note n:asked pool:fast @queue:storage.x.default")
        assert [daemon.job(id)["queue"] for id in (low, default, high, asked)] == [
            "storage.fast.low", "storage.slow.default", "storage.new.high", "storage.x.default",
        ]  # fmt: skip
        busy = f"1 of 1 places of pool storage are busy (jobs {first})"
        assert daemon.why(low).endswith(f": {busy}; 3 jobs are ahead of it")
        assert daemon.why(default).endswith(f": {busy}; 1 job is ahead of it")
        assert daemon.why(high).endswith(f": {busy}; 0 jobs are ahead of it")
        assert daemon.why(asked).endswith(f": {busy}; 2 jobs are ahead of it")
        daemon.open_gate()
        daemon.wait(low)
        assert daemon.ledger == ["first", "high", "default", "asked", "low"]


def test_the_verbs_know_named_queues(url: str, folder: Path) -> None:
    config = STORAGE + "[job plain]\n[job fixed]\nqueue = night\n"
    with Daemon(folder, config, url, hold=WAIT, note=NOTE, plain=NOTE, fixed=NOTE) as daemon:
        queues = {q["queue"]: q for q in daemon.ask("queues")["queues"]}
        assert set(queues) == {"plain", "night"}
        ran = daemon.run("note pool:a")["id"]
        daemon.ask("pause storage.a.low")
        one = daemon.submit("note pool:a")
        other = daemon.submit("plain @queue:storage.a.low")
        assert daemon.job(other)["state"] == "blocked"
        assert daemon.why(one).endswith(": queue storage.a.low is paused; 0 jobs are ahead of it")
        assert [j["id"] for j in daemon.ask("jobs queue:storage.a.low")["jobs"]] == [
            other,
            one,
            ran,
        ]
        found = daemon.ask("jobs queue:storage.a.low type:note state:blocked")["jobs"]
        assert [j["id"] for j in found] == [one]
        assert daemon.ask("jobs queue:none")["jobs"] == []
        lanes = [q for q in daemon.ask("queues")["queues"] if q["queue"] == "storage.a.low"]
        assert [(q["type"], q["paused"], q["pool"], q["concurrent"]) for q in lanes] == [
            ("note", True, "storage", 1), ("plain", True, "storage", 1),
        ]  # fmt: skip
        checked = daemon.ask("check note pool:other")
        assert (checked["queue"], checked["ahead"]) == ("storage.other.low", 0)
        assert "storage.other.low" not in {q["queue"] for q in daemon.ask("queues")["queues"]}
        daemon.ask("resume storage.a.low")
        daemon.wait(one)
        daemon.wait(other)


def test_queues_that_a_pool_calls_by_name_are_listed_before_they_have_jobs(folder: Path) -> None:
    config = "[pool web]\nqueues = urgent usual.* plain\nconcurrent = 3\n[job plain]\n"
    with Daemon(folder, config, plain=NOTE) as daemon:
        rows = daemon.ask("queues")["queues"]
        seen = [(q["queue"], q["type"], q["pool"], q["concurrent"], q["queued"]) for q in rows]
        assert seen == [("plain", "plain", "web", 3, 0), ("urgent", "", "web", 3, 0)]
        assert rows[0].keys() == rows[1].keys()
        told = daemon.say("pause urgent")
        assert told == "ERR not_found no job has gone to queue urgent yet"
        daemon.run("plain @queue:urgent")
        rows = daemon.ask("queues")["queues"]
        assert [q["type"] for q in rows if q["queue"] == "urgent"] == ["plain"]


def test_what_names_no_queue_is_refused_before_the_ack(folder: Path) -> None:
    with Daemon(folder, STORAGE, hold=WAIT, note=NOTE) as daemon:
        assert daemon.say("note n:1") == (
            "ERR bad_params pool: is missing, the queue is storage.{pool}.low"
        )
        assert daemon.say("note pool:").startswith("ERR bad_params pool: is missing")
        assert daemon.say('note pool:"a b"').startswith("ERR bad_params pool: 'storage.a b.low' is")
        assert daemon.say("note pool:é").startswith("ERR bad_params pool: 'storage.é.low' is")
        assert daemon.say(f"note pool:{'x' * 250}").startswith("ERR bad_params pool: 'storage.xx")
        assert daemon.say("note pool:a @queue:a*").startswith("ERR bad_params @queue: 'a*' is not")
        assert daemon.say(f"note pool:a @queue:{'x' * 256}").startswith("ERR bad_params @queue: ")
        assert daemon.ask("jobs")["jobs"] == []


def test_a_job_knows_the_queue_it_came_from(folder: Path) -> None:
    config = """
        [job here]
        [job there]
        executor = process
        [job cmd]
        command = sh -c 'echo "$UPQ_JOB_QUEUE"'
    """
    say = "def run(self):\n    return self.jobqueue"
    with Daemon(folder, dedent(config), here=say, there=say) as daemon:
        assert daemon.run("here")["result"] == "here"
        assert daemon.run("here @queue:a.low")["result"] == "a.low"
        assert daemon.run("there @queue:b.low")["result"] == "b.low"
        command = daemon.run("cmd @queue:c.low")["id"]
        assert daemon.ask(f"output {command}")["text"] == "c.low\n"


def test_a_job_and_a_chain_name_queues_too(folder: Path) -> None:
    parent = (
        "def run(self):\n"
        "    a = self.enqueue_newjob('note', {'pool': 'p'})\n"
        "    b = self.enqueue_newjob('note', {'pool': 'p'}, queue='storage.q.high')\n"
        "    a.finished.wait(), b.finished.wait()\n"
        "    return [a.jobid, b.jobid]"
    )
    config = STORAGE + "[job parent]\nsubjobs = note\nqueue = storage.x.low\n"
    with Daemon(folder, config, note=NOTE, hold=WAIT, parent=parent) as daemon:
        done = daemon.run("parent pool:z")
        assert [daemon.job(id)["queue"] for id in done["result"]] == [
            "storage.p.low", "storage.q.high",
        ]  # fmt: skip
        children = daemon.ask(f"show {done['id']}")["children"]
        assert children[-1]["queue"] == "storage.z.low"
        lost = daemon.run("parent")
        until(lambda: len(daemon.ask(f"show {lost['id']}")["children"]) == 3)
        assert daemon.ask(f"show {lost['id']}")["children"][-1]["queue"] == "note"


def test_a_parent_in_a_pool_of_one_waits_without_blocking_it(folder: Path) -> None:
    parent = (
        "def run(self):\n"
        "    n = self.jobdata['n']\n"
        "    if n:\n"
        "        child = self.enqueue_newjob('parent', {'n': n - 1})\n"
        "        child.finished.wait()\n"
        "        return child.result + 1\n"
        "    return 0"
    )
    config = "[pool p]\nqueues = q\n[job parent]\nqueue = q\nconcurrent = 1\nparams = n:int\n"
    with Daemon(folder, config, parent=parent) as daemon:
        assert daemon.run("parent n:4")["result"] == 4


def test_cancel_finds_a_job_in_a_pool(folder: Path) -> None:
    body = "def run(self):\n    note('here')\n    gate('never', lambda: self.cancelled)"
    config = "[pool p]\nqueues = q\n[job hold]\nqueue = q\n"
    with Daemon(folder, config, hold=body) as daemon:
        id = daemon.submit("hold")
        daemon.until_noted("here")
        daemon.ask(f"cancel {id}")
        assert daemon.wait(id)["state"] == "cancelled" or daemon.job(id)["state"] == "done"


def test_reload_adds_and_removes_pools_and_limits(folder: Path) -> None:
    with Daemon(folder, "[job hold]\n", hold=WAIT) as daemon:
        ids = [daemon.submit(f"hold n:{n} @queue:a.{n}") for n in range(6)]
        daemon.until_noted("0")
        daemon.configure("[node]\npools = p\n[pool p]\nqueues = a.*\nconcurrent = 3\n[job hold]\n")
        assert daemon.ask("reload")["warnings"] == []
        until(lambda: len(daemon.ledger) == 4)
        busy = "3 of 3 places of pool p are busy"
        assert busy in daemon.why(ids[5])
        daemon.configure("[tokens]\nt = 1\n[job hold]\nneeds = t\nconcurrent = 9\n")
        daemon.ask("reload")
        until(lambda: "it needs t:1, -3 of 1 are free" in daemon.why(ids[5]))
        daemon.configure("[job hold]\nneeds = t\n")
        daemon.forgiven.append("not reloaded")
        assert "needs: no t in [tokens]" in daemon.say("reload")
        daemon.open_gate()
        for id in ids:
            daemon.wait(id)


def test_a_closed_gate_is_told_and_opens(folder: Path) -> None:
    config = (
        "[node]\nname = n1\npools = x\n[pool x]\nqueues = x\n[pool y]\nqueues = y\n"
        "[job shut]\nwindow = {day} 00:00-24:00 UTC\n[job full]\nmin_free = /gone/away 1K\n"
        "[job note]\nqueue = y\n"
    )
    day = time.strftime("%a", time.gmtime(time.time() + 3 * 86400)).lower()
    with Daemon(folder, config.format(day=day), shut=NOTE, full=NOTE, note=NOTE) as daemon:
        shut, full, other = (daemon.submit(f"{name} n:1") for name in ("shut", "full", "note"))
        assert [daemon.job(id)["state"] for id in (shut, full, other)] == ["blocked"] * 3
        opens = time.strftime("%Y-%m-%dT00:00:00", time.gmtime(time.time() + 3 * 86400))
        assert f"window {day} 00:00-24:00 UTC is closed until {opens}" in daemon.why(shut)
        why = "disk /gone/away: No such file or directory"
        until(lambda: f": {why};" in daemon.why(full))
        assert "queue y is of pool y, which n1 does not serve" in daemon.why(other)
        reasons = {q["type"]: q["reason"] for q in daemon.ask("queues")["queues"]}
        assert reasons["full"] == "disk /gone/away: No such file or directory"
        assert daemon.ask("status")["jobs"]["blocked"] == 3
        daemon.configure("[job shut]\n[job full]\nmin_free = / 1K\n[job note]\n")
        daemon.ask("reload")
        for id in (shut, full, other):
            daemon.wait(id)


#: In the daemon's folder: a mount of that name hangs as long as there is such a file.
HUNG = """
import os
import time
from pathlib import Path

statvfs, hung = os.statvfs, Path(__file__).with_name("hung")


def look(path):
    while path == "/mount" and hung.exists():
        time.sleep(0.01)
    return statvfs("/")


os.statvfs = look
"""


def test_a_disk_that_hangs_holds_up_nobody_else(folder: Path) -> None:
    config = "[job full]\nmin_free = /mount 1K\n[job note]\n"
    daemon = Daemon(folder, config, full=NOTE, note=NOTE)
    (folder / "sitecustomize.py").write_text(HUNG)
    daemon.env["PYTHONPATH"] = f"{folder}:{ROOT}"
    with daemon:
        daemon.run("full n:1")
        (folder / "hung").touch()
        first, other = daemon.submit("full n:2"), daemon.submit("note n:3")
        daemon.wait(other)
        daemon.restart()
        second = daemon.submit("full n:4")
        assert ": disk /mount does not answer;" in daemon.why(second)
        assert daemon.ask("reload")["reloaded"]
        daemon.run("note n:5")
        (folder / "hung").unlink()
        for id in (first, second):
            assert daemon.wait(id)["state"] == "done"


# The figures


def lost(starts: list[int], over: int, a_second: int) -> float:
    """How many starts a rate leaves out in standstills that last longer than its burst.

    A loaded machine has some. Of what comes too slowly or not evenly nothing is among them.
    """
    gaps_us = [later - at for at, later in itertools.pairwise([*starts, over])]
    return sum(max(gap - BURST_US, 0) for gap in gaps_us) * a_second / 1e6


def test_a_hundred_a_second_for_twenty_seconds_under_pressure(folder: Path) -> None:
    config = "[job note]\nrate = 100/s\nconcurrent = 4\n"
    with Daemon(folder, config, note="def run(self):\n    pass") as daemon:
        daemon.ask("pause note")
        with daemon.talk() as talk:
            talk.send("note\n" * 3000)
            assert all(talk.read().startswith("ACK ") for _ in range(3000))
        id = daemon.submit("note")
        daemon.ask("resume note")
        until(lambda: "rate 100/s is used up until" in daemon.why(id))
        assert daemon.job(id)["state"] in ("blocked", "queued")
        time.sleep(20.5)
        daemon.end()
        with Store(f"sqlite:///{folder}/state/upq.db") as store:
            starts = starts_us(store)
    over = starts[0] + 20_000_000
    inside = [at for at in starts if at < over]
    left_out = lost(inside, over, 100)
    print(len(inside), "starts in 20 s, at most", most_within(starts, 1_000_000), "in 1 s;",
          f"{left_out:.0f} left out in standstills")  # fmt: skip
    assert most_within(starts, 1_000_000) <= 100 + 20
    assert 2000 * 0.97 - left_out <= len(inside) <= 2000 * 1.03
    assert left_out <= 2000 * 0.3


@pytest.fixture
def pair(postgres: Postgres, tmp_path: Path, short_tmp: Path) -> Iterator[tuple[str, list[Daemon]]]:
    """Two daemons on one PostgreSQL."""
    body = "def run(self):\n    import time\n    time.sleep(0.01)"
    config = (
        "[node]\nname = n{n}\n[tokens]\ndisk = 4\n"
        "[job one]\nneeds = disk\nconcurrent = 6\n[job two]\nneeds = disk:2\nconcurrent = 6\n"
        "[job often]\nrate = 50/s\nconcurrent = 4\n"
    )
    with postgres.database() as url:
        made = []
        for n in (1, 2):
            (short_tmp / str(n)).mkdir()
            made.append(
                Daemon(short_tmp / str(n), config.format(n=n), url, one=body, two=body, often=body)
            )
        with made[0], made[1]:
            yield url, made


def test_two_daemons_and_kill_9_never_hold_more_tokens_than_there_are(
    pair: tuple[str, list[Daemon]],
) -> None:
    url, daemons = pair
    ids = []
    for n in range(60):
        ids += [daemons[n % 2].submit(f"one @queue:q{n % 3}"), daemons[1 - n % 2].submit("two")]
        if n % 20 == 10:
            daemons[n % 2].restart()
    for id in ids:
        daemons[0].wait(id)
    for daemon in daemons:
        daemon.end()
    with Store(url) as store:
        print("most tokens held:", most := most_tokens(store, {"one": 1, "two": 2}))
        assert 2 < most <= 4


def test_two_daemons_share_a_rate_and_say_so(pair: tuple[str, list[Daemon]]) -> None:
    url, daemons = pair
    daemons[0].ask("pause often")
    with daemons[0].talk() as talk:
        talk.send("often\n" * 800)
        assert all(talk.read().startswith("ACK ") for _ in range(800))
    daemons[0].ask("resume often")
    until(lambda: daemons[0].ask("jobs state:done limit:1")["jobs"])
    time.sleep(10.5)
    for daemon in daemons:
        daemon.end()
    with Store(url) as store:
        starts = starts_us(store)
        ran = sa.select(schema.event.c.node).where(schema.event.c.state == RUNNING)
        nodes = {row[0] for row in store.fetch(ran)}
    over = starts[0] + 10_000_000
    inside = [at for at in starts if at < over]
    left_out = lost(inside, over, 50)
    print(len(inside), "starts in 10 s, at most", most_within(starts, 1_000_000), "in 1 s;",
          f"{left_out:.0f} left out in standstills")  # fmt: skip
    assert most_within(starts, 1_000_000) <= 50 + 10
    assert 500 * 0.9 - left_out <= len(inside) <= 510
    assert left_out <= 500 * 0.3
    assert nodes == {"n1", "n2"}


STUBBORN = """
def run(self):
    note("start", self.jobid)
    gate("never", lambda: self.cancelled)
    return not self.cancelled
"""


def test_what_runs_in_a_pool_ends_when_it_is_cancelled(folder: Path, url: str) -> None:
    config = """
[pool storage]
queues = storage.*
concurrent = 3
[job hold]
queue = storage.{name}
params = name
"""
    with Daemon(folder, config, url, hold=STUBBORN) as daemon:
        ids = [daemon.submit(f"hold name:{name}") for name in "abc"]
        for id in ids:
            daemon.until_noted(f"start {id}")
        daemon.ask(f"cancel {ids[0]}")
        assert daemon.wait(ids[0])["state"] == "cancelled"
        assert daemon.ask("cancel type:hold")["n"] == 2
        assert [daemon.wait(id)["state"] for id in ids[1:]] == ["cancelled"] * 2


def test_a_cancel_by_way_of_another_daemon_reaches_a_pool(folder: Path, postgres: Postgres) -> None:
    config = "[node]\nname = {}\n[pool here]\nqueues = storage.*\n[job hold]\nqueue = storage.x\n"
    (folder / "b").mkdir()
    with (
        postgres.database() as url,
        Daemon(folder, config.format("a"), url, hold=STUBBORN) as daemon,
    ):
        id = daemon.submit("hold")
        daemon.until_noted(f"start {id}")
        with Daemon(folder / "b", config.format("b"), url, hold=STUBBORN) as other:
            other.ask(f"cancel {id}")
            assert other.wait(id)["state"] == "cancelled"
