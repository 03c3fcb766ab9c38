"""Answers about time and size: durations, instants, back-off. Pure but for `now()`.

Instants are whole microseconds since 1970 UTC; durations are seconds. Text that cannot be read
raises ValueError with a sentence fit for a user.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Self

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_UNITS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0.001}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[wdhms])\s*")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(|K|M|G|T)(?:I?B)?")
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

#: A hundred years: added to any date in use, it still fits the columns that keep times.
LONGEST_S = 36525 * 86400
#: The year 9000: what a job may not wait for; a few such durations later there are still dates.
TOO_LATE_AT = 221845392000 * 1_000_000


def duration(text: str) -> float:
    """Seconds of "30s", "10m", "1h30m", "2d", "1w", "250ms"; a plain number is seconds."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        seconds = float(text)
    elif text and not _PART.sub("", text):
        seconds = float(sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text)))
    else:
        raise ValueError(f"{text!r} is not a duration such as 30s, 10m, 1h30m or 2d")
    if seconds > LONGEST_S:
        raise ValueError(f"{text!r} is longer than a hundred years")
    return seconds


def format_duration(seconds: float) -> str:
    """The text `duration` reads back, to the millisecond: "1h30m", "2d", "0.25s", "0s"."""
    rest, text = round(seconds * 1000), ""
    for unit, unit_ms in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000)):
        count, rest = divmod(rest, unit_ms)
        text += f"{count}{unit}" if count else ""
    return text + f"{rest / 1000:.10g}s" if rest or not text else text


def instant(text: str) -> int:
    """The microsecond an ISO 8601 time names; without zone or offset it is local time."""
    try:
        return micros(datetime.fromisoformat(text.strip()))
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text!r} is not a time such as 2026-12-01T02:00:00Z") from None


def micros(at: datetime) -> int:
    """The microsecond of a datetime; without a zone it is local time."""
    return (at.astimezone(UTC) - _EPOCH) // _MICROSECOND


def iso(at: int) -> str:
    """2026-12-01T02:00:00.123456Z"""
    return (_EPOCH + at * _MICROSECOND).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def now() -> int:
    """This microsecond, by the wall clock."""
    return time.time_ns() // 1000


def backoff(attempt: int, delay_s: float, factor: float, cap_s: float, random: float) -> float:
    """Seconds to wait after failed attempt number `attempt` (the first is 1).

    The delay grows by `factor` with each attempt up to `cap_s` (never below `delay_s`), times
    0.25 to 1.75 as `random` goes from 0 to 1, so that jobs that failed together come back apart.
    """
    # Beyond a hundred steps every cap is long reached, and a float would overflow.
    grown = delay_s * factor ** min(attempt - 1, 100)
    return min(max(cap_s, delay_s), grown) * (0.25 + 1.5 * random)


def size(text: str) -> int:
    """Bytes of "20G", "512K", "1.5MiB"; units are powers of 1024, a plain number is bytes."""
    match = _SIZE.fullmatch(text.strip().upper())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 512K, 20M or 1G")
    return round(float(match[1]) * _SIZE_UNITS[match[2]])


# Times of schedules

_SECOND = timedelta(seconds=1)
_NAIVE_EPOCH = datetime(1970, 1, 1)
_DAY_S = 86400
#: What an expression may be called instead.
_ALIASES = {
    "@hourly": "0 * * * *",
    **dict.fromkeys(("@daily", "@midnight"), "0 0 * * *"),
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    **dict.fromkeys(("@yearly", "@annually"), "0 0 1 1 *"),
}
#: A word that ends an expression and is not its day of the week.
_ZONE = re.compile(r"(?!(?:sun|mon|tue|wed|thu|fri|sat|l)\b)[a-z][a-z0-9_+/-]*", re.IGNORECASE)
#: How far back the latest slot is looked for, each time further.
_BACK_S = (1, 10, 60, 600, 3600, 6 * 3600, _DAY_S, 7 * _DAY_S, 32 * _DAY_S, 367 * _DAY_S)


