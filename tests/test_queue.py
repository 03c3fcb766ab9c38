from __future__ import annotations

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import Phase, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests import stores
from tests.store_bench import claims_past, crowd
from tests.stores import Store
from upq import queue, schema, when, writer
from upq.batch import LEASE_S
from upq.clauses import CHUNK
from upq.errors import KeyConflict, NotFound, Unavailable, WrongState
from upq.job import (
    BLOCKED,
    CANCELLED,
    DONE,
    FAILED,
    QUEUED,
    RESULT_LIMIT_BYTES,
    RUNNING,
    Job,
    NewJob,
    Outcome,
    Output,
    encode,
)
from upq.nodes import CRASH_LIMIT
from upq.queue import ID_BLOCK
from upq.sql import JSON_COLUMN, Sql, Tx
from upq.statements.waits import LOWER_WAITS
from upq.views import End

job, event, tally = schema.job, schema.event, schema.tally

HOUR = 3_600_000_000
MIB = 1 << 20

#: What has gone wrong in other people's queues.
TEXTS = {
    "nul": "a\0b",
    "lone surrogate": "a\ud800b",
    "undecodable file name": b"caf\xe9.dat".decode(errors="surrogateescape"),
    "emoji": "😀 \U0010ffff",
    "quotes": "'\"` ''' \"\"\"",
    "backslashes": "\\ \\n \\u0041 \\0 \\\\",
    "percent": "% %s %(id)s %% :rows {x}",
    "line ends": "a\nb\r\nc\td\u2028e\x85f",
    "controls": "\x01\x1b[31m\x7f\ufffe",
    "blanks": "  a  ",
    "nothing": "",
}

database, url, store = stores.database, stores.url, stores.store


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Store]:
    """For what does not depend on the kind of database."""
    with Store(f"sqlite:///{tmp_path}/upq.db") as opened:
        yield opened


def end(store: Store, ended: Job, state: str = DONE, **fields: Any) -> bool:
    """End a job, with all else that waits; returns whether it was ours."""
    told: list[bool] = []
    then = fields.pop("then", ())
    store.queue.finish(ended, Outcome(state, **fields), then, told.append)
    store.flush()
    return told[-1]


def history(store: Store, id: int) -> list[tuple[str, str]]:
    return [(one["state"], one["reason"]) for one in store.views.history(id)]


def counted(store: Store) -> dict[tuple[int, str], int]:
    """The jobs of each lane and state, really counted."""
    query = sa.select(job.c.lane, job.c.state, sa.func.count()).group_by(job.c.lane, job.c.state)
    return {(lane, state): n for lane, state, n in store.fetch(query)}


def tallied(store: Store) -> dict[tuple[int, str], int]:
    found = store.views.counts()
    return {(lane, state): n for lane, states in found.items() for state, n in states.items() if n}


def at_once(*acts: Callable[[], object]) -> None:
    """Run each in a thread of its own. Raises what one of them raises."""
    with ThreadPoolExecutor(len(acts)) as threads:
        for one in [threads.submit(act) for act in acts]:
            one.result(60)


def reborn(url: str, dead: Store) -> Store:
    dead.crash()
    return Store(url)


# Submit


def test_a_job_is_stored_as_submitted(store: Store) -> None:
    new = NewJob("hash", {"fid": "50", "n": 1}, queue="big", priority=7, options={"retries": 2},
                 submitter="uid:33")  # fmt: skip
    (accepted,) = store.accepted(new)
    assert not accepted.duplicate
    seen = store.views.job(accepted.id)
    assert (seen["type"], seen["queue"], seen["state"]) == ("hash", "big", QUEUED)
    assert seen["params"] == {"fid": "50", "n": 1}
    assert (seen["priority"], seen["submitter"], seen["attempt"]) == (7, "uid:33", 0)
    assert seen["root"] == accepted.id
    (claimed,) = store.claim(5, "hash", "big")
    assert claimed.options == {"retries": 2}
    assert claimed.params == claimed.data == {"fid": "50", "n": 1}


def test_a_key_answers_with_the_first_job(store: Store) -> None:
    first = store.submit(params={"fid": 1}, key="a")
    again = store.accepted(NewJob("hash", {"fid": 1}, key="a"))
    assert [tuple(one) for one in again] == [(first, True)]
    end(store, store.claim_one())
    assert store.accepted(NewJob("hash", {"fid": 1}, key="a"))[0].duplicate
    assert store.views.counts() and sum(tallied(store).values()) == 1


def test_a_key_with_other_params_is_a_conflict(store: Store) -> None:
    store.submit(params={"fid": 1}, key="a")
    with pytest.raises(KeyConflict):
        store.submit(params={"fid": 2}, key="a")


@pytest.mark.parametrize("other", ["A", "a ", " a", "ä", "a\0", "\ud800"])
def test_keys_that_look_alike_are_different(store: Store, other: str) -> None:
    first = store.submit(key="a")
    assert store.submit(key=other) != first


def test_a_key_is_of_its_type(store: Store) -> None:
    assert store.submit("hash", key="a") != store.submit("reverify", key="a")


def test_a_key_repeated_in_one_submit_makes_one_job(store: Store) -> None:
    one, other = store.accepted(NewJob("hash", {}, key="a"), NewJob("hash", {}, key="a"))
    assert (one.duplicate, other) == (False, (one.id, True))
    assert sum(counted(store).values()) == 1


def test_a_key_repeated_in_one_transaction_makes_one_job(store: Store) -> None:
    answers = store.queue.submit([[NewJob("hash", {"n": n}, key="a")] for n in (1, 1, 2)])
    (one,), (same,), conflict = answers  # type: ignore[misc]
    assert same == (one.id, True)
    assert isinstance(conflict, KeyConflict)


