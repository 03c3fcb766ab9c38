"""Notifications worth keeping on, in the transactions that call for them, and by a daemon."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests import stores
from tests.daemons import Daemon, until
from tests.stores import Store
from upq import schema, when
from upq.health import Rules, Wish
from upq.job import DONE, EXPIRED, FAILED, Outcome
from upq.notify import describe

database, url, store = stores.database, stores.url, stores.store

S, M, H = 1_000_000, 60_000_000, 3_600_000_000
START = 1_800_000_000 * S
HOURLY = Rules("hash", ("mail:admin@example.org",), every_us=H)


# In the transaction that ends the job


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Time as the test wants it: its one number is now."""
    now = [START]
    monkeypatch.setattr(when, "now", lambda: now[0])
    yield now


class Desk:
    """Ends jobs of a type as the runner does."""

    def __init__(self, at: Store, rules: Rules = HOURLY) -> None:
        self.store, self.rules = at, rules
        at.queue.lane("notify", "notify")

    def end(self, state: str = FAILED, message: str = "no disk") -> int:
        """One job that ends so; returns its id."""
        id = self.store.submit()
        self.finish(Outcome(state, message))
        return id

    def finish(self, outcome: Outcome) -> None:
        job = self.store.claim_one()
        good = outcome.state == DONE
        wish = Wish(self.rules, good, describe(job, outcome, ended_at=when.now()))
        self.store.queue.finish(job, outcome, wish=wish)
        self.store.flush()

    def tend(self) -> None:
        self.store.queue.tend_health([self.rules])


def letters(at: Store) -> list[dict[str, Any]]:
    """What notify jobs there are, as they would tell it, the oldest first."""
    jobs = at.jobs(at.queue.lanes, type="notify", limit=1000)
    return [job["params"]["job"] for job in reversed(jobs)]


def of_health(at: Store) -> Any:
    (row,) = at.fetch(sa.select(schema.health))
    return row


def test_221_failures_in_70_minutes_are_three_mails(url: str, clock: list[int]) -> None:
    """FEATURES D5, with a kill in the middle."""
    first = Store(url)
    desk = Desk(first)
    step = 70 * M // 221
    tended = START
    for n in range(221):
        if n == 100:
            desk.store.crash()
            desk = Desk(Store(url, "another start"))
        desk.end(message=f"failure {n + 1}")
        clock[0] += step
        while tended + 5 * S <= clock[0]:
            tended += 5 * S
            desk.tend()
    with desk.store as at:
        told = letters(at)
        assert [one["event"] for one in told] == ["failed", "digest"]
        assert told[0]["msgstr"] == "failure 1"
        assert told[1]["untold"] + 1 == told[1]["failures"] == 60 * M // step + 1
        clock[0] += 51 * M  # nothing more happens: what is left is told by the time alone
        desk.tend()
        told = letters(at)
        assert [one["event"] for one in told] == ["failed", "digest", "digest"]
        assert told[2]["failures"] == 221
        assert told[1]["untold"] + told[2]["untold"] + 1 == 221
        assert told[2]["msgstr"] == "failure 221"
        clock[0] += 5 * H
        desk.tend()
        desk.end(DONE)
        desk.tend()
        told = letters(at)
        assert [one["event"] for one in told] == ["failed", "digest", "digest", "recovered"]
        since = when.iso(told[0]["failing_since"])
        assert told[3]["news"] == f"works again after 221 failures since {since}"
        assert len({one["thread"] for one in told}) == 1
        assert of_health(at).failures == 0


def test_an_end_that_is_not_ours_is_not_counted(store: Store, clock: list[int]) -> None:
    desk = Desk(store)
    store.submit()
    job = store.claim_one()
    wish = Wish(HOURLY, False, describe(job, Outcome(FAILED)))
    told: list[bool] = []
    store.queue.finish(job, Outcome(FAILED), (), told.append, wish=wish)
    store.flush()
    store.queue.finish(
        job._replace(token=job.token + 1), Outcome(FAILED), (), told.append, wish=wish
    )
    store.queue.finish(job, Outcome(FAILED), (), told.append, wish=wish)  # the same once more
    store.flush()
    assert told == [True, False, True]
    assert of_health(store).failures == 1
    assert len(letters(desk.store)) == 1


