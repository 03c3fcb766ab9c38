"""When a schedule fires: what the expressions mean, and what becomes of them at clock changes."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from upq.when import Times, instant, iso, own_zone

BERLIN, NEW_YORK, LORD_HOWE = "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"

#: Zone, expression, the day, and all the slots of that day with their offsets from UTC. Clocks:
#: Berlin 02:00 -> 03:00 on 29 March 2026, 03:00 -> 02:00 on 25 October; New York 02:00 -> 03:00 on
#: 8 March, 02:00 -> 01:00 on 1 November; Lord Howe 02:00 -> 02:30 on 4 October, 02:00 -> 01:30 on
#: 5 April.
CASES = [
    # Spring: what falls into the gap comes at its end, once.
    (BERLIN, "30 2 * * *", "2026-03-29", "03:00+02"),
    (BERLIN, "0 2 * * *", "2026-03-29", "03:00+02"),
    (BERLIN, "0,30 2 * * *", "2026-03-29", "03:00+02"),
    (BERLIN, "59 1 * * *", "2026-03-29", "01:59+01"),
    (BERLIN, "0 3 * * *", "2026-03-29", "03:00+02"),
    (BERLIN, "30 1-4 * * *", "2026-03-29", "01:30+01 03:00+02 03:30+02 04:30+02"),
    (BERLIN, "0 2,3 * * *", "2026-03-29", "03:00+02"),
    (BERLIN, "0 30 2 * * *", "2026-03-29", "03:00+02"),
    (BERLIN, "0 */8 * * *", "2026-03-29", "00:00+01 08:00+02 16:00+02"),
    (BERLIN, "0 */2 * * *", "2026-03-29",
     "00:00+01 04:00+02 06:00+02 08:00+02 10:00+02 12:00+02 14:00+02 16:00+02 18:00+02 20:00+02"
     " 22:00+02"),
    (BERLIN, "*/30 2 * * *", "2026-03-29", ""),
    (BERLIN, "*/30 1,3 * * *", "2026-03-29", "01:00+01 01:30+01 03:00+02 03:30+02"),
    (BERLIN, "@daily", "2026-03-29", "00:00+01"),
    # Autumn: of an hour that comes twice the first counts.
    (BERLIN, "30 2 * * *", "2026-10-25", "02:30+02"),
    (BERLIN, "0 2 * * *", "2026-10-25", "02:00+02"),
    (BERLIN, "0 3 * * *", "2026-10-25", "03:00+01"),
    (BERLIN, "30 1-3 * * *", "2026-10-25", "01:30+02 02:30+02 03:30+01"),
    (BERLIN, "15 30 2 * * *", "2026-10-25", "02:30:15+02"),
    (BERLIN, "*/30 1-3 * * *", "2026-10-25",
     "01:00+02 01:30+02 02:00+02 02:30+02 02:00+01 02:30+01 03:00+01 03:30+01"),
    (BERLIN, "0 */8 * * *", "2026-10-25", "00:00+02 08:00+01 16:00+01"),
    (BERLIN, "@daily", "2026-10-25", "00:00+02"),
    (NEW_YORK, "30 2 * * *", "2026-03-08", "03:00-04"),
    (NEW_YORK, "5 2 8 3 *", "2026-03-08", "03:00-04"),
    (NEW_YORK, "30 2 * * SUN", "2026-03-08", "03:00-04"),
    (NEW_YORK, "45 1 * * *", "2026-03-08", "01:45-05"),
    (NEW_YORK, "*/20 1-3 * * *", "2026-03-08",
     "01:00-05 01:20-05 01:40-05 03:00-04 03:20-04 03:40-04"),
    (NEW_YORK, "30 1 * * *", "2026-11-01", "01:30-04"),
    (NEW_YORK, "0 1,2 * * *", "2026-11-01", "01:00-04 02:00-05"),
    (NEW_YORK, "30 * 1 11 *", "2026-11-01",
     "00:30-04 01:30-04 01:30-05 02:30-05 03:30-05 04:30-05 05:30-05 06:30-05 07:30-05 08:30-05"
     " 09:30-05 10:30-05 11:30-05 12:30-05 13:30-05 14:30-05 15:30-05 16:30-05 17:30-05 18:30-05"
     " 19:30-05 20:30-05 21:30-05 22:30-05 23:30-05"),
    (NEW_YORK, "0 */6 * * *", "2026-11-01", "00:00-04 06:00-05 12:00-05 18:00-05"),
    (LORD_HOWE, "15 2 * * *", "2026-10-04", "02:30+11"),
    (LORD_HOWE, "0 2 * * *", "2026-10-04", "02:30+11"),
    (LORD_HOWE, "30 2 * * *", "2026-10-04", "02:30+11"),
    (LORD_HOWE, "45 2 * * *", "2026-10-04", "02:45+11"),
    (LORD_HOWE, "0 */6 * * *", "2026-10-04", "00:00+10:30 06:00+11 12:00+11 18:00+11"),
    (LORD_HOWE, "*/15 1-2 * * *", "2026-10-04",
     "01:00+10:30 01:15+10:30 01:30+10:30 01:45+10:30 02:30+11 02:45+11"),
    (LORD_HOWE, "45 1 * * *", "2026-04-05", "01:45+11"),
    (LORD_HOWE, "0,30 1-2 * * *", "2026-04-05", "01:00+11 01:30+11 02:00+10:30 02:30+10:30"),
    (LORD_HOWE, "*/15 1 * * *", "2026-04-05",
     "01:00+11 01:15+11 01:30+11 01:45+11 01:30+10:30 01:45+10:30"),
    (LORD_HOWE, "0 */6 * * *", "2026-04-05", "00:00+11 06:00+10:30 12:00+10:30 18:00+10:30"),
]  # fmt: skip


def micros(at: datetime) -> int:
    return round(at.timestamp()) * 1_000_000


def slots(times: Times, start: int, end: int) -> list[int]:
    """Those from the start on, before the end."""
    found, at = [], times.next(start - 1)
    while at < end:
        found.append(at)
        at = times.next(at)
    return found


def test_there_are_forty_cases_in_both_directions() -> None:
    assert len(CASES) == len(set(CASES)) == 40
    assert len({(zone, day) for zone, _, day, _ in CASES}) == 6


@pytest.mark.parametrize(("zone", "expression", "day", "expected"), CASES)
def test_clock_changes(zone: str, expression: str, day: str, expected: str) -> None:
    times = Times.read(expression, zone)
    start = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
    end = micros(start + timedelta(days=1))
    found = slots(times, micros(start), end)
    wanted = [instant(f"{day}T{text}") for text in expected.split()]
    assert [iso(at) for at in found] == [iso(at) for at in wanted]


@pytest.mark.parametrize(("zone", "expression", "day"), [case[:3] for case in CASES])
def test_wherever_one_begins_the_same_slots_come(zone: str, expression: str, day: str) -> None:
    """A daemon that starts at any minute of the day sees what one sees that was there all along."""
    times = Times.read(expression, zone)
    start = micros(datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone)))
    end = start + 30 * 3600 * 1_000_000
    all_day = slots(times, start, end)
    for minute in range(0, 25 * 60, 7):
        after = start + minute * 60_000_000 + 500_000
        assert min(times.next(after), end) == min([at for at in all_day if at > after], default=end)
        before = [at for at in all_day if at <= after]
        assert times.latest(start - 1, after) == (before[-1] if before else None)


@pytest.mark.parametrize(
    ("text", "after", "expected"),
    [
        ("* * * * *", "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z"),
        ("* * * * * *", "2026-01-01T00:00:00.5Z", "2026-01-01T00:00:01Z"),
        ("*/20 * * * * *", "2026-01-01T00:00:40Z", "2026-01-01T00:01:00Z"),
        ("0 0 1 * 1", "2026-01-01T00:00:00Z", "2026-01-05T00:00:00Z"),  # or, as cron
        ("0 0 L * *", "2026-02-01T00:00:00Z", "2026-02-28T00:00:00Z"),
        ("0 9 * * MON#2", "2026-01-01T00:00:00Z", "2026-01-12T09:00:00Z"),
        ("0 0 29 2 *", "2026-01-01T00:00:00Z", "2028-02-29T00:00:00Z"),
        ("@hourly", "2026-01-01T00:30:00Z", "2026-01-01T01:00:00Z"),
        ("@weekly", "2026-01-01T00:30:00Z", "2026-01-04T00:00:00Z"),
        ("@monthly", "2026-01-01T00:30:00Z", "2026-02-01T00:00:00Z"),
        ("@yearly", "2026-01-01T00:30:00Z", "2027-01-01T00:00:00Z"),
        ("every 10m", "2026-01-01T00:30:00Z", "2026-01-01T00:40:00Z"),
        ("@every 1h30m", "1970-01-01T00:00:00Z", "1970-01-01T01:30:00Z"),
    ],
)
def test_expressions(text: str, after: str, expected: str) -> None:
    zone = "" if "every" in text else "UTC"
    assert iso(Times.read(text, zone).next(instant(after))) == iso(instant(expected))


def test_the_zone_stands_at_the_end_or_apart() -> None:
    for text, zone in (
        ("0 3 * * * Europe/Berlin", BERLIN),
        ("0 0 3 * * * Europe/Berlin", BERLIN),
        ("0 3 * * MON-FRI UTC", "UTC"),
        ("@daily America/New_York", NEW_YORK),
        ("0 0 3 * * SUN", own_zone()),
        ("0 0 3 * * 5L", own_zone()),
    ):
        assert Times.read(text).zone == zone
    assert Times.read("0 3 * * *", BERLIN) == Times.read("0  3 * * *  Europe/Berlin")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Wrong number of fields"),
        ("0 3 * *", "Wrong number of fields"),
        ("0 0 31 2 *", "Bad day-of-month"),
        ("0 0 30 2 * UTC", "Bad day-of-month"),
        ("0 0 31 2,4,6 *", "Bad day-of-month"),
        ("0 0 31 2 MON#6", "Bad day-of-week"),
        ("60 * * * *", "Bad minute"),
        ("@reboot", "none of @hourly"),
        ("0 3 * * * Europe/Berlni", "did you mean Europe/Berlin"),
        ("0 3 * * * Europe", "no time zone"),
        ("@daily UTC UTC", "@daily UTC"),
        ("every", "not a duration"),
        ("every 999ms", "at least 1s"),
        ("every 1h Europe/Berlin", "not a duration"),
    ],
)
def test_what_cannot_be(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Times.read(text)


def test_a_zone_given_twice_and_one_for_an_interval_are_refused() -> None:
    for text in ("@daily UTC", "every 10m"):
        with pytest.raises(ValueError, match="time zone"):
            Times.read(text, BERLIN)


def test_english() -> None:
    assert Times.read("0 3 * * *").explain() == "At 03:00 every day"
    assert Times.read("@daily").explain() == "At 00:00 every day"
    assert Times.read("every 90m").explain() == "Every 1h30m"


def test_the_machines_own_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", BERLIN)
    assert Times.read("0 3 * * *").zone == BERLIN
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    assert own_zone()
