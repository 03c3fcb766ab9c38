from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from upq import UpqJob
from upq import pool as module
from upq.job import RUNNING, Job
from upq.pool import LOOK_AHEAD_JOBS, Pool, SharedPool

numbers = itertools.count(1)


def claimed(type: str = "work") -> Job:
    id = next(numbers)
    return Job(id, 1, type, type, RUNNING, "", {}, {}, {}, 0, None, 1, 1, 0, 1000 + id, False,
               None, id, "", None, "", None, 0, 0, None)  # fmt: skip


def until(holds: Callable[[], object], seconds: float = 10) -> None:
    over = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < over, "it never came to that"
        time.sleep(0.002)


class Work:
    """In the runner's place: each job runs until it is let go, or does what `act` says."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.ended: list[int] = []
        self.most = self._now = 0
        self.act: Callable[[Job], None] | None = None
        self.plugins: dict[int, UpqJob] = {}
        self.wakes = 0
        self._lock = threading.Lock()
        self._gates: dict[int, threading.Event] = {}

    def gate(self, id: int) -> threading.Event:
        with self._lock:
            return self._gates.setdefault(id, threading.Event())

    def run(self, job: Job, begun: Callable[[UpqJob], None]) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.started.append(job.id)
        try:
            plugin = self.plugins[job.id] = UpqJob(job.type, {}, jobid=job.id)
            plugin.token = job.token
            begun(plugin)
            if self.act is not None:
                self.act(job)
            else:
                self.gate(job.id).wait(20)
        finally:
            with self._lock:
                self._now -= 1
                self.ended.append(job.id)

    def let_go(self, *jobs: Job) -> None:
        for job in jobs:
            self.gate(job.id).set()

    def wake(self) -> None:
        self.wakes += 1

    def pool(self, concurrent: int) -> Pool:
        return Pool("work", concurrent, self, self.wake)  # type: ignore[arg-type]


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.let_go(*[claimed()._replace(id=id) for id in made.started])


def give(pool: Pool, *jobs: Job) -> None:
    """As the claimer does: room is booked first, more than there is when need be."""
    assert pool.give(pool.book(), jobs) == ()


# Places


def test_no_more_is_booked_than_there_are_places(work: Work) -> None:
    pool = work.pool(3)
    assert pool.book() == 3
    assert pool.book() == 0
    assert pool.give(3, [claimed()]) == ()
    assert pool.book() == 2
    assert pool.give(2, []) == ()
    assert pool.book() == 2


def test_no_more_run_than_there_are_places(work: Work) -> None:
    pool = work.pool(3)
    jobs = [claimed() for _ in range(9)]
    give(pool, *jobs)
    until(lambda: len(work.started) == 3)
    assert pool.book() == 0
    for n, job in enumerate(jobs, 1):
        work.let_go(job)
        until(lambda n=n: len(work.ended) == n)  # type: ignore[misc]
    assert (work.most, work.started) == (3, [job.id for job in jobs])


def test_threads_are_started_only_when_they_are_needed(work: Work) -> None:
    pool = work.pool(8)
    assert pool.sizes()["threads"] == 0
    for n in range(5):
        job = claimed()
        give(pool, job)
        work.let_go(job)
        until(lambda n=n: len(work.ended) == n + 1 and pool._idle)  # type: ignore[misc]
    assert pool.sizes() == {"running": 0, "threads": 1, "places": 8}


def test_threads_that_parents_leave_over_go_when_these_have_ended(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 1000)
    pool = work.pool(1)
    go_on = threading.Event()

    def wait(job: Job) -> None:
        pool.park(job.token)
        go_on.wait(20)
        pool.unpark(job.token)

    work.act = wait
    for n in range(30):
        give(pool, claimed())
        until(lambda n=n: len(pool._parked) == n + 1)  # type: ignore[misc]
    assert pool.sizes()["threads"] >= 30
    go_on.set()
    until(lambda: len(work.ended) == 30)
    until(lambda: pool.sizes()["threads"] <= 1 + module.SPARE_THREADS)
    job = claimed()
    give(pool, job)
    until(lambda: job.id in work.ended)


def test_idle_threads_retire_but_one(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    pool = work.pool(4)
    jobs = [claimed() for _ in range(4)]
    give(pool, *jobs)
    until(lambda: pool.sizes()["threads"] == 4)
    work.let_go(*jobs)
    until(lambda: pool.sizes()["threads"] == 1)
    time.sleep(0.15)
    assert pool.sizes()["threads"] == 1
    more = [claimed() for _ in range(4)]
    give(pool, *more)
    until(lambda: len(work.started) == 8)
    work.let_go(*more)


def test_no_job_is_left_lying_when_threads_retire(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.001)
    work.act = lambda job: None
    pool = work.pool(4)
    for n in range(1, 301):
        give(pool, claimed(), claimed())
        until(lambda n=n: len(work.ended) == 2 * n)  # type: ignore[misc]
        time.sleep(0.0005 * (n % 5))


def test_a_runner_that_fails_costs_no_place(work: Work) -> None:
    def fail(job: Job) -> None:
        raise ValueError("a fault of ours")

    pool = work.pool(1)
    work.act = fail
    give(pool, claimed(), claimed(), claimed())
    until(lambda: len(work.ended) == 3)
    until(lambda: pool.sizes()["running"] == 0)
    assert pool.running() == []


def test_the_claimer_is_woken_when_a_place_is_free(work: Work) -> None:
    work.act = lambda job: None
    pool = work.pool(1)
    give(pool, claimed())
    until(lambda: pool.sizes()["running"] == 0 and work.wakes)


def test_more_places_are_used_at_once(work: Work) -> None:
    pool = work.pool(1)
    jobs = [claimed() for _ in range(3)]
    give(pool, *jobs)
    until(lambda: len(work.started) == 1)
    pool.resize(3)
    assert work.wakes
    give(pool)
    until(lambda: len(work.started) == 3)
    work.let_go(*jobs)


def test_fewer_places_hold_from_the_next_job_on(work: Work) -> None:
    pool = work.pool(3)
    jobs = [claimed() for _ in range(6)]
    give(pool, *jobs)
    until(lambda: len(work.started) == 3)
    pool.resize(1)
    assert pool.book() == 0
    work.let_go(*jobs[:2])
    until(lambda: len(work.ended) == 2)
    time.sleep(0.05)
    assert len(work.started) == 3
    work.let_go(jobs[2])
    until(lambda: len(work.started) == 4)
    work.let_go(*jobs)
    until(lambda: len(work.ended) == 6)


@pytest.fixture
def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is short and what is soon in a measure that a loaded machine keeps to."""
    monkeypatch.setattr(module, "SHORT_S", 40 * module.SHORT_S)
    monkeypatch.setattr(module, "SOON_S", 40 * module.SOON_S)