def test_a_submit_of_many_is_all_or_none(store: Store) -> None:
    store.submit(params={"fid": 1}, key="a")
    many = [NewJob("hash", {}), NewJob("hash", {}, key="b"), NewJob("hash", {"fid": 2}, key="a")]
    with pytest.raises(KeyConflict):
        store.accepted(*many)
    assert sum(counted(store).values()) == sum(tallied(store).values()) == 1
    assert not store.accepted(NewJob("hash", {"other": "params"}, key="b"))[0].duplicate


def test_a_refused_submit_leaves_its_neighbours_alone(store: Store) -> None:
    answers = store.queue.submit(
        [[NewJob("hash", {})], [NewJob("hash", {}, after=(10**15,))], [NewJob("hash", {})]]
    )
    assert isinstance(answers[1], NotFound)
    assert isinstance(answers[0], list) and isinstance(answers[2], list)
    assert sum(counted(store).values()) == 2


def test_one_key_from_many_threads_and_two_daemons_makes_one_job(url: str) -> None:
    with Store(url) as store, store.beside() as other:
        ids: list[int] = []

        def submit(here: Store) -> Callable[[], None]:
            return lambda: ids.extend(here.submit(key=f"key {n}") for n in range(10))

        at_once(*[submit(here) for here in (store, other) * 4])
        assert len(ids) == 80
        assert len(set(ids)) == sum(counted(store).values()) == 10


# After


def test_a_job_waits_for_those_before_it(store: Store) -> None:
    first, second = store.submit(), store.submit()
    last = store.submit(after=(second, first, second))
    assert store.views.job(last)["state"] == BLOCKED
    assert store.views.job(last)["reason"] == f"waits for {first}, {second}"
    assert [one.id for one in store.claim(9)] == [first, second]
    assert [id for id, _ in store.views.awaited(last)[0]] == [first, second]


def test_a_job_goes_on_when_the_last_before_it_is_done(store: Store) -> None:
    first, second = store.submit(), store.submit()
    last = store.submit(after=(first, second))
    one, two = store.claim(2)
    end(store, one)
    assert store.views.job(last)["state"] == BLOCKED
    end(store, two)
    assert store.views.job(last)["state"] == QUEUED
    assert store.claim_one().id == last
    assert history(store, last) == [(BLOCKED, f"waits for {first}, {second}"), (QUEUED, ""),
                                    (RUNNING, "")]  # fmt: skip


def test_two_ends_in_one_transaction_free_a_job_once(store: Store) -> None:
    ids = [store.submit() for _ in range(3)]
    last = store.submit(after=tuple(ids))
    for one in store.claim(3):
        store.queue.finish(one, Outcome(DONE))
    store.flush()
    assert [state for state, _ in history(store, last)] == [BLOCKED, QUEUED]
    assert store.claim_one().id == last


def test_after_an_unknown_job_is_refused(store: Store) -> None:
    with pytest.raises(NotFound, match=str(10**15)):
        store.submit(after=(store.submit(), 10**15))
    assert sum(counted(store).values()) == 1


def test_after_a_job_that_is_done_nothing_waits(store: Store) -> None:
    done = store.submit()
    end(store, store.claim_one())
    last = store.submit(after=(done,))
    assert store.claim_one().id == last


@pytest.mark.parametrize("when_it_failed", ["before", "after"])
def test_a_job_waits_for_a_failed_one_until_that_is_retried(
    store: Store, when_it_failed: str
) -> None:
    first = store.submit()
    early = store.submit(after=(first,)) if when_it_failed == "after" else 0
    end(store, store.claim_one(), FAILED)
    last = early or store.submit(after=(first,))
    seen = store.views.job(last)
    assert (seen["state"], f"job {first} is failed" in seen["reason"]) == (BLOCKED, True)
    store.queue.retry(first, "root")
    end(store, store.claim_one())
    assert store.claim_one().id == last


def test_a_failed_attempt_that_is_tried_again_holds_nobody_for_good(store: Store) -> None:
    first = store.submit()
    last = store.submit(after=(first,))
    end(store, store.claim_one(), QUEUED)
    assert store.views.job(last)["reason"] == f"waits for {first}"
    end(store, store.claim_one())
    assert store.claim_one().id == last


def test_a_job_after_others_starts_not_before_its_time(store: Store) -> None:
    at = when.now() + HOUR
    first = store.submit()
    last = store.submit(after=(first,), run_at=at)
    end(store, store.claim_one())
    assert store.views.job(last)["state"] == QUEUED
    assert store.claim() == []
    assert store.queue.next_due == at


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside another that waits"])
def test_a_cancelled_job_that_waited_can_be_retried_when_nothing_is_before_it(
    store: Store, others: int
) -> None:
    first = store.submit()
    last = store.submit(after=(first,))
    beside = [store.submit(after=(first,)) for _ in range(others)]
    store.queue.cancel(last, "root")
    end(store, store.claim_one())
    store.queue.retry(last, "root")
    assert sorted(one.id for one in store.claim(9)) == sorted([last, *beside])


def test_a_cancelled_job_that_waited_waits_again_when_retried(store: Store) -> None:
    first = store.submit()
    last = store.submit(after=(first,))
    store.queue.cancel(last, "root")
    store.queue.retry(last, "root")
    assert store.views.job(last)["state"] == BLOCKED
    end(store, store.claim_one())
    assert store.claim_one().id == last


def test_a_submit_and_the_end_it_waits_for_at_once_lose_nothing(url: str) -> None:
    with Store(url) as store, store.beside() as other:
        for _ in range(5):
            first = store.submit()
            (claimed,) = store.claim()
            last: list[int] = []
            at_once(
                lambda first=first, last=last: last.append(other.submit(after=(first,))),  # type: ignore[misc]
                lambda claimed=claimed: end(store, claimed),  # type: ignore[misc]
            )
            (freed,) = store.claim()
            assert freed.id == last[0]
            end(store, freed)


