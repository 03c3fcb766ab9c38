"""The one claimer: fills the pools of all types, and commits the ends that were posted."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection

from upq import when
from upq.errors import RequestError
from upq.job import Job
from upq.plugins import UpqJob
from upq.pool import Pool
from upq.queue import Lane, Queue
from upq.runner import Runner

log = logging.getLogger(__name__)

#: Seconds after which a job claimed ahead that has not started is given back.
STALE_S = 0.25
#: Seconds between two tries while the database is away; also how often another daemon's submits
#: are looked for on a database that several share.
RETRY_S, POLL_S = 0.5, 2.0
#: Seconds for which a commit in doubt may still go through, and between two looks at what it did.
DOUBT_S, DOUBT_LOOK_S = 60.0, 1.0


class Claimer:
    """One for the daemon; `run` is its thread.

    `hold` says why a lane's jobs cannot start now; "" when they can.
    """

    def __init__(self, queue: Queue, runner: Runner, hold: Callable[[Lane], str]) -> None:
        self._queue = queue
        self._runner = runner
        self._hold = hold
        self._wake = threading.Event()
        #: Lanes that may have something to claim; all others are left alone.
        self._hot: set[int] = set()
        # Set when jobs were queued for which no room could be booked.
        self._missed = False
        # True while the loop sleeps until it is woken.
        self._rests = False
        self._recoveries = 0
        # When each lane was last given places.
        self._turns: dict[int, int] = {}
        self._ticks = itertools.count(1)
        self._looked_s = self._strays_s = 0.0
        self._stop = False
        #: No claims while drained; ends are still committed.
        self.drained = False
        #: By type; replaced as a whole, never changed.
        self.pools: dict[str, Pool] = {}
        #: When the loop last came round, by time.monotonic.
        self.ticked_s = time.monotonic()
        queue.writer.on_post = self._wake.set
        queue.claims = self

    # Told from outside

    def wake(self) -> None:
        self._wake.set()

    def pool(self, name: str) -> Pool | None:
        return self.pools.get(name)

    def heat(self, lanes: Collection[int] | None = None) -> None:
        """These lanes, or all, may have something to claim."""
        self._hot |= set(self._queue.lanes if lanes is None else lanes)
        self._wake.set()

    def book(self, lanes: set[int]) -> list[tuple[int, int]]:
        """Set aside what room there is for jobs of these lanes. `settle` ends it."""
        if self.drained or self._stop:
            return []
        booked = []
        # Queues of one type take turns at its places.
        for lane_id in sorted(lanes, key=lambda id: (self._turns.get(id, 0), id)):
            lane = self._queue.lanes.get(lane_id)
            pool = self.pools.get(lane.type) if lane else None
            if lane and pool and not self._hold(lane) and (room := pool.book()):
                booked.append((lane_id, room))
                self._turns[lane_id] = next(self._ticks)
        return booked

    def settle(self, queued: set[int], booked: list[tuple[int, int]], jobs: list[Job]) -> None:
        """Hand out what was claimed for booked room. A lane that may have more is worth a look."""
        got: dict[int, list[Job]] = {}
        for job in jobs:
            got.setdefault(job.lane, []).append(job)
        full = {lane for lane, room in booked if len(got.get(lane, ())) == room}
        missed = queued - {lane for lane, _ in booked}
        if missed:
            self._missed = True
        self._hot |= missed | full
        crowded = False
        for lane, room in booked:
            pool = self.pools[self._queue.lanes[lane].type]
            for job in pool.give(room, got.get(lane, ())):
                self._runner.give_back(job, "interrupted")
            crowded = crowded or pool.has_claimed()
        if self._rests and (crowded or (booked and not jobs)):
            # Somebody has to see that what was claimed ahead starts, or that room is free again.
            self._wake.set()

    def drain(self) -> None:
        """Claim nothing more until `drained` is unset; what was claimed ahead is given back."""
        self.drained = True
        for pool in self.pools.values():
            for job in pool.take_back():
                self._runner.give_back(job, "drained")
        self._wake.set()

    def stop(self) -> None:
        """End the loop. What is posted later is committed by `flush`."""
        self._stop = True
        self._wake.set()

    # The loop

    def run(self) -> None:
        """Until stopped: one step, then sleep until there is something to do."""
        while not self._stop:
            self.ticked_s = time.monotonic()
            try:
                wait_s = self.step()
            except RequestError as error:
                log.debug("no claims: %s", error)
                wait_s = RETRY_S
            if wait_s != 0:
                self._rests = wait_s is None
                self._wake.wait(wait_s)
                self._rests = False
            self._wake.clear()

    def step(self) -> float | None:
        """Wake what is due, commit what was posted, claim.

        Returns the seconds until the next step; None when somebody will wake us.
        """
        queue = self._queue
        self._give_back_stale()
        unheard = False  # whether jobs may have been queued of which nobody has told us
        if queue.shared and self.ticked_s - self._looked_s >= POLL_S:
            # Other daemons queue and cancel jobs, pause queues, and may have died before they woke
            # a job.
            self._looked_s = self.ticked_s
            queue.refresh()
            for type, token in queue.asked_to_end():
                if (pool := self.pools.get(type)) is not None:
                    pool.cancel(token)
            unheard = True
        if self._may_have_strays():
            # A commit that only seemed to fail has told nobody, either.
            queue.release_strays()
            unheard = True
        if unheard or (queue.next_due is not None and queue.next_due <= when.now()):
            self._hot |= set(queue.stage())
        if unheard:
            self._hot |= set(queue.lanes)
        self._missed = False
        booked = self.book(set(self._hot))
        self._hot -= {lane for lane, _ in booked}
        try:
            claimed = queue.claim(booked)
        except RequestError:
            self.settle(set(), booked, [])
            self._hot |= {lane for lane, _ in booked}
            raise
        self.settle(set(), booked, claimed)
        if self._missed and booked:
            # Jobs came while all room was booked for this claim, which may not have seen them.
            return 0.0
        return self._patience()

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

    def _patience(self) -> float | None:
        waits: list[float] = []
        if any(pool.has_claimed() for pool in self.pools.values()):
            waits.append(STALE_S)
        if self._queue.next_due is not None:
            waits.append(max(self._queue.next_due - when.now(), 0) / 1e6 + 0.001)
        if self._queue.shared:
            waits.append(POLL_S)
        if self.ticked_s - self._queue.writer.doubted_s <= DOUBT_S:
            waits.append(DOUBT_LOOK_S)
        return min(waits, default=None)

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