@pytest.mark.usefixtures("slower")
def test_short_jobs_are_left_to_few_threads(work: Work) -> None:
    pool = work.pool(4)
    by_round: list[set[int]] = []

    def act(_: Job) -> None:
        by_round[-1].add(threading.get_ident())
        time.sleep(0.0001)

    work.act = act
    for n in range(60):
        by_round.append(set())
        give(pool, *[claimed() for _ in range(50)])
        until(lambda n=n: len(work.ended) == 50 * (n + 1))  # type: ignore[misc]
    used = [len(threads) for threads in by_round[30:]]  # by now they are known to be short
    assert sum(used) / len(used) < 2


@pytest.mark.usefixtures("slower")
def test_behind_one_that_is_long_short_jobs_do_not_wait(work: Work) -> None:
    pool = work.pool(4)
    work.act = lambda _: None
    for n in range(30):
        give(pool, *[claimed() for _ in range(20)])
        until(lambda n=n: len(work.ended) == 20 * (n + 1))  # type: ignore[misc]
    long = claimed()

    def act(job: Job) -> None:
        if job == long:
            work.gate(job.id).wait(20)

    work.act = act
    began_s = time.monotonic()
    give(pool, long, *[claimed() for _ in range(40)])
    until(lambda: len(work.ended) == 640)
    assert time.monotonic() - began_s < 5 * module.SOON_S
    # While it goes on, those that come later do not wait for it at all.
    took_s = []
    for n in range(20):
        time.sleep(0.002)
        began_s = time.monotonic()
        give(pool, claimed())
        until(lambda n=n: len(work.ended) == 641 + n)  # type: ignore[misc]
        took_s.append(time.monotonic() - began_s)
    assert sorted(took_s)[10] < module.SOON_S / 4
    work.let_go(long)
    until(lambda: len(work.ended) == 661)


