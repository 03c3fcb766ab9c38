"""Gates: a job type starts nothing while one is closed. Asked on this node, of its clock and disks.

Text that cannot be read raises ValueError with a sentence fit for a user.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from datetime import date, datetime, time, timedelta, tzinfo
from time import monotonic
from typing import NamedTuple, Protocol

from upq import when

#: How often load and disks are looked at while they keep a gate closed.
LOOK_US = 5_000_000
#: Seconds that what was found of a disk is held true, while it does not answer.
KNOWN_S = 15.0
#: Seconds that somebody who reads a configuration waits for its disks.
FIRST_S = 2.0

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SPAN = re.compile(r"([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2})")


class Closed(NamedTuple):
    """Why a gate is closed, and when it is worth to ask again."""

    reason: str
    until: int


class Gate(Protocol):
    def closed(self, now: int) -> Closed | None:
        """None while it is open."""


class Span(NamedTuple):
    """A time of the day on some days of the week; it ends on the next day when it has to."""

    days: frozenset[int]
    start_min: int
    end_min: int
    #: None is the time of this machine.
    zone: tzinfo | None

    def around(self, now: int) -> Iterator[tuple[int, int]]:
        """The stretches of time that began yesterday or later, for a week, in order.

        A time that daylight saving leaves out is that much later, one that comes twice the first.
        """
        today = datetime.fromtimestamp(now // 1_000_000, self.zone).date()
        for n in range(-1, 9):
            day = today + timedelta(days=n)
            if day.weekday() in self.days:
                over = 0 if self.end_min > self.start_min else 1440
                yield self._at(day, self.start_min), self._at(day, self.end_min + over)

    def _at(self, day: date, minutes: int) -> int:
        clock = time(minutes % 1440 // 60, minutes % 60)
        local = datetime.combine(day + timedelta(days=minutes // 1440), clock, self.zone)
        return when.micros(local)


class Window:
    """`22:00-06:00`, `mon-fri 22:00-06:00, sat sun 00:00-24:00 Europe/Berlin`."""

    def __init__(self, text: str, spans: Sequence[Span]) -> None:
        self.text = text
        self._spans = spans
        # Whether it is open, and until when that is known.
        self._known = (False, 0, 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Window) and other._spans == self._spans

    def __hash__(self) -> int:
        return hash(self.text)

    @classmethod
    def parse(cls, text: str) -> Window:
        """A span without a zone has that of the next one that names any."""
        spans: list[Span] = []
        zone: tzinfo | None = None
        for part in reversed(text.split(",")):
            words = part.split()
            if words and ("/" in words[-1] or words[-1] == "UTC"):
                zone = zone_of(words.pop())
            spans.insert(0, _span(part.strip(), words, zone))
        return cls(text, tuple(spans))

    def closed(self, now: int) -> Closed | None:
        is_open, since, until = self._known
        if not since <= now < until:
            is_open, since, until = self._known = self._look(now)
        if is_open:
            return None
        return Closed(f"window {self.text} is closed until {when.iso(until)}", until)

    def _look(self, now: int) -> tuple[bool, int, int]:
        stretches = [one for span in self._spans for one in span.around(now)]
        ends = [end for start, end in stretches if start <= now < end]
        if ends:
            return True, now, max(ends)
        return False, now, min(start for start, _ in stretches if start > now)


def _span(text: str, words: list[str], zone: tzinfo | None) -> Span:
    match = _SPAN.fullmatch(words[-1]) if words else None
    if not match:
        raise ValueError(f"{text!r} is not a window such as 22:00-06:00 or mon-fri 8:00-18:30")
    hours = [int(number) for number in match.groups()]
    start_min, end_min = hours[0] * 60 + hours[1], hours[2] * 60 + hours[3]
    if hours[1] > 59 or hours[3] > 59 or start_min >= 1440 or end_min > 1440:
        raise ValueError(f"{words[-1]!r} is not between 00:00 and 24:00")
    if start_min == end_min:
        raise ValueError(f"{words[-1]!r} is never open; all day is 00:00-24:00")
    days = frozenset(day for word in words[:-1] for day in _days(word)) or frozenset(range(7))
    return Span(days, start_min, end_min, zone)


def _days(word: str) -> list[int]:
    first, dash, last = word.lower().partition("-")
    if first not in _DAYS or (dash and last not in _DAYS):
        raise ValueError(f"{word!r} is not a day such as mon, or days such as mon-fri")
    start = _DAYS.index(first)
    length = (_DAYS.index(last) - start) % 7 if dash else 0
    return [(start + n) % 7 for n in range(length + 1)]


def zone_of(name: str) -> tzinfo:
    """Raises ValueError."""
    from zoneinfo import ZoneInfo  # noqa: PLC0415, takes longer than all else of the configuration

    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"no time zone {name!r} on this machine") from None


class Load(NamedTuple):
    """`load_below = 4`: the load average of the last minute."""

    below: float

    def closed(self, now: int) -> Closed | None:
        load = os.getloadavg()[0]
        if load < self.below:
            return None
        return Closed(f"the load is {load:.2f}, load_below = {self.below:g}", now + LOOK_US)


class Free(NamedTuple):
    """`min_free = /srv 20G`: what has to be free in the file system of a folder."""

    path: str
    needs_bytes: int

    @classmethod
    def parse(cls, text: str) -> Free:
        path, _, size = text.strip().rpartition(" ")
        path = path.strip()
        if not path.startswith("/"):
            raise ValueError(f"{text.strip()!r} is not a folder and a size such as /srv 20G")
        needs_bytes = when.size(size)
        if not needs_bytes:
            raise ValueError(f"{text.strip()!r} is always so")
        return cls(path, needs_bytes)

    def fault(self, all_bytes: int) -> str:
        """Why a file system of this size can never meet it; else ""."""
        if all_bytes >= self.needs_bytes:
            return ""
        needs, has = _short(self.needs_bytes), _short(all_bytes)
        return f"{self.path} can never have {needs} free: it has {has} in all"

    def closed(self, now: int) -> Closed | None:
        disk = _disks.get(self.path)
        found = disk.found() if disk else None
        if found is None:
            return Closed(f"disk {self.path} does not answer", now + LOOK_US)
        if isinstance(found, OSError):
            return Closed(f"disk {self.path}: {found.strerror}", now + LOOK_US)
        free_bytes = found.f_bavail * found.f_frsize
        if free_bytes >= self.needs_bytes:
            return None
        return Closed(
            f"disk {self.path}: {_short(free_bytes)} free, needs {_short(self.needs_bytes)}",
            now + LOOK_US,
        )


class Disk:
    """The file system of a folder. A thread of its own looks at it: some mounts never answer."""

    def __init__(self, path: str) -> None:
        self.path = path
        #: Set when it has answered for the first time.
        self.answered = threading.Event()
        # What was found last, and when by time.monotonic; replaced as a whole.
        self._last: tuple[os.statvfs_result | OSError | None, float] = None, 0.0
        self._left = threading.Event()
        threading.Thread(target=self._run, name=f"disk {path}", daemon=True).start()

    def found(self) -> os.statvfs_result | OSError | None:
        """How it was at the last look; None when that is too long ago."""
        found, at_s = self._last
        return found if monotonic() - at_s < KNOWN_S else None

    def leave(self) -> None:
        """Look no more."""
        self._left.set()

    def _run(self) -> None:
        while True:
            found: os.statvfs_result | OSError
            try:
                found = os.statvfs(self.path)
            except OSError as error:
                found = error
            self._last = found, monotonic()
            self.answered.set()
            if self._left.wait(LOOK_US / 1e6):
                return


# By folder; replaced as a whole. One that hangs stays from one configuration to the next.
_disks: dict[str, Disk] = {}


def watch_disks(paths: Collection[str]) -> None:
    """Have the disks of these folders looked at from now on, and no others.

    Waits a moment for their first answers; without one a gate is closed.
    """
    global _disks
    old, _disks = _disks, {path: _disks.get(path) or Disk(path) for path in paths}
    for path, disk in old.items():
        if path not in _disks:
            disk.leave()
    _await_answers(_disks.values())


def disk_sizes(paths: Collection[str]) -> dict[str, int]:
    """How many bytes the file systems of these folders have in all, of those that answer soon."""
    disks = [_disks.get(path) or Disk(path) for path in paths]
    _await_answers(disks)
    sizes = {}
    for disk in disks:
        if _disks.get(disk.path) is not disk:
            disk.leave()
        if isinstance(found := disk.found(), os.statvfs_result):
            sizes[disk.path] = found.f_blocks * found.f_frsize
    return sizes


def _await_answers(disks: Collection[Disk]) -> None:
    over_s = monotonic() + FIRST_S
    for disk in disks:
        disk.answered.wait(max(over_s - monotonic(), 0))


def _short(size_bytes: float) -> str:
    for unit in ("", "K", "M", "G"):
        if size_bytes < 1024:
            return f"{size_bytes:.3g}{unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g}T"
