"""What a batch does for jobs that wait for others, and for joins, which get what those return.

The options of a join name its branches, by their types. A branch is a job of the same submit; or
the one that is there already, when it was a duplicate; or the last step that a branch has appended,
unless that was a duplicate of the join, or of what waits for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from upq.job import BLOCKED, DONE, FINAL, Accepted
from upq.sql import Tx
from upq.statements import waits as st
from upq.statements.family import THESE_JOBS
from upq.statements.jobs import AT, PLAIN
from upq.vault import Vault
from upq.workflow import DELAY, JOINS, option


def block(row: list[Any], waits: int, reason: str) -> None:
    """Have a new job wait for so many others."""
    row[AT["state"]], row[AT["ready"]], row[AT["due_at"]] = BLOCKED, None, None
    row[AT["reason"]], row[AT["waits"]] = reason, waits
    if option(row[AT["options"]], DELAY) is not None:
        row[AT["run_at"]] = None  # it counts from when it could start


def waits_reason(ids: Sequence[int]) -> str:
    return "waits for " + ", ".join(map(str, ids[:8])) + (" ..." if len(ids) > 8 else "")


def after_reason(id: int, state: str) -> str:
    return f"job {id} is {state}; `retry {id}` lets it go on"


def branches_of(options: str | None) -> dict[str, int] | None:
    """The branches of a join, by their types; None for any other job."""
    found: dict[str, int] | None = option(options, JOINS)
    return found


class Joins:
    """The joins of one batch."""

    def __init__(self, tx: Tx, vault: Vault) -> None:
        self._tx = tx
        self._vault = vault
        #: Jobs of before that new ones have come to wait for; they may have ended.
        self.met: list[int] = []

    def begin(
        self, row: list[Any], branches: Mapping[str, int], there: Mapping[int, int]
    ) -> list[tuple[int, int]]:
        """Block a new join; returns its edges. there: the ids of the branches that were planned."""
        needed = {name: there[id] for name, id in branches.items()}
        if needed != branches:
            row[AT["options"]] = with_branches(row[AT["options"]], needed)
            self.met += [id for name, id in needed.items() if id != branches[name]]
        block(row, len(needed), waits_reason(list(needed.values())))
        if len(row) > PLAIN:
            # It comes to its line when it could start: a branch may need a turn of the same line.
            row[AT["serial_key"]] = None
        return [(row[0], id) for id in needed.values()]

    def stand_in(self, steps: Mapping[tuple[int, int], Accepted]) -> None:
        """Have joins wait for steps that their branches have appended. Each by join and branch."""
        joins = sorted({(join,) for join, _ in steps})
        found = self._tx.fetch_rows(THESE_JOBS, joins)
        options = {row[0]: row[6] for row in found}
        edges = set(self._tx.fetch_rows(st.NEEDS_OF, joins))
        added = set()
        for (join, branch), new in steps.items():
            if join not in options:  # it was a duplicate
                continue
            branches = branches_of(options[join]) or {}
            branches = {n: new.id if id == branch else id for n, id in branches.items()}
            options[join] = with_branches(options[join], branches)
            self._tx.run(st.SET_OPTIONS, id=join, text=options[join])
            added.add((join, new.id))
            if new.duplicate:
                self.met.append(new.id)
        added -= edges
        if added:
            self._tx.run_rows(st.INSERT_EDGES, sorted(added))
            more = Counter(join for join, _ in added)
            self._tx.run_rows(st.LOWER_WAITS, sorted((join, -n) for join, n in more.items()))
        blocked = {row[0] for row in found if row[1] == BLOCKED}
        self._tell({edge for edge in edges | added if edge[0] in blocked})

    def _tell(self, edges: set[tuple[int, int]]) -> None:
        """Say on joins what they wait for."""
        ids = sorted({(needs,) for _, needs in edges})
        states = dict(self._tx.fetch_rows(st.PLAIN_STATES_OF, ids))
        open_: dict[int, list[int]] = {}
        reasons = {}
        for join, needs in sorted(edges):
            if states[needs] != DONE:
                open_.setdefault(join, []).append(needs)
        for join, needed in open_.items():
            ended = [id for id in needed if states[id] in FINAL]
            bad = after_reason(ended[0], states[ended[0]]) if ended else ""
            reasons[join] = bad or waits_reason(needed)
        self._tx.run_rows(st.BLOCK_JOBS, sorted(reasons.items()))

    def hand_on(self, joins: Mapping[int, dict[str, int]], done: set[int]) -> None:
        """Give joins, which are locked, the results of those of their branches that are done."""
        ids = {id for branches in joins.values() for id in branches.values()} & done
        results = dict(self._tx.fetch_rows(st.RESULTS_OF, sorted((id,) for id in ids)))
        found = []
        for id, text in self._tx.fetch_rows(st.DATA_OF, sorted((id,) for id in joins)):
            parts = {n: results[b] or "null" for n, b in joins[id].items() if b in results}
            found.append((id, self._vault.merged(text, parts)))
        self._tx.run_rows(st.SET_DATA, sorted(found))


def with_branches(options: str, branches: Mapping[str, int]) -> str:
    return json.dumps({**json.loads(options), JOINS: branches})
