"""Jobs of daemons that have died, and claims that nobody heard of: all go back to the queue."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from tests import stores
from tests.stores import Store
from tests.test_queue import counted, end, history, reborn, tallied
from upq import nodes, schema
from upq.batch import Batch
from upq.changes import Claim
from upq.clauses import CHUNK
from upq.job import DONE, FAILED, QUEUED, RUNNING, Job, NewJob, Outcome
from upq.nodes import CRASH_LIMIT, DEATHS

database, url, store = stores.database, stores.url, stores.store


def test_a_beat_renews_only_our_claims(store: Store) -> None:
    store.submit()
    ours = store.claim_one()
    before = store.row(ours.id).lease_until
    with store.beside() as other:
        other.queue.beat()
        assert store.row(ours.id).lease_until == before
    store.queue.beat()
    assert store.row(ours.id).lease_until > before


def test_a_node_whose_row_is_gone_is_entered_again(store: Store) -> None:
    store.change(sa.delete(schema.node))
    store.queue.beat()
    assert [row.id for row in store.fetch(sa.select(schema.node.c.id))] == [store.queue.owner]
    store.queue.beat()
    assert len(store.fetch(sa.select(schema.node.c.id))) == 1


def test_jobs_of_the_dead_go_back_and_their_nodes_are_forgotten(url: str) -> None:
    store = Store(url)
    ids = [store.submit() for _ in range(3)]
    store.claim(2)
    with reborn(url, store) as store:
        dead, owners = store.queue.orphans(), store.queue.dead_nodes()
        assert [one.id for one in dead] == ids[:2]
        assert len(owners) == 1
        assert store.queue.rescue(dead, lambda _: ((), None)) == 2
        store.queue.forget_nodes(owners)
        assert store.queue.dead_nodes() == []
        again = store.claim(9)
        assert [(one.id, one.attempt, one.starts, one.crashes) for one in again] == [
            (ids[0], 1, 2, 1),
            (ids[1], 1, 2, 1),
            (ids[2], 1, 1, 0),
        ]
        assert history(store, ids[0])[-2] == (QUEUED, "interrupted")
        assert tallied(store) == counted(store)
        assert store.queue.rescued == 2


def test_other_nodes_and_machines_are_not_declared_dead(url: str) -> None:
    if url.startswith("sqlite"):
        pytest.skip("SQLite serves one daemon")
    with (
        Store(url) as store,
        Store(url, "other node") as other,
        Store(url, machine="elsewhere") as far,
    ):
        store.submit()
        other.claim_one()
        assert store.queue.dead_nodes() == far.queue.dead_nodes() == []
        assert store.queue.orphans() == far.queue.orphans() == []


def test_who_enters_and_claims_while_it_is_looked_is_not_declared_dead(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if url.startswith("sqlite"):
        pytest.skip("SQLite serves one daemon")
    with Store(url) as store:
        store.submit()
        others: list[Store] = []
        read = nodes.entered

        def entered(batch: Batch) -> dict[str, list[str]]:
            known = read(batch)
            others.append(Store(url, "other node"))
            assert others[0].claim_one()
            return known

        monkeypatch.setattr(nodes, "entered", entered)
        assert store.queue.orphans() == []
        others[0].__exit__()


def test_what_has_ended_since_it_was_found_is_not_put_back(url: str) -> None:
    store = Store(url)
    ids = [store.submit() for _ in range(3)]
    claimed = store.claim(3)
    with reborn(url, store) as store:
        dead = [one._replace(crashes=CRASH_LIMIT) for one in store.queue.orphans()]
        assert end(store, claimed[0])  # its commit was under way
        store.queue.rescue(dead[1:2], lambda _: ((), None))
        told: list[int] = []

        def then(one: Job) -> tuple[list[NewJob], None]:
            told.append(one.id)
            return [NewJob("notify", {"of": one.id})], None

        assert store.queue.rescue(dead, then) == 1
        assert store.queue.crashed == 2
        assert [store.row(id).state for id in ids] == [DONE, FAILED, FAILED]
        assert [one.params for one in store.claim(9, "notify")] == [{"of": ids[2]}]
        assert tallied(store) == counted(store)


def test_many_jobs_of_the_dead_are_found_in_pages(url: str) -> None:
    store = Store(url)
    store.submit()
    claimed = store.claim_one()
    store.copy(claimed.id, CHUNK + 5)
    with reborn(url, store) as store:
        dead = store.queue.orphans()
        assert len({one.id for one in dead}) == CHUNK + 6
        assert store.queue.rescue(dead, lambda _: ((), None)) == CHUNK + 6
        assert tallied(store) == counted(store)


def test_a_job_that_kills_its_daemon_too_often_fails_as_crashed(url: str) -> None:
    store = Store(url)
    id = store.submit()
    last = store.submit(after=(id,))
    for n in range(1, CRASH_LIMIT + 1):
        assert store.claim_one().id == id
        store = reborn(url, store)
        dead, owners = store.queue.orphans(), store.queue.dead_nodes()
        assert store.queue.rescue(dead, lambda one: ([NewJob("notify", {"of": one.id})], None)) == 1
        store.queue.forget_nodes(owners)
        assert store.queue.crashed == (n == CRASH_LIMIT)
    with store:
        seen = store.views.job(id)
        assert (seen["state"], seen["reason"], seen["crashes"]) == (FAILED, "crashed", CRASH_LIMIT)
        assert seen["ended_at"]
        told = [(one["reason"], one["message"]) for one in store.views.history(id)]
        assert (seen["message"], told[-1]) == (DEATHS, ("crashed", DEATHS))
        assert told[:-1] == [(reason, "") for reason, _ in told[:-1]]
        assert [one.params for one in store.claim(9, "notify")] == [{"of": id}]
        assert f"job {id} is failed" in store.views.job(last)["reason"]
        assert tallied(store) == counted(store)
        store.queue.retry(id, "root")
        assert store.claim_one().crashes == 0


def test_a_parent_that_waited_is_not_blamed(url: str) -> None:
    store = Store(url)
    id = store.submit()
    for _ in range(CRASH_LIMIT + 1):
        parent = store.claim_one()
        assert parent.id == id
        store.queue.set_reason(parent, "waits for 18")
        store.flush()
        store = reborn(url, store)
        store.queue.rescue(store.queue.orphans(), lambda _: ((), None))
    with store:
        assert store.views.job(id)["crashes"] == 0


def test_a_parent_is_not_blamed_for_a_child_that_dies_before_it_is_known_to_wait(url: str) -> None:
    store = Store(url)
    parent = store.submit()
    store.claim_one()
    child = store.submit("child", parent=parent, root=parent)
    for n in range(1, CRASH_LIMIT + 1):
        assert store.claim_one("child").id == child
        store = reborn(url, store)
        store.queue.rescue(store.queue.orphans(), lambda _: ((), None))
        assert store.row(child).crashes == n
        assert store.row(parent).crashes == 0
        assert store.claim_one().id == parent
    with store:
        assert store.row(child).state == FAILED


def test_strays_are_claims_that_nobody_heard_of(store: Store) -> None:
    for _ in range(2):
        store.submit()
    known, stray = store.claim(2)
    store.queue._held.remove(stray.token)  # as when the commit of the claim was in doubt
    assert store.queue.release_strays() == [stray.lane]
    again = store.claim_one()
    assert (again.id, again.crashes, again.attempt) == (stray.id, 0, 1)
    assert end(store, known)
    assert store.queue.release_strays() == []


def test_what_the_same_transaction_has_claimed_is_no_stray(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [store.submit() for _ in range(2)]
    stray = store.claim_one()
    store.queue._held.remove(stray.token)
    run, claim = store.queue.writer.run, Claim([(stray.lane, 1)])
    monkeypatch.setattr(store.queue.writer, "run", lambda acts: run([claim, *acts])[1:])
    assert store.queue.release_strays() == [stray.lane]  # and not that of the claim, too
    monkeypatch.undo()
    assert [store.row(id).state for id in ids] == [QUEUED, RUNNING]
    assert store.queue.release_strays() == []
    assert tallied(store) == counted(store)


def test_a_posted_end_is_no_stray(store: Store) -> None:
    store.submit()
    store.queue.finish(store.claim_one(), Outcome(DONE))
    assert store.queue.release_strays() == []
    assert [one["state"] for one in store.jobs([])] == [DONE]
