from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests import stores
from tests.store_bench import crowd
from tests.stores import Store
from upq import when
from upq.errors import NotFound
from upq.job import (
    BLOCKED,
    CANCELLED,
    DONE,
    EXPIRED,
    FAILED,
    QUEUED,
    RUNNING,
    STATES,
    NewJob,
    Outcome,
    Output,
)
from upq.views import AHEAD_LIMIT, LIST_CHARS, LIST_LIMIT, LOOK_ROWS, End, Filter, Views

database, url, store = stores.database, stores.url, stores.store

HOUR = 3_600_000_000


def end(store: Store, state: str = DONE, **fields: Any) -> int:
    """Claim a job and end it; returns its id."""
    claimed = store.claim_one()
    store.queue.finish(claimed, Outcome(state, **fields))
    store.flush()
    return claimed.id


def test_a_clock_that_was_put_back_tells_no_time_below_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.submit()
    claimed, now = store.claim_one(), when.now()
    monkeypatch.setattr(when, "now", lambda: now - 3_600_000_000)
    store.queue.finish(claimed, Outcome(DONE))
    store.flush()
    (attempt,) = store.views.attempts(claimed.id)
    assert (attempt["state"], attempt["took_s"]) == (DONE, None)


def ids(shown: list[dict[str, Any]]) -> list[int]:
    return [one["id"] for one in shown]


def one_of_each(store: Store) -> dict[str, int]:
    found = {DONE: store.submit()}
    end(store)
    found[FAILED] = store.submit()
    end(store, FAILED)
    found[RUNNING] = store.submit()
    store.claim_one()
    found[CANCELLED] = store.submit()
    store.queue.cancel(found[CANCELLED], "root")
    found[QUEUED] = store.submit()
    found[BLOCKED] = store.submit(after=(found[QUEUED],))
    return found


# One job


def test_a_job_has_all_its_fields(store: Store) -> None:
    id = store.submit(params={"fid": 1}, run_at=when.now() + HOUR, priority=5, submitter="uid:3")
    seen = store.views.job(id)
    assert set(seen) >= {
        "id", "type", "queue", "state", "reason", "params", "jobdata", "result", "message",
        "progress", "created_at", "started_at", "ended_at", "attempt", "run_at", "priority",
        "submitter", "parent", "root", "cancel_asked", "crashes", "starts",
    }  # fmt: skip
    assert "lane" not in seen
    assert (seen["priority"], seen["submitter"], seen["cancel_asked"]) == (5, "uid:3", False)
    assert seen["run_at"].startswith("20")
    assert seen["run_at"] > seen["created_at"]
    assert seen["started_at"] is seen["ended_at"] is seen["result"] is seen["progress"] is None


def test_what_is_not_there_is_not_found(store: Store) -> None:
    for ask in (store.views.job, store.views.end, store.views.output):
        with pytest.raises(NotFound, match="no job 77"):
            ask(77)
    assert store.views.history(77) == store.views.children(77) == []
    assert store.views.awaited(77) == ([], 0)
    assert store.views.child("no such key") is None


def test_the_end_of_a_job_is_none_before_it(store: Store) -> None:
    id = store.submit()
    assert store.views.end(id) is None
    end(store, result={"n": 1}, message="well")
    assert store.views.end(id) == End(DONE, {"n": 1}, "well")


def test_a_job_without_output_says_so(store: Store) -> None:
    id = store.submit()
    with pytest.raises(NotFound, match="has no output"):
        store.views.output(id)


def test_history_tells_each_change_with_who_and_where(store: Store) -> None:
    id = store.submit(submitter="uid:3")
    end(store, FAILED, message="no", reason="bad params")
    store.queue.retry(id, "root")
    story = store.views.history(id)
    assert [(s["state"], s["reason"], s["message"], s["attempt"], s["who"]) for s in story] == [
        (QUEUED, "", "", 0, "uid:3"),
        (RUNNING, "", "", 1, ""),
        (FAILED, "bad params", "no", 1, ""),
        (QUEUED, "retry", "", 0, "root"),
    ]
    assert {s["node"] for s in story} == {"node"}
    numbers = [s["n"] for s in story]
    assert numbers == sorted(numbers)


def test_children_and_those_awaited_are_listed_by_id(store: Store) -> None:
    parent = store.submit()
    children = [store.submit(parent=parent, root=parent) for _ in range(2)]
    assert ids(store.views.children(parent)) == children
    last = store.submit(after=(children[1], children[0]))
    assert store.views.awaited(last) == ([(children[0], QUEUED), (children[1], QUEUED)], 2)


def test_a_child_is_found_by_its_key(store: Store) -> None:
    parent = store.submit()
    child = store.submit(parent=parent, child_key="k" * 64)
    assert store.views.child("k" * 64) == (child, False)


