"""Daemons on one database: who is dead for sure, and how what it ran goes back to the queue.

All of it runs inside the writer's transaction; who asks for it is `queue`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from upq.batch import LEASE_S, Batch
from upq.job import CANCELLED, FAILED, QUEUED, RUNNING, Job
from upq.joins import waits_reason
from upq.limits import kept
from upq.record import crashes_of, read_claimed
from upq.statements import nodes as st
from upq.vault import Vault
from upq.writer import Replay

#: Seconds between two renewals of a daemon's claims.
BEAT_S = 10
#: Starts that may end with the death of the daemon before the job is failed as `crashed`.
CRASH_LIMIT = 3
#: The message of such a job.
DEATHS = f"the daemon died each of the {CRASH_LIMIT} times that it ran"


class Node(NamedTuple):
    """One daemon among those that work on its database."""

    #: This incarnation: never reused, whatever pid or name.
    owner: str
    name: str
    machine: str
    #: Whether other daemons may work on the same database.
    shared: bool

    def enter(self, batch: Batch) -> None:
        batch.tx.run(st.ADD_NODE, owner=self.owner, name=self.name, machine=self.machine,
                     pid=os.getpid(), now=batch.now)  # fmt: skip

    def beat(self, batch: Batch) -> None:
        """Say that this daemon is alive, and renew its claims."""
        if not batch.tx.run(st.BEAT_NODE, owner=self.owner, now=batch.now):
            self.enter(batch)  # an older state of the database is back, from a copy or a backup
        lease = batch.now + LEASE_S * 1_000_000
        batch.tx.run(st.BEAT_JOBS, owner=self.owner, lease=lease)

    def orphans(self, batch: Batch, vault: Vault) -> list[Job]:
        """Running jobs whose owner is dead for sure.

        These are jobs of earlier incarnations of this node on this machine, since the caller
        holds the node's lock; of owners that no node row names; with SQLite, of all others.
        """
        # In this order: who enters and claims meanwhile is in the rows that are read later.
        owners = batch.tx.fetch(st.OWNERS)
        nodes = entered(batch)
        dead = [
            one
            for (owner,) in owners
            if self._is_dead(owner, nodes)
            for one in running_of(batch, owner, vault)
        ]
        # A child may have killed the daemon before it was stored that its parent waits for it.
        child_of = {one.parent: one.id for one in dead if one.parent is not None}
        return [
            one._replace(reason=one.reason or waits_reason([child_of[one.id]]))
            if one.id in child_of
            else one
            for one in dead
        ]

    def dead(self, batch: Batch) -> list[str]:
        """Earlier incarnations of this node that have not left in good order."""
        nodes = entered(batch)
        return [id for id in nodes if self._is_dead(id, nodes)]

    def _is_dead(self, owner: str, nodes: dict[str, list[str]]) -> bool:
        if owner == self.owner:
            return False
        known = nodes.get(owner)
        return known is None or not self.shared or known == [self.name, self.machine]


def entered(batch: Batch) -> dict[str, list[str]]:
    """The incarnations that are entered, with node and machine."""
    return {id: place for id, *place in batch.tx.fetch(st.NODES)}


def forget(batch: Batch, owners: Iterable[str]) -> None:
    """Remove the rows of incarnations."""
    for owner in owners:
        batch.tx.run(st.DROP_NODE, owner=owner)


def running_of(batch: Batch, owner: str, vault: Vault) -> list[Job]:
    """All that an incarnation runs, read a page at a time."""
    found: list[Job] = []
    page: list[Any] = [None]
    while page:
        above = found[-1].id if found else 0
        page = batch.tx.fetch(st.RUNNING_OF, owner=owner, above=above)
        for row in page:
            one = read_claimed(row[:-2], row[-2], vault=vault)
            attempt, starts = one.attempt - 1, one.starts - 1
            found.append(one._replace(reason=row[-1], attempt=attempt, starts=starts))
    return found


def still_running(batch: Batch, claims: Iterable[Job]) -> list[Job]:
    """Those of these claims that nobody has ended meanwhile; nobody does before the commit."""
    wanted = {one.id: one for one in claims}
    rows = batch.tx.fetch_rows(st.TOKENS_OF, [(id,) for id in wanted])
    return [wanted[id] for id, token in sorted(rows) if wanted[id].token == token]


def is_over(dead: Job) -> bool:
    """Whether a job has killed its daemon too often to be started again."""
    return not dead.cancel_asked and crashes_of(dead) >= CRASH_LIMIT


def requeue(batch: Batch, part: list[Job], *, crashed: bool) -> None:
    """Back to the queue; or failed after too many crashes, cancelled where that was asked."""
    values: list[tuple[Any, ...]] = []
    bad, limited = [], []
    for one in part:
        crashes = crashes_of(one) if crashed else one.crashes
        state, cause, text = QUEUED, "interrupted" if crashed else "released", None
        if crashed and one.cancel_asked:
            state, cause = CANCELLED, "asked"
        elif crashed and is_over(one):
            state, cause, text = FAILED, "crashed", DEATHS
        if state == QUEUED:
            values.append((one.id, one.token, state, "", text, one.lane, crashes, None))
        else:
            values.append((one.id, one.token, state, cause, text, None, crashes, batch.now))
            bad.append((one.id, state))
        batch.moved(one.id, one.lane, RUNNING, state, reason=cause, message=text or "",
                    attempt=one.attempt)  # fmt: skip
        if limits := kept(one.options):
            limited.append((one, state, limits))
    if values and batch.tx.run_rows(st.REQUEUE_JOBS, values) != len(values):
        raise Replay("a claim that was to be put back has ended meanwhile")
    for one, state, limits in limited:
        if state != QUEUED:
            batch.limiter.free([(one.id, limits)])
        elif not crashed and one.attempt == 1:
            batch.limiter.given_back(one.id, limits)
    batch.hold_dependents(bad)
