"""Pools, rates and tokens over a store: what goes first, and how much of it at once."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.stores import Store, database, statements, store, url
from tests.test_claimer import Line
from tests.test_pool import until
from upq import config, schema, when
from upq.changes import Want
from upq.errors import Unavailable
from upq.gates import Closed, Free
from upq.job import DONE, QUEUED, RUNNING, Job, Lane, NewJob
from upq.jobtypes import Rules, pool_key
from upq.pool import Pool, SharedPool
from upq.sql import Sql, Tx
from upq.statements.jobs import START_JOBS

__all__ = ["database", "store", "url"]

STORAGE = """
[pool storage]
queues = storage.*.high storage.*.default storage.*.low
concurrent = {n}
{more}
[job work]
[job other]
"""


class Site(Line):
    """A claimer with the pools and limits of a configuration."""

    def __init__(self, store: Store, folder: Path, text: str) -> None:
        super().__init__(store)
        self.folder = folder
        self.claimer._hold = self.hold
        self.configure(text)

    def hold(self, lane: Lane) -> str:
        closed = self.rules.gate(lane)
        return self.held or self.rules.elsewhere(lane) or (closed.reason if closed else "")

    def configure(self, text: str) -> None:
        file = self.folder / "upq.cfg"
        file.write_text(text)
        settings = config.load(file, {})
        self.rules = Rules(settings)
        pools: dict[str, Pool] = dict(self.claimer.pools)
        for one in settings.pools_here.values():
            made = pools.get(pool_key(one.name))
            if not isinstance(made, SharedPool):
                made = SharedPool(one.name, one.concurrent, self, self.claimer.wake)  # type: ignore[arg-type]
                pools[pool_key(one.name)] = made
            made.order = self.rules.order(one)
            made.most = {
                j.name: j.concurrent for j in settings.jobs.values() if "concurrent" in j.variables
            }
            made.resize(one.concurrent)
        for name, job in settings.jobs.items():
            pools.setdefault(name, Pool(name, job.concurrent, self, self.claimer.wake))  # type: ignore[arg-type]
        self.claimer.configure(pools, self.rules)
        self.claimer.heat()

    def queue(self, n: int, queue: str = "", type: str = "work", priority: int = 0) -> list[int]:
        jobs = [NewJob(type, {}, queue, priority) for _ in range(n)]
        return [one.id for one in self.store.accepted(*jobs)]

    def inversions(self, key: Callable[[int], object]) -> list[int]:
        """Jobs that were claimed while another was queued that goes before them.

        The events tell it, in the order of the commits.
        """
        waiting: dict[int, object] = {}
        found = []
        for event in self.store.events:
            if event.state == QUEUED:
                waiting[event.job] = key(event.job)
            elif event.state == RUNNING:
                place = waiting.pop(event.job)
                if len(found) < 10 and any(other < place for other in waiting.values()):  # type: ignore[operator]
                    found.append(event.job)
        return found


@pytest.fixture
def site(store: Store, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(text: str, at: Store = store) -> Site:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Site(at, folder, text))
        return made[-1]

    yield make
    for one in made:
        one.end()


class Gate:
    """Holds the jobs of a line up until it is opened."""

    def __init__(self, line: Line) -> None:
        self._event = threading.Event()
        line.act = lambda job: self._event.wait(30) and None

    def open(self) -> None:
        self._event.set()


# Order


def test_one_place_busy_then_high_default_and_low(site: Callable[..., Site]) -> None:
    line = site(STORAGE.format(n=1, more=""))
    gate = Gate(line)
    line.begin()
    first = line.queue(1, "storage.a.default")
    until(lambda: line.started == first)
    (low,) = line.queue(1, "storage.a.low", priority=10)
    (default,) = line.queue(1, "storage.b.default", "other")
    (high,) = line.queue(1, "storage.c.high")
    gate.open()
    until(lambda: line.done() == 4)
    assert line.started == [*first, high, default, low]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("shared", [False, True])
def test_ten_thousand_jobs_over_three_priorities_without_an_inversion(
    site: Callable[..., Site], shared: bool
) -> None:
    """They come while they run, short enough for many to be claimed ahead at once."""
    line = site(STORAGE.format(n=1, more="") if shared else "[job work]")
    queues = [f"storage.{p}.{q}" for p in "ab" for q in ("high", "default", "low")]
    seeded = random.Random(7)
    place: dict[int, tuple[int, int, int]] = {}
    line.begin()
    while len(place) < 10_000:
        queue = seeded.choice(queues) if shared else ""
        size = min(seeded.randint(1, 100), 10_000 - len(place))
        jobs = [NewJob("work", {}, queue, seeded.choice((10, 0, -10))) for _ in range(size)]
        depth = ("high", "default", "low").index(queue.rpartition(".")[2]) if shared else 0
        for one, job in zip(line.store.accepted(*jobs), jobs, strict=True):
            place[one.id] = (depth, -job.priority, one.id)
    until(lambda: line.done() == 10_000, 180)
    assert line.inversions(place.__getitem__) == []
    if shared:
        # In the one thread, too, what was claimed later goes first if it is urgent.
        assert len(line.started) == len(set(line.started)) == 10_000


def test_what_is_urgent_goes_before_what_was_claimed_ahead(site: Callable[..., Site]) -> None:
    line = site(STORAGE.format(n=1, more=""))
    pool = line.claimer.pools["pool storage"]
    gate = Gate(line)
    first, low, high = (
        line.queue(1, f"storage.a.{name}")[0] for name in ("default", "low", "high")
    )

    def claim(name: str) -> list[Job]:
        return line.store.claim(1, "work", f"storage.a.{name}")

    pool.give(0, claim("default"))
    until(lambda: line.started == [first])
    pool.give(0, claim("low"))
    pool.give(0, claim("high"))
    gate.open()
    until(lambda: len(line.started) == 3)
    assert line.started == [first, high, low]


def test_weights_hold_over_a_thousand_jobs(site: Callable[..., Site]) -> None:
    line = site("[pool p]\nqueues = a:6 b:3 c:1\nconcurrent = 3\n[job work]")
    name = {id: queue for queue in "abc" for id in line.queue(1000, queue)}
    line.claimer.heat()
    line.begin()
    until(lambda: len(line.started) >= 1000, 60)
    found = Counter(
        name[e.job] for e in [e for e in line.store.events if e.state == RUNNING][:1000]
    )
    for queue, share in (("a", 600), ("b", 300), ("c", 100)):
        assert abs(found[queue] - share) <= 0.05 * share, found
    until(lambda: line.done() == 3000, 60)


def test_ageing_frees_what_waits_below_a_stream_of_urgent_jobs(site: Callable[..., Site]) -> None:
    line = site(STORAGE.format(n=1, more="ageing = 10m"))
    line.held = "wait"
    low = line.queue(3, "storage.a.low", priority=-10)
    back = sa.update(schema.job).values(created_at=schema.job.c.created_at - 26 * 60 * 10**6)
    line.store.change(back)
    high = line.queue(20, "storage.a.high")
    newer = line.queue(2, "storage.a.low", priority=10)
    line.held = ""
    line.claimer.heat()
    line.begin()
    until(lambda: line.done() == 25)
    # Two steps up they are of the first level, but of a lower priority there; a third counts.
    assert line.started == [*high, *low, *newer]
    line.started.clear()
    line.held = "wait"
    low = line.queue(3, "storage.a.low", priority=-10)
    line.store.change(sa.update(schema.job).values(created_at=when.now() - 31 * 60 * 10**6))
    high = line.queue(20, "storage.a.high")
    line.held = ""
    line.claimer.heat()
    until(lambda: line.done() == 48)
    assert line.started == [*low, *high]


# Places


def test_a_pool_has_its_places_and_a_type_in_it_its_own(site: Callable[..., Site]) -> None:
    text = STORAGE.format(n=4, more="") + "[job few]\nconcurrent = 1\n"
    line = site(text)
    now, most = Counter[str](), Counter[str]()
    lock = threading.Lock()

    def act(job: Job) -> None:
        with lock:
            now[job.type] += 1
            now["all"] += 1
            for name, n in now.items():
                most[name] = max(most[name], n)
        time.sleep(0.01)
        with lock:
            now[job.type] -= 1
            now["all"] -= 1

    line.act = act
    line.begin()
    for n in range(30):
        line.queue(2, f"storage.{n % 3}.low", "few")
        line.queue(3, f"storage.{n % 3}.high")
    until(lambda: line.done() == 150, 60)
    assert (most["few"], most["all"]) == (1, 4)


def test_a_lane_that_comes_while_jobs_run_is_seen(site: Callable[..., Site]) -> None:
    line = site(STORAGE.format(n=2, more=""))
    line.begin()
    for n in range(40):
        line.queue(1, f"storage.new{n}.default")
    until(lambda: line.done() == 40)


def test_many_threads_that_submit_to_a_pool_lose_no_wake_up(site: Callable[..., Site]) -> None:
    line = site(STORAGE.format(n=3, more=""))
    line.begin()

    def submit(name: str) -> None:
        for n in range(40):
            line.queue(1, f"storage.{n % 4}.{name}", seeded.choice(("work", "other")))
            if n % 7 == 0:
                time.sleep(0.003)

    seeded = random.Random(3)
    threads = [
        threading.Thread(target=submit, args=(name,)) for name in ("high", "default", "low") * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    until(lambda: line.done() == 240, 60)


def test_a_draw_that_is_rolled_back_loses_nothing(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = site(STORAGE.format(n=9, more=""))
    line.held = "wait"
    ids = line.queue(5, "storage.a.high")
    line.held = ""
    execute, broken = Tx._execute, [1, 1, 1]

    def failing(tx: Tx, sql: Sql, text: str, given: Any) -> None:
        if sql is START_JOBS and broken:
            broken.pop()
            raise Unavailable("away")
        execute(tx, sql, text, given)

    monkeypatch.setattr(Tx, "_execute", failing)
    line.claimer.heat()
    line.begin()
    until(lambda: line.done() == 5)
    assert (sorted(line.started), broken) == (ids, [])


def test_a_reload_moves_queues_between_pools_and_touches_nothing_that_runs(
    site: Callable[..., Site],
) -> None:
    line = site(STORAGE.format(n=1, more=""))
    gate = Gate(line)
    line.begin()
    ids = line.queue(6, "storage.a.high")
    until(lambda: len(line.started) == 1)
    line.configure("[pool new]\nqueues = storage.*\nconcurrent = 2\n[job work]")
    until(lambda: len(line.started) == 3)
    line.configure(STORAGE.format(n=4, more=""))
    until(lambda: len(line.started) == 6)
    gate.open()
    until(lambda: line.done() == 6)
    assert sorted(line.started) == ids


def test_only_the_pools_of_this_node_are_claimed(site: Callable[..., Site]) -> None:
    pools = "[pool x]\nqueues = x.*\n[pool y]\nqueues = *.1 y.*\n[job work]"
    line = site("[node]\nname = n1\npools = x\n" + pools)
    mine = line.queue(2, "x.1") + line.queue(2) + line.queue(1, "z")
    line.queue(2, "y.1")
    line.claimer.heat()
    line.begin()
    until(lambda: line.done() == 5)
    time.sleep(0.1)
    assert sorted(line.started) == mine
    lane = line.store.queue.lane("y.1", "work")
    assert line.claimer.reason(lane) == "queue y.1 is of pool y, which n1 does not serve"


# Rates


def starts_us(store: Store) -> list[int]:
    query = sa.select(schema.job.c.started_at).where(schema.job.c.started_at.is_not(None))
    return sorted(row[0] for row in store.fetch(query))


def most_within(starts: list[int], window_us: int) -> int:
    most = first = 0
    for last, at in enumerate(starts):
        while at - starts[first] >= window_us:
            first += 1
        most = max(most, last - first + 1)
    return most


def submit_for(line: Site, seconds: float) -> float:
    """Submit jobs for so long; how much of the time stalls have taken, of the machine or the
    database. A burst makes up for a short one; what a long one leaves out of a rate is lost.
    """
    over_s = time.monotonic() + seconds
    stalled_s = 0.0
    while (began_s := time.monotonic()) < over_s:
        line.queue(1)
        time.sleep(0.05)
        stalled_s += max(time.monotonic() - began_s - 0.1, 0)
    return stalled_s


def test_a_rate_is_kept_under_pressure(site: Callable[..., Site]) -> None:
    """The daemon's test takes 20 s; here all databases have 5 s, and jobs that come meanwhile."""
    line = site("[job work]\nrate = 100/s\nconcurrent = 4")
    line.held = "wait"
    line.queue(1000)
    line.begin()
    line.held = ""
    line.claimer.heat()
    until(lambda: line.started)
    stalled_s = submit_for(line, 5)
    line.claimer.stop()
    starts = starts_us(line.store)
    inside = [at for at in starts if at < starts[0] + 5_000_000]
    assert most_within(starts, 1_000_000) <= 100 + 20
    assert 500 * 0.93 - 100 * stalled_s <= len(inside) <= 500 + 20


