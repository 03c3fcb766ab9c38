"""Queues the jobs of schedules, each slot exactly once, however many daemons watch one database."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from upq import when
from upq.config import ScheduleSettings, Settings
from upq.errors import RequestError
from upq.job import NewJob
from upq.jobtypes import JobTypes
from upq.slots import Due, Fired, Slots

log = logging.getLogger(__name__)

#: Seconds by which a slot may be late and is not missed.
GRACE_S = 60
#: Seconds by which other daemons' clocks, or this one before it was set, may be ahead.
AHEAD_S = 300
#: Seconds between two looks at the clock, which may have been set; to the next try while the
#: database is away, and while another daemon has a schedule in hand.
LOOK_S, RETRY_S, BUSY_S = 5.0, 1.0, 0.1
#: Slots of one schedule in one transaction.
SLOTS = 500
#: Runs that are told ahead.
COMING = 3


class Known(NamedTuple):
    """What is known of a schedule."""

    times: when.Times
    #: The last slot that was taken, and the one that comes after it.
    last: int
    next: int


class Scheduler:
    """One for the daemon; `run` is its thread.

    make: the job of a schedule for one of its slots. now: this microsecond, by the wall clock.
    """

    def __init__(
        self,
        slots: Slots,
        make: Callable[[ScheduleSettings, int], NewJob],
        now: Callable[[], int] = when.now,
    ) -> None:
        self._slots = slots
        self._make = make
        self._now = now
        #: Replaced as a whole, never changed.
        self.schedules: Mapping[str, ScheduleSettings] = {}
        self._known: dict[str, Known] = {}
        self._before = 0
        self._wake = threading.Event()
        self._stop = False
        self._rests = threading.Event()
        self._rests.set()

    def configure(self, schedules: Mapping[str, ScheduleSettings]) -> None:
        """Take over a configuration, at the start or on reload."""
        self.schedules = dict(schedules)
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Fire nothing more; returns when the thread has let go of the database."""
        self._stop = True
        self._wake.set()
        self._rests.wait(timeout_s)

    def run(self) -> None:
        """Until stopped: fire what is due, then sleep until the next slot."""
        self._rests.clear()
        try:
            while not self._stop:
                try:
                    wait_s = self.step()
                except RequestError as error:
                    log.debug("no schedules: %s", error)
                    wait_s = RETRY_S
                self._wake.wait(wait_s)
                self._wake.clear()
        finally:
            self._rests.set()

    def step(self) -> float | None:
        """Fire what is due. Returns the seconds until the next step; None: when woken.

        Raises Unavailable, Uncertain; the next step finds out what has become of it.
        """
        schedules = self.schedules
        self._enter(schedules)
        while True:
            now = self._now()
            due = [
                Due(name, known.last, self._jobs(schedules[name], known.last, now))
                for name, known in self._known.items()
                if known.next <= now
            ]
            if not due:
                break
            fired = self._slots.fire(due, now + AHEAD_S * 1_000_000)
            for one, what in zip(due, fired, strict=True):
                self._note(one, what)
            if all(what.last is None for what in fired):
                return BUSY_S
        if not self._known:
            return None
        soonest = min(known.next for known in self._known.values())
        return min(max(soonest - self._now(), 0) / 1e6, LOOK_S)

    def _enter(self, schedules: Mapping[str, ScheduleSettings]) -> None:
        """Make known what is new or changed; all anew when the clock was put back."""
        now = self._now()
        known = self._known if now > self._before - AHEAD_S * 1_000_000 else {}
        self._before = now
        times = {name: one.times for name, one in schedules.items() if one.times is not None}
        self._known = {name: one for name, one in known.items() if times.get(name) == one.times}
        new = {name: one for name, one in times.items() if name not in self._known}
        if not new:
            return
        digests = {name: digest(one) for name, one in new.items()}
        lasts = self._slots.enter(digests, now, now + AHEAD_S * 1_000_000)
        for name, one in new.items():
            self._known[name] = Known(one, lasts[name], one.next(lasts[name]))

    def _jobs(self, one: ScheduleSettings, last: int, now: int) -> list[tuple[int, NewJob | None]]:
        slots = plan(one, last, now)
        if (since := self._known[one.name].next) < now - GRACE_S * 1_000_000:
            fires = sum(fires for _, fires in slots)
            log.warning("schedule %s was missed since %s: missed = %s, jobs for it now: %d",
                        one.name, when.iso(since), one.missed, fires)  # fmt: skip
        return [(at, self._make(one, at) if fires else None) for at, fires in slots]

    def _note(self, one: Due, what: Fired) -> None:
        if what.last is None:
            return
        if not what.last:
            # The clock was put back to before all that is known.
            del self._known[one.schedule]
            return
        times = self._known[one.schedule].times
        self._known[one.schedule] = Known(times, what.last, times.next(what.last))
        for at, result in what.jobs:
            if isinstance(result, RequestError):
                log.warning("schedule %s, %s: %s", one.schedule, when.iso(at), result)
            else:
                log.info("schedule %s, %s: job %d", one.schedule, when.iso(at), result.id)

    def list_all(self) -> list[tuple[ScheduleSettings, list[int]]]:
        """All schedules by name, each with its next slots."""
        return [(one, self._coming(one)) for _, one in sorted(self.schedules.items())]

    def _coming(self, one: ScheduleSettings) -> list[int]:
        at = self._now()
        found: list[int] = []
        while one.times is not None and len(found) < COMING:
            at = one.times.next(at)
            found.append(at)
        return found


def plan(one: ScheduleSettings, last: int, now: int) -> list[tuple[int, bool]]:
    """The slots after the last one up to now, and whether each is to fire.

    Of those that are passed over only the latest is told. `missed` counts once a slot is more
    than GRACE_S late; what is younger than that all fires.
    """
    times = one.times
    if times is None or (first := times.next(last)) > now:
        return []
    young = now - GRACE_S * 1_000_000
    oldest = now - round(one.max_late_s * 1e6) if one.max_late_s else 0
    if first < young and one.missed != "all":
        latest = times.latest(last, now) or first
        wanted = one.missed == "once" or latest >= young
        return [(latest, wanted and latest >= oldest)]
    slots: list[tuple[int, bool]] = []
    if first < oldest:
        passed = times.latest(last, oldest - 1) or first
        slots.append((passed, False))
        first = times.next(passed)
    while first <= now and len(slots) < SLOTS:
        slots.append((first, True))
        first = times.next(first)
    return slots


def faults_of(settings: Settings, types: JobTypes) -> list[str]:
    """What the classes of jobs have to say about the schedules, each with file and line."""
    faults = []
    for one in settings.schedules.values():
        kind = types.get(one.type)
        try:
            kind.accept(one.request.params)
        except RequestError as error:
            faults.append(f"{one.place}: schedule {one.name}: {error}")
        if kind.cls is not None and not kind.cls.queued:
            faults.append(f"{one.place}: schedule {one.name}: {one.type} answers, it is no work")
    return faults


def digest(times: when.Times) -> int:
    """A number that is another one when the times are others."""
    text = f"{times.expression} {times.zone}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1