# Secrets


@pytest.fixture
def discreet(store: Store) -> Views:
    return Views(store.database, lambda lane: "", lambda: frozenset({"password"}))


def test_secrets_are_shown_nowhere(store: Store, discreet: Views) -> None:
    secret = "s3cr3t-word"
    id = store.submit(params={"user": "anna", "password": secret})
    end(store, FAILED, message=f"login with {secret} failed", data={"password": secret, "x": 1},
        result={"password": secret}, output=Output(f"echo {secret}", 20, False))  # fmt: skip
    everything = str((
        discreet.job(id), discreet.jobs([]), discreet.history(id), discreet.output(id),
        discreet.children(id),
    ))  # fmt: skip
    assert secret not in everything
    assert "anna" in everything


# Lists


def test_lists_are_newest_first_and_limited(store: Store) -> None:
    many = [store.submit() for _ in range(5)]
    assert ids(store.views.jobs([], limit=3)) == many[:1:-1]
    assert ids(store.views.jobs([])) == many[::-1]
    assert store.views.jobs([], limit=0) == []


def test_a_list_has_a_limit_of_its_own(store: Store) -> None:
    store.copy(store.submit(), LIST_LIMIT + 5)
    assert len(store.views.jobs([], limit=10**6)) == LIST_LIMIT


@pytest.mark.parametrize("state", STATES)
def test_a_list_of_a_state_has_just_its_jobs(store: Store, state: str) -> None:
    each = one_of_each(store)
    assert ids(store.views.jobs(store.queue.lanes, state=state)) == (
        [each[state]] if state in each else []
    )


def test_ended_jobs_are_listed_by_their_end(store: Store) -> None:
    first, second = store.submit(), store.submit()
    one, two = store.claim(2)
    for ended in (two, one):
        store.queue.finish(ended, Outcome(DONE))
        store.flush()
    assert ids(store.views.jobs([], state=DONE)) == [first, second]


def test_a_list_of_a_type_has_just_its_jobs(store: Store) -> None:
    store.submit("reverify")
    mine = store.submit("hash")
    store.submit("hash ")
    assert ids(store.views.jobs([], type="hash")) == [mine]
    assert store.views.jobs([], type="HASH") == []
    assert store.views.jobs([], type="hash", state=DONE) == []


def test_jobs_of_a_held_lane_are_shown_as_blocked(store: Store) -> None:
    free, held = store.submit(), store.submit("reverify")
    waits = store.submit(after=(free,))
    running = store.submit("reverify", priority=10)
    store.claim_one("reverify")
    lane = store.queue.lane("reverify", "reverify").id
    views = Views(store.database, lambda id: "queue is paused" if id == lane else "", frozenset)
    assert ids(views.jobs(store.queue.lanes, state=BLOCKED)) == [waits, held]
    assert ids(views.jobs(store.queue.lanes, state=QUEUED)) == [free]
    assert ids(views.jobs(store.queue.lanes, state=RUNNING)) == [running]
    assert ids(views.jobs(store.queue.lanes, state=BLOCKED, type="reverify")) == [held]
    assert ids(views.jobs(store.queue.lanes, state=BLOCKED, limit=1)) == [waits]
    seen = views.job(held)
    assert (seen["state"], seen["reason"]) == (BLOCKED, "queue is paused")


def test_a_list_is_short_where_a_job_is_long(store: Store) -> None:
    id = store.submit()
    end(store, message="m" * (LIST_CHARS + 9), result="r" * (LIST_CHARS + 9))
    (listed,) = store.views.jobs([])
    assert (len(listed["message"]), listed["result"]) == (LIST_CHARS, None)
    assert len(store.views.job(id)["message"]) == LIST_CHARS + 9


def test_the_next_of_a_lane_are_in_the_order_of_the_claims(store: Store) -> None:
    low, middle, high = (store.submit(priority=p) for p in (-5, 0, 5))
    store.submit(run_at=when.now() + HOUR)
    lane = store.queue.lane("hash", "hash").id
    assert ids(store.views.next_jobs(lane, 9)) == [high, middle, low]
    assert [store.views.ahead(id, lane) for id in (high, middle, low)] == [0, 1, 2]
    assert [one.id for one in store.claim(9)] == [high, middle, low]


def test_how_many_are_ahead_is_counted_to_a_limit(store: Store) -> None:
    first = store.submit(priority=5)
    store.copy(first, AHEAD_LIMIT + 9)
    last = store.submit()
    assert store.views.ahead(last, store.queue.lane("hash", "hash").id) == AHEAD_LIMIT


# Figures


