"""Batches on the store, on all three databases. Through a daemon they are in `test_batch_trip`."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import sqlalchemy as sa

from tests import stores
from tests.stores import Store
from upq import schema
from upq.errors import Busy, KeyConflict, NotFound, WrongState
from upq.job import (
    BLOCKED,
    CANCELLED,
    DONE,
    ENDED,
    FAILED,
    QUEUED,
    REJECT,
    RUNNING,
    Gather,
    Gathered,
    Limits,
    NewJob,
    Outcome,
)

database, url, store = stores.database, stores.url, stores.store


def members(n: int, **fields: Any) -> list[NewJob]:
    return [NewJob("hash", {"n": i}, **fields) for i in range(n)]


def then(**fields: Any) -> NewJob:
    return NewJob("report", {"of": "a day"}, **fields)


def begin(store: Store, jobs: list[NewJob], **how: Any) -> Gathered:
    followup = how.pop("followup", None) or then()
    return store.queue.fill(jobs, Gather(followup, **how))


def add(store: Store, id: int, jobs: list[NewJob], *, open: bool = True) -> Gathered:
    return store.queue.fill(jobs, Gather(None, id, open=open))


def close(store: Store, id: int) -> Gathered:
    return add(store, id, [], open=False)


def end(store: Store, state: str = DONE, n: int = 1, type: str = "hash") -> list[int]:
    """Claim n jobs of a type and end them."""
    claimed = store.claim(n, type)
    assert len(claimed) == n
    for job in claimed:
        store.queue.finish(job, Outcome(state))
    store.flush()
    return [job.id for job in claimed]


def state(store: Store, id: int) -> tuple[str, str]:
    row = store.row(id)
    return row.state, row.reason


def edges(store: Store) -> int:
    return int(store.fetch(sa.select(sa.func.count()).select_from(schema.edge))[0][0])


def told(store: Store, id: int) -> Any:
    """What a follow-up is told of its members, when it starts."""
    (job,) = store.claim(1, "report")
    assert job.id == id
    assert job.data == {"of": "a day", "batch": job.data["batch"]}
    assert job.params == {"of": "a day"}
    return job.data["batch"]


def is_whole(store: Store) -> None:
    """Counts are those of the rows, and nobody waits for what is not there."""
    job, tally, edge = schema.job.c, schema.tally.c, schema.edge.c
    rows = Counter((row.lane, row.state) for row in store.fetch(sa.select(job.lane, job.state)))
    kept = {(lane, is_): n for lane, is_, n in store.fetch(sa.select(*tally)) if n}
    assert kept == dict(rows)
    needs = {(row.job, row.needs) for row in store.fetch(sa.select(edge.job, edge.needs))}
    there = {row.id for row in store.fetch(sa.select(job.id))}
    assert {id for pair in needs for id in pair} <= there


def test_the_follow_up_starts_when_the_last_member_is_done(store: Store) -> None:
    made = begin(store, members(3))
    assert (made.duplicate, made.open, made.members) == (False, False, 3)
    assert [job.id for job in made.jobs] == [made.id + 1, made.id + 2, made.id + 3]
    assert state(store, made.id) == (BLOCKED, "waits for its members")
    rows = [store.row(job.id) for job in made.jobs]
    assert {(row.parent, row.root) for row in rows} == {(made.id, made.id)}
    end(store, n=2)
    assert state(store, made.id)[0] == BLOCKED
    end(store)
    assert state(store, made.id) == (QUEUED, "")
    counts = {"members": 3, "done": 3, "failed": 0, "cancelled": 0, "expired": 0, "ids": []}
    assert told(store, made.id) == counts
    assert edges(store) == 0
    is_whole(store)


def test_a_batch_without_members_starts_its_follow_up_at_once(store: Store) -> None:
    made = begin(store, [])
    assert state(store, made.id)[0] == QUEUED
    assert told(store, made.id)["members"] == 0
    is_whole(store)


def test_an_open_batch_takes_members_until_it_is_closed(store: Store) -> None:
    made = begin(store, members(2), open=True)
    assert state(store, made.id) == (BLOCKED, "batch is open")
    end(store, n=2)
    assert state(store, made.id) == (BLOCKED, "batch is open")
    more = add(store, made.id, [NewJob("hash", {"n": 7})])
    assert (more.id, more.open, more.members, more.duplicate) == (made.id, True, 3, False)
    assert close(store, made.id) == Gathered(made.id, [], False, False, 3)
    assert state(store, made.id) == (BLOCKED, "waits for its members")
    end(store)
    assert told(store, made.id)["done"] == 3
    is_whole(store)


def test_closing_an_open_batch_whose_members_are_done_starts_its_follow_up(store: Store) -> None:
    made = begin(store, members(1), open=True)
    end(store)
    close(store, made.id)
    assert told(store, made.id)["done"] == 1
    empty = begin(store, [], open=True)
    assert state(store, empty.id) == (BLOCKED, "batch is open")
    close(store, empty.id)
    assert state(store, empty.id)[0] == QUEUED


def test_a_batch_can_be_closed_with_its_last_members(store: Store) -> None:
    made = begin(store, members(1), open=True)
    last = add(store, made.id, [NewJob("hash", {"n": 7})], open=False)
    assert (last.open, last.members) == (False, 2)
    end(store, n=2)
    assert told(store, made.id)["done"] == 2


def test_closing_twice_is_answered_the_same(store: Store) -> None:
    made = begin(store, members(1), open=True)
    close(store, made.id)
    assert close(store, made.id) == Gathered(made.id, [], True, False, 1)
    end(store)
    assert close(store, made.id).members == 1
    assert told(store, made.id)["done"] == 1


def test_nothing_is_added_to_a_batch_that_is_closed_cancelled_or_none(store: Store) -> None:
    closed, open_ = begin(store, members(1)), begin(store, [], open=True)
    plain = store.submit()
    store.queue.cancel(open_.id, "me")
    before = edges(store)
    for id, text in (
        (closed.id, f"batch {closed.id} is closed"),
        (open_.id, f"batch {open_.id} is cancelled"),
        (plain, f"job {plain} is no batch"),
    ):
        with pytest.raises(WrongState, match=text):
            add(store, id, members(2))
    with pytest.raises(WrongState, match="is cancelled"):
        close(store, open_.id)
    with pytest.raises(NotFound, match="no job 987654321"):
        add(store, 987654321, members(1))
    assert edges(store) == before
    is_whole(store)


def test_all_members_are_queued_or_none_and_no_follow_up(store: Store) -> None:
    with pytest.raises(NotFound):
        begin(store, [*members(2), NewJob("hash", {}, after=(987654321,))])
    assert store.fetch(sa.select(schema.job.c.id)) == []
    made = begin(store, [], open=True)
    busy = NewJob("solo", {}, limits=Limits(when_busy=REJECT))
    with pytest.raises(Busy):
        add(store, made.id, [*members(2), busy, busy])
    assert [row.id for row in store.fetch(sa.select(schema.job.c.id))] == [made.id]
    is_whole(store)


def test_a_member_that_fails_holds_the_follow_up_until_it_is_retried(store: Store) -> None:
    made = begin(store, members(2))
    (bad,) = end(store, FAILED)
    assert state(store, made.id) == (
        BLOCKED,
        f"job {bad} is failed; `retry {bad}` lets it go on",
    )
    end(store)
    assert state(store, made.id)[0] == BLOCKED
    store.queue.retry(bad, "me")
    assert state(store, made.id) == (BLOCKED, "waits for its members")
    end(store)
    assert told(store, made.id)["done"] == 2


def test_of_several_that_failed_the_reason_names_one_that_is_not_retried(store: Store) -> None:
    made = begin(store, members(2))
    first, second = sorted(end(store, FAILED, n=2))
    store.queue.retry(first, "me")
    assert state(store, made.id)[1] == f"job {second} is failed; `retry {second}` lets it go on"


def test_a_cancelled_member_holds_the_follow_up_until_it_is_retried(store: Store) -> None:
    made = begin(store, members(2))
    gone = made.jobs[0].id
    store.queue.cancel(gone, "me")
    assert f"job {gone} is cancelled" in state(store, made.id)[1]
    end(store)
    store.queue.retry(gone, "me")
    end(store)
    assert state(store, made.id)[0] == QUEUED


def test_an_open_batch_says_so_whatever_its_members_do(store: Store) -> None:
    made = begin(store, members(1), open=True)
    (bad,) = end(store, FAILED)
    assert state(store, made.id)[1] == "batch is open"
    close(store, made.id)
    assert f"job {bad} is failed" in state(store, made.id)[1]


def test_when_ended_it_follows_however_they_have_ended(store: Store) -> None:
    made = begin(store, members(4), when=ENDED)
    store.queue.cancel(made.jobs[3].id, "me")
    bad = end(store, FAILED, n=2)
    assert state(store, made.id) == (BLOCKED, "waits for its members")
    end(store)
    counts = {"members": 4, "done": 1, "failed": 2, "cancelled": 1, "expired": 0}
    assert told(store, made.id) == {**counts, "ids": sorted([*bad, made.jobs[3].id])}
    assert edges(store) == 0
    is_whole(store)


def test_when_ended_a_member_that_is_retried_is_waited_for_again(store: Store) -> None:
    made = begin(store, members(2), when=ENDED)
    (bad,) = end(store, FAILED)
    store.queue.retry(bad, "me")
    end(store, n=1)
    assert state(store, made.id)[0] == BLOCKED
    end(store)
    assert told(store, made.id)["done"] == 2
    is_whole(store)


def test_a_member_retried_after_the_follow_up_has_begun_changes_nothing(store: Store) -> None:
    made = begin(store, members(1), when=ENDED)
    (bad,) = end(store, FAILED)
    assert told(store, made.id)["failed"] == 1
    store.queue.retry(bad, "me")
    end(store)
    assert (store.row(made.id).state, store.row(made.id).waits) == (RUNNING, 0)


def test_the_ids_told_are_the_first_hundred(store: Store) -> None:
    made = begin(store, members(120), when=ENDED)
    bad = sorted(end(store, FAILED, n=120))
    batch = told(store, made.id)
    assert (batch["failed"], batch["ids"]) == (120, bad[:100])


@pytest.mark.parametrize("when", [DONE, ENDED])
def test_a_member_that_a_key_knows_is_waited_for_too(store: Store, when: str) -> None:
    other = store.submit(params={"n": 0}, key="k")
    made = begin(store, [NewJob("hash", {"n": 0}, key="k"), NewJob("hash", {"n": 1})], when=when)
    assert [job.duplicate for job in made.jobs] == [True, False]
    assert made.jobs[0].id == other
    assert (made.members, store.row(other).parent) == (2, None)
    end(store)
    assert store.row(other).state == DONE
    assert state(store, made.id)[0] == BLOCKED
    end(store)
    assert told(store, made.id)["done"] == 2


def test_a_member_that_is_done_already_counts_as_done(store: Store) -> None:
    store.submit(params={"n": 0}, key="k")
    end(store)
    known = NewJob("hash", {"n": 0}, key="k")
    made = begin(store, [known])
    assert told(store, made.id)["done"] == 1
    open_ = begin(store, [], open=True)
    assert add(store, open_.id, [known], open=False).members == 1
    assert state(store, open_.id)[0] == QUEUED
    is_whole(store)


def test_a_member_that_has_failed_already_holds_the_follow_up_or_is_told(store: Store) -> None:
    other = store.submit(params={"n": 0}, key="k")
    end(store, FAILED)
    known = NewJob("hash", {"n": 0}, key="k")
    made = begin(store, [known])
    assert f"job {other} is failed" in state(store, made.id)[1]
    ended = begin(store, [known], when=ENDED, followup=NewJob("report", {"of": "a day"}))
    assert told(store, ended.id) == {
        **{"members": 1, "done": 0, "failed": 1, "cancelled": 0, "expired": 0},
        "ids": [other],
    }
    late = begin(store, [known, *members(1)], when=ENDED)
    assert store.row(late.id).waits == 1
    store.queue.retry(other, "me")
    assert store.row(late.id).waits == 2
    end(store, n=2)
    assert state(store, made.id)[0] == state(store, late.id)[0] == QUEUED
    assert edges(store) == 0


def test_one_job_may_be_in_several_batches(store: Store) -> None:
    one = NewJob("hash", {"n": 0}, key="k")
    first, second = begin(store, [one]), begin(store, [one])
    assert first.jobs[0].id == second.jobs[0].id
    end(store)
    assert state(store, first.id)[0] == state(store, second.id)[0] == QUEUED


def test_a_batch_with_a_key_is_made_once(store: Store) -> None:
    def again(n: int = 3) -> Gathered:
        jobs = members(n)
        for i, one in enumerate(jobs):
            one.key = f"\0report k {i}"
        return begin(store, jobs, followup=then(key="k"))

    made = again()
    assert again() == Gathered(
        made.id, [job._replace(duplicate=True) for job in made.jobs], True, False, 3
    )
    end(store, n=3)
    assert again().id == made.id
    told(store, made.id)
    assert [job.id for job in again(4).jobs] == [job.id for job in made.jobs] + [0]
    with pytest.raises(KeyConflict):
        begin(store, members(3), followup=NewJob("report", {"of": "a week"}, key="k"))
    assert len(store.fetch(sa.select(schema.job.c.id))) == 4
    is_whole(store)


def test_a_key_of_a_job_that_follows_no_batch_is_a_conflict(store: Store) -> None:
    store.submit("report", params={"of": "a day"}, key="k")
    with pytest.raises(WrongState, match="is no batch"):
        begin(store, members(1), followup=then(key="k"))
    assert len(store.fetch(sa.select(schema.job.c.id))) == 1


def test_members_that_are_added_twice_by_their_keys_are_waited_for_once(store: Store) -> None:
    made = begin(store, [], open=True)
    part = [NewJob("hash", {"n": i}, key=f"part {i}") for i in range(3)]
    first = add(store, made.id, part)
    again = add(store, made.id, part)
    assert [job.id for job in again.jobs] == [job.id for job in first.jobs]
    assert (again.members, store.row(made.id).waits) == (3, 4)
    close(store, made.id)
    assert add(store, made.id, part) == Gathered(made.id, again.jobs, True, False, 3)
    end(store, n=3)
    assert told(store, made.id)["done"] == 3


def test_a_foreign_member_that_is_added_twice_is_waited_for_once(store: Store) -> None:
    store.submit(params={"n": 0}, key="k")
    made = begin(store, [], open=True)
    for _ in range(2):
        add(store, made.id, [NewJob("hash", {"n": 0}, key="k")])
    assert (store.row(made.id).waits, edges(store)) == (2, 1)
    close(store, made.id)
    end(store)
    assert state(store, made.id)[0] == QUEUED


@pytest.mark.parametrize("done_at", ["before", "between"])
def test_a_foreign_member_that_is_added_again_once_it_is_done_is_counted_once(
    store: Store, done_at: str
) -> None:
    keyed, limits = NewJob("hash", {"n": 0}, key="k"), Limits(unique="u", unique_us=60_000_000)
    unique = NewJob("hash", {"n": 1}, limits=limits)
    store.accepted(keyed)
    store.accepted(unique)
    if done_at == "before":
        end(store, n=2)
    made = begin(store, [keyed], open=True)
    assert add(store, made.id, [keyed, unique]).members == 2
    if done_at == "between":
        end(store, n=2)
    assert add(store, made.id, [unique, keyed]).members == 2
    assert add(store, made.id, [unique, keyed], open=False).members == 2
    assert add(store, made.id, [keyed], open=False).duplicate
    assert (told(store, made.id)["members"], edges(store)) == (2, 0)
    is_whole(store)


def test_a_unique_member_is_the_job_that_has_its_key(store: Store) -> None:
    limits = Limits(unique="5")
    other = store.submit("hash", params={"n": 5}, limits=limits)
    made = begin(store, [NewJob("hash", {"n": 5}, limits=limits)] * 2)
    assert [job.id for job in made.jobs] == [other, other]
    assert made.members == 1
    end(store)
    assert state(store, made.id)[0] == QUEUED


def test_a_follow_up_that_is_unique_and_there_already_is_refused(store: Store) -> None:
    limits = Limits(unique="5")
    other = store.submit("report", limits=limits)
    with pytest.raises(WrongState, match=f"job {other} is what `then` repeats"):
        begin(store, members(2), followup=then(limits=limits))
    assert [row.id for row in store.fetch(sa.select(schema.job.c.id))] == [other]


@pytest.mark.parametrize("when", [DONE, ENDED])
def test_members_may_stand_in_the_line_of_their_follow_up(store: Store, when: str) -> None:
    limits = Limits(serial="vm 5")
    jobs = [NewJob("hash", {"n": i}, limits=limits) for i in range(2)]
    made = begin(store, jobs, when=when, followup=then(limits=limits))
    store.queue.cancel(made.id, "me")
    store.queue.retry_many([made.id, *(job.id for job in made.jobs)], "me")
    other = store.submit("hash", limits=limits)
    assert end(store) == [made.jobs[0].id]
    assert end(store) == [made.jobs[1].id]
    assert state(store, made.id)[0] == QUEUED
    assert store.claim(1) == [], "the older one has the turn"
    assert told(store, made.id)["done"] == 2
    assert state(store, other)[0] == QUEUED


def test_what_waits_for_a_batch_cannot_be_its_member(store: Store) -> None:
    made = begin(store, [], open=True)
    after = store.submit(params={"n": 0}, after=(made.id,), key="k")
    behind = store.submit(params={"n": 1}, after=(after,), key="l")
    line = store.submit(params={"n": 2}, after=(made.id,), limits=Limits(serial="s"))
    for member in (
        NewJob("hash", {"n": 0}, key="k"),
        NewJob("hash", {"n": 1}, key="l"),
        NewJob("hash", {"n": 3}, after=(made.id,)),
        NewJob("hash", {"n": 3}, after=(behind,)),
        NewJob("hash", {"n": 3}, limits=Limits(serial="s")),
    ):
        with pytest.raises(WrongState, match=f"wait for batch {made.id}"):
            add(store, made.id, [member])
    add(store, made.id, [NewJob("hash", {"n": 3}, limits=Limits(serial="t"))], open=False)
    end(store)
    told(store, made.id)
    assert state(store, line)[0] == BLOCKED
    is_whole(store)


def test_members_go_before_nobody_who_came_before_them(store: Store) -> None:
    made = begin(store, [], open=True)
    other = store.submit()
    added = add(store, made.id, members(1)).jobs[0].id
    assert [job.id for job in store.claim(2)] == [other, added]


def test_a_batch_that_was_cancelled_goes_on_when_it_is_retried(store: Store) -> None:
    made = begin(store, members(2), open=True)
    end(store)
    store.queue.cancel(made.id, "me")
    (gone,) = (job.id for job in made.jobs if state(store, job.id)[0] == CANCELLED)
    store.queue.retry(made.id, "me")
    assert state(store, made.id) == (BLOCKED, "batch is open")
    close(store, made.id)
    assert f"`retry {gone}` lets it go on" in state(store, made.id)[1]
    store.queue.retry(gone, "me")
    end(store)
    assert told(store, made.id)["done"] == 2


@pytest.mark.parametrize("when", [DONE, ENDED])
def test_a_cancelled_batch_whose_members_have_ended_starts_when_retried(
    store: Store, when: str
) -> None:
    made = begin(store, members(2), when=when)
    running = store.claim(2)
    store.queue.cancel(made.id, "me")
    for job in running:
        store.queue.finish(job, Outcome(DONE))
    store.flush()
    assert state(store, made.id)[0] == CANCELLED
    store.queue.retry(made.id, "me")
    assert told(store, made.id)["done"] == 2
    is_whole(store)


@pytest.mark.parametrize("when", [DONE, ENDED])
def test_a_batch_and_its_members_retried_together_wait_for_each_other(
    store: Store, when: str
) -> None:
    made = begin(store, members(2), when=when)
    ids = [made.id, *(job.id for job in made.jobs)]
    store.queue.cancel(made.id, "me")
    assert {store.row(id).state for id in ids} == {CANCELLED}
    assert store.queue.retry_many(ids, "me") == ids
    assert state(store, made.id) == (BLOCKED, "waits for its members")
    end(store, n=2)
    assert told(store, made.id)["done"] == 2
    is_whole(store)


def test_a_follow_up_that_failed_is_retried_with_what_it_was_told(store: Store) -> None:
    made = begin(store, members(2), when=ENDED)
    bad = sorted(end(store, FAILED, n=2))
    assert end(store, FAILED, type="report") == [made.id]
    store.queue.retry(made.id, "me")
    assert told(store, made.id)["ids"] == bad
    is_whole(store)


def test_an_attempt_of_the_follow_up_leaves_its_members_as_they_are(store: Store) -> None:
    made = begin(store, members(2), when=ENDED)
    end(store, FAILED, n=2)
    before = [store.row(job.id) for job in made.jobs]
    (job,) = store.claim(1, "report")
    store.queue.finish(job, Outcome(QUEUED, reason="retry 1 of 3"))
    store.flush()
    assert [store.row(job.id) for job in made.jobs] == before


def test_members_are_kept_until_the_follow_up_has_ended(store: Store) -> None:
    made = begin(store, members(3), when=ENDED, open=True)
    end(store)
    end(store, FAILED)
    end(store)
    forever = 1 << 60
    assert store.purge(DONE, forever) + store.purge(FAILED, forever) == 0
    close(store, made.id)
    assert told(store, made.id)["failed"] == 1


def test_a_follow_up_that_is_gone_leaves_nothing(store: Store) -> None:
    made = begin(store, members(3), when=ENDED)
    end(store, FAILED)
    store.queue.cancel(made.id, "me")
    for state_ in (CANCELLED, CANCELLED, FAILED):  # those that it waits for go after it
        store.purge(state_, 1 << 60)
    assert store.fetch(sa.select(schema.job.c.id)) == []
    assert edges(store) == 0
    is_whole(store)


def test_a_follow_up_that_was_delayed_starts_not_before_its_time(store: Store) -> None:
    made = begin(store, members(1), followup=then(run_at=1 << 60))
    end(store)
    assert state(store, made.id)[0] == QUEUED
    assert store.claim(1, "report") == []


def test_members_that_end_while_others_are_added_are_all_counted(store: Store) -> None:
    """Two daemons where the database serves two: what is lost would leave it blocked for ever."""
    with store.beside() as other:
        made = begin(store, members(20), open=True)
        over = threading.Event()

        def work() -> None:
            while not over.is_set() or other.fetch(
                sa.select(schema.job.c.id).where(
                    schema.job.c.type == "hash", schema.job.c.state == QUEUED
                )
            ):
                for job in other.claim(7):
                    other.queue.finish(job, Outcome(FAILED if job.params["n"] % 3 == 0 else DONE))
                other.flush()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for _ in range(20):
                add(store, made.id, members(20))
            close(store, made.id)
        finally:
            over.set()
            worker.join(60)
        for failed in store.fetch(sa.select(schema.job.c.id).where(schema.job.c.state == FAILED)):
            assert state(store, made.id)[0] == BLOCKED
            store.queue.retry(failed.id, "me")
            end(store)
        batch = told(store, made.id)
        assert (batch["members"], batch["done"]) == (420, 420)
        assert edges(store) == 0
        is_whole(store)