def test_a_rate_is_of_a_type_whatever_the_queue(site: Callable[..., Site]) -> None:
    line = site(
        "[pool p]\nqueues = a b c\nconcurrent = 8\n[job work]\nrate = 5/h burst 7\n[job other]"
    )
    for queue in ("a", "b", "", "c"):
        line.queue(5, queue)
    others = line.queue(4, "c", "other") + line.queue(4, "a", "other")
    line.claimer.heat()
    line.begin()
    until(lambda: line.done() == 15)
    time.sleep(0.1)
    assert len(line.started) == 15 and set(others) < set(line.started)
    lane = line.store.queue.lane("b", "work")
    assert line.claimer.reason(lane).startswith("rate 5/h is used up until 20")


def test_a_spent_rate_wakes_the_claimer_in_time_and_not_more(site: Callable[..., Site]) -> None:
    line = site("[job work]\nrate = 2/s")
    steps: list[float] = []
    step = line.claimer.step
    line.claimer.step = lambda: steps.append(1) or step()  # type: ignore[method-assign]
    line.begin()
    line.queue(3)
    until(lambda: line.done() == 3)
    starts = starts_us(line.store)
    assert [later - at >= 499_000 for at, later in itertools.pairwise(starts)] == [True] * 2
    assert len(steps) < 40


