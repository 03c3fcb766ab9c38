"""One transaction of changes: each kind is one statement over all its rows, fenced.

The methods run inside the writer's transaction, in whatever thread leads it. Who makes the changes
is `queue`.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from upq import statements as st
from upq.errors import KeyConflict, NotFound, RequestError
from upq.events import Event
from upq.health import Health, Rules, Told, Wish, digest, queue_age, silence
from upq.health import ended as health_ended
from upq.job import (
    BLOCKED,
    DONE,
    FAILED,
    FINAL,
    QUEUED,
    RUNNING,
    Accepted,
    Job,
    NewJob,
    Outcome,
)
from upq.notify import address
from upq.sql import Sql, Tx
from upq.writer import Replay

log = logging.getLogger(__name__)

#: Seconds a claim holds without being renewed.
LEASE_S = 30
#: Characters of a message kept in the history; the job's row has all of it.
EVENT_MESSAGE = 4000


@dataclass(slots=True)
class Submit:
    """Jobs to insert, all or none; `rows` are in the order of SUBMITTED."""

    rows: list[list[Any]]
    after: list[tuple[int, ...]]
    who: str

    @property
    def size_bytes(self) -> int:
        return sum(
            len(row[st.AT["params"]]) + len(row[st.AT["options"]] or "") for row in self.rows
        )

    def instead(self, error: Exception) -> None:
        return None


@dataclass(slots=True)
class Claim:
    """(lane, how many) pairs to claim, in the order of preference."""

    wants: list[tuple[int, int]]
    size_bytes: int = 0

    def instead(self, error: Exception) -> None:
        return None


@dataclass(slots=True)
class Finish:
    """The end of one attempt, with the jobs that follow it."""

    job: Job
    outcome: Outcome
    result: str | None
    data: str | None
    progress: str | None
    then: Submit | None
    #: Told whether the end was ours to make, after the commit.
    told: Callable[[bool], None] | None = None
    #: For a type that is told of by its health.
    wish: Wish | None = None

    @property
    def size_bytes(self) -> int:
        outcome = self.outcome
        text = len(outcome.message) + (len(outcome.output.text) if outcome.output else 0)
        then = self.then.size_bytes if self.then else 0
        # Text outside ASCII takes up to four bytes a character.
        return len(self.result or "") + len(self.data or "") + 4 * text + then

    def instead(self, error: Exception) -> Finish | None:
        if self.outcome.reason == "cannot be stored":
            return None
        outcome = Outcome(
            FAILED, f"its result cannot be stored: {error}", reason="cannot be stored"
        )
        return Finish(self.job, outcome, None, None, None, None, self.told)


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

    def book(self, lanes: set[int]) -> list[tuple[int, int]]:
        """Places that jobs just queued in these lanes may take at once: (lane, how many)."""

    def take_ids(self, k: int) -> int | None:
        """The first of k job ids that are reserved; None when so many are not."""

    def row(self, new: NewJob, id: int, now: int) -> list[Any]:
        """A job as it is inserted; its lane has to be there already."""

    def note(self, batch: Batch, committed: bool) -> None:
        """Hear how the batch has ended."""


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
        self.fenced = self.given_back = self.retried = self.truncated = 0
        #: Places booked for jobs that this batch has queued, and what was claimed for them.
        self.booked: list[tuple[int, int]] = []
        self.claimed: list[tuple[Any, int, int]] = []
        self._told: list[tuple[Callable[[bool], None], bool]] = []
        self._first = 0

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
        self._claim_at_once()
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
        changed = sorted((lane_id, state, n) for (lane_id, state), n in self.tally.items() if n)
        if changed:
            self.tx.run_rows(st.CHANGE_TALLY, changed)
        if self.events:
            self._first = self.numbers("event", len(self.events))
            self.tx.run_rows(
                st.INSERT_EVENTS,
                [
                    (n, *e[:5], e.message[:EVENT_MESSAGE] or None, *e[6:])
                    for n, e in enumerate(self.events, self._first)
                ],
            )

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
        for told, accepted in self._told:
            told(accepted)

    def failed(self) -> None:
        """The transaction was rolled back, or nobody knows."""
        self._home.note(self, committed=False)

    # The changes of a transaction

    def insert(self, submits: Sequence[Submit]) -> list[Any]:
        known = self._known_keys(submits)
        results: list[Any] = []
        fresh: list[list[Any]] = []
        edges: list[tuple[int, int]] = []
        for one in submits:
            try:
                accepted, new, new_edges = self._accept(one, known)
            except RequestError as error:
                results.append(error)
                continue
            results.append(accepted)
            fresh += new
            edges += new_edges
            who = one.who
            for row in new:
                state, reason = row[st.AT["state"]], row[st.AT["reason"]]
                self.moved(row[0], row[1], None, state, reason=reason, who=who)
                self.note_due(row[st.AT["due_at"]])
        if fresh:
            self.tx.run_rows(st.INSERT_JOBS, fresh)
        if edges:
            self.tx.run_rows(st.INSERT_EDGES, edges)
        return results

    def _known_keys(self, submits: Sequence[Submit]) -> dict[str, tuple[int, str]]:
        """Keys that jobs have already, each with the job's id and params."""
        known: dict[str, tuple[int, str]] = {}
        for column, sql in (("idem_key", st.BY_IDEM_KEY), ("child_key", st.BY_CHILD_KEY)):
            at = st.AT[column]
            keys = [(row[at],) for one in submits for row in one.rows if row[at] is not None]
            if keys:
                for key, id, _, params in self.tx.fetch_rows(sql, keys):
                    known[key] = (id, params)
        return known

    def _accept(
        self, one: Submit, known: dict[str, tuple[int, str]]
    ) -> tuple[list[Accepted], list[list[Any]], list[tuple[int, int]]]:
        """What of one submit is new. Raises before anything is noted."""
        accepted: list[Accepted] = []
        fresh: list[list[Any]] = []
        edges: list[tuple[int, int]] = []
        own: dict[str, tuple[int, str]] = {}
        for row, after in zip(one.rows, one.after, strict=True):
            key = row[st.AT["idem_key"]] or row[st.AT["child_key"]]
            found = known.get(key) or own.get(key) if key else None
            if found is not None:
                params = row[st.AT["params"]]
                if row[st.AT["idem_key"]] and json.loads(found[1]) != json.loads(params):
                    raise KeyConflict(f"job {found[0]} has this key, with other params")
                accepted.append(Accepted(found[0], duplicate=True))
                continue
            if after:
                edges += self._wait_for(row, after)
            if key:
                own[key] = (row[0], row[st.AT["params"]])
            accepted.append(Accepted(row[0]))
            fresh.append(row)
        known.update(own)
        return accepted, fresh, edges

    def _wait_for(self, row: list[Any], after: tuple[int, ...]) -> list[tuple[int, int]]:
        """Block a new job until its predecessors, which are locked meanwhile, are done."""
        needed = sorted(set(after))
        states = dict(self.tx.fetch_rows(st.STATES_OF, [(id,) for id in needed]))
        missing = [id for id in needed if id not in states]
        if missing:
            raise NotFound(f"@after: no job {missing[0]}")
        open_ = [id for id in needed if states[id] != DONE]
        if open_:
            ended = [id for id in open_ if states[id] in FINAL]
            row[st.AT["state"]], row[st.AT["ready"]], row[st.AT["due_at"]] = BLOCKED, None, None
            row[st.AT["reason"]] = (
                after_reason(ended[0], states[ended[0]]) if ended else waits_reason(open_)
            )
            row[st.AT["waits"]] = len(open_)
        return [(row[0], id) for id in open_]

    def _claim_at_once(self) -> None:
        """Start what was just queued where a place is free: it saves a commit and a hand-over."""
        lanes = {event.lane for event in self.events if event.state == QUEUED}
        if lanes:
            self.booked = self._home.book(lanes)
            if self.booked:
                self.claimed = self._claim(self.booked)

    def _claim(self, wants: list[tuple[int, int]]) -> list[tuple[Any, int, int]]:
        """Rows of CLAIMED, each with its token and the time of the claim."""
        picked: list[Any] = []
        for lane_id, free in wants:
            picked += self.tx.fetch(st.PICK_CLAIMABLE, lane=lane_id, free=free)
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
            if one.wish is not None:
                wishes.append(one.wish)
        self._keep_outputs(finishes)
        self._follow(finishes)
        if wishes:
            self.note_health(wishes)
        return [True] * len(finishes)

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
        self.insert([one.then for one in finishes if one.then is not None])
        states = [(one.job.id, one.outcome.state) for one in finishes]
        again = [(one.job.id,) for one in finishes if one.outcome.is_retry]
        if again:
            self.tx.run_rows(st.AGAIN_BELOW, sorted(again))
        self.retried = len(again)
        self.given_back = sum(not one.outcome.counts for one in finishes)
        self._release_dependents([id for id, state in states if state == DONE])
        self.hold_dependents([(id, s) for id, s in states if s in FINAL and s != DONE])

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

    # How types fare

    def note_health(self, wishes: Sequence[Wish]) -> None:
        """Take note of ends of types that are told of by their health, in the order given."""
        by_type: dict[str, list[Wish]] = {}
        for wish in wishes:
            by_type.setdefault(wish.rules.type, []).append(wish)
        for type in sorted(by_type):
            health = self._lock_health(type)
            for wish in by_type[type]:
                self._tell_targets(wish.rules, health_ended(health, wish, self.now))
            self._keep_health(health)

    def tend_health(self, rules: Sequence[Rules], lanes: dict[str, list[int]]) -> None:
        """Tell what is due by the time alone: digests and alerts. lanes: those of each type."""
        for one in sorted(rules, key=lambda rules: rules.type):
            health = self._lock_health(one.type)
            before = health.columns()
            found = [*digest(health, one, self.now), *silence(health, one, self.now)]
            if one.queue_age_us or health.queue_alert_at is not None:
                oldest_at = self._oldest(lanes.get(one.type, []))
                found += queue_age(health, one, oldest_at, self.now)
            if health.columns() != before:
                self._tell_targets(one, found)
                self._keep_health(health)

    def _lock_health(self, type: str) -> Health:
        found = self.tx.fetch(st.LOCK_HEALTH, type=type)
        if not found:
            self.tx.run(st.ADD_HEALTH, type=type, now=self.now)
            found = self.tx.fetch(st.LOCK_HEALTH, type=type)
        return Health.of_row(found[0])

    def _keep_health(self, health: Health) -> None:
        self.tx.run(st.SET_HEALTH, of=health.type, **health.columns())

    def _tell_targets(self, rules: Rules, found: Sequence[Told]) -> None:
        new = [job for told in found for job in address(told, rules.targets)]
        if new:
            taken = self._home.take_ids(len(new))
            first = self.numbers("job", len(new)) if taken is None else taken
            rows = [self._home.row(job, id, self.now) for id, job in enumerate(new, first)]
            self.insert([Submit(rows, [()] * len(rows), "")])

    def _oldest(self, lanes: Sequence[int]) -> int | None:
        """Since when the job of these lanes that has waited longest could have started."""
        found: int | None = None
        for lane_id in lanes:
            above = -(1 << 31)
            while part := self.tx.fetch(st.OLDEST_OF_RANK, lane=lane_id, above=above):
                above = part[-1][0]
                at = min(max(created_at, run_at or 0) for _, created_at, run_at in part)
                found = at if found is None else min(found, at)
        return found

    # Jobs that wait for others

    def _release_dependents(self, done: list[int]) -> None:
        if not done:
            return
        ids = sorted((id,) for id in done)
        waiting = self.tx.fetch_rows(st.DEPENDENTS_OF, ids)
        if not waiting:
            return
        counts = sorted(Counter(row[0] for row in waiting).items())
        self.tx.run_rows(st.LOWER_WAITS, counts)
        self.tx.run_rows(st.DELETE_EDGES, ids)
        free = []
        for id, lane_id, run_at, attempt, waits, state in sorted(
            self.tx.fetch_rows(st.WAITS_OF, [(id,) for id, _ in counts])
        ):
            if waits == 0 and state == BLOCKED:
                later = run_at is not None and run_at > self.now
                free.append((id, None if later else lane_id, run_at if later else None))
                self.note_due(run_at if later else None)
                self.moved(id, lane_id, BLOCKED, QUEUED, attempt=attempt)
        if free:
            self.tx.run_rows(st.FREE_JOBS, free)

    def hold_dependents(self, changed: list[tuple[int, str]]) -> None:
        """Say on those who wait for these jobs what they wait for, now that it has changed."""
        if not changed:
            return
        states = dict(changed)
        waiting = self.tx.fetch_rows(st.DEPENDENTS_OF, sorted((id,) for id in states))
        reasons = {
            id: after_reason(needs, states[needs])
            if states[needs] in FINAL
            else waits_reason([needs])
            for id, needs, state in waiting
            if state == BLOCKED
        }
        if reasons:
            self.tx.run_rows(st.BLOCK_JOBS, sorted(reasons.items()))


def waits_reason(ids: Sequence[int]) -> str:
    return "waits for " + ", ".join(map(str, ids[:8])) + (" ..." if len(ids) > 8 else "")


def after_reason(id: int, state: str) -> str:
    return f"job {id} is {state}; `retry {id}` lets it go on"


def new_tokens(k: int) -> list[int]:
    """Random 63-bit numbers, one for each claim: the fence."""
    return [n >> 1 or 1 for n in struct.unpack(f"<{k}Q", os.urandom(8 * k))]
