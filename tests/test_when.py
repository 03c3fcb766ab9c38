"""Durations, instants, sizes and back-off."""

from __future__ import annotations

import random
import time
from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upq import when


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("10m", 600),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("2d", 172800),
        ("1w", 604800),
        ("250ms", 0.25),
        ("1.5h", 5400),
        ("90", 90),
        (" 0 ", 0),
    ],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert when.duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "x", "10 minutes", "-5s", "1h-", "1e3", "nan", "m", "٣s"]
)
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration such as 30s"):
        when.duration(text)


def test_a_duration_that_no_clock_can_hold_is_refused() -> None:
    assert when.duration("36525d") == when.LONGEST_S
    with pytest.raises(ValueError, match="hundred years"):
        when.duration("36525d1s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.25, "0.25s"), (90, "1m30s"), (5400, "1h30m"), (1209600, "14d")],
)
def test_a_duration_is_written_short(seconds: float, text: str) -> None:
    assert when.format_duration(seconds) == text


@given(st.integers(0, 10**12))
def test_a_written_duration_is_read_back_to_the_millisecond(ms: int) -> None:
    assert round(when.duration(when.format_duration(ms / 1000)) * 1000) == ms


@pytest.mark.parametrize(
    "text",
    [
        "2026-12-01T02:00:00.123456Z",
        "2026-12-01T03:00:00.123456+01:00",
        "2026-11-30 21:00:00.123456-05:00",
        "20261201T020000.123456Z",
    ],
)
def test_an_instant_is_one_microsecond_whatever_its_offset(text: str) -> None:
    assert when.iso(when.instant(text)) == "2026-12-01T02:00:00.123456Z"


def test_an_instant_without_offset_is_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert when.iso(when.instant("2026-12-01T11:00")) == "2026-12-01T02:00:00.000000Z"
        assert when.iso(when.instant("2026-12-01")) == "2026-11-30T15:00:00.000000Z"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["", "tomorrow", "2026-13-01", "10m", "0001-01-01T00:00:00+14:00"])
def test_what_is_no_instant_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time such as 2026-12-01T02:00:00Z"):
        when.instant(text)


@given(st.integers(0, 253402300799_999999))
def test_a_written_instant_is_read_back(at: int) -> None:
    assert when.instant(when.iso(at)) == at


def test_now_is_this_microsecond() -> None:
    before = datetime.now(UTC).timestamp()
    assert before <= when.now() / 1e6 <= datetime.now(UTC).timestamp()


def test_backoff_grows_by_the_factor_up_to_the_cap() -> None:
    waits = [when.backoff(attempt, 10, 2, 60, random=0.5) for attempt in (1, 2, 3, 4, 5)]
    assert waits == [10, 20, 40, 60, 60]


def test_backoff_is_spread_about_the_delay() -> None:
    assert when.backoff(1, 10, 2, 60, random=0.0) == 2.5
    assert when.backoff(9, 10, 2, 60, random=1.0) == 105


def test_a_thousand_that_fail_at_once_come_back_at_most_a_tenth_in_a_second() -> None:
    """T18 with the delay that comes when none is set."""
    for seed in range(20):
        rng = random.Random(seed)
        waits = [when.backoff(1, 10, 2, 3600, rng.random()) for _ in range(1000)]
        assert max(Counter(map(int, waits)).values()) <= 100


def test_a_delay_longer_than_the_cap_stays_as_asked() -> None:
    assert when.backoff(1, 7200, 1, 3600, random=0.5) == 7200


def test_backoff_of_the_millionth_attempt_is_the_cap() -> None:
    assert when.backoff(10**6, 1, 10, 3600, random=0.5) == 3600


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("512K", 512 << 10),
        ("20g", 20 << 30),
        ("1.5 MiB", 3 << 19),
        ("1TB", 1 << 40),
        ("7B", 7),
    ],
)
def test_a_size_is_read_in_binary_units(text: str, size_bytes: int) -> None:
    assert when.size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "K", "-1", "1X", "1KK", "1,5M"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 512K"):
        when.size(text)
