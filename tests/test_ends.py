"""How jobs are ended that do not end by themselves: timeout and cancel of every kind of job."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import cancels, stores
from tests.daemons import PATIENCE_S, Daemon, NotStarted, until
from tests.stores import Store
from tests.test_process import folder_of_its_own
from upq import UpqJob, keeper
from upq.errors import UpqError
from upq.interrupt import Abandoned, Door, Interrupted
from upq.job import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Outcome
from upq.keeper import GRACE_S, Keeper

database, url, store = stores.database, stores.url, stores.store

HANG = """
def run(self):
    note("start", self.jobid)
    how = self.jobdata["how"]
    if how == "loop":
        while True:
            pass
    elif how == "sleep":
        time.sleep(1000)
    elif how == "call":
        import os
        os.read(os.pipe()[0], 1)
    elif how == "lock":
        import threading
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif how == "deaf":
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
    elif how == "obeys":
        self.cancel_event.wait(1000)
        self.msg("half of it")
    elif how == "cleans":
        try:
            while True:
                pass
        finally:
            note("cleaned", self.jobid)
    elif how == "parent":
        self.submit("quick", how="loop").finished.wait()
    elif how == "swallows":
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pass
"""
CONFIG = """
[job hang]
concurrent = 2
[job hung]
executor = process
concurrent = 2
[job quick]
[job program]
command = sleep {s}
params = s
"""


@pytest.fixture(scope="module")
def one() -> Iterator[Daemon]:
    with folder_of_its_own() as folder:
        quick = HANG.replace("note(", "(lambda *_: None)(", 1)
        with Daemon(folder, CONFIG, hang=HANG, hung=HANG, quick=quick) as daemon:
            yield daemon


@pytest.mark.parametrize("type", ["hang", "hung"])
@pytest.mark.parametrize("how", ["loop", "sleep", "call", "lock", "deaf"])
def test_what_hangs_is_over_in_time_and_its_place_is_free(one: Daemon, type: str, how: str) -> None:
    """T14, with less time for the job and more for the machine."""
    began_s = time.monotonic()
    job = one.run(f"{type} how:{how} @timeout:1s")
    took_s = time.monotonic() - began_s
    assert (job["state"], job["reason"]) == ("failed", "timeout")
    assert job["message"].startswith("timed out after 1 s")
    assert took_s < 1 + GRACE_S + 1 + 3
    for _ in range(2):
        assert one.run(f"{type} how:nothing")["state"] == "done"
    assert one.ask("status")["jobs"]["running"] == 0


def test_other_types_run_while_jobs_hang(one: Daemon) -> None:
    ids = []
    for type in ("hung", "hang"):
        ids.append(one.submit(f"{type} how:loop"))
        one.until_noted(f"start {ids[-1]}")
    for _ in range(5):
        assert one.run("quick how:nothing")["state"] == "done"
    assert [one.job(id)["state"] for id in ids] == ["running", "running"]
    for id in ids:
        one.ask(f"cancel {id}")
    assert [one.wait(id)["state"] for id in ids] == ["cancelled", "cancelled"]


@pytest.mark.parametrize("type", ["hang", "hung"])
def test_a_job_that_obeys_is_late_all_the_same(one: Daemon, type: str) -> None:
    one.run(f"{type} how:nothing")  # what runs it is there
    job = one.run(f"{type} how:obeys @timeout:3s")
    assert (job["state"], job["reason"]) == ("failed", "timeout")
    assert job["message"] == "half of it timed out after 3 s"


def test_a_late_attempt_is_followed_by_another_if_there_are_retries(one: Daemon) -> None:
    id = one.submit("hang how:obeys @timeout:100ms @retries:1")
    until(lambda: one.job(id)["reason"] == "retry 1 of 1")
    one.ask(f"cancel {id}")


@pytest.mark.parametrize("type", ["hang", "hung"])
def test_a_job_that_is_interrupted_cleans_up(one: Daemon, type: str) -> None:
    one.run(f"{type} how:nothing")  # what runs it is there
    job = one.run(f"{type} how:cleans @timeout:3s")
    assert job["reason"] == "timeout"
    assert f"cleaned {job['id']}" in one.ledger


@pytest.mark.parametrize("how", ["loop", "obeys", "sleep", "parent", "swallows"])
@pytest.mark.parametrize("type", ["hang", "hung"])
def test_a_running_job_is_cancelled(one: Daemon, type: str, how: str) -> None:
    id = one.submit(f"{type} how:{how}")
    one.until_noted(f"start {id}")
    began_s = time.monotonic()
    told = one.ask(f"cancel {id}")
    assert (told["id"], told["state"]) == (id, "running")
    job = one.wait(id)
    assert time.monotonic() - began_s < 6 + 3
    # A job that comes to its end by itself is done, whatever was asked.
    assert job["state"] == ("done" if how == "obeys" else "cancelled")
    assert one.say(f"cancel {id}") == f"ERR wrong_state job {id} is {job['state']} already"
    for child in one.ask(f"show {id}")["children"]:
        assert one.wait(child["id"])["state"] == "cancelled"


def test_timeout_in_the_section_holds_for_every_kind(short_tmp: Any) -> None:
    config = "\n".join(
        f"[job {name}]\ntimeout = 300ms\n{more}"
        for name, more in (("hang", ""), ("hung", "executor = process"),
                           ("program", "command = sleep 1000"))
    )  # fmt: skip
    with Daemon(short_tmp, config, hang=HANG, hung=HANG) as daemon:
        ids = [daemon.submit(line) for line in ("hang how:obeys", "hung how:obeys", "program")]
        for id in ids:
            job = daemon.wait(id)
            assert (job["state"], job["reason"]) == ("failed", "timeout")
            assert job["message"].endswith("timed out after 0.3 s")


def test_abandoned_threads_are_counted_fenced_and_too_many_are_a_restart(short_tmp: Path) -> None:
    body = """