@dataclass(frozen=True, slots=True)
class Times:
    """The slots of a schedule, endless: `0 3 * * *`, `@daily`, `every 10m`; pure.

    cronsim says which times of the wall clock an expression names. What becomes of them when the
    clock is changed is Debian cron's rule, for expressions with seconds too: with a minute or hour
    that begins with `*` the wall clock counts as it goes, what it skips is skipped and what it
    shows twice comes twice; all others come once a day: what falls into a gap comes at its end,
    and of an hour that comes twice the first counts. (cronsim itself loses slots where the clock
    moves by half an hour.)
    """

    #: Without the zone.
    expression: str
    #: The name of the time zone; "" for an interval, which has none.
    zone: str
    #: The interval in microseconds, counted from 1970 UTC; 0 for a cron expression.
    step: int = 0

    @classmethod
    def read(cls, text: str, zone: str = "") -> Self:
        """An expression with its zone at the end, or apart; else it is the machine's own.

        Raises ValueError, also for times that never come.
        """
        words = text.split()
        if words[:1] in (["every"], ["@every"]):
            return cls._interval("".join(words[1:]), zone)
        if len(words) > 1 and (words[0][0] == "@" or len(words) > 5) and _ZONE.fullmatch(words[-1]):
            if zone:
                raise ValueError(f"{text!r} names a time zone, and so does timezone = {zone}")
            zone = words.pop()
        expression = " ".join(words)
        if expression.startswith("@") and expression not in _ALIASES:
            raise ValueError(f"{expression!r} is none of {', '.join(_ALIASES)}")
        zone = zone or own_zone()
        _zone(zone)
        made = cls(expression, zone)
        made._wall(_NAIVE_EPOCH)
        return made

    @classmethod
    def _interval(cls, text: str, zone: str) -> Self:
        seconds = duration(text)
        if seconds < 1:
            raise ValueError(f"every {text}: at least 1s")
        if zone:
            raise ValueError(f"every {text}: an interval has no time zone")
        return cls(f"every {format_duration(seconds)}", "", round(seconds * 1e6))

    def next(self, after: int) -> int:
        """The first slot after this microsecond. Raises ValueError when there is none."""
        if self.step:
            return (after // self.step + 1) * self.step
        minute, hour = self._cron.split()[-5:-3]
        moves = minute.startswith("*") or hour.startswith("*")
        after_s = after // 1_000_000
        return 1_000_000 * (self._next_running(after_s) if moves else self._next_fixed(after_s))

    def latest(self, after: int, now: int) -> int | None:
        """The last slot of those after `after` up to now."""
        for back_s in _BACK_S:
            start = max(now - back_s * 1_000_000, after)
            found, at = None, self.next(start)
            while at <= now:
                found, at = at, self.next(at)
            if found is not None or start == after:
                return found
        at = self.next(after)
        while at <= now:
            found, at = at, self.next(at)
        return found

    def explain(self) -> str:
        """In English: `At 03:00 every day`."""
        from cronsim import CronSim  # noqa: PLC0415, only schedules need it

        if self.step:
            return f"Every {format_duration(self.step / 1e6)}"
        return CronSim(self._cron, _NAIVE_EPOCH).explain()

    @property
    def _cron(self) -> str:
        return _ALIASES.get(self.expression, self.expression)

    def _wall(self, after: datetime) -> datetime:
        """The first time of the wall clock, after this one, that the expression names."""
        from cronsim import CronSim, CronSimError  # noqa: PLC0415

        try:
            return next(CronSim(self._cron, after))
        except CronSimError as error:
            raise ValueError(f"{self.expression!r} is no cron expression: {error}") from None
        except (StopIteration, OverflowError):
            raise ValueError(f"{self.expression!r} never comes") from None

    def _next_fixed(self, after_s: int) -> int:
        zone = _zone(self.zone)
        wall = datetime.fromtimestamp(after_s, zone).replace(tzinfo=None, fold=0)
        while True:
            wall = there_is = self._wall(wall)
            while _from_wall(zone, there_is) is None:
                there_is = there_is.replace(second=0) + timedelta(minutes=1)
            at_s = _from_wall(zone, there_is)
            if at_s is not None and at_s > after_s:
                return at_s

    def _next_running(self, after_s: int) -> int:
        """Goes from one change of the clock to the next: between them it has no gaps."""
        zone = _zone(self.zone)
        start_s = after_s + 1
        while True:
            offset = _offset(zone, start_s)
            wall = self._wall(_NAIVE_EPOCH + (start_s - 1) * _SECOND + offset)
            at_s = (wall - _NAIVE_EPOCH - offset) // _SECOND
            changed_s = _next_change(zone, start_s, at_s)
            if changed_s is None:
                return at_s
            start_s = changed_s


def _from_wall(zone: tzinfo, wall: datetime) -> int | None:
    """The second at which the clock shows this time first; None when it never does."""
    at_s = (wall.replace(tzinfo=zone).astimezone(UTC) - _EPOCH) // _SECOND
    shown = datetime.fromtimestamp(at_s, zone).replace(tzinfo=None, fold=0)
    return at_s if shown == wall else None


def _offset(zone: tzinfo, at_s: int) -> timedelta:
    return datetime.fromtimestamp(at_s, zone).utcoffset() or timedelta()


def _next_change(zone: tzinfo, start_s: int, end_s: int) -> int | None:
    """The first second after the start, up to the end, with another offset from UTC."""
    offset = _offset(zone, start_s)
    while start_s < end_s:
        day_s = min(start_s + _DAY_S, end_s)
        if _offset(zone, day_s) != offset:
            while day_s - start_s > 1:
                middle_s = (start_s + day_s) // 2
                if _offset(zone, middle_s) == offset:
                    start_s = middle_s
                else:
                    day_s = middle_s
            return day_s
        start_s = day_s
    return None


def _zone(name: str) -> tzinfo:
    import zoneinfo  # noqa: PLC0415, few need it

    try:
        return UTC if name == "UTC" else zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        import difflib  # noqa: PLC0415

        close = difflib.get_close_matches(name, zoneinfo.available_timezones(), 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"no time zone {name!r}{hint}") from None


def own_zone() -> str:
    """The name of the machine's own time zone; UTC where it has none."""
    given = os.environ.get("TZ", "").lstrip(":")
    link = os.path.realpath("/etc/localtime")
    for name in (given, link.partition("/zoneinfo/")[2]):
        try:
            _zone(name)
        except ValueError:
            continue
        return name
    return "UTC"
