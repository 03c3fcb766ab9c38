from __future__ import annotations

import logging

import pytest

from upq.clock import Clock


class Hands:
    """What the clock reads."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_chore_is_done_first_after_its_seconds_and_then_every_so_often() -> None:
    hands, done = Hands(), []
    clock = Clock(hands)
    clock.every(10, "beat", lambda: done.append(hands.now))
    for hands.now in (100, 105, 109, 110, 111, 119, 120, 121):
        clock.tick()
    assert done == [110, 120]


def test_a_tick_says_when_it_wants_the_next() -> None:
    hands, waits = Hands(), []
    clock = Clock(hands)
    clock.every(10, "beat", lambda: None)
    clock.every(4, "sweep", lambda: None)
    for hands.now in (100, 103, 104, 109):
        waits.append(clock.tick())
    assert waits == [4, 1, 4, 1]


def test_a_late_tick_does_a_chore_once() -> None:
    hands, done = Hands(), []
    clock = Clock(hands)
    clock.every(1, "beat", lambda: done.append(1))
    clock.tick()
    hands.now = 1000
    assert clock.tick() == 1
    assert done == [1]


def test_what_a_chore_takes_is_not_waited_for_once_more() -> None:
    hands, begun = Hands(100), []
    clock = Clock(hands)

    def slow(name: str) -> None:
        begun.append((name, hands.now))
        hands.now += 3

    for name, seconds in (("beat", 10), ("sweep", 10), ("late", 12)):
        clock.every(seconds, name, lambda name=name: slow(name))
    clock.tick()
    hands.now = 110
    assert clock.tick() == 1
    assert begun == [("beat", 110), ("sweep", 113), ("late", 116)]
    hands.now += 1
    assert clock.tick() == 2


def test_a_chore_that_fails_is_logged_and_done_again(caplog: pytest.LogCaptureFixture) -> None:
    hands, done = Hands(), []
    clock = Clock(hands)

    def fail() -> None:
        done.append("fail")
        raise ValueError("no space")

    clock.every(1, "sweep", fail)
    clock.every(1, "beat", lambda: done.append("beat"))
    for hands.now in (0, 1, 2):
        clock.tick()
    assert done == ["fail", "beat"] * 2
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, "chore sweep: no space")
    ] * 2


def test_without_chores_a_tick_wants_another_soon() -> None:
    assert Clock(Hands(5)).tick() == 1
