"""Reads only: jobs, counts, history. What they return is JSON; secrets are masked here.

Times leave as ISO 8601 text in UTC. Any thread may ask; all raise Unavailable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from upq import schema, when
from upq.clauses import CHUNK
from upq.db import Database
from upq.errors import NotFound
from upq.job import BAD, BLOCKED, ENDED, FAILED, FINAL, QUEUED, RUNNING
from upq.limits import is_paced, kept_text
from upq.members import kept_batch
from upq.record import LOCKED
from upq.secret import mask, scrub, secret_texts
from upq.sql import Sql
from upq.statements.family import AGAIN, MEMBER, MEMBERS_OF
from upq.statements.limits import LINE, RATE
from upq.statements.members import OPTIONS_OF
from upq.statements.waits import AWAITED_BY
from upq.vault import NoKey, Vault
from upq.whole import Member

job, event, output, tally, edge, node = (
    schema.job, schema.event, schema.output, schema.tally, schema.edge, schema.node,
)  # fmt: skip
slot, step = schema.slot, schema.step

#: Rows of one list at the most, and how far the place of a waiting job is counted.
LIST_LIMIT, AHEAD_LIMIT = 1000, 1000
#: Characters of a message and of a result that a list shows; `show` has all.
LIST_CHARS = 2000
TIMES = ("run_at", "expires_at", "created_at", "started_at", "ended_at")
SHOWN = (job.c.id, job.c.type, job.c.queue, job.c.lane, job.c.state, job.c.reason, job.c.params,
         job.c.data, job.c.result, job.c.message, job.c.progress, job.c.rank, job.c.attempt,
         job.c.starts, job.c.crashes, job.c.parent, job.c.root, job.c.submitter, job.c.run_at,
         job.c.expires_at, job.c.created_at, job.c.started_at, job.c.ended_at,
         job.c.cancel_asked)  # fmt: skip

#: The same for lists, where a longer result is left out and a message cut.
LISTED = (
    *(column for column in SHOWN if column.name not in ("result", "message")),
    sa.case((sa.func.length(job.c.result) <= LIST_CHARS, job.c.result)).label("result"),
    sa.func.substr(job.c.message, 1, LIST_CHARS).label("message"),
)


class End(NamedTuple):
    """How a job has ended."""

    state: str
    result: Any
    message: str
    #: Why the result cannot be read; "" when it can.
    locked: str = ""
    reason: str = ""


class Turn(NamedTuple):
    """What a job waits for that takes turns with others."""

    #: The job whose turn it is; while that is nobody's, the first of the line.
    holder: int
    key: str


class Pace(NamedTuple):
    """The rate that a job waits for, in words, and when it starts at the earliest."""

    rate: str
    not_before: int


class Views:
    """What can be seen of the store.

    blocked: for a lane, why its jobs cannot start now; "" when they can.
    secret: names of params that are never shown, asked anew each time.
    """

    def __init__(
        self,
        database: Database,
        blocked: Callable[[int], str],
        secret: Callable[[], frozenset[str]],
        vault: Vault | None = None,
    ) -> None:
        self._vault = vault or Vault()
        self._database = database
        self.blocked = blocked
        self._secret = secret

    def job(self, id: int) -> dict[str, Any]:
        """Raises NotFound."""
        found = self.rows(sa.select(*SHOWN).where(job.c.id == id))
        if not found:
            raise NotFound(f"no job {id}")
        return self.shown(found[0])

    def ahead(
        self, id: int, lane: int, same: Collection[int] = (), first: Collection[int] = ()
    ) -> int:
        """How many jobs of the lane go before this one, counted to 1,000.

        Also those of other lanes: all of `first`, and of `same` those that come before it.
        """
        query = sa.select(job.c.id).where(job.c.ready == lane)
        heads = self.rows(query.order_by(job.c.rank, job.c.ord, job.c.id).limit(AHEAD_LIMIT))
        ids = [row[0] for row in heads]
        found = ids.index(id) if id in ids else len(ids)
        others = [(one, None) for one in first] + [(one, id) for one in same if one != lane]
        for one, before in others:
            if found >= AHEAD_LIMIT:
                break
            found += self._waiting(one, before)
        return min(found, AHEAD_LIMIT)

    def _waiting(self, lane: int, before: int | None) -> int:
        """How many jobs of a lane can be claimed, or of them those that go before another job."""
        query = sa.select(job.c.id).where(job.c.ready == lane)
        if before is not None:
            mine = sa.alias(job)
            place = (mine.c.rank, mine.c.ord, mine.c.id)
            query = query.where(
                mine.c.id == before, sa.tuple_(job.c.rank, job.c.ord, job.c.id) < sa.tuple_(*place)
            )
        counted = query.limit(AHEAD_LIMIT).subquery()
        return int(self.rows(sa.select(sa.func.count()).select_from(counted))[0][0])

    def history(self, id: int) -> list[dict[str, Any]]:
        """Every change of state, the oldest first."""
        query = sa.select(event).where(event.c.job == id).order_by(event.c.n)
        hidden = self._hidden(id)
        return [_change(row, hidden) for row in self._mappings(query)]

    def attempts(self, id: int) -> list[dict[str, Any]]:
        """Every start, the oldest first: where and when, and how it ended if it has."""
        sizes = {
            row[0]: (row[1], bool(row[2]))
            for row in self.rows(
                sa.select(output.c.attempt, output.c.size_bytes, output.c.truncated).where(
                    output.c.job == id
                )
            )
        }
        found: list[dict[str, Any]] = []
        for one in self.history(id):
            if one["state"] == RUNNING:
                size, cut = sizes.get(len(found) + 1, (0, False))
                found.append(
                    {
                        "start": len(found) + 1,
                        "attempt": one["attempt"],
                        "node": one["node"],
                        "started_at": one["at"],
                        "ended_at": None,
                        "took_s": None,
                        "state": RUNNING,
                        "reason": "",
                        "message": "",
                        "output_bytes": size,
                        "output_truncated": cut,
                    }
                )
            elif found and found[-1]["ended_at"] is None:
                last = found[-1]
                took = when.instant(one["at"]) - when.instant(last["started_at"])
                # A clock that was put back meanwhile has not told how long.
                last["took_s"] = took / 1e6 if took >= 0 else None
                last |= {"ended_at": one["at"], "reason": one["reason"]}
                last |= {"state": attempt_state(one), "message": one["message"]}
        return found

    def own_reason(self, id: int) -> str:
        """The reason on the row, whatever its lane has to say."""
        rows = self.rows(sa.select(job.c.reason).where(job.c.id == id))
        return scrub(rows[0][0], self._hidden(id)) if rows else ""

    def since(self, id: int) -> str | None:
        """When the job came into the state that it is in."""
        query = sa.select(event.c.at).where(event.c.job == id).order_by(event.c.n.desc())
        found = self.rows(query.limit(1))
        return when.iso(found[0][0]) if found else None

    def children(self, id: int) -> list[dict[str, Any]]:
        query = sa.select(*LISTED).where(job.c.parent == id).order_by(job.c.id).limit(LIST_LIMIT)
        return [self.shown(row) for row in self.rows(query)]

    def members(self, id: int, most: int) -> tuple[list[Member], bool]:
        """A job and what is below it, level by level; whether there is more. Raises NotFound."""
        root = self.rows(sa.select(*MEMBER).where(job.c.id == id))
        if not root:
            raise NotFound(f"no job {id}")
        found = level = [Member._make(root[0])]
        while level and len(found) <= most:
            ids = [(one.id,) for one in level]
            rows = self._sql(MEMBERS_OF, ids, above=0, most=most + 1 - len(found))
            level = list(map(Member._make, rows))
            found = found + level
        return found[:most], len(found) > most

    def needs(self, ids: Iterable[int]) -> list[tuple[int, int, str]]:
        """What these jobs wait for: each with one that has to be done before, and its state.

        But for batches that may get more members, or need no more than their ends.
        """
        wanted = [(id,) for id in ids]
        batches = {id: kept_batch(options) for id, options in self._sql(OPTIONS_OF, wanted)}
        free = {
            id for id, kept in batches.items() if kept and (kept["open"] or kept["when"] == ENDED)
        }
        found = self._sql(AWAITED_BY, wanted)
        return [(row[0], row[1], row[2]) for row in found if row[0] not in free]

    def listed(self, ids: Collection[int]) -> dict[int, dict[str, Any]]:
        """These jobs as a list shows them."""
        rows = self.rows(sa.select(*LISTED).where(job.c.id.in_(ids))) if ids else []
        return {row.id: self.shown(row) for row in rows}

    def timeline(self, ids: Collection[int], most: int) -> tuple[list[dict[str, Any]], bool]:
        """The latest changes of state of these jobs, the oldest first; whether there were more."""
        query = sa.select(event).where(event.c.job.in_(ids)).order_by(event.c.n.desc())
        rows = self._mappings(query.limit(most + 1))
        hidden = self._hidden_of({row["job"] for row in rows})
        found = [
            {"job": row["job"], **_change(row, hidden.get(row["job"], ()))}
            for row in reversed(rows[:most])
        ]
        return found, len(rows) > most

    def output(self, id: int, start: int | None = None) -> dict[str, Any]:
        """What a start has written, by default the latest that wrote anything. Raises NotFound."""
        query = sa.select(output).where(output.c.job == id).order_by(output.c.attempt.desc())
        if start is not None:
            query = query.where(output.c.attempt == start)
        found = self._mappings(query.limit(1))
        if not found:
            self.job(id)
            raise NotFound(f"job {id} has no output" + (f" of start {start}" if start else ""))
        row = found[0]
        return {
            "id": id,
            "attempt": row["attempt"],
            "text": scrub(row["text"], self._hidden(id)),
            "size_bytes": row["size_bytes"],
            "truncated": bool(row["truncated"]),
        }

    def _hidden(self, id: int) -> list[str]:
        """What the secret params of a job hold."""
        return self._hidden_of([id]).get(id, [])

    def _hidden_of(self, ids: Collection[int]) -> dict[int, list[str]]:
        """The same of each of these jobs."""
        secret = self._secret()
        if not secret or not ids:
            return {}
        rows = self.rows(sa.select(job.c.id, job.c.params, job.c.data).where(job.c.id.in_(ids)))
        return {
            id: secret_texts([self._vault.decode(t, lenient=True) for t in texts if t], secret)
            for id, *texts in rows
        }

    def end(self, id: int) -> End | None:
        """How a job has ended; None while it has not. Raises NotFound."""
        query = sa.select(job.c.state, job.c.result, job.c.message, job.c.reason)
        found = self.rows(query.where(job.c.id == id))
        if not found:
            raise NotFound(f"no job {id}")
        state, result, message, reason = found[0]
        if state not in FINAL:
            return None
        locked, value = "", None
        if result is not None:
            try:
                value = self._vault.decode(result)
            except NoKey as error:
                locked = str(error)
        return End(state, value, message or "", locked, reason)

    def child(self, key: str) -> tuple[int, bool] | None:
        """The id of the job with a child key, and whether it is to run again when asked for."""
        query = sa.select(job.c.id, job.c.parent, job.c.state, job.c.reason)
        found = self.rows(query.where(job.c.child_key == key))
        if not found:
            return None
        id, parent, state, reason = found[0]
        if state not in BAD:
            return id, False
        return id, reason == AGAIN or self._ended_between(parent, id)

    def repeated(self, parent: int, key: str) -> int | None:
        """The job that stands in for a child (unique). None when it is gone; and when it has ended
        badly, and the parent was queued again since it came by it.
        """
        query = sa.select(step.c.result, step.c.at)
        kept = self.rows(query.where(step.c.job == parent, step.c.key == key))
        if not kept:
            return None
        id, at = int(kept[0][0]), kept[0][1]
        found = self.rows(sa.select(job.c.state).where(job.c.id == id))
        if not found or found[0][0] not in BAD:
            return id if found else None
        again = sa.select(event.c.n).where(event.c.job == parent, event.c.at >= at)
        again = again.where(event.c.state == QUEUED, event.c.reason.like("retry%"))
        return None if self.rows(again.limit(1)) else id

    def _ended_between(self, parent: int, child: int) -> bool:
        """Whether a child has ended badly after one attempt of its parent and before the next."""
        query = sa.select(event.c.job, event.c.state, event.c.reason)
        waits = found = False
        for id, state, reason in self.rows(
            query.where(event.c.job.in_((parent, child))).order_by(event.c.n)
        ):
            if id == child:
                found = waits and state in BAD
            elif state in (QUEUED, RUNNING):
                waits = state == QUEUED and reason.startswith("retry")
        return found

    def unfinished(self, ids: Sequence[int]) -> list[int]:
        """Those of these jobs that have not ended, or are gone, in the order given."""
        ended: set[int] = set()
        for start in range(0, len(ids), CHUNK):
            those = job.c.id.in_(ids[start : start + CHUNK])
            query = sa.select(job.c.id).where(those, job.c.state.in_(FINAL))
            ended.update(row[0] for row in self.rows(query))
        return [id for id in ids if id not in ended]

    def unfinished_children(self, id: int) -> list[tuple[int, str, str]]:
        """What a job has queued itself and has not ended: id, type, state."""
        query = sa.select(job.c.id, job.c.type, job.c.state).where(
            job.c.parent == id, job.c.child_key.is_not(None), job.c.state.not_in(FINAL)
        )
        return [(*row,) for row in self.rows(query.order_by(job.c.id))]

    def step(self, id: int, key: str) -> list[Any] | None:
        """What a job's step has returned, in a list; None when it was not done. Raises NoKey."""
        query = sa.select(step.c.result).where(step.c.job == id, step.c.key == key)
        found = self.rows(query)
        return [self._vault.decode(found[0][0])] if found else None

    def counts(self) -> dict[int, dict[str, int]]:
        """How many jobs each lane has in each state. Costs the same with a million rows."""
        found: dict[int, dict[str, int]] = {}
        for lane, state, n in self.rows(sa.select(tally.c.lane, tally.c.state, tally.c.n)):
            found.setdefault(lane, {})[state] = n
        return found

    def oldest(self, lanes: Collection[int]) -> dict[int, int]:
        """When the job at the head of each lane was submitted: one index look-up a lane."""
        with self._database.read() as connection:
            found = {}
            for lane in lanes:
                head = (
                    sa.select(job.c.created_at)
                    .where(job.c.ready == lane)
                    .order_by(job.c.rank, job.c.ord, job.c.id)
                    .limit(1)
                )
                at = connection.execute(head).scalar()
                if at is not None:
                    found[lane] = at
            return found

    def oldest_delayed(self, lane: int) -> int | None:
        """When the oldest job of a lane that waits for a time was submitted.

        Looked for among the next 1,000 of all lanes, however many there are.
        """
        next_due = (
            sa.select(job.c.lane, job.c.created_at)
            .where(job.c.due_at.is_not(None))
            .order_by(job.c.due_at)
            .limit(AHEAD_LIMIT)
            .subquery()
        )
        query = sa.select(sa.func.min(next_due.c.created_at)).where(next_due.c.lane == lane)
        at: int | None = self.rows(query)[0][0]
        return at

    def awaited(self, id: int, limit: int = LIST_LIMIT) -> tuple[list[tuple[int, str]], int]:
        """The first jobs that have to be done before this one, and how many there are.

        Each with its state, those that have ended badly first.
        """
        needed = edge.c.job == id, job.c.id == edge.c.needs
        by_end = sa.case((job.c.state.in_(FINAL), 0), else_=1)
        query = sa.select(job.c.id, job.c.state).where(*needed).order_by(by_end, job.c.id)
        found = [(row[0], row[1]) for row in self.rows(query.limit(limit))]
        if len(found) < limit:
            return found, len(found)
        return found, self.rows(sa.select(sa.func.count()).where(edge.c.job == id))[0][0]

    def batch(self, id: int) -> dict[str, Any] | None:
        """What a job that follows a batch has of it; None for all others."""
        found = self.rows(sa.select(job.c.options, job.c.waits).where(job.c.id == id))
        kept = kept_batch(found[0].options) if found else {}
        if not kept:
            return None
        left = found[0].waits - kept["open"]
        return {"open": kept["open"], "when": kept["when"], "members": kept["n"], "left": left}

    def turn(self, id: int) -> Turn | Pace | None:
        """Behind whom, or for what rate, a job waits for its turn; None when it does not."""
        found = self.rows(sa.select(job.c.serial_key, job.c.options).where(job.c.id == id))
        if not found or found[0].serial_key is None:
            return None
        line, options = found[0]
        if is_paced(line):
            return self._paced_turn(id, line, kept_text(options))
        of_line = sa.select(job.c.id).where(job.c.serial_key == line)
        name = schema.limit.c.name == LINE + line
        first = self.rows(of_line.where(job.c.id == schema.limit.c.at, name))
        holder = (first or self.rows(of_line.order_by(job.c.id).limit(1)) or [(id,)])[0][0]
        return None if holder == id else Turn(holder, kept_text(options)["serial"])

    def _paced_turn(self, id: int, line: str, limits: dict[str, Any]) -> Pace | None:
        rows = self.rows(
            sa.select(schema.limit.c.name, schema.limit.c.at).where(
                schema.limit.c.name.in_([LINE + line, RATE + line])
            )
        )
        at = {row.name: row.at for row in rows}
        holder, free_at = at.get(LINE + line, 0), at.get(RATE + line, 0)
        of_line = sa.select(sa.func.count()).where(job.c.serial_key == line)
        ahead = 0
        if holder != id:
            before = of_line.where(sa.or_(job.c.id < id, job.c.id == holder))
            ahead = self.rows(before)[0][0]
        not_before = max(free_at, when.now() if ahead else 0) + ahead * limits["every_us"]
        return Pace(limits["pace"], not_before) if not_before > when.now() else None

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "name": row["name"],
                "machine": row["machine"],
                "pid": row["pid"],
                "incarnation": row["id"],
                "started_at": when.iso(row["started_at"]),
                "beat_at": when.iso(row["beat_at"]),
            }
            for row in self._mappings(sa.select(node).order_by(node.c.name))
        ]

    def fired(self, schedules: Collection[str]) -> dict[str, tuple[int, int, str | None]]:
        """When each schedule has fired last, with the job's id and its state, if it is kept."""
        with self._database.read() as connection:
            found: dict[str, tuple[int, int, str | None]] = {}
            for name in schedules:
                last = (
                    sa.select(slot.c.at, slot.c.job, job.c.state)
                    .join_from(slot, job, slot.c.job == job.c.id, isouter=True)
                    .where(slot.c.schedule == name, slot.c.at > 0, slot.c.job.is_not(None))
                    .order_by(slot.c.at.desc())
                    .limit(1)
                )
                for at, id, state in connection.execute(last):
                    found[name] = (at, id, state)
            return found

    # What lists are made of, too

    def shown(self, row: sa.Row[Any]) -> dict[str, Any]:
        """A row of SHOWN or LISTED as JSON."""
        fields = dict(row._mapping)
        lane = fields.pop("lane")
        secret = self._secret()
        params = self._vault.decode(fields["params"], lenient=True)
        text = fields.pop("data")
        data = self._vault.decode(text, lenient=True) if text else params
        hidden = secret_texts((params, data), secret)
        fields["params"] = mask(params, secret, hidden)
        fields["jobdata"] = mask(data, secret, hidden)
        for name in ("result", "progress"):
            text = fields[name]
            value = self._vault.decode(text, lenient=True) if text is not None else None
            fields[name] = mask(value, secret, hidden)
        fields["message"] = scrub(fields["message"] or "", hidden)
        fields["reason"] = scrub(fields["reason"], hidden)
        fields["priority"] = -fields.pop("rank")
        fields["cancel_asked"] = bool(fields["cancel_asked"])
        for name in TIMES:
            fields[name] = when.iso(fields[name]) if fields[name] is not None else None
        held = self.blocked(lane) if fields["state"] == QUEUED else ""
        if fields["reason"] == LOCKED and fields["state"] == QUEUED:
            held = f"{LOCKED}: {fields['message']}"
        if held:
            fields["state"], fields["reason"] = BLOCKED, held
        return fields

    def rows(self, query: sa.Select[Any]) -> list[Any]:
        with self._database.read() as connection:
            return list(connection.execute(query))

    def _sql(self, sql: Sql, values: Sequence[Sequence[Any]], **params: Any) -> list[Any]:
        """What a statement over `rows()` finds."""
        text, given = sql.filled(self._database.dialect, values, params)
        with self._database.read() as connection:
            return list(connection.exec_driver_sql(text, given).fetchall())

    def _mappings(self, query: sa.Select[Any]) -> list[Any]:
        with self._database.read() as connection:
            return list(connection.execute(query).mappings())


def _change(row: Mapping[str, Any], hidden: Sequence[str]) -> dict[str, Any]:
    """A change of state as it is shown."""
    return {
        "n": row["n"],
        "at": when.iso(row["at"]),
        "state": row["state"],
        "reason": row["reason"],
        "message": scrub(row["message"] or "", hidden),
        "attempt": row["attempt"],
        "node": row["node"],
        "who": row["who"],
    }


def attempt_state(end: dict[str, Any]) -> str:
    """How an attempt ended, from the change of state that ended it."""
    if end["state"] != QUEUED:
        return str(end["state"])
    return FAILED if end["reason"].startswith("retry ") else "interrupted"
