"""Every change of a job's state: one method each.

A method makes a change, which is data, or for what is rare a function run inside the transaction
(`Act`); the writer puts the changes of all threads into one `Batch`. Reading is in `views`; what
follows an end is said by the caller.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from upq import alerts, when
from upq.batch import Act, Batch
from upq.changes import Claim, Finish, Submit, Want
from upq.clauses import CHUNK
from upq.db import Database
from upq.draws import Draw, Plan, Spent
from upq.errors import IsCancelled, NotFound, RequestError, Unavailable, WrongState
from upq.events import Bus
from upq.family import Goal
from upq.filling import Filling, fill
from upq.health import Rules, Wish
from upq.job import (
    CANCELLED,
    FINAL,
    QUEUED,
    RUNNING,
    STATES,
    Accepted,
    Gather,
    Gathered,
    Job,
    Lane,
    Limits,
    NewJob,
    Outcome,
    encode,
)
from upq.limits import (
    KEPT,
    LINE_CHARS,
    PACED,
    SHOWN_CHARS,
    pace_reason,
    turn_reason,
)
from upq.nodes import Node, forget, is_over, requeue, running_of, still_running
from upq.notify import NOTIFY
from upq.record import (
    clean,
    digest,
    progress_text,
    read_claimed,
    read_waiting,
)
from upq.sql import Tx
from upq.statements import jobs as st
from upq.vault import Vault
from upq.workflow import tie
from upq.writer import Writer

log = logging.getLogger(__name__)

#: Job ids reserved at a time; what is left of a block is lost only by a crash.
ID_BLOCK = 1000


#: What a bad end that no attempt has made calls for: jobs, and what a type's health is to note.
Follow = Callable[[Job], tuple[Sequence[NewJob], Wish | None]]


class Cancelled(NamedTuple):
    """What a cancel has come to."""

    #: CANCELLED, RUNNING for one that is asked to end, or how it had ended before.
    state: str
    #: How many below it had not ended.
    below: int


class Claims(Protocol):
    """Who claims, as far as the queue needs it."""

    #: Whether nothing is to be claimed for now.
    drained: bool

    def wake(self) -> None:
        """A job becomes due earlier than was known."""

    def book(self, lanes: set[int]) -> list[Want]:
        """Set free places aside for jobs of these lanes: (lane, how many), or a draw."""

    def plan(self, draw: Draw, queued: set[int]) -> Plan:
        """What to draw from, inside the transaction that does; these lanes have got new jobs."""

    def looked(self, again: set[int], spent: dict[str, Spent | None]) -> None:
        """These lanes may have more to claim; these types are at the end of a limit."""

    def settle(self, queued: set[int], booked: list[Want], jobs: list[Job]) -> None:
        """Take what was claimed for the places booked; these lanes have got new jobs."""

    def cancel(self, lane: Lane, token: int) -> None:
        """Ask a claimed job to end, if it is one of this daemon."""


class NoClaims:
    """Nobody claims here."""

    drained = False

    def wake(self) -> None:
        return

    def book(self, lanes: set[int]) -> list[Want]:
        return []

    def plan(self, draw: Draw, queued: set[int]) -> Plan:
        return Plan([])

    def looked(self, again: set[int], spent: dict[str, Spent | None]) -> None:
        return

    def settle(self, queued: set[int], booked: list[Want], jobs: list[Job]) -> None:
        return

    def cancel(self, lane: Lane, token: int) -> None:
        return


class Queue:
    """All changes of state, for one daemon. `open()` first; every method may be called anywhere."""

    def __init__(self, database: Database, bus: Bus, node_name: str, machine: str = "") -> None:
        self.database = database
        self.writer = Writer(database, self.apply)
        self.node_name = node_name
        #: Encrypts what is secret; without keys it leaves all as it is.
        self.vault = Vault()
        #: This incarnation: never reused, whatever pid or name.
        self.owner = uuid.uuid4().hex
        self._node = Node(self.owner, node_name, machine, self.shared)
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
        #: Whether there may be cancels that are not through; changed only in `note`.
        self.cancelling = False
        # When each of them was last gone on with; how many jobs claims have ended of each.
        self._cancels: dict[int, int] = {}
        self._caught = Counter[int]()
        # The latest progress of each claim that is not stored yet; each is posted once.
        self._progress: dict[int, str] = {}
        self._progress_lock = threading.Lock()
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

        def enter(batch: Batch) -> None:
            for name in ("job", "event"):
                if not batch.tx.fetch(st.FIND_COUNTER, name=name):
                    batch.tx.run(st.ADD_COUNTER, name=name)
            self._node.enter(batch)
            learn(batch)

        self.act(enter)
        self.stage()

    def close(self) -> None:
        """Give back the ids not used and this node's row. The last change of all."""

        with self._ids_lock:
            # A thread that does not end may want ids still: from here on those of a new block.
            first, last = self._next_id, self._end_id
            self._next_id = last

        def leave(batch: Batch) -> None:
            # With no block reserved this matches no row: no counter is below 0.
            batch.tx.run(st.GIVE_BACK_IDS, first=first - 1, last=last - 1)
            forget(batch, [self.owner])

        self.act(leave)
        self.writer.close()

    @property
    def shared(self) -> bool:
        """Whether other daemons may work on the same database."""
        return self.database.kind != "sqlite"

    @property
    def holds_claims(self) -> bool:
        """Whether there are claims of this daemon whose ends are not committed."""
        return bool(self._held)

    def apply(self, tx: Tx, changes: Sequence[Any]) -> Batch:
        """What the writer calls, inside its transaction."""
        batch = Batch(tx, when.now(), self)
        try:
            batch.run(changes)
        except BaseException:
            batch.failed()
            raise
        return batch

    def book(self, lanes: set[int]) -> list[Want]:
        return self.claims.book(lanes)

    def is_held(self, lane_id: int) -> bool:
        return self.claims.drained or self.lanes[lane_id].paused

    def plan(self, draw: Draw, queued: set[int]) -> Plan:
        return self.claims.plan(draw, queued)

    def note(self, batch: Batch, committed: bool) -> None:
        """Hear how a batch has ended, in the thread that led it, before the next one begins."""
        if batch.drawn or batch.again:
            self.claims.looked(*((batch.again, batch.spent) if committed else (batch.drawn, {})))
        if not committed:
            self.claims.settle(set(), batch.booked, [])
            return
        if batch.lanes:
            self._know(batch.lanes)
        self.fenced += batch.fenced
        self.interrupted += batch.given_back
        self.retried += batch.retried
        self.truncated += batch.truncated
        self.started += len(batch.taken)
        self.started_again += len(batch.taken) - batch.first_starts
        self.crashed += batch.crashed
        self._held.update(batch.taken)
        self._held.difference_update(batch.ended)
        self.cancelling = batch.family.cancelling
        if batch.family.caught:
            self._caught.update(batch.family.caught)
            self.claims.wake()
        self._post_cancels(batch.left)
        known = None if batch.due_is_all else self.next_due
        self.next_due = min((at for at in (known, batch.due) if at is not None), default=None)
        if batch.due is not None and self.next_due != known:
            self.claims.wake()
        if batch.events:
            queued = {event.lane for event in batch.events if event.state == QUEUED}
            claimed = [read_claimed(*claim, self.vault) for claim in batch.claimed]
            self.claims.settle(queued, batch.booked, claimed)
            self._bus.publish(batch.events)

    def act(self, run: Callable[[Batch], Any]) -> Any:
        """Run a rare change in a transaction; what it returns or raises goes to the caller."""
        return value_of(self.writer.run([Act(run)])[0])

    def _know(self, lanes: Iterable[Lane]) -> None:
        """Take over what a batch has made or read: in `note`, so in the order of the commits."""
        self.lanes = {**self.lanes, **{one.id: one for one in lanes}}
        self._by_name = {(one.queue, one.type): one for one in self.lanes.values()}

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
            made = read_lane(there[0][0], queue, type, paused)
            batch.lanes.append(made)
            return made

        made: Lane
        try:
            made = self.act(make)
        except Unavailable:
            # Another daemon made it at the same moment; a second look finds it.
            made = self.act(make)
        return made

    def take_ids(self, k: int) -> int | None:
        """The first of k job ids in a row that are reserved already; None when there are none."""
        with self._ids_lock:
            if self._next_id + k > self._end_id:
                return None
            self._next_id += k
            return self._next_id - k

    def number_events(self, batch: Batch, k: int) -> int:
        """The first of k new numbers of events.

        Where daemons share a database it keeps the count. SQLite has one writer, which does, and
        saves a page of each commit.
        """
        if self.shared:
            return batch.numbers("event", k)
        last = self.database.last_event
        if last is None:
            last = int(batch.tx.fetch(st.LAST_EVENT)[0][0])
        self.database.last_event = last + k
        return last + 1

    def reserve_ids(self, k: int) -> int:
        """The first of k job ids in a row."""
        first = self.take_ids(k)
        if first is not None:
            return first
        size = max(k, ID_BLOCK)
        block = int(self.act(lambda batch: batch.numbers("job", size)))
        with self._ids_lock:
            if block < self._end_id:
                # Another thread was given a later block and is here first. What is left of this
                # one is lost: who takes an id after another has to get a larger one.
                return block
            first = self._next_id if block == self._end_id else block
            self._next_id, self._end_id = first + k, block + size
            return first

    def _skip_ids(self) -> None:
        """Have the next id come from a new block."""
        with self._ids_lock:
            self._next_id = self._end_id

    # Submit

    def submit(self, batches: Sequence[Sequence[NewJob]]) -> list[list[Accepted] | RequestError]:
        """Queue jobs; those of one inner sequence all or none. Returns when they are on disk.

        Raises Unavailable or Uncertain for all. Returns in the order given.
        """
        changes = [self.change(jobs) for jobs in batches]
        return self.writer.run(changes)

    def fill(self, members: Sequence[NewJob], how: Gather) -> Gathered:
        """Queue members of a batch, all or none, with its follow-up if it is new; on disk then.

        Raises what a submit does; NotFound and WrongState where nothing can be added.
        """
        is_new = how.then is not None
        jobs = [*members, *([how.then] if how.then else [])]
        first = self._first_id(jobs)
        # It is older than its members, and goes before them when it can go.
        id = first if is_new else how.id
        now = when.now()
        rows = []
        for i, one in enumerate(members, first + is_new):
            one.parent = one.root = id
            row = self.row(one, i, now)
            row[st.AT["ord"]] = i  # the batch may be old: they go before nobody
            rows.append(row)
        if how.then is not None:
            rows.append(self.row(how.then, id, now))
        submit = self._submit_of(jobs, rows)
        filling = Filling(submit, id, is_new, how.when, how.open, self.vault)
        act = Act(lambda batch: fill(batch, filling), submit.size_bytes)
        filled: Gathered = value_of(self.writer.run([act])[0])
        return filled

    def change(self, jobs: Sequence[NewJob]) -> Submit:
        """Jobs to queue, all or none: as rows, with their ids, in lanes that are there."""
        now = when.now()
        first = self._first_id(jobs)
        if len(jobs) > 1 and any(one.joins for one in jobs):
            tie(jobs, first)
        return self._submit_of(jobs, [self.row(one, first + i, now) for i, one in enumerate(jobs)])

    def _submit_of(self, jobs: Sequence[NewJob], made: list[list[Any]]) -> Submit:
        limits = [one.limits for one in jobs] if any(one.limits for one in jobs) else None
        return Submit(made, [one.after for one in jobs], jobs[0].submitter if jobs else "", limits)

    def _first_id(self, jobs: Sequence[NewJob]) -> int:
        """The first of the ids in a row that these jobs get."""
        first = self.reserve_ids(len(jobs))
        if self.shared and any(max(one.after, default=0) >= first for one in jobs):
            # Another daemon's ids are ahead. A job has a larger one than all it waits for, or the
            # jobs of a line could wait for each other.
            self._skip_ids()
            first = self.reserve_ids(len(jobs))
        return first

    def row(self, new: NewJob, id: int, now: int) -> list[Any]:
        """A job as it is inserted."""
        queue = new.queue or new.type
        lane_id = self.lane(queue, new.type).id
        due = new.run_at if new.run_at is not None and new.run_at > now else None
        root = id if new.root is None else new.root
        row = [
            id, lane_id, new.type, queue, lane_id if due is None else None, -new.priority, root,
            QUEUED, "", self.vault.encode(new.params), encode(new.options) if new.options else None,
            new.run_at, due, digest(new.type, new.key) if new.key else None, 0, new.parent, root,
            new.child_key, new.submitter, now,
        ]  # fmt: skip
        if new.limits is not None:
            self._limit(row, new, new.limits, now)
        return row

    def _limit(self, row: list[Any], new: NewJob, limits: Limits, now: int) -> None:
        """Have a row say what limits its job has."""
        left: dict[str, Any] = {}
        unique = line = until = None
        if limits.unique:
            unique = left["unique"] = digest("unique", new.type, limits.unique)
            if limits.until_start:
                left["until_start"] = True
            until = now + limits.unique_us if limits.unique_us else None
        if limits.serial:
            line = left["line"] = digest("serial", limits.serial)[:LINE_CHARS]
            left["serial"] = limits.serial[:SHOWN_CHARS]
            row[st.AT["ready"]] = row[st.AT["due_at"]] = None
            row[st.AT["reason"]] = turn_reason(left)
        if limits.paced:
            key = left["paced"] = (PACED + digest("paced", new.type, limits.paced))[:LINE_CHARS]
            left["pace"], left["every_us"] = limits.pace[:SHOWN_CHARS], limits.every_us
            if row[st.AT["due_at"]] is None:  # else it comes to its line when it is due
                line = key
                row[st.AT["ready"]], row[st.AT["reason"]] = None, pace_reason(left)
        if limits.expires_at is not None:
            left["expires_at"] = limits.expires_at
        if left:
            row[st.AT["options"]] = encode({**new.options, KEPT: left})
        row += [limits.expires_at, unique, until, line]

    # Claim and end

    def claim(self, wants: Sequence[Want]) -> list[Job]:
        """Make running what can be claimed: at most n jobs of each (lane, n). One transaction.

        Commits what was posted, too, and with nothing wanted only that.
        """
        if not wants:
            self.writer.run([])
            return []
        claimed = value_of(self.writer.run([Claim(list(wants))])[0])
        return [read_claimed(row, token, now, self.vault) for row, token, now in claimed]

    def finish(
        self,
        ended: Job,
        outcome: Outcome,
        then: Sequence[NewJob] = (),
        told: Callable[[bool], None] | None = None,
        *,
        wish: Wish | None = None,
        refused: Callable[[Exception], None] | None = None,
    ) -> None:
        """End one attempt, with what follows it, in one transaction; kept through any outage.

        Returns at once. `told` hears after the commit whether the claim was still ours; what a
        lost claim has done is not written. `wish` is for a type that is told of by its health.
        `refused` hears that the database does not take this end; without it the job is failed.
        Raises ValueError when the result is no JSON.
        """
        outcome.message, outcome.reason = clean(outcome.message), clean(outcome.reason)
        if outcome.output is not None:
            outcome.output = outcome.output._replace(text=clean(outcome.output.text))
        kept = result = None
        if outcome.result is not None:
            result = self.vault.encode(outcome.result, ended.params, ended.data)
        if outcome.data is not None and outcome.data != ended.data:
            kept = self.vault.encode(outcome.data, ended.params, ended.data)
        self.writer.post(
            Finish(
                ended,
                outcome,
                result,
                kept,
                None if outcome.progress is None else progress_text(outcome.progress),
                self.change(then) if then else None,
                told,
                wish,
                refused,
            )
        )

    # Rare changes

    def cancel(self, id: int, who: str) -> Cancelled:
        """End a job that waits, ask one that runs to end; and so all that is below it.

        CHUNK a transaction, the job first: after that nothing more begins below it. Should this
        daemon die, another one, or the next, goes on. Raises WrongState when all has ended already.
        """

        def begin(batch: Batch) -> tuple[str, int, int | None]:
            states = batch.family.cancel([id], who, text)
            if not states:
                raise NotFound(f"no job {id}")
            return states[id], *batch.family.cancel_below(Goal([id], (), who, text))

        text = f"cancelled by {who}"
        was, n, cancel = self.act(begin)
        n += self._go_on(cancel)
        if was in FINAL and not n:
            raise WrongState(f"job {id} is {was} already")
        return Cancelled(was if was in FINAL or was == RUNNING else CANCELLED, n)

    def cancel_many(self, ids: Sequence[int], who: str) -> tuple[list[int], int]:
        """The same for at most CHUNK jobs: those that had not ended, and how many below them."""

        def begin(batch: Batch) -> tuple[dict[int, str], int, int | None]:
            states = batch.family.cancel(ids, who, text)
            return states, *batch.family.cancel_below(Goal(ids, (), who, text))

        text = f"cancelled by {who}"
        states, n, cancel = self.act(begin)
        n += self._go_on(cancel)
        return [id for id, state in states.items() if state not in FINAL], n

    def _go_on(self, cancel: int | None) -> int:
        """Bring a cancel to its end, in as many transactions as it takes; how many jobs it ends."""
        if cancel is None:
            return 0
        n, is_over = 0, False
        while not is_over:
            more, is_over = self.act(lambda batch: batch.family.go_on(cancel))
            n += more
        return n + self._caught.pop(cancel, 0)

    def _post_cancels(self, cancels: Iterable[int]) -> None:
        for cancel in cancels:
            self.writer.post(Act(partial(Batch.go_on, cancel=cancel)))

    def tend_cancels(self, *, at_once: bool = False) -> None:
        """Have cancels gone on with that have come to a stand: nothing has been done for them since
        the last call. At once: all there are.
        """
        before, self._cancels = self._cancels, self.act(lambda batch: batch.family.steps())
        # Who waits for one has heard of its end long ago.
        for id in set(self._caught) - before.keys() - self._cancels.keys():
            del self._caught[id]
        still = self._cancels.items() & before.items()
        self._post_cancels(self._cancels if at_once else [id for id, _ in still])

    def end_running(self, asked: Sequence[tuple[int, int]]) -> None:
        for lane_id, token in asked:
            if (lane := self.lanes.get(lane_id)) is not None:
                self.claims.cancel(lane, token)

    def retry(self, id: int, who: str, parent: int | None = None) -> None:
        """Make a queued job of one that has ended badly. Raises KeyTaken, when it is not alone.

        parent: who asks for it, as its child. Raises IsCancelled when that is to end.
        """

        def run(batch: Batch) -> None:
            if parent is not None and batch.family.closed([parent]):
                raise IsCancelled(f"job {parent} is cancelled: nothing below it runs again")
            batch.family.retry([id], who, alone=True)

        self.act(run) if parent is not None else self._after_cancels([id], run)
        self.asked_again += 1

    def _after_cancels(self, ids: Sequence[int], run: Callable[[Batch], Any]) -> Any:
        """Change jobs when no cancel is under way in their trees, which would undo it."""

        def look(batch: Batch) -> tuple[list[int], Any]:
            cancels = batch.family.cancels_of(ids)
            return cancels, None if cancels else run(batch)

        while True:
            cancels, found = self.act(look)
            if not cancels:
                return found
            for cancel in cancels:
                self._go_on(cancel)

    def check_repeat(self, parent: int, holder: int) -> None:
        """Raises WrongState when a child of `parent` cannot be this job, which waits for it."""
        self.act(lambda batch: batch.limiter.check_repeat(parent, holder))

    def retry_many(self, ids: Sequence[int], who: str) -> list[int]:
        """The same for at most CHUNK jobs; left out are those that are queued again meanwhile."""
        changed = list(self._after_cancels(ids, lambda batch: batch.family.retry(ids, who)))
        self.asked_again += len(changed)
        return changed

    def set_reason(self, of: Job, reason: str) -> None:
        """Say what a running job waits for; soon, and kept."""
        self.writer.post(
            Act(lambda b: b.tx.run(st.SET_REASON, id=of.id, token=of.token, value=reason[:255]))
        )

    def keep_step(self, of: Job, key: str, name: str, result: Any) -> None:
        """Store what a step of a running job has returned; to repeat that does no harm.

        Raises WrongState when another claim owns the job.
        """
        text = self.vault.encode(result, of.params, of.data)

        def run(batch: Batch) -> None:
            if not batch.tx.fetch(st.LOCK_CLAIM, id=of.id, token=of.token):
                raise WrongState(f"job {of.id}: another claim owns it, step {name} is not kept")
            if not batch.tx.fetch(st.FIND_STEP, job=of.id, key=key):
                batch.tx.run(st.ADD_STEP, job=of.id, key=key, name=clean(name)[:255], result=text,
                             now=batch.now)  # fmt: skip

        value_of(self.writer.run([Act(run, len(text))])[0])

    def set_progress(self, id: int, token: int, progress: dict[str, Any]) -> None:
        """Store how far a running job is; soon, and only the latest that is known then."""
        text = progress_text(progress)
        with self._progress_lock:
            is_new = token not in self._progress
            self._progress[token] = text
        if is_new:
            self.writer.post(Act(lambda batch: self._store_progress(batch, id, token)))

    def _store_progress(self, batch: Batch, id: int, token: int) -> None:
        with self._progress_lock:
            text = self._progress.pop(token, None)
        if text is not None:
            batch.tx.run(st.SET_PROGRESS, id=id, token=token, value=text)

    def pause(self, queue: str, paused: bool) -> None:
        """Stop or resume the claims of a queue; survives a restart."""
        if not any(one.queue == queue for one in self.lanes.values()):
            raise NotFound(f"no job has gone to queue {queue} yet")

        def run(batch: Batch) -> None:
            batch.tx.run(st.PAUSE, name=queue, paused=int(paused))
            learn(batch)

        self.act(run)

    # Chores

    def refresh(self) -> None:
        """Learn what other daemons on the same database have made and paused, and whether they are
        cancelling.
        """
        self.act(learn)

    def laden(self) -> set[int]:
        """Lanes in which something is queued."""
        return {row[0] for row in self.act(lambda batch: batch.tx.fetch(st.LADEN_LANES))}

    def asked_to_end(self) -> list[tuple[int, int]]:
        """Running jobs of this daemon that were cancelled, maybe by way of another: lane, token."""
        rows = self.act(lambda batch: batch.tx.fetch(st.ASKED_TO_END, owner=self.owner))
        return [(lane_id, token) for lane_id, token in rows]

    def stage(self) -> list[int]:
        """Make claimable what has become due, at most CHUNK a transaction. Returns its lanes."""

        def run(batch: Batch) -> set[int]:
            due = batch.tx.fetch(st.DUE, now=batch.now)
            if due:
                batch.tx.run_rows(st.MAKE_READY, sorted((row[0],) for row in due))
            following = batch.tx.fetch(st.NEXT_DUE)[0]
            batch.forget_due(min((at for at in following if at is not None), default=None))
            return {row[1] for row in due}

        return list(self.act(run))

    def expire(self, then: Follow) -> set[int]:
        """End what has not started in time and what is below it, with what `then` says for it.

        Returns its lanes.
        """
        rows = self.act(lambda batch: batch.tx.fetch(st.OVERDUE, now=batch.now))
        overdue = [read_waiting(row, self.vault) for row in rows]
        after = {one.id: then(one) for one in overdue}
        follow = {id: self.change(jobs) for id, (jobs, _) in after.items() if jobs}

        def run(batch: Batch) -> set[int]:
            ended = batch.limiter.expire(one.id for one in overdue)
            submits = [follow[id] for id, _ in ended if id in follow]
            batch.follow(submits)
            told = {row[0] for one in submits for row in one.rows}
            batch.cancel_below((id for id, _ in ended), spared=told)
            alerts.note(batch, [w for id, _ in ended if (w := after[id][1]) is not None])
            return {lane_id for _, lane_id in ended}

        return set(self.act(run)) if overdue else set()

    def mend_lines(self) -> None:
        """Have lines go on that have come to a stand: nothing upq does leaves one.

        Starts of keys with a rate are forgotten when they lie more than an interval back.
        """
        self.act(lambda batch: batch.limiter.mend())

    def beat(self) -> None:
        """Say that this daemon is alive, and renew its claims."""
        self.act(self._node.beat)

    def orphans(self) -> list[Job]:
        """Running jobs whose owner is dead for sure."""
        return list(self.act(lambda batch: self._node.orphans(batch, self.vault)))

    def release_strays(self) -> list[int]:
        """Put back to the queue what is ours in the table only: claims whose commit was in doubt.

        Returns their lanes. No other transaction claims or ends anything meanwhile, so what is
        held then is known for sure, and so is what this one has claimed before.
        """

        def run(batch: Batch) -> list[int]:
            ours = self._held.union(batch.taken)
            mine = running_of(batch, self.owner, self.vault)
            found = [one for one in mine if one.token not in ours]
            requeue(batch, found, crashed=False)
            return [one.lane for one in found]

        lanes = list(self.act(run))
        self.released += len(lanes)
        return lanes

    def rescue(self, dead: Sequence[Job], then: Follow) -> int:
        """Put running jobs of dead owners back to the queue, but for those whose ends came through
        all the same, or whom another daemon has put back. Returns how many.

        One that has killed its daemon CRASH_LIMIT times is failed, with what `then` says for it; a
        parent that only waited is not blamed. One that was to end is cancelled.
        """
        count = 0
        for start in range(0, len(dead), CHUNK):
            part = sorted(dead[start : start + CHUNK])
            after = {one.id: then(one) for one in part if is_over(one)}
            follow = {id: self.change(jobs) for id, (jobs, _) in after.items() if jobs}
            wishes = {id: wish for id, (_, wish) in after.items() if wish is not None}
            rescued = self.act(self._rescue_of(part, follow, wishes))
            count += len(rescued)
            self.crashed += len(rescued & after.keys())
        self.rescued += count
        return count

    def _rescue_of(
        self, part: list[Job], follow: dict[int, Submit], wishes: dict[int, Wish]
    ) -> Callable[[Batch], set[int]]:
        def run(batch: Batch) -> set[int]:
            left = still_running(batch, part)
            requeue(batch, left, crashed=True)
            submits = [follow[one.id] for one in left if one.id in follow]
            batch.follow(submits, [one.id for one in left if one.cancel_asked])
            alerts.note(batch, [wishes[one.id] for one in left if one.id in wishes])
            return {one.id for one in left}

        return run

    def tend_health(self, rules: Sequence[Rules]) -> None:
        """Tell what is due by the time alone; of several daemons one does."""
        if not rules:
            return
        self.lane(NOTIFY, NOTIFY)
        lanes: dict[str, list[int]] = {}
        for one in self.lanes.values():
            lanes.setdefault(one.type, []).append(one.id)
        self.act(lambda batch: alerts.tend(batch, rules, lanes))

    def forget_nodes(self, owners: Iterable[str]) -> None:
        """Remove rows of dead incarnations, once their jobs are taken back."""
        self.act(lambda batch: forget(batch, owners))

    def dead_nodes(self) -> list[str]:
        """Earlier incarnations of this node that have not left in good order."""
        return list(self.act(self._node.dead))


def learn(batch: Batch) -> None:
    """Read the lanes, and whether somebody is cancelling."""
    batch.family.under_way()
    batch.lanes = [read_lane(*row) for row in batch.tx.fetch(st.LANES)]


def read_lane(id: int, queue: str, type: str, paused: int) -> Lane:
    return Lane(id, queue, type, bool(paused))


def value_of(result: Any) -> Any:
    """A result of the writer, raised when it is an error."""
    if isinstance(result, RequestError):
        raise result
    return result
