from __future__ import annotations

import random

import pytest

from upq.rates import Rate

SECOND = 1_000_000


@pytest.mark.parametrize(
    ("text", "starts", "per_s", "burst"),
    [
        ("100/s", 100, 1, 20),
        ("10/min", 10, 60, 1),
        ("10 / min", 10, 60, 1),
        ("5/h", 5, 3600, 1),
        ("1/d burst 3", 1, 86400, 3),
        ("7/s", 7, 1, 2),
    ],
)
def test_a_rate_and_its_burst(text: str, starts: int, per_s: int, burst: int) -> None:
    rate = Rate.parse(text)
    assert (rate.starts, rate.per_us, rate.burst) == (starts, per_s * SECOND, burst)


def starts(rate: Rate, looks: list[int]) -> list[int]:
    """When jobs start that are always there, looked for at these times."""
    at, found = 0, []
    for now in looks:
        n = rate.allowed(at, now)
        if n:
            at = rate.after(at, now, n)
            found += [now] * n
    return found


@pytest.mark.parametrize("text", ["100/s", "7/s", "10/min burst 4", "1/s burst 1", "1000/s"])
def test_no_stretch_of_time_has_more_than_the_rate_and_the_burst(text: str) -> None:
    rate = Rate.parse(text)
    seeded = random.Random(text)
    looks, now = [], 10**15
    for _ in range(5000):
        now += round(seeded.expovariate(1) * rate.per_us / rate.starts)
        looks.append(now)
    found = starts(rate, looks)
    for i in range(0, len(found), 7):
        for j in range(i, min(i + 400, len(found)), 13):
            allowed = (found[j] - found[i]) * rate.starts / rate.per_us + rate.burst
            assert j - i + 1 <= allowed + 1e-6


def test_under_pressure_the_rate_is_reached() -> None:
    rate = Rate.parse("100/s")
    first = 10**15
    # Never looked at more often than it asks for.
    at, now, n = 0, first, 0
    while now < first + 20 * SECOND:
        k = rate.allowed(at, now)
        at, n = rate.after(at, now, k) if k else at, n + k
        now = max(rate.free_at(at), now + 1)
    assert 2000 <= n <= 2000 + rate.burst


def test_free_at_is_when_one_may_start() -> None:
    for text in ("3/s", "10/min", "100/s", "7/h burst 9"):
        rate = Rate.parse(text)
        now = 10**15
        at = rate.after(0, now, rate.allowed(0, now))
        assert rate.allowed(at, now) == 0
        free_at = rate.free_at(at)
        assert rate.allowed(at, free_at) == max(rate.burst // 4, 1)