# Claim


def test_claims_go_by_priority_then_root_then_id(store: Store) -> None:
    parent = store.submit()
    younger = store.submit()
    low, high = store.submit(priority=-10), store.submit(priority=10)
    child = store.submit(parent=parent, root=parent)
    assert [one.id for one in store.claim(9)] == [high, parent, child, younger, low]


def test_a_claim_takes_only_its_lanes_and_no_more_than_wanted(store: Store) -> None:
    mine = [store.submit() for _ in range(3)]
    store.submit("reverify")
    store.submit(queue="other")
    assert [one.id for one in store.claim(2)] == mine[:2]
    assert [one.id for one in store.claim(9)] == mine[2:]


def test_a_claim_over_lanes_gives_each_its_share(store: Store) -> None:
    hashes = [store.submit() for _ in range(3)]
    checks = [store.submit("reverify") for _ in range(3)]
    lanes = [store.queue.lane(name, name).id for name in ("hash", "reverify")]
    claimed = store.queue.claim([(lanes[0], 1), (lanes[1], 2)])
    assert [one.id for one in claimed] == [hashes[0], *checks[:2]]


def test_a_claim_fences_counts_and_leases(store: Store) -> None:
    id = store.submit()
    before = when.now()
    claimed = store.claim_one()
    row = store.row(id)
    assert (row.state, row.ready, row.attempt, row.starts) == (RUNNING, None, 1, 1)
    assert (claimed.state, claimed.attempt, claimed.starts) == (RUNNING, 1, 1)
    assert row.token == claimed.token > 0
    assert row.owner == store.queue.owner
    assert before <= row.started_at <= row.lease_until - LEASE_S * 1_000_000 <= when.now()
    end(store, claimed, QUEUED)
    assert store.claim_one().token != claimed.token


def test_claims_at_once_never_give_a_job_twice(url: str) -> None:
    jobs = 600
    with Store(url) as store, store.beside() as other:
        store.accepted(*[NewJob("hash", {}) for _ in range(jobs)])
        claimed: list[int] = []
        over = time.monotonic() + 60

        def work(here: Store) -> Callable[[], None]:
            def until_all_are_gone() -> None:
                while len(claimed) < jobs and time.monotonic() < over:
                    got = here.claim(7)
                    claimed.extend(one.id for one in got)
                    for one in got:
                        here.queue.finish(one, Outcome(DONE))

            return until_all_are_gone

        at_once(*[work(here) for here in (store, other) * 2])
        store.flush(), other.flush()
        assert len(claimed) == len(set(claimed)) == jobs
        assert {state for _, state in counted(store)} == {DONE}
        assert tallied(store) == counted(store)
        assert (store.queue.fenced, other.queue.fenced) == (0, 0)


# Finish


def test_an_end_stores_what_the_job_has_left(store: Store) -> None:
    id = store.submit(params={"fid": 1})
    claimed = store.claim_one()
    out = Output("text", 10, True)
    assert end(store, claimed, message="well", result={"sum": [1, None]},
               data={"fid": 1, "seen": 2}, output=out)  # fmt: skip
    seen = store.views.job(id)
    assert (seen["state"], seen["message"], seen["result"]) == (DONE, "well", {"sum": [1, None]})
    assert (seen["params"], seen["jobdata"]) == ({"fid": 1}, {"fid": 1, "seen": 2})
    assert seen["ended_at"] and not store.row(id).owner
    kept = store.views.output(id)
    assert (kept["text"], kept["size_bytes"], kept["truncated"]) == ("text", 10, True)


def test_a_late_finish_is_refused(store: Store) -> None:
    store.submit()
    late = store.claim_one()
    store.queue.rescue([late], lambda _: ((), None))
    fresh = store.claim_one()
    follow = [NewJob("reverify", {})]
    assert not end(store, late, result="late", then=follow)
    assert store.queue.fenced == 1
    assert store.claim(1, "reverify") == []
    assert end(store, fresh, result="fresh")
    assert store.views.job(late.id)["result"] == "fresh"
    assert tallied(store) == counted(store)


def test_a_late_finish_leaves_its_neighbours_alone(store: Store) -> None:
    for _ in range(5):
        store.submit()
    claimed = store.claim(5)
    store.queue.rescue([claimed[2]], lambda _: ((), None))
    told: dict[int, bool] = {}
    for one in claimed:
        follow = [NewJob("reverify", {"of": one.id})]
        store.queue.finish(
            one, Outcome(DONE), follow, lambda ours, id=one.id: told.update({id: ours})
        )  # type: ignore[misc]
    store.flush()
    assert told == {one.id: one is not claimed[2] for one in claimed}
    assert len(store.claim(9, "reverify")) == 4
    assert store.queue.fenced == 1


@pytest.mark.parametrize("state", [DONE, FAILED, QUEUED])
def test_a_repeat_of_our_own_end_is_accepted_and_does_nothing(store: Store, state: str) -> None:
    id = store.submit()
    claimed = store.claim_one()
    for _ in range(2):
        assert end(store, claimed, state, output=Output("x", 1, False),
                   then=[NewJob("reverify", {})])  # fmt: skip
    assert store.queue.fenced == 0
    assert len(history(store, id)) == 3
    assert len(store.claim(9, "reverify")) == 1
    assert tallied(store) == counted(store)