# Ahead


def test_long_jobs_are_never_claimed_ahead(work: Work) -> None:
    work.act = lambda job: time.sleep(0.05)
    pool = work.pool(2)
    for n in range(1, 4):
        give(pool, claimed(), claimed())
        until(lambda n=n: len(work.ended) == 2 * n and pool.sizes()["running"] == 0)  # type: ignore[misc]
        room = pool.book()
        assert room == 2
        pool.give(room, [])


def test_short_jobs_are_claimed_ahead_within_bounds(work: Work) -> None:
    work.act = lambda job: None
    pool = work.pool(2)
    for n in range(1, 401):
        give(pool, claimed())
        until(lambda n=n: len(work.ended) == n)  # type: ignore[misc]
    until(lambda: pool.sizes()["running"] == 0)
    assert 2 < pool.book() <= 2 + LOOK_AHEAD_JOBS


def test_one_long_job_ends_the_claims_ahead(work: Work) -> None:
    work.act = lambda job: None
    pool = work.pool(1)
    for n in range(1, 201):
        give(pool, claimed())
        until(lambda n=n: len(work.ended) == n)  # type: ignore[misc]
    work.act = lambda job: time.sleep(0.1)
    give(pool, claimed())
    until(lambda: len(work.ended) == 201 and pool.sizes()["running"] == 0)
    assert pool.book() == 1


def test_what_a_thread_is_about_to_start_is_not_taken_back(work: Work) -> None:
    work.act = lambda job: None
    pool = work.pool(1)
    first, second = claimed(), claimed()
    give(pool, first)
    until(lambda: pool._idle == 1)
    with pool._lock:  # as when the machine stands still: the thread is told, and does not run
        give(pool, second)
        time.sleep(0.02)
        assert pool.take_back(0.01) == []
    until(lambda: work.ended == [first.id, second.id])


def test_what_does_not_start_in_time_is_taken_back(work: Work) -> None:
    pool = work.pool(1)
    running, *ahead = [claimed() for _ in range(3)]
    give(pool, running, *ahead)
    until(lambda: work.started == [running.id])
    assert pool.take_back(30) == []
    assert pool.has_claimed()
    assert pool.take_back() == ahead
    assert not pool.has_claimed()
    assert pool.take_back() == []
    work.let_go(running)
    until(lambda: work.ended == [running.id])
    time.sleep(0.02)
    assert work.started == [running.id]


# Waiting parents


def test_a_waiting_parent_gives_its_place_to_another(work: Work) -> None:
    pool = work.pool(1)
    parent, child = claimed(), claimed()
    goes_on = threading.Event()

    def wait_for_child(job: Job) -> None:
        if job is parent:
            pool.park(job.token)
            work.gate(child.id).wait(10)
            pool.unpark(job.token)
            goes_on.set()

    work.act = wait_for_child
    give(pool, parent)
    until(lambda: work.started == [parent.id] and pool.sizes()["running"] == 0)
    until(lambda: work.wakes)
    give(pool, child)
    until(lambda: child.id in work.ended)
    until(lambda: [job for job, _ in pool.running()] == [parent])
    work.let_go(child)
    assert goes_on.wait(10)
    until(lambda: pool.sizes()["running"] == 0 and pool.running() == [])


def test_a_parent_that_goes_on_takes_the_next_place_before_new_claims(work: Work) -> None:
    pool = work.pool(1)
    parent, child, *others = [claimed() for _ in range(5)]
    order: list[str] = []

    def act(job: Job) -> None:
        if job is parent:
            pool.park(job.token)
            work.gate(parent.id).wait(10)
            pool.unpark(job.token)
            order.append("parent")
        else:
            order.append("child" if job is child else "other")
            work.gate(job.id).wait(10)

    work.act = act
    give(pool, parent)
    until(lambda: work.started == [parent.id] and pool.sizes()["running"] == 0)
    give(pool, child, *others)
    until(lambda: order == ["child"])
    work.let_go(parent)  # it wants to go on, and the place is taken
    until(lambda: pool._resuming == 1)
    assert pool.book() == 0
    work.let_go(child, *others)
    until(lambda: len(work.ended) == 5)
    assert order == ["child", "parent", "other", "other", "other"]
    until(lambda: pool.sizes()["running"] == 0)


