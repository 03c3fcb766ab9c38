from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest
import sqlalchemy as sa

from tests.proxy import Proxy
from tests.servers import Postgres, PrivateServer
from tests.stores import Store
from upq import db
from upq import writer as module
from upq.batch import Act
from upq.db import Database
from upq.errors import RequestError, Unavailable, Uncertain
from upq.job import DONE, QUEUED, NewJob, Outcome
from upq.sql import Sql, Tx
from upq.statements.jobs import STATES_OF
from upq.statements.waits import INSERT_EDGES
from upq.writer import BATCH_BYTES, BATCH_CHANGES, DEADLOCKS, Replay, Writer, code_of


@dataclass(eq=False)
class Put:
    """Store a number; `act` is done before it."""

    n: int
    size_bytes: int = 1
    act: Callable[[Tx], object] = lambda tx: None
    other: Put | None = None

    def instead(self, error: Exception) -> Put | None:
        return self.other


@dataclass
class Done:
    results: list[Any]
    batch: list[int]
    bench: Bench

    def proof(self) -> None:
        return None

    def committed(self) -> None:
        self.bench.batches.append(self.batch)

    def tell(self) -> None:
        self.bench.told += self.batch

    def failed(self) -> None:
        self.bench.doubted += self.batch


@dataclass
class Bench:
    """A writer of numbers, and what it has done."""

    database: Database
    batches: list[list[int]] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    doubted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = Writer(self.database, self.apply)

    def apply(self, tx: Tx, changes: Sequence[Put]) -> Done:
        for one in changes:
            one.act(tx)
            tx.cursor.execute(f"INSERT INTO numbers VALUES ({one.n})")
        return Done([-one.n for one in changes], [one.n for one in changes], self)

    def put(self, *numbers: int) -> list[Any]:
        return self.writer.run([Put(n) for n in numbers])

    @property
    def stored(self) -> list[int]:
        with self.database.read() as connection:
            return sorted(connection.scalars(sa.text("SELECT n FROM numbers")))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    database = Database(f"sqlite:///{tmp_path}/upq.db")
    database.prepare()
    with database.jobs.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")
    made = Bench(database)
    yield made
    made.writer.close()
    database.close()


class Gate:
    """Holds the leader inside a transaction until it is opened."""

    def __init__(self, bench: Bench) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        change = Put(10**6, act=lambda _: (self.entered.set(), self.opened.wait(30)))
        self.leader = threading.Thread(target=bench.writer.run, args=([change],))
        self.leader.start()
        assert self.entered.wait(10)
        self._bench = bench

    def wait_for(self, waiting: int) -> None:
        """Until so many callers and posted changes wait behind the leader."""
        over = time.monotonic() + 20
        while self._bench.writer.pending < waiting:
            assert time.monotonic() < over
            time.sleep(0.002)

    def open(self) -> None:
        self.opened.set()
        self.leader.join(30)