def test_what_follows_is_written_with_the_end_and_only_then(store: Store) -> None:
    id = store.submit()
    claimed = store.claim_one()
    follow = [NewJob("reverify", {"n": n}, parent=id, root=id, submitter="x") for n in (1, 2)]
    store.queue.finish(claimed, Outcome(DONE), follow)
    assert store.claim(9, "reverify") == [] or store.views.job(id)["state"] == DONE
    store.flush()
    assert [one["params"]["n"] for one in store.views.children(id)] == [1, 2]
    numbers = sa.select(event.c.n, event.c.at).where(event.c.state.in_([DONE, QUEUED]))
    ends = store.fetch(numbers.where(event.c.job >= id).order_by(event.c.n))
    assert ends[-1].at == ends[-2].at == ends[-3].at


def test_an_attempt_to_be_repeated_waits_for_its_time_and_keeps_its_data(store: Store) -> None:
    id = store.submit(params={"fid": 1})
    at = when.now() + HOUR
    end(store, store.claim_one(), QUEUED, run_at=at, reason="retry 1 of 3", message="no",
        data={"fid": 1, "got": 7})  # fmt: skip
    seen = store.views.job(id)
    assert (seen["state"], seen["reason"], seen["message"]) == (QUEUED, "retry 1 of 3", "no")
    assert store.queue.next_due == at
    assert store.claim() == []
    make_due(store, id)
    claimed = store.claim_one()
    assert (claimed.attempt, claimed.data, claimed.params) == (2, {"fid": 1, "got": 7}, {"fid": 1})


def make_due(store: Store, id: int) -> None:
    """Let the time come."""
    store.queue.act(
        lambda batch: batch.tx.cursor.execute(
            f"UPDATE upq_job SET due_at = 5, run_at = 5 WHERE id = {id}"
        )
    )
    store.queue.stage()


def test_an_attempt_that_does_not_count_is_given_back(store: Store) -> None:
    store.submit()
    end(store, store.claim_one(), QUEUED, reason="interrupted", counts=False)
    again = store.claim_one()
    assert (again.attempt, again.starts) == (1, 2)


def test_data_that_went_back_to_the_params_is_kept(store: Store) -> None:
    store.submit(params={"fid": 1})
    end(store, store.claim_one(), QUEUED, data={"fid": 2})
    end(store, store.claim_one(), QUEUED, data={"fid": 1})
    assert store.claim_one().data == {"fid": 1}


def test_data_is_kept_when_an_attempt_says_nothing_of_it(store: Store) -> None:
    store.submit(params={"fid": 1})
    end(store, store.claim_one(), QUEUED, data={"fid": 2})
    end(store, store.claim_one(), QUEUED)
    assert store.claim_one().data == {"fid": 2}


def test_each_attempt_keeps_its_output(store: Store) -> None:
    id = store.submit()
    end(store, store.claim_one(), QUEUED, output=Output("one", 3, False), counts=False)
    end(store, store.claim_one(), DONE, output=Output("two", 3, False))
    assert store.views.output(id)["text"] == "two"
    assert len(store.fetch(sa.select(schema.output))) == 2


# Texts and sizes


@pytest.mark.parametrize("where", ["params", "options", "result", "data"])
def test_any_json_survives(store: Store, where: str) -> None:
    sent = {"x" + text: [text, {"deep": text}] for text in TEXTS.values()}
    params = sent if where == "params" else {}
    id = store.submit(params=params, options=sent if where == "options" else {})
    claimed = store.claim_one()
    assert (claimed.params, claimed.options) == (params, sent if where == "options" else {})
    assert end(store, claimed, **{where: sent} if where in ("result", "data") else {})
    names = {"params": "params", "result": "result", "data": "jobdata"}
    if where in names:
        assert store.views.job(id)[names[where]] == sent


#: What no database holds is kept in a way that can be read.
KEPT = {
    "nul": "a\\0b",
    "lone surrogate": "a\\ud800b",
    "undecodable file name": "caf\\udce9.dat",
}


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_is_kept_readable_as_message_and_output(store: Store, name: str) -> None:
    text = TEXTS[name]
    kept = KEPT.get(name, text)
    id = store.submit()
    assert end(store, store.claim_one(), message=text, reason=text, output=Output(text, 7, False))
    seen = store.views.job(id)
    assert (seen["state"], seen["message"], seen["reason"]) == (DONE, kept, kept)
    assert store.views.output(id)["text"] == kept
    assert store.views.history(id)[-1]["message"] == kept


def test_a_text_no_database_holds_does_not_stop_the_others(store: Store) -> None:
    first, second = store.submit(), store.submit()
    one, two = store.claim(2)
    store.queue.finish(one, Outcome(DONE, "a\ud800b\0c"))
    store.queue.finish(two, Outcome(DONE))
    store.flush()
    assert [one["state"] for one in store.jobs([], limit=9)] == [DONE, DONE]
    assert store.submit() > second > first


