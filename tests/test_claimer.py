from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stores import Store
from tests.test_pool import until
from upq import UpqJob, when
from upq import claimer as module
from upq.changes import Want
from upq.claimer import SLEEP_S, Claimer
from upq.errors import Unavailable
from upq.job import DONE, QUEUED, RUNNING, Job, NewJob, Outcome
from upq.pool import Pool


class Line:
    """Pools and a claimer over a store; its jobs do what `act` says, and end well."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.held = ""
        self.started: list[int] = []
        self.act: Callable[[Job], None] = lambda job: None
        self.claimer = Claimer(store.queue, self, lambda lane: self.held)  # type: ignore[arg-type]
        self._thread: threading.Thread | None = None

    def run(self, job: Job, begun: Callable[[UpqJob], None]) -> None:
        self.started.append(job.id)
        self.act(job)
        self.store.queue.finish(job, Outcome(DONE))

    def give_back(self, job: Job, reason: str) -> None:
        self.store.queue.finish(job, Outcome(QUEUED, reason=reason, counts=False))

    def pool(self, type: str = "hash", concurrent: int = 1) -> Pool:
        pool = Pool(type, concurrent, self, self.claimer.room)  # type: ignore[arg-type]
        self.claimer.pools = {**self.claimer.pools, type: pool}
        return pool

    def begin(self) -> None:
        self._thread = threading.Thread(target=self.claimer.run)
        self._thread.start()

    def end(self) -> None:
        self.claimer.stop()
        self.claimer.close_pools()
        if self._thread:
            self._thread.join(10)
        assert self.claimer.flush(time.monotonic() + 10)

    def done(self) -> int:
        return sum(states.get(DONE, 0) for states in self.store.views.counts().values())


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with Store(f"sqlite:///{tmp_path}/upq.db") as store:
        made = Line(store)
        yield made
        made.end()


def test_what_is_queued_runs_at_once_and_all_of_it(line: Line) -> None:
    line.pool(concurrent=4)
    line.begin()
    for _ in range(20):
        line.store.accepted(*[NewJob("hash", {}) for _ in range(25)])
    until(lambda: line.done() == 500, 30)
    assert sorted(line.started) == list(range(1, 501))


def test_many_threads_that_submit_lose_no_wake_up(line: Line) -> None:
    line.pool("hash", 2)
    line.pool("reverify", 1)
    line.begin()

    def submit(type: str) -> None:
        for n in range(60):
            line.store.submit(type)
            if n % 7 == 0:
                time.sleep(0.003)

    threads = [threading.Thread(target=submit, args=(t,)) for t in ("hash", "reverify") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    until(lambda: line.done() == 360, 30)


def test_what_waited_before_the_start_is_claimed(line: Line) -> None:
    ids = [line.store.submit() for _ in range(3)]
    line.pool()
    line.claimer.heat()
    line.begin()
    until(lambda: line.started == ids)


def test_only_free_places_are_claimed(line: Line) -> None:
    gate = threading.Event()
    line.act = lambda job: gate.wait(10) and None
    line.pool(concurrent=2)
    line.begin()
    line.store.accepted(*[NewJob("hash", {}) for _ in range(9)])
    until(lambda: len(line.started) == 2)
    time.sleep(0.1)
    assert len(line.store.jobs([], state=RUNNING)) == 2
    gate.set()
    until(lambda: line.done() == 9)


def test_types_never_block_each_other(line: Line) -> None:
    gate = threading.Event()
    line.act = lambda job: gate.wait(10) and None if job.type == "hash" else None
    line.pool("hash")
    line.pool("reverify")
    line.begin()
    line.store.accepted(*[NewJob("hash", {}) for _ in range(5)])
    line.store.accepted(*[NewJob("reverify", {}) for _ in range(5)])
    until(lambda: line.done() == 5)
    gate.set()


def test_queues_of_one_type_share_its_places(line: Line) -> None:
    line.act = lambda job: time.sleep(0.02)
    line.pool()
    line.store.accepted(*[NewJob("hash", {}) for _ in range(30)])
    urgent = line.store.submit(queue="other", priority=10)
    line.claimer.heat()
    line.begin()
    until(lambda: urgent in line.started)
    assert line.started.index(urgent) < 20


def test_queues_of_one_type_take_turns_also_while_jobs_come(line: Line) -> None:
    line.pool()
    one, two, new = (line.store.queue.lane(name, "hash").id for name in ("one", "two", "new"))
    first = set()
    for _ in range(6):
        for lanes in ({new}, {one, two}):  # a submit, and a step of the loop
            booked = line.claimer.book(lanes)
            line.claimer.settle(set(), booked, [])
            first.add(booked[0][0])
    assert first == {one, two, new}


@pytest.mark.parametrize("jobs", [["last"], ["first", "last"]])
def test_room_that_one_queue_leaves_is_there_for_the_next(line: Line, jobs: list[str]) -> None:
    go = threading.Event()
    line.act = lambda job: go.wait(10) and None
    line.pool(concurrent=2)
    for name in ("first", "second", "last"):
        line.store.queue.lane(name, "hash")
    line.held = "paused"
    line.begin()
    ids = [line.store.submit(queue=name) for name in jobs]
    line.held = ""
    line.claimer.heat()
    until(lambda: sorted(line.started) == ids)
    go.set()


def test_queues_in_which_nothing_is_queued_are_not_looked_into(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a database that others write to, too, whose jobs nobody tells us of."""
    queue = line.store.queue
    monkeypatch.setattr(type(queue), "shared", True)
    monkeypatch.setattr(module, "POLL_S", 0.05)
    looks: list[int] = []

    def look() -> set[int]:
        looks.append(len(claims))
        return laden()

    def claim(wants: list[Want]) -> list[Job]:
        claims.extend(wants)
        return claimed(wants)

    claims: list[Want] = []
    laden, claimed = queue.laden, queue.claim
    monkeypatch.setattr(queue, "laden", look)
    monkeypatch.setattr(queue, "claim", claim)
    for n in range(20):
        queue.lane(f"queue{n}", "hash")
    line.pool()
    id = line.store.submit(queue="queue17")
    line.begin()
    until(lambda: line.started == [id])
    until(lambda: len(looks) > 5)
    assert len(claims) < 10


