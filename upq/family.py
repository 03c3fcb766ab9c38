"""Jobs with all that is below them: what a batch does to cancel a tree, or to queue jobs again.

Below a job are its children, what follows its end, and so on: `parent` says so. Nothing begins
below a job that was cancelled or is asked to end. Who inserts below a job locks its row first and
looks; who cancels marks that row first and then looks for children. So of two daemons the later one
sees what the earlier one has done, and nothing slips through between them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from upq import statements as st
from upq.errors import KeyTaken, NotFound, WrongState
from upq.job import BAD, BLOCKED, CANCELLED, FINAL, QUEUED, RUNNING, encode
from upq.joins import branches_of
from upq.limits import KEPT, Limiter, kept_text, turn_reason
from upq.members import kept_batch
from upq.sql import Tx

#: So many jobs are looked at in the time that one level of a tree takes.
LEVEL_COSTS = 10


class Changes(Protocol):
    """The batch, as far as families need it."""

    tx: Tx
    now: int
    #: Lane and token of running jobs that are asked to end here.
    asked: list[tuple[int, int]]

    @property
    def limiter(self) -> Limiter: ...
    def hold_dependents(self, changed: list[tuple[int, str]]) -> None: ...
    def reopen(self, ids: Sequence[int], followups: Mapping[int, dict[str, Any]]) -> None: ...
    def moved(
        self, id: int, lane_id: int, was: str | None, state: str, *, reason: str = "",
        message: str = "", attempt: int = 0, who: str = "",
    ) -> None: ...  # fmt: skip


class Page(NamedTuple):
    """Children that are still to be looked at: of these parents, those after one id."""

    parents: Sequence[int]
    above: int = 0


class Family:
    """What one batch does for trees of jobs."""

    def __init__(self, batch: Changes) -> None:
        self._batch = batch
        self._tx = batch.tx

    def closed(self, ids: Iterable[int]) -> set[int]:
        """Of these jobs, locked, those below which nothing begins any more."""
        asked_for = sorted((id,) for id in ids)
        rows = self._tx.fetch_rows(st.MARKS_OF, asked_for) if asked_for else []
        return {id for id, state, asked in rows if asked or state == CANCELLED}

    # Cancel

    def cancel(self, ids: Sequence[int], who: str, text: str) -> dict[int, str]:
        """End those that wait, ask those that run. Returns the states they were found in."""
        batch = self._batch
        states: dict[int, str] = {}
        waiting, running, freed = [], [], []
        for id, state, lane_id, attempt, _, token, options in self._these(ids):
            states[id] = state
            if state == RUNNING:
                running.append((id,))
                batch.asked.append((lane_id, token))
            elif state not in FINAL:
                waiting.append((id,))
                batch.moved(id, lane_id, state, CANCELLED, message=text, attempt=attempt, who=who)
                if limits := kept_text(options):
                    freed.append((id, limits))
        if running:
            self._tx.run_rows(st.ASK_CANCEL, running)
        if waiting:
            self._tx.run_rows(st.CANCEL_WAITING, waiting, now=batch.now, message=text)
            batch.hold_dependents([(id, CANCELLED) for (id,) in waiting])
            if freed:
                batch.limiter.free(freed, waited=True)
        return states

    def cancel_below(self, pages: Sequence[Page], who: str, text: str) -> tuple[int, list[Page]]:
        """The same for all below: how many had not ended, and what is left for the next time.

        It looks at some CHUNK jobs. What is above has to be marked.
        """
        left, n, looked = list(pages), 0, 0
        while left and looked < st.CHUNK:
            page = left.pop()
            parents = sorted((id,) for id in page.parents)
            most = st.CHUNK
            rows = self._tx.fetch_rows(st.CHILDREN_OF, parents, above=page.above, most=most)
            ids = [row[0] for row in rows]
            if len(ids) == most:
                left.append(Page(page.parents, ids[-1]))
            if ids:
                n += sum(state not in FINAL for state in self.cancel(ids, who, text).values())
                left.append(Page(ids))
            looked += len(ids) + LEVEL_COSTS
        return n, left

    # Retry

    def retry(self, ids: Sequence[int], who: str, *, alone: bool = False) -> list[int]:
        """Make queued jobs of those that have ended badly; returns which.

        alone: the one job has to be. Raises NotFound, WrongState, KeyTaken.
        """
        refusal = "{state}: only what has ended badly can be retried" if alone else ""
        found = self._these(ids, lambda s: s in BAD, refusal)
        batch, changed = self._batch, []
        followups = {row[0]: kept for row in found if (kept := kept_batch(row[6]))}
        # What is given its key here has ended still, for those who look.
        taken: set[str] = set()
        for id, state, lane_id, _, waits, _, options in found:
            limits = kept_text(options)
            unique = limits.get("unique", "")
            if unique in taken:
                continue
            # A follow-up may get members back here.
            waits = waits or int(id in followups and len(found) > 1)
            # A join comes to its line when it could start, and so does a follow-up.
            is_late = waits and (id in followups or branches_of(options))
            in_line = "line" in limits and not is_late
            keys = limits if in_line else {**limits, "line": None}
            if limits and (holder := batch.limiter.again(id, keys)) is not None:
                if alone:
                    raise KeyTaken(id, holder)
                continue
            if unique:
                taken.add(unique)
            if "expires_at" in limits:
                # Somebody asked for it: it may start at any time.
                left = {name: value for name, value in limits.items() if name != "expires_at"}
                text = encode({**json.loads(options), KEPT: left})
                self._tx.run(st.SET_OPTIONS, id=id, text=text)
            new = BLOCKED if waits else QUEUED
            reason = "waits for earlier jobs" if waits else ""
            ready = None if waits else lane_id
            if "line" in limits and not waits:
                reason, ready = turn_reason(limits), None
            changed.append((id, new, ready, reason))
            batch.moved(id, lane_id, state, new, reason="retry", who=who)
            if in_line:
                batch.limiter.came(id, limits["line"])
        if changed:
            self._tx.run_rows(st.REOPEN, changed)
            self._tx.run_rows(st.AGAIN_BELOW, [(row[0],) for row in changed])
            batch.reopen(
                [row[0] for row in changed],
                {row[0]: followups[row[0]] for row in changed if row[0] in followups},
            )
            batch.hold_dependents([(row[0], row[1]) for row in changed])
        return [row[0] for row in changed]

    def _these(
        self, ids: Sequence[int], fits: Callable[[str], bool] | None = None, refusal: str = ""
    ) -> list[Any]:
        """Rows of THESE_JOBS, by id, whose state fits. With a refusal the one asked for has to."""
        found = sorted(self._tx.fetch_rows(st.THESE_JOBS, sorted((id,) for id in ids)))
        if fits is None:
            return found
        if refusal:
            if not found:
                raise NotFound(f"no job {ids[0]}")
            if not fits(found[0][1]):
                raise WrongState(f"job {ids[0]} is {refusal.format(state=found[0][1])}")
        return [row for row in found if fits(row[1])]
