"""Steps as they are stored: by whom, once, and for how long."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from tests import stores
from tests.stores import Store
from upq import schema
from upq.errors import WrongState
from upq.job import DONE, FAILED, Outcome
from upq.record import step_key

database, url, store = stores.database, stores.url, stores.store

KEY = step_key("draw", 1)


def steps(store: Store) -> list[tuple[int, str, str]]:
    found = store.fetch(sa.select(schema.step.c.job, schema.step.c.name, schema.step.c.result))
    return [(*row,) for row in found]


def test_a_step_is_kept_once_and_found_again(store: Store) -> None:
    store.submit()
    job = store.claim_one()
    assert store.views.step(job.id, KEY) is None
    store.queue.keep_step(job, KEY, "draw", {"n": [1, "ü\0"]})
    store.queue.keep_step(job, KEY, "draw", "an echo, after a commit in doubt")
    store.queue.keep_step(job, step_key("draw", 2), "draw", None)
    assert store.views.step(job.id, KEY) == [{"n": [1, "ü\0"]}]
    assert store.views.step(job.id, step_key("draw", 2)) == [None]
    assert store.views.step(job.id + 1, KEY) is None


def test_a_claim_that_is_lost_keeps_no_step(store: Store) -> None:
    store.submit()
    lost = store.claim_one()
    store.queue.rescue([lost], lambda _: ((), None))
    with pytest.raises(WrongState, match="another claim owns it, step draw is not kept"):
        store.queue.keep_step(lost, KEY, "draw", 1)
    job = store.claim_one()
    with pytest.raises(WrongState):
        store.queue.keep_step(lost, KEY, "draw", 1)
    store.queue.keep_step(job, KEY, "draw", 2)
    assert store.views.step(job.id, KEY) == [2]


def test_a_job_that_has_ended_keeps_no_step_any_more(store: Store) -> None:
    store.submit()
    job = store.claim_one()
    store.queue.finish(job, Outcome(FAILED))
    store.flush()
    with pytest.raises(WrongState):
        store.queue.keep_step(job, KEY, "draw", 1)
    assert steps(store) == []


def test_steps_outlive_a_retry_and_go_with_their_job(store: Store) -> None:
    for state in FAILED, DONE:
        store.submit(state)
        job = store.claim_one(state)
        store.queue.keep_step(job, KEY, "draw", state)
        store.queue.finish(job, Outcome(state))
        store.flush()
    store.queue.retry(steps(store)[0][0], "root")
    assert store.purge(DONE, 1 << 60) == 1
    assert [(name, text) for _, name, text in steps(store)] == [("draw", '"failed"')]


def test_of_many_children_the_unfinished_are_named_in_their_order(store: Store) -> None:
    ids = [store.submit() for _ in range(3)]
    store.queue.finish(store.claim_one(), Outcome(DONE))
    store.flush()
    far = list(range(10**6, 10**6 + 2500))
    assert store.views.unfinished([ids[2], *far, ids[0], ids[1]]) == [ids[2], *far, ids[1]]
