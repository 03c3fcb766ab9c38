"""Notifications worth keeping on: groups of failures, digests, recoveries, alerts; in memory."""

from __future__ import annotations

import itertools
from typing import Any

from upq import schema
from upq.health import LATEST_IDS, Health, Rules, Wish, digest, ended, queue_age, silence
from upq.job import FAILED

S, M, H = 1_000_000, 60_000_000, 3_600_000_000
START = 1_800_000_000 * S


def facts(id: int, message: str = "no") -> dict[str, Any]:
    return {"jobname": "hash", "jobid": id, "msgstr": message, "state": FAILED}


def news(found: Any) -> list[tuple[str, str]]:
    return [(told["event"], told["news"]) for told in found]


class Type:
    """A type's row, and what was told of it."""

    def __init__(self, **rules: Any) -> None:
        self.rules = Rules("hash", ("syslog",), **rules)
        self.health = Health("hash", known_at=START)
        self.told: list[dict[str, Any]] = []
        self._ids = itertools.count(1)

    def end(self, good: bool, at: int) -> list[tuple[str, str]]:
        """Its messages, once it went through the database."""
        found = ended(self.health, Wish(self.rules, good, facts(next(self._ids))), at)
        values = self.health.columns()
        self.health = Health.of_row([values.get(c.name, "hash") for c in schema.health.c])
        self.told += found
        return news(found)


def test_nothing_is_told_before_so_many_failures_and_then_each() -> None:
    kind = Type(after=3)
    assert [kind.end(False, START + n) for n in range(2)] == [[], []]
    assert kind.end(False, START + 2) == [("failed", "failed 3 times in a row")]
    assert kind.end(False, START + 3) == [("failed", "failed 4 times in a row")]
    assert kind.end(True, START + 4) == [
        ("recovered", "works again after 4 failures since 2027-01-15T08:00:00.000000Z")
    ]
    assert len({told["thread"] for told in kind.told}) == 1


def test_a_success_in_between_starts_the_count_anew_and_is_not_told() -> None:
    kind = Type(after=2)
    for good in (False, True, False, True, False, True):
        assert kind.end(good, START) == []


def test_each_group_has_a_thread_of_its_own() -> None:
    kind = Type(every_us=H)
    for n, good in enumerate((False, True, False, True)):
        kind.end(good, START + n)
    threads = [told["thread"] for told in kind.told]
    assert threads[0] == threads[1] != threads[2] == threads[3]


def test_a_digest_says_how_many_when_and_which() -> None:
    kind = Type(every_us=H)
    kind.end(False, START)
    for n in range(1, 31):
        assert kind.end(False, START + n * M) == []
    assert news(digest(kind.health, kind.rules, START + H - 1)) == []
    (told,) = digest(kind.health, kind.rules, START + H)
    assert told["news"].startswith("30 failures since 2027-01-15T08:00:00.000000Z, 31 in a row")
    assert (told["first_at"], told["last_at"]) == (START + M, START + 30 * M)
    assert told["ids"] == list(range(31 - LATEST_IDS + 1, 32))
    assert (told["jobid"], told["msgstr"], told["untold"]) == (31, "no", 30)
    assert news(digest(kind.health, kind.rules, START + 3 * H)) == []


def test_silence_is_told_once_and_when_it_is_over() -> None:
    rules = Rules("hash", ("syslog",), no_success_us=26 * H)
    health = Health("hash", known_at=START)
    assert news(silence(health, rules, START + 26 * H)) == []
    never = "no job done for 1d2h: none since 2027-01-15T08:00:00.000000Z"
    assert news(silence(health, rules, START + 26 * H + 1)) == [("alert", never)]
    assert news(silence(health, rules, START + 50 * H)) == []
    over = news(ended(health, Wish(rules, True, facts(1)), START + 28 * H + 1))
    assert over == [("alert_over", "a job is done again, after 2h")]
    later = news(silence(health, rules, START + 60 * H))
    assert later == [
        ("alert", "no job done for 1d2h: the last was done at 2027-01-16T12:00:00.000001Z")
    ]


def test_an_old_queue_is_told_once_and_when_it_is_over() -> None:
    rules = Rules("hash", ("syslog",), queue_age_us=10 * M)
    health = Health("hash", known_at=START)
    ages = [None, START, START, START, START + 8 * M, None]
    times = [0, 10 * M, 11 * M, 20 * M, 21 * M, 22 * M]
    cases = zip(ages, times, strict=True)
    found = [news(queue_age(health, rules, age, START + t)) for age, t in cases]
    alert = ("alert", "the oldest job waits for 11m, over 10m")
    over = ("alert_over", "no job waits for more than 10m any more")
    assert found == [[], [], [alert], [], [], [over]]
