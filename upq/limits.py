"""What a batch does for jobs that are unique, take turns, expire, or whose type is limited.

Jobs of one `serial` key stand in a line, in the order of their ids. One at most has the turn: it is
running, or queued with `ready` or `due_at`, and its id is in the line's row of `limit`. The others
are queued without either, or blocked. The first of the line gets the turn when nobody has it; while
the first is blocked, the line waits with it. Daemons on one database lock the line's row before
they look, after they have changed a job: the later one sees what the earlier one has done.

Jobs of one key of `rate ... per` stand in a line, too, but leave it when they start, and the next
one gets the turn for one interval later. What was delayed, blocked or has started before comes to
the line when it could be claimed: a claim starts nothing that has not the turn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

from upq.errors import Busy, WrongState
from upq.events import Event
from upq.job import BLOCKED, CANCELLED, EXPIRED, FINAL, QUEUED, REJECT, REPLACE, RUNNING, Limits
from upq.sql import Tx
from upq.statements import limits as st
from upq.statements.jobs import AT

#: The name under which a job's `options` keep what is left of its limits.
KEPT = "limits"
#: Jobs that are looked at to find out who waits for a child's parent.
WALK = 1000
#: Characters of a serial key that are kept to be shown.
SHOWN_CHARS = 200
#: Characters of a line's key; with LINE or RATE before it, it is a name in `limit`.
LINE_CHARS = 59
#: What the keys of lines with a rate begin with: no digit.
PACED = "r"
#: The start of a key is forgotten so long after the next one may come: clocks differ.
RATE_KEPT_US = 60_000_000


class Changes(Protocol):
    """The batch, as far as limits need it."""

    tx: Tx
    now: int
    events: list[Event]
    tally: Counter[tuple[int, str]]

    def note_due(self, at: int | None) -> None: ...
    def hold_dependents(self, changed: list[tuple[int, str]]) -> None: ...
    def moved(
        self, id: int, lane_id: int, was: str | None, state: str, *, reason: str = "",
        message: str = "", attempt: int = 0, who: str = "",
    ) -> None: ...  # fmt: skip


def kept(options: dict[str, Any]) -> dict[str, Any]:
    """What the options of a job say of its limits; empty for most jobs."""
    return options.get(KEPT) or {}


def has_limits(options: str) -> bool:
    """Whether options as they are stored may say something of limits."""
    return f'"{KEPT}"' in options


def kept_text(options: str | None) -> dict[str, Any]:
    return kept(json.loads(options)) if options and has_limits(options) else {}


def turn_reason(limits: dict[str, Any]) -> str:
    return f"waits for its turn: {limits['serial']}"[:255]


def is_paced(key: str | None) -> bool:
    """Whether this is the key of a line with a rate."""
    return key is not None and key.startswith(PACED)


def pace_reason(limits: dict[str, Any]) -> str:
    return f"waits for its turn: {limits['pace']}"[:255]


class Limiter:
    """The limits of one batch."""

    def __init__(self, batch: Changes) -> None:
        self._batch = batch
        self._tx = batch.tx
        # Keys of lines that have got or lost a job.
        self._lines: set[str] = set()
        # Where the events of jobs are that have come to a line here.
        self._came: dict[int, int] = {}
        # Those of jobs that were accepted here and are not inserted yet.
        self._new_keys: set[str] = set()
        # What each type has in each lane and state, but for what the batch has not written yet.
        self._counts: dict[str, dict[tuple[int, str], int]] = {}

    # Submits

    def holders(self, keys: Iterable[str]) -> dict[str, tuple[int, str]]:
        """The jobs that have these unique keys; what is kept no longer is taken from its job.

        Each with the serial key whose turn it waits for, or "".
        """
        found: dict[str, tuple[int, str]] = {}
        old: list[tuple[int]] = []
        rows = self._tx.fetch_rows(st.BY_UNIQ_KEY, sorted({(key,) for key in keys}))
        for key, id, state, until, serial_key in rows:
            if state in FINAL and (until is None or until <= self._batch.now):
                old.append((id,))
            else:
                found[key] = (id, (serial_key or "") if state in (QUEUED, BLOCKED) else "")
        if old:
            self._tx.run_rows(st.FREE_OLD_KEYS, sorted(old))
        return found

    def check_child(self, row: list[Any], found: tuple[int, str] | None) -> None:
        """Refuse a child that would wait for one that waits for it: the parent and those above."""
        parent, key = row[AT["parent"]], row[AT["serial_key"]]
        if found is not None:
            self.check_repeat(parent, *found)
        elif key is not None and not is_paced(key):
            above = self._above(parent)
            for id, (_, turn) in above.items():
                if key == turn:
                    raise WrongState(
                        f"job {id} above this child has the turn that the child needs (serial)"
                    )
            for id, (one, state, turn) in self._wait_for(above).items():
                if key == turn and (id < row[0] or state == RUNNING):
                    raise WrongState(
                        f"job {id} goes before this child (serial), and it waits for job {one},"
                        " which waits for the child"
                    )

    def check_repeat(self, parent: int | None, holder: int, turn: str = "") -> None:
        """Refuse a child that is another job when that waits for the parent or for one above."""
        above = self._above(parent)
        for id, (_, key) in above.items():
            if holder == id or (turn and turn == key):
                raise WrongState(
                    f"job {holder} is what this child repeats (unique), and it would wait"
                    f" for job {id}, which waits for it"
                )
        waits = self._wait_for(above)
        if holder in waits:
            raise WrongState(
                f"job {holder} is what this child repeats (unique), and it waits for job"
                f" {waits[holder][0]}, which waits for the child"
            )

    def check_members(self, batch: int, needed: Collection[int], lines: Collection[str]) -> None:
        """Refuse members of a batch that wait for its follow-up: through the jobs that they are or
        that they come after, or in the lines in which they stand.
        """
        waits = self._wait_for({batch: ("", None)})
        for id, (_, _, key) in [(batch, (batch, "", None)), *waits.items()]:
            if id in needed or key in lines:
                raise WrongState(f"job {id} would wait for batch {batch}, and that for it")

    def is_behind(self, id: int, other: int) -> bool:
        """Whether a job is this other one, or waits for it."""
        return id == other or id in self._wait_for({other: ("", None)})

    def _above(self, parent: int | None) -> dict[int, tuple[str, str | None]]:
        """State and serial key of a child's parent and of those above that are not finished."""
        above = {}
        while parent is not None:
            id = parent
            ((parent, state, turn),) = self._tx.fetch(st.ABOVE, id=id) or [(None, "", None)]
            if state and state not in FINAL:
                above[id] = (state, None if is_paced(turn) else turn)
        return above

    def _wait_for(
        self, above: dict[int, tuple[str, str | None]]
    ) -> dict[int, tuple[int, str, str | None]]:
        """Who waits for these jobs, also through others: which one, the state, the serial key.

        It looks at some WALK jobs. What a running job waits for is told nowhere, but that it waits
        for its children: two that repeat each other's parents are not found.
        """
        found = {id: (id, *one) for id, one in above.items()}
        latest = sorted((id,) for id in above)
        while latest and len(found) < WALK:
            rows = self._tx.fetch_rows(st.WHO_WAITS, latest)
            new = {id: (found[of][0], state, key) for of, id, state, key in rows if id not in found}
            found |= new
            latest = sorted((id,) for id in new)
        return {id: one for id, one in found.items() if id not in above}

    def admit(self, row: list[Any], limits: Limits, before: Counter[str]) -> None:
        """Hold a new job to max_queue and when_busy. Raises Busy.

        before: how many jobs of a type, or of a serial key, the same submit has before it.
        """
        type, key = row[AT["type"]], row[AT["serial_key"]] if limits.serial else None
        if limits.max_queue:
            waiting = self.count(type, QUEUED, BLOCKED) + before[type]
            room = len(self.waiting(type, key)) if limits.when_busy == REPLACE and waiting else 0
            if waiting - room >= limits.max_queue:
                raise Busy(f"{waiting} jobs of {type} wait already, max_queue = {limits.max_queue}")
        if limits.when_busy == REJECT:
            if key is None:
                if self.count(type, QUEUED, BLOCKED, RUNNING) + before[type]:
                    raise Busy(f"a job of {type} is not finished, when_busy = reject")
            elif before[key] or key in self._new_keys or self._is_in_use(key):
                text = limits.serial[:SHOWN_CHARS]
                raise Busy(f"a job of {text} is not finished, when_busy = reject")

    def inserted(self) -> None:
        """All that was accepted is in the table."""
        self._new_keys.clear()

    def replace(
        self, new: Sequence[list[Any]], limits: Sequence[Limits | None], who: str
    ) -> list[int]:
        """Cancel what waits where the new jobs, which are inserted, take its place; returns it."""
        replaced: list[int] = []
        for at, (row, one) in enumerate(zip(new, limits, strict=True)):
            if one is not None and one.when_busy == REPLACE:
                kept_ids = {later[0] for later in new[at:]}
                old = self.waiting(row[AT["type"]], row[AT["serial_key"]]) - kept_ids
                ended = self.end_waiting(old, CANCELLED, reason=f"replaced by {row[0]}", who=who)
                replaced += [id for id, _ in ended]
        return replaced

    def count(self, type: str, *states: str) -> int:
        """How many jobs a type has in these states, those of this batch among them.

        Other daemons that ask, too, wait until this transaction is over.
        """
        known = self._counts.get(type)
        if known is None:
            self._lock([f"type:{type}"[:64]])
            rows = self._tx.fetch(st.TALLY_OF, type=type)
            known = self._counts[type] = {(lane, state): n for lane, state, n in rows}
        changed = self._batch.tally
        return sum(n + changed[place] for place, n in known.items() if place[1] in states)

    def recount(self) -> None:
        """The batch has written its counts: those known before do not hold any more."""
        self._counts.clear()

    def waiting(self, type: str, key: str | None) -> set[int]:
        """What has not started, of a serial key or else of a type."""
        if key is not None:
            self._lock([st.LINE + key])
            return {row[0] for row in self._tx.fetch(st.WAITING_IN_LINE, key=key)}
        if not self.count(type, QUEUED, BLOCKED):
            return set()
        return {row[0] for row in self._tx.fetch(st.WAITING_OF, type=type)}

    def _is_in_use(self, key: str) -> bool:
        self._lock([st.LINE + key])
        return bool(self._tx.fetch_rows(st.LINES, [(key, st.LINE + key)])[0][2])

    def _lock(self, names: Iterable[str]) -> None:
        """Only one daemon at a time goes on from here, until its commit."""
        if self._tx.dialect.name != "sqlite":  # which has one writer
            self._tx.run_rows(st.LOCK_LIMITS, sorted((name,) for name in names))

    # Starts and ends

    def begin(self, picked: list[Any]) -> list[Any]:
        """Of the rows of CLAIMED those that may start; what is overdue is left for `expire`."""
        found, paced = [], []
        for row in picked:
            limits = kept_text(row[6])
            expires_at = limits.get("expires_at")
            # One that has run before does not expire.
            if expires_at is not None and expires_at <= self._batch.now and not row[9]:
                self._batch.note_due(expires_at)
                continue
            found.append((row, limits))
            if "paced" in limits:
                paced.append((row, limits))
        if paced:
            held = self._hold_to_pace(paced)
            found = [one for one in found if one[0][0] not in held]
        started = [
            (row[0], int("until_start" in limits))
            for row, limits in found
            if "expires_at" in limits or limits.get("until_start")
        ]
        if started:
            self._tx.run_rows(st.START_LIMITED, sorted(started))
        return [row for row, _ in found]

    def _hold_to_pace(self, paced: list[tuple[Any, dict[str, Any]]]) -> set[int]:
        """Of the rows of keys with a rate, those that may not start now: they wait in line."""
        batch, now = self._batch, self._batch.now
        of_key: dict[str, dict[int, tuple[Any, dict[str, Any]]]] = {}
        for row, limits in paced:
            of_key.setdefault(limits["paced"], {})[row[0]] = row, limits
        keys = sorted(of_key)
        self._lines.update(keys)
        self._lock(st.LINE + key for key in keys)
        free_at = self._free_at(keys)
        started, next_at, late, wait = [], [], [], []
        for key, holder, head in self._tx.fetch_rows(
            st.LINES, [(key, st.LINE + key) for key in keys]
        ):
            rows = of_key[key]
            first = min(rows if head is None else [head, *rows]) if holder is None else holder
            at = free_at.get(key, 0)
            if first in rows and at <= now:
                _, limits = rows.pop(first)
                started.append((first,))
                next_at.append((st.RATE + key, now + limits["every_us"]))
            elif holder in rows:
                del rows[holder]
                late.append((holder, None, at))
                batch.note_due(at)
            wait += [(id, key, pace_reason(limits)) for id, (_, limits) in rows.items()]
            for row, limits in rows.values():
                batch.moved(
                    row[0], row[1], QUEUED, QUEUED, reason=pace_reason(limits), attempt=row[9]
                )
        if started:
            self._tx.run_rows(st.LEAVE_LINES, sorted(started))
            self._tx.run_rows(st.LOCK_LIMITS, sorted((name,) for name, _ in next_at))
            self._tx.run_rows(st.SET_LIMITS, sorted(next_at))
        if late:
            self._tx.run_rows(st.GIVE_TURNS, sorted(late))
        if wait:
            self._tx.run_rows(st.PUT_IN_LINE, sorted(wait))
        return {row[0] for row, _ in paced} - {id for (id,) in started}

    def _free_at(self, keys: Iterable[str]) -> dict[str, int]:
        """When the next job of each key with a rate may start; their lines are locked."""
        names = sorted((st.RATE + key,) for key in keys if is_paced(key))
        found = self._tx.fetch_rows(st.LIMITS_AT, names) if names else []
        return {name.removeprefix(st.RATE): int(at) for name, at in found}

    def given_back(self, id: int, limits: dict[str, Any]) -> None:
        """A claim has come to nothing: the job expires as if it had not been."""
        if "expires_at" in limits:
            self._tx.run_rows(st.EXPIRE_AGAIN, [(id, limits["expires_at"])])
            self._batch.note_due(limits["expires_at"])

    def free(self, ended: Iterable[tuple[int, dict[str, Any]]], *, waited: bool = False) -> None:
        """Jobs have ended: their keys are free, their turns are over.

        waited: they have not been running, and may have the turn of a key with a rate.
        """
        ids = []
        for id, limits in ended:
            ids.append((id,))
            if "line" in limits:
                self._lines.add(limits["line"])
            if waited and "paced" in limits:
                self._lines.add(limits["paced"])
        self._tx.run_rows(st.FREE_KEYS, sorted(ids), now=self._batch.now)

    def end_waiting(
        self, ids: Iterable[int], state: str, *, reason: str = "", message: str = "",
        who: str = "", overdue: bool = False,
    ) -> list[tuple[int, int]]:  # fmt: skip
        """End those of the jobs that have not started; returns (id, lane) of each.

        overdue: only those whose time is over.
        """
        batch, ended, freed, gone = self._batch, [], [], []
        for id, lane_id, was, attempt, options, expires_at in self._tx.fetch_rows(
            st.WAITING, sorted((id,) for id in ids)
        ):
            if was not in (QUEUED, BLOCKED):
                gone.append((id,))
            elif not overdue or (expires_at is not None and expires_at <= batch.now):
                ended.append((id, lane_id))
                if limits := kept_text(options):
                    freed.append((id, limits))
                batch.moved(id, lane_id, was, state, reason=reason, message=message,
                            attempt=attempt, who=who)  # fmt: skip
        if ended:
            self._tx.run_rows(
                st.END_WAITING, sorted((id,) for id, _ in ended), ended=state, why=reason,
                said=message or reason, now=batch.now,
            )  # fmt: skip
            batch.hold_dependents([(id, state) for id, _ in ended])
        if freed:
            self.free(freed, waited=True)
        if gone and overdue:
            self._tx.run_rows(st.NEVER_EXPIRE, sorted(gone))
        return ended

    def expire(self, ids: Iterable[int]) -> list[tuple[int, int]]:
        """End what has not started in time; returns (id, lane) of each."""
        return self.end_waiting(ids, EXPIRED, message="it has not started in time", overdue=True)

    def again(self, id: int, limits: dict[str, Any]) -> int | None:
        """Give an ended job its keys again; or the job that has its unique key meanwhile."""
        unique, line = limits.get("unique"), limits.get("line")
        if unique is not None:
            holder = self.holders([unique]).get(unique)
            if holder is not None and holder[0] != id:
                return holder[0]
        self._tx.run_rows(st.TAKE_KEYS, [(id, unique, line)])
        return None

    # Lines

    def came(self, id: int, line: str) -> None:
        """The latest event says that a job has come to a line, queued or blocked."""
        self._came[id] = len(self._batch.events) - 1
        self._lines.add(line)
        self._new_keys.add(line)

    def settle(self) -> None:
        """Give the turn to the first of each changed line that nobody has the turn of."""
        if not self._lines:
            return
        keys, self._lines = sorted(self._lines), set()
        names = [(st.LINE + key,) for key in keys]
        self._tx.run_rows(st.LOCK_LIMITS, names)
        over, first = [], []
        found = self._tx.fetch_rows(st.LINES, [(key, st.LINE + key) for key in keys])
        for key, holder, head in sorted(found):
            if head is None:
                over.append((st.LINE + key,))
            elif holder is None:
                first.append((head,))
        if over:
            self._tx.run_rows(st.DROP_LIMITS, over)
        if first:
            self._give_turns(first)

    def _give_turns(self, first: list[tuple[int]]) -> None:
        batch, turns, names = self._batch, [], []
        heads = self._tx.fetch_rows(st.HEADS, sorted(first))
        free_at = self._free_at(head[1] for head in heads)
        for id, key, lane_id, state, run_at, attempt in heads:
            waits = state == BLOCKED  # and the line with it
            names.append((st.LINE + key, 0 if waits else id))
            if waits:
                continue
            due = max(run_at or 0, free_at.get(key, 0))
            later = due > batch.now
            turns.append((id, None if later else lane_id, due if later else None))
            batch.note_due(due if later else None)
            at = self._came.get(id)
            if at is None and later and is_paced(key):
                continue  # there is nothing to claim yet
            if at is None:
                batch.moved(id, lane_id, QUEUED, QUEUED, reason="its turn", attempt=attempt)
            elif batch.events[at].reason != "retry":
                batch.events[at] = batch.events[at]._replace(reason="")
        self._tx.run_rows(st.SET_LIMITS, sorted(names))
        if turns:
            self._tx.run_rows(st.GIVE_TURNS, sorted(turns))

    def mend(self) -> None:
        """Move lines that have come to a stand; forget what no rate asks for any more."""
        self._tx.run(st.DROP_OLD_RATES, before=self._batch.now - RATE_KEPT_US)
        stuck = self._tx.fetch(st.STUCK_LINES)
        self._lines |= {row[0].removeprefix(st.LINE) for row in stuck}
