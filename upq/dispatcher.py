"""The front desk: what can be asked of upq, by whom. All doors call it, none decides for itself.

What is asked for as a job goes to the intake.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from upq import protocol, when
from upq.access import Peer
from upq.census import Census
from upq.claimer import Claimer
from upq.clauses import CHUNK
from upq.desk import Ends
from upq.errors import BadParams, NotFound, TimedOut, UnknownCommand
from upq.intake import Intake
from upq.job import BLOCKED, DONE, FAILED, FINAL, QUEUED, RUNNING, Lane
from upq.jobtypes import JobTypes
from upq.lists import Filter, Found, Lists
from upq.notify import NOTIFY
from upq.output import Piece, stored_piece
from upq.overview import Overview
from upq.protocol import Request
from upq.queue import Queue
from upq.reasons import Reasons
from upq.secret import mask
from upq.settings import ScheduleSettings
from upq.views import Views
from upq.whole import count_steps
from upq.wire import Ack

log = logging.getLogger(__name__)

#: Ids that the answer to a `cancel` or `retry` of many has.
MANY_SHOWN = 100

Alive = Callable[[], bool]


class Dispatcher:
    """One for the daemon; any thread may call it. Errors are RequestErrors."""

    def __init__(  # noqa: PLR0917, the daemon wires it
        self,
        types: JobTypes,
        queue: Queue,
        views: Views,
        lists: Lists,
        ends: Ends,
        claimer: Claimer,
        intake: Intake,
        census: Census,
        version: str,
    ) -> None:
        self._types = types
        self._queue = queue
        self._views = views
        self._lists = lists
        self._ends = ends
        self._claimer = claimer
        self._intake = intake
        self._census = census
        self._version = version
        self._started_at = when.now()
        #: What `reload` does and answers; set by the daemon, raises RequestError when the file has
        #: faults.
        self.reload: Callable[[], dict[str, Any]] = dict
        #: The schedules, each with its next slots; set by the daemon.
        self.schedules: Callable[[], list[tuple[ScheduleSettings, list[int]]]] = list
        #: How many threads hang in jobs that were given up; set by the daemon.
        self.abandoned: Callable[[], int] = int
        self._counters = Counter[str]()
        self._counting = threading.Lock()
        self._verbs: dict[str, Callable[[dict[str, Any], Peer, Alive], Any]] = {
            "help": self._help, "ping": self._ping, "version": self._say_version,
            "status": self._status, "queues": self._queues, "jobs": self._jobs,
            "show": self._show, "output": self._output, "cancel": self._cancel,
            "retry": self._retry, "wait": self._wait, "check": self._check, "why": self._why,
            "nodes": self._nodes, "schedules": self._schedules, "pause": self._pause,
            "resume": self._resume, "reload": self._reload, "drain": self._drain,
        }  # fmt: skip
        self._reasons = Reasons(types, queue, views, claimer, intake)
        self._overview = Overview(views, ends, self._steps)

    def count(self, acks: int, errs: int) -> None:
        """Note how many replies of each kind went out."""
        with self._counting:
            self._counters["acks"] += acks
            self._counters["errs"] += errs

    @property
    def is_idle(self) -> bool:
        """Whether no job runs here, that would want Python's lock."""
        return not self._queue.holds_claims

    # Verbs

    def answer(self, request: Request, peer: Peer, alive: Alive) -> Any:
        """What a control verb answers, as JSON. `alive` says whether the client still listens."""
        verb = self._verbs.get(request.verb)
        if verb is None:
            raise UnknownCommand(f"{request.verb} is not in this version yet")
        return verb(request.params, peer, alive)

    def _help(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        verbs = {
            f"{name} {verb.usage}".strip(): verb.meaning
            for name, verb in protocol.VERBS.items()
            if name in self._verbs
        }
        types = {
            name: {
                "params": list(kind.params.names if kind.params else ()),
                "declared": str(kind.params or ""),
            }
            for name, kind in self._types.by_name.items()
            if kind.cls is not None and name != NOTIFY
        }
        return {
            "submit": "<job type> [key:value]... [@option:value]...",
            "verbs": verbs,
            "types": types,
        }

    def _ping(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        return {"pong": when.iso(when.now())}

    def _say_version(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        return {"version": self._version}

    def _status(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._intake.access.must_read(peer)
        trouble = self._queue.writer.trouble
        by_lane = {} if trouble else self._views.counts()
        stopping = self._intake.stopping
        state = "stopping" if stopping else "drained" if self._claimer.drained else "running"
        return {
            "state": "degraded" if trouble else state,
            "trouble": trouble,
            "version": self._version,
            "pid": os.getpid(),
            "node": self._queue.node_name,
            "database": self._queue.database.kind,
            "durable": self._queue.database.durable,
            "uptime_s": (when.now() - self._started_at) // 1_000_000,
            "jobs": self._census.totals(by_lane),
            "abandoned": self.abandoned(),
            "broken": {kind.name: str(kind.fault) for kind in self._types.broken()},
            "counters": {
                "acks": self._counters["acks"],
                "errs": self._counters["errs"],
                "started": self._queue.started,
                "started_again": self._queue.started_again,
                "commits": self._queue.writer.commits,
                "db_retries": self._queue.writer.retried,
                "db_recoveries": self._queue.writer.recoveries,
                "fenced": self._queue.fenced,
                "rescued": self._queue.rescued,
                "interrupted": self._queue.interrupted,
                "crashed": self._queue.crashed,
                "retried": self._queue.retried,
                "released": self._queue.released,
                "asked_again": self._queue.asked_again,
                "truncated": self._queue.truncated,
            },
            "oldest_queued_s": max(self._census.ages_s(by_lane).values(), default=0),
            **self._census.outbox(by_lane),
        }

    def _queues(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._intake.access.must_read(peer)
        return {"queues": self._census.list_queues()}

    def _jobs(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._intake.access.must_read(peer, args.get("submitter", ""))
        limit, before = args.pop("limit", 20), args.pop("before", None)
        page = self._lists.page(self._queue.lanes, self._filter(args), limit, before)
        return {"jobs": page.jobs, "next": page.next}

    def _filter(self, args: dict[str, Any]) -> Filter:
        """Which jobs are meant; lanes are told where the counts of them save a long look."""
        state, type, queue = args.get("state"), args.get("type"), args.get("queue")
        lanes = None
        if queue is not None or (state is not None and type is not None):
            lanes = frozenset(
                lane.id
                for lane in self._queue.lanes.values()
                if queue in (None, lane.queue) and type in (None, lane.type)
            )
            types = {lane.type for lane in self._queue.lanes.values() if lane.id in lanes}
            type = types.pop() if len(types) == 1 else type
        return Filter(state, type, lanes, args.get("submitter"))

    def _show(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        id = args["id"]
        job = self._readable(id, peer)
        attempts = self._views.attempts(id)
        if attempts and job["state"] == RUNNING and (live := self._live(id, 0)):
            attempts[-1]["output_bytes"] = live[1].size_bytes
        return {
            "job": job,
            "why": self._reasons.why(job)["why"],
            "history": self._views.history(id),
            "children": self._views.children(id),
            "attempts": attempts,
            **self._overview.show(id),
            **({"batch": batch} if (batch := self._views.batch(id)) else {}),
        }

    def _steps(self, type: str) -> int:
        """How many jobs follow one of a type."""
        kind = self._types.by_name.get(type)
        return count_steps(kind.cfg.subjobs) if kind else 0

    def _live(self, id: int, start: int) -> tuple[int, Piece] | None:
        """What a job that runs in this daemon has written so far, and which of its starts it is."""
        for job, plugin in self._claimer.running():
            if job.id == id:
                return job.starts, plugin.written(start) if plugin else Piece("", start, 0)
        return None

    def _output(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        id, start, which = args["id"], args.get("from", 0), args.get("start")
        job = self._readable(id, peer)
        live = self._live(id, start) if job["state"] == RUNNING else None
        if live is not None and which in (None, live[0]):
            text, next_, size_bytes = live[1]
            return {"id": id, "attempt": live[0], "text": text, "size_bytes": size_bytes,
                    "truncated": False, "running": True, "next": next_}  # fmt: skip
        if which is None and job["state"] == RUNNING:
            raise NotFound(f"job {id} runs in another daemon: its output is there at its end")
        found = self._views.output(id, which)
        text, next_, _ = stored_piece(found["text"], found["size_bytes"], start)
        return {**found, "text": text, "running": False, "next": next_}

    def _cancel(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        if "id" not in args:
            return self._many("cancel", args, peer, [QUEUED, BLOCKED, RUNNING])
        job = self._managed(args["id"], peer, "cancel")
        self._alone(args)
        state, below = self._queue.cancel(job["id"], peer.name)
        more = f", with {below} below it" if below else ""
        log.info("(%s:%d) cancelled by %s%s", job["type"], job["id"], peer.name, more)
        return {"id": job["id"], "state": state, "below": below}

    def _retry(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        if "id" not in args:
            return self._many("retry", args, peer, [FAILED])
        job = self._managed(args["id"], peer, "retry")
        self._alone(args)
        id, below = job["id"], self._overview.again(args["id"])
        is_batch = self._views.batch(id) is not None
        itself = id in below or not below
        below = below[1:] if itself else below
        if itself and not is_batch:
            self._queue.retry(id, peer.name)
            job["state"] = QUEUED
        n = sum(
            len(self._queue.retry_many(below[start : start + CHUNK], peer.name))
            for start in range(0, len(below), CHUNK)
        )
        if itself and is_batch:  # after its members, so that it waits for them
            self._queue.retry(id, peer.name)
            job["state"] = self._views.job(id)["state"]
        more = f", with {n} below it" if n else ""
        log.info("(%s:%d) queued again by %s%s", job["type"], id, peer.name, more)
        return {"id": id, "state": job["state"], "below": n}

    def _alone(self, args: dict[str, Any]) -> None:
        if len(args) > 1:
            raise BadParams("an id stands alone; or say which jobs: type, state, queue, since")

    def _many(
        self, verb: str, args: dict[str, Any], peer: Peer, states: list[str]
    ) -> dict[str, Any]:
        """Cancel or retry all jobs of a kind that the peer may manage, CHUNK a transaction."""
        if not args.keys() - {"limit"}:
            raise BadParams(f"usage: {verb} {protocol.VERBS[verb].usage}")
        state = args.get("state")
        if state is not None:
            if (state in FINAL) != (verb == "retry") or state == DONE:
                raise BadParams(f"{verb}: a job that is {state} cannot be meant")
            states = [state]
        limit, now = args.get("limit"), when.now()
        since_s = args.get("since")
        since_at = now - round(since_s * 1e6) if since_s is not None else None
        kind = " ".join(f"{key}:{value}" for key, value in args.items())
        log.info("%s %s asked by %s", verb, kind, peer.name)
        ids: list[int] = []
        denied = n = 0
        for each in states:
            wanted = self._filter({**args, "state": each})
            for chunk in self._lists.chunks(wanted, since_at, now):
                mine = [one for one in chunk if self._intake.access.may_manage(peer, one.submitter)]
                denied += len(chunk) - len(mine)
                if limit is not None:
                    mine = mine[: limit - n]
                changed = self._change(verb, mine, peer)
                n += len(changed)
                ids += changed[: MANY_SHOWN - len(ids)]
                if n == limit or self._intake.stopping:
                    return {"n": n, "ids": ids, "denied": denied}
        return {"n": n, "ids": ids, "denied": denied}

    def _change(self, verb: str, jobs: list[Found], peer: Peer) -> list[int]:
        ids = [one.id for one in jobs]
        if not ids:
            return []
        if verb == "retry":
            return self._queue.retry_many(ids, peer.name)
        return self._queue.cancel_many(ids, peer.name)[0]

    def _wait(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        id, timeout_s = args["id"], args.get("timeout")
        self._readable(id, peer)
        if args.get("whole"):
            if not self._overview.wait(id, timeout_s, alive):
                raise TimedOut(f"job {id} and all below it have not ended in time")
            return {"job": self._views.job(id), "whole": self._overview.told(id)}
        if self._ends.wait(id, timeout_s, alive) is None:
            raise TimedOut(f"job {id} has not ended in time")
        return {"job": self._views.job(id)}

    def _check(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        request = protocol.parse(args["line"].encode())
        if request is None or request.kind != protocol.SUBMIT:
            raise BadParams("check: a line that submits a job belongs here")
        prepared = self._intake.prepare(request, peer)
        kind = self._types.get(request.verb)
        if isinstance(prepared, Ack):
            return {
                "accepted": True,
                "type": kind.name,
                "queued": False,
                "message": prepared.message,
            }
        new, message = prepared
        queue = new.queue or new.type
        lane = self._queue.known_lane(queue, new.type) or Lane(0, queue, new.type, False)
        return {
            "accepted": True,
            "type": new.type,
            "queue": queue,
            "params": mask(new.params, self._types.secret, kind.hidden_in(new.params)),
            "declared": str(kind.params or ""),
            "priority": new.priority,
            "run_at": when.iso(new.run_at) if new.run_at is not None else None,
            "message": message,
            "ahead": self._views.counts().get(lane.id, {}).get(QUEUED, 0),
            "reason": self._claimer.reason(lane),
        }

    def _why(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        job = self._readable(args["id"], peer)
        why = self._reasons.why(job)
        return {"id": job["id"], "state": job["state"], **why, "progress": job["progress"]}

    def _nodes(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._intake.access.must_read(peer)
        return {"nodes": self._views.nodes()}

    def _schedules(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._intake.access.must_read(peer)
        known = self.schedules()
        fired = self._views.fired([one.name for one, _ in known])
        return {
            "schedules": [
                {
                    "name": one.name,
                    "type": one.type,
                    "params": mask(one.request.params, self._types.secret),
                    "expression": one.times.expression,
                    "english": one.times.explain(),
                    "timezone": one.times.zone,
                    "missed": one.missed,
                    "last_at": when.iso(last[0]) if last else None,
                    "last_job": last[1] if last else None,
                    "last_state": last[2] if last else None,
                    "next": [when.iso(at) for at in coming],
                }
                for one, coming in known
                if one.times is not None
                for last in [fired.get(one.name)]
            ]
        }

    def _pause(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._intake.access.must_admin(peer, "pause")
        self._queue.pause(args["queue"], True)
        log.info("queue %s paused by %s", args["queue"], peer.name)
        return {"queue": args["queue"], "paused": True}

    def _resume(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._intake.access.must_admin(peer, "resume")
        queue = args.get("queue")
        if queue is None:
            self._intake.refuse_if_stopping()
            self._claimer.drained = False
        else:
            self._queue.pause(queue, False)
        self._claimer.heat()
        log.info("%s resumed by %s", f"queue {queue}" if queue else "the daemon", peer.name)
        return {"queue": queue, "paused": False}

    def _drain(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._intake.access.must_admin(peer, "drain")
        self._claimer.drain()
        log.info("drained by %s: no more jobs are started", peer.name)
        return {"drained": True}

    def _reload(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._intake.access.must_admin(peer, "reload")
        return {"reloaded": True, **self.reload()}

    # Jobs that a peer may see, or change

    def _readable(self, id: int, peer: Peer) -> dict[str, Any]:
        job = self._views.job(id)
        self._intake.access.must_read(peer, job["submitter"])
        return job

    def _managed(self, id: int, peer: Peer, verb: str) -> dict[str, Any]:
        job = self._views.job(id)
        self._intake.access.must_manage(peer, job["submitter"], verb)
        return job