def test_parents_and_children_of_one_type_finish_to_any_depth(work: Work) -> None:
    depth = 50
    pool = work.pool(1)
    jobs = [claimed() for _ in range(depth)]
    order: list[int] = []

    def act(job: Job) -> None:
        at = jobs.index(job)
        if at + 1 < depth:
            give(pool, jobs[at + 1])
            pool.park(job.token)
            work.gate(jobs[at + 1].id).wait(20)
            pool.unpark(job.token)
        order.append(at)
        work.let_go(job)

    work.act = act
    give(pool, jobs[0])
    until(lambda: len(work.ended) == depth, 30)
    assert order == list(range(depth))[::-1]
    until(lambda: pool.sizes()["running"] == 0)


def test_many_parents_at_once_lose_no_place(work: Work) -> None:
    pool = work.pool(2)

    def act(job: Job) -> None:
        pool.park(job.token)
        time.sleep(0.001 * (job.id % 4))
        pool.unpark(job.token)

    work.act = act
    jobs = [claimed() for _ in range(60)]
    give(pool, *jobs)
    until(lambda: len(work.ended) == 60, 30)
    until(lambda: pool.sizes()["running"] == 0)
    assert pool.book() >= 2


def test_a_place_that_a_parent_given_up_does_not_take_is_the_next_ones(work: Work) -> None:
    pool = work.pool(1)
    first, second, running = claimed(), claimed(), claimed()

    def act(job: Job) -> None:
        if job is not running:
            pool.park(job.token)
        work.gate(job.id).wait(10)
        if job is not running:
            pool.unpark(job.token)

    work.act = act
    give(pool, first, second)
    until(lambda: len(work.started) == 2 and pool.sizes()["running"] == 0)
    give(pool, running)
    until(lambda: len(work.started) == 3)
    for n, parent in enumerate((first, second), 1):
        work.let_go(parent)
        until(lambda n=n: pool._resuming == n)  # type: ignore[misc]
    assert pool.abandon(second.token) == second
    work.let_go(running)
    until(lambda: first.id in work.ended)
    until(lambda: pool.sizes()["running"] == 0)


def returning(
    work: Work, pool: Pool, at_once: Callable[[], bool] = lambda: False
) -> tuple[Job, Job]:
    """A parent that wants its place again, the only one, and the job that has it."""
    parent, other = claimed(), claimed()

    def act(job: Job) -> None:
        if job is parent:
            pool.park(job.token)
            work.gate(parent.id).wait(10)
            pool.unpark(job.token, at_once)
        else:
            work.gate(job.id).wait(10)

    work.act = act
    give(pool, parent)
    until(lambda: work.started == [parent.id] and pool.sizes()["running"] == 0)
    give(pool, other)
    until(lambda: len(work.started) == 2)
    work.let_go(parent)
    until(lambda: pool._resuming == 1)
    return parent, other


