"""One thread for all deadlines of jobs in threads: asks them to end, interrupts, gives up."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from upq.plugins import UpqJob

log = logging.getLogger(__name__)

#: Seconds that a job has to see `self.cancelled`, before it is interrupted.
ASK_S = 2.0
#: Seconds from the request to end until the job is given up.
GRACE_S = 5.0
#: Seconds between two tries to interrupt.
LOOK_S = 0.05
#: What a wait of Python's can take at once.
REST_S = 86400.0


class _Course:
    """What is due for one job, and when, by time.monotonic."""

    __slots__ = ("asked_s", "at_s", "by", "plugin")

    def __init__(self, plugin: UpqJob, at_s: float, by: str) -> None:
        self.plugin = plugin
        self.at_s = at_s
        #: What ends it: "timeout", "cancel".
        self.by = by
        self.asked_s: float | None = None


class Keeper:
    """Ends jobs that run in threads of this process. Costs nothing while no job has a deadline."""

    def __init__(self) -> None:
        #: Told, in the keeper's thread, of a job whose thread does not come back.
        self.declare: Callable[[UpqJob], None] = lambda plugin: None
        self._changed = threading.Condition()
        self._courses: dict[int, _Course] = {}
        # When the thread looks next.
        self._next_s = math.inf
        self._runs = False

    def limit(self, plugin: UpqJob) -> None:
        """End the job when its timeout is over. `forget` takes that back."""
        self._add(_Course(plugin, time.monotonic() + plugin.timeout_s, "timeout"))

    def cancel(self, plugin: UpqJob) -> None:
        """End the job, beginning now."""
        known = self._courses.get(id(plugin))
        if known is None or known.asked_s is None:
            self._add(_Course(plugin, time.monotonic(), "cancel"))

    def forget(self, plugin: UpqJob) -> None:
        """The job has come out."""
        self._courses.pop(id(plugin), None)

    def _add(self, course: _Course) -> None:
        with self._changed:
            self._courses[id(course.plugin)] = course
            if course.at_s < self._next_s:
                self._next_s = course.at_s
                self._changed.notify()
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="keeper", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while (left_s := self._next_s - time.monotonic()) > 0:
                    self._changed.wait(min(left_s, REST_S))
                courses = list(self._courses.values())
            now_s = time.monotonic()
            for course in courses:
                if course.at_s <= now_s:
                    self._go_on(course, now_s)
            with self._changed:
                # What jobs leave behind that have come out costs one look too many, nothing more.
                self._next_s = min((c.at_s for c in list(self._courses.values())), default=math.inf)

    def _go_on(self, course: _Course, now_s: float) -> None:
        try:
            at_s = self._step(course, now_s)
        except Exception:
            log.exception("ending job %d failed", course.plugin.jobid)
            at_s = None
        if at_s is not None:
            course.at_s = at_s
        elif self._courses.get(id(course.plugin)) is course:
            self.forget(course.plugin)

    def _step(self, course: _Course, now_s: float) -> float | None:
        """What is due for a job; when to go on, or None when nothing is left to do."""
        plugin, door = course.plugin, course.plugin.door
        if door is None or door.has_left:
            return None
        if course.asked_s is None:
            plugin.ended_by = plugin.ended_by or course.by
            plugin.cancel_event.set()
            course.asked_s = now_s
            return now_s + ASK_S
        over_s = course.asked_s + GRACE_S
        if now_s < over_s:
            return over_s if door.interrupt() else min(now_s + LOOK_S, over_s)
        if door.give_up():
            self.declare(plugin)
        return None