def run(self):
    try:
        open(FOLDER / "fifo").read()
    except BaseException:
        note("interrupted")
    for act in (lambda: self.submit("quick"), lambda: self.progress(1), lambda: self.db):
        try:
            act()
        except Exception as error:
            note("refused", error)
    note("back", self.jobid)
    return "too late"
"""
    config = "[daemon]\nmax_abandoned = 1\ngrace = 1s\n[job stuck]\ntimeout = 100ms\n[job quick]"
    os.mkfifo(short_tmp / "fifo")
    with Daemon(short_tmp, config, stuck=body, quick="def run(self): note('quick')") as daemon:
        daemon.forgiven.append("threads hang")
        job = daemon.run("stuck")
        assert job["message"] == "timed out after 0.1 s and could not be stopped"
        (told,) = re.findall(r"finished: failed in ([0-9.]+) s", daemon.log)
        assert GRACE_S < float(told) < GRACE_S + 5
        assert daemon.ask("status")["abandoned"] == 1
        (short_tmp / "fifo").write_text("")
        daemon.until_noted(f"back {job['id']}")
        refused = [line for line in daemon.ledger if line.startswith("refused")]
        assert len(refused) == 3
        assert all("was given up" in line for line in refused)
        until(lambda: daemon.ask("status")["abandoned"] == 0)
        assert daemon.job(job["id"])["result"] is None
        assert daemon.ask("jobs type:quick")["jobs"] == []
        assert daemon.run("stuck")["reason"] == "timeout"
        assert daemon.is_alive
        last = daemon.submit("stuck")
        assert daemon.until_ended() == 70
        daemon.start()
        assert daemon.job(last)["state"] == "failed"


def test_a_job_that_kills_the_daemon_is_started_three_times(short_tmp: Any) -> None:
    """T13, thread mode."""
    body = """
def run(self):
    import ctypes
    note("start")
    gate("go")
    time.sleep(1)  # the daemon is ready
    ctypes.string_at(0)