@pytest.mark.parametrize("text", ["x", '"', "\\", "\U0001f600", "é"])
def test_a_result_at_its_limit_survives(store: Store, text: str) -> None:
    result = text * ((RESULT_LIMIT_BYTES - 2) // (len(encode(text)) - 2))
    id = store.submit()
    assert end(store, store.claim_one(), result=result)
    assert store.views.end(id) == End(DONE, result, "")


QUOTES = '"' * (MIB // 2 - 1)
LARGE = {
    "results": {"result": QUOTES},
    "messages": {"message": "\x01" * MIB},
    "outputs": {"output": Output("\x01" * MIB, MIB, False)},
}


@pytest.mark.parametrize("what", LARGE)
def test_many_large_ends_at_once_fit_into_what_the_server_takes(store: Store, what: str) -> None:
    """MariaDB cuts the line at a statement over max_allowed_packet, 16 MiB unless configured."""
    n = 6
    store.accepted(*[NewJob("hash", {}) for _ in range(n)])
    for one in store.claim(n):
        store.queue.finish(one, Outcome(DONE, **LARGE[what]))
    while store.queue.writer.pending:
        store.queue.claim([])
    assert store.queue.writer.recoveries == 0
    assert tallied(store) == {(store.queue.lane("hash", "hash").id, DONE): n}


def test_many_large_submits_at_once_fit_into_what_the_server_takes(store: Store) -> None:
    params = {"x": QUOTES}
    at_once(*[lambda: store.submit(params=params)] * 8)
    assert store.claim(8)[-1].params == params
    assert store.queue.writer.recoveries == 0


def test_an_end_that_is_too_large_to_store_fails_its_job_and_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PROBE_S", 0.05)
    large, small = store.submit(), store.submit()
    one, two = store.claim(2)
    store.queue.finish(one, Outcome(DONE, data={"x": "\x01" * (3 * MIB)}), [NewJob("chain", {})])
    store.queue.finish(two, Outcome(DONE))
    over_s = time.monotonic() + 90
    while store.queue.writer.pending:
        assert time.monotonic() < over_s
        with suppress(Unavailable):  # until it is known which change breaks the connection
            store.flush()
        time.sleep(0.06)
    states = {row.id: row.state for row in store.fetch(sa.select(job.c.id, job.c.state))}
    assert states[small] == DONE
    if states[large] != DONE:
        assert states[large] == FAILED
        assert "cannot be stored" in store.views.job(large)["message"]
        assert store.claim(1, "chain") == []


# Cancel, retry, pause


def test_cancel_ends_a_job_that_waits(store: Store) -> None:
    queued, later = store.submit(), store.submit(run_at=when.now() + HOUR)
    blocked = store.submit(after=(queued,))
    for id in (blocked, later, queued):
        assert store.queue.cancel(id, "uid:33").state == CANCELLED
        seen = store.views.job(id)
        assert (seen["state"], seen["message"]) == (CANCELLED, "cancelled by uid:33")
        assert seen["ended_at"]
        assert store.views.history(id)[-1]["who"] == "uid:33"
    assert store.claim(9) == []
    assert store.queue.stage() == []
    assert tallied(store) == counted(store)


def test_cancel_asks_a_running_job(store: Store) -> None:
    id = store.submit()
    claimed = store.claim_one()
    assert store.queue.cancel(id, "root").state == RUNNING
    assert store.views.job(id)["cancel_asked"]
    assert end(store, claimed, CANCELLED)


def test_cancel_refuses_what_has_ended_or_never_was(store: Store) -> None:
    id = store.submit()
    end(store, store.claim_one())
    with pytest.raises(WrongState, match="done"):
        store.queue.cancel(id, "root")
    with pytest.raises(NotFound):
        store.queue.cancel(10**15, "root")


def test_those_after_a_cancelled_job_say_so(store: Store) -> None:
    first = store.submit()
    last = store.submit(after=(first,))
    store.queue.cancel(first, "root")
    assert f"job {first} is cancelled" in store.views.job(last)["reason"]


@pytest.mark.parametrize("state", [FAILED, CANCELLED])
def test_retry_starts_afresh(store: Store, state: str) -> None:
    id = store.submit(params={"fid": 1})
    end(store, store.claim_one(), state, message="no", result=5, data={"fid": 1, "got": 2})
    store.queue.retry(id, "uid:33")
    seen = store.views.job(id)
    assert (seen["state"], seen["result"], seen["ended_at"]) == (QUEUED, None, None)
    assert store.views.history(id)[-1]["who"] == "uid:33"
    again = store.claim_one()
    assert (again.attempt, again.starts, again.data) == (1, 2, {"fid": 1, "got": 2})


def test_retry_refuses_what_has_not_ended_badly(store: Store) -> None:
    id = store.submit()
    with pytest.raises(WrongState, match="queued"):
        store.queue.retry(id, "root")
    claimed = store.claim_one()
    with pytest.raises(WrongState, match="running"):
        store.queue.retry(id, "root")
    end(store, claimed)
    with pytest.raises(WrongState, match="done"):
        store.queue.retry(id, "root")
    with pytest.raises(NotFound):
        store.queue.retry(10**15, "root")


def test_pause_is_of_the_queue_and_survives_a_restart(url: str) -> None:
    with Store(url) as store:
        store.submit(), store.submit("reverify"), store.submit("hash", queue="q")
        store.queue.pause("hash", True)
        assert {lane.queue for lane in store.queue.lanes.values() if lane.paused} == {"hash"}
    with Store(url) as store:
        assert {lane.queue for lane in store.queue.lanes.values() if lane.paused} == {"hash"}
        assert store.queue.lane("hash", "other type").paused
        store.queue.pause("hash", False)
        assert not any(lane.paused for lane in store.queue.lanes.values())
        with pytest.raises(NotFound):
            store.queue.pause("no such queue", True)


def test_progress_that_is_told_while_the_last_is_stored_is_stored_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.submit()
    claimed = store.claim_one()
    text = queue.progress_text

    def stored_meanwhile(progress: dict[str, Any]) -> str:
        store.flush()
        return text(progress)

    for done in (1, 2, 3):
        store.queue.set_progress(claimed.id, claimed.token, {"done": done})
        monkeypatch.setattr(queue, "progress_text", stored_meanwhile)
    store.flush()
    assert '"done":3' in store.row(claimed.id).progress


def test_what_was_read_before_a_pause_does_not_undo_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = store.queue.lane("hash", "hash")
    act = store.queue.act

    def overtaken(run: Any) -> Any:
        monkeypatch.undo()
        found = act(run)
        store.queue.pause("hash", True)
        return found

    monkeypatch.setattr(store.queue, "act", overtaken)
    store.queue.refresh()
    assert store.queue.lanes[lane.id].paused
    store.queue.pause("hash", False)


def test_lanes_that_many_threads_make_at_once_are_all_known(store: Store) -> None:
    names = [f"type {n}" for n in range(60)]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(12) as pool:
            made = list(pool.map(lambda name: store.queue.lane(name, name), names))
    finally:
        sys.setswitchinterval(interval_s)
    assert [store.queue.lanes.get(lane.id) for lane in made] == made
    assert [store.queue.known_lane(name, name) for name in names] == made


def test_a_claim_that_was_on_its_way_heeds_a_pause(store: Store) -> None:
    id = store.submit()
    store.queue.pause("hash", True)
    assert store.claim() == []
    store.queue.pause("hash", False)
    assert store.claim_one().id == id


# Chores


def test_what_is_due_is_staged_in_chunks(store: Store) -> None:
    id = store.submit(run_at=when.now() + HOUR)
    store.copy(id, CHUNK + 9)
    far = store.submit("reverify", run_at=when.now() + 2 * HOUR)
    lane = store.queue.lane("hash", "hash").id
    assert store.queue.stage() == []
    store.queue.act(
        lambda batch: batch.tx.cursor.execute(f"UPDATE upq_job SET due_at = 7 WHERE lane = {lane}")
    )
    ready = sa.select(sa.func.count()).where(job.c.ready == lane)
    assert store.queue.stage() == [lane]
    assert store.fetch(ready)[0][0] == CHUNK
    assert store.queue.next_due == 7
    assert store.queue.stage() == [lane]
    assert store.fetch(ready)[0][0] == CHUNK + 10
    assert store.queue.next_due == store.row(far).run_at
    assert store.queue.stage() == []


def test_the_next_due_is_known_after_a_restart(url: str) -> None:
    at = when.now() + HOUR
    with Store(url) as store:
        store.submit(run_at=at)
        store.submit(run_at=at + 5)
        assert store.queue.next_due == at
    with Store(url) as store:
        assert store.queue.next_due == at


def test_a_time_that_is_over_waits_for_nothing(store: Store) -> None:
    id = store.submit(run_at=when.now() - 1)
    assert store.claim_one().id == id


# Ids, lanes, events, counts


def test_ids_not_used_are_given_back_at_the_end(url: str) -> None:
    with Store(url) as store:
        last = max(store.submit() for _ in range(3))
    with Store(url) as store:
        assert store.submit() == last + 1


def test_a_crash_loses_ids_but_uses_none_twice(url: str) -> None:
    store = Store(url)
    last = store.submit()
    with reborn(url, store) as store:
        assert last < store.submit() <= last + ID_BLOCK


def test_ids_are_not_given_back_when_another_daemon_took_later_ones(url: str) -> None:
    with Store(url) as store:
        with store.beside() as other:
            other.submit()
            mine = store.submit()
        assert store.submit() == mine + 1


def test_no_id_is_given_twice_to_many_threads(sqlite: Store) -> None:
    taken: list[int] = []

    def take(size: int) -> Callable[[], None]:
        def some_blocks() -> None:
            for _ in range(60):
                first = sqlite.queue.reserve_ids(size)
                taken.extend(range(first, first + size))

        return some_blocks

    at_once(*[take(size) for size in (1, 3, 7, 50, 400, 1, 2500)])
    assert len(taken) == len(set(taken))


def test_ids_do_not_go_back_when_a_later_block_is_there_first(
    sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, others = sqlite.queue.act, []

    def overtaken(run: Callable[[Any], Any]) -> int:
        block = int(act(run))
        monkeypatch.undo()
        others.append(sqlite.queue.reserve_ids(1))
        return block

    sqlite.queue._skip_ids()
    monkeypatch.setattr(sqlite.queue, "act", overtaken)
    mine = sqlite.queue.reserve_ids(1)
    assert mine < others[0] < sqlite.queue.reserve_ids(1)


def test_a_lane_made_by_two_at_once_is_one(url: str) -> None:
    with Store(url) as store, store.beside() as other:
        lanes: dict[str, set[int]] = {}

        def make(here: Store) -> Callable[[], None]:
            def some_lanes() -> None:
                for n in range(12):
                    lane = here.queue.lane(f"queue {n}", "hash")
                    lanes.setdefault(lane.queue, set()).add(lane.id)

            return some_lanes

        at_once(*[make(here) for here in (store, other) * 3])
        assert len(lanes) == 12
        assert all(len(ids) == 1 for ids in lanes.values())
        query = sa.select(tally.c.lane, sa.func.count()).group_by(tally.c.lane)
        assert {n for _, n in store.fetch(query)} == {7}


@pytest.mark.parametrize("name", ["a ", "A", "a", "ä"])
def test_queues_that_look_alike_are_different(store: Store, name: str) -> None:
    lanes = {store.queue.lane(one, "hash").id for one in ("a", "A", "a ", "ä", "a\u0308")}
    assert len(lanes) == 5
    store.submit(queue=name)
    assert [one.queue for one in store.claim(5, "hash", name)] == [name]


def test_event_numbers_are_in_the_order_of_the_commits_without_gaps(store: Store) -> None:
    def work() -> None:
        for _ in range(10):
            store.submit()
            for one in store.claim(2):
                store.queue.finish(one, Outcome(DONE))

    at_once(*[work] * 6)
    store.flush()
    rows = store.fetch(sa.select(event).order_by(event.c.n))
    assert [row.n for row in rows] == list(range(1, len(rows) + 1))
    assert [(row.job, row.state) for row in rows] == [(e.job, e.state) for e in store.events]
    per_job: dict[int, list[str]] = {}
    for row in rows:
        per_job.setdefault(row.job, []).append(row.state)
    assert {tuple(states) for states in per_job.values()} <= {
        (QUEUED, RUNNING, DONE), (QUEUED,), (QUEUED, RUNNING),
    }  # fmt: skip


def test_events_of_two_daemons_have_one_order(url: str) -> None:
    with Store(url) as store, store.beside() as other:
        at_once(*[lambda here=here: [here.submit() for _ in range(40)] for here in (store, other)])  # type: ignore[misc]
        rows = store.fetch(sa.select(event.c.n, event.c.job).order_by(event.c.n))
        assert [row.n for row in rows] == list(range(1, 81))


def test_counts_hold_under_all_transitions_of_two_daemons(url: str) -> None:
    with Store(url) as store, store.beside() as other:
        store.queue.lane("hash", "hash")

        def churn(here: Store, seed: int) -> Callable[[], None]:
            def some_work() -> None:
                for n in range(seed, seed + 25):
                    id = here.submit(run_at=when.now() + (n % 3) * 2000)
                    if n % 5 == 0:
                        with suppress(NotFound, WrongState):  # it may run or be gone by now
                            here.queue.cancel(id, "root")
                            here.queue.retry(id, "root")
                    here.queue.stage()
                    for one in here.claim(2):
                        state = (DONE, FAILED, QUEUED, DONE)[n % 4]
                        here.queue.finish(one, Outcome(state))
                    here.queue.beat()
                    here.purge(FAILED, when.now())
                here.flush()

            return some_work

        at_once(churn(store, 0), churn(other, 1), churn(store, 2), churn(other, 3))
        assert tallied(store) == counted(store)


# A model


class Model(RuleBasedStateMachine):
    """Jobs of one store beside what a few lines of Python say of them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.url = f"sqlite:///{self.folder.name}/upq.db"
        self.store = Store(self.url)
        self.state: dict[int, str] = {}
        self.needs: dict[int, set[int]] = {}
        self.later: set[int] = set()
        self.order: dict[int, tuple[int, int]] = {}
        self.crashes: Counter[int] = Counter()
        self.claims: dict[int, Job] = {}
        self.old: list[Job] = []
        self.events = 0

    def teardown(self) -> None:
        self.store.__exit__()
        self.folder.cleanup()

    def pick(self, data: some.DataObject, *states: str) -> int:
        return data.draw(
            some.sampled_from(sorted(i for i in self.state if self.state[i] in states))
        )

    def has(self, *states: str) -> bool:
        return any(state in states for state in self.state.values())

    def open_before(self, id: int) -> set[int]:
        return {n for n in self.needs.get(id, ()) if self.state[n] != DONE}

    def settle(self) -> None:
        """Free what waits for nothing any more."""
        for id, state in self.state.items():
            if state == BLOCKED and not self.open_before(id):
                self.state[id] = QUEUED

    @rule(late=some.booleans(), n=some.integers(1, 3), data=some.data())
    def submit(self, late: bool, n: int, data: some.DataObject) -> None:
        known = sorted(self.state)
        after = tuple(data.draw(some.lists(some.sampled_from(known), max_size=2))) if known else ()
        run_at = when.now() + HOUR if late else None
        new = [NewJob("hash", {}, run_at=run_at, after=after) for _ in range(n)]
        for one in self.store.accepted(*new):
            self.needs[one.id] = {id for id in after if self.state[id] != DONE}
            self.state[one.id] = BLOCKED if self.needs[one.id] else QUEUED
            self.order[one.id] = (one.id, one.id)
            if late:
                self.later.add(one.id)

    @rule(n=some.integers(1, 4))
    def claim(self, n: int) -> None:
        ready = [i for i, state in self.state.items() if state == QUEUED and i not in self.later]
        ready.sort(key=self.order.__getitem__)
        claimed = self.store.claim(n)
        assert [one.id for one in claimed] == ready[:n]
        for one in claimed:
            self.state[one.id] = RUNNING
            self.claims[one.id] = one

    @precondition(lambda self: self.has(RUNNING))
    @rule(
        state=some.sampled_from([DONE, DONE, FAILED, QUEUED]),
        follow=some.booleans(),
        data=some.data(),
    )
    def finish(self, state: str, follow: bool, data: some.DataObject) -> None:
        id = self.pick(data, RUNNING)
        then = [NewJob("hash", {}, parent=id, root=id)] if follow and state == DONE else []
        ended = self.claims.pop(id)
        before = set(self.ids())
        assert end(self.store, ended, state, then=then)
        self.old.append(ended)
        self.state[id] = state
        for new in set(self.ids()) - before:
            self.state[new], self.order[new] = QUEUED, (id, new)
        self.settle()

    @precondition(lambda self: self.old)
    @rule(data=some.data())
    def finish_late(self, data: some.DataObject) -> None:
        late = data.draw(some.sampled_from(self.old))
        before = self.rows()
        end(self.store, late, FAILED, then=[NewJob("hash", {})])
        assert self.rows() == before

    @precondition(lambda self: self.has(QUEUED, BLOCKED))
    @rule(data=some.data())
    def cancel(self, data: some.DataObject) -> None:
        id = self.pick(data, QUEUED, BLOCKED)
        assert self.store.queue.cancel(id, "root").state == CANCELLED
        self.state[id] = CANCELLED
        self.later.discard(id)

    @precondition(lambda self: self.has(FAILED, CANCELLED))
    @rule(data=some.data())
    def retry(self, data: some.DataObject) -> None:
        id = self.pick(data, FAILED, CANCELLED)
        self.store.queue.retry(id, "root")
        self.crashes[id] = 0
        self.state[id] = BLOCKED if self.open_before(id) else QUEUED

    @rule()
    def crash(self) -> None:
        self.store = reborn(self.url, self.store)
        dead = self.store.queue.orphans()
        assert {one.id for one in dead} == set(self.claims)
        self.store.queue.rescue(dead, lambda _: ((), None))
        self.store.queue.forget_nodes(self.store.queue.dead_nodes())
        for id, lost in self.claims.items():
            self.crashes[id] += 1
            self.state[id] = FAILED if self.crashes[id] >= CRASH_LIMIT else QUEUED
            self.old.append(lost)
        self.claims.clear()

    @precondition(lambda self: self.has(DONE))
    @rule()
    def purge(self) -> None:
        """Nothing waits for what is done, and here what is done is a child only of such."""
        gone = {id for id, state in self.state.items() if state == DONE}
        assert self.store.purge(DONE, when.now() + 1) == len(gone)
        for id in gone:
            del self.state[id]
        for needs in self.needs.values():
            needs -= gone
        self.old = [one for one in self.old if one.id in self.state]

    def ids(self) -> list[int]:
        return [row.id for row in self.store.fetch(sa.select(job.c.id))]

    def rows(self) -> list[Any]:
        return self.store.fetch(sa.select(job).order_by(job.c.id))

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        stored = {row.id: row for row in self.rows()}
        assert {id: row.state for id, row in stored.items()} == self.state
        for id, row in stored.items():
            can_be_claimed = row.state == QUEUED and id not in self.later
            assert (row.ready == row.lane) if can_be_claimed else row.ready is None
            assert row.waits == len(self.open_before(id)) or row.state != BLOCKED
            assert (row.ended_at is not None) == (row.state in (DONE, FAILED, CANCELLED))
            assert (row.owner is not None) == (row.state == RUNNING)
        assert tallied(self.store) == counted(self.store)


Model.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
)
TestModel = Model.TestCase


# Speed


@pytest.mark.slow
@pytest.mark.alone
def test_a_claim_past_200000_jobs_that_are_not_due_is_quick(url: str) -> None:
    # A claim ends with a commit, which takes what the disk takes.
    most_ms = max(5, 3 * min(claims_past(url, rows=100)))
    # Twice, since somebody else may be busy on the machine.
    assert min(claims_past(url)) <= most_ms or min(claims_past(url)) <= most_ms


#: Milliseconds that a statement over a few rows may take. Reading 40,000 rows takes longer.
FEW_ROWS_MS = 10


@pytest.mark.slow
@pytest.mark.alone
def test_no_change_reads_the_whole_table(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    many = crowd(store)
    spent_ms = measured(monkeypatch)
    queue = store.queue
    for n in range(5):
        first = store.submit(key=f"key {n}")
        last = store.submit(after=(first,))
        store.submit(after=(many.failed,))
        claimed = store.claim_one()
        queue.set_progress(first, claimed.token, {"done": 1})
        queue.set_reason(claimed, "waits for 5")
        queue.beat(), queue.orphans(), queue.release_strays()
        follow = [NewJob("reverify", {}, queue=f"q{n}", parent=first, child_key=f"child {n}")]
        end(store, claimed, output=Output("x", 1, False), then=follow)
        queue.cancel(last, "root")
        queue.retry(last, "root")
        repeated = store.claim_one()
        end(store, repeated, QUEUED)
        end(store, repeated, QUEUED)
        end(store, store.claim_one(), FAILED)
        store.submit(run_at=when.now())
        queue.stage()
        store.submit()
        queue.rescue(store.claim(2), lambda _: ((), None))
        store.purge(CANCELLED, 5), store.purge(DONE, 5)
    slow = {name: ms for name, ms in spent_ms.items() if ms > FEW_ROWS_MS}
    assert len(spent_ms) > 30
    assert slow == {}


def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The least that each statement takes from now on."""
    names = {id(sql): name for name, sql in stores.statements()}
    spent_ms: dict[str, float] = {}
    execute = Tx._execute

    def timed(tx: Tx, sql: Sql, text: str, given: Any) -> None:
        began = time.perf_counter()
        execute(tx, sql, text, given)
        took_ms = (time.perf_counter() - began) * 1000
        name = names[id(sql)]
        spent_ms[name] = min(took_ms, spent_ms.get(name, took_ms))

    monkeypatch.setattr(Tx, "_execute", timed)
    return spent_ms


@pytest.mark.parametrize("n", [1, 3, 64])
def test_sqlite_looks_up_the_rows_it_is_given_by_key(tmp_path: Path, n: int) -> None:
    with Store(f"sqlite:///{tmp_path}/upq.db") as store:
        dialect = store.database.dialect
        plans = {}
        for name, sql in stores.statements():
            if sql.each:
                width = len(JSON_COLUMN.findall(sql.on(dialect)[0]))
                ((text, given),) = sql.spread(dialect, [[None] * width] * n, {})
                with store.database.read() as connection:
                    plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", given)
                    plans[name] = " ".join(row[-1] for row in plan)
        assert len(plans) > 20
        by_key = "INTEGER PRIMARY KEY|_key|upq_edge_|upq_tally|sqlite_autoindex"
        for name, plan in plans.items():
            assert not re.search(r"SCAN upq_", plan), (name, plan)
            for used in re.findall(r"SEARCH upq_\w+ USING (.*?) \(", plan):
                assert re.search(by_key, used), (name, plan)
        # Rows up to the next number that is prepared, and more than one statement takes.
        few, many = ([(i, 1) for i in range(n)] for n in (5, 300))
        parts = LOWER_WAITS.spread(dialect, few, {})
        assert [given for _, given in parts] == [(0, 1, 1, 1, 2, 1, 3, 1, 4, 1, None, None)]
        parts = LOWER_WAITS.spread(dialect, many, {})
        assert [id for _, given in parts for id in given[::2] if id is not None] == [*range(300)]
        assert [text.count("(?, ?)") for text, _ in parts] == [256, 48]
