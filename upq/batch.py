"""One transaction of changes: each kind is one statement over all its rows, fenced.

The methods run inside the writer's transaction, in whatever thread leads it. Who makes the changes
is `queue`.
"""

from __future__ import annotations

import logging
import os
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from upq import alerts, dependents
from upq import log as logs
from upq.changes import CHILD_KEY, IDEM_KEY, Claim, Finish, Submit, Want
from upq.drawing import rows_for
from upq.draws import Draw, Plan, Spent
from upq.errors import IsCancelled, KeyConflict, NotFound, RequestError
from upq.events import Event
from upq.family import Family, Goal
from upq.job import (
    CANCELLED,
    DONE,
    FAILED,
    FINAL,
    QUEUED,
    RUNNING,
    TIMEOUT,
    Accepted,
    Lane,
    Limits,
    NewJob,
)
from upq.joins import Joins, after_reason, block, branches_of, waits_reason
from upq.limits import Limiter, has_limits, is_paced, kept
from upq.members import Members
from upq.sql import Sql, Tx
from upq.statements import jobs as st
from upq.statements.family import AGAIN_BELOW
from upq.statements.waits import INSERT_EDGES
from upq.vault import Vault
from upq.workflow import JOIN, option
from upq.writer import Replay

log = logging.getLogger(__name__)

#: Seconds a claim holds without being renewed.
LEASE_S = 30
#: Characters of a message kept in the history; the job's row has all of it.
EVENT_MESSAGE = 4000


@dataclass(slots=True)
class Act:
    """A rare change: a function run inside the transaction.

    It may raise a RequestError before it has changed anything.
    """

    run: Callable[[Batch], Any]
    size_bytes: int = 0

    def instead(self, error: Exception) -> None:
        return None


class Home(Protocol):
    """What a batch needs of the queue it is for."""

    owner: str
    node_name: str
    vault: Vault
    #: Whether there may be cancels that are not through.
    cancelling: bool

    @property
    def shared(self) -> bool:
        """Whether other daemons may work on the same database."""

    def book(self, lanes: set[int]) -> list[Want]:
        """Places that jobs just queued in these lanes may take at once: (lane, how many)."""

    def is_held(self, lane_id: int) -> bool:
        """Whether nothing of a lane is to be claimed now."""

    def plan(self, draw: Draw, queued: set[int]) -> Plan:
        """What to draw from now, when these lanes have just got jobs."""

    def take_ids(self, k: int) -> int | None:
        """The first of k job ids that are reserved; None when so many are not."""

    def number_events(self, batch: Batch, k: int) -> int:
        """The first of k new numbers of events, above those of all commits before."""

    def row(self, new: NewJob, id: int, now: int) -> list[Any]:
        """A job as it is inserted; its lane has to be there already."""

    def note(self, batch: Batch, committed: bool) -> None:
        """Hear how the batch has ended."""

    def end_running(self, asked: Sequence[tuple[int, int]]) -> None:
        """Ask jobs that run here to end: lane and token of each; others run elsewhere."""