def test_who_waits_for_a_place_behind_a_rate_wakes_nobody(site: Callable[..., Site]) -> None:
    line = site("[job work]\nrate = 5/s burst 1")
    steps: list[float] = []
    step = line.claimer.step
    line.claimer.step = lambda: steps.append(1) or step()  # type: ignore[method-assign]
    gate = Gate(line)
    line.begin()
    line.queue(2)
    time.sleep(1.0)  # the rate lets the second go, and there is no place
    assert len(steps) < 40
    gate.open()
    until(lambda: line.done() == 2)


def test_two_daemons_share_a_rate(site: Callable[..., Site], store: Store) -> None:
    if not store.queue.shared:
        pytest.skip("SQLite serves one daemon")
    text = "[job work]\nrate = 50/s burst 5\nconcurrent = 2"
    with store.beside() as beside:
        lines = [site(text), site(text, beside)]
        for line in lines:
            line.held = "wait"
            line.begin()
        lines[0].queue(600)
        for line in lines:
            line.held = ""
            line.claimer.heat()
        until(lambda: lines[0].started or lines[1].started)
        stalled_s = submit_for(lines[0], 5)
        for line in lines:
            line.end()
        starts = starts_us(store)
        inside = [at for at in starts if at < starts[0] + 4_500_000]
        assert most_within(starts, 1_000_000) <= 55
        assert 225 * 0.7 - 50 * stalled_s <= len(inside) <= 225 + 5
        assert all(line.started for line in lines)


