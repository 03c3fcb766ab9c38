from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import until
from upq import gates, when
from upq.gates import LOOK_US, Free, Load, Window, disk_sizes, watch_disks

BERLIN = "Europe/Berlin"


def is_open(window: str, at: str) -> bool:
    return Window.parse(window).closed(when.instant(at)) is None


def opens(window: str, at: str) -> str:
    closed = Window.parse(window).closed(when.instant(at))
    assert closed, "it is open"
    return when.iso(closed.until)[:16]


@pytest.mark.parametrize(
    ("window", "at", "expected"),
    [
        # 22:00 in Berlin in winter is 21:00 UTC. 2026-11-22 is a Sunday.
        (f"22:00-06:00 {BERLIN}", "2026-11-22T20:59:59Z", False),
        (f"22:00-06:00 {BERLIN}", "2026-11-22T21:00:00Z", True),
        (f"22:00-06:00 {BERLIN}", "2026-11-23T04:59:59Z", True),
        (f"22:00-06:00 {BERLIN}", "2026-11-23T05:00:00Z", False),
        # The night from Friday is open until Saturday; that from Sunday begins on Monday.
        ("mon-fri 22:00-06:00 UTC", "2026-11-21T05:00:00Z", True),
        ("mon-fri 22:00-06:00 UTC", "2026-11-22T05:00:00Z", False),
        ("mon-fri 22:00-06:00 UTC", "2026-11-22T23:00:00Z", False),
        ("fri-mon 8:00-9:00 UTC", "2026-11-22T08:30:00Z", True),
        ("fri-mon 8:00-9:00 UTC", "2026-11-24T08:30:00Z", False),
        ("mon wed 8:00-9:00 UTC", "2026-11-25T08:30:00Z", True),
        ("sat sun 00:00-24:00 UTC", "2026-11-22T23:59:59Z", True),
        ("sat sun 00:00-24:00 UTC", "2026-11-23T00:00:00Z", False),
        ("8:00-9:00, 12:00-13:00 UTC", "2026-11-22T12:30:00Z", True),
        ("8:00-9:00, 12:00-13:00 UTC", "2026-11-22T10:30:00Z", False),
        # Each span with its own zone.
        (f"8:00-9:00 UTC, 8:00-9:00 {BERLIN}", "2026-11-22T07:30:00Z", True),
        # The hour that daylight saving leaves out, and the one that comes twice.
        (f"02:30-04:00 {BERLIN}", "2026-03-29T01:29:59Z", False),
        (f"02:30-04:00 {BERLIN}", "2026-03-29T01:30:00Z", True),
        (f"02:30-04:00 {BERLIN}", "2026-10-25T00:30:00Z", True),
        (f"02:30-04:00 {BERLIN}", "2026-10-25T02:59:59Z", True),
        (f"02:30-04:00 {BERLIN}", "2026-10-25T03:00:00Z", False),
    ],
)
def test_a_window_is_open(window: str, at: str, expected: bool) -> None:
    assert is_open(window, at) is expected


@pytest.mark.parametrize(
    ("window", "at", "opens_at"),
    [
        (f"22:00-06:00 {BERLIN}", "2026-11-22T12:00:00Z", "2026-11-22T21:00"),
        (f"22:00-06:00 {BERLIN}", "2026-07-22T12:00:00Z", "2026-07-22T20:00"),
        ("mon 08:00-09:00 UTC", "2026-11-23T09:00:00Z", "2026-11-30T08:00"),
        ("mon 08:00-09:00, wed 10:00-11:00 UTC", "2026-11-23T09:00:00Z", "2026-11-25T10:00"),
    ],
)
def test_a_closed_window_says_when_it_opens(window: str, at: str, opens_at: str) -> None:
    assert opens(window, at) == opens_at


def test_a_window_knows_its_hours_while_time_goes_by() -> None:
    window = Window.parse("8:00-9:00 UTC")
    start = when.instant("2026-11-22T00:00:00Z")
    minutes = [n for n in range(1440) if window.closed(start + n * 60_000_000) is None]
    assert minutes == list(range(480, 540))


def test_without_a_zone_it_is_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert is_open("9:00-10:00", "2026-11-22T00:30:00Z")
        assert not is_open("9:00-10:00", "2026-11-22T09:30:00Z")
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.99, 0, 0))
    assert Load(4).closed(0) is None
    monkeypatch.setattr(os, "getloadavg", lambda: (4.0, 0, 0))
    assert Load(4).closed(0) == ("the load is 4.00, load_below = 4", LOOK_US)


@pytest.fixture
def disks() -> Iterator[None]:
    yield
    watch_disks([])


def test_free_space(tmp_path: Path, disks: None) -> None:
    gone = f"{tmp_path}/gone"
    watch_disks([str(tmp_path), gone])
    until(lambda: Free.parse(f"{tmp_path} 1K").closed(0) is None)
    closed = Free(str(tmp_path), 1 << 60).closed(0)
    assert closed and closed.reason.startswith(f"disk {tmp_path}: ")
    assert closed.reason.endswith(" free, needs 1.049e+06T") and closed.until == LOOK_US
    why = (f"disk {gone}: No such file or directory", LOOK_US)
    until(lambda: Free.parse(f"{gone} 1K").closed(0) == why)


def test_a_disk_that_does_not_answer_keeps_its_own_gate_closed(
    tmp_path: Path, disks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    statvfs, hangs, go = os.statvfs, threading.Event(), threading.Event()

    def look(path: str) -> os.statvfs_result:
        if path == hung and hangs.is_set():
            go.wait(60)
        return statvfs(tmp_path)

    monkeypatch.setattr(os, "statvfs", look)
    monkeypatch.setattr(gates, "LOOK_US", 20_000)
    hung, well = f"{tmp_path}/hung", f"{tmp_path}/well"
    closed = Free(hung, 1).closed
    silent = (f"disk {hung} does not answer", 20_000)
    watch_disks([hung, well])
    until(lambda: closed(0) is None)
    hangs.set()
    monkeypatch.setattr(gates, "KNOWN_S", 0.5)
    until(lambda: closed(0) == silent)
    until(lambda: Free(well, 1).closed(0) is None)
    assert hung not in disk_sizes([hung])
    watch_disks([hung, well])
    assert closed(0) == silent
    assert sum(thread.name == f"disk {hung}" for thread in threading.enumerate()) == 1
    go.set()
    until(lambda: closed(0) is None)
    watch_disks([well])
    assert closed(0) == silent
    until(lambda: not any(thread.name == f"disk {hung}" for thread in threading.enumerate()))


def test_a_folder_may_have_spaces_in_its_name() -> None:
    assert Free.parse("/a b  2M") == Free("/a b", 2 << 20)
