"""The threads of one job type: they run what they are given, wait for children, come and go.

A pool never holds more than its free places, but for the few very short jobs that its threads
will have ended within LOOK_AHEAD_S: those are what makes batches.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from upq.job import Job
from upq.plugins import UpqJob
from upq.runner import Runner

log = logging.getLogger(__name__)

#: Seconds of work that may be claimed beyond the free places, and jobs at the most.
LOOK_AHEAD_S, LOOK_AHEAD_JOBS = 0.02, 256
#: Jobs that take no longer, in seconds, are left to the threads that run if these will have started
#: them within so many seconds: more threads would only take Python's lock from each other. One that
#: has been at its job for so long, unlike the latest ones, is not waited for.
SHORT_S, SOON_S = 0.0005, 0.02
#: Seconds between two looks of a parent that waits for a place whether it is to end instead.
LOOK_S = 1.0
#: Seconds an idle thread stays when it is not the only one.
IDLE_S = 10.0
#: Threads beyond the places that stay all the same: a parent that goes on leaves one over.
SPARE_THREADS = 4


class Pool:
    """Up to `concurrent` threads that run jobs of one type, started when needed.

    A job that waits for another gives its place back meanwhile; its thread stays.
    """

    def __init__(
        self, name: str, concurrent: int, runner: Runner, wake: Callable[[], None]
    ) -> None:
        self.name = name
        self.concurrent = concurrent
        self._runner = runner
        self._wake_claimer = wake
        self._lock = lock = threading.RLock()
        self._changed = threading.Condition(lock)
        # Told of one free place at a time: there may be a thousand parents that want to go on.
        self._freed = threading.Condition(lock)
        self._claimed: deque[tuple[Job, float]] = deque()
        self._running = 0
        self._resuming = 0
        # Claims whose jobs wait for others; they hold no place.
        self._parked: set[int] = set()
        self._booked = 0
        self._threads = 0
        self._idle = 0
        self._made = 0
        self._closed = False
        #: Seconds that the latest runs took, smoothed; starts long, so that nothing is ahead.
        self._usual_s = 1.0
        # The latest jobs have met the death of a daemon: beside them nothing is claimed ahead, or
        # it could be failed as crashed after three deaths and never have begun.
        self._suspects = False
        # What runs, waiting parents too, by token: the rows, and the objects once they are made.
        self._jobs: dict[int, Job] = {}
        self._began: dict[int, float] = {}
        self._active: dict[int, UpqJob] = {}
        self._asked_to_end: set[int] = set()

    # For the claimer

    def book(self) -> int:
        """Set aside the room there is; how many jobs may be claimed for it. `give` ends it."""
        with self._changed:
            room = self._room()
            self._booked += room
            return room

    def has_room(self) -> bool:
        """Whether `book` would set something aside."""
        with self._changed:
            return self._room() > 0

    def _room(self) -> int:
        if self._closed:
            return 0
        free = self.concurrent - self._running - self._resuming
        ahead = min(LOOK_AHEAD_JOBS, int(self.concurrent * LOOK_AHEAD_S / self._usual_s))
        if self._suspects:
            ahead = 0
        return max(free + ahead - len(self._claimed) - self._booked, 0)

    def give(self, booked: int, jobs: Sequence[Job]) -> Sequence[Job]:
        """Hand over what was claimed for booked room; starts threads as they are needed.

        Returns what a closed pool does not take.
        """
        now = time.monotonic()
        with self._changed:
            self._booked -= booked
            if self._closed:
                return jobs
            if jobs:
                self._suspects = any(job.crashes for job in jobs)
            self._claimed.extend((job, now) for job in jobs)
            if self._asked_to_end and not self._booked and not self._claimed:
                # What was only about to come has gone elsewhere.
                self._asked_to_end.intersection_update(self._jobs)
            wanted = min(len(self._claimed), self.concurrent - self._running)
            # And one that sees to what they have not started in time.
            wanted = min(wanted, self._needed() + 1)
            self._changed.notify(min(wanted, self._idle))
            for _ in range(wanted - self._idle):
                self._start_thread()
        return ()

    def take_back(self, stale_s: float = 0.0) -> list[Job]:
        """Claimed jobs that have not started for so long, removed from the pool."""
        limit = time.monotonic() - stale_s
        with self._changed:
            if not self._claimed or self._claimed[0][1] > limit:
                return []
            if stale_s and self._is_at_hand():
                return []
            taken = [job for job, _ in self._claimed]
            self._claimed.clear()
            # The jobs are longer than they were: claim nothing ahead until it is known better.
            self._usual_s = 1.0
            return taken

    def _is_at_hand(self) -> bool:
        """Whether a thread is about to start what is claimed, once the machine lets it."""
        threads = self._threads - len(self._parked)
        return not self._resuming and min(threads, self.concurrent) > self._running

    def has_claimed(self) -> bool:
        return bool(self._claimed)

    def was_asked(self) -> bool:
        """Whether room was asked for while it was all booked by a draw; asks once."""
        return False

    def running(self) -> list[tuple[Job, UpqJob | None]]:
        """What runs, waiting parents too."""
        with self._changed:
            return [(job, self._active.get(token)) for token, job in self._jobs.items()]

    def job(self, token: int) -> Job | None:
        """The row of a running job, as it was claimed; None when it does not run here."""
        with self._changed:
            return self._jobs.get(token)

    def cancel(self, token: int) -> None:
        """Ask a claimed job of this pool to end, also when it is only about to start."""
        with self._changed:
            plugin = self._active.get(token)
            if plugin is None and (token in self._jobs or self._claimed or self._booked):
                self._asked_to_end.add(token)
        if plugin is not None:
            plugin.cancel()

    def abandon(self, token: int) -> Job | None:
        """Forget a running job whose thread does not come back: another may take its place."""
        with self._changed:
            job = self._jobs.get(token)
            if job is None:
                return None
            self._forget(token)
            self._threads -= 1
            self._next()
        self._wake_claimer()
        return job

    def sizes(self) -> dict[str, int]:
        with self._changed:
            return {"running": self._running, "threads": self._threads, "places": self.concurrent}

    def resize(self, concurrent: int) -> None:
        with self._changed:
            self.concurrent = concurrent
            self._changed.notify_all()
            self._freed.notify_all()
        self._wake_claimer()

    def close(self) -> None:
        """Start nothing more; threads end with what they run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._freed.notify_all()

    # For waiting parents

    def park(self, token: int) -> None:
        """Give back the place of the job with this claim."""
        with self._changed:
            if token not in self._jobs:
                return
            self._running -= 1
            self._parked.add(token)
            self._next()
        self._wake_claimer()

    def unpark(self, token: int, at_once: Callable[[], bool] = lambda: False) -> None:
        """Take a place again, before jobs that are claimed later.

        at_once: asked now and then; True takes one too many, for a job that is to end.
        """
        with self._changed:
            self._resuming += 1
            while self._running >= self.concurrent and not self._closed and not at_once():
                self._freed.wait(LOOK_S)
            self._resuming -= 1
            if token in self._parked:  # it was not given up meanwhile
                self._parked.discard(token)
                self._running += 1
            elif self._resuming:
                self._freed.notify()  # the place it was told of is the next one's
            # Threads that held back while somebody resumed may go on, if there is a place left.
            self._changed.notify_all()

    # The threads

    def _start_thread(self) -> None:
        if self._threads - len(self._parked) >= self.concurrent:
            # There are enough: some are between two jobs.
            return
        self._made += 1
        name = f"T-{self.name}-{self._made}"
        try:
            threading.Thread(target=self._work, name=name, daemon=True).start()
        except RuntimeError as error:
            log.error("%s: %s (raise TasksMax)", name, error)
            return
        self._threads += 1

    def _next(self) -> None:
        """A place is free: let one that waits for it go on, or start a thread for what waits."""
        if self._resuming:
            self._freed.notify()
        elif self._claimed:
            if self._idle:
                self._changed.notify()
            else:
                self._start_thread()

    def _work(self) -> None:
        while (job := self._take()) is not None:
            started = time.monotonic()
            try:
                self._runner.run(job, self._begun)
            except Exception:
                log.exception("(%s:%d) the runner failed", job.type, job.id)
            took_s = time.monotonic() - started
            with self._changed:
                if job.token not in self._jobs:
                    return  # abandoned: another has taken this thread's place
                self._usual_s += (took_s - self._usual_s) / (8 if took_s < self._usual_s else 1)
                self._forget(job.token)
                if self._resuming:
                    self._freed.notify()

    def _forget(self, token: int) -> None:
        if token in self._parked:
            self._parked.discard(token)
        else:
            self._running -= 1
        self._jobs.pop(token, None)
        self._began.pop(token, None)
        self._active.pop(token, None)
        self._asked_to_end.discard(token)

    def _begun(self, plugin: UpqJob) -> None:
        with self._changed:
            self._active[plugin.token] = plugin
            asked = plugin.token in self._asked_to_end
        if asked:
            plugin.cancel()

    def _take(self) -> Job | None:
        """The next job to run; None when the thread has nothing more to do."""
        with self._changed:
            while True:
                has_place = self._running < self.concurrent and not self._resuming
                if self._closed:
                    break
                if self._claimed and has_place:
                    now = time.monotonic()
                    late = now - self._claimed[0][1] >= SOON_S
                    needed = self._needed()
                    if not late and self._running >= needed and self._at_it(now) >= needed:
                        self._idle += 1
                        self._changed.wait(SOON_S / 2)
                        self._idle -= 1
                        continue
                    job, _ = self._claimed.popleft()
                    self._running += 1
                    self._jobs[job.token] = job
                    self._began[job.token] = now
                    if self._claimed and self._running < self.concurrent:
                        if not self._idle:
                            self._start_thread()
                        elif late:
                            self._changed.notify()
                    return job
                self._wake_claimer()
                if self._threads - len(self._parked) > self.concurrent + SPARE_THREADS:
                    break
                self._idle += 1
                stays = self._changed.wait(IDLE_S if self._threads > 1 else None)
                self._idle -= 1
                if not stays and not self._claimed and self._threads > 1:
                    break
            self._threads -= 1
            return None

    def _at_it(self, now: float) -> int:
        """How many threads have a job that they will end soon, by the latest ones."""
        limit = now - SOON_S
        began = (began for token, began in self._began.items() if token not in self._parked)
        return sum(each > limit for each in began)

    def _needed(self) -> int:
        """How many threads will soon have started all that is claimed, by the latest jobs."""
        if self._usual_s > SHORT_S:
            return self.concurrent
        return max(math.ceil(len(self._claimed) * self._usual_s / SOON_S), 1)


