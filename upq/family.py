"""Jobs with all that is below them: what a batch does to cancel a tree, or to queue jobs again.

Below a job are its children, what follows its end, and so on: `parent` says so. Nothing begins
below a job that was cancelled or is asked to end. Who inserts below a job locks its row first and
looks; who cancels marks that row first and then looks for children. So of two daemons the later one
sees what the earlier one has done, and nothing slips through between them.

A cancel of many is made in steps. What is left of it is a row, written with the first step and
deleted with the last, so that anybody may go on with it; meanwhile a claim that meets a job of the
rest cancels it.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from upq.clauses import CHUNK
from upq.errors import KeyTaken, NotFound, WrongState
from upq.job import BAD, BLOCKED, CANCELLED, FINAL, QUEUED, RUNNING, encode
from upq.joins import branches_of
from upq.limits import KEPT, Limiter, kept_text, turn_reason
from upq.members import kept_batch
from upq.sql import Tx
from upq.statements import family as st
from upq.statements.waits import SET_OPTIONS

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


class Goal(NamedTuple):
    """What a cancel is to come to: below these jobs nothing goes on but what is spared."""

    jobs: Sequence[int]
    spared: Sequence[int]
    #: Who wants it, and what those that it ends say.
    who: str
    text: str


class Family:
    """What one batch does for trees of jobs."""

    def __init__(self, batch: Changes, cancelling: bool) -> None:
        self._batch = batch
        self._tx = batch.tx
        #: Whether there may be cancels that are not through.
        self.cancelling = cancelling
        #: By such a cancel, how many of its jobs were met by claims, and ended.
        self.caught = Counter[int]()

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

    def cancel_below(self, goal: Goal) -> tuple[int, int | None]:
        """The same for all below jobs that are marked or have ended: how many had not ended, and,
        if that was not all, the cancel that `go_on` goes on with.

        One call looks at some CHUNK jobs.
        """
        n, left = self._look_below(goal, [Page(goal.jobs)])
        if not left:
            return n, None
        id = secrets.randbits(62)
        self._tx.run(st.ADD_CANCEL, id=id, now=self._batch.now, goal=encode(goal),
                     pages=encode(left))  # fmt: skip
        self.cancelling = True
        return n, id

    def go_on(self, cancel: int) -> tuple[int, bool]:
        """The next step of a cancel: how many had not ended, and whether that was the last."""
        found = self._tx.fetch(st.LOCK_CANCEL, id=cancel)
        if not found:
            return 0, True
        goal, pages = found[0]
        left = [Page(*page) for page in json.loads(pages)]
        n, left = self._look_below(Goal(*json.loads(goal)), left)
        if left:
            self._tx.run(st.SET_CANCEL, of=cancel, now=self._batch.now, pages=encode(left))
        else:
            self._tx.run(st.DROP_CANCEL, id=cancel)
        return n, not left

    def _look_below(self, goal: Goal, left: list[Page]) -> tuple[int, list[Page]]:
        n, looked = 0, 0
        while left and looked < CHUNK:
            page = left.pop()
            parents = sorted((id,) for id in page.parents)
            most = CHUNK
            rows = self._tx.fetch_rows(st.CHILDREN_OF, parents, above=page.above, most=most)
            ids = [row[0] for row in rows]
            if len(ids) == most:
                left.append(Page(page.parents, ids[-1]))
            if meant := [id for id in ids if id not in goal.spared]:
                states = self.cancel(meant, goal.who, goal.text).values()
                n += sum(state not in FINAL for state in states)
                left.append(Page(meant))
            looked += len(ids) + LEVEL_COSTS
        return n, left

    def steps(self) -> dict[int, int]:
        """When the latest step was made of each cancel that is not through."""
        return {id: at for id, at, _ in self._rows()}

    def under_way(self) -> dict[int, Goal]:
        """The cancels that are not through."""
        return {id: Goal(*json.loads(goal)) for id, _, goal in self._rows()}

    def _rows(self) -> list[Any]:
        rows = self._tx.fetch(st.CANCELS)
        self.cancelling = bool(rows)
        return rows

    def cancels_of(self, ids: Collection[int]) -> list[int]:
        """The cancels that are not through in the trees of these jobs."""
        found = self.under_way()
        if not found:
            return []
        asked_for = {*ids, *(id for goal in found.values() for id in goal.jobs)}
        roots = dict(self._tx.fetch_rows(st.ROOTS_OF, sorted((id,) for id in asked_for)))
        mine = {roots.get(id, id) for id in ids}
        return [
            cancel
            for cancel, goal in found.items()
            if not mine.isdisjoint(roots.get(id) for id in goal.jobs)
        ]

    def catch(self, picked: Sequence[Any]) -> set[int]:
        """Cancel those of the rows of CLAIMED that a cancel has not come to yet."""
        caught = set[int]()
        for cancel, goal in self.under_way().items():
            met = self._below([row for row in picked if row[0] not in caught], goal)
            if met:
                self.cancel(sorted(met), goal.who, goal.text)
                self.caught[cancel] += len(met)
                caught |= met
        return caught

    def _below(self, picked: Sequence[Any], goal: Goal) -> set[int]:
        """Those of the rows of CLAIMED that are below the jobs of a cancel, and not spared."""
        found = set[int]()
        # Each with the one above it that is looked at.
        above = {row[0]: row[12] for row in picked if row[0] not in goal.spared}
        while above := {id: at for id, at in above.items() if at is not None}:
            found |= {id for id, at in above.items() if at in goal.jobs}
            left = {id: at for id, at in above.items() if id not in found and at not in goal.spared}
            ids = sorted({(at,) for at in left.values()})
            parents = dict(self._tx.fetch_rows(st.PARENTS_OF, ids)) if ids else {}
            above = {id: parents.get(at) for id, at in left.items()}
        return found

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
                self._tx.run(SET_OPTIONS, id=id, text=text)
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
