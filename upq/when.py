"""Answers about time and size: durations, instants, back-off. Pure but for `now()`.

Instants are whole microseconds since 1970 UTC; durations are seconds. Text that cannot be read
raises ValueError with a sentence fit for a user.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_UNITS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0.001}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[wdhms])\s*")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(|K|M|G|T)(?:I?B)?")
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

#: A hundred years: added to any date in use, it still fits the columns that keep times.
LONGEST_S = 36525 * 86400


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
        return (datetime.fromisoformat(text.strip()).astimezone(UTC) - _EPOCH) // _MICROSECOND
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text!r} is not a time such as 2026-12-01T02:00:00Z") from None


def iso(at: int) -> str:
    """2026-12-01T02:00:00.123456Z"""
    return (_EPOCH + at * _MICROSECOND).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def now() -> int:
    """This microsecond, by the wall clock."""
    return time.time_ns() // 1000


def backoff(attempt: int, delay_s: float, factor: float, cap_s: float, random: float) -> float:
    """Seconds to wait after failed attempt number `attempt` (the first is 1).

    The delay grows by `factor` with each attempt up to `cap_s` (never below `delay_s`), times
    0.4 to 1.6 as `random` goes from 0 to 1, so that jobs that failed together come back apart.
    """
    # Beyond a hundred steps every cap is long reached, and a float would overflow.
    grown = delay_s * factor ** min(attempt - 1, 100)
    return min(max(cap_s, delay_s), grown) * (0.4 + 1.2 * random)


def size(text: str) -> int:
    """Bytes of "20G", "512K", "1.5MiB"; units are powers of 1024, a plain number is bytes."""
    match = _SIZE.fullmatch(text.strip().upper())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 512K, 20M or 1G")
    return round(float(match[1]) * _SIZE_UNITS[match[2]])
