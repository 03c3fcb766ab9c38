from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.stores import Store
from tests.test_pool import until
from upq import UpqJob
from upq.desk import Ends, JobDesk
from upq.errors import Unavailable, UpqError
from upq.events import Event
from upq.job import DONE, FAILED, QUEUED, Accepted, Job, Limits, NewJob, Outcome
from upq.pool import Pool


class Office:
    """A desk over a store. Jobs are claimed and ended by hand, as parents that a pool runs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.pool = Pool("hash", 1, None, lambda: None)  # type: ignore[arg-type]
        self.ends = Ends(store.views)
        store.queue._bus.subscribe(self.ends.hear)
        self.desk = JobDesk(store.queue, store.views, self.ends, self._pool, self, None)  # type: ignore[arg-type]

    def _pool(self, name: str, token: int) -> Pool | None:
        return self.pool if name == "hash" else None

    def submit_child(self, new: NewJob) -> Accepted:
        return self.store.accepted(new)[0]

    def begin(self, job: Job) -> UpqJob:
        """The object of a claimed job, running in this thread."""
        plugin = UpqJob(job.type, dict(job.data), jobid=job.id, desk=self.desk)  # type: ignore[arg-type]
        plugin.token = job.token
        self.pool._jobs[job.token] = job
        self.pool._running += 1
        return plugin

    def end(self, job: Job, state: str = DONE, **fields: Any) -> None:
        self.store.queue.finish(job, Outcome(state, **fields))
        self.store.flush()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with Store(f"sqlite:///{tmp_path}/upq.db") as store:
        yield Office(store)


@pytest.fixture
def parent(office: Office) -> UpqJob:
    office.store.submit(submitter="uid:3")
    return office.begin(office.store.claim_one())


# Children


def test_a_child_is_queued_with_its_parent_and_submitter(office: Office, parent: UpqJob) -> None:
    child = parent.enqueue_newjob("reverify", {"fid": 1})
    seen = office.store.views.job(child.jobid)
    assert (seen["parent"], seen["root"], seen["submitter"]) == (parent.jobid,) * 2 + ("uid:3",)
    assert (child.jobname, child.state, child.result, child.msgstr) == (
        "reverify",
        "queued",
        None,
        "",
    )


def test_the_nth_of_a_kind_is_a_job_of_its_own(office: Office, parent: UpqJob) -> None:
    asked = [{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1}, {"a": "1"}, {"a": 1, "b": 2}]
    children = [parent.enqueue_newjob("reverify", params).jobid for params in asked]
    assert len(set(children)) == 5


def test_after_a_crash_the_same_calls_return_the_same_jobs(office: Office, parent: UpqJob) -> None:
    asked = [{"n": 1}, {"n": 1}, {"n": 2}]
    before = [parent.enqueue_newjob("reverify", params).jobid for params in asked]
    office.end(office.store.claim_one("reverify"), result="kept", message="well")
    parent = rerun(office, parent)
    children = [parent.enqueue_newjob("reverify", params) for params in asked]
    assert [child.jobid for child in children] == before
    assert (children[0].state, children[0].result, children[0].msgstr) == (DONE, "kept", "well")
    assert parent.enqueue_newjob("reverify", {"n": 2}).jobid not in before


def rerun(office: Office, parent: UpqJob) -> UpqJob:
    job = office.pool._jobs.pop(parent.token)
    office.pool._running -= 1
    office.store.queue.rescue([job], lambda _: ((), None))
    return office.begin(office.store.claim_one())


def test_after_a_crash_a_failed_child_is_back_as_failed(office: Office, parent: UpqJob) -> None:
    child = parent.enqueue_newjob("reverify")
    office.end(office.store.claim_one("reverify"), FAILED)
    again = rerun(office, parent).enqueue_newjob("reverify")
    assert (again.jobid, again.state) == (child.jobid, FAILED)


@pytest.fixture
def other(office: Office, parent: UpqJob, monkeypatch: pytest.MonkeyPatch) -> int:
    """A job that stands in for all children: they are unique."""
    limits = Limits("one")
    monkeypatch.setattr(
        office, "submit_child", lambda new: office.store.accepted(replace(new, limits=limits))[0]
    )
    return office.store.submit("reverify", limits=limits)


def test_after_a_crash_a_repeated_child_is_the_job_that_it_was(
    office: Office, parent: UpqJob, other: int
) -> None:
    assert parent.enqueue_newjob("reverify").jobid == other
    office.end(office.store.claim_one("reverify"), result="kept")
    again = rerun(office, parent).enqueue_newjob("reverify")
    assert (again.jobid, again.result) == (other, "kept")


def test_a_repeated_child_that_has_failed_is_left_when_the_parent_is_retried(
    office: Office, parent: UpqJob, other: int
) -> None:
    assert parent.enqueue_newjob("reverify").jobid == other
    office.end(office.store.claim_one("reverify"), FAILED)
    parent = rerun(office, parent)
    assert parent.enqueue_newjob("reverify").jobid == other, "that was a crash"
    office.end(office.pool._jobs.pop(parent.token), FAILED)
    office.store.queue.retry(parent.jobid, "root")
    third = office.store.submit("reverify", limits=Limits("one"))
    parent = office.begin(office.store.claim_one())
    assert parent.enqueue_newjob("reverify").jobid == third
    assert rerun(office, parent).enqueue_newjob("reverify").jobid == third


def test_when_the_parent_is_retried_a_failed_child_runs_again(
    office: Office, parent: UpqJob
) -> None:
    child = parent.enqueue_newjob("reverify")
    office.end(office.store.claim_one("reverify"), FAILED)
    office.end(office.pool._jobs.pop(parent.token), FAILED)
    office.store.queue.retry(parent.jobid, "root")
    again = office.begin(office.store.claim_one()).enqueue_newjob("reverify")
    assert (again.jobid, again.state) == (child.jobid, "queued")


def test_a_child_that_fails_between_two_attempts_of_its_parent_runs_again(
    office: Office, parent: UpqJob
) -> None:
    child = parent.enqueue_newjob("reverify")
    running = office.store.claim_one("reverify")
    office.end(office.pool._jobs.pop(parent.token), QUEUED, reason="retry 1 of 2")
    office.end(running, FAILED)
    parent = rerun(office, office.begin(office.store.claim_one()))
    again = parent.enqueue_newjob("reverify")
    assert (again.jobid, again.state) == (child.jobid, "queued")
    office.end(office.store.claim_one("reverify"), FAILED)
    again = rerun(office, parent).enqueue_newjob("reverify")
    assert again.state == FAILED, "that was a crash of the parent, and no attempt"


def test_a_child_that_somebody_else_has_retried_meanwhile_is_that_child(
    office: Office, parent: UpqJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = parent.enqueue_newjob("reverify")
    parent = rerun(office, parent)
    monkeypatch.setattr(office.store.views, "child", lambda key: (child.jobid, True))
    assert parent.enqueue_newjob("reverify").jobid == child.jobid


def test_a_job_that_does_not_run_queues_no_children(office: Office, parent: UpqJob) -> None:
    office.pool._jobs.clear()
    with pytest.raises(UpqError, match="does not run"):
        parent.enqueue_newjob("reverify")


# Waiting


def test_a_parent_that_waits_gives_its_place_back_and_says_so(
    office: Office, parent: UpqJob
) -> None:
    child = parent.enqueue_newjob("reverify")
    seen: list[tuple[int, str]] = []

    def end_it() -> None:
        until(lambda: office.pool.sizes()["running"] == 0)
        office.store.flush()
        seen.append((0, office.store.views.job(parent.jobid)["reason"]))
        office.end(office.store.claim_one("reverify"), result=5)

    helper = threading.Thread(target=end_it)
    helper.start()
    assert child.finished.wait(10)
    helper.join(10)
    assert seen == [(0, f"waits for {child.jobid}")]
    assert (child.result, office.pool.sizes()["running"]) == (5, 1)
    office.store.flush()
    assert office.store.views.job(parent.jobid)["reason"] == ""


def test_a_wait_for_what_has_ended_is_over_at_once(office: Office, parent: UpqJob) -> None:
    child = parent.enqueue_newjob("reverify")
    assert not child.finished.is_set()
    office.end(office.store.claim_one("reverify"))
    assert child.finished.is_set()
    assert child.finished.wait(0)
    assert office.store.queue.writer.pending == 0


def test_a_wait_has_its_time(office: Office, parent: UpqJob) -> None:
    child = parent.enqueue_newjob("reverify")
    began = time.monotonic()
    assert not child.finished.wait(0.1)
    assert 0.1 <= time.monotonic() - began < 2
    assert office.pool.sizes()["running"] == 1


def test_a_wait_never_raises(
    office: Office, parent: UpqJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = parent.enqueue_newjob("reverify")
    monkeypatch.setattr(office.store.views, "end", lambda id: fail())
    assert not child.finished.wait(0.05)
    monkeypatch.undo()
    child._id = child.finished._id = 10**15  # type: ignore[attr-defined]
    assert not child.finished.wait(0.05)


def fail() -> None:
    raise Unavailable("away")


def test_a_helper_thread_of_a_job_gives_no_place_back(office: Office, parent: UpqJob) -> None:
    child = parent.enqueue_newjob("reverify")
    helper = threading.Thread(target=child.finished.wait, args=(0.2,))
    helper.start()
    until(lambda: office.ends._waiting)
    assert office.pool.sizes()["running"] == 1
    helper.join(5)


# Ends


def test_many_that_wait_are_woken_by_one_end(office: Office) -> None:
    id = office.store.submit()
    heard: list[Any] = []
    threads = [
        threading.Thread(target=lambda: heard.append(office.ends.wait(id, 20))) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(office.ends._waiting.get(id, ())) == 20)
    office.end(office.store.claim_one(), message="well")
    for thread in threads:
        thread.join(10)
    assert [end.message for end in heard] == ["well"] * 20
    assert office.ends._waiting == {}


def test_who_leaves_while_the_others_are_woken_keeps_none_of_them_waiting(office: Office) -> None:
    ends = Ends(office.store.views)

    class Leaves(threading.Event):
        def set(self) -> None:
            super().set()
            ends._waiting[1].remove(self)

    all_ = [Leaves() for _ in range(4)]
    ends._waiting[1] = [*all_]
    ends.hear([Event(1, 1, 0, DONE, "", "", 1, "", "")])
    assert [one.is_set() for one in all_] == [True] * 4


def test_a_wait_ends_when_nobody_listens_any_more(office: Office) -> None:
    id = office.store.submit()
    alive = [True, True]
    assert office.ends.wait(id, 20, lambda: bool(alive and alive.pop())) is None
    assert office.ends._waiting == {}


def test_ends_that_nobody_waits_for_cost_nothing(office: Office) -> None:
    office.ends.hear([Event(1, 1, 1, DONE, "", "", 1, "", "")])
    assert office.ends._waiting == {}


@pytest.mark.parametrize("timeout_s", [None, 10])
def test_an_end_that_nobody_tells_of_is_seen_now_and_then(
    office: Office, monkeypatch: pytest.MonkeyPatch, timeout_s: float | None
) -> None:
    monkeypatch.setattr("upq.desk.LOOK_S", 0.05)
    ends = Ends(office.store.views)  # no subscriber of the bus
    id = office.store.submit()
    seen: list[Any] = []
    waiter = threading.Thread(target=lambda: seen.append(ends.wait(id, timeout_s)), daemon=True)
    waiter.start()
    until(lambda: ends._waiting)
    office.end(office.store.claim_one())
    waiter.join(5)
    assert [end.state for end in seen] == [DONE]