def locked(tx: Tx) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def in_threads(acts: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returns or raises, run at once."""
    with ThreadPoolExecutor(len(acts)) as threads:
        futures = [threads.submit(act) for act in acts]
        return [future.exception(60) or future.result(60) for future in futures]


def test_results_come_in_the_order_of_the_changes(bench: Bench) -> None:
    assert bench.put(3, 1, 2) == [-3, -1, -2]
    assert bench.stored == [1, 2, 3]


def test_no_wake_up_is_lost_among_many_threads(bench: Bench) -> None:
    runs, threads = 200, 16
    posts = []
    bench.writer.on_post = lambda: posts.append(1)

    def work(first: int) -> Callable[[], bool]:
        def some_runs() -> bool:
            for n in range(first, first + runs):
                if n % 10 == 0:
                    bench.writer.post(Put(n + 10**5))
                assert bench.put(n) == [-n]
            return True

        return some_runs

    assert in_threads([work(t * runs) for t in range(threads)]) == [True] * threads
    bench.writer.run([])
    assert len(bench.stored) == runs * threads + runs * threads // 10
    assert bench.writer.commits < runs * threads
    assert len(posts) >= runs * threads // 10


def test_all_who_wait_are_committed_together(bench: Bench) -> None:
    gate = Gate(bench)
    with ThreadPoolExecutor(20) as threads:
        futures = [threads.submit(bench.put, n) for n in range(20)]
        gate.wait_for(20)
        gate.open()
        assert sorted(f.result(20)[0] for f in futures) == list(range(-19, 1))
    assert bench.writer.commits == 2


def test_a_batch_has_its_limit_of_changes(bench: Bench) -> None:
    gate = Gate(bench)
    for n in range(BATCH_CHANGES + 5):
        bench.writer.post(Put(n))
    gate.open()
    bench.writer.run([])
    assert [len(batch) for batch in bench.batches] == [1, BATCH_CHANGES, 5]


def test_a_batch_has_its_limit_of_bytes(bench: Bench) -> None:
    for n in range(5):
        bench.writer.post(Put(n, size_bytes=BATCH_BYTES // 2))
    bench.writer.run([])
    assert bench.batches == [[0, 1], [2, 3], [4]]


def test_a_batch_never_waits_to_be_filled(bench: Bench) -> None:
    took_s = []
    for n in range(20):
        began_s = time.monotonic()
        bench.put(n)
        took_s.append(time.monotonic() - began_s)
    assert bench.writer.commits == 20
    assert min(took_s) < 0.1  # one that waits would do so each time; a disk is slow at times


def test_what_is_posted_is_announced_and_committed_by_the_next_run(bench: Bench) -> None:
    announced: list[bool] = []
    bench.writer.on_post = lambda: announced.append(True)
    bench.writer.post(Put(1))
    bench.writer.post(Put(2))
    assert (announced, bench.writer.pending, bench.stored) == ([True, True], 2, [])
    assert bench.put(3) == [-3]
    assert bench.batches == [[1, 2, 3]]
    assert bench.told == [1, 2, 3]


def test_what_is_posted_behind_a_leader_is_announced_when_it_leaves(bench: Bench) -> None:
    gate = Gate(bench)
    bench.writer.post(Put(1))
    announced = threading.Event()
    bench.writer.on_post = announced.set
    gate.open()
    assert announced.wait(10)
    bench.writer.run([])
    assert 1 in bench.stored


def test_a_run_without_changes_commits_what_was_posted(bench: Bench) -> None:
    bench.writer.post(Put(1))
    assert bench.writer.run([]) == []
    assert bench.stored == [1]
    assert bench.writer.run([]) == []
    assert bench.writer.commits == 1


# Changes that are at fault


def test_a_bad_change_never_fails_its_neighbours(bench: Bench) -> None:
    bench.put(2)
    good, bad, other = bench.put(1, 2, 3)
    assert (good, other) == (-1, -3)
    assert isinstance(bad, Unavailable)
    assert bench.stored == [1, 2, 3]
    assert not bench.writer.trouble


def test_a_bad_change_of_another_thread_is_not_ours(bench: Bench) -> None:
    bench.put(2)
    gate = Gate(bench)
    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(bench.put, n) for n in (1, 2, 3)]
        gate.wait_for(3)
        gate.open()
        (one,), (bad,), (three,) = (f.result(20) for f in futures)
    assert (one, three) == (-1, -3)
    assert isinstance(bad, Unavailable)


def test_a_posted_change_at_fault_is_replaced_once(bench: Bench) -> None:
    bench.put(2)
    bench.writer.post(Put(2, other=Put(7, other=Put(8))))
    bench.writer.post(Put(2, other=Put(2)))
    bench.writer.post(Put(3))
    while bench.writer.pending:
        bench.writer.run([])
    assert bench.stored == [2, 3, 7]


def test_a_fault_of_our_own_code_in_a_change_never_fails_its_neighbours(bench: Bench) -> None:
    def broken(tx: Tx) -> None:
        raise TypeError("a fault of ours")

    bench.writer.post(Put(1))
    bench.writer.post(Put(2, act=broken, other=Put(7)))
    assert bench.put(3) == [-3]
    while bench.writer.pending:
        bench.writer.run([])
    assert bench.stored == [1, 3, 7]
    with pytest.raises(RequestError, match="a fault of ours"):
        raise bench.writer.run([Put(4, act=broken)])[0]
    assert bench.put(5) == [-5]


def test_a_batch_that_does_not_fit_together_is_run_one_by_one(bench: Bench) -> None:
    def fussy(tx: Tx) -> None:
        if not tx.alone:
            raise Replay("not together")

    assert bench.writer.run([Put(1), Put(2, act=fussy), Put(3)]) == [-1, -2, -3]
    assert bench.batches == [[1], [2], [3]]


def test_one_that_fails_to_be_told_hurts_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(done: Done) -> None:
        raise ValueError("a subscriber")

    monkeypatch.setattr(Done, "tell", failing)
    monkeypatch.setattr(Done, "committed", failing)
    assert bench.put(1) == [-1]
    assert bench.put(2) == [-2]


def test_a_leader_that_is_interrupted_leaves_nobody_behind(bench: Bench) -> None:
    def interrupt(tx: Tx) -> None:
        raise KeyboardInterrupt

    gate = Gate(bench)
    with ThreadPoolExecutor(5) as threads:
        first = threads.submit(bench.writer.run, [Put(0, act=interrupt)])
        gate.wait_for(1)
        others = [threads.submit(bench.put, n) for n in range(1, 5)]
        gate.wait_for(5)
        gate.open()
        assert isinstance(first.exception(20), KeyboardInterrupt | RequestError)
        assert all(isinstance(f.exception(20), RequestError | None) for f in others)
    assert bench.put(9) == [-9]


# Deadlocks


class Deadlock(sqlite3.OperationalError):
    sqlstate = "40001"


def failing_times(n: int, error: Exception) -> Callable[[Tx], None]:
    left = [n]

    def act(tx: Tx) -> None:
        if left[0]:
            left[0] -= 1
            raise error

    return act


def test_a_deadlock_is_tried_again(bench: Bench) -> None:
    assert bench.writer.run([Put(1, act=failing_times(DEADLOCKS, Deadlock())), Put(2)]) == [-1, -2]
    assert bench.writer.retried == DEADLOCKS
    assert bench.stored == [1, 2]


def test_a_deadlock_without_end_is_unavailable(bench: Bench) -> None:
    with pytest.raises(Unavailable):
        bench.writer.run([Put(1, act=failing_times(DEADLOCKS + 1, Deadlock()))])
    assert bench.stored == []


@pytest.mark.parametrize("kind", ["mariadb", "postgres"])
def test_two_that_really_lock_each_other_both_succeed(
    request: pytest.FixtureRequest, kind: str
) -> None:
    with request.getfixturevalue(kind).database() as url, Store(url) as one, Store(url) as two:
        ids = [one.submit(), one.submit()]
        both = threading.Barrier(2, timeout=20)

        def cross(store: Store, first: int, second: int) -> Callable[[], None]:
            tries = []

            def run(batch: Any) -> None:
                touch = "UPDATE upq_job SET starts = starts + 1 WHERE id = "
                batch.tx.cursor.execute(f"{touch}{first}")
                if not tries:
                    tries.append(1)
                    both.wait()
                batch.tx.cursor.execute(f"{touch}{second}")

            return lambda: store.queue.writer.run([Act(run)])[0]  # type: ignore[return-value]

        assert in_threads([cross(one, *ids), cross(two, *ids[::-1])]) == [None, None]
        assert [one.row(id).starts for id in ids] == [2, 2]
        assert one.queue.writer.retried + two.queue.writer.retried == 1


def test_the_code_of_an_error_is_what_its_driver_calls_it() -> None:
    """pymysql has a sqlstate besides, since 1.2: HY000 and 23000 stand for many errors."""
    error = pymysql.err.IntegrityError(1062, "Duplicate entry")
    error.sqlstate = "23000"
    assert code_of(error) == 1062
    assert code_of(Deadlock("locked")) == "40001"
    with pytest.raises(sqlite3.Error) as caught:
        sqlite3.connect(":memory:").execute("nonsense")
    assert code_of(caught.value) == 1
    assert code_of(psycopg.errors.UniqueViolation("duplicate")) == "23505"


@pytest.mark.parametrize("kind", ["mariadb", "postgres"])
def test_a_lock_that_is_held_for_too_long_is_no_outage(
    request: pytest.FixtureRequest, kind: str
) -> None:
    with request.getfixturevalue(kind).database() as url, Store(url) as one, Store(url) as two:
        id, tries = one.submit(), list[int]()
        held, over = threading.Event(), threading.Event()
        touch = f"UPDATE upq_job SET starts = starts + 1 WHERE id = {id}"

        def hold(batch: Any) -> None:
            batch.tx.cursor.execute(touch)
            held.set()
            over.wait(20)

        def meet(batch: Any) -> None:
            tries.append(1)
            if len(tries) > 1:
                over.set()
            name = "innodb_lock_wait_timeout = 1" if kind == "mariadb" else "lock_timeout = 500"
            batch.tx.cursor.execute(f"SET SESSION {name}")
            batch.tx.cursor.execute(touch)

        with ThreadPoolExecutor() as pool:
            holding = pool.submit(one.queue.writer.run, [Act(hold)])
            assert held.wait(10)
            assert two.queue.writer.run([Act(meet)]) == [None]
            assert holding.result(20) == [None]
        assert two.queue.writer.retried >= 1
        assert not two.queue.writer.trouble
        assert one.row(id).starts == 2


@pytest.mark.parametrize("kind", ["mariadb", "postgres"])
def test_a_submit_that_is_tried_again_looks_anew_at_what_it_waits_for(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with request.getfixturevalue(kind).database() as url, Store(url) as one, Store(url) as two:
        deadlock = {
            "mariadb": pymysql.err.OperationalError(1213, "Deadlock found"),
            "postgres": psycopg.errors.DeadlockDetected("deadlock detected"),
        }
        first, tries = one.submit(), list[int]()
        claimed = one.claim_one()
        execute = Tx._execute

        def failing(tx: Tx, sql: Sql, text: str, given: Any) -> None:
            if sql is INSERT_EDGES and not tries:
                tries.append(1)
                raise deadlock[kind]
            if sql is STATES_OF and tries:
                monkeypatch.undo()
                one.queue.finish(claimed, Outcome(DONE))
                one.flush()
            execute(tx, sql, text, given)

        monkeypatch.setattr(Tx, "_execute", failing)
        after = two.submit(after=(first,))
        assert (one.row(after).state, one.row(after).waits) == (QUEUED, 0)
        assert one.claim_one().id == after


# The database goes away


@pytest.fixture
def away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets the database be away, and come back."""
    monkeypatch.setattr(module, "PROBE_S", 0.05)
    connect = bench.database.raw
    gone = [False]

    def raw() -> Any:
        if gone[0]:
            raise sqlite3.OperationalError("unable to open database file")
        return connect()

    monkeypatch.setattr(bench.database, "raw", raw)

    def switch(is_away: bool) -> None:
        gone[0] = is_away
        if is_away:
            bench.writer.close()

    return switch


def test_while_the_database_is_away_callers_are_told_and_posts_kept(
    bench: Bench, away: Callable[[bool], None]
) -> None:
    away(True)
    bench.writer.post(Put(1))
    with pytest.raises(Unavailable, match="unable to open"):
        bench.put(2)
    assert "unable to open" in bench.writer.trouble
    assert bench.writer.pending == 1
    away(False)
    time.sleep(0.06)
    assert bench.put(3) == [-3]
    assert bench.stored == [1, 3]
    assert (bench.writer.trouble, bench.writer.recoveries) == ("", 1)


def test_a_database_that_is_away_is_asked_only_now_and_then(
    bench: Bench, away: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 30.0)
    away(True)
    with pytest.raises(Unavailable):
        bench.put(1)
    monkeypatch.setattr(bench.database, "raw", lambda: pytest.fail("asked again"))
    with pytest.raises(Unavailable):
        bench.put(2)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("callers", [1, 8])
def test_however_much_was_posted_callers_are_told_at_once(
    bench: Bench, away: Callable[[bool], None], callers: int
) -> None:
    away(True)
    for n in range(3 * BATCH_CHANGES):
        bench.writer.post(Put(n))
    answers = in_threads([lambda: bench.put(10**5)] * callers)
    assert all(isinstance(one, Unavailable) for one in answers)
    away(False)
    time.sleep(0.06)
    while bench.writer.pending:
        bench.writer.run([])
    assert bench.stored == list(range(3 * BATCH_CHANGES))
    assert [n for batch in bench.batches for n in batch] == bench.stored


@pytest.mark.parametrize(
    "text", ["database or disk is full", "disk I/O error", "attempt to write a readonly database"]
)
def test_a_full_or_broken_disk_is_an_outage_and_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.0)
    error = sqlite3.OperationalError(text)
    bench.writer.post(Put(1, act=failing_times(3, error)))
    for _ in range(3):
        with pytest.raises(Unavailable, match=text):
            bench.writer.run([Put(2)])
    assert bench.put(3) == [-3]
    assert bench.stored == [1, 3]


