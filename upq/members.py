"""What a transaction does for a batch of jobs when its members end, and when its follow-up is free.

A batch is its follow-up: a blocked job whose `options` keep the rest under BATCH. It has an edge to
each member that is not done, and `waits` for those whose end it needs, and for one more while the
batch is open: nothing else lets it go. How it is filled is in `filling`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from upq.job import BATCH, BLOCKED, CANCELLED, DONE, ENDED, EXPIRED, FAILED, FINAL, encode
from upq.joins import after_reason
from upq.sql import Tx
from upq.statements import members as st
from upq.statements.waits import BLOCK_JOBS, DELETE_OWN_EDGES, LOWER_WAITS, SET_DATA
from upq.vault import Vault
from upq.workflow import option

#: Ids of members that have ended badly, of those that a follow-up is told.
TOLD = 100
OPEN_REASON = "batch is open"
FILLED_REASON = "waits for its members"


def kept_batch(options: str | None) -> dict[str, Any]:
    """What the options of a follow-up say of its batch; empty for all other jobs."""
    found: dict[str, Any] = option(options, BATCH) or {}
    return found


def is_over(state: str, when: str) -> bool:
    """Whether a member in this state is waited for no more."""
    return state == DONE or (when == ENDED and state in FINAL)


def reason_of(kept: dict[str, Any], bad: Sequence[tuple[int, str]]) -> str:
    """Why a follow-up waits. bad: members that have ended badly, with their states."""
    if kept["open"]:
        return OPEN_REASON
    return after_reason(*bad[0]) if bad and kept["when"] == DONE else FILLED_REASON


class Members:
    """The members of batches, for one transaction."""

    def __init__(self, tx: Tx, vault: Vault) -> None:
        self._tx = tx
        self._vault = vault

    def told(self, id: int, kept: dict[str, Any]) -> str:
        """Why a follow-up waits: what a list shows of it."""
        asks = not kept["open"] and kept["when"] == DONE
        return reason_of(kept, self._tx.fetch(st.BAD_MEMBERS, batch=id, n=1) if asks else ())

    def hold(
        self,
        waiting: Sequence[tuple[int, int, str]],
        states: Mapping[int, str],
        lower: Callable[[Mapping[int, int]], None],
    ) -> set[int]:
        """Members are in other states, and not done: which of those that wait follow a batch.

        waiting: rows of DEPENDENTS_OF. Those that need no more than an end are told by `lower`.
        """
        batches = self._followups(waiting)
        ended = Counter(
            id for id, needs, _ in waiting
            if id in batches and batches[id]["when"] == ENDED and states[needs] in FINAL
        )  # fmt: skip
        blocked = {id for id, _, state in waiting if state == BLOCKED and id in batches}
        if blocked:
            reasons = [(id, self.told(id, batches[id])) for id in sorted(blocked)]
            self._tx.run_rows(BLOCK_JOBS, reasons)
        if ended:
            lower(ended)
        return set(batches)

    def await_again(self, waiting: Sequence[tuple[int, int, str]]) -> None:
        """Members that have ended badly are queued again: their end is waited for once more."""
        batches = self._followups(waiting)
        more = Counter(id for id, *_ in waiting if id in batches and batches[id]["when"] == ENDED)
        if more:
            self._tx.run_rows(LOWER_WAITS, sorted((id, -n) for id, n in more.items()))

    def _followups(self, waiting: Sequence[tuple[int, int, str]]) -> dict[int, dict[str, Any]]:
        """Those of these rows of DEPENDENTS_OF that follow a batch, with what is kept of it."""
        ids = sorted({(row[0],) for row in waiting})
        rows = self._tx.fetch_rows(st.OPTIONS_OF, ids) if ids else []
        return {id: kept for id, options in rows if (kept := kept_batch(options))}

    def release(self, followups: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Tell follow-ups that wait no more how their members have ended.

        Those that were free before, and are queued again, know it already.
        """
        ids = sorted((id,) for id, _ in followups)
        untold = dict(self._tx.fetch_rows(st.UNTOLD, ids))
        found = []
        for id, kept in sorted((id, kept) for id, kept in followups if id in untold):
            # Edges to members that are done are gone.
            counts = Counter(dict(self._tx.fetch(st.BAD_COUNTS, batch=id)))
            bad = self._tx.fetch(st.BAD_MEMBERS, batch=id, n=TOLD) if counts else []
            told = {
                "members": kept["n"],
                DONE: kept["n"] - counts.total(),
                **{state: counts[state] for state in (FAILED, CANCELLED, EXPIRED)},
                "ids": [row[0] for row in bad],
            }
            found.append((id, self._vault.merged(untold[id], {BATCH: encode(told)})))
        if found:
            self._tx.run_rows(SET_DATA, found)
            self._tx.run_rows(DELETE_OWN_EDGES, [(id,) for id, _ in found])
