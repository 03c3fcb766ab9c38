"""`rate ... per {key}`: starts of one key are even, whoever makes them."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests import stores
from tests.daemons import PATIENCE_S, Daemon, until
from tests.stores import Store
from tests.test_limits import no_jobs, ready, reason
from tests.test_queue import HOUR, at_once, counted, end, history, reborn, tallied
from upq import schema, when
from upq.errors import Busy
from upq.job import DONE, FAILED, QUEUED, REJECT, Limits, Outcome

job, limit = schema.job, schema.limit

database, url, store = stores.database, stores.url, stores.store

LONG = 10 * HOUR


def pace(key: str = "x", every_us: int = LONG, **fields: Any) -> Limits:
    return Limits(paced=key, every_us=every_us, pace=f"rate 1/h of host={key}", **fields)


def kept(store: Store, before: str = "") -> dict[str, int]:
    """What `limit` has under names that begin so."""
    return {
        row.name: row.at for row in store.fetch(sa.select(limit)) if row.name.startswith(before)
    }


def pass_interval(store: Store) -> None:
    """Move the last starts of all keys an interval back."""
    rates = limit.c.name.like("rate:%")
    store.change(sa.update(limit).values(at=limit.c.at - LONG).where(rates))
    due = job.c.due_at.is_not(None)
    store.change(sa.update(job).values(due_at=job.c.due_at - LONG).where(due))
    store.queue.stage()


def test_only_the_first_of_a_key_can_be_claimed_and_the_next_one_an_interval_later(
    store: Store,
) -> None:
    first, second, third = (store.submit(limits=pace()) for _ in range(3))
    other = store.submit(limits=pace("y"))
    assert ready(store) == [first, other]
    assert reason(store, second) == "waits for its turn: rate 1/h of host=x"
    assert [one.id for one in store.claim(9)] == [first, other]
    assert ready(store) == [] and store.row(first).serial_key is None
    started_at = store.row(first).started_at
    assert store.row(second).due_at == started_at + LONG == store.queue.next_due
    assert store.row(third).due_at is None
    turn = store.views.turn(third)
    assert turn == ("rate 1/h of host=x", started_at + 2 * LONG)
    assert store.views.turn(second) == ("rate 1/h of host=x", started_at + LONG)
    pass_interval(store)
    assert [one.id for one in store.claim(9)] == [second]
    assert store.claim(9) == []
    assert tallied(store) == counted(store)


def test_a_key_that_has_rested_starts_at_once_and_no_sooner(store: Store) -> None:
    store.submit(limits=pace())
    end(store, store.claim_one())
    assert kept(store, "line") == {}
    later = store.submit(limits=pace())
    assert store.claim(9) == []
    pass_interval(store)
    assert store.claim_one().id == later


def test_types_do_not_share_a_key(store: Store) -> None:
    store.submit(limits=pace())
    store.claim_one()
    other = store.submit("other", limits=pace())
    assert store.claim_one("other").id == other


def test_another_attempt_waits_for_the_rate_and_holds_nobody_up(store: Store) -> None:
    first, second, third = (store.submit(limits=pace()) for _ in range(3))
    end(store, store.claim_one(), QUEUED, reason="retry 1 of 2")
    assert store.claim(9) == []
    assert ready(store) == [] and reason(store, first).startswith("waits for its turn")
    pass_interval(store)
    assert store.claim_one().id == second
    pass_interval(store)
    claimed = store.claim_one()
    assert claimed.id == first and claimed.attempt == 2
    end(store, claimed, QUEUED, run_at=when.now() + 3 * LONG, reason="retry 2 of 2")
    pass_interval(store)
    assert store.claim_one().id == third
    assert tallied(store) == counted(store)


def test_a_claim_given_back_was_a_start(store: Store) -> None:
    first = store.submit(limits=pace())
    end(store, store.claim_one(), QUEUED, counts=False)
    assert store.claim(9) == []
    pass_interval(store)
    assert store.claim_one().id == first


def test_whoever_has_the_turn_can_be_cancelled_or_expire(store: Store) -> None:
    store.submit(limits=pace())
    store.claim_one()
    second, third = store.submit(limits=pace()), store.submit(limits=pace())
    fourth = store.submit(limits=pace(expires_at=when.now() + HOUR))
    fifth = store.submit(limits=pace())
    store.queue.cancel(third, "root")
    store.queue.cancel(second, "root")
    assert store.row(fourth).due_at is not None
    store.change(sa.update(job).values(expires_at=1).where(job.c.id == fourth))
    store.queue.expire(no_jobs)
    assert store.row(fifth).due_at == kept(store, "rate").popitem()[1]
    pass_interval(store)
    assert store.claim_one().id == fifth


def test_what_is_retried_or_freed_comes_to_its_line(store: Store) -> None:
    first = store.submit(limits=pace())
    end(store, store.claim_one(), FAILED)
    needed = store.submit("other")
    blocked = store.submit(limits=pace(), after=(needed,))
    delayed = store.submit(limits=pace(), run_at=when.now() + LONG)
    last = store.submit(limits=pace())
    assert store.row(last).due_at is not None, "nobody is before it who could start"
    store.queue.retry(first, "root")
    end(store, store.claim_one("other"))
    assert store.claim(9) == []
    assert ready(store) == []
    order = []
    for _ in range(4):
        pass_interval(store)
        while got := store.claim(9):
            order += [one.id for one in got]
    assert order == [last, first, blocked, delayed]
    assert history(store, first)[-1][0] == "running"


def test_a_claim_that_comes_too_early_starts_nothing(store: Store) -> None:
    store.submit(limits=pace())
    store.claim_one()
    second = store.submit(limits=pace())
    early = sa.update(job).values(ready=job.c.lane, due_at=None).where(job.c.id == second)
    store.change(early)
    assert store.claim(9) == []
    assert store.row(second).due_at == kept(store, "rate").popitem()[1]


def test_a_daemon_that_dies_leaves_no_key_behind(url: str) -> None:
    dead = Store(url)
    first, second = dead.submit(limits=pace()), dead.submit(limits=pace())
    dead.claim_one()
    with reborn(url, dead) as store:
        store.queue.rescue(store.queue.orphans(), no_jobs)
        assert store.claim(9) == []
        pass_interval(store)
        assert store.claim_one().id == second
        pass_interval(store)
        assert store.claim_one().id == first
        assert kept(store, "line") == {}


def test_the_chore_mends_lines_and_forgets_old_starts(store: Store) -> None:
    store.submit(limits=pace())
    store.claim_one()
    second, third = store.submit(limits=pace()), store.submit(limits=pace())
    store.change(
        sa.update(job).values(serial_key=None, due_at=None, state=DONE).where(job.c.id == second)
    )
    store.queue.mend_lines()
    assert store.row(third).due_at is not None
    assert len(kept(store, "rate")) == 1
    pass_interval(store)
    store.claim_one()
    store.change(sa.update(limit).values(at=when.now() - HOUR).where(limit.c.name.like("rate:%")))
    store.queue.mend_lines()
    assert kept(store) == {}


def test_reject_and_max_queue_look_at_the_type(store: Store) -> None:
    store.submit(limits=pace())
    with pytest.raises(Busy, match="a job of hash is not finished"):
        store.submit(limits=pace("y", when_busy=REJECT))
    store.submit(limits=pace("z", max_queue=2))
    with pytest.raises(Busy, match="max_queue = 2"):
        store.submit(limits=pace("z", max_queue=2))


def test_a_child_may_wait_for_the_key_of_its_parent(store: Store) -> None:
    parent = store.submit(limits=pace())
    end(store, store.claim_one(), QUEUED)
    assert store.claim(9) == []
    child = store.submit(limits=pace(), parent=parent, child_key="c")
    pass_interval(store)
    assert store.claim_one().id == parent
    pass_interval(store)
    assert store.claim_one().id == child


EVERY = 50_000


def check_rate(started: dict[str, list[int]], every_us: int, slack: float) -> None:
    for at in started.values():
        at.sort()
        gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
        assert min(gaps) >= every_us
        assert at[-1] - at[0] <= len(gaps) * every_us * slack


def test_two_daemons_keep_the_rate_and_the_order(url: str) -> None:
    """Some are tried again, some are given back, some are delayed: never above the rate."""
    with Store(url) as store, store.beside() as other:
        ids: dict[str, list[int]] = {key: [] for key in "abc"}
        for n in range(20):
            for key in "abc":
                here = (store, other)[n % 2]
                ids[key].append(here.submit(limits=pace(key, EVERY), params={"host": key}))
        started: dict[str, list[int]] = {key: [] for key in "abc"}
        order: dict[str, list[tuple[int, int]]] = {key: [] for key in "abc"}
        over = threading.Event()
        lock = threading.Lock()
        ended = Counter[str]()

        def work(here: Store, seed: int) -> Callable[[], None]:
            def run() -> None:
                n, deadline_s = seed, time.monotonic() + 60
                while not over.is_set() and time.monotonic() < deadline_s:
                    here.queue.stage()
                    for one in here.claim(4):
                        n += 1
                        key = one.params["host"]
                        with lock:
                            at = store.row(one.id).started_at
                            started[key].append(at)
                            if one.starts == 1:
                                order[key].append((at, one.id))
                        if n % 7 == 0 and one.starts < 3:
                            here.queue.finish(one, Outcome(QUEUED, counts=n % 2 == 0))
                        else:
                            here.queue.finish(one, Outcome(DONE))
                            ended[key] += 1
                    here.flush()
                    if sum(ended.values()) == 60:
                        over.set()
                    time.sleep(0.002)

            return run

        at_once(work(store, 0), work(other, 3), work(store, 5))
        assert ended == {"a": 20, "b": 20, "c": 20}
        check_rate(started, EVERY, 10)
        for key, found in ids.items():
            assert [id for _, id in sorted(order[key])] == sorted(found)
        store.flush()
        assert kept(store, "line") == {}
        assert tallied(store) == counted(store)


CONFIG = """
[job crawl]
params = host:str n:int=0
rate = 20/s per {host}
concurrent = 4
[job slow]
params = host:str?
rate = 1/h per {host}
"""
NOTE = """
def run(self):
    note("start", self.jobid)