# Tokens


def most_tokens(store: Store, need: dict[str, int]) -> int:
    """The most that were held at a time, by the events in the order of the commits."""
    query = sa.select(schema.event.c.job, schema.event.c.state, schema.job.c.type)
    query = query.where(schema.job.c.id == schema.event.c.job).order_by(schema.event.c.n)
    running: dict[int, int] = {}
    most = 0
    for id, state, type in store.fetch(query):
        running.pop(id, None)
        if state == RUNNING:
            running[id] = need[type]
            most = max(most, sum(running.values()))
    return most


TOKENS = """
[tokens]
disk = 5
[job one]
needs = disk:1
concurrent = 8
[job three]
needs = disk:3
concurrent = 8
"""


def test_no_more_tokens_are_held_than_there_are(site: Callable[..., Site]) -> None:
    line = site(TOKENS)
    line.act = lambda job: time.sleep(0.002)
    line.begin()
    for _ in range(20):
        line.queue(5, type="one")
        line.queue(3, type="three")
    until(lambda: line.done() == 160, 60)
    assert most_tokens(line.store, {"one": 1, "three": 3}) == 5


def test_two_daemons_share_the_tokens(site: Callable[..., Site], store: Store) -> None:
    if not store.queue.shared:
        pytest.skip("SQLite serves one daemon")
    with store.beside() as beside:
        lines = [site(TOKENS), site(TOKENS, beside)]
        for line in lines:
            line.act = lambda job: time.sleep(0.003)
            line.begin()
        for n in range(40):
            lines[n % 2].queue(3, f"q{n % 5}", type="one")
            lines[1 - n % 2].queue(2, type="three")
        until(lambda: lines[0].done() == 200, 90)
        for line in lines:
            line.end()
        assert most_tokens(store, {"one": 1, "three": 3}) <= 5
        assert all(line.started for line in lines)