class Batch:
    """One transaction: what is done in it, and what is told once it is committed."""

    def __init__(self, tx: Tx, now: int, home: Home) -> None:
        self.tx = tx
        self.now = now
        self._home = home
        self.node = home.node_name
        self.results: list[Any] = []
        self.events: list[Event] = []
        self.tally: Counter[tuple[int, str]] = Counter()
        #: The earliest time that a job of this batch becomes due.
        self.due: int | None = None
        #: True when no job outside this batch becomes due before.
        self.due_is_all = False
        #: Tokens of the claims made and ended here, and how many jobs were never claimed before.
        self.taken: list[int] = []
        self.first_starts = 0
        self.ended: list[int] = []
        #: Ends refused because another claim owns the job; for the others see `Queue`.
        self.fenced = self.given_back = self.retried = self.truncated = self.crashed = 0
        #: Places booked for jobs that this batch has queued, and what was claimed for them.
        self.booked: list[Want] = []
        self.claimed: list[tuple[Any, int, int]] = []
        #: Lanes that were drawn from, and all that were claimed from and may have more.
        self.drawn: set[int] = set()
        self.again: set[int] = set()
        #: By type, of those with limits: what keeps the next one from starting.
        self.spent: dict[str, Spent | None] = {}
        #: Lanes as they were made or read here; the last of each counts.
        self.lanes: list[Lane] = []
        #: Lane and token of running jobs that are asked to end here.
        self.asked: list[tuple[int, int]] = []
        #: Cancels that the next batches have to go on with, unasked.
        self.left: list[int] = []
        self._told: list[tuple[Callable[[bool], None], bool]] = []
        self.joins = Joins(tx, home.vault)
        self._first = 0
        self._limiter: Limiter | None = None
        self.family = Family(self, home.cancelling)
        self.members = Members(tx, home.vault)

    @property
    def limiter(self) -> Limiter:
        """What this batch does for jobs that have limits; made when it meets the first."""
        if self._limiter is None:
            self._limiter = Limiter(self)
        return self._limiter

    def run(self, changes: Sequence[Any]) -> None:
        """All the changes, each with its result. Raises Replay when they do not fit together."""
        done: dict[int, Any] = {}
        finishes = [one for one in changes if type(one) is Finish]
        if finishes:
            done.update(zip(map(id, finishes), self._finish(finishes), strict=True))
        submits = [one for one in changes if type(one) is Submit]
        if submits:
            done.update(zip(map(id, submits), self.insert(submits), strict=True))
        for one in changes:
            if type(one) is Act:
                try:
                    done[id(one)] = one.run(self)
                except RequestError as error:
                    done[id(one)] = error
            elif type(one) is Claim:
                done[id(one)] = self._claim(one.wants)
        if self._limiter is not None:
            self._limiter.settle()
        self._claim_at_once()
        if self._limiter is not None:
            self._limiter.settle()
        self._settle()
        self.results = [done[id(one)] for one in changes]

    def note_due(self, at: int | None) -> None:
        if at is not None and (self.due is None or at < self.due):
            self.due = at

    def forget_due(self, next_at: int | None) -> None:
        """What was due is woken: the next is at this time, in the whole store."""
        self.due, self.due_is_all = next_at, True

    def moved(
        self, id: int, lane_id: int, was: str | None, state: str, *, reason: str = "",
        message: str = "", attempt: int = 0, who: str = "",
    ) -> None:  # fmt: skip
        """Note one change of state: an event, and the lane's counts."""
        self.events.append(
            Event(id, lane_id, self.now, state, reason, message, attempt, self.node, who)
        )
        if was is not None:
            self.tally[lane_id, was] -= 1
        self.tally[lane_id, state] += 1

    def _settle(self) -> None:
        """The counts, and last of all the numbers and rows of the events.

        Numbers are taken just before the commit, so that their order is the order of the commits.
        """
        self.change_tally()
        if self.events:
            self._first = self._home.number_events(self, len(self.events))
            self.tx.run_rows(
                st.INSERT_EVENTS,
                [
                    (n, *e[:5], e.message[:EVENT_MESSAGE] or None, *e[6:])
                    for n, e in enumerate(self.events, self._first)
                ],
            )

    def change_tally(self) -> None:
        """Write what was counted so far."""
        changed = sorted((lane_id, state, n) for (lane_id, state), n in self.tally.items() if n)
        if changed:
            self.tx.run_rows(st.CHANGE_TALLY, changed)
        self.tally.clear()
        if self._limiter is not None:
            self._limiter.recount()

    def numbers(self, name: str, k: int) -> int:
        """The first of k new numbers of a counter."""
        self.tx.run(st.TAKE_NUMBERS, name=name, k=k)
        if self.tx.dialect.name in ("mysql", "mariadb"):
            last = self.tx.cursor.lastrowid
        else:
            last = self.tx.cursor.fetchone()[0]
        return int(last) - k + 1

    def proof(self) -> tuple[Sql, dict[str, Any]] | None:
        if not self.events:
            return None
        return st.PROOF, {"n": self._first, "job": self.events[0].job, "at": self.events[0].at}

    def committed(self) -> None:
        self._home.note(self, committed=True)

    def tell(self) -> None:
        if self._told:
            with logs.together():
                for told, accepted in self._told:
                    told(accepted)
        if self.asked:
            self._home.end_running(self.asked)

    def failed(self) -> None:
        """The transaction was rolled back, or nobody knows."""
        self._home.note(self, committed=False)

    # The changes of a transaction

    def insert(self, submits: Sequence[Submit], *, follow: bool = False) -> list[Any]:
        """The new jobs, each submit's all or none. Without `follow`, what is to come below a
        cancelled job is refused.
        """
        known = self.known_keys(submits)
        if known:
            known = self.hold((one for one in submits if one.binds), known)
        closed = set() if follow else self.family.closed(parents_of(submits))
        results: list[Any] = []
        fresh: list[list[Any]] = []
        edges: list[tuple[int, int]] = []
        for one in submits:
            if fresh and one.limits is not None and one.rows[0][CHILD_KEY] is not None:
                # Its check looks at who waits for whom, in the tables.
                self.store(fresh, edges)
                fresh, edges = [], []
            try:
                if closed:
                    refuse_below(one, closed)
                accepted, new, new_edges = self.accept(one, known)
            except RequestError as error:
                results.append(error)
                continue
            results.append(accepted)
            if one.limits is not None:
                self._keep_repeats(one, accepted, known)
            fresh += new
            edges += new_edges
            self.note_new(new, one.who)
            if one.replaces:
                self.store(fresh, edges)
                fresh, edges = [], []
                self.replace(one, new)
        self.store(fresh, edges)
        self._heed_met()
        return results

    def _keep_repeats(
        self, one: Submit, accepted: list[Accepted], known: Mapping[str, tuple[int, str]]
    ) -> None:
        """Keep what children are that another job stands in for (unique): as steps of the parent,
        which finds them when it runs again.
        """
        for row, new in zip(one.rows, accepted, strict=True):
            key = row[CHILD_KEY]
            if key is not None and new.duplicate and key not in known:
                parent = row[st.AT["parent"]]
                self.tx.run(st.DROP_STEP, job=parent, key=key)
                self.tx.run(st.ADD_STEP, job=parent, key=key, name=row[st.AT["type"]],
                            result=str(new.id), now=self.now)  # fmt: skip

    def note_new(self, new: list[list[Any]], who: str) -> None:
        """These jobs are queued: events, and what becomes of them by the time alone."""
        for row in new:
            state, reason = row[st.AT["state"]], row[st.AT["reason"]]
            self.moved(row[0], row[1], None, state, reason=reason, who=who)
            self.note_due(row[st.AT["due_at"]])
            if len(row) > st.PLAIN:
                self.note_due(row[st.AT["expires_at"]])
                if (line := row[st.AT["serial_key"]]) is not None:
                    self.limiter.came(row[0], line)

    def replace(self, one: Submit, new: list[list[Any]], members: Collection[int] = ()) -> None:
        """Have the jobs of a submit that are new, and inserted, take the place of others, below
        which all is cancelled but these and what the new ones wait for: members of a batch.
        """
        replaced = self.limiter.replace(new, self._limits_of(one, new), one.who)
        self.cancel_below(replaced, spared={*members, *(row[0] for row in new)})

    def follow(self, submits: Sequence[Submit], cancelled: Iterable[int] = ()) -> None:
        """Insert what ends bring about. Some of it is cancelled at once: see `_close_below`."""
        self.insert(submits, follow=True)
        self._close_below(submits, cancelled)

    def _close_below(self, submits: Sequence[Submit], cancelled: Iterable[int] = ()) -> None:
        """Cancel what has not ended below cancelled jobs, and below those of these submits that
        somebody wants to end.
        """
        over = self.family.closed(parents_of(submits)).union(cancelled)
        self.cancel_below(over)

    def cancel_below(self, ids: Iterable[int], spared: Iterable[int] = ()) -> None:
        """Cancel what has not ended below these jobs; what is too much is left for later."""
        jobs = sorted(ids)
        if jobs:
            text = "cancelled with the job above it"
            _, cancel = self.family.cancel_below(Goal(jobs, sorted(spared), "", text))
            if cancel is not None:
                self.left.append(cancel)

    def go_on(self, cancel: int) -> None:
        """The next step of a cancel that nobody waits for."""
        _, is_over = self.family.go_on(cancel)
        if not is_over:
            self.left.append(cancel)

    def queue(self, new: Sequence[NewJob]) -> None:
        """Insert jobs that nobody has asked for: they tell of something."""
        taken = self._home.take_ids(len(new))
        first = self.numbers("job", len(new)) if taken is None else taken
        rows = [self._home.row(job, id, self.now) for id, job in enumerate(new, first)]
        self.insert([Submit(rows, [()] * len(rows), "")])

    def store(self, fresh: list[list[Any]], edges: list[tuple[int, int]]) -> None:
        plain = [row for row in fresh if len(row) == st.PLAIN]
        if plain:
            self.tx.run_rows(st.INSERT_JOBS, plain)
        if len(plain) < len(fresh):
            limited = [row for row in fresh if len(row) > st.PLAIN]
            self.tx.run_rows(st.INSERT_LIMITED, limited)
        if edges:
            self.tx.run_rows(INSERT_EDGES, edges)
        if self._limiter is not None:
            self._limiter.inserted()

    @staticmethod
    def _limits_of(one: Submit, new: list[list[Any]]) -> list[Limits | None]:
        """The limits of those of a submit's jobs that are new."""
        by_id = dict(zip((row[0] for row in one.rows), one.limits or (), strict=False))
        return [by_id.get(row[0]) for row in new]

    def known_keys(self, submits: Sequence[Submit]) -> dict[str, tuple[int, str]]:
        """Keys that jobs have already, each with the job's id and params."""
        known: dict[str, tuple[int, str]] = {}
        for column, sql in (("idem_key", st.BY_IDEM_KEY), ("child_key", st.BY_CHILD_KEY)):
            at = st.AT[column]
            keys = [(row[at],) for one in submits for row in one.rows if row[at] is not None]
            if keys:
                for key, id, _, params in self.tx.fetch_rows(sql, keys):
                    known[key] = (id, params)
        uniques = [
            key
            for one in submits
            if one.limits is not None
            for row in one.rows
            if len(row) > st.PLAIN and (key := row[st.AT["uniq_key"]]) is not None
        ]
        if uniques:
            known.update(self.limiter.holders(uniques))
        return known

    def hold(
        self, submits: Iterable[Submit], known: dict[str, tuple[int, str]]
    ) -> dict[str, tuple[int, str]]:
        """Keep the jobs that have keys of these submits, since somebody is to wait for them, until
        the commit; what was deleted before is not known any more.
        """
        if not self._home.shared:
            return known
        ids = {known[key][0] for one in submits for key in one.keys if key in known}
        gone = ids - self.lock_states(ids).keys()
        return {key: found for key, found in known.items() if found[0] not in gone}

    def accept(
        self, one: Submit, known: dict[str, tuple[int, str]]
    ) -> tuple[list[Accepted], list[list[Any]], list[tuple[int, int]]]:
        """What of one submit is new. Raises before anything is noted."""
        row = one.rows[0] if len(one.rows) == 1 else None
        if row and not (row[IDEM_KEY] or row[CHILD_KEY] or one.limits or one.after[0]):
            return [Accepted(row[0])], one.rows, []
        accepted: list[Accepted] = []
        fresh: list[list[Any]] = []
        edges: list[tuple[int, int]] = []
        own: dict[str, tuple[int, str]] = {}
        before: Counter[str] = Counter()
        limits = one.limits or [None] * len(one.rows)
        for row, after, limit in zip(one.rows, one.after, limits, strict=True):
            key = row[IDEM_KEY] or row[CHILD_KEY]
            found = known.get(key) or own.get(key) if key else None
            if found is not None:
                params = row[st.AT["params"]]
                if row[IDEM_KEY] and not self._home.vault.same(found[1], params):
                    raise KeyConflict(f"job {found[0]} has this key, with other params")
                accepted.append(Accepted(found[0], duplicate=True))
                continue
            if limit is not None:
                unique = row[st.AT["uniq_key"]]
                found = known.get(unique) or own.get(unique) if unique else None
                if row[CHILD_KEY] is not None:
                    self.limiter.check_child(row, found)
                if found is not None:
                    accepted.append(Accepted(found[0], duplicate=True))
                    continue
                self.limiter.admit(row, limit, before)
                before.update((row[st.AT["type"]], row[st.AT["serial_key"]] or ""))
                if unique:
                    own[unique] = (row[0], "")
            if after:
                # A copy: should this be rolled back, it starts again from what was asked for.
                row = list(row)
                branches = branches_of(row[st.AT["options"]])
                if branches is None:
                    edges += self._wait_for(row, after)
                else:
                    there = {one.rows[at][0]: new.id for at, new in enumerate(accepted)}
                    edges += self.joins.begin(row, branches, there)
            if key:
                own[key] = (row[0], row[st.AT["params"]])
            accepted.append(Accepted(row[0]))
            fresh.append(row)
        known.update(own)
        return accepted, fresh, edges

    def _wait_for(self, row: list[Any], after: tuple[int, ...]) -> list[tuple[int, int]]:
        """Block a new job until its predecessors, which are locked meanwhile, are done."""
        needed = sorted(set(after))
        states = self.lock_states(needed)
        missing = [id for id in needed if id not in states]
        if missing:
            raise NotFound(f"@after: no job {missing[0]}")
        open_ = [id for id in needed if states[id] != DONE]
        if open_:
            ended = [id for id in open_ if states[id] in FINAL]
            bad = after_reason(ended[0], states[ended[0]]) if ended else ""
            block(row, len(open_), bad or waits_reason(open_))
            if len(row) > st.PLAIN and is_paced(row[st.AT["serial_key"]]):
                row[st.AT["serial_key"]] = None  # it comes to its line when it could start
        return [(row[0], id) for id in open_]

    def _heed_met(self) -> None:
        """Joins have come to wait for jobs of before: have them go on where those have ended."""
        met, self.joins.met = self.joins.met, []
        dependents.tell(self, [*self.lock_states(met).items()])

    def _claim_at_once(self) -> None:
        """Start what was just queued where a place is free: it saves a commit and a hand-over."""
        lanes = {event.lane for event in self.events if event.state == QUEUED}
        if lanes:
            self.booked = self._home.book(lanes)
            if self.booked:
                self.claimed = self._claim(self.booked)

    def _claim(self, wants: list[Want]) -> list[tuple[Any, int, int]]:
        """Rows of CLAIMED, each with its token and the time of the claim."""
        picked: list[Any] = []
        draws: list[Draw] = []
        # One more tells whether there are any left; on a server that would lock it.
        peek = 0 if self._home.shared else 1
        for want in wants:
            if isinstance(want, Draw):
                draws.append(want)
            else:
                lane_id, free = want
                if self._home.is_held(lane_id):  # since the place was booked
                    continue
                found = self.tx.fetch(st.PICK_CLAIMABLE, lane=lane_id, free=free + peek)
                if len(found) == free + peek:
                    self.again.add(lane_id)
                picked += found[:free]
        claimed = self._start(picked)
        for draw in draws:
            plan = self._home.plan(draw, {e.lane for e in self.events if e.state == QUEUED})
            claimed += self._start(rows_for(self, draw, plan))
        return claimed

    def _start(self, picked: list[Any]) -> list[tuple[Any, int, int]]:
        if self.family.cancelling and picked and (caught := self.family.catch(picked)):
            # What comes after them may start.
            self.again |= {row[1] for row in picked if row[0] in caught}
            picked = [row for row in picked if row[0] not in caught]
        if any(row[6] and has_limits(row[6]) for row in picked):
            picked = self.limiter.begin(picked)
        if not picked:
            return []
        tokens = new_tokens(len(picked))
        self.taken += tokens
        claimed = sorted(zip((row[0] for row in picked), tokens, strict=True))
        lease = self.now + LEASE_S * 1_000_000
        self.tx.run_rows(st.START_JOBS, claimed, owner=self._home.owner, lease=lease, now=self.now)
        events, now, node = self.events, self.now, self.node
        for row in picked:
            if not row[10]:
                self.first_starts += 1
            events.append(Event(row[0], row[1], now, RUNNING, "", "", row[9] + 1, node, ""))
        for lane_id, n in Counter(row[1] for row in picked).items():
            self.tally[lane_id, QUEUED] -= n
            self.tally[lane_id, RUNNING] += n
        return [(row, token, now) for row, token in zip(picked, tokens, strict=True)]

    def _finish(self, finishes: list[Finish]) -> list[bool]:
        self.ended = [one.job.token for one in finishes]
        self._heed_cancels([one for one in finishes if one.outcome.state in (QUEUED, FAILED)])
        now = self.now
        values = []
        for one in sorted(finishes, key=lambda f: f.job.id):
            ended, outcome = one.job, one.outcome
            again = outcome.state == QUEUED
            later = again and outcome.run_at is not None and outcome.run_at > now
            ready = ended.lane if again and not later else None
            due = outcome.run_at if later else None
            values.append(
                (ended.id, ended.token, outcome.state, outcome.reason[:255],
                 outcome.message or None, one.result, one.data, ready, outcome.run_at, due,
                 None if again else now, 0 if outcome.counts else 1, one.progress)
            )  # fmt: skip
        if self.tx.run_rows(st.END_ATTEMPTS, values) != len(values):
            if not self.tx.alone:
                raise Replay("an end in this batch is from a lost claim")
            return [self._was_ours(finishes[0])]
        wishes = []
        for one in finishes:
            ended, outcome = one.job, one.outcome
            self.moved(ended.id, ended.lane, RUNNING, outcome.state, reason=outcome.reason,
                        message=outcome.message, attempt=ended.attempt)  # fmt: skip
            self.note_due(outcome.run_at)
            if one.told is not None:
                self._told.append((one.told, True))
            if ended.options:
                self._end_limited(one)
            if one.wish is not None:
                wishes.append(one.wish)
        self._keep_outputs(finishes)
        self._follow(finishes)
        if wishes:
            alerts.note(self, wishes)
        return [True] * len(finishes)

    def _end_limited(self, one: Finish) -> None:
        limits, outcome = kept(one.job.options), one.outcome
        if not limits:
            return
        if outcome.state in FINAL:
            self.limiter.free([(one.job.id, limits)])
        elif not outcome.counts and one.job.attempt == 1:
            self.limiter.given_back(one.job.id, limits)

    def _heed_cancels(self, not_done: list[Finish]) -> None:
        """What fails or is given back was cancelled if somebody asked for that, even at the last
        moment or by way of another daemon: a parent may see its children end before it hears of it.
        """
        if not not_done:
            return
        ids = sorted((one.job.id,) for one in not_done)
        cancelled = {row[0] for row in self.tx.fetch_rows(st.CANCELLED_OF, ids)}
        for one in not_done:
            outcome = one.outcome
            if one.job.id in cancelled and outcome.reason != TIMEOUT:
                outcome.state, outcome.reason, outcome.run_at = CANCELLED, "asked", None
                outcome.crashed, outcome.counts = False, True
                # What was to follow a failure does not, and nobody is told of one.
                one.then = one.wish = None

    def _keep_outputs(self, finishes: list[Finish]) -> None:
        outputs = [
            (one.job.id, one.job.starts, out.text, out.size_bytes, int(out.truncated))
            for one in finishes
            if (out := one.outcome.output) is not None
        ]
        if outputs:
            self.truncated = sum(row[-1] for row in outputs)
            self.tx.run_rows(st.INSERT_OUTPUTS, outputs)

    def _follow(self, finishes: list[Finish]) -> None:
        """What ends bring about: jobs that follow, dependents that go on or wait for longer."""
        followed = [one for one in finishes if one.then is not None]
        submits = [one.then for one in followed if one.then is not None]
        steps = {
            (join, one.job.id): new
            for one, follow in zip(followed, self.insert(submits, follow=True), strict=True)
            if (join := one.job.options.get(JOIN)) is not None and one.then is not None
            for row, new in zip(one.then.rows, follow, strict=True)
            if option(row[st.AT["options"]], JOIN) == join
            and not (new.duplicate and self.limiter.is_behind(new.id, join))
        }
        if steps:
            self.joins.stand_in(steps)
            self._heed_met()
        cancelled = [one.job.id for one in finishes if one.outcome.state == CANCELLED]
        self._close_below(submits, cancelled)
        states = [(one.job.id, one.outcome.state) for one in finishes]
        again = [(one.job.id,) for one in finishes if one.outcome.is_retry]
        if again:
            self.tx.run_rows(AGAIN_BELOW, sorted(again))
        self.retried = len(again)
        self.given_back = sum(not one.outcome.counts for one in finishes)
        for one in finishes:
            if one.outcome.crashed:
                self.tx.run(st.COUNT_CRASH, id=one.job.id)
                self.crashed += one.outcome.state == FAILED
        dependents.tell(self, states)

    def lock_states(self, ids: Iterable[int]) -> dict[int, str]:
        """States of jobs, which nobody changes before the commit."""
        wanted = sorted({(id,) for id in ids})
        return dict(self.tx.fetch_rows(st.STATES_OF, wanted)) if wanted else {}

    def _was_ours(self, one: Finish) -> bool:
        """An end that changed nothing: a repeat of our own, or one from a lost claim."""
        found = self.tx.fetch(st.OWN_END, id=one.job.id, token=one.job.token)
        ours = bool(found) and found[0][0] == one.outcome.state
        if not ours:
            self.fenced += 1
            log.warning("(%s:%d) end refused: another claim owns the job", one.job.type, one.job.id)
        if one.told is not None:
            self._told.append((one.told, ours))
        return ours

    def hold_dependents(self, changed: list[tuple[int, str]]) -> None:
        """Jobs have come to these states, and are not done: tell those who wait for them."""
        dependents.hold(self, changed)

    def reopen(self, ids: Sequence[int], followups: Mapping[int, dict[str, Any]]) -> None:
        """Jobs are queued again, batches among them: their ends are waited for once more."""
        dependents.reopen(self, ids, followups)


def parents_of(submits: Sequence[Submit]) -> set[int]:
    """The jobs that these are to come below."""
    at = st.AT["parent"]
    return {row[at] for one in submits for row in one.rows if row[at] is not None}


def refuse_below(one: Submit, closed: set[int]) -> None:
    """Raise IsCancelled when jobs are to come below one of these."""
    parent = min(parents_of([one]) & closed, default=None)
    if parent is not None:
        raise IsCancelled(f"job {parent} is cancelled: nothing more can be queued below it")


def new_tokens(k: int) -> list[int]:
    """Random 63-bit numbers, one for each claim: the fence."""
    return [n >> 1 or 1 for n in struct.unpack(f"<{k}Q", os.urandom(8 * k))]
