from __future__ import annotations

import pytest

from tests import stores
from tests.stores import Store
from tests.test_views import HOUR, end, ids, one_of_each
from upq import when
from upq.job import BLOCKED, DONE, FAILED, QUEUED, RUNNING, STATES, Outcome
from upq.lists import LOOK_ROWS, Filter, Lists
from upq.views import LIST_CHARS, LIST_LIMIT, Views

database, url, store = stores.database, stores.url, stores.store


def test_lists_are_newest_first_and_limited(store: Store) -> None:
    many = [store.submit() for _ in range(5)]
    assert ids(store.jobs([], limit=3)) == many[:1:-1]
    assert ids(store.jobs([])) == many[::-1]
    assert store.jobs([], limit=0) == []


def test_a_list_has_a_limit_of_its_own(store: Store) -> None:
    store.copy(store.submit(), LIST_LIMIT + 5)
    assert len(store.jobs([], limit=10**6)) == LIST_LIMIT


@pytest.mark.parametrize("state", STATES)
def test_a_list_of_a_state_has_just_its_jobs(store: Store, state: str) -> None:
    each = one_of_each(store)
    assert ids(store.jobs(store.queue.lanes, state=state)) == (
        [each[state]] if state in each else []
    )


def test_ended_jobs_are_listed_by_their_end(store: Store) -> None:
    first, second = store.submit(), store.submit()
    one, two = store.claim(2)
    for ended in (two, one):
        store.queue.finish(ended, Outcome(DONE))
        store.flush()
    assert ids(store.jobs([], state=DONE)) == [first, second]


def test_a_list_of_a_type_has_just_its_jobs(store: Store) -> None:
    store.submit("reverify")
    mine = store.submit("hash")
    store.submit("hash ")
    assert ids(store.jobs([], type="hash")) == [mine]
    assert store.jobs([], type="HASH") == []
    assert store.jobs([], type="hash", state=DONE) == []


def test_jobs_of_a_held_lane_are_shown_as_blocked(store: Store) -> None:
    free, held = store.submit(), store.submit("reverify")
    waits = store.submit(after=(free,))
    running = store.submit("reverify", priority=10)
    store.claim_one("reverify")
    lane = store.queue.lane("reverify", "reverify").id
    views = Views(store.database, lambda id: "queue is paused" if id == lane else "", frozenset)
    lists = Lists(views)
    assert ids(store.jobs(store.queue.lanes, lists=lists, state=BLOCKED)) == [waits, held]
    assert ids(store.jobs(store.queue.lanes, lists=lists, state=QUEUED)) == [free]
    assert ids(store.jobs(store.queue.lanes, lists=lists, state=RUNNING)) == [running]
    assert ids(store.jobs(store.queue.lanes, lists=lists, state=BLOCKED, type="reverify")) == [held]
    assert ids(store.jobs(store.queue.lanes, lists=lists, state=BLOCKED, limit=1)) == [waits]
    seen = views.job(held)
    assert (seen["state"], seen["reason"]) == (BLOCKED, "queue is paused")


def test_a_list_is_short_where_a_job_is_long(store: Store) -> None:
    id = store.submit()
    end(store, message="m" * (LIST_CHARS + 9), result="r" * (LIST_CHARS + 9))
    (listed,) = store.jobs([])
    assert (len(listed["message"]), listed["result"]) == (LIST_CHARS, None)
    assert len(store.views.job(id)["message"]) == LIST_CHARS + 9


def test_the_next_of_a_lane_are_in_the_order_of_the_claims(store: Store) -> None:
    low, middle, high = (store.submit(priority=p) for p in (-5, 0, 5))
    store.submit(run_at=when.now() + HOUR)
    lane = store.queue.lane("hash", "hash").id
    assert ids(store.lists.next_jobs(lane, 9)) == [high, middle, low]
    assert [store.views.ahead(id, lane) for id in (high, middle, low)] == [0, 1, 2]
    assert [one.id for one in store.claim(9)] == [high, middle, low]


@pytest.mark.slow
@pytest.mark.alone
def test_what_no_index_has_is_looked_for_a_while_and_then_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = store.submit(submitter="anna")
    store.copy(store.submit(submitter="bert"), 3 * LOOK_ROWS)
    last = store.submit(submitter="anna")
    monkeypatch.setattr("upq.lists.LOOK_S", 60.0)
    assert ids(store.jobs([], submitter="anna")) == [last, mine]
    monkeypatch.setattr("upq.lists.LOOK_S", 0.0)
    seen, before, pages = [], None, 0
    while True:
        page = store.lists.page([], Filter(submitter="anna"), before=before)
        seen += ids(page.jobs)
        before, pages = page.next, pages + 1
        if before is None:
            break
    assert (seen, pages > 2) == ([last, mine], True)


def test_pages_of_every_list_hold_each_job_once(store: Store) -> None:
    first = [store.submit() for _ in range(7)]
    for _ in range(3):
        end(store)
    held = [store.submit("reverify") for _ in range(4)]
    waits = [store.submit(after=(first[-1],)) for _ in range(3)]
    lane = store.queue.lane("reverify", "reverify").id
    lists = Lists(Views(store.database, lambda id: "paused" if id == lane else "", frozenset))
    for wanted, expected in (
        (Filter(), first + held + waits),
        (Filter(DONE), first[:3]),
        (Filter(QUEUED), first[3:]),
        (Filter(BLOCKED), held + waits),
        (Filter(None, "reverify"), held),
        (Filter(None, None, frozenset({lane})), held),
    ):
        seen: list[int] = []
        before = None
        while True:
            page = lists.page(store.queue.lanes, wanted, 2, before)
            seen += ids(page.jobs)
            before = page.next
            if before is None:
                break
        assert sorted(seen) == expected, wanted
        assert len(set(seen)) == len(seen)


def test_jobs_to_change_are_read_in_parts(store: Store) -> None:
    a, b = store.submit(), store.submit()
    (one, two) = store.claim(2)
    for ended in (two, one):
        store.queue.finish(ended, Outcome(FAILED))
        store.flush()
    other = store.submit("reverify")
    now = when.now()
    found = [[one.id for one in part] for part in store.lists.chunks(Filter(FAILED), None, now)]
    assert found == [[b, a]]
    assert [*store.lists.chunks(Filter(FAILED), now, now)] in ([], [[]])
    assert [*store.lists.chunks(Filter(QUEUED, "hash", frozenset()), None, now)] == []
    parts = store.lists.chunks(Filter(QUEUED), now - HOUR, now)
    assert [one.id for part in parts for one in part] == [other]
