"""The one claimer: fills the pools of all types, and commits the ends that were posted."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol

from upq import when
from upq.changes import Want
from upq.draws import Draw, Plan, Spent
from upq.errors import RequestError
from upq.gates import Closed
from upq.job import Job, Lane
from upq.plugins import UpqJob
from upq.pool import Pool, SharedPool
from upq.queue import Queue
from upq.runner import Runner

log = logging.getLogger(__name__)

#: Seconds after which a job claimed ahead that has not started is given back.
STALE_S = 0.25
#: Seconds between two tries while the database is away; also how often another daemon's submits
#: are looked for on a database that several share.
RETRY_S, POLL_S = 0.5, 2.0
#: The longest sleep: a job may be due in a hundred years, and the clock may be set meanwhile.
SLEEP_S = 5.0
#: Seconds that ends which were posted wait for a commit that takes them along, as long as there are
#: commits; for how long at the most until there is a step; after how many wakes it is tried again,
#: when there was none.
LINGER_S, LINGER_MOST_S, LINGER_AGAIN = 0.001, 0.01, 16
#: Seconds for which a commit in doubt may still go through, and between two looks at what it did.
DOUBT_S, DOUBT_LOOK_S = 60.0, 1.0


class Rules(Protocol):
    """How the configuration orders and limits the claims."""

    def pool_of(self, lane: Lane) -> str:
        """The pool whose places are filled by draws; "" where a lane's type has its own."""

    def plan(self, pool: str, lanes: Collection[Lane]) -> Plan:
        """In which order a pool draws from these of its lanes."""

    def gate(self, lane: Lane) -> Closed | None:
        """The gate that keeps a lane's jobs from starting now."""


class NoRules:
    """Each type has its own places, and nothing limits the starts."""

    def pool_of(self, lane: Lane) -> str:
        return ""

    def plan(self, pool: str, lanes: Collection[Lane]) -> Plan:
        return Plan([])

    def gate(self, lane: Lane) -> Closed | None:
        return None