"""


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    with Daemon(short_tmp, CONFIG, crawl=NOTE, slow=NOTE) as running:
        yield running


def starts_of(daemon: Daemon, ids: list[int]) -> list[int]:
    for id in ids:
        daemon.wait(id)
    return [when.instant(daemon.job(id)["started_at"]) for id in ids]


def test_a_daemon_starts_each_key_evenly_and_in_order(daemon: Daemon) -> None:
    with daemon.talk() as talk:
        lines = [f"crawl host:{key} n:{n}" for n in range(20) for key in "abc"]
        talk.send("".join(f"{line}\n" for line in lines))
        ids = [int(talk.read().split()[1]) for _ in lines]
    started = {key: starts_of(daemon, ids[n::3]) for n, key in enumerate("abc")}
    assert all(found == sorted(found) for found in started.values())
    check_rate(started, EVERY, 20)  # 1.06 on a quiet machine; 40 if the claimer had to poll


def test_a_daemon_that_is_killed_keeps_the_rate(daemon: Daemon) -> None:
    ids: dict[str, list[int]] = {key: [] for key in "abc"}
    for n in range(20):
        for key in "abc":
            ids[key].append(daemon.submit(f"crawl host:{key} n:{n}"))
        if n % 8 == 5:
            daemon.kill9()
            daemon.start()
    started = {key: starts_of(daemon, found) for key, found in ids.items()}
    for at in started.values():
        assert min(b - a for a, b in itertools.pairwise(sorted(at))) >= EVERY


def test_a_key_of_a_daemon_and_why(daemon: Daemon) -> None:
    first = daemon.submit("slow host:x")
    daemon.wait(first)
    second = daemon.submit("slow host:x")
    assert "rate 1/h of host=x: not before 20" in daemon.why(second)
    answer = daemon.say("slow")
    assert answer == "ERR bad_params host: is missing, rate = 1/h per {host} asks for it"
    until(lambda: daemon.wait(daemon.submit("slow host:y")), PATIENCE_S)