def test_a_batch_that_is_rolled_back_tells_nothing_twice(store: Store, clock: list[int]) -> None:
    """A lost claim among them has each end run again, by itself."""
    Desk(store)
    ids = [store.submit() for _ in range(5)]
    jobs = store.claim(5)
    for job in jobs:
        token = job.token + (job.id == ids[2])
        wish = Wish(HOURLY, False, describe(job, Outcome(FAILED)))
        store.queue.finish(job._replace(token=token), Outcome(FAILED), wish=wish)
    store.flush()
    assert of_health(store).failures == 4
    assert [one["event"] for one in letters(store)] == ["failed"]


def test_a_type_that_does_not_ask_costs_no_statement(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upq.sql import Tx

    ran: list[str] = []
    execute = Tx._execute

    def counted(tx: Tx, sql: Any, text: str, given: Any) -> None:
        ran.append(sql.on(tx.dialect)[0])
        execute(tx, sql, text, given)

    store.submit()
    job = store.claim_one()
    monkeypatch.setattr(Tx, "_execute", counted)
    store.queue.finish(job, Outcome(FAILED, "no"))
    store.flush()
    # cancelled?, the job, its dependents, the counts; the number of the event, and that
    assert len(ran) == 4 + len(store.settles), ran
    assert not any("health" in text for text in ran)


def test_a_job_that_kills_its_daemon_counts(store: Store, clock: list[int]) -> None:
    Desk(store)
    id = store.submit()
    for crash in range(3):
        job = store.claim_one()._replace(crashes=crash, attempt=0)
        outcome = Outcome(FAILED, "the daemon died")
        wish = Wish(HOURLY, False, describe(job, outcome))
        store.queue.rescue([job], lambda _, wish=wish: ([], wish))
    assert store.row(id).state == FAILED
    assert of_health(store).failures == 1
    assert [one["event"] for one in letters(store)] == ["failed"]


def test_one_of_several_daemons_tells(store: Store, clock: list[int]) -> None:
    desk = Desk(store)
    desk.end()
    desk.end()
    others = [store.beside() for _ in range(3)]
    clock[0] += H
    try:
        tenders = [Desk(one) for one in (store, *others)]
        threads = [threading.Thread(target=one.tend) for one in tenders for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for one in others:
            with one:
                pass
    assert Counter(one["event"] for one in letters(store)) == {"failed": 1, "digest": 1}


def test_daemons_that_fail_jobs_at_once_count_each(store: Store) -> None:
    others = [store, *(store.beside() for _ in range(2))]

    def fail(desk: Desk) -> None:
        for _ in range(10):
            job = desk.store.claim(1)
            if job:
                wish = Wish(HOURLY, False, describe(job[0], Outcome(FAILED)))
                desk.store.queue.finish(job[0], Outcome(FAILED), wish=wish)
                desk.store.flush()

    try:
        for _ in range(30):
            store.submit()
        desks = [Desk(one) for one in others]
        threads = [threading.Thread(target=fail, args=(desk,)) for desk in desks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(3):  # what was locked by another whenever it was looked at
            fail(desks[0])
    finally:
        for one in others[1:]:
            with one:
                pass
    assert of_health(store).failures == 30
    assert [one["event"] for one in letters(store)] == ["failed"]


def test_the_age_of_a_queue_is_that_of_its_oldest_job_whatever_its_priority(
    store: Store, clock: list[int]
) -> None:
    rules = Rules("hash", ("syslog",), queue_age_us=10 * M)
    desk = Desk(store, rules)
    store.submit(run_at=START + H)  # not before that time, so it does not wait
    clock[0] += H // 2
    low = store.submit(priority=-10)
    clock[0] += 9 * M
    for _ in range(150):
        store.submit(priority=10)
    clock[0] += 2 * M
    desk.tend()
    desk.tend()
    assert [one["event"] for one in letters(store)] == ["alert"]
    assert "waits for 11m" in letters(store)[0]["news"]
    store.queue.cancel(low, "me")
    desk.tend()
    assert [one["event"] for one in letters(store)] == ["alert", "alert_over"]
    threads = {one["thread"] for one in letters(store)}
    assert len(threads) == 1


def test_a_type_that_never_ran_is_told_of_when_the_daemon_knows_it_for_so_long(
    store: Store, clock: list[int]
) -> None:
    desk = Desk(store, Rules("hash", ("syslog",), no_success_us=26 * H))
    desk.tend()
    clock[0] += 26 * H
    desk.tend()
    assert letters(store) == []
    clock[0] += M
    desk.tend()
    desk.tend()
    assert [one["event"] for one in letters(store)] == ["alert"]
    desk.end(DONE)
    desk.tend()
    assert [one["event"] for one in letters(store)] == ["alert", "alert_over"]


def test_expired_jobs_count(store: Store, clock: list[int]) -> None:
    Desk(store).end(EXPIRED)
    assert of_health(store).failures == 1


# In a daemon


CONFIG = """
[job work]
notify_fail = mail:admin@example.org
notify_after = 2
notify_every = 1h
retries = 1
retry_delay = 0
[job plain]
notify_fail = mail:admin@example.org
[job notify]
[mail]
server = 127.0.0.1:9
"""


def told_by(daemon: Daemon) -> list[Any]:
    jobs = daemon.ask("jobs type:notify limit:100")["jobs"]
    return [job["params"]["job"] for job in reversed(jobs)]


def test_a_daemon_tells_by_the_groups_of_its_types(short_tmp: Path, url: str) -> None:
    work = "def run(self):\n    return self.jobdata.get('how') == 'well'"
    daemon = Daemon(short_tmp, CONFIG, url, work=work, plain=work)
    shutil.copy(Path(__file__).parents[1] / "jobs/notify.py", short_tmp / "jobs")
    with daemon:
        assert daemon.run("work")["attempt"] == 2
        assert told_by(daemon) == []  # the attempt that was followed by another did not count
        daemon.restart()
        second = daemon.run("work")["id"]
        daemon.run("work")
        assert [(one["event"], one["jobid"]) for one in told_by(daemon)] == [("failed", second)]
        daemon.run("work how:well")
        assert [one["event"] for one in told_by(daemon)] == ["failed", "recovered"]
        daemon.run("plain")
        daemon.run("plain")
        assert [one.get("event") for one in told_by(daemon)] == ["failed", "recovered", None, None]
        daemon.end()


ALERTS = """
[job work]
notify_fail = mail:admin@example.org
alert_queue_age = 1s
alert_no_success = 2s
[job notify]
[mail]
server = 127.0.0.1:9
"""


def test_a_daemon_tells_of_a_queue_that_stands_still(short_tmp: Path) -> None:
    daemon = Daemon(short_tmp, ALERTS, work="def run(self):\n    return True")
    shutil.copy(Path(__file__).parents[1] / "jobs/notify.py", short_tmp / "jobs")
    with daemon:
        daemon.ask("pause work")
        id = daemon.submit("work")
        until(lambda: len(told_by(daemon)) == 2)
        assert {one["event"] for one in told_by(daemon)} == {"alert"}
        daemon.ask("resume queue:work")
        assert daemon.wait(id)["state"] == DONE
        until(lambda: [one["event"] for one in told_by(daemon)].count("alert_over") == 2)
        daemon.end()


EACH = """
[job work]
concurrent = 4
notify_fail = syslog
notify_after = 2
[job notify]
concurrent = 4
syslog_address = /nowhere
retry_delay = 1h
"""


def test_kills_lose_and_double_no_message(short_tmp: Path, url: str) -> None:
    """As many messages as failures, but for the first."""
    work = "def run(self):\n    time.sleep(0.02)\n    return False"
    daemon = Daemon(short_tmp, EACH, url, work=work)
    shutil.copy(Path(__file__).parents[1] / "jobs/notify.py", short_tmp / "jobs")
    jobs = 80
    with daemon:
        with daemon.talk() as talk:
            for _ in range(jobs):
                talk.say("work")
        for left in (60, 40, 20):
            until(lambda left=left: daemon.ask("status")["jobs"][FAILED] >= jobs - left)
            daemon.restart()
        until(lambda: daemon.ask("status")["jobs"][FAILED] == jobs)
        told = told_by(daemon)
        ids = [one["jobid"] for one in told]
        assert len(ids) == len(set(ids)) == jobs - 1
        assert sorted(one["failures"] for one in told) == list(range(2, jobs + 1))
        assert len({one["thread"] for one in told}) == 1
        daemon.end()