def test_who_waits_for_tokens_is_told(site: Callable[..., Site]) -> None:
    line = site(TOKENS)
    gate = Gate(line)
    line.begin()
    line.queue(1, type="three")
    until(lambda: len(line.started) == 1)
    line.queue(1, type="three")
    lane = line.store.queue.lane("three", "three")
    until(lambda: line.claimer.reason(lane) == "it needs disk:3, 2 of 5 are free")
    gate.open()
    until(lambda: line.done() == 2)
    until(lambda: line.claimer.reason(lane) == "")


# Drain


@pytest.mark.parametrize("queue", ["", "a"])
def test_a_claim_that_was_on_its_way_heeds_a_drain(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, queue: str
) -> None:
    line = site("[pool p]\nqueues = a\n[job work]")
    book = line.claimer.book

    def then_drained(lanes: set[int]) -> list[Want]:
        booked = book(lanes)
        line.claimer.drain()
        return booked

    monkeypatch.setattr(line.claimer, "book", then_drained)
    (id,) = line.queue(1, queue)
    assert line.store.row(id).state == QUEUED
    monkeypatch.undo()
    line.claimer.drained = False
    line.claimer.heat()
    line.begin()
    until(lambda: line.started == [id])


# Gates


def test_a_gate_that_opens_lets_the_jobs_go(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = site("[job work]\nmin_free = / 1K\n[job other]")
    is_open = threading.Event()

    def closed(free: Free, now: int) -> Closed | None:
        return None if is_open.is_set() else Closed("disk", now + 100_000)

    monkeypatch.setattr(Free, "closed", closed)
    line.begin()
    other = line.queue(1, type="other")
    gated = line.queue(3)
    lane = line.store.queue.lane("work", "work")
    assert line.claimer.reason(lane) == "disk"
    until(lambda: line.started == other)
    opens = when.now()
    is_open.set()
    until(lambda: line.done() == 4)
    assert line.started == other + gated
    assert starts_us(line.store)[1] >= opens


# What it costs those who use none of it


def test_a_plain_job_runs_the_statements_it_always_ran(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {id(sql): name for name, sql in statements()}
    line = Site(store, tmp_path, "[job work]\n[job slow]\nrate = 1/s\n[pool p]\nqueues = a")
    store.queue.lane("work", "work")
    store.submit("elsewhere")
    store.events.clear()
    ran: list[str] = []
    execute = Tx._execute

    def noted(tx: Tx, sql: Sql, text: str, given: Any) -> None:
        ran.append(names[id(sql)])
        execute(tx, sql, text, given)

    monkeypatch.setattr(Tx, "_execute", noted)
    line.queue(1)
    until(lambda: store.queue.writer.pending)
    store.flush()
    line.end()
    assert store.views.job(store.events[0].job)["state"] == DONE
    ran = ran[: ran.index("END_ATTEMPTS") + 3 + len(store.settles)]
    submit = ["INSERT_JOBS", "PICK_CLAIMABLE", "START_JOBS"]
    settle = ["CHANGE_TALLY", *store.settles]
    end = ["END_ATTEMPTS", "DEPENDENTS_OF"]
    assert ran == [*submit, *settle, *end, *settle]
