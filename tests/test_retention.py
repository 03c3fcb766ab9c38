"""How long ended jobs stay: as their type says, or [db]; and what it costs to look."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa

from tests import stores
from tests.store_bench import crowd
from tests.stores import Store
from tests.test_queue import FEW_ROWS_MS, at_once, counted, end, measured, tallied
from upq import schema, when
from upq.batch import Batch
from upq.clauses import CHUNK
from upq.errors import NotFound
from upq.job import (
    CANCELLED,
    DONE,
    EXPIRED,
    FAILED,
    QUEUED,
    Accepted,
    Gather,
    Limits,
    NewJob,
    Outcome,
    Output,
)
from upq.jobsettings import JobSettings
from upq.kinds import Unique
from upq.limits import Limiter
from upq.retention import Retention, kept_s
from upq.settings import Db, Settings
from upq.sql import Sql, Tx
from upq.statements.retention import DELETE_EVENTS

database, url, store = stores.database, stores.url, stores.store

DAY_S = 86400.0
STATES = (DONE, FAILED, CANCELLED, EXPIRED)


def retention(store: Store, *types: JobSettings) -> Retention:
    db = Db(keep_done_s=14 * DAY_S, keep_failed_s=90 * DAY_S)
    return Retention(store.queue, Settings("upq.cfg", db=db, jobs={one.name: one for one in types}))


def step(of: Retention) -> None:
    of.step(lambda seconds: False)


def ended(store: Store, type: str, state: str, days_ago: float, *after: int) -> int:
    """A job that has ended so many days ago."""
    id = store.submit(type, after=after)
    if state == CANCELLED:
        store.queue.cancel(id, "root")
    else:
        output = Output("x", 1, False)
        store.queue.finish(store.claim_one(type), Outcome(state, output=output))
        store.flush()
    age(store, id, days_ago)
    return id


def age(store: Store, id: int, days_ago: float) -> None:
    job = schema.job
    at = when.now() - round(days_ago * DAY_S * 1e6)
    store.change(sa.update(job).values(ended_at=at).where(job.c.id == id))


def left(store: Store) -> set[int]:
    return {row[0] for row in store.fetch(sa.select(schema.job.c.id))}


def test_a_type_may_keep_its_jobs_longer_or_shorter(store: Store) -> None:
    types = (
        JobSettings("short", keep_s=DAY_S),
        JobSettings("long", keep_s=365 * DAY_S, keep_done_s=30 * DAY_S),
        JobSettings("usual"),
    )
    keeps = {"short": (1, 1), "long": (30, 365), "usual": (14, 90), "gone": (14, 90)}
    kept, old = set(), set()
    for type, (done, failed) in keeps.items():
        for state in (DONE, FAILED, CANCELLED):
            days = done if state == DONE else failed
            kept.add(ended(store, type, state, days - 0.1))
            old.add(ended(store, type, state, days + 0.1))
    step(retention(store, *types))
    assert left(store) == kept
    rows = {row[0] for row in store.fetch(sa.select(schema.event.c.job))}
    outputs = {row[0] for row in store.fetch(sa.select(schema.output.c.job))}
    assert rows == kept and outputs < kept, "history and output go with them"
    tally = store.fetch(sa.select(sa.func.sum(schema.tally.c.n)))
    assert tally == [(len(kept),)]


def test_what_is_said_nearer_wins() -> None:
    db = Db(keep_done_s=1, keep_failed_s=2)
    job = JobSettings("a", keep_s=3, keep_failed_s=4)
    assert [kept_s(job, db, state) for state in STATES] == [3, 4, 4, 4]
    assert [kept_s(JobSettings("a"), db, state) for state in STATES] == [1, 2, 2, 2]
    assert kept_s(JobSettings("a", keep_s=0), db, DONE) == 0


def test_what_others_wait_for_stays_and_goes_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    awaited = ended(store, "a", FAILED, 100)
    store.submit("a", after=(awaited,))
    parent = store.submit("p")
    running = store.claim_one("p")
    child = store.submit("a", parent=parent, root=parent)
    store.queue.finish(store.claim_one("a"), Outcome(DONE))
    store.flush()
    age(store, child, 100)
    rest = ended(store, "a", DONE, 100)
    made = retention(store, JobSettings("a", keep_s=DAY_S), JobSettings("b", keep_s=2 * DAY_S))
    step(made)
    assert {awaited, child} <= left(store) and rest not in left(store)
    store.queue.finish(running, Outcome(DONE))
    store.flush()
    step(made)
    assert child in left(store), "it is looked at again within the hour"
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 3601)
    step(made)
    assert child not in left(store)
    assert awaited in left(store)


def test_a_reload_changes_what_is_kept(store: Store) -> None:
    id = ended(store, "a", DONE, 5)
    made = retention(store, JobSettings("a"))
    step(made)
    assert left(store) == {id}
    made.configure(Settings("upq.cfg", jobs={"a": JobSettings("a", keep_s=DAY_S)}))
    step(made)
    assert left(store) == set()


def test_a_step_goes_on_where_the_last_one_stopped(store: Store) -> None:
    """Many that have ended at the same microsecond, and many that are kept for longer before."""
    kept = ended(store, "long", DONE, 30)
    store.copy(kept, 2 * CHUNK)
    old = ended(store, "a", DONE, 20)
    store.copy(old, 2 * CHUNK)
    made = retention(store, JobSettings("long", keep_s=365 * DAY_S))
    steps = 0
    while len(left(store)) > 2 * CHUNK + 1:
        made.step(lambda seconds: True)  # the daemon stops: one transaction for the state
        steps += 1
        assert steps < 20
    assert kept in left(store) and old not in left(store)


@pytest.mark.slow
@pytest.mark.alone
def test_kept_rows_are_looked_at_once_and_no_statement_reads_more_than_its_page(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ended(store, "long", DONE, 30)
    store.copy(kept, 60_000)
    job = schema.job
    spread = job.c.ended_at + job.c.id
    store.change(sa.update(job).values(ended_at=spread).where(job.c.type == "long"))
    old = ended(store, "a", DONE, 20)
    store.copy(old, 3 * CHUNK)
    made = retention(store, JobSettings("long", keep_s=365 * DAY_S))
    spent_ms = measured(monkeypatch)
    while len(left(store)) > 60_001:
        step(made)
    assert {name: ms for name, ms in spent_ms.items() if ms > 5 * FEW_ROWS_MS} == {}
    spent_ms.clear()
    for _ in range(3):
        step(made)
    assert set(spent_ms) <= {"ENDED_ALIKE", "ENDED_LATER"}
    assert {name: ms for name, ms in spent_ms.items() if ms > FEW_ROWS_MS} == {}


def test_what_is_unique_for_a_time_stays_so_long() -> None:
    db = Db(keep_done_s=10, keep_failed_s=200)
    job = JobSettings("hash", keep_s=5, unique=Unique(None, for_s=100.0))
    assert [kept_s(job, db, state) for state in (DONE, FAILED)] == [100, 100]
    usual = JobSettings("hash", unique=Unique(None, for_s=100.0))
    assert [kept_s(usual, db, state) for state in (DONE, FAILED)] == [100, 200]


def test_children_of_a_parent_that_has_failed_stay_as_long_as_it_may_be_retried(
    store: Store,
) -> None:
    for state in FAILED, DONE:
        parent = store.submit("p")
        running = store.claim_one("p")
        child = store.submit("a", parent=parent, root=parent, child_key=state)
        after = store.submit("a", parent=parent, root=parent)
        for job in (*store.claim(2, "a"), running):
            store.queue.finish(job, Outcome(state if job is running else DONE))
        store.flush()
        for id in child, after:
            age(store, id, 100)
        step(retention(store, JobSettings("a", keep_s=DAY_S)))
        assert {child, after} & left(store) == ({child} if state == FAILED else set())


# Jobs that stand in for others


@pytest.mark.parametrize("purged", ["once it was found", "once it was accepted"])
@pytest.mark.parametrize("waits", ["join", "batch", "child"])
def test_nobody_waits_for_a_job_that_is_deleted_at_that_moment(
    store: Store, monkeypatch: pytest.MonkeyPatch, waits: str, purged: str
) -> None:
    """Another daemon deletes it, where the database serves several."""
    limits = Limits(unique="u", unique_us=round(20 * DAY_S * 1e6))
    old = store.accepted(NewJob("left", {}, limits=limits))[0].id
    store.queue.finish(store.claim_one("left"), Outcome(DONE))
    store.flush()
    age(store, old, 15)
    parent = store.submit("parent")
    store.claim_one("parent")
    with store.beside() as other:

        def purge() -> None:
            if store.queue.shared:
                other.purge(DONE, when.now() - round(14 * DAY_S * 1e6))

        find, accept = Limiter.holders, Batch.accept

        def holders(self: Limiter, keys: Iterable[str]) -> Any:
            found = find(self, keys)
            if purged == "once it was found":
                purge()
            return found

        def accepting(self: Batch, *args: Any) -> Any:
            if purged == "once it was accepted":
                purge()
            return accept(self, *args)

        monkeypatch.setattr(Limiter, "holders", holders)
        monkeypatch.setattr(Batch, "accept", accepting)
        branch = NewJob("left", {}, limits=limits)
        if waits == "join":
            right = NewJob("right", {})
            new = store.accepted(branch, right, NewJob("joint", {}, joins=(branch, right)))
        elif waits == "batch":
            filled = store.queue.fill([branch], Gather(NewJob("joint", {})))
            new = [*filled.jobs, Accepted(filled.id)]
        else:
            branch.parent, branch.child_key = parent, "child"
            new = store.accepted(branch)
    assert {one.id for one in new} <= left(store)
    is_gone = store.queue.shared and purged == "once it was found"
    assert (new[0].id == old) is not is_gone
    for type in ("left", "right"):
        for job in store.claim(2, type):
            store.queue.finish(job, Outcome(DONE))
    store.flush()
    assert waits == "child" or store.row(new[-1].id).state == QUEUED


def test_numbers_of_events_are_not_given_twice(url: str) -> None:
    """Not even when the latest are purged, and the daemon is killed."""
    latest = 0
    for _ in range(3):
        store = Store(url)
        id = store.submit()
        numbers = [change["n"] for change in store.views.history(id)]
        assert min(numbers) > latest
        store.queue.finish(store.claim_one(), Outcome(DONE))
        store.flush()
        latest = max(change["n"] for change in store.views.history(id))
        assert store.purge(DONE, when.now() + 1) == 1
        store.crash()


# Purge


def test_purge_takes_what_is_old_with_its_history(store: Store) -> None:
    old, kept = store.submit(), store.submit()
    other = store.submit()
    one, two, three = store.claim(3)
    end(store, one, output=Output("x", 1, False))
    end(store, two, FAILED)
    before = when.now()
    end(store, three)
    assert store.purge(DONE, before) == 1
    with pytest.raises(NotFound):
        store.views.job(old)
    assert store.views.history(old) == []
    assert store.fetch(sa.select(schema.output)) == []
    assert {kept, other} == {one["id"] for one in store.jobs([])}
    assert tallied(store) == counted(store)
    assert store.purge(DONE, before) == 0


def test_purge_works_in_chunks(store: Store) -> None:
    store.submit()
    done = store.claim_one()
    end(store, done)
    store.copy(done.id, CHUNK + 3)
    assert [store.purge(DONE, when.now() + 1) for _ in range(3)] == [CHUNK, 4, 0]
    assert tallied(store) == counted(store) == {}


def test_purge_frees_the_key(store: Store) -> None:
    first = store.submit(key="a")
    end(store, store.claim_one())
    store.purge(DONE, when.now() + 1)
    assert store.submit(key="a") != first


def test_purge_keeps_children_of_a_parent_that_has_not_ended(store: Store) -> None:
    parent = store.submit()
    running = store.claim_one()
    child = store.submit(parent=parent, root=parent)
    end(store, store.claim_one())
    assert store.purge(DONE, when.now() + 1) == 0
    assert store.views.end(child)
    end(store, running)
    assert store.purge(DONE, when.now() + 1) == 2


def test_purge_keeps_what_others_wait_for(store: Store) -> None:
    first = store.submit()
    last = store.submit(after=(first,))
    end(store, store.claim_one(), FAILED)
    assert store.purge(FAILED, when.now() + 1) == 0
    store.queue.cancel(last, "root")
    assert store.purge(CANCELLED, when.now() + 1) == 1
    assert store.purge(FAILED, when.now() + 1) == 1
    assert store.fetch(sa.select(schema.edge)) == []


def test_two_daemons_that_purge_at_once_count_each_job_once(url: str) -> None:
    with Store(url) as store, store.beside() as other:
        store.submit()
        done = store.claim_one()
        end(store, done)
        store.copy(done.id, 3 * CHUNK)
        purged: list[int] = []

        def purge(here: Store) -> Callable[[], None]:
            return lambda: purged.extend(here.purge(DONE, when.now() + 1) for _ in range(4))

        at_once(purge(store), purge(other))
        while n := store.purge(DONE, when.now() + 1):  # what each had left to the other
            purged.append(n)
        assert sum(purged) == 3 * CHUNK + 1
        assert tallied(store) == counted(store) == {}


def test_a_job_retried_while_another_daemon_purges_is_not_lost(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, retried = threading.Event(), threading.Event()
    execute = Tx._execute

    def slow(tx: Tx, sql: Sql, text: str, given: Any) -> None:
        if sql is DELETE_EVENTS:  # what is old was looked up, nothing is deleted yet
            looked.set()
            retried.wait(0.5)
        execute(tx, sql, text, given)

    with Store(url) as store, store.beside() as other:
        if not store.queue.shared:
            pytest.skip("SQLite serves one daemon")
        id = store.submit()
        end(store, store.claim_one(), FAILED)
        monkeypatch.setattr(Tx, "_execute", slow)

        def retry() -> None:
            looked.wait(10)
            with suppress(NotFound):  # it was purged before
                store.queue.retry(id, "root")
                retried.set()

        at_once(retry, lambda: other.purge(FAILED, when.now() + 1))
        assert bool(counted(store)) == retried.is_set()
        assert tallied(store) == counted(store)


@pytest.mark.slow
@pytest.mark.alone
def test_purge_reads_only_what_it_deletes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.copy(crowd(store, 50_000).done, 3 * CHUNK)
    spent_ms = measured(monkeypatch)
    assert [store.purge(DONE, when.now() + 1) for _ in range(3)] == [CHUNK] * 3
    assert {name: ms for name, ms in spent_ms.items() if ms > 5 * FEW_ROWS_MS} == {}