class SharedPool(Pool):
    """The threads of a [pool], which run jobs of several types.

    Its room is booked for one draw at a time, so that what a draw may take is known for sure.
    """

    def __init__(
        self, name: str, concurrent: int, runner: Runner, wake: Callable[[], None]
    ) -> None:
        super().__init__(name, concurrent, runner, wake)
        #: Places that a type may have of all, where it may not have all.
        self.most: Mapping[str, int] = {}
        #: Where a job stands among those that were claimed ahead; None: where it was claimed.
        self.order: Callable[[Job], Any] | None = None
        self._asked = False
        # Claims of parents whose type has a place for them again.
        self._returning: set[int] = set()
        # Parents that could go on, if there was not a limit on their type.
        self._held_up = Counter[str]()
        # Told of one free place of a type at a time.
        self._type_freed: dict[str, threading.Condition] = {}

    def book(self) -> int:
        with self._changed:
            self._asked = self._booked > 0
            return 0 if self._asked else super().book()

    def was_asked(self) -> bool:
        with self._changed:
            asked, self._asked = self._asked, False
            return asked

    def give(self, booked: int, jobs: Sequence[Job]) -> Sequence[Job]:
        with self._changed:
            left = super().give(booked, jobs)
            order = self.order
            if order is not None and jobs and not left and len(self._claimed) > 1:
                # What is urgent goes before what was claimed ahead.
                self._claimed = deque(sorted(self._claimed, key=lambda pair: order(pair[0])))
            return left

    def left(self) -> dict[str, int]:
        """How many more jobs may be claimed of each type that may not have all places."""
        with self._changed:
            used = self._used() + self._held_up
            return {type: max(most - used[type], 0) for type, most in self.most.items()}

    def _used(self) -> Counter[str]:
        away = self._parked - self._returning
        used = Counter(job.type for token, job in self._jobs.items() if token not in away)
        used.update(job.type for job, _ in self._claimed)
        return used

    def unpark(self, token: int, at_once: Callable[[], bool] = lambda: False) -> None:
        with self._changed:
            job = self._jobs.get(token)
            if job is not None:
                self._wait_for_type(job, at_once)
            self._returning.add(token)
            if job is not None and not self._is_full(job.type):
                self._tell(job.type)
        super().unpark(token, at_once)
        with self._changed:
            self._returning.discard(token)

    def _wait_for_type(self, job: Job, at_once: Callable[[], bool]) -> None:
        freed = self._type_freed.setdefault(job.type, threading.Condition(self._lock))
        self._held_up[job.type] += 1
        while (
            self._is_full(job.type)
            and not self._closed
            and job.token in self._jobs
            and not at_once()
        ):
            freed.wait(LOOK_S)
        self._held_up[job.type] -= 1

    def _is_full(self, type: str) -> bool:
        return self._used()[type] >= self.most.get(type, self.concurrent)

    def _tell(self, type: str) -> None:
        """Let a parent of the type see whether it has a place; it tells the next one."""
        if freed := self._type_freed.get(type):
            freed.notify()

    def _forget(self, token: int) -> None:
        type = self._jobs[token].type
        super()._forget(token)
        self._tell(type)

    def park(self, token: int) -> None:
        with self._changed:
            super().park(token)
            if token in self._parked:
                self._tell(self._jobs[token].type)

    def take_back(self, stale_s: float = 0.0) -> list[Job]:
        with self._changed:
            taken = super().take_back(stale_s)
            for job in taken:
                self._tell(job.type)
            return taken

    def resize(self, concurrent: int) -> None:
        super().resize(concurrent)
        self._tell_all()

    def close(self) -> None:
        super().close()
        self._tell_all()

    def _tell_all(self) -> None:
        with self._changed:
            for freed in self._type_freed.values():
                freed.notify_all()