class Claimer:
    """One for the daemon; `run` is its thread.

    `hold` says why a lane's jobs cannot start now; "" when they can.
    """

    def __init__(self, queue: Queue, runner: Runner, hold: Callable[[Lane], str]) -> None:
        self._queue = queue
        self._runner = runner
        self._hold = hold
        self._rules: Rules = NoRules()
        # By type: the limit that was met when it was last drawn from.
        self._spent: dict[str, Spent] = {}
        # By pool that goes by weights: what each of its levels has to its credit.
        self._credit: dict[str, dict[str, int]] = {}
        self._wake = threading.Event()
        # Set when the wake is for more than the commit of what was posted.
        self._wanted = False
        # True while what was posted may wait, and how often it does not get the chance.
        self._lingers = False
        self._hurries = 0
        #: Lanes that may have something to claim; all others are left alone.
        self._hot: set[int] = set()
        # Set when jobs were queued for which no room could be booked, or room was given back.
        self._missed = False
        # By time.monotonic, until when the loop sleeps if nobody wakes it; 0 while it is awake.
        self._rests_until_s = 0.0
        self._recoveries = 0
        # When each lane was last given places.
        self._turns: dict[int, int] = {}
        self._ticks = itertools.count(1)
        self._looked_s = self._strays_s = 0.0
        self._stop = False
        self._thread = 0
        #: No claims while drained; ends are still committed.
        self.drained = False
        #: By type, and as `pool <name>`; replaced as a whole, never changed.
        self.pools: dict[str, Pool] = {}
        #: When the loop last came round, by time.monotonic.
        self.ticked_s = time.monotonic()
        queue.writer.on_post = self._nudge
        queue.claims = self

    # Told from outside

    def configure(self, pools: dict[str, Pool], rules: Rules) -> None:
        """Take over a configuration. Pools that were there are among the new ones."""
        self.pools = pools
        self._rules = rules
        self._spent, self._credit = {}, {}

    def wake(self) -> None:
        self._wanted = True
        self._wake.set()

    def room(self) -> None:
        """A place is free."""
        if self._hot:
            self.wake()
        else:
            self._nudge()

    def _nudge(self) -> None:
        if not self._lingers:
            self._wake.set()

    def pool(self, type: str, token: int) -> Pool | None:
        """The pool that runs a job, else that of its type."""
        own = self.pools.get(type)
        if own is not None and own.job(token) is not None:
            return own
        return next((pool for pool in self.pools.values() if pool.job(token) is not None), own)

    def pool_of(self, lane: Lane) -> Pool | None:
        """Whose places the jobs of a lane get."""
        return self.pools.get(self._rules.pool_of(lane) or lane.type)

    def cancel(self, lane: Lane, token: int) -> None:
        """Ask a claimed job to end."""
        pool = self.pool(lane.type, token)
        if pool is None or pool.job(token) is None:
            pool = self.pool_of(lane)
        if pool is not None:
            pool.cancel(token)

    def reason(self, lane: Lane) -> str:
        """Why the jobs of a lane are passed over now; "" when it is for places only."""
        held = self._hold(lane)
        if not held and (spent := self._spent.get(lane.type)):
            return spent.reason if not spent.until or spent.until > when.now() else ""
        return held

    def heat(self, lanes: Collection[int] | None = None) -> None:
        """These lanes, or all, may have something to claim."""
        self._hot |= set(self._queue.lanes if lanes is None else lanes)
        self.wake()

    def book(self, lanes: set[int]) -> list[Want]:
        """Set aside what room there is for jobs of these lanes. `settle` ends it."""
        if self.drained or self._stop:
            return []
        booked: list[Want] = []
        draws: set[str] = set()
        # Queues of one type take turns at its places.
        for lane_id in sorted(lanes, key=lambda id: (self._turns.get(id, 0), id)):
            lane = self._queue.lanes.get(lane_id)
            if lane is None or self._hold(lane):
                continue
            if shared := self._rules.pool_of(lane):
                if not self._waits(lane.type):
                    draws.add(shared)
                continue
            pool = self.pools.get(lane.type)
            if pool and (room := pool.book()):
                booked.append((lane_id, room))
                self._turns[lane_id] = next(self._ticks)
        for name in sorted(draws):
            pool = self.pools.get(name)
            if pool and (room := pool.book()):
                booked.append(Draw(name, room))
        return booked

    def plan(self, draw: Draw, queued: set[int]) -> Plan:
        """What to draw from: what is known of when the claim is made, not when it was booked."""
        lanes = [
            lane
            for id in self._hot | queued
            if (lane := self._queue.lanes.get(id))
            and self._rules.pool_of(lane) == draw.pool
            and not self.drained
            and not self._hold(lane)
            and not self._waits(lane.type)
        ]
        draw.lanes = frozenset(lane.id for lane in lanes)
        # What is queued from now on heats its lane again.
        self._hot -= draw.lanes
        plan = self._rules.plan(draw.pool, lanes)
        if plan.by_weight:
            plan.credit = self._credit.setdefault(draw.pool, {})
        pool = self.pools[draw.pool]
        if isinstance(pool, SharedPool):
            plan.most = pool.left()
        return plan

    def looked(self, again: set[int], spent: dict[str, Spent | None]) -> None:
        """Hear after the commit which lanes may have more, and what limits the draws have met."""
        self._hot |= again
        for type, found in spent.items():
            if found is not None:
                self._spent[type] = found
            else:
                self._spent.pop(type, None)
        timed = any(found and found.until for found in spent.values())
        if timed and threading.get_ident() != self._thread:
            # It has to be asked again at that time.
            self.wake()

    def _waits(self, type: str) -> bool:
        """Whether its rate lets nothing start for a time."""
        spent = self._spent.get(type)
        return spent is not None and spent.until > when.now()

    def settle(self, queued: set[int], booked: list[Want], jobs: list[Job]) -> None:
        """Hand out what was claimed for booked room."""
        got: dict[int, list[Job]] = {}
        for job in jobs:
            got.setdefault(job.lane, []).append(job)
        seen: set[int] = set()
        crowded = False
        for want in booked:
            if isinstance(want, Draw):
                seen |= want.lanes
                pool, room = self.pools[want.pool], want.room
                mine = [job for job in jobs if job.lane in want.lanes]
            else:
                lane, room = want
                seen.add(lane)
                pool = self.pools[self._queue.lanes[lane].type]
                mine = got.get(lane, [])
            for job in pool.give(room, mine):
                self._runner.give_back(job, "interrupted")
            crowded = crowded or pool.has_claimed()
            if pool.was_asked():
                self.wake()
        missed = queued - seen
        news = missed - self._hot
        self._hot |= missed
        # Another thread has had room that the loop's own claim may have been refused meanwhile.
        back = bool(booked) and not jobs and threading.get_ident() != self._thread
        self._missed = self._missed or back or bool(missed)
        # From here on the loop either sees that when it goes to rest, or it rests and is woken.
        if until_s := self._rests_until_s:
            late = crowded and until_s > time.monotonic() + STALE_S
            if late or self._could_start(self._hot if back else missed):
                # Somebody has to see that what was claimed ahead starts, or that room is free.
                self.wake()
        if any(map(self._opens_at, news)):
            # Somebody has to see when the gate opens.
            self.wake()

    def _could_start(self, lanes: Collection[int]) -> bool:
        """Whether one of these lanes would be given a place now."""
        found = [lane for id in list(lanes) if (lane := self._queue.lanes.get(id))]
        return any(
            (pool := self.pool_of(lane))
            and pool.has_room()
            and not self._hold(lane)
            and not self._waits(lane.type)
            for lane in found
        )

    def _opens_at(self, lane_id: int) -> int | None:
        """When a lane that is passed over for a gate or a rate is worth another look."""
        lane = self._queue.lanes.get(lane_id)
        if lane is None:
            return None
        if closed := self._rules.gate(lane):
            return closed.until
        spent = self._spent.get(lane.type)
        return spent.until if spent is not None and spent.until else None

    def drain(self) -> None:
        """Claim nothing more until `drained` is unset; what was claimed ahead is given back."""
        self.drained = True
        for pool in self.pools.values():
            for job in pool.take_back():
                self._runner.give_back(job, "drained")
        self.wake()

    def stop(self) -> None:
        """End the loop. What is posted later is committed by `flush`."""
        self._stop = True
        self.wake()

    # The loop

    def run(self) -> None:
        """Until stopped: one step, then sleep until there is something to do."""
        self._thread = threading.get_ident()
        while not self._stop:
            self.ticked_s = time.monotonic()
            try:
                wait_s = self.step()
            except RequestError as error:
                log.debug("no claims: %s", error)
                wait_s = RETRY_S
            if wait_s:
                self._rest(wait_s)
            self._rests_until_s = 0.0
            self._wanted = False
            self._wake.clear()

    def _rest(self, wait_s: float) -> None:
        """Sleep until woken. Ends alone wait a little: who submits next commits them with it."""
        began_s = time.monotonic()
        self._rests_until_s = began_s + wait_s
        if not self._wake.wait(wait_s) or self._wanted:
            return
        if self._hurries:
            self._hurries -= 1
            return
        writer = self._queue.writer
        until_s = min(time.monotonic() + LINGER_MOST_S, began_s + wait_s)
        self._lingers = True
        try:
            while time.monotonic() < until_s:
                commits = writer.commits
                self._wake.clear()
                if self._wanted or self._wake.wait(LINGER_S):
                    return
                if writer.commits == commits:
                    self._hurries = LINGER_AGAIN
                    return
        finally:
            self._lingers = False

    def step(self) -> float:
        """Wake what is due, commit what was posted, claim.

        Returns the seconds until the next step, unless somebody wakes us before.
        """
        queue = self._queue
        self._give_back_stale()
        unheard = False  # whether jobs may have been queued of which nobody has told us
        if queue.shared and self.ticked_s - self._looked_s >= POLL_S:
            # Other daemons queue and cancel jobs, pause queues, and may have died before they woke
            # a job.
            self._looked_s = self.ticked_s
            queue.refresh()
            for lane_id, token in queue.asked_to_end():
                if (lane := queue.lanes.get(lane_id)) is not None:
                    self.cancel(lane, token)
            unheard = True
        if self._may_have_strays():
            # A commit that only seemed to fail has told nobody, either.
            queue.release_strays()
            unheard = True
        if unheard or (queue.next_due is not None and queue.next_due <= when.now()):
            self._hot |= set(queue.stage())
        if queue.next_due is not None and queue.next_due <= when.now():
            # Not staged, so it is overdue.
            self._hot |= queue.expire(self._runner.expired)
            self._hot |= set(queue.stage())
        if unheard:
            self._hot |= queue.laden()
        self._missed = False
        now, openings = when.now(), self._openings()
        booked = self.book(set(self._hot))
        # The lanes of a draw are hot until it is made.
        lanes = {want[0] for want in booked if not isinstance(want, Draw)}
        self._hot -= lanes
        try:
            claimed = queue.claim(booked)
        except RequestError:
            self.settle(set(), booked, [])
            self._hot |= lanes
            raise
        self.settle(set(), booked, claimed)
        # Before the look: who adds something after it finds that we rest, and wakes us.
        self._rests_until_s = float("inf")
        if self._missed and self._could_start(self._hot):
            # Jobs came, or room, that this claim may not have seen.
            return 0.0
        if self._leaves_room(booked, claimed):
            return 0.0
        # One that has opened since may have been passed over; what was open before waits for a
        # place, which wakes us.
        return self._patience([at for at in openings + self._openings() if at > now])

    def _leaves_room(self, booked: list[Want], claimed: list[Job]) -> bool:
        """Whether a lane was passed over since room was booked for one that did not need it."""
        if not self._hot:
            return False
        got = Counter(job.lane for job in claimed)
        rooms = [want for want in booked if not isinstance(want, Draw)]
        types = {self._queue.lanes[lane].type for lane, room in rooms if got[lane] < room}
        hot = [self._queue.lanes.get(id) for id in set(self._hot)] if types else []
        return any(
            lane and lane.type in types and not self._rules.pool_of(lane) and not self._hold(lane)
            for lane in hot
        )

    def flush(self, deadline_s: float) -> bool:
        """Commit all that was posted; False when the database did not let it by the deadline.

        Also waits for the batch that is being committed, whose claims are given back then.
        """
        while True:
            try:
                self._queue.claim([])
                if not self._queue.writer.pending:
                    return True
            except RequestError:
                if time.monotonic() > deadline_s:
                    return False
                time.sleep(0.1)

    def _give_back_stale(self) -> None:
        for pool in self.pools.values():
            for job in pool.take_back(STALE_S):
                self._runner.give_back(job, "claimed ahead")

    def _may_have_strays(self) -> bool:
        """After an outage, and while a commit whose outcome is not known may still go through."""
        recoveries, doubted_s = self._queue.writer.recoveries, self._queue.writer.doubted_s
        came_back, self._recoveries = recoveries != self._recoveries, recoveries
        if not came_back and self.ticked_s - doubted_s > DOUBT_S:
            return False
        if not came_back and self.ticked_s - self._strays_s < DOUBT_LOOK_S:
            return False
        self._strays_s = self.ticked_s
        return True

    def _openings(self) -> list[int]:
        return [at for lane in set(self._hot) if (at := self._opens_at(lane))]

    def _patience(self, openings: list[int]) -> float:
        waits = [SLEEP_S]
        if any(pool.has_claimed() for pool in self.pools.values()):
            waits.append(STALE_S)
        if self._queue.next_due is not None:
            waits.append(max(self._queue.next_due - when.now(), 0) / 1e6 + 0.001)
        if self._queue.shared:
            waits.append(POLL_S)
        if openings:
            waits.append(max(min(openings) - when.now(), 0) / 1e6 + 0.001)
        if self.ticked_s - self._queue.writer.doubted_s <= DOUBT_S:
            waits.append(DOUBT_LOOK_S)
        return min(waits)

    # The end

    def close_pools(self) -> None:
        """Start nothing more, and give back what was claimed and has not started."""
        for pool in self.pools.values():
            pool.close()
            for job in pool.take_back():
                self._runner.give_back(job, "interrupted")

    @property
    def busy(self) -> int:
        """Places in use; parents that wait hold none."""
        return sum(pool.sizes()["running"] for pool in self.pools.values())

    def running(self) -> list[tuple[Job, UpqJob | None]]:
        """What runs now, waiting parents too."""
        return [pair for pool in self.pools.values() for pair in pool.running()]