class Flaky:
    """A connection that breaks in the commit, before or after the database has done it."""

    def __init__(self, raw: Any, commits: bool) -> None:
        self._raw = raw
        self._commits = commits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def commit(self) -> None:
        if self._commits:
            self._raw.commit()
        raise OSError("the line is cut")


@pytest.mark.parametrize("commits", [True, False], ids=["after", "before"])
def test_a_connection_that_breaks_in_the_commit_gives_no_wrong_answer(
    url: str, commits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.0)
    with Store(url) as store:
        store.submit()
        writer = store.queue.writer
        writer._raw = Flaky(writer._raw, commits)
        try:
            answers = store.queue.submit([[NewJob("hash", {}, key="k")]])
        except Uncertain:
            # SQLite is never believed: what can be read may not be on disk.
            assert not commits or not store.queue.shared
        else:
            assert commits
            assert isinstance(answers[0], list)
        again = store.accepted(NewJob("hash", {}, key="k"))
        assert again[0].duplicate == commits
        assert len(store.jobs([])) == 2


@pytest.mark.parametrize("commits", [True, False], ids=["after", "before"])
def test_an_end_whose_commit_broke_is_stored_once(
    url: str, commits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.0)
    with Store(url) as store:
        store.queue.lane("reverify", "reverify")
        id = store.submit()
        claimed = store.claim_one()
        writer = store.queue.writer
        writer._raw = Flaky(writer._raw, commits)
        told: list[bool] = []
        store.queue.finish(claimed, Outcome(DONE), [NewJob("reverify", {})], told.append)
        store.flush()
        assert told == [True]
        assert [one["state"] for one in store.views.history(id)] == ["queued", "running", "done"]
        assert len(store.claim(9, "reverify")) == 1
        assert store.queue.fenced == 0


