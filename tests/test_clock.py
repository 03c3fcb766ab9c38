from __future__ import annotations

import logging

import pytest

from upq.clock import Clock


def test_a_chore_is_done_first_after_its_seconds_and_then_every_so_often() -> None:
    clock, done = Clock(), []
    clock.every(10, "beat", lambda: done.append(now))
    for now in (100, 105, 109, 110, 111, 119, 120, 121):
        clock.tick(now)
    assert done == [110, 120]


def test_a_tick_says_when_it_wants_the_next() -> None:
    clock = Clock()
    clock.every(10, "beat", lambda: None)
    clock.every(4, "sweep", lambda: None)
    assert clock.tick(100) == 4
    assert clock.tick(103) == 1
    assert clock.tick(104) == 4
    assert clock.tick(109) == 1


def test_a_late_tick_does_a_chore_once() -> None:
    clock, done = Clock(), []
    clock.every(1, "beat", lambda: done.append(1))
    clock.tick(0)
    assert clock.tick(1000) == 1
    assert done == [1]


def test_a_chore_that_fails_is_logged_and_done_again(caplog: pytest.LogCaptureFixture) -> None:
    clock, done = Clock(), []

    def fail() -> None:
        done.append("fail")
        raise ValueError("no space")

    clock.every(1, "sweep", fail)
    clock.every(1, "beat", lambda: done.append("beat"))
    for now in (0, 1, 2):
        clock.tick(now)
    assert done == ["fail", "beat"] * 2
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, "chore sweep: no space")
    ] * 2


def test_without_chores_a_tick_wants_another_soon() -> None:
    assert Clock().tick(5) == 1
