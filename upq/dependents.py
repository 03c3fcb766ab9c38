"""Jobs that wait for others: what a batch does for them when those end, or run once more.

By `@after`, as a join, or as what follows a batch. What the last two get is in `joins` and in
`members`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from upq.job import BAD, BLOCKED, DONE, FINAL, QUEUED
from upq.joins import Joins, after_reason, branches_of, waits_reason
from upq.limits import Limiter, kept_text, turn_reason
from upq.members import Members, kept_batch
from upq.sql import Tx
from upq.statements import waits as st
from upq.statements.limits import PUT_IN_LINE
from upq.statements.members import STILL_BLOCKED
from upq.workflow import DELAY, option


class Changes(Protocol):
    """The batch, as far as those who wait need it."""

    tx: Tx
    now: int
    joins: Joins
    members: Members

    @property
    def limiter(self) -> Limiter: ...
    def note_due(self, at: int | None) -> None: ...
    def moved(
        self, id: int, lane_id: int, was: str | None, state: str, *, reason: str = "",
        message: str = "", attempt: int = 0, who: str = "",
    ) -> None: ...  # fmt: skip


def tell(batch: Changes, states: Sequence[tuple[int, str]]) -> None:
    """Those who wait for these jobs go on, or hear that one has ended badly."""
    _release(batch, [id for id, state in states if state == DONE])
    hold(batch, [(id, state) for id, state in states if state in BAD])


def _release(batch: Changes, done: list[int]) -> None:
    if not done:
        return
    ids = sorted((id,) for id in done)
    waiting = batch.tx.fetch_rows(st.DEPENDENTS_OF, ids)
    if not waiting:
        return
    batch.tx.run_rows(st.DELETE_EDGES, ids)
    lower_waits(batch, Counter(row[0] for row in waiting), done)


def lower_waits(batch: Changes, fewer: Mapping[int, int], done: Iterable[int] = ()) -> None:
    """Have dependents wait for so many jobs less; those that wait for none go on."""
    counts = sorted(fewer.items())
    batch.tx.run_rows(st.LOWER_WAITS, counts)
    free = []
    turns = []
    joins = {}
    followups = []
    for id, lane_id, run_at, attempt, waits, state, options in sorted(
        batch.tx.fetch_rows(st.WAITS_OF, [(id,) for id, _ in counts])
    ):
        if (branches := branches_of(options)) is not None:
            joins[id] = branches
        if waits or state != BLOCKED:
            continue
        if kept := kept_batch(options):
            followups.append((id, kept))
        delay_us = option(options, DELAY)
        if delay_us is not None:
            run_at = batch.now + delay_us
        limits = kept_text(options)
        if "line" in limits:
            reason = turn_reason(limits)
            free.append((id, None, None, run_at))
            turns.append((id, limits["line"], reason))
            batch.moved(id, lane_id, BLOCKED, QUEUED, reason=reason, attempt=attempt)
            batch.limiter.came(id, limits["line"])
        else:
            later = run_at is not None and run_at > batch.now
            free.append((id, None if later else lane_id, run_at if later else None, run_at))
            batch.note_due(run_at if later else None)
            batch.moved(id, lane_id, BLOCKED, QUEUED, attempt=attempt)
    if joins:
        batch.joins.hand_on(joins, set(done))
    if free:
        batch.tx.run_rows(st.FREE_JOBS, free)
    if turns:
        batch.tx.run_rows(PUT_IN_LINE, turns)
    if followups:
        batch.members.release(followups)


def reopen(batch: Changes, ids: Sequence[int], followups: Mapping[int, dict[str, Any]]) -> None:
    """Jobs are queued again: who waits for their ends waits for one more. Follow-ups among them
    go on when none of their members is left.
    """
    batch.members.await_again(batch.tx.fetch_rows(st.DEPENDENTS_OF, sorted((id,) for id in ids)))
    if followups:
        waits = {id: batch.members.told(id, kept) for id, kept in sorted(followups.items())}
        batch.tx.run_rows(STILL_BLOCKED, list(waits.items()))
        lower_waits(batch, dict.fromkeys(followups, 0))
        batch.members.release(list(followups.items()))


def hold(batch: Changes, changed: list[tuple[int, str]]) -> None:
    """Say on those who wait for these jobs what they wait for, now that it has changed.

    A follow-up to which it is all the same how its members end goes on when the last has.
    """
    if not changed:
        return
    states = dict(changed)
    waiting = batch.tx.fetch_rows(st.DEPENDENTS_OF, sorted((id,) for id in states))
    if waiting:
        batches = batch.members.hold(waiting, states, partial(lower_waits, batch))
        waiting = [row for row in waiting if row[0] not in batches]
    reasons = {
        id: after_reason(needs, states[needs]) if states[needs] in FINAL else waits_reason([needs])
        for id, needs, state in waiting
        if state == BLOCKED
    }
    if reasons:
        batch.tx.run_rows(st.BLOCK_JOBS, sorted(reasons.items()))