def test_a_parent_that_is_to_end_does_not_wait_for_its_place(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    pool, ends = work.pool(1), threading.Event()
    parent, other = returning(work, pool, ends.is_set)
    ends.set()
    until(lambda: work.ended == [parent.id])
    work.let_go(other)


@pytest.mark.parametrize("how", ["end", "park", "more", "close", "to end"])
def test_a_parent_waits_for_a_place_of_its_type_without_a_look(
    work: Work, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """In a pool of several types; eight parents of one that may have two places of all."""
    monkeypatch.setattr(module, "LOOK_S", 0.01 if how == "to end" else 60)
    pool, ends = SharedPool("s", 20, work, work.wake), threading.Event()  # type: ignore[arg-type]
    pool.most = {"work": 2}
    parents, busy = [claimed() for _ in range(8)], [claimed(), claimed()]
    parked, gone_on = threading.Semaphore(0), []
    go_on, rest = threading.Event(), threading.Event()

    def act(job: Job) -> None:
        if job in busy:
            work.gate(job.id).wait(20)
            if how == "park":
                pool.park(job.token)
                rest.wait(20)
                pool.unpark(job.token)
            return
        pool.park(job.token)
        parked.release()
        go_on.wait(20)
        pool.unpark(job.token, ends.is_set)
        gone_on.append(job)

    work.act = act
    give(pool, *parents)
    for _ in parents:
        assert parked.acquire(timeout=20)
    give(pool, *busy)
    until(lambda: len(work.started) == 10)
    go_on.set()
    until(lambda: pool._held_up["work"] == 8)
    assert (pool.left(), gone_on) == ({"work": 0}, [])
    if how == "more":
        pool.most = {"work": 5}
        pool.resize(20)
    elif how == "close":
        pool.close()
    elif how == "to end":
        ends.set()
    else:
        work.let_go(busy[0])
    until(lambda: len(gone_on) == 8)
    assert pool._held_up["work"] == 0
    rest.set()
    work.let_go(*busy)


def test_a_parent_goes_on_when_the_pool_is_closed(work: Work) -> None:
    pool = work.pool(1)
    parent, other = returning(work, pool)
    pool.close()
    until(lambda: work.ended == [parent.id])
    work.let_go(other)


# Cancel, close


def test_a_running_job_is_asked_to_end(work: Work) -> None:
    pool = work.pool(1)
    job = claimed()
    give(pool, job)
    until(lambda: pool.running() and pool.running()[0][1])
    pool.cancel(job.token)
    assert work.plugins[job.id].cancelled
    work.let_go(job)


def test_a_job_that_is_about_to_start_is_asked_to_end(work: Work) -> None:
    pool = work.pool(1)
    running, ahead = claimed(), claimed()
    give(pool, running, ahead)
    until(lambda: running.id in work.plugins)
    pool.cancel(ahead.token)
    assert not work.plugins[running.id].cancelled
    work.let_go(running)
    until(lambda: ahead.id in work.plugins)
    until(lambda: work.plugins[ahead.id].cancelled)
    work.let_go(ahead)


def test_a_cancel_comes_before_its_job_is_handed_over(work: Work) -> None:
    pool = work.pool(1)
    job = claimed()
    room = pool.book()
    pool.cancel(job.token)  # the claim is committed, and not told yet
    pool.give(room, [job])
    until(lambda: job.id in work.plugins)
    until(lambda: work.plugins[job.id].cancelled)
    work.let_go(job)


def test_cancels_of_what_is_not_here_leave_nothing_behind(work: Work) -> None:
    pool = work.pool(1)
    for token in range(100):
        pool.cancel(token)
    assert not pool._asked_to_end


def test_a_closed_pool_takes_nothing(work: Work) -> None:
    pool = work.pool(2)
    running, late = claimed(), claimed()
    give(pool, running)
    until(lambda: work.started == [running.id])
    room = pool.book()
    pool.close()
    assert pool.book() == 0
    assert list(pool.give(room, [late])) == [late]
    assert not pool.has_claimed()
    work.let_go(running)
    until(lambda: pool.sizes()["threads"] == 0)
    assert work.started == [running.id]


def test_a_machine_without_threads_left_gets_its_jobs_back(
    work: Work, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = work.pool(2)
    jobs = [claimed(), claimed()]
    with monkeypatch.context() as poor:
        poor.setattr(threading.Thread, "start", no_more)
        with suppress(RuntimeError):
            give(pool, *jobs)
    assert "TasksMax" in caplog.text
    assert pool.take_back() == jobs
    give(pool, *jobs)
    until(lambda: len(work.started) == 2)
    work.let_go(*jobs)


def test_what_runs_is_known_by_its_claim(work: Work) -> None:
    pool = work.pool(1)
    job = claimed()
    give(pool, job)
    until(lambda: work.started == [job.id])
    assert pool.job(job.token) == job
    assert pool.job(job.token + 1) is None
    assert [one for one, _ in pool.running()] == [job]
    work.let_go(job)
    until(lambda: pool.job(job.token) is None)
