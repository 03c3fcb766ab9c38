"""What is told of types by their health, in one transaction of the writer.

The row of a type is locked, changed, and written with the notifications it calls for. Which those
are is decided in `health`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from upq.health import Health, Rules, Told, Wish, digest, ended, queue_age, silence
from upq.job import NewJob
from upq.notify import address
from upq.sql import Tx
from upq.statements import health as st


class Changes(Protocol):
    """The batch, as far as alerts need it."""

    tx: Tx
    now: int

    def queue(self, new: Sequence[NewJob]) -> None: ...


def note(batch: Changes, wishes: Sequence[Wish]) -> None:
    """Take note of ends of types that are told of by their health, in the order given."""
    by_type: dict[str, list[Wish]] = {}
    for wish in wishes:
        by_type.setdefault(wish.rules.type, []).append(wish)
    for type in sorted(by_type):
        health = _lock(batch.tx, type, batch.now)
        for wish in by_type[type]:
            _tell(batch, wish.rules, ended(health, wish, batch.now))
        _keep(batch.tx, health)


def tend(batch: Changes, rules: Sequence[Rules], lanes: dict[str, list[int]]) -> None:
    """Tell what is due by the time alone: digests and alerts. lanes: those of each type."""
    for one in sorted(rules, key=lambda rules: rules.type):
        health = _lock(batch.tx, one.type, batch.now)
        before = health.columns()
        found = [*digest(health, one, batch.now), *silence(health, one, batch.now)]
        if one.queue_age_us or health.queue_alert_at is not None:
            oldest_at = _oldest(batch.tx, lanes.get(one.type, []))
            found += queue_age(health, one, oldest_at, batch.now)
        if health.columns() != before:
            _tell(batch, one, found)
            _keep(batch.tx, health)


def _lock(tx: Tx, type: str, now: int) -> Health:
    found = tx.fetch(st.LOCK_HEALTH, type=type)
    if not found:
        tx.run(st.ADD_HEALTH, type=type, now=now)
        found = tx.fetch(st.LOCK_HEALTH, type=type)
    return Health.of_row(found[0])


def _keep(tx: Tx, health: Health) -> None:
    tx.run(st.SET_HEALTH, of=health.type, **health.columns())


def _tell(batch: Changes, rules: Rules, found: Sequence[Told]) -> None:
    new = [job for told in found for job in address(told, rules.targets)]
    if new:
        batch.queue(new)


def _oldest(tx: Tx, lanes: Sequence[int]) -> int | None:
    """Since when the job of these lanes that has waited longest could have started."""
    found: int | None = None
    for lane_id in lanes:
        above = -(1 << 31)
        while part := tx.fetch(st.OLDEST_OF_RANK, lane=lane_id, above=above):
            above = part[-1][0]
            at = min(max(created_at, run_at or 0) for _, created_at, run_at in part)
            found = at if found is None else min(found, at)
    return found