def test_an_outage_while_changes_are_stored_one_by_one_is_met_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def away() -> Any:
        tried.append(1)
        raise sqlite3.OperationalError("unable to open database file")

    def cut(tx: Tx) -> None:
        if not tx.alone:
            raise Replay("one of these does not fit")
        monkeypatch.setattr(bench.database, "raw", away)
        raise sqlite3.OperationalError("disk I/O error")

    changes = [Put(0, act=cut), *(Put(n) for n in range(1, 50))]
    assert {type(one) for one in bench.writer.run(changes)} == {Unavailable}
    assert len(tried) <= 1


# The database is silent


@pytest.fixture(params=["mariadb", "postgres"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PrivateServer:
    """A server that is waited for as short as may be."""
    monkeypatch.setattr(db, "CONNECT_S", 2)
    for module_ in (db, module):
        monkeypatch.setattr(module_, "STATEMENT_S", 3)
    monkeypatch.setattr(db, "IDLE_S", 1)
    monkeypatch.setattr(module, "PROBE_S", 0.05)
    found: PrivateServer = request.getfixturevalue(request.param)
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [Unavailable, Uncertain], ids=["before", "in"])
def test_a_silence_before_or_in_the_commit_is_told_in_time_and_nothing_is_lost(
    server: PrivateServer, error: type[RequestError], monkeypatch: pytest.MonkeyPatch
) -> None:
    # After a hang nobody asks again: that would take so much longer.
    monkeypatch.setattr(db, "CONNECT_S", 15)
    commit = b"COMMIT\0" if isinstance(server, Postgres) else b"\3COMMIT"
    with server.database() as url, Proxy(server) as proxy, Store(proxy.url(url)) as store:
        store.queue.lane("reverify", "reverify")
        store.submit()
        claimed = store.claim_one()
        store.queue.finish(claimed, Outcome(DONE), [NewJob("reverify", {})])
        proxy.cut_at = commit if error is Uncertain else b"upq_job"
        began_s = time.monotonic()
        with pytest.raises(error):
            store.accepted(NewJob("hash", {}, key="k"))
        assert 2.9 < time.monotonic() - began_s < 15
        proxy.mend()
        store.flush()
        assert len(store.accepted(NewJob("hash", {}, key="k"))) == 1
        states = sorted((job["type"], job["state"]) for job in store.jobs([]))
        assert states == [("hash", DONE), ("hash", "queued"), ("reverify", "queued")]
        assert store.queue.writer.recoveries == 1


@pytest.mark.timeout(60)
def test_a_connection_that_is_dead_without_a_word_costs_one_answer(server: PrivateServer) -> None:
    with server.database() as url, Proxy(server) as proxy, Store(proxy.url(url)) as store:
        store.submit()
        proxy.lose()
        with pytest.raises(Unavailable):
            store.submit()
        time.sleep(0.06)
        store.submit()


@pytest.mark.timeout(60)
def test_one_that_is_frozen_holds_no_locks_for_ever_and_goes_on_after(
    server: PrivateServer,
) -> None:
    with server.database() as url, Store(url) as frozen, Store(url) as other:
        id = frozen.submit()
        touch = f"UPDATE upq_job SET starts = starts + 1 WHERE id = {id}"
        locked, thawed = threading.Event(), threading.Event()
        began_s = 0.0

        def freeze(batch: Any) -> None:
            nonlocal began_s
            began_s = time.monotonic()
            batch.tx.cursor.execute(touch)
            locked.set()
            thawed.wait(20)
            batch.tx.cursor.execute(touch)

        with ThreadPoolExecutor() as pool:
            failed = pool.submit(frozen.queue.writer.run, [Act(freeze)])
            assert locked.wait(10)
            other.queue.writer.run([Act(lambda batch: batch.tx.cursor.execute(touch))])
            assert 0.9 < time.monotonic() - began_s < 15
            thawed.set()
            assert isinstance(failed.exception(20), Unavailable)
        time.sleep(0.06)
        assert frozen.claim_one().starts == 2
        assert frozen.row(id).starts == 2


def test_close_may_be_called_twice(bench: Bench) -> None:
    bench.put(1)
    bench.writer.close()
    bench.writer.close()
    assert bench.put(2) == [-2]


def test_statements_are_compiled_once_for_each_kind() -> None:
    built: list[str] = []
    sql = Sql(lambda dialect: built.append(dialect) or sa.text("SELECT 1"))
    dialects = [Database(f"{kind}://h/d").dialect for kind in ("mariadb+pymysql", "mysql+pymysql")]
    for dialect in (*dialects, *dialects):
        sql.on(dialect)
    assert built == ["mysql"]