"""
    with Daemon(short_tmp, "[job boom]\n[job quick]", boom=body,
                quick="def run(self): pass") as daemon:  # fmt: skip
        id = daemon.submit("boom")
        daemon.open_gate()
        for _ in range(3):
            daemon.until_ended()
            with suppress(NotStarted):  # it may die before it has said that it is ready
                daemon.start()
        job = daemon.wait(id)
        assert (job["state"], job["reason"], daemon.ledger) == ("failed", "crashed", ["start"] * 3)
        assert daemon.run("quick")["state"] == "done"


def test_an_end_that_the_database_refuses_fails_the_job_and_is_told(short_tmp: Any) -> None:
    config = "[job quick]\nsubjobs = after\non_fail = rescue\n[job after]\n[job rescue]"
    body = "def run(self): note(type(self).__name__)"
    with Daemon(short_tmp, config, quick=body, after=body, rescue=body) as daemon:
        with closing(sqlite3.connect(daemon.folder / "state/upq.db")) as database:
            database.execute(
                "CREATE TRIGGER no BEFORE UPDATE ON upq_job WHEN new.state = 'done' AND"
                " new.type = 'quick' BEGIN SELECT RAISE(ABORT, 'not this one'); END"
            )
        daemon.forgiven.append("cannot be stored")
        job = daemon.run("quick")
        assert (job["state"], job["reason"]) == ("failed", "cannot be stored")
        assert "not this one" in job["message"]
        daemon.until_noted("Rescue")
        assert daemon.ledger == ["Quick", "Rescue"]
        assert "finished: failed" in daemon.log
        assert f"(quick:{job['id']}) finished: done" not in daemon.log


# The parts


def inside(door: Door, act: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread that runs `act` behind the door, and what comes out."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(door.run(act))
        except BaseException as error:
            out.append(type(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, out


def spin_until(go: threading.Event, begun: threading.Event | None = None) -> str:
    if begun is not None:
        begun.set()
    while not go.is_set():
        pass
    return "by itself"


def test_a_thread_is_interrupted_once_and_only_inside() -> None:
    door = Door()
    assert not door.interrupt()
    go = threading.Event()
    thread, out = inside(door, lambda: spin_until(go))
    until(door.interrupt)
    thread.join(PATIENCE_S)
    assert out == [Interrupted]
    assert door.interrupt()  # nothing is left to do


def test_nothing_is_raised_in_a_thread_that_holds_what_others_need() -> None:
    source = "def hold(spin):\n    return spin()"
    for package in ("upq.writer", "logging", "sqlalchemy.pool.impl"):
        space: dict[str, Any] = {"__name__": package}
        code = compile(source, package, "exec")
        # As if the package had called back.
        hold = type(spin_until)(next(c for c in code.co_consts if hasattr(c, "co_code")), space)
        door, go, begun = Door(), threading.Event(), threading.Event()
        spin = partial(spin_until, go, begun)
        thread, out = inside(door, partial(hold, spin))
        assert begun.wait(PATIENCE_S)
        for _ in range(20):
            assert not door.interrupt()
        assert door.wanted
        go.set()
        thread.join(PATIENCE_S)
        assert out == ["by itself"]


def test_interrupts_at_every_moment_never_leave_the_door() -> None:
    """The exception comes at any instant of a short job; it never comes after it."""
    sys.setswitchinterval(1e-5)
    try:
        for round in range(300):
            door = Door()
            thread, out = inside(door, lambda: sum(range(200)))
            while not door.interrupt() and thread.is_alive():
                pass
            thread.join(PATIENCE_S)
            assert out in ([19900], [Interrupted]), round
    finally:
        sys.setswitchinterval(0.005)


def test_a_thread_that_was_given_up_is_told_so_when_it_comes_back() -> None:
    door, go = Door(), threading.Event()
    assert not door.give_up()
    thread, out = inside(door, lambda: go.wait(PATIENCE_S))
    until(door.give_up)
    go.set()
    thread.join(PATIENCE_S)
    assert out == [Abandoned]
    assert door.give_up()


def test_what_has_come_out_cannot_be_given_up() -> None:
    door = Door()
    assert door.run(lambda: 5) == 5
    assert not door.give_up()


def test_a_job_that_was_given_up_can_ask_for_nothing() -> None:
    job = UpqJob("work", {}, desk=object())  # type: ignore[arg-type]
    job.door, go = Door(), threading.Event()
    thread, _ = inside(job.door, lambda: go.wait(PATIENCE_S))
    until(job.door.give_up)
    with pytest.raises(UpqError, match="was given up"):
        job.submit("other")
    go.set()
    thread.join(PATIENCE_S)


def test_one_thread_keeps_all_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "ASK_S", 0.1)
    before = threading.active_count()
    watch, jobs, outs = Keeper(), [], []
    for n in range(50):
        job = UpqJob("work", {})
        job.door, job.timeout_s = Door(), 0.2 if n % 2 else 60.0
        go = threading.Event()
        outs.append((inside(job.door, lambda go=go: spin_slowly(go)), go))
        watch.limit(job)
        jobs.append(job)
    assert threading.active_count() <= before + 51
    until(lambda: sum(out == [Interrupted] for (_, out), _ in outs) == 25)
    assert [job.ended_by for job in jobs] == [None, "timeout"] * 25
    for (thread, out), go in outs[::2]:
        assert out == []
        go.set()
        thread.join(PATIENCE_S)
    for job in jobs:
        watch.forget(job)


def spin_slowly(go: threading.Event) -> None:
    while not go.is_set():
        time.sleep(0.005)


def test_jobs_without_a_timeout_start_no_keeper(short_tmp: Any) -> None:
    with Daemon(short_tmp, "[job quick]", quick="def run(self): import threading;"
                " return [t.name for t in threading.enumerate()]") as daemon:  # fmt: skip
        assert "keeper" not in daemon.run("quick")["result"]
        assert "keeper" in daemon.run("quick @timeout:1h")["result"]


# What the store makes of it


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(QUEUED, "no", reason="retry 1 of 2"),
        Outcome(QUEUED, reason="interrupted", counts=False),
        Outcome(QUEUED, "its process died", reason="crashed", counts=False, crashed=True),
    ],
)
def test_what_was_cancelled_at_the_last_moment_is_not_tried_again(
    store: Store, outcome: Outcome
) -> None:
    id, other = store.submit(), store.submit()
    one, two = store.claim(2)
    assert store.queue.cancel(id, "alice").state == RUNNING
    assert store.queue.asked_to_end() == [(one.lane, one.token)]
    for job in (one, two):
        store.queue.finish(job, Outcome(**{f: getattr(outcome, f) for f in outcome.__slots__}))
    store.flush()
    assert (store.row(id).state, store.row(id).reason) == (CANCELLED, "asked")
    assert store.row(other).state == QUEUED
    assert [job.id for job in store.claim(5)] == [other]
    assert store.queue.asked_to_end() == []


def test_what_is_done_when_the_cancel_comes_is_done(store: Store) -> None:
    id = store.submit()
    job = store.claim_one()
    store.queue.cancel(id, "alice")
    store.queue.finish(job, Outcome(DONE))
    store.flush()
    assert store.row(id).state == DONE


def test_a_crash_is_counted_in_the_transaction_of_the_end(store: Store) -> None:
    id = store.submit()
    for n in (1, 2):
        job = store.claim_one()
        assert (job.crashes, job.attempt, job.starts) == (n - 1, 1, n)
        store.queue.finish(job, Outcome(QUEUED, reason="crashed", counts=False, crashed=True))
        store.flush()
    store.queue.finish(store.claim_one(), Outcome(FAILED, reason="crashed", crashed=True))
    store.flush()
    assert (store.row(id).crashes, store.row(id).state) == (3, FAILED)
    assert store.queue.crashed == 1


def test_cancels_at_random_are_answered_truly(short_tmp: Any) -> None:
    """T17, the short form of `python -m tests.cancels`."""
    found = cancels.run(short_tmp, 80, seed=17)
    assert (found.not_one_end, found.untrue, found.started) == ([], [], [])
    assert found.slowest_s < cancels.END_S + 3
    assert {text.partition(":")[0] for text in found.said} == {"queued", "running", "too late"}
