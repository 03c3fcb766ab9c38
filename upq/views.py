"""Reads only: lists, counts, history. What they return is JSON; secrets are masked here.

Times leave as ISO 8601 text in UTC. Any thread may ask; all raise Unavailable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import sqlalchemy as sa

from upq import schema, when
from upq.db import Database
from upq.errors import NotFound
from upq.job import BLOCKED, FINAL, QUEUED
from upq.limits import kept_text
from upq.notify import mask, scrub, secret_texts
from upq.statements import AGAIN, LINE

job, event, output, tally, edge, node = (
    schema.job, schema.event, schema.output, schema.tally, schema.edge, schema.node,
)  # fmt: skip
slot = schema.slot

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


class Turn(NamedTuple):
    """What a job waits for that takes turns with others."""

    #: The job whose turn it is; while that is nobody's, the first of the line.
    holder: int
    key: str


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
    ) -> None:
        self._database = database
        self._blocked = blocked
        self._secret = secret

    def job(self, id: int) -> dict[str, Any]:
        """Raises NotFound."""
        found = self._rows(sa.select(*SHOWN).where(job.c.id == id))
        if not found:
            raise NotFound(f"no job {id}")
        return self._shown(found[0])

    def jobs(
        self,
        lanes: Collection[int],
        state: str | None = None,
        type: str | None = None,
        limit: int = 20,
        only: Collection[int] | None = None,
    ) -> list[dict[str, Any]]:
        """The newest first. `lanes` are all there are: blocked is said of lanes, not of rows.

        only: jobs of these lanes.
        """
        held = [lane for lane in lanes if self._blocked(lane)]
        queries = [sa.select(*LISTED)]
        if state == BLOCKED:
            waiting = sa.select(*LISTED).where(job.c.state == QUEUED, job.c.lane.in_(held))
            # With no lane held the second would read all that is queued, and find nothing.
            queries = [queries[0].where(job.c.state == BLOCKED), *([waiting] if held else [])]
        elif state is not None:
            queries[0] = queries[0].where(job.c.state == state)
            if state == QUEUED and held:
                queries[0] = queries[0].where(job.c.lane.not_in(held))
        # Jobs that have not ended have no ended_at: the index on states gives them by id.
        order = (job.c.id.desc(),) if state is None else (job.c.ended_at.desc(), job.c.id.desc())
        limit = min(limit, LIST_LIMIT)
        rows = []
        for query in queries:
            if type is not None:
                query = query.where(job.c.type == type)
            if only is not None:
                query = query.where(job.c.lane.in_(only))
            rows += self._rows(query.order_by(*order).limit(limit))
        if len(queries) > 1:
            rows.sort(key=lambda row: -row.id)
        return [self._shown(row) for row in rows[:limit]]

    def next_jobs(self, lane: int, limit: int) -> list[dict[str, Any]]:
        """The jobs of a lane that can be claimed, in the order of the claims."""
        query = sa.select(*LISTED).where(job.c.ready == lane)
        query = query.order_by(job.c.rank, job.c.ord, job.c.id).limit(limit)
        return [self._shown(row) for row in self._rows(query)]

    def ahead(
        self, id: int, lane: int, same: Collection[int] = (), first: Collection[int] = ()
    ) -> int:
        """How many jobs of the lane go before this one, counted to 1,000.

        Also those of other lanes: all of `first`, and of `same` those that come before it.
        """
        query = sa.select(job.c.id).where(job.c.ready == lane)
        heads = self._rows(query.order_by(job.c.rank, job.c.ord, job.c.id).limit(AHEAD_LIMIT))
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
        return int(self._rows(sa.select(sa.func.count()).select_from(counted))[0][0])

    def history(self, id: int) -> list[dict[str, Any]]:
        """Every change of state, the oldest first."""
        query = sa.select(event).where(event.c.job == id).order_by(event.c.n)
        hidden = self._hidden(id)
        return [
            {
                "n": row["n"],
                "at": when.iso(row["at"]),
                "state": row["state"],
                "reason": row["reason"],
                "message": scrub(row["message"] or "", hidden),
                "attempt": row["attempt"],
                "node": row["node"],
                "who": row["who"],
            }
            for row in self._mappings(query)
        ]

    def children(self, id: int) -> list[dict[str, Any]]:
        query = sa.select(*LISTED).where(job.c.parent == id).order_by(job.c.id).limit(LIST_LIMIT)
        return [self._shown(row) for row in self._rows(query)]

    def output(self, id: int) -> dict[str, Any]:
        """What the latest attempt that wrote anything has written. Raises NotFound."""
        query = sa.select(output).where(output.c.job == id).order_by(output.c.attempt.desc())
        found = self._mappings(query.limit(1))
        if not found:
            self.job(id)
            raise NotFound(f"job {id} has no output")
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
        secret = self._secret()
        if not secret:
            return []
        rows = self._rows(sa.select(job.c.params, job.c.data).where(job.c.id == id))
        return secret_texts([json.loads(text) for row in rows for text in row if text], secret)

    def end(self, id: int) -> End | None:
        """How a job has ended; None while it has not. Raises NotFound."""
        query = sa.select(job.c.state, job.c.result, job.c.message).where(job.c.id == id)
        found = self._rows(query)
        if not found:
            raise NotFound(f"no job {id}")
        state, result, message = found[0]
        if state not in FINAL:
            return None
        return End(state, json.loads(result) if result is not None else None, message or "")

    def child(self, key: str) -> tuple[int, bool] | None:
        """The id of the job with a child key, and whether it is to run again when asked for."""
        query = sa.select(job.c.id, job.c.state, job.c.reason).where(job.c.child_key == key)
        found = self._rows(query)
        if not found:
            return None
        id, state, reason = found[0]
        return id, state in FINAL and reason == AGAIN

    def counts(self) -> dict[int, dict[str, int]]:
        """How many jobs each lane has in each state. Costs the same with a million rows."""
        found: dict[int, dict[str, int]] = {}
        for lane, state, n in self._rows(sa.select(tally.c.lane, tally.c.state, tally.c.n)):
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
        at: int | None = self._rows(query)[0][0]
        return at

    def awaited(self, id: int) -> list[tuple[int, str]]:
        """The jobs that have to be done before this one, with their states."""
        query = sa.select(job.c.id, job.c.state).where(edge.c.job == id, job.c.id == edge.c.needs)
        return [(row[0], row[1]) for row in self._rows(query.order_by(job.c.id))]

    def turn(self, id: int) -> Turn | None:
        """Behind whom a job waits for its turn; None when it does not."""
        found = self._rows(sa.select(job.c.serial_key, job.c.options).where(job.c.id == id))
        if not found or found[0].serial_key is None:
            return None
        line, options = found[0]
        of_line = sa.select(job.c.id).where(job.c.serial_key == line)
        name = schema.limit.c.name == LINE + line
        first = self._rows(of_line.where(job.c.id == schema.limit.c.at, name))
        holder = (first or self._rows(of_line.order_by(job.c.id).limit(1)) or [(id,)])[0][0]
        return None if holder == id else Turn(holder, kept_text(options)["serial"])

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

    def _shown(self, row: sa.Row[Any]) -> dict[str, Any]:
        fields = dict(row._mapping)
        lane = fields.pop("lane")
        secret = self._secret()
        params = json.loads(fields["params"])
        text = fields.pop("data")
        data = json.loads(text) if text else params
        fields["params"], fields["jobdata"] = mask(params, secret), mask(data, secret)
        for name in ("result", "progress"):
            fields[name] = json.loads(fields[name]) if fields[name] is not None else None
        fields["result"] = mask(fields["result"], secret)
        fields["message"] = scrub(fields["message"] or "", secret_texts((params, data), secret))
        fields["priority"] = -fields.pop("rank")
        fields["cancel_asked"] = bool(fields["cancel_asked"])
        for name in TIMES:
            fields[name] = when.iso(fields[name]) if fields[name] is not None else None
        held = self._blocked(lane) if fields["state"] == QUEUED else ""
        if held:
            fields["state"], fields["reason"] = BLOCKED, held
        return fields

    def _rows(self, query: sa.Select[Any]) -> list[Any]:
        with self._database.read() as connection:
            return list(connection.execute(query))

    def _mappings(self, query: sa.Select[Any]) -> list[Any]:
        with self._database.read() as connection:
            return list(connection.execute(query).mappings())
