"""What is told of a type that is not told of by each failure: groups of failures, digests, alerts.

Pure: a row of table `health` is changed in memory, and what is to be told is returned. Who calls
holds the row's lock, and writes both in one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from upq.job import DONE, FAILED
from upq.when import format_duration, iso

#: Ids of the latest failures that a digest names, and characters of the latest message.
LATEST_IDS, LATEST_CHARS = 10, 4000

Told = dict[str, Any]

#: What a notification says of a job, where there is none, or only its latest is known.
NO_JOB: Mapping[str, Any] = {
    "jobname": "", "jobid": 0, "jobdata": {}, "jobcfg": {}, "msgstr": "", "result": None,
    "retries": 0, "state": FAILED, "queue": "", "submitter": "", "created_at": None,
    "started_at": None, "ended_at": None, "output": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rules:
    """What a type wants to be told, and who is."""

    type: str
    targets: tuple[str, ...]
    after: int = 1
    every_us: int = 0
    queue_age_us: int = 0
    no_success_us: int = 0

    @property
    def in_groups(self) -> bool:
        """Whether failures are told as a group; else each is, by its own end."""
        return self.after > 1 or self.every_us > 0

    def wants(self, good: bool) -> bool:
        """Whether an end of that kind matters."""
        return self.in_groups or (good and self.no_success_us > 0)


class Wish(NamedTuple):
    """One end that matters, with what a notification says of its job."""

    rules: Rules
    good: bool
    told: Told


@dataclass(slots=True)
class Health:
    """A row of the table; the fields are its columns."""

    type: str
    failures: int = 0
    failing_since: int | None = None
    untold: int = 0
    #: When the group of failures was last told of; None: not yet.
    told_at: int | None = None
    done_at: int | None = None
    thread: str = ""
    known_at: int = 0
    queue_alert_at: int | None = None
    silence_alert_at: int | None = None
    latest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_row(cls, row: Any) -> Health:
        made = cls(*row)
        made.latest = json.loads(row[-1]) if row[-1] else {}
        return made

    def columns(self) -> dict[str, Any]:
        """All but the type, as they are stored."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "type"}
        return {**values, "latest": json.dumps(self.latest) if self.latest else None}


def ended(health: Health, wish: Wish, at: int) -> list[Told]:
    """Take note of an end."""
    return list((_done if wish.good else _failed)(health, wish, at))


def _failed(health: Health, wish: Wish, at: int) -> Iterator[Told]:
    rules, told, latest = wish.rules, wish.told, health.latest
    health.failures += 1
    health.untold += 1
    if health.failures == 1:
        health.failing_since, health.thread = at, f"{told['jobid']}.{at}"
    latest.setdefault("first_at", at)
    latest["last_at"], latest["message"] = at, told["msgstr"][:LATEST_CHARS]
    latest["ids"] = [*latest.get("ids", []), told["jobid"]][-LATEST_IDS:]
    if health.failures < rules.after:
        return
    if health.told_at is None or not rules.every_us:
        news = "failed" if health.failures == 1 else f"failed {health.failures} times in a row"
        yield {**told, **_group(health, "failed", news)}
        _was_told(health, at)
    else:
        yield from digest(health, rules, at)


def digest(health: Health, rules: Rules, at: int) -> Iterator[Told]:
    """What happened since the last message of a group, when it is time for the next."""
    told_at = health.told_at
    if not health.untold or told_at is None or not rules.every_us or at - told_at < rules.every_us:
        return
    latest = health.latest
    news = (
        f"{_count(health.untold)} since {iso(told_at)}, {health.failures} in a row"
        f" since {iso(health.failing_since or at)}"
    )
    yield {
        **NO_JOB,
        "jobname": health.type,
        "jobid": latest["ids"][-1],
        "msgstr": latest["message"],
        "ended_at": at,
        **_group(health, "digest", news),
    }
    _was_told(health, at)


def _done(health: Health, wish: Wish, at: int) -> Iterator[Told]:
    health.done_at = at
    yield from silence(health, wish.rules, at)
    if health.told_at is not None:
        since = iso(health.failing_since or at)
        news = f"works again after {_count(health.failures)} since {since}"
        yield {**wish.told, **_group(health, "recovered", news)}
    health.failures = health.untold = 0
    health.failing_since = health.told_at = None
    health.thread, health.latest = "", {}


def silence(health: Health, rules: Rules, at: int) -> Iterator[Told]:
    """The alert that no job of the type was done for too long, and its end."""
    since = health.known_at if health.done_at is None else health.done_at
    limit = format_duration(rules.no_success_us / 1e6)
    raised_at = health.silence_alert_at
    is_so = 0 < rules.no_success_us < at - since
    if is_so and raised_at is None:
        word = "the last was done at" if health.done_at is not None else "none since"
        health.silence_alert_at = at
        yield _alert(health, "alert", f"no job done for {limit}: {word} {iso(since)}", at, at)
    elif raised_at is not None and not is_so:
        health.silence_alert_at = None
        news = f"a job is done again, after {format_duration((at - raised_at) // 1_000_000)}"
        yield _alert(health, "alert_over", news, at, raised_at)


def queue_age(health: Health, rules: Rules, oldest_at: int | None, at: int) -> Iterator[Told]:
    """The alert that the oldest waiting job is too old, and its end."""
    raised_at = health.queue_alert_at
    age_us = 0 if oldest_at is None else at - oldest_at
    is_so = 0 < rules.queue_age_us < age_us
    limit = format_duration(rules.queue_age_us / 1e6)
    if is_so and raised_at is None:
        health.queue_alert_at = at
        age = format_duration(age_us // 1_000_000)
        yield _alert(health, "alert", f"the oldest job waits for {age}, over {limit}", at, at)
    elif raised_at is not None and not is_so:
        health.queue_alert_at = None
        news = f"no job waits for more than {limit} any more"
        yield _alert(health, "alert_over", news, at, raised_at)


def _was_told(health: Health, at: int) -> None:
    health.told_at, health.untold, health.latest = at, 0, {}


def _group(health: Health, event: str, news: str) -> Told:
    """What all that is told of a group of failures has."""
    latest = health.latest
    return {
        "event": event,
        "news": news,
        "thread": health.thread,
        "failures": health.failures,
        "failing_since": health.failing_since,
        "untold": health.untold,
        "first_at": latest.get("first_at"),
        "last_at": latest.get("last_at"),
        "ids": latest.get("ids", []),
    }


def _alert(health: Health, event: str, news: str, at: int, raised_at: int) -> Told:
    return {
        **NO_JOB,
        "jobname": health.type,
        "state": FAILED if event == "alert" else DONE,
        "ended_at": at,
        "event": event,
        "news": news,
        "thread": f"{health.type[:32]}.{raised_at}",
    }


def _count(n: int) -> str:
    return "1 failure" if n == 1 else f"{n} failures"
