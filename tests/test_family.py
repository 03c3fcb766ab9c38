"""Trees of jobs in the store: cancelled as one, and queued again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from tests import stores
from tests.stores import Store
from upq import family, schema, when
from upq.errors import IsCancelled, WrongState
from upq.job import (
    BLOCKED,
    CANCELLED,
    DONE,
    EXPIRED,
    FAILED,
    QUEUED,
    REPLACE,
    RUNNING,
    Gather,
    Gathered,
    Job,
    Limits,
    NewJob,
    Outcome,
)

database, url, store = stores.database, stores.url, stores.store


def below(parent: int, type: str = "hash", **fields: Any) -> NewJob:
    return NewJob(type, {}, parent=parent, root=parent, **fields)


def child(store: Store, parent: int, type: str = "hash") -> int:
    """Queue what a running parent asks for."""
    key = f"{parent} {store.queue.reserve_ids(1)}"
    return store.accepted(below(parent, type, child_key=key))[0].id


def end(
    store: Store, job: Job, state: str = DONE, then: Sequence[NewJob] = (), **fields: Any
) -> bool:
    heard: list[bool] = []
    store.queue.finish(job, Outcome(state, **fields), then, heard.append)
    store.flush()
    return heard[0]


def states(store: Store, *ids: int) -> list[str]:
    return [store.row(id).state for id in ids]


def the_child(store: Store, parent: int) -> int:
    (found,) = store.views.children(parent)
    return int(found["id"])


# Cancel


def test_a_cancel_reaches_all_that_waits_and_runs_below(store: Store) -> None:
    root = store.submit("parent")
    store.claim_one("parent")
    one, two = child(store, root), child(store, root)
    (running,) = store.claim(1)
    deep = child(store, running.id)
    other = store.submit()
    assert store.queue.cancel(root, "alice") == (RUNNING, 3)
    assert states(store, root, one, two, deep) == [RUNNING, RUNNING, CANCELLED, CANCELLED]
    assert store.row(one).cancel_asked == 1
    assert store.views.history(deep)[-1]["who"] == "alice"
    assert states(store, other) == [QUEUED]
    assert [job.id for job in store.claim(9)] == [other]


def test_a_cancel_goes_through_jobs_that_have_ended(store: Store) -> None:
    root = store.submit("first")
    end(store, store.claim_one("first"), then=[below(root, "second")])
    second = the_child(store, root)
    end(store, store.claim_one("second"), then=[below(second, "third")])
    third = the_child(store, second)
    assert store.queue.cancel(root, "alice") == (DONE, 1)
    assert states(store, root, second, third) == [DONE, DONE, CANCELLED]
    with pytest.raises(WrongState, match=f"job {root} is done already"):
        store.queue.cancel(root, "alice")


def test_nothing_begins_below_a_job_that_is_asked_to_end(store: Store) -> None:
    root, other = store.submit("parent"), store.submit("parent")
    store.claim(2, "parent")
    store.queue.cancel(root, "alice")
    with pytest.raises(IsCancelled, match=f"job {root} is cancelled"):
        child(store, root)
    assert store.queue.submit([[below(root)], [below(other)]])[1]
    assert store.views.children(root) == []
    assert len(store.views.children(other)) == 1


def test_nothing_begins_below_a_job_that_was_cancelled_before_it_ran(store: Store) -> None:
    first = store.submit()
    root = store.submit("parent", after=(first,))
    store.queue.cancel(root, "alice")
    with pytest.raises(IsCancelled):
        store.accepted(below(root))


def test_what_follows_a_step_that_ends_while_it_is_cancelled_does_not_run(store: Store) -> None:
    root = store.submit("first")
    job = store.claim_one("first")
    assert store.queue.cancel(root, "alice") == (RUNNING, 0)
    assert end(store, job, then=[below(root, "second")])
    second = the_child(store, root)
    assert states(store, root, second) == [DONE, CANCELLED]
    assert store.claim(1, "second") == []
    assert [e["state"] for e in store.views.history(second)] == [QUEUED, CANCELLED]


@pytest.mark.parametrize(("reason", "state"), [("", CANCELLED), ("timeout", FAILED)])
def test_what_fails_after_a_cancel_of_which_it_has_not_heard_is_cancelled(
    store: Store, reason: str, state: str
) -> None:
    root = store.submit("parent")
    job = store.claim_one("parent")
    store.queue.cancel(root, "alice")
    assert end(store, job, FAILED, then=[below(root, "sorry")], reason=reason)
    assert states(store, root) == [state]
    sorry = [one["state"] for one in store.views.children(root)]
    assert sorry == ([] if state == CANCELLED else [CANCELLED])


def test_an_end_in_cancelled_cancels_what_is_left_below(store: Store) -> None:
    """As when the daemon died in the middle of a cancel."""
    root = store.submit("parent")
    job = store.claim_one("parent")
    waits, runs = child(store, root), child(store, root, "other")
    deep = child(store, store.claim_one("other").id)
    assert end(store, job, CANCELLED, reason="asked")
    assert states(store, root, waits, runs, deep) == [CANCELLED, CANCELLED, RUNNING, CANCELLED]
    assert store.row(runs).cancel_asked == 1


def test_an_end_in_cancelled_goes_on_below_until_all_is_cancelled(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "CHUNK", 5)
    root = store.submit("parent")
    job = store.claim_one("parent")
    ids = [child(store, root) for _ in range(12)]
    ids += [child(store, id) for id in ids]
    assert end(store, job, CANCELLED, reason="asked")
    assert set(states(store, *ids)) == {CANCELLED}


def test_a_tree_of_many_is_cancelled_a_part_at_a_time(store: Store) -> None:
    root = store.submit("parent")
    store.claim_one("parent")
    first = store.accepted(below(root))[0].id
    ids = [first, *store.copy(first, 2 * family.CHUNK)]
    before = store.queue.writer.commits
    assert store.queue.cancel(root, "alice") == (RUNNING, len(ids))
    assert store.queue.writer.commits - before >= 3
    assert {one["state"] for one in store.views.children(root)} == {CANCELLED}
    assert states(store, ids[-1]) == [CANCELLED]
    lane = store.queue.lane("hash", "hash").id
    assert store.views.counts()[lane] == {
        **dict.fromkeys(store.views.counts()[lane], 0), CANCELLED: len(ids),
    }  # fmt: skip


def half_cancelled(store: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[int]]:
    """A parent with 12 children, cancelled by a daemon that has died after the first step."""
    monkeypatch.setattr(family, "CHUNK", 5)
    root = store.submit("parent")
    store.claim_one("parent")
    ids = [child(store, root) for _ in range(12)]
    with monkeypatch.context() as dying:
        dying.setattr(store.queue, "_go_on", lambda cancel: 0)
        store.queue.cancel(root, "alice")
    assert set(states(store, *ids[5:])) == {QUEUED}
    return root, ids


def open_cancels(store: Store) -> int:
    return len(store.fetch(sa.select(schema.cancel)))


def test_a_cancel_goes_on_after_the_death_of_its_daemon(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ids = half_cancelled(store, monkeypatch)
    deep = [store.accepted(below(ids[9]))[0].id for _ in range(7)]
    with Store(store.database, "next") as following:
        following.queue.tend_cancels(at_once=True)
        following.flush()
    assert set(states(store, *ids, *deep)) == {CANCELLED}
    assert {store.views.history(id)[-1]["who"] for id in (*ids, *deep)} == {"alice"}
    assert open_cancels(store) == 0


def test_another_daemon_goes_on_with_a_cancel_once_it_stands_still(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ids = half_cancelled(store, monkeypatch)
    with store.beside() as other:
        other.queue.tend_cancels()
        other.flush()
        assert open_cancels(store) == 1, "it may be under way"
        other.queue.tend_cancels()
        other.flush()
        other.queue.tend_cancels()
        assert not other.queue.cancelling
    assert set(states(store, *ids)) == {CANCELLED}


def test_a_claim_starts_nothing_that_a_cancel_has_not_come_to_yet(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ids = half_cancelled(store, monkeypatch)
    deep, other = store.accepted(below(ids[5], "other"))[0].id, store.submit("other")
    beside = [store.submit() for _ in range(2)]
    with Store(store.database, "next") as following:
        following.queue.tend_cancels()
        lanes = [following.queue.lane(name, name).id for name in ("hash", "other")]
        claimed = following.queue.claim(
            [(lane_id, n) for lane_id, n in zip(lanes, (3, 2), strict=True)]
        )
        assert [job.id for job in claimed] == [other]
        assert states(store, *ids).count(CANCELLED) == 5 + 3
        assert states(store, deep) == [CANCELLED]
        assert [job.id for job in following.claim(6)] == beside
    assert set(states(store, *ids)) == {CANCELLED}


def test_a_retry_lets_a_cancel_come_to_its_end_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ids = half_cancelled(store, monkeypatch)
    store.queue.retry(ids[0], "alice")
    assert states(store, *ids) == [QUEUED] + [CANCELLED] * 11
    assert open_cancels(store) == 0
    assert [job.id for job in store.claim(12)] == ids[:1]


def test_a_retry_elsewhere_does_not_wait_for_a_cancel(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = store.submit("other")
    end(store, store.claim_one("other"), FAILED)
    half_cancelled(store, monkeypatch)
    store.queue.retry(other, "alice")
    assert states(store, other) == [QUEUED]
    assert open_cancels(store) == 1


def test_of_a_cancel_the_answer_counts_what_claims_have_met(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "CHUNK", 5)
    root = store.submit("parent")
    store.claim_one("parent")
    ids = [child(store, root) for _ in range(12)]
    go_on = store.queue._go_on

    def late(cancel: int | None) -> int:
        assert store.claim(3) == []
        return go_on(cancel)

    monkeypatch.setattr(store.queue, "_go_on", late)
    assert store.queue.cancel(root, "alice") == (RUNNING, len(ids))


def test_of_a_kind_that_is_cancelled_all_that_is_below_goes_with_it(store: Store) -> None:
    one, two = store.submit("parent"), store.submit("parent")
    store.claim_one("parent")
    ids = child(store, one), child(store, one)
    assert store.queue.cancel_many([one, two], "alice") == ([one, two], 2)
    assert states(store, one, two, *ids) == [RUNNING, CANCELLED, CANCELLED, CANCELLED]


def test_a_child_that_is_to_run_again_does_not_below_a_cancelled_parent(store: Store) -> None:
    root = store.submit("parent")
    store.claim_one("parent")
    id = child(store, root)
    end(store, store.claim_one(), FAILED)
    store.queue.cancel(root, "alice")
    with pytest.raises(IsCancelled):
        store.queue.retry(id, "alice", parent=root)
    assert states(store, id) == [FAILED]


def test_a_job_whose_daemon_died_while_it_was_to_end_is_cancelled(store: Store) -> None:
    root = store.submit("parent")
    store.claim_one("parent")
    id = child(store, root)
    store.queue.cancel(root, "alice")
    later = child(store, store.claim_one("parent").id) if store.submit("parent") else 0
    with Store(store.database) as next_one:
        next_one.queue.rescue(next_one.queue.orphans(), lambda job: ([], None))
    assert states(store, root, id, later) == [CANCELLED, CANCELLED, QUEUED]
    assert store.views.history(root)[-1]["reason"] == "asked"


def test_plain_jobs_pay_nothing_for_trees(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    said = count_statements(monkeypatch)
    store.submit()
    job = store.claim_one()
    end(store, job)
    assert len(said) > 5
    asked = [text for text in said if text.startswith("SELECT") and "parent =" in text]
    assert asked == []
    assert not [text for text in said if text.startswith("SELECT") and "cancel_asked" in text and
                "LIMIT" not in text], "but for the claim, which reads all of a row"  # fmt: skip


def count_statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr("upq.log.statement", said.append)
    return said


def test_of_a_cancel_and_a_child_at_the_same_moment_no_child_is_left(store: Store) -> None:
    """Two daemons, where the database allows it: one has the parent, the other cancels it."""
    with store.beside() as other, ThreadPoolExecutor(2) as threads:
        for _ in range(30):
            root = store.submit("parent")
            store.claim_one("parent")
            together = threading.Barrier(2)

            def submits(root: int = root, together: threading.Barrier = together) -> int:
                together.wait()
                for n in range(20):
                    try:
                        child(store, root)
                    except IsCancelled:
                        return n
                return 20

            def cancels(root: int = root, together: threading.Barrier = together) -> None:
                together.wait()
                other.queue.cancel(root, "alice")

            n, _ = threads.submit(submits), threads.submit(cancels).result()
            n.result()
            assert {one["state"] for one in store.views.children(root)} <= {CANCELLED}


def test_of_a_cancel_and_an_end_at_the_same_moment_nothing_follows(store: Store) -> None:
    with store.beside() as other, ThreadPoolExecutor(2) as threads:
        for _ in range(30):
            root = store.submit("first")
            job = store.claim_one("first")
            together = threading.Barrier(2)

            def ends(job: Job = job, together: threading.Barrier = together) -> None:
                together.wait()
                end(store, job, then=[below(job.id, "second")])

            def cancels(root: int = root, together: threading.Barrier = together) -> None:
                together.wait()
                other.queue.cancel(root, "alice")

            both = threads.submit(ends), threads.submit(cancels)
            for one in both:
                one.result()
            assert states(store, the_child(store, root)) == [CANCELLED]
            assert BLOCKED not in states(store, root)


# Ended from outside in other ways


def no_jobs(job: Job) -> tuple[list[NewJob], None]:
    return [], None


def test_below_a_job_that_is_replaced_all_is_cancelled(store: Store) -> None:
    replaces = Limits(when_busy=REPLACE)
    root = store.submit("parent", limits=replaces)
    job = store.claim_one("parent")
    waits, runs = child(store, root), child(store, root, "other")
    deep = child(store, store.claim_one("other").id)
    end(store, job, QUEUED, run_at=when.now() + 3_600_000_000)
    new = store.submit("parent", limits=replaces)
    assert states(store, root, new, waits, runs, deep) == [
        CANCELLED, QUEUED, CANCELLED, RUNNING, CANCELLED,
    ]  # fmt: skip
    assert store.row(runs).cancel_asked == 1
    assert store.views.job(root)["reason"] == f"replaced by {new}"
    assert store.views.job(waits)["message"] == "cancelled with the job above it"


def test_what_takes_the_place_of_a_job_above_it_goes_on(store: Store) -> None:
    replaces = Limits(when_busy=REPLACE)
    root = store.submit("parent", limits=replaces)
    job = store.claim_one("parent")
    runs = child(store, root)
    store.claim_one()
    end(store, job, QUEUED, run_at=when.now() + 3_600_000_000)
    new = store.accepted(below(runs, "parent", limits=replaces))[0].id
    assert states(store, root, runs, new) == [CANCELLED, RUNNING, QUEUED]
    assert store.row(runs).cancel_asked == 1
    assert [job.id for job in store.claim(2, "parent")] == [new]


def test_a_batch_that_is_replaced_keeps_the_members_that_the_next_one_has(store: Store) -> None:
    def fill() -> Gathered:
        members = [NewJob("hash", {"n": 1}, key="k"), NewJob("hash", {"n": 2})]
        return store.queue.fill(members, Gather(NewJob("tell", {}, limits=replaces)))

    replaces = Limits(when_busy=REPLACE)
    first, second = fill(), fill()
    kept, gone = (one.id for one in first.jobs)
    assert second.jobs[0].id == kept
    assert states(store, first.id, second.id, kept, gone) == [
        CANCELLED, BLOCKED, QUEUED, CANCELLED,
    ]  # fmt: skip


@pytest.mark.parametrize("chunk", [2, 1000])
def test_below_a_job_that_expires_all_is_cancelled_but_what_tells_of_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(family, "CHUNK", chunk)
    members = [NewJob("hash", {"n": n}) for n in range(6)]
    limits = Limits(expires_at=when.now() + 3_600_000_000)
    made = store.queue.fill(members, Gather(NewJob("tell", {}, limits=limits)))
    ids = [one.id for one in made.jobs]
    end(store, store.claim_one())
    runs = store.claim_one().id
    store.change(sa.update(schema.job).values(expires_at=1).where(schema.job.c.id == made.id))
    store.queue.expire(lambda job: ([below(job.id, "sorry")], None))
    (sorry,) = [one["id"] for one in store.views.children(made.id) if one["type"] == "sorry"]
    assert (open_cancels(store) == 1) is (chunk == 2)
    assert [job.id for job in store.claim(1, "sorry")] == [sorry]
    store.flush()
    assert states(store, made.id, *ids) == [EXPIRED, DONE, RUNNING, *[CANCELLED] * 4]
    assert store.row(runs).cancel_asked == 1
    assert states(store, sorry) == [RUNNING]


def test_children_of_a_parent_that_was_given_back_expire_with_it(store: Store) -> None:
    root = store.submit("parent", limits=Limits(expires_at=when.now() + 3_600_000_000))
    job = store.claim_one("parent")
    id = child(store, root)
    end(store, job, QUEUED, reason="interrupted", counts=False)
    store.change(sa.update(schema.job).values(expires_at=1).where(schema.job.c.id == root))
    store.queue.expire(no_jobs)
    assert states(store, root, id) == [EXPIRED, CANCELLED]


def test_children_of_a_parent_that_fails_go_on(store: Store) -> None:
    """For what runs it again: a timeout is a failure, too."""
    root = store.submit("parent")
    job = store.claim_one("parent")
    id = child(store, root)
    end(store, job, FAILED, reason="timeout")
    assert states(store, root, id) == [FAILED, QUEUED]