def test_a_type_without_a_pool_waits(line: Line) -> None:
    line.begin()
    line.store.submit()
    time.sleep(0.05)
    assert line.claimer.step() == SLEEP_S
    assert line.store.jobs([])[0]["state"] == QUEUED


def test_a_place_that_is_freed_while_a_submit_is_committed_is_not_forgotten(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLEEP_S", 1000)
    gate, claims = threading.Event(), threading.Event()
    line.act = lambda job: gate.wait(10) and None
    line.pool()
    line.begin()
    first = line.store.submit()
    until(lambda: line.started == [first])
    claim, settle = line.store.queue.claim, line.claimer.settle

    def noted(wants: list[Want]) -> list[Job]:
        if gate.is_set():
            claims.set()
        return claim(wants)

    def late(queued: set[int], booked: list[Want], jobs: list[Job]) -> None:
        if queued and not gate.is_set():  # the submit found no room
            gate.set()
            assert claims.wait(10)  # and the claimer comes for what has ended, behind us
        settle(queued, booked, jobs)

    monkeypatch.setattr(line.store.queue, "claim", noted)
    monkeypatch.setattr(line.claimer, "settle", late)
    second = line.store.submit()
    until(lambda: line.started == [first, second])


def test_a_job_of_a_far_year_stops_nobody(line: Line) -> None:
    line.pool()
    line.begin()
    line.store.submit(run_at=when.now() + 900 * 365 * 86400 * 1_000_000)
    until(lambda: line.claimer._rests_until_s not in {0.0, float("inf")})
    line.store.submit()
    until(lambda: line.done() == 1)


def test_a_held_lane_is_passed_over_until_it_is_free(line: Line) -> None:
    line.held = "paused"
    line.pool()
    line.begin()
    line.store.submit()
    time.sleep(0.05)
    assert line.started == []
    line.held = ""
    line.claimer.heat()
    until(lambda: line.done() == 1)


def test_a_job_with_a_time_starts_then(line: Line) -> None:
    line.pool()
    line.begin()
    at = when.now() + 500_000
    line.store.submit(run_at=at)
    line.store.submit(run_at=at + 3_600_000_000)
    until(lambda: line.done() == 1)  # nothing but its time wakes the claimer
    assert line.store.row(1).started_at >= at


def test_a_sooner_time_is_not_missed(line: Line) -> None:
    line.pool()
    line.begin()
    line.store.submit(run_at=when.now() + 3_600_000_000)
    time.sleep(0.05)
    line.store.submit(run_at=when.now() + 100_000)
    until(lambda: line.done() == 1)


def test_drained_it_claims_nothing_and_gives_back_what_has_not_started(line: Line) -> None:
    gate = threading.Event()
    line.act = lambda job: gate.wait(10) and None
    pool = line.pool()
    line.begin()
    first = line.store.submit()
    until(lambda: line.started == [first])
    (ahead,) = (line.store.submit(), *line.store.claim(1))[1:]
    pool.give(0, [ahead])
    line.claimer.drain()
    until(lambda: line.store.views.job(ahead.id)["reason"] == "drained")
    line.store.submit()
    gate.set()
    until(lambda: line.done() == 1)
    time.sleep(0.05)
    assert line.started == [first]
    line.claimer.drained = False
    line.claimer.heat()
    until(lambda: line.done() == 3)


def test_what_is_claimed_ahead_and_does_not_start_is_given_back(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALE_S", 0.05)
    gate = threading.Event()
    line.act = lambda job: gate.wait(10) and None
    pool = line.pool()
    line.begin()
    first = line.store.submit()
    until(lambda: line.started == [first])
    second = line.store.submit()
    pool.give(0, line.store.claim(1))
    line.claimer.wake()
    until(lambda: line.store.views.job(second)["reason"] == "claimed ahead")
    assert line.store.views.job(second)["attempt"] == 0
    gate.set()
    until(lambda: line.done() == 2)
    assert line.started == [first, second]


def test_while_the_database_is_away_no_place_is_lost(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.02)
    line.store.submit()
    line.pool()
    claim, away = line.store.queue.claim, [1, 1, 1]

    def failing(wants: list[tuple[int, int]]) -> list[Job]:
        if wants and away:
            away.pop()
            raise Unavailable("away")
        return claim(wants)

    monkeypatch.setattr(line.store.queue, "claim", failing)
    line.claimer.heat()
    line.begin()
    until(lambda: line.done() == 1)
    assert away == []


def test_after_an_outage_strays_are_put_back_and_run(line: Line) -> None:
    """A claim that was committed while the line was cut: nobody runs its job."""
    id = line.store.submit()
    stray = line.store.claim_one()
    line.pool()
    line.store.queue._held.discard(stray.token)
    line.store.queue.writer.recoveries += 1
    line.begin()
    line.claimer.wake()
    until(lambda: line.done() == 1)
    assert line.started == [id]


def test_it_sleeps_when_there_is_nothing_to_do(line: Line) -> None:
    steps: list[float] = []
    step = line.claimer.step
    line.claimer.step = lambda: steps.append(1) or step()  # type: ignore[method-assign]
    line.pool()
    line.begin()
    line.store.submit()
    until(lambda: line.done() == 1)
    time.sleep(0.1)
    before = len(steps)
    time.sleep(0.4)
    assert len(steps) - before <= 1


def test_stopped_it_claims_nothing_more(line: Line) -> None:
    line.pool()
    line.begin()
    line.end()
    line.store.submit()
    assert line.claimer.book({1}) == []
    assert line.store.jobs([])[0]["state"] == QUEUED


def test_ends_of_jobs_go_along_with_the_next_submits(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commit a job, not two, for somebody who submits one after another."""
    for name in ("LINGER_S", "LINGER_MOST_S", "POLL_S"):  # whatever else the machine does
        monkeypatch.setattr(module, name, 60)
    line.pool(concurrent=1)
    line.begin()
    queue, jobs, before, ended = line.store.queue, 100, 0, list[int]()
    finish = queue.finish

    def noted(job: Job, *given: Any) -> None:
        finish(job, *given)
        ended.append(job.id)

    monkeypatch.setattr(queue, "finish", noted)
    for n in range(20 + jobs):
        if n == 20:
            before = queue.writer.commits
        line.store.submit()
        until(lambda n=n: len(ended) > n)  # type: ignore[misc]
    assert queue.writer.commits - before < 1.2 * jobs
    line.claimer.wake()
    until(lambda: line.done() == 20 + jobs)


def test_an_end_that_nobody_takes_along_is_committed_soon(line: Line) -> None:
    line.pool(concurrent=1)
    line.begin()
    waits_s = []
    for n in range(1, 60):
        line.store.submit()
        began_s = time.monotonic()
        until(lambda n=n: line.done() == n)  # type: ignore[misc]
        waits_s.append(time.monotonic() - began_s)
    assert sorted(waits_s)[30] < 0.5