def test_counts_are_of_each_lane_and_state(store: Store) -> None:
    each = one_of_each(store)
    lane = store.queue.lane("hash", "hash").id
    assert store.views.counts()[lane] == {s: int(s in each) for s in STATES}
    assert store.views.counts()[lane][EXPIRED] == 0


def test_the_oldest_is_the_head_of_a_lane(store: Store) -> None:
    empty = store.queue.lane("reverify", "reverify").id
    first = store.submit()
    store.submit(priority=-5)
    lane = store.queue.lane("hash", "hash").id
    assert store.views.oldest([lane, empty]) == {lane: store.row(first).created_at}


def test_nodes_are_listed(store: Store) -> None:
    (node,) = store.views.nodes()
    assert (node["name"], node["machine"]) == ("node", "machine")
    assert node["incarnation"] == store.queue.owner


def test_many_threads_may_look_while_jobs_come(store: Store) -> None:
    over = threading.Event()
    faults: list[BaseException] = []

    def look() -> None:
        while not over.is_set():
            try:
                store.views.jobs(store.queue.lanes), store.views.counts()
            except BaseException as error:
                faults.append(error)

    threads = [threading.Thread(target=look) for _ in range(12)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        store.submit()
    over.set()
    for thread in threads:
        thread.join(20)
    assert faults == []


# Cost


@pytest.mark.slow
@pytest.mark.alone
def test_nothing_that_is_asked_often_reads_the_whole_table(store: Store) -> None:
    many = crowd(store)
    ready = [store.submit() for _ in range(30)]
    store.claim(3)
    store.accepted(*[NewJob("reverify", {}) for _ in range(30)])
    views, lanes = store.views, store.queue.lanes
    paused = store.queue.lane("paused", "paused").id
    asked: dict[str, Callable[[], object]] = {
        "jobs": lambda: views.jobs(lanes),
        "type": lambda: views.jobs(lanes, type="paused"),
        "no type": lambda: views.jobs(lanes, type="none"),
        **{state: lambda state=state: views.jobs(lanes, state=state) for state in STATES},  # type: ignore[misc]
        "page": lambda: views.page(lanes, Filter(), before=many.done + 500),
        "page of ended": lambda: views.page(lanes, Filter(DONE), before=many.done + 500),
        "page of a type": lambda: views.page(lanes, Filter(None, "paused"), before=many.paused + 9),
        "of two": lambda: views.page(lanes, Filter(DONE, "paused", frozenset({paused}))),
        "since": lambda: views.since(many.done + 50),
        "attempts": lambda: views.attempts(many.done + 50),
        "job": lambda: views.job(many.done),
        "end": lambda: views.end(many.failed),
        "history": lambda: views.history(many.done + 50),
        "children": lambda: views.children(many.done),
        "child": lambda: views.child("x" * 64),
        "awaited": lambda: views.awaited(many.blocked),
        "next": lambda: views.next_jobs(paused, 10),
        "ahead": lambda: views.ahead(ready[-1], store.queue.lane("hash", "hash").id),
        "counts": views.counts,
        "oldest": lambda: views.oldest(lanes),
        "delayed": lambda: views.oldest_delayed(paused),
        "nodes": views.nodes,
    }
    slow = {name: ms for name, act in asked.items() if (ms := least_ms(act)) > 12}
    assert slow == {}


@pytest.mark.slow
@pytest.mark.alone
def test_what_no_index_has_is_looked_for_a_while_and_then_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = store.submit(submitter="anna")
    store.copy(store.submit(submitter="bert"), 3 * LOOK_ROWS)
    last = store.submit(submitter="anna")
    monkeypatch.setattr("upq.views.LOOK_S", 60.0)
    assert ids(store.views.jobs([], submitter="anna")) == [last, mine]
    monkeypatch.setattr("upq.views.LOOK_S", 0.0)
    seen, before, pages = [], None, 0
    while True:
        page = store.views.page([], Filter(submitter="anna"), before=before)
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
    views = Views(store.database, lambda id: "paused" if id == lane else "", frozenset)
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
            page = views.page(store.queue.lanes, wanted, 2, before)
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
    found = [[one.id for one in part] for part in store.views.chunks(Filter(FAILED), None, now)]
    assert found == [[b, a]]
    assert [*store.views.chunks(Filter(FAILED), now, now)] in ([], [[]])
    assert [*store.views.chunks(Filter(QUEUED, "hash", frozenset()), None, now)] == []
    parts = store.views.chunks(Filter(QUEUED), now - HOUR, now)
    assert [one.id for part in parts for one in part] == [other]


def least_ms(act: Callable[[], object]) -> float:
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        act()
        spent.append((time.perf_counter() - began) * 1000)
    return min(spent)
