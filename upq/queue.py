"""Every change of a job's state: one method each.

A method makes a change, which is data, or for what is rare a function run inside the transaction
(`Act`); the writer puts the changes of all threads into one `Batch`. Reading is in `views`; what
follows an end is said by the caller.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from upq import statements as st
from upq import when
from upq.batch import LEASE_S, Act, Batch, Claim, Finish, Submit
from upq.db import Database
from upq.errors import NotFound, RequestError, Unavailable, WrongState
from upq.events import Bus
from upq.health import Rules, Wish
from upq.job import (
    BLOCKED,
    CANCELLED,
    DONE,
    FAILED,
    FINAL,
    QUEUED,
    RUNNING,
    STATES,
    Accepted,
    Job,
    NewJob,
    Outcome,
)
from upq.notify import NOTIFY
from upq.record import (
    clean,
    crashes_of,
    digest,
    encode,
    progress_text,
    read_claimed,
)
from upq.sql import Tx
from upq.writer import Replay, Writer

log = logging.getLogger(__name__)

#: Seconds between two renewals of this daemon's claims.
BEAT_S = 10
#: Starts that may end with the death of the daemon before the job is failed as `crashed`.
CRASH_LIMIT = 3
#: Job ids reserved at a time; what is left of a block is lost only by a crash.
ID_BLOCK = 1000


class Lane(NamedTuple):
    """One queue and type: what is paused, and what a claim is about."""

    id: int
    queue: str
    type: str
    paused: bool


class Claims(Protocol):
    """Who claims, as far as the queue needs it."""

    def wake(self) -> None:
        """A job becomes due earlier than was known."""

    def book(self, lanes: set[int]) -> list[tuple[int, int]]:
        """Set free places aside for jobs of these lanes: (lane, how many)."""

    def settle(self, queued: set[int], booked: list[tuple[int, int]], jobs: list[Job]) -> None:
        """Take what was claimed for the places booked; these lanes have got new jobs."""


class NoClaims:
    """Nobody claims here."""

    def wake(self) -> None:
        return

    def book(self, lanes: set[int]) -> list[tuple[int, int]]:
        return []

    def settle(self, queued: set[int], booked: list[tuple[int, int]], jobs: list[Job]) -> None:
        return


class Queue:
    """All changes of state, for one daemon. `open()` first; every method may be called anywhere."""

    def __init__(self, database: Database, bus: Bus, node_name: str, machine: str = "") -> None:
        self.database = database
        self.writer = Writer(database, self.apply)
        self.node_name = node_name
        self.machine = machine
        #: This incarnation: never reused, whatever pid or name.
        self.owner = uuid.uuid4().hex
        #: Lanes by id; replaced as a whole, never changed.
        self.lanes: dict[int, Lane] = {}
        #: The earliest time that a waiting job becomes due, or None.
        self.next_due: int | None = None
        #: Ends refused because another claim owns the job.
        self.fenced = 0
        #: Jobs of dead daemons put back to the queue, and of these failed as crashed.
        self.rescued = self.crashed = 0
        #: Attempts given back, attempts that are followed by another, outputs cut to their limit.
        self.interrupted = self.retried = self.truncated = 0
        #: Claims, and how many of them were of jobs claimed before: an attempt had failed
        #: (`retried`), was given back (`interrupted`), its daemon had died (`rescued`), its claim
        #: was in doubt (`released`), or somebody asked (`asked_again`).
        self.started = self.started_again = self.released = self.asked_again = 0
        # The latest progress of each claim that is not stored yet.
        self._progress: dict[int, str] = {}
        # Tokens of the claims whose ends are not committed; changed only in `note`.
        self._held: set[int] = set()
        #: Who claims; told what is queued, so that it can start in the same transaction.
        self.claims: Claims = NoClaims()
        self._by_name: dict[tuple[str, str], Lane] = {}
        self._bus = bus
        self._ids_lock = threading.Lock()
        self._next_id = self._end_id = 0

    # Start and end

    def open(self) -> None:
        """Make the counters, read the lanes, enter this node."""

        def enter(batch: Batch) -> list[Any]:
            for name in ("job", "event"):
                if not batch.tx.fetch(st.FIND_COUNTER, name=name):
                    batch.tx.run(st.ADD_COUNTER, name=name)
            batch.tx.run(st.ADD_NODE, owner=self.owner, name=self.node_name, machine=self.machine,
                         pid=os.getpid(), now=batch.now)  # fmt: skip
            return batch.tx.fetch(st.LANES)

        self._know(read_lane(*row) for row in self._act(enter))
        self.stage()

    def close(self) -> None:
        """Give back the ids not used and this node's row. The last change of all."""

        def leave(batch: Batch) -> None:
            # With no block reserved this matches no row: no counter is below 0.
            batch.tx.run(st.GIVE_BACK_IDS, first=self._next_id - 1, last=self._end_id - 1)
            batch.tx.run(st.DROP_NODE, owner=self.owner)

        self._act(leave)
        self.writer.close()

    @property
    def shared(self) -> bool:
        """Whether other daemons may work on the same database."""
        return self.database.kind != "sqlite"

    def apply(self, tx: Tx, changes: Sequence[Any]) -> Batch:
        """What the writer calls, inside its transaction."""
        batch = Batch(tx, when.now(), self)
        try:
            batch.run(changes)
        except BaseException:
            batch.failed()
            raise
        return batch

    def book(self, lanes: set[int]) -> list[tuple[int, int]]:
        return self.claims.book(lanes)

    def note(self, batch: Batch, committed: bool) -> None:
        """Hear how a batch has ended, in the thread that led it, before the next one begins."""
        if not committed:
            self.claims.settle(set(), batch.booked, [])
            return
        self.fenced += batch.fenced
        self.interrupted += batch.given_back
        self.retried += batch.retried
        self.truncated += batch.truncated
        self.started += len(batch.taken)
        self.started_again += len(batch.taken) - batch.first_starts
        self._held.update(batch.taken)
        self._held.difference_update(batch.ended)
        known = None if batch.due_is_all else self.next_due
        self.next_due = min((at for at in (known, batch.due) if at is not None), default=None)
        if batch.due is not None and self.next_due != known:
            self.claims.wake()
        if batch.events:
            queued = {event.lane for event in batch.events if event.state == QUEUED}
            claimed = [read_claimed(*claim) for claim in batch.claimed]
            self.claims.settle(queued, batch.booked, claimed)
            self._bus.publish(batch.events)

    def _act(self, run: Callable[[Batch], Any]) -> Any:
        return value_of(self.writer.run([Act(run)])[0])

    def _know(self, lanes: Iterable[Lane]) -> None:
        known = {**self.lanes, **{one.id: one for one in lanes}}
        self._by_name = {(one.queue, one.type): one for one in known.values()}
        self.lanes = known

    def known_lane(self, queue: str, type: str) -> Lane | None:
        """The lane of a queue and type, when there is one; nothing is written."""
        return self._by_name.get((queue, type))

    def lane(self, queue: str, type: str) -> Lane:
        """The lane of a queue and type, made when it is new."""
        found = self._by_name.get((queue, type))
        if found is not None:
            return found

        def make(batch: Batch) -> Lane:
            paused = batch.tx.fetch(st.PAUSED_QUEUE, queue=queue)[0][0] or 0
            there = batch.tx.fetch(st.FIND_LANE, queue=queue, type=type)
            if not there:
                batch.tx.run(st.MAKE_LANE, queue=queue, type=type, paused=paused)
                there = batch.tx.fetch(st.FIND_LANE, queue=queue, type=type)
                batch.tx.run_rows(st.MAKE_TALLY, [(there[0][0], state, 0) for state in STATES])
                log.info("created new queue '%s' for %s", queue, type)
            return read_lane(there[0][0], queue, type, paused)

        made: Lane
        try:
            made = self._act(make)
        except Unavailable:
            # Another daemon made it at the same moment; a second look finds it.
            made = self._act(make)
        self._know([made])
        return made

    def take_ids(self, k: int) -> int | None:
        """The first of k job ids in a row that are reserved already; None when there are none."""
        with self._ids_lock:
            if self._next_id + k > self._end_id:
                return None
            self._next_id += k
            return self._next_id - k

    def reserve_ids(self, k: int) -> int:
        """The first of k job ids in a row."""
        first = self.take_ids(k)
        if first is not None:
            return first
        size = max(k, ID_BLOCK)
        block = int(self._act(lambda batch: batch.numbers("job", size)))
        with self._ids_lock:
            first = self._next_id if block == self._end_id else block
            self._next_id, self._end_id = first + k, block + size
            return first

    # Submit

    def submit(self, batches: Sequence[Sequence[NewJob]]) -> list[list[Accepted] | RequestError]:
        """Queue jobs; those of one inner sequence all or none. Returns when they are on disk.

        Raises Unavailable or Uncertain for all. Returns in the order given.
        """
        changes = [self._change(jobs) for jobs in batches]
        return self.writer.run(changes)

    def _change(self, jobs: Sequence[NewJob]) -> Submit:
        now = when.now()
        first = self.reserve_ids(len(jobs))
        made = [self.row(one, first + i, now) for i, one in enumerate(jobs)]
        return Submit(made, [one.after for one in jobs], jobs[0].submitter if jobs else "")

    def row(self, new: NewJob, id: int, now: int) -> list[Any]:
        """A job as it is inserted."""
        queue = new.queue or new.type
        lane_id = self.lane(queue, new.type).id
        due = new.run_at if new.run_at is not None and new.run_at > now else None
        root = id if new.root is None else new.root
        return [
            id, lane_id, new.type, queue, lane_id if due is None else None, -new.priority, root,
            QUEUED, "", encode(new.params), encode(new.options) if new.options else None,
            new.run_at, due, digest(new.type, new.key) if new.key else None, 0, new.parent, root,
            new.child_key, new.submitter, now,
        ]  # fmt: skip

    # Claim and end

    def claim(self, wants: Sequence[tuple[int, int]]) -> list[Job]:
        """Make running what can be claimed: at most n jobs of each (lane, n). One transaction.

        Commits what was posted, too, and with nothing wanted only that.
        """
        if not wants:
            self.writer.run([])
            return []
        claimed = value_of(self.writer.run([Claim(list(wants))])[0])
        return [read_claimed(row, token, now) for row, token, now in claimed]

    def finish(
        self,
        ended: Job,
        outcome: Outcome,
        then: Sequence[NewJob] = (),
        told: Callable[[bool], None] | None = None,
        wish: Wish | None = None,
    ) -> None:
        """End one attempt, with what follows it, in one transaction; kept through any outage.

        Returns at once. `told` hears after the commit whether the claim was still ours; what a
        lost claim has done is not written. `wish` is for a type that is told of by its health.
        Raises ValueError when the result is no JSON.
        """
        outcome.message, outcome.reason = clean(outcome.message), clean(outcome.reason)
        if outcome.output is not None:
            outcome.output = outcome.output._replace(text=clean(outcome.output.text))
        kept = None
        if outcome.data is not None and outcome.data != ended.data:
            kept = encode(outcome.data)
        self.writer.post(
            Finish(
                ended,
                outcome,
                None if outcome.result is None else encode(outcome.result),
                kept,
                None if outcome.progress is None else progress_text(outcome.progress),
                self._change(then) if then else None,
                told,
                wish,
            )
        )

    # Rare changes

    def cancel(self, id: int, who: str, message: str = "") -> int:
        """Cancel a waiting job, or ask a running one to end: then its claim's token, else 0."""

        def run(batch: Batch) -> int:
            state, lane_id, attempt, _, token = one_row(batch, id)
            if state == RUNNING:
                batch.tx.run(st.ASK_CANCEL, id=id)
                return int(token)
            if state in FINAL:
                raise WrongState(f"job {id} is {state} already")
            text = message or f"cancelled by {who}"
            batch.tx.run(st.CANCEL_WAITING, id=id, now=batch.now, message=text)
            batch.moved(id, lane_id, state, CANCELLED, message=text, attempt=attempt, who=who)
            batch.hold_dependents([(id, CANCELLED)])
            return 0

        return int(self._act(run))

    def retry(self, id: int, who: str) -> None:
        """Make a queued job of one that has ended badly."""

        def run(batch: Batch) -> None:
            state, lane_id, _, waits, _ = one_row(batch, id)
            if state not in FINAL or state == DONE:
                raise WrongState(f"job {id} is {state}: only what has ended badly can be retried")
            new = BLOCKED if waits else QUEUED
            reason = "waits for earlier jobs" if waits else ""
            ready = None if waits else lane_id
            batch.tx.run(st.REOPEN, id=id, was=state, state=new, ready=ready, reason=reason)
            batch.moved(id, lane_id, state, new, reason="retry", who=who)
            batch.tx.run_rows(st.AGAIN_BELOW, [(id,)])
            batch.hold_dependents([(id, new)])

        self._act(run)
        self.asked_again += 1

    def set_reason(self, of: Job, reason: str) -> None:
        """Say what a running job waits for; soon, and kept."""
        self.writer.post(
            Act(lambda b: b.tx.run(st.SET_REASON, id=of.id, token=of.token, value=reason[:255]))
        )

    def set_progress(self, id: int, token: int, progress: dict[str, Any]) -> None:
        """Store how far a running job is; soon, and only the latest that is known then."""
        is_new = token not in self._progress
        self._progress[token] = progress_text(progress)
        if is_new:
            self.writer.post(Act(lambda batch: self._store_progress(batch, id, token)))

    def _store_progress(self, batch: Batch, id: int, token: int) -> None:
        text = self._progress.pop(token, None)
        if text is not None:
            batch.tx.run(st.SET_PROGRESS, id=id, token=token, value=text)

    def pause(self, queue: str, paused: bool) -> None:
        """Stop or resume the claims of a queue; survives a restart."""
        if not any(one.queue == queue for one in self.lanes.values()):
            raise NotFound(f"no queue {queue}")
        self._act(lambda batch: batch.tx.run(st.PAUSE, name=queue, paused=int(paused)))
        self._know(one._replace(paused=paused) for one in self.lanes.values() if one.queue == queue)

    # Chores

    def refresh(self) -> None:
        """Learn what other daemons on the same database have made and paused."""
        lanes = self._act(lambda batch: batch.tx.fetch(st.LANES))
        self._know(read_lane(*row) for row in lanes)

    def stage(self) -> list[int]:
        """Make claimable what has become due, at most CHUNK a transaction. Returns its lanes."""

        def run(batch: Batch) -> set[int]:
            due = batch.tx.fetch(st.DUE, now=batch.now)
            if due:
                batch.tx.run_rows(st.MAKE_READY, sorted((row[0],) for row in due))
            batch.forget_due(batch.tx.fetch(st.NEXT_DUE)[0][0])
            return {row[1] for row in due}

        return list(self._act(run))

    def beat(self) -> None:
        """Say that this daemon is alive, and renew its claims."""

        def run(batch: Batch) -> None:
            batch.tx.run(st.BEAT_NODE, owner=self.owner, now=batch.now)
            lease = batch.now + LEASE_S * 1_000_000
            batch.tx.run(st.BEAT_JOBS, owner=self.owner, lease=lease)

        self._act(run)

    def orphans(self) -> list[Job]:
        """Running jobs whose owner is dead for sure.

        These are jobs of earlier incarnations of this node on this machine, since the caller
        holds the node's lock; of owners that no node row names; with SQLite, of all others.
        """

        def run(batch: Batch) -> list[Job]:
            nodes = nodes_of(batch)
            return [
                one
                for (owner,) in batch.tx.fetch(st.OWNERS)
                if self._is_dead(owner, nodes)
                for one in running_of(batch, owner)
            ]

        return list(self._act(run))

    def _is_dead(self, owner: str, nodes: dict[str, list[str]]) -> bool:
        if owner == self.owner:
            return False
        known = nodes.get(owner)
        return known is None or not self.shared or known == [self.node_name, self.machine]

    def release_strays(self) -> list[int]:
        """Put back to the queue what is ours in the table only: claims whose commit was in doubt.

        Returns their lanes. No other transaction claims or ends anything meanwhile, so what is
        held then is known for sure, and so is what this one has claimed before.
        """

        def run(batch: Batch) -> list[int]:
            ours = self._held.union(batch.taken)
            found = [one for one in running_of(batch, self.owner) if one.token not in ours]
            self._requeue(batch, found, crashed=False)
            return [one.lane for one in found]

        lanes = list(self._act(run))
        self.released += len(lanes)
        return lanes

    def rescue(
        self,
        dead: Sequence[Job],
        then: Callable[[Job], Sequence[NewJob]],
        wish: Callable[[Job], Wish | None] = lambda job: None,
    ) -> int:
        """Put running jobs of dead owners back to the queue. Returns how many.

        One that has killed its daemon CRASH_LIMIT times is failed, with what `then` and `wish` say
        for it; a parent that only waited is not blamed.
        """
        count = 0
        for start in range(0, len(dead), st.CHUNK):
            part = sorted(dead[start : start + st.CHUNK])
            over = [one for one in part if crashes_of(one) >= CRASH_LIMIT]
            follow = [self._change(list(jobs)) for one in over if (jobs := then(one))]
            wishes = [found for one in over if (found := wish(one)) is not None]
            count += self._act(self._rescue_of(part, follow, wishes))
            self.crashed += len(over)
        self.rescued += count
        return count

    def _rescue_of(
        self, part: list[Job], follow: list[Submit], wishes: list[Wish]
    ) -> Callable[[Batch], int]:
        def run(batch: Batch) -> int:
            failed = self._requeue(batch, part, crashed=True)
            batch.insert(follow)
            batch.hold_dependents([(id, FAILED) for id in failed])
            batch.note_health(wishes)
            return len(part)

        return run

    def _requeue(self, batch: Batch, part: list[Job], *, crashed: bool) -> list[int]:
        """Back to the queue, or failed after too many crashes. Returns the ids of the failed."""
        values, failed = [], []
        for one in part:
            crashes = crashes_of(one) if crashed else one.crashes
            over = crashed and crashes >= CRASH_LIMIT
            if over:
                failed.append(one.id)
            state, reason, ready = (FAILED, "crashed", None) if over else (QUEUED, "", one.lane)
            ended_at = batch.now if over else None
            values.append((one.id, one.token, state, reason, ready, crashes, ended_at))
            cause = "crashed" if over else "interrupted" if crashed else "released"
            batch.moved(one.id, one.lane, RUNNING, state, reason=cause, attempt=one.attempt)
        if values and batch.tx.run_rows(st.REQUEUE_JOBS, values) != len(values):
            raise Replay("a job of a dead owner has changed meanwhile")
        return failed

    def tend_health(self, rules: Sequence[Rules]) -> None:
        """Tell what is due by the time alone; of several daemons one does."""
        if not rules:
            return
        self.lane(NOTIFY, NOTIFY)
        lanes: dict[str, list[int]] = {}
        for one in self.lanes.values():
            lanes.setdefault(one.type, []).append(one.id)
        self._act(lambda batch: batch.tend_health(rules, lanes))

    def forget_nodes(self, owners: Iterable[str]) -> None:
        """Remove rows of dead incarnations, once their jobs are taken back."""

        def run(batch: Batch) -> None:
            for owner in owners:
                batch.tx.run(st.DROP_NODE, owner=owner)

        self._act(run)

    def dead_nodes(self) -> list[str]:
        """Earlier incarnations of this node that have not left in good order."""
        nodes = self._act(nodes_of)
        return [id for id in nodes if self._is_dead(id, nodes)]

    def purge(self, state: str, before: int) -> int:
        """Delete at most CHUNK jobs of a final state that ended before a time, and their history.

        Kept are children of a parent that has not ended, and what others wait for.
        """

        def run(batch: Batch) -> int:
            old = batch.tx.fetch(st.OUTDATED, state=state, before=before)
            ids = sorted((row[0],) for row in old)
            if ids:
                for sql in (
                    st.DELETE_EVENTS,
                    st.DELETE_OUTPUTS,
                    st.DELETE_OWN_EDGES,
                    st.DELETE_JOBS,
                ):
                    batch.tx.run_rows(sql, ids)
                for _, lane_id in old:
                    batch.tally[lane_id, state] -= 1
            return len(ids)

        return int(self._act(run))


def read_lane(id: int, queue: str, type: str, paused: int) -> Lane:
    return Lane(id, queue, type, bool(paused))


def nodes_of(batch: Batch) -> dict[str, list[str]]:
    """The incarnations that are entered, with node and machine."""
    return {id: place for id, *place in batch.tx.fetch(st.NODES)}


def value_of(result: Any) -> Any:
    """A result of the writer, raised when it is an error."""
    if isinstance(result, RequestError):
        raise result
    return result


def one_row(batch: Batch, id: int) -> Any:
    found = batch.tx.fetch(st.ONE_JOB, id=id)
    if not found:
        raise NotFound(f"no job {id}")
    return found[0]


def running_of(batch: Batch, owner: str) -> list[Job]:
    """All that an incarnation runs, read a page at a time."""
    found: list[Job] = []
    page: list[Any] = [None]
    while page:
        above = found[-1].id if found else 0
        page = batch.tx.fetch(st.RUNNING_OF, owner=owner, above=above)
        for row in page:
            one = read_claimed(row[:-2], row[-2])
            attempt, starts = one.attempt - 1, one.starts - 1
            found.append(one._replace(reason=row[-1], attempt=attempt, starts=starts))
    return found
