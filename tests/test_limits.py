from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from tests import stores
from tests.stores import Store
from tests.test_queue import HOUR, at_once, counted, end, history, reborn, tallied
from upq import limits, schema, when
from upq.errors import Busy, KeyTaken, NotFound, WrongState
from upq.job import (
    BLOCKED,
    CANCELLED,
    DONE,
    EXPIRED,
    FAILED,
    QUEUED,
    REJECT,
    REPLACE,
    RUNNING,
    Job,
    Limits,
    NewJob,
    Outcome,
)
from upq.nodes import CRASH_LIMIT
from upq.record import child_key
from upq.sql import Sql, Tx
from upq.statements.jobs import BY_CHILD_KEY, BY_IDEM_KEY
from upq.statements.limits import BY_UNIQ_KEY

job, limit = schema.job, schema.limit

database, url, store = stores.database, stores.url, stores.store

UNIQUE = Limits(unique="fid 5")
QUEUED_ONLY = Limits(unique="fid 5", until_start=True)
TURN = Limits(serial="vm:5")
OTHER_TURN = Limits(serial="vm:6")


def no_jobs(_: Job) -> tuple[list[NewJob], None]:
    return [], None


def new(type: str = "hash", /, **fields: Any) -> NewJob:
    return NewJob(type, {}, limits=Limits(**fields))


def ready(store: Store) -> list[int]:
    """The jobs that can be claimed."""
    query = sa.select(job.c.id).where(job.c.ready.is_not(None)).order_by(job.c.id)
    return [row.id for row in store.fetch(query)]


def reason(store: Store, id: int) -> str:
    return str(store.views.job(id)["reason"])


def lines(store: Store) -> dict[str, int]:
    return {row.name: row.at for row in store.fetch(sa.select(limit)) if row.name[:4] == "line"}


# Jobs without limits


