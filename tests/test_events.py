from __future__ import annotations

import pytest

from upq.events import Bus, Event

ENDED = Event(1, 2, 3, "done", "", "well", 1, "node", "")


def test_every_subscriber_hears_every_event_in_order() -> None:
    bus, first, second = Bus(), [], []
    bus.subscribe(first.extend)
    bus.subscribe(second.extend)
    bus.publish([ENDED, ENDED._replace(job=2)])
    bus.publish([ENDED._replace(job=3)])
    assert [event.job for event in first] == [event.job for event in second] == [1, 2, 3]


def test_a_subscriber_that_fails_is_logged_and_hurts_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(events: object) -> None:
        raise ValueError("a subscriber's own fault")

    bus, heard = Bus(), []
    bus.subscribe(fail)
    bus.subscribe(heard.extend)
    bus.publish([ENDED])
    assert heard == [ENDED]
    assert "a subscriber's own fault" in caplog.text


def test_one_who_subscribes_meanwhile_hears_what_comes_next() -> None:
    bus, heard = Bus(), []
    bus.subscribe(lambda events: bus.subscribe(heard.extend) if not heard else None)
    bus.publish([ENDED])
    bus.publish([ENDED._replace(job=2)])
    assert [event.job for event in heard] == [2]
