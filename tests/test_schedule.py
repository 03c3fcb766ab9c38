"""Schedules on a clock of the tests' own: each slot fires once, whoever watches, whatever fails."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from tests import stores
from tests.stores import Store
from tests.test_queue import FEW_ROWS_MS, measured
from upq import schema
from upq.batch import Act, Batch
from upq.changes import Submit
from upq.errors import Busy, Unavailable
from upq.job import NewJob
from upq.protocol import SUBMIT, Request
from upq.queue import value_of
from upq.schedule import SLOTS, Scheduler, plan
from upq.settings import ScheduleSettings
from upq.slots import Due, Slots
from upq.statements.slots import ADD_SLOTS
from upq.when import Times, instant, iso

database, url, store = stores.database, stores.url, stores.store

SECOND, MINUTE, HOUR, DAY = 1_000_000, 60_000_000, 3_600_000_000, 86_400_000_000
NOON = instant("2026-06-01T12:00:00Z")


class Clock:
    def __init__(self, at: int = NOON) -> None:
        self.at = at

    def __call__(self) -> int:
        return self.at


def schedule(
    name: str, times: str, missed: str = "once", max_late_s: float = 0
) -> ScheduleSettings:
    zone = "" if times.startswith("every") else "UTC"
    read = Times.read(times, zone)
    return ScheduleSettings(
        name, type="hash", missed=missed, max_late_s=max_late_s, times=read,
        request=Request(SUBMIT, "hash", {"fid": 1}),
    )  # fmt: skip


def make(one: ScheduleSettings, at: int) -> NewJob:
    return NewJob(one.type, dict(one.request.params), submitter=f"schedule {one.name}", run_at=at)


def scheduler(at: Store, clock: Clock, *schedules: ScheduleSettings) -> Scheduler:
    made = Scheduler(Slots(at.queue), make, clock)
    made.configure({one.name: one for one in schedules})
    made.step()
    return made


def fired(store: Store) -> list[tuple[str, str]]:
    """Who has fired for which time, by the jobs there are."""
    job = schema.job
    query = sa.select(job.c.submitter, job.c.run_at).order_by(job.c.run_at, job.c.submitter)
    return [(who.removeprefix("schedule "), iso(at)[11:19]) for who, at in store.fetch(query)]


def fired_at(store: Store) -> list[str]:
    return [at for _, at in fired(store)]


# One scheduler


def test_a_slot_fires_when_its_time_comes_and_its_job_says_so(store: Store) -> None:
    clock = Clock()
    one = scheduler(store, clock, schedule("nightly", "0 * * * *"))
    assert fired(store) == [], "what was before the schedule is not made up for"
    clock.at = NOON + HOUR - 1
    one.step()
    assert fired(store) == []
    clock.at += 1
    one.step()
    one.step()
    assert fired(store) == [("nightly", "13:00:00")]
    (job,) = store.jobs([])
    assert (job["submitter"], job["type"], job["params"]) == (
        "schedule nightly",
        "hash",
        {"fid": 1},
    )
    assert store.views.fired(["nightly", "other"]) == {
        "nightly": (NOON + HOUR, job["id"], job["state"])
    }


def test_it_sleeps_to_the_next_slot_and_looks_at_the_clock_meanwhile(store: Store) -> None:
    clock = Clock()
    made = scheduler(store, clock, schedule("a", "0 * * * *"))
    assert made.step() == 5
    clock.at = NOON + HOUR - 1_250_000
    assert made.step() == 1.25
    made.configure({})
    assert made.step() is None, "nothing to wait for"


def test_schedules_come_go_and_change_without_making_up_for_anything(store: Store) -> None:
    clock = Clock()
    made = scheduler(store, clock, schedule("a", "0 * * * *"), schedule("b", "0 * * * *"))
    clock.at += HOUR
    made.configure({"a": schedule("a", "30 * * * *"), "c": schedule("c", "0 * * * *")})
    made.step()
    assert fired(store) == [], "a has new times, b is gone, c is new"
    clock.at += HOUR
    made.step()
    assert fired(store) == [("a", "13:30:00"), ("c", "14:00:00")]


def test_a_schedule_goes_on_where_the_last_daemon_left_it(store: Store) -> None:
    clock = Clock()
    nightly = schedule("a", "every 10m")
    scheduler(store, clock, nightly)
    clock.at += 10 * MINUTE + 30 * SECOND
    scheduler(store, clock, nightly)
    assert fired_at(store) == ["12:10:00"]
    scheduler(store, clock, nightly)
    assert fired_at(store) == ["12:10:00"]


def down_from_noon_until(store: Store, until: str, one: ScheduleSettings) -> list[str]:
    """What fires when a daemon was there at noon and the next one comes then, and stays."""
    clock = Clock()
    scheduler(store, clock, one)
    clock.at = instant(f"2026-06-01T{until}Z")
    made = scheduler(store, clock, one)
    made.step()
    return fired_at(store)


@pytest.mark.parametrize(
    ("times", "until", "missed", "max_late_s", "expected"),
    [
        # Not a minute late: not missed.
        ("every 10m", "12:10:59", "skip", 0, ["12:10:00"]),
        ("every 10m", "12:10:59", "once", 0, ["12:10:00"]),
        ("every 10s", "12:00:31", "skip", 0, ["12:00:10", "12:00:20", "12:00:30"]),
        ("every 10s", "12:00:31", "once", 0, ["12:00:10", "12:00:20", "12:00:30"]),
        ("every 10s", "12:00:31", "all", 0, ["12:00:10", "12:00:20", "12:00:30"]),
        # Missed.
        ("every 10m", "12:35:00", "skip", 0, []),
        ("every 10m", "12:35:00", "once", 0, ["12:30:00"]),
        ("every 10m", "12:35:00", "all", 0, ["12:10:00", "12:20:00", "12:30:00"]),
        ("every 10m", "12:30:30", "skip", 0, ["12:30:00"]),
        ("every 10m", "12:30:30", "once", 0, ["12:30:00"]),
        # Too late.
        ("every 10m", "12:35:00", "once", 600, ["12:30:00"]),
        ("every 10m", "12:35:00", "once", 240, []),
        ("every 10m", "12:35:00", "all", 1000, ["12:20:00", "12:30:00"]),
        ("every 10m", "12:35:00", "all", 240, []),
        ("every 10s", "12:00:31", "all", 15, ["12:00:20", "12:00:30"]),
        # Nothing missed.
        ("0 0 * * *", "18:00:00", "all", 0, []),
    ],
)
def test_what_was_missed_while_no_daemon_was_there(  # noqa: PLR0917
    store: Store, times: str, until: str, missed: str, max_late_s: float, expected: list[str]
) -> None:
    one = schedule("a", times, missed, max_late_s)
    assert down_from_noon_until(store, until, one) == expected


def test_what_was_passed_over_stays_passed_over(store: Store) -> None:
    clock = Clock()
    scheduler(store, clock, schedule("a", "every 10m", "skip"))
    clock.at += 35 * MINUTE
    scheduler(store, clock, schedule("a", "every 10m", "skip"))
    scheduler(store, clock, schedule("a", "every 10m", "all"))
    assert fired(store) == []
    clock.at += 5 * MINUTE
    scheduler(store, clock, schedule("a", "every 10m", "all"))
    assert fired_at(store) == ["12:40:00"]


def test_all_that_was_missed_comes_in_portions(store: Store) -> None:
    clock = Clock()
    one = schedule("a", "every 1s", "all")
    scheduler(store, clock, one)
    clock.at += (2 * SLOTS + 5) * SECOND
    scheduler(store, clock, one)
    assert len(fired(store)) == len(set(fired(store))) == 2 * SLOTS + 5


# The clock


def test_a_clock_put_back_fires_nothing_twice(store: Store) -> None:
    clock = Clock()
    made = scheduler(store, clock, schedule("a", "every 10m", "all"))
    for minutes in (10, 20, 30, 5, 10, 15, 20, 30, 40, 12, 50):
        clock.at = NOON + minutes * MINUTE
        made.step()
    assert fired_at(store) == ["12:10:00", "12:20:00", "12:30:00", "12:40:00", "12:50:00"]


def test_a_clock_that_was_years_ahead_and_is_right_again(store: Store) -> None:
    clock = Clock(NOON)
    one = schedule("a", "every 10m")
    made = scheduler(store, clock, one)
    clock.at = NOON + 3650 * DAY
    made.step()
    clock.at = NOON + 10 * MINUTE
    made.step()
    clock.at = NOON + 20 * MINUTE
    made.step()
    scheduler(store, clock, one)
    assert fired_at(store) == ["12:10:00", "12:20:00", "12:00:00"]


def test_a_schedule_first_seen_by_a_clock_that_was_ahead_begins_when_it_is_right(
    store: Store,
) -> None:
    clock = Clock(NOON + 365 * DAY)
    one = schedule("a", "every 10m", "all")
    made = scheduler(store, clock, one)
    clock.at = NOON
    made.step()
    assert fired(store) == []
    clock.at = NOON + 10 * MINUTE
    made.step()
    assert fired_at(store) == ["12:10:00"]


def test_a_clock_put_forward_is_seen_within_seconds(store: Store) -> None:
    clock = Clock()
    made = scheduler(store, clock, schedule("a", "0 3 * * *"))
    assert (made.step() or 99) <= 5
    clock.at += 16 * HOUR
    made.step()
    assert fired_at(store) == ["03:00:00"]


# Several daemons


def test_two_daemons_fire_each_slot_once(url: str) -> None:
    """T19: 100 schedules, 20 of them every second, over ten minutes, two schedulers at once."""
    ticking = [schedule(f"second-{n}", "* * * * * *", "all") for n in range(20)]
    others = [schedule(f"every-{n}", f"every {n}s", "all") for n in range(11, 91)]
    schedules = [*ticking, *others]
    clock, minutes, step_s = Clock(), 10, 5
    with Store(url) as store, store.beside() as other:
        both = [scheduler(store, clock, *schedules), scheduler(other, clock, *schedules)]
        for _ in range(minutes * 60 // step_s):
            clock.at += step_s * SECOND
            at_once(*(one.step for one in both))
        for one in both:  # what the other one had in hand
            one.step()
        counts = Counter(fired_slots(store))
        expected = [
            (one.name, at) for one in schedules for at in slots(one, NOON, NOON + minutes * MINUTE)
        ]
        assert len(expected) == 20 * 600 + sum(600 // n + (NOON // SECOND % n + 600 % n >= n)
                                               for n in range(11, 91))  # fmt: skip
        assert counts == Counter(expected), "each slot exactly once"
        rows = store.fetch(sa.select(schema.slot).where(schema.slot.c.job.is_not(None),
                                                        schema.slot.c.at > 0))  # fmt: skip
        assert len(rows) == len(expected)
        tally = store.fetch(sa.select(sa.func.sum(schema.tally.c.n)))
        assert tally == [(len(expected),)]


def fired_slots(store: Store) -> list[tuple[str, int]]:
    job = schema.job
    rows = store.fetch(sa.select(job.c.submitter, job.c.run_at))
    return [(who.removeprefix("schedule "), at) for who, at in rows]


def slots(one: ScheduleSettings, after: int, until: int) -> list[int]:
    assert one.times
    found, at = [], one.times.next(after)
    while at <= until:
        found.append(at)
        at = one.times.next(at)
    return found


def at_once(*calls: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_two_daemons_that_come_back_at_once_make_up_for_it_once(url: str) -> None:
    one = schedule("a", "every 10m", "once")
    clock = Clock()
    with Store(url) as store, store.beside() as other:
        scheduler(store, clock, one)
        for n in range(10):
            clock.at += 7 * HOUR + 3 * MINUTE
            ahead = Clock(clock.at + 30 * SECOND)
            made = [Scheduler(Slots(store.queue), make, clock),
                    Scheduler(Slots(other.queue), make, ahead)]  # fmt: skip
            for each in made:
                each.configure({"a": one})
            at_once(*(each.step for each in made))
            for each in made:
                each.step()
            assert len(fired(store)) == n + 1


def test_daemons_that_meet_a_new_schedule_at_once(url: str) -> None:
    clock = Clock()
    many = [schedule(f"s{n}", "every 10m") for n in range(30)]
    with Store(url) as store, store.beside() as other:
        at_once(lambda: scheduler(store, clock, *many), lambda: scheduler(other, clock, *many))
        heads = sa.select(sa.func.count()).where(schema.slot.c.at == 0)
        assert store.fetch(heads) == [(30,)]


def test_daemons_with_different_times_for_a_schedule_fire_each_slot_once(url: str) -> None:
    """As while one of two has been reloaded and the other has not."""
    clock = Clock()
    with Store(url) as store, store.beside() as other:
        made = [scheduler(store, clock, schedule("a", "every 10m", "all")),
                scheduler(other, clock, schedule("a", "every 15m", "all"))]  # fmt: skip
        for _ in range(6):
            clock.at += 5 * MINUTE
            for each in made:
                each.step()
        assert fired_at(store) == ["12:10:00", "12:15:00", "12:20:00", "12:30:00"]


# What can go wrong


def test_what_the_database_did_not_take_fires_when_it_is_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    made = scheduler(store, clock, schedule("a", "every 10m"))
    clock.at += 10 * MINUTE
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "fire", broken)
        with pytest.raises(Unavailable):
            made.step()
    made.step()
    assert fired_at(store) == ["12:10:00"]


def broken(*_: object) -> None:
    raise Unavailable("the database is away")


def test_what_committed_without_an_answer_does_not_fire_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    made = scheduler(store, clock, schedule("a", "every 10m"))
    clock.at += 10 * MINUTE
    fire = Slots.fire

    def doubtful(slots: Slots, due: list[Due], until: int) -> None:
        fire(slots, due, until)
        broken()

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "fire", doubtful)
        with pytest.raises(Unavailable):
            made.step()
    made.step()
    assert fired_at(store) == ["12:10:00"]


def test_a_job_that_is_refused_takes_its_slot_and_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    insert = Batch.insert
    clock = Clock()
    made = scheduler(store, clock, schedule("a", "every 10m"), schedule("b", "every 10m"))
    clock.at += 10 * MINUTE

    def full(batch: Batch, submits: list[Submit]) -> list[object]:
        """As a type with a limit does."""
        results = iter(insert(batch, [one for one in submits if one.who != "schedule a"]))
        return [Busy("full") if one.who == "schedule a" else next(results) for one in submits]

    monkeypatch.setattr(Batch, "insert", full)
    made.step()
    assert fired(store) == [("b", "12:10:00")]
    assert "schedule a, 2026-06-01T12:10:00.000000Z: full" in caplog.text
    clock.at += 10 * MINUTE
    made.step()
    assert fired(store) == [("b", "12:10:00"), ("b", "12:20:00")]


# Plans


def test_a_plan_is_short_however_long_nobody_was_there() -> None:
    for missed, wanted in (("skip", False), ("once", True)):
        one = schedule("a", "* * * * * *", missed)
        (slot,) = plan(one, NOON, NOON + 100 * DAY)
        assert slot == (NOON + 100 * DAY, True)
        one = schedule("a", "0 3 1 1 *", missed)
        (slot,) = plan(one, NOON - 3000 * DAY, NOON)
        assert slot == (instant("2026-01-01T03:00:00Z"), wanted)
    late = plan(schedule("a", "* * * * * *", "all", 10), NOON, NOON + 100 * DAY)
    assert [fires for _, fires in late] == [False, *[True] * 11]
    assert len(plan(schedule("a", "* * * * * *", "all"), NOON, NOON + 100 * DAY)) == SLOTS


# Old slots


def test_old_slots_go_but_the_last_ones(store: Store) -> None:
    clock = Clock()
    made = scheduler(store, clock, schedule("a", "every 1m", "all"), schedule("b", "every 30m"))
    for _ in range(90):
        clock.at += MINUTE
        made.step()
    made.configure({"b": schedule("b", "every 45m")})
    made.step()
    assert Slots(store.queue).purge(NOON + 30 * MINUTE) == 29 + 2  # and where both began
    assert Slots(store.queue).purge(NOON + DAY) == 60 + 2
    assert Slots(store.queue).purge(NOON + DAY) == 0
    last = {name: at for name, (at, _, _) in store.views.fired(["a", "b"]).items()}
    assert last == {"a": NOON + 90 * MINUTE, "b": NOON + 90 * MINUTE}
    clock.at = NOON + 100 * DAY + 20 * MINUTE
    scheduler(store, clock, schedule("b", "every 45m", "skip"))
    assert len(fired(store)) == 93


# What it costs


@pytest.mark.slow
@pytest.mark.alone
def test_no_statement_reads_more_than_a_few_slots(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    made = scheduler(store, clock, schedule("a", "every 1s", "all"), schedule("b", "every 1s"))
    many = [(name, NOON + n, None) for name in ("a", "b", "c") for n in range(1, 100_000)]
    run = store.queue.writer.run
    for start in range(0, len(many), 20_000):
        part = many[start : start + 20_000]
        value_of(run([Act(lambda batch, part=part: batch.tx.run_rows(ADD_SLOTS, part))])[0])  # type: ignore[misc]
    spent_ms = measured(monkeypatch)
    for _ in range(5):
        clock.at += SECOND
        made.step()
        scheduler(store, clock, schedule("a", "every 1s", "all"), schedule("b", "every 1s"))
        Slots(store.queue).purge(NOON + 50)
    assert len(fired(store)) == 10
    assert {
        "HEADS_FREE",
        "SCHEDULE_HEADS",
        "LAST_SLOTS",
        "OLD_SLOTS",
        "LAST_FIRED",
    } <= spent_ms.keys()
    del spent_ms["LAST_FIRED"]  # goes past slots that were passed over
    assert {name: ms for name, ms in spent_ms.items() if ms > FEW_ROWS_MS} == {}