def test_jobs_without_limits_run_the_same_statements(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {id(sql): name for name, sql in stores.statements()}
    ran: list[str] = []
    execute = Tx._execute

    def noted(tx: Tx, sql: Sql, text: str, given: Any) -> None:
        ran.append(names[id(sql)])
        execute(tx, sql, text, given)

    store.submit(), end(store, store.claim_one())
    monkeypatch.setattr(Tx, "_execute", noted)
    store.submit(key="a")
    settled = ["CHANGE_TALLY", *store.settles]
    assert ran == ["BY_IDEM_KEY", "INSERT_JOBS", *settled]
    ran.clear()
    claimed = store.claim_one()
    assert ran == ["PICK_CLAIMABLE", "START_JOBS", *settled]
    ran.clear()
    end(store, claimed)
    assert ran == ["END_ATTEMPTS", "DEPENDENTS_OF", *settled]


# Unique


def test_a_repeated_job_is_answered_with_the_first(store: Store) -> None:
    first = store.submit(limits=UNIQUE)
    assert store.accepted(NewJob("hash", {"x": 1}, limits=UNIQUE)) == [(first, True)]
    assert store.submit(limits=Limits(unique="fid 6")) != first
    assert store.submit("reverify", limits=UNIQUE) != first
    claimed = store.claim(1)[0]
    assert store.submit(limits=UNIQUE) == first
    end(store, claimed)
    again = store.submit(limits=UNIQUE)
    assert again != first
    assert tallied(store) == counted(store)


def test_repeats_in_one_submit_and_in_one_transaction_make_one_job(store: Store) -> None:
    first, same = store.accepted(*[NewJob("hash", {}, limits=UNIQUE)] * 2)
    assert same == (first.id, True)
    six = [[NewJob("hash", {}, limits=Limits(unique="fid 6"))]] * 3
    answers = store.queue.submit(six)
    assert len({one[0].id for one in answers if isinstance(one, list)}) == 1
    assert sum(counted(store).values()) == 2


def cancelled(store: Store, id: int) -> None:
    store.queue.cancel(id, "root")


def failed(store: Store, id: int) -> None:
    assert end(store, store.claim_one(), FAILED)


def finished(store: Store, id: int) -> None:
    assert end(store, store.claim_one())


def cancelled_while_it_ran(store: Store, id: int) -> None:
    claimed = store.claim_one()
    assert store.queue.cancel(id, "root").state == RUNNING
    assert end(store, claimed, CANCELLED)


def crashed(store: Store, id: int) -> None:
    for _ in range(CRASH_LIMIT):
        store.queue.rescue([*store.claim(), *store.queue.orphans()], no_jobs)
    assert store.views.job(id)["state"] == FAILED


def expired(store: Store, id: int) -> None:
    store.change(sa.update(job).values(expires_at=1).where(job.c.id == id))
    store.queue.expire(no_jobs)
    assert store.views.job(id)["state"] == EXPIRED


ENDS = [cancelled, failed, finished, cancelled_while_it_ran, crashed, expired]


@pytest.mark.parametrize("come_to_its_end", ENDS)
def test_every_end_frees_key_and_turn(
    store: Store, come_to_its_end: Callable[[Store, int], None]
) -> None:
    both = Limits(unique="fid 5", serial="vm:5")
    first = store.submit(limits=both)
    behind = store.submit("reverify", limits=TURN)
    assert ready(store) == [first]
    come_to_its_end(store, first)
    assert ready(store) == [behind]
    second = store.submit(limits=both)
    assert second != first
    end(store, store.claim_one("reverify"))
    assert ready(store) == [second]
    assert tallied(store) == counted(store)


def test_an_attempt_that_is_tried_again_keeps_key_and_turn(store: Store) -> None:
    first = store.submit(limits=Limits(unique="fid 5", serial="vm:5"))
    store.submit(limits=TURN)
    end(store, store.claim_one(), QUEUED, run_at=when.now() + HOUR)
    assert store.submit(limits=UNIQUE) == first
    assert ready(store) == []
    store.change(sa.update(job).values(due_at=1).where(job.c.id == first))
    store.queue.stage()
    assert ready(store) == [first]


def test_while_queued_the_key_is_free_from_the_start_on(store: Store) -> None:
    first = store.submit(limits=QUEUED_ONLY)
    assert store.submit(limits=QUEUED_ONLY) == first
    running = store.claim_one()
    second = store.submit(limits=QUEUED_ONLY)
    assert second != first
    end(store, running)
    assert store.submit(limits=QUEUED_ONLY) == second


def test_for_a_time_the_key_stays_after_the_end(store: Store) -> None:
    for_1h = Limits(unique="fid 5", unique_us=HOUR)
    first = store.submit(limits=for_1h)
    end(store, store.claim_one())
    assert store.accepted(NewJob("hash", {}, limits=for_1h)) == [(first, True)]
    store.change(sa.update(job).values(uniq_until=when.now() - 1).where(job.c.id == first))
    second = store.submit(limits=for_1h)
    assert second != first
    store.change(sa.update(job).values(uniq_until=1).where(job.c.id == second))
    assert store.submit(limits=for_1h) == second, "it has not ended"


def test_a_retry_takes_the_key_again_unless_somebody_has_it(store: Store) -> None:
    first = store.submit(limits=UNIQUE)
    end(store, store.claim_one(), FAILED)
    store.queue.retry(first, "root")
    assert store.submit(limits=UNIQUE) == first
    end(store, store.claim_one(), FAILED)
    second = store.submit(limits=UNIQUE)
    with pytest.raises(KeyTaken, match=f"job {second} has its unique key"):
        store.queue.retry(first, "root")
    assert store.views.job(first)["state"] == FAILED
    store.queue.cancel(second, "root")
    store.queue.retry(first, "root")
    assert ready(store) == [first]


def test_a_retry_while_the_job_itself_keeps_its_key_is_no_conflict(store: Store) -> None:
    first = store.submit(limits=Limits(unique="fid 5", unique_us=HOUR))
    end(store, store.claim_one(), FAILED)
    store.queue.retry(first, "root")
    assert ready(store) == [first]


@pytest.mark.parametrize("kind", ["key", "child_key", "unique"])
def test_one_that_looks_just_before_another_daemon_stores_its_key_gets_that_job(
    url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a transaction of two, and again when each is run alone."""
    with Store(url) as store, store.beside() as other:
        if not store.queue.shared:
            pytest.skip("SQLite serves one daemon")
        parent = store.submit("parent")

        def one(n: int) -> NewJob:
            if kind == "key":
                return NewJob("hash", {}, key=f"key {n}")
            if kind == "child_key":
                return NewJob("hash", {}, parent=parent, child_key=f"key {n}")
            return NewJob("hash", {}, limits=Limits(unique=f"key {n}"))

        looks = (BY_IDEM_KEY, BY_CHILD_KEY, BY_UNIQ_KEY)
        fetch, left, firsts = Tx.fetch_rows, [0, 1], list[int]()

        def fetch_rows(tx: Tx, sql: Sql, values: Any, **params: Any) -> list[Any]:
            found = fetch(tx, sql, values, **params)
            if sql in looks and left and len(found) < len(values):
                n = left.pop(0)
                monkeypatch.setattr(Tx, "fetch_rows", fetch)
                firsts.extend(accepted.id for accepted in store.accepted(one(n)))
                monkeypatch.setattr(Tx, "fetch_rows", fetch_rows)
            return found

        monkeypatch.setattr(Tx, "fetch_rows", fetch_rows)
        answers = other.queue.submit([[one(0)], [one(1)]])
        assert answers == [[(id, True)] for id in firsts]
        assert len(firsts) == 2
        assert sum(counted(store).values()) == 3
        assert tallied(store) == counted(store)


def test_64_callers_of_each_key_get_one_job(url: str) -> None:
    keys = 40
    with Store(url) as store, store.beside() as other:
        got: dict[int, list[int]] = defaultdict(list)

        def call(here: Store, n: int) -> Callable[[], None]:
            def all_keys() -> None:
                for k in range(keys):
                    key = (k + n) % keys
                    got[key].append(here.submit(limits=Limits(unique=f"key {key}")))

            return all_keys

        at_once(*[call((store, other)[n % 2], n) for n in range(64)])
        assert {len(ids) for ids in got.values()} == {64}
        assert {len(set(ids)) for ids in got.values()} == {1}
        assert sum(counted(store).values()) == keys
        # An orphan's key is usable again once the orphan is done.
        ends = store.claim(keys)
        store.queue.rescue(ends, no_jobs)
        for one in store.claim(keys):
            end(store, one)
        assert not store.accepted(NewJob("hash", {}, limits=Limits(unique="key 1")))[0].duplicate
        assert tallied(store) == counted(store)


# Turns


def test_jobs_of_one_key_take_turns_in_order(store: Store) -> None:
    ids = [store.submit(limits=TURN) for _ in range(3)]
    beside = store.submit(limits=OTHER_TURN)
    other_type = store.submit("reverify", limits=TURN)
    assert ready(store) == [ids[0], beside]
    assert reason(store, ids[1]) == "waits for its turn: vm:5"
    assert store.views.turn(ids[1]) == (ids[0], "vm:5")
    assert store.views.turn(ids[0]) is None
    running = store.claim(9)
    assert [one.id for one in running] == [ids[0], beside]
    end(store, running[0])
    assert store.views.turn(ids[2]) == (ids[1], "vm:5")
    for id in ids[1:]:
        (one,) = store.claim(9)
        assert one.id == id
        end(store, one)
    assert history(store, ids[1]) == [
        (QUEUED, "waits for its turn: vm:5"), (QUEUED, "its turn"), (RUNNING, ""), (DONE, ""),
    ]  # fmt: skip
    assert history(store, ids[0]) == [(QUEUED, ""), (RUNNING, ""), (DONE, "")]
    assert store.claim(9) == []
    end(store, store.claim(9, "reverify")[0])
    assert store.views.job(other_type)["state"] == DONE
    end(store, running[1])
    assert lines(store) == {}, "a line that is empty leaves nothing behind"
    assert tallied(store) == counted(store)


def test_priority_does_not_change_the_order_within_a_key(store: Store) -> None:
    low, high = store.submit(limits=TURN, priority=-5), store.submit(limits=TURN, priority=5)
    end(store, store.claim(9)[0])
    assert [one.id for one in store.claim(9)] == [high]
    assert low < high


def test_a_job_of_a_later_time_has_its_turn_all_the_same(store: Store) -> None:
    later = store.submit(limits=TURN, run_at=when.now() + HOUR)
    behind = store.submit(limits=TURN)
    assert ready(store) == []
    assert store.views.turn(behind) == (later, "vm:5")
    assert store.queue.next_due == store.row(later).due_at
    store.change(sa.update(job).values(due_at=1).where(job.c.id == later))
    store.queue.stage()
    assert ready(store) == [later]


def test_the_next_has_a_time_of_its_own(store: Store) -> None:
    at = when.now() + HOUR
    store.submit(limits=TURN)
    later = store.submit(limits=TURN, run_at=at)
    assert store.row(later).due_at is None
    end(store, store.claim_one())
    assert (store.row(later).due_at, store.queue.next_due) == (at, at)


def test_a_cancelled_waiter_is_passed_over(store: Store) -> None:
    first, second, third = (store.submit(limits=TURN) for _ in range(3))
    store.queue.cancel(second, "root")
    assert ready(store) == [first]
    end(store, store.claim_one())
    assert ready(store) == [third]


def test_a_retried_job_goes_before_those_that_wait_and_not_beside_the_one_that_runs(
    store: Store,
) -> None:
    first, second, third = (store.submit(limits=TURN) for _ in range(3))
    end(store, store.claim_one(), FAILED)
    running = store.claim_one()
    assert running.id == second
    store.queue.retry(first, "root")
    assert ready(store) == []
    assert reason(store, first) == "waits for its turn: vm:5"
    end(store, running)
    assert ready(store) == [first]
    end(store, store.claim_one())
    assert ready(store) == [third]


def test_a_blocked_job_keeps_its_place_in_the_line(store: Store) -> None:
    needed = store.submit("other")
    blocked = store.submit(limits=TURN, after=(needed,))
    behind = store.submit(limits=TURN)
    assert ready(store) == [needed]
    assert store.views.turn(behind) == (blocked, "vm:5")
    end(store, store.claim_one("other"))
    assert ready(store) == [blocked]
    assert history(store, blocked)[-1] == (QUEUED, "")
    end(store, store.claim_one())
    assert ready(store) == [behind]


def test_a_job_that_the_first_of_the_line_waits_for_can_be_retried(store: Store) -> None:
    first = store.submit(limits=TURN)
    after = store.submit(limits=TURN, after=(first,))
    behind = store.submit(limits=TURN)
    end(store, store.claim_one(), FAILED)
    assert ready(store) == []
    store.queue.retry(first, "root")
    assert ready(store) == [first]
    end(store, store.claim_one())
    assert ready(store) == [after]
    store.queue.cancel(after, "root")
    assert ready(store) == [behind]


def test_a_job_freed_while_another_has_the_turn_waits(store: Store) -> None:
    running = store.submit(limits=TURN)
    needed = store.submit("other")
    blocked = store.submit(limits=TURN, after=(needed,))
    claimed = store.claim_one()
    end(store, store.claim_one("other"))
    assert ready(store) == []
    assert (store.views.job(blocked)["state"], reason(store, blocked)) == (
        QUEUED, "waits for its turn: vm:5",
    )  # fmt: skip
    end(store, claimed)
    assert ready(store) == [blocked]
    assert running == claimed.id


def test_a_job_has_a_larger_id_than_all_it_waits_for(url: str) -> None:
    """Or jobs of a line could wait for each other, in the order of the ids and for the ends."""
    with Store(url) as store, store.beside() as other:
        if not store.queue.shared:
            pytest.skip("SQLite serves one daemon")
        store.submit()
        theirs = other.submit(limits=TURN)
        assert store.submit(limits=TURN, after=(theirs,)) > theirs
        with pytest.raises(NotFound):
            store.submit(after=(10**15,))


def test_a_daemon_that_dies_takes_no_turn_with_it(url: str) -> None:
    dead = Store(url)
    first, second = dead.submit(limits=TURN), dead.submit(limits=TURN)
    dead.claim_one()
    with reborn(url, dead) as store:
        store.queue.rescue(store.queue.orphans(), no_jobs)
        assert ready(store) == [first]
        assert store.views.turn(second) == (first, "vm:5")


def test_a_line_that_somebody_has_broken_is_mended(store: Store) -> None:
    first, second = store.submit(limits=TURN), store.submit(limits=TURN)
    store.change(sa.update(job).values(serial_key=None, state=DONE).where(job.c.id == first))
    assert second not in ready(store)
    store.queue.mend_lines()
    assert second in ready(store)


def test_a_child_that_needs_the_turn_above_it_is_refused(store: Store) -> None:
    parent = store.submit(limits=TURN)
    store.claim_one()
    child = store.submit("hash", parent=parent, child_key="c")
    with pytest.raises(WrongState, match=f"job {parent} above this child has the turn"):
        store.submit("hash", limits=TURN, parent=child, child_key="d")
    assert store.submit("hash", limits=TURN, parent=parent), "a step of a chain is no child"


def test_a_child_that_repeats_another_job_is_that_job(store: Store) -> None:
    first = store.submit(limits=UNIQUE)
    parent = store.submit("parent")
    key = child_key(parent, "hash", {}, 1)
    one = NewJob("hash", {}, limits=UNIQUE, parent=parent, child_key=key)
    assert store.accepted(one) == [(first, True)]
    assert store.views.repeated(parent, key) == first
    end(store, store.claim_one(), FAILED)
    assert store.views.repeated(parent, key) == first
    second = store.submit(limits=UNIQUE)
    assert store.accepted(one) == [(second, True)]
    assert store.views.repeated(parent, key) == second


def test_a_child_that_repeats_who_waits_for_it_is_refused(store: Store) -> None:
    parent = store.submit(limits=UNIQUE)
    store.claim_one()
    child = store.submit("hash", parent=parent, child_key="c")
    with pytest.raises(WrongState, match=f"it would wait for job {parent}"):
        store.submit(limits=UNIQUE, parent=child, child_key="d")


def test_a_child_that_repeats_who_waits_behind_its_parent_is_refused(store: Store) -> None:
    parent = store.submit(limits=TURN)
    store.claim_one()
    both = Limits(unique="fid 5", serial="vm:5")
    behind = store.submit(limits=both)
    with pytest.raises(WrongState, match=f"job {behind} is what this child repeats"):
        store.submit(limits=both, parent=parent, child_key="d")


def test_a_child_that_repeats_who_waits_for_its_parent_is_refused(store: Store) -> None:
    """Directly, through others, or through a line."""
    parent = store.submit("parent")
    store.claim_one("parent")
    direct = store.submit(after=(parent,), limits=UNIQUE)
    line = Limits(serial="vm:5")
    first = store.submit(after=(direct,), limits=line)
    behind = store.submit(limits=line)
    far = store.submit(after=(behind,), limits=Limits(unique="fid 6"))
    other = store.submit(limits=Limits(unique="fid 7"))
    for holder, unique in ((direct, "fid 5"), (far, "fid 6")):
        with pytest.raises(WrongState, match=f"job {holder} .* it waits for job {parent}, which"):
            store.submit(limits=Limits(unique=unique), parent=parent, child_key=unique)
    child = NewJob("hash", {}, limits=Limits(unique="fid 7"), parent=parent, child_key="c")
    assert store.accepted(child) == [(other, True)]
    with pytest.raises(WrongState, match=f"job {first} goes before this child"):
        store.submit(limits=line, parent=parent, child_key="d")
    assert store.submit(limits=Limits(serial="vm:6"), parent=parent, child_key="e")
    assert tallied(store) == counted(store)


def test_a_child_that_repeats_who_waits_for_one_below_it_is_refused(store: Store) -> None:
    """Who has a child waits for it, and so for all that the child waits for."""
    parent, uncle = store.submit("parent"), store.submit("parent", limits=UNIQUE)
    store.claim(2, "parent")
    store.submit(after=(parent,), parent=uncle, child_key="c")
    with pytest.raises(WrongState, match=f"job {uncle} .* it waits for job {parent}, which"):
        store.submit("parent", limits=UNIQUE, parent=parent, child_key="d")


def test_a_child_and_who_waits_for_its_parent_in_one_transaction(store: Store) -> None:
    parent = store.submit("parent")
    store.claim_one("parent")
    waits = NewJob("hash", {}, after=(parent,), limits=UNIQUE)
    child = NewJob("hash", {}, limits=UNIQUE, parent=parent, child_key="c")
    holder, refused = store.queue.submit([[waits], [child]])
    assert isinstance(holder, list) and isinstance(refused, WrongState)
    assert sum(counted(store).values()) == 2


def test_a_retried_child_is_not_who_waits_for_its_parent(store: Store) -> None:
    parent = store.submit("parent")
    store.claim_one("parent")
    holder, other = store.submit(after=(parent,)), store.submit()
    with pytest.raises(WrongState, match=f"job {holder} .* it waits for job {parent}, which"):
        store.queue.check_repeat(parent, holder)
    store.queue.check_repeat(parent, other)


def test_only_so_many_jobs_are_looked_at_for_who_waits(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WALK", 4)
    parent = last = store.submit("parent")
    store.claim_one("parent")
    for n in range(6):
        last = store.submit(after=(last,), limits=Limits(unique=f"fid {n}"))
    with pytest.raises(WrongState):
        store.submit(limits=Limits(unique="fid 2"), parent=parent, child_key="c")
    far = NewJob("hash", {}, limits=Limits(unique="fid 5"), parent=parent, child_key="d")
    assert store.accepted(far) == [(last, True)]


class Churn:
    """Many threads and two daemons on a few keys; what ran when is told by the events."""

    def __init__(self, store: Store, other: Store, keys: int) -> None:
        self.stores, self.keys = (store, other), keys
        self.left = threading.Semaphore(0)

    def submitter(self, here: Store, n: int, jobs: int) -> Callable[[], None]:
        def run() -> None:
            earlier: list[int] = []
            for k in range(jobs):
                after = tuple(earlier[-1:]) if k % 7 == 3 else ()
                run_at = when.now() + 3000 if k % 5 == 1 else None
                limits = Limits(serial=f"vm:{(n + k) % self.keys}")
                earlier.append(here.submit(limits=limits, after=after, run_at=run_at))
                if k % 9 == 4:
                    self.try_cancel(here, earlier[-1] if k % 2 else earlier[len(earlier) // 2])

        return run

    def try_cancel(self, here: Store, id: int) -> None:
        with contextlib.suppress(WrongState):  # it is done by now, even the latest
            here.queue.cancel(id, "root")


def test_never_two_of_a_key_at_once_on_two_daemons(url: str) -> None:
    with Store(url) as store, store.beside() as other:
        churn = Churn(store, other, 5)
        submitted = threading.Event()
        running: Counter[int] = Counter()
        broken: list[int] = []
        lock = threading.Lock()
        key_of: dict[int, str] = {}

        def work(here: Store, seed: int) -> Callable[[], None]:
            def until_nothing_is_left() -> None:
                deadline_s, n = time.monotonic() + 90, seed
                while time.monotonic() < deadline_s:
                    here.queue.stage()
                    here.flush()
                    got = here.claim(4)
                    for one in got:
                        n += 1
                        line = one.options["limits"]["line"]
                        with lock:
                            key_of[one.id] = line
                            running[line] += 1
                            if running[line] > 1:
                                broken.append(one.id)
                        time.sleep(0.0005)
                        with lock:
                            running[line] -= 1
                        state = QUEUED if n % 6 == 0 and one.attempt < 3 else DONE
                        run_at = when.now() + 2000 if n % 12 == 0 and state == QUEUED else None
                        here.queue.finish(one, Outcome(state, run_at=run_at))
                    here.flush()
                    if not got:
                        if submitted.is_set() and not drop_held(here) and not unfinished(here):
                            return
                        time.sleep(0.005)

            return until_nothing_is_left

        def submit_all() -> None:
            at_once(*[churn.submitter((store, other)[n % 2], n, 20) for n in range(4)])
            submitted.set()

        at_once(submit_all, *[work((store, other)[n % 2], n) for n in range(4)])
        assert broken == []
        assert unfinished(store) == []
        assert lines(store) == {}
        assert tallied(store) == counted(store)


def unfinished(store: Store) -> list[int]:
    states = (QUEUED, RUNNING, BLOCKED)
    return [r.id for r in store.fetch(sa.select(job.c.id).where(job.c.state.in_(states)))]


def drop_held(store: Store) -> list[int]:
    """Cancel what waits for jobs that were cancelled, and holds up its line."""
    held = sa.select(job.c.id).where(job.c.state == BLOCKED, job.c.reason.like("%is cancelled%"))
    ids = [row.id for row in store.fetch(held)]
    for id in ids:
        with contextlib.suppress(WrongState):
            store.queue.cancel(id, "root")
    return ids


# Expiry


def test_a_job_that_has_not_started_in_time_never_starts(store: Store) -> None:
    at = when.now() + HOUR
    first = store.submit(limits=Limits(expires_at=at))
    assert store.queue.next_due == at
    store.change(sa.update(job).values(expires_at=1).where(job.c.id == first))
    later = store.submit(limits=Limits(expires_at=at + 5))
    store.queue.stage()
    assert store.queue.next_due == 1
    told: list[int] = []

    def then(one: Job) -> tuple[list[NewJob], None]:
        told.append(one.id)
        return [NewJob("notify", {"of": one.id})], None

    assert store.queue.expire(then) == {store.queue.lane("hash", "hash").id}
    seen = store.views.job(first)
    assert (seen["state"], seen["message"]) == (EXPIRED, "it has not started in time")
    assert seen["ended_at"] and told == [first]
    assert store.claim_one("notify").params == {"of": first}
    assert [one.id for one in store.claim(9)] == [later]
    store.queue.stage()
    assert store.queue.next_due is None
    assert tallied(store) == counted(store)


def test_a_claim_never_starts_what_is_overdue(store: Store) -> None:
    overdue = store.submit(limits=Limits(expires_at=when.now() - 1))
    fine = store.submit()
    assert [one.id for one in store.claim(9)] == [fine]
    assert store.queue.next_due is not None and store.queue.next_due <= when.now()
    store.queue.expire(no_jobs)
    assert store.views.job(overdue)["state"] == EXPIRED


def test_blocked_jobs_expire_and_hold_those_after_them(store: Store) -> None:
    first = store.submit()
    blocked = store.submit(after=(first,), limits=Limits(expires_at=when.now() + HOUR))
    last = store.submit(after=(blocked,))
    store.change(sa.update(job).values(expires_at=1).where(job.c.id == blocked))
    store.queue.expire(no_jobs)
    assert store.views.job(blocked)["state"] == EXPIRED
    assert reason(store, last) == f"job {blocked} is expired; `retry {blocked}` lets it go on"
    end(store, store.claim_one())
    assert store.claim(9) == []
    store.queue.retry(blocked, "root")
    end(store, store.claim_one())
    assert store.claim_one().id == last


def after_two_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the clock shows a time at which all is over that expires in an hour."""
    later = when.now() + 2 * HOUR
    monkeypatch.setattr(when, "now", lambda: later)


def test_what_has_started_does_not_expire(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.submit(limits=Limits(expires_at=when.now() + HOUR))
    running = store.claim_one()
    assert store.row(first).expires_at is None
    after_two_hours(monkeypatch)
    end(store, running, QUEUED)
    store.queue.expire(no_jobs)
    assert store.claim_one().id == first


def test_a_claim_that_is_given_back_was_no_start(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = when.now() + HOUR
    first = store.submit(limits=Limits(expires_at=at))
    end(store, store.claim_one(), QUEUED, counts=False)
    assert store.row(first).expires_at == at
    after_two_hours(monkeypatch)
    assert store.claim(9) == []
    store.queue.expire(no_jobs)
    assert store.views.job(first)["state"] == EXPIRED


def test_a_job_that_starts_while_it_is_found_overdue_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.submit(limits=Limits(expires_at=when.now() + HOUR))
    store.change(sa.update(job).values(expires_at=1).where(job.c.id == first))

    def then(one: Job) -> tuple[list[NewJob], None]:
        store.claim_one()
        return [NewJob("notify", {})], None

    assert store.queue.expire(then) == set()
    assert store.views.job(first)["state"] == RUNNING
    assert store.claim(9, "notify") == []


# A full queue, a busy type


def test_max_queue_is_exact(url: str) -> None:
    with Store(url) as store, store.beside() as other:
        store.submit(), other.submit()  # the lanes are made
        store.claim(9)
        answers: list[str] = []

        def fill(here: Store) -> Callable[[], None]:
            def some() -> None:
                for n in range(8):
                    many = [new(max_queue=20)] * (1 + n % 2)
                    try:
                        here.accepted(*many)
                        answers.extend(["ok"] * len(many))
                    except Busy as error:
                        answers.append(str(error))

            return some

        at_once(*[fill((store, other)[n % 2]) for n in range(6)])
        assert answers.count("ok") == 20
        assert {text for text in answers if text != "ok"} <= {
            f"{n} jobs of hash wait already, max_queue = 20" for n in (20, 21)
        }
        store.claim(1)
        store.accepted(new(max_queue=20))
        with pytest.raises(Busy):
            store.accepted(new(max_queue=20))
        assert not isinstance(store.queue.submit([[new("other", max_queue=1)]])[0], Exception)


def test_a_duplicate_needs_no_room(store: Store) -> None:
    limits = Limits(unique="a", max_queue=1)
    first = store.submit(limits=limits)
    assert store.submit(limits=limits) == first


def test_reject_refuses_while_a_job_is_unfinished(store: Store) -> None:
    first = store.submit(limits=Limits(when_busy=REJECT))
    for _ in range(2):
        with pytest.raises(Busy, match="a job of hash is not finished"):
            store.submit(limits=Limits(when_busy=REJECT))
        store.claim(9)
    with pytest.raises(Busy):
        store.accepted(*[new("other", when_busy=REJECT)] * 2)
    store.submit("reverify", limits=Limits(when_busy=REJECT))
    end(store, store.queue.orphans()[0] if store.queue.orphans() else running(store, first))
    assert store.submit(limits=Limits(when_busy=REJECT)) > first


def running(store: Store, id: int) -> Job:
    """A running job as its claim has it."""
    row = store.row(id)
    return Job(row.id, row.lane, row.type, row.queue, RUNNING, "", {}, {}, {}, 0, None, 1, 1, 0,
               row.token, False, None, row.root, "", None, "", None, 0, 0, None)  # fmt: skip


def test_reject_with_a_turn_looks_at_the_key(store: Store) -> None:
    mine = Limits(serial="vm:5", when_busy=REJECT)
    store.submit("reverify", limits=TURN)
    with pytest.raises(Busy, match="a job of vm:5 is not finished"):
        store.submit(limits=mine)
    store.submit(limits=Limits(serial="vm:6", when_busy=REJECT))
    end(store, store.claim_one("reverify"))
    store.submit(limits=mine)
    answers = store.queue.submit([[new(serial="vm:7", when_busy=REJECT)] for _ in range(3)])
    assert [isinstance(one, Busy) for one in answers] == [False, True, True]


def test_replace_cancels_what_has_not_started(store: Store) -> None:
    limits = Limits(when_busy=REPLACE)
    running_ = store.submit(limits=limits)
    store.claim_one()
    waits = store.submit(limits=limits)
    later = store.submit(run_at=when.now() + HOUR)
    blocked = store.submit(after=(running_,))
    other = store.submit("reverify")
    last = store.submit(limits=limits)
    for id in (waits, later, blocked):
        seen = store.views.job(id)
        assert (seen["state"], seen["reason"]) == (CANCELLED, f"replaced by {last}")
        assert history(store, id)[-1] == (CANCELLED, f"replaced by {last}")
    assert store.views.job(running_)["state"] == RUNNING
    assert sorted(ready(store)) == [other, last]
    answers = store.queue.submit([[NewJob("hash", {}, limits=limits)] for _ in range(3)])
    ids = [one[0].id for one in answers if isinstance(one, list)]
    assert ready(store) == [other, ids[-1]]
    both = store.accepted(*[NewJob("hash", {}, limits=limits)] * 2)
    assert ready(store) == [other, both[1].id]
    assert tallied(store) == counted(store)


def test_replace_with_a_turn_looks_at_the_key(store: Store) -> None:
    limits = Limits(serial="vm:5", when_busy=REPLACE, max_queue=2)
    first = store.submit("reverify", limits=TURN)
    second = store.submit(limits=limits)
    other = store.submit(limits=limits._replace(serial="vm:6"))
    third = store.submit(limits=limits)
    assert store.views.job(first)["reason"] == f"replaced by {second}"
    assert store.views.job(second)["reason"] == f"replaced by {third}"
    assert ready(store) == [other, third]
    with pytest.raises(Busy):
        store.submit(limits=limits._replace(serial="vm:7"))
    assert ready(store) == [other, third]


def test_replacing_frees_the_key_of_what_is_replaced(store: Store) -> None:
    limits = Limits(unique="a", when_busy=REPLACE)
    first = store.submit(limits=limits)
    assert store.submit(limits=limits) == first
    store.submit(limits=limits._replace(unique="b"))
    assert store.submit(limits=limits) > first


def test_replacing_at_once_on_two_daemons_leaves_one(url: str) -> None:
    with Store(url) as store, store.beside() as other:
        store.submit(limits=Limits(when_busy=REPLACE)), other.submit("x")

        def some(here: Store) -> Callable[[], None]:
            return lambda: (
                [here.submit(limits=Limits(when_busy=REPLACE)) for _ in range(8)] and None
            )

        at_once(*[some((store, other)[n % 2]) for n in range(4)])
        lane = store.queue.lane("hash", "hash").id
        assert counted(store)[lane, QUEUED] == 1
        assert tallied(store) == counted(store)


# What follows an end


def test_a_follow_up_that_repeats_a_job_is_not_queued_twice(store: Store) -> None:
    first = store.submit("reverify", limits=UNIQUE)
    store.submit()
    follow = [NewJob("reverify", {}, limits=UNIQUE), NewJob("notify", {})]
    end(store, store.claim_one(), then=follow)
    assert [one.id for one in store.claim(9, "reverify")] == [first]
    assert len(store.claim(9, "notify")) == 1
    assert store.views.job(first)["state"] == RUNNING and BLOCKED not in dict(tallied(store))


def test_of_failed_jobs_with_one_key_only_the_first_is_retried_with_many(store: Store) -> None:
    first, second = (submit_and_fail(store, UNIQUE) for _ in range(2))
    assert store.queue.retry_many([first, second], "root") == [first]
    assert [store.row(id).state for id in (first, second)] == [QUEUED, FAILED]
    assert store.submit(limits=UNIQUE) == first


def submit_and_fail(store: Store, limits: Limits) -> int:
    id = store.submit(limits=limits)
    end(store, store.claim_one(), FAILED)
    return id


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("end_it", [expired, failed])
def test_what_is_retried_after_its_time_starts(
    store: Store,
    end_it: Callable[[Store, int], None],
    many: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    id = store.submit(limits=Limits(expires_at=when.now() + HOUR, serial="vm:5"))
    end_it(store, id)
    after_two_hours(monkeypatch)
    if many:
        assert store.queue.retry_many([id], "root") == [id]
    else:
        store.queue.retry(id, "root")
    claimed = store.claim_one()
    assert claimed.id == id
    store.queue.finish(claimed, Outcome(QUEUED, counts=False))
    store.flush()
    assert store.queue.expire(no_jobs) == set()
    assert store.claim_one().id == id
