"""The front desk: what can be asked of upq, by whom. All doors call it, none decides for itself."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from upq import protocol, when
from upq.access import Access, Peer
from upq.claimer import Claimer
from upq.config import Settings
from upq.desk import Ends
from upq.errors import (
    BadParams,
    Busy,
    Denied,
    RequestError,
    Stopping,
    TimedOut,
    TooLong,
    UnknownCommand,
)
from upq.job import (
    BLOCKED,
    CANCELLED,
    FINAL,
    QUEUED,
    RESULT_LIMIT_BYTES,
    RUNNING,
    STATES,
    Accepted,
    NewJob,
)
from upq.jobtypes import JobType, JobTypes
from upq.notify import (
    NOTIFY,
    Service,
    is_allowed,
    mask,
    parse_target,
    service_fault,
    shown_target,
    split_targets,
)
from upq.plugins import Desk
from upq.protocol import Options, Request
from upq.queue import Queue
from upq.record import encode
from upq.views import Views
from upq.wire import Ack

log = logging.getLogger(__name__)

#: Options of a submit that later versions read.
NOT_YET = {"queue": "@queue:", "node": "@node:", "expires_s": "@expires:"}
#: Jobs that one submit_many may hold.
MANY_LIMIT = 10_000
#: Seconds that the length of the queues is remembered for `max_queue`.
LENGTH_AGE_S = 0.2

Alive = Callable[[], bool]


class Dispatcher:
    """One for the daemon; any thread may call it. Errors are RequestErrors."""

    def __init__(  # noqa: PLR0917, the daemon wires it
        self,
        settings: Settings,
        types: JobTypes,
        queue: Queue,
        views: Views,
        ends: Ends,
        claimer: Claimer,
        version: str,
    ) -> None:
        #: What jobs that are asked or run may ask back; set before the first submit.
        self.desk: Desk | None = None
        self._queue = queue
        self._views = views
        self._ends = ends
        self._claimer = claimer
        self._version = version
        self._started_at = when.now()
        self._length = (0.0, 0)
        #: Set when the daemon begins to stop: submits are refused.
        self.stopping = False
        #: What `reload` does; set by the daemon, raises RequestError when the file has faults.
        self.reload: Callable[[], list[str]] = list
        self._counters = Counter[str]()
        self._counting = threading.Lock()
        self._verbs: dict[str, Callable[[dict[str, Any], Peer, Alive], Any]] = {
            "help": self._help, "ping": self._ping, "version": self._say_version,
            "status": self._status, "queues": self._queues, "jobs": self._jobs,
            "show": self._show, "output": self._output, "cancel": self._cancel,
            "retry": self._retry, "wait": self._wait, "check": self._check, "why": self._why,
            "nodes": self._nodes, "pause": self._pause, "resume": self._resume,
            "reload": self._reload, "drain": self._drain,
        }  # fmt: skip
        self._types = types
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over a configuration, at the start or on reload."""
        access = settings.access
        self.access = Access(access.read, access.submit, access.admin)
        self._notify_allowed = access.notify
        self._max_queue = settings.listen.max_queue

    def count(self, acks: int, errs: int) -> None:
        """Note how many replies of each kind went out."""
        with self._counting:
            self._counters["acks"] += acks
            self._counters["errs"] += errs

    # Submits

    def is_quick(self, request: Request) -> bool:
        """Whether it is a submit that runs no code of a job's own and waits for the commit only."""
        if request.kind != protocol.SUBMIT:
            return False
        kind = self._types.by_name.get(request.verb)
        return kind is None or kind.cls is None or (kind.cls.queued and not kind.checks)

    def submit_all(self, asked: Sequence[tuple[Request, Peer]]) -> list[Ack | RequestError]:
        """Queue jobs, each for itself; returns in their order when they are safe on disk."""
        answers: list[Ack | RequestError] = []
        places: list[tuple[int, str]] = []
        new: list[list[NewJob]] = []
        for place, (request, peer) in enumerate(asked):
            try:
                prepared = self._prepare(request, peer)
            except RequestError as error:
                answers.append(error)
                continue
            if isinstance(prepared, Ack):
                answers.append(prepared)
                continue
            one, message = prepared
            answers.append(Ack(0))  # until it has its id
            places.append((place, message))
            new.append([one])
        for (place, message), (one,), stored in zip(places, new, self._store(new), strict=True):
            if isinstance(stored, RequestError):
                answers[place] = stored
                continue
            id, duplicate = stored[0]
            log.debug("(%s:%d) added to queue", one.type, id)
            answers[place] = Ack(id, "duplicate" if duplicate else message, duplicate)
        return answers

    def submit_many(self, requests: Sequence[Request], peer: Peer) -> list[Ack]:
        """Queue jobs in one transaction: all of them, or none and the first error."""
        if len(requests) > MANY_LIMIT:
            raise BadParams(f"submit_many: {len(requests)} jobs, at most {MANY_LIMIT}")
        new: list[NewJob] = []
        messages: list[str] = []
        for at, request in enumerate(requests):
            try:
                prepared = self._prepare(request, peer)
            except RequestError as error:
                raise type(error)(f"job {at + 1} of {len(requests)}: {error}") from error
            if isinstance(prepared, Ack):
                raise BadParams(f"job {at + 1}: {request.verb} is answered, it queues nothing")
            new.append(prepared[0])
            messages.append(prepared[1])
        if not new:
            return []
        stored = self._store([new])[0]
        if isinstance(stored, RequestError):
            raise stored
        return [Ack(a.id, m, a.duplicate) for a, m in zip(stored, messages, strict=True)]

    def submit_child(self, new: NewJob) -> Accepted:
        """Queue what a running job asks for: checked as any submit, without limits and roles."""
        kind = self._types.get(new.type)
        kind.runnable()
        new.params = kind.accept(new.params)
        size = len(encode(new.params))
        if size > RESULT_LIMIT_BYTES:
            raise TooLong(f"the params have {size} bytes, more than {RESULT_LIMIT_BYTES}")
        new.priority = kind.cfg.priority
        if kind.checks:
            self._ask(kind, new.params)
        stored = self._queue.submit([[new]])[0]
        if isinstance(stored, RequestError):
            raise stored
        return stored[0]

    def _store(self, new: list[list[NewJob]]) -> list[Any]:
        if not new:
            return []
        try:
            return self._queue.submit(new)
        except RequestError as error:
            return [error] * len(new)

    def _prepare(self, request: Request, peer: Peer) -> tuple[NewJob, str] | Ack:
        """A request as the job it asks for, with the words of its check(); or its answer."""
        if self.stopping:
            raise Stopping("the daemon is stopping; ask again when it is back")
        kind = self._types.get(request.verb)
        if not self.access.may_submit(peer, kind.submitters):
            raise Denied(f"{peer.name} may not submit {kind.name}")
        cls = kind.runnable()
        if kind.name == NOTIFY:
            raise Denied("notify is queued by upq itself")
        if not cls.queued:
            # Its answer may tell of other people's jobs.
            self._must_read(peer)
        params = kind.accept(request.params)
        options = request.options
        message = ""
        if kind.checks or not cls.queued:
            message = self._ask(kind, params)
        if not cls.queued:
            return Ack(0, message)
        new = NewJob(kind.name, params, priority=kind.cfg.priority, submitter=peer.name)
        if options is not protocol.NO_OPTIONS:
            self._set_options(new, kind, options)
        if self._max_queue:
            self._refuse_when_full()
        return new, message

    def _ask(self, kind: JobType, params: dict[str, Any]) -> str:
        plugin = kind.make(dict(params), self.desk)
        refusal = kind.refusal(plugin)
        if refusal is not None:
            raise refusal
        return plugin.msgstr

    def _set_options(self, new: NewJob, kind: JobType, options: Options) -> None:
        for name, spelt in NOT_YET.items():
            if getattr(options, name) is not None:
                raise BadParams(f"{spelt} is not in this version yet")
        if options.in_s is not None:
            new.run_at = when.now() + round(options.in_s * 1e6)
        elif options.run_at is not None:
            new.run_at = options.run_at
        if options.priority is not None:
            new.priority = options.priority
        new.key = options.key or ""
        new.after = options.after or ()
        if options.timeout_s is not None:
            if kind.cfg.command is None:
                raise BadParams("@timeout: only command jobs have it in this version")
            new.options["timeout_s"] = options.timeout_s
        if options.retries is not None:
            new.options["retries"] = options.retries
        if options.notify or options.notify_fail or options.notify_success:
            fail = self._targets("@notify_fail", options.notify, options.notify_fail)
            success = self._targets("@notify_success", options.notify, options.notify_success)
            new.options["notify"] = {"fail": fail, "success": success}

    def _targets(self, option: str, *texts: str | None) -> list[str]:
        """The targets that a submit names. Raises BadParams, Denied."""
        found = [target for text in texts if text for target in split_targets(text)]
        for target in found:
            if not is_allowed(target, self._notify_allowed):
                raise Denied(f"{option}: {shown_target(target)} is not in [access] notify")
            parsed = parse_target(target)
            if isinstance(parsed, Service) and (fault := service_fault(parsed.url)):
                raise BadParams(f"{option}: {fault}")
        return found

    def _refuse_when_full(self) -> None:
        now_s = time.monotonic()
        if now_s - self._length[0] > LENGTH_AGE_S:
            counts = self._views.counts().values()
            waiting = sum(c.get(QUEUED, 0) + c.get(BLOCKED, 0) for c in counts)
            self._length = (now_s, waiting)
        if self._length[1] >= self._max_queue:
            raise Busy(
                f"{self._length[1]} jobs wait already, [listen] max_queue = {self._max_queue}"
            )

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
            name: {"params": list(kind.cfg.params.names if kind.cfg.params else ())}
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
        self._must_read(peer)
        counts = dict.fromkeys(STATES, 0)
        trouble = self._queue.writer.trouble
        by_lane = {} if trouble else self._views.counts()
        for lane_id, lane in by_lane.items():
            known = self._queue.lanes.get(lane_id)
            held = self._types.hold(known) if known else ""
            for state, n in lane.items():
                counts[BLOCKED if held and state == QUEUED else state] += n
        state = "stopping" if self.stopping else "drained" if self._claimer.drained else "running"
        return {
            "state": "degraded" if trouble else state,
            "trouble": trouble,
            "version": self._version,
            "pid": os.getpid(),
            "node": self._queue.node_name,
            "database": self._queue.database.kind,
            "durable": self._queue.database.durable,
            "uptime_s": (when.now() - self._started_at) // 1_000_000,
            "jobs": counts,
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
            "oldest_queued_s": max(self._ages_s(by_lane).values(), default=0),
            **self._outbox(by_lane),
        }

    def _queues(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._must_read(peer)
        return {"queues": self.list_queues()}

    def list_queues(self) -> list[dict[str, Any]]:
        counts = self._views.counts()
        lanes = sorted(self._queue.lanes.values(), key=lambda lane: (lane.queue, lane.type))
        ages_s = self._ages_s(counts)
        return [
            {
                "queue": lane.queue,
                "type": lane.type,
                "paused": lane.paused,
                "reason": self._types.hold(lane),
                **{state: counts.get(lane.id, {}).get(state, 0) for state in STATES},
                "concurrent": pool.concurrent
                if (pool := self._claimer.pools.get(lane.type))
                else 0,
                "threads": pool.sizes()["threads"] if pool else 0,
                "oldest_queued_s": ages_s.get(lane.id),
            }
            for lane in lanes
        ]

    def _ages_s(self, counts: dict[int, dict[str, int]]) -> dict[int, int]:
        """For each lane where jobs can be claimed, how long the next one has waited."""
        waiting = [lane for lane in counts if counts[lane].get(QUEUED)]
        oldest = self._views.oldest(waiting) if waiting else {}
        now = when.now()
        return {lane: (now - at) // 1_000_000 for lane, at in oldest.items()}

    def _outbox(self, by_lane: dict[int, dict[str, int]]) -> dict[str, int]:
        """How many notifications are not delivered yet, and for how long the oldest is not."""
        lane = self._queue.known_lane(NOTIFY, NOTIFY)
        counts = by_lane.get(lane.id, {}) if lane else {}
        lag_s = 0
        if lane and counts.get(QUEUED):
            lag_s = self._ages_s({lane.id: counts}).get(lane.id, 0)
            delayed = self._views.oldest_delayed(lane.id)
            if delayed is not None:
                lag_s = max(lag_s, (when.now() - delayed) // 1_000_000)
        return {"outbox": counts.get(QUEUED, 0) + counts.get(RUNNING, 0), "outbox_lag_s": lag_s}

    def list_jobs(self, queue: str, limit: int) -> list[dict[str, Any]]:
        """What runs and waits in a queue."""
        lanes = [lane.id for lane in self._queue.lanes.values() if lane.queue == queue]
        running = self._views.jobs(self._queue.lanes, RUNNING, queue, limit)
        waiting = [job for lane in lanes for job in self._views.next_jobs(lane, limit)]
        return (running + waiting)[:limit]

    def _jobs(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._must_read(peer)
        queue = args.pop("queue", None)
        if queue is not None:
            # A queue is one type's, so far.
            if args.get("type", queue) != queue:
                return {"jobs": []}
            args["type"] = queue
        return {"jobs": self._views.jobs(self._queue.lanes, **args)}

    def _show(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        job = self._readable(args["id"], peer)
        return {
            "job": job,
            "history": self._views.history(args["id"]),
            "children": self._views.children(args["id"]),
        }

    def _output(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._readable(args["id"], peer)
        return self._views.output(args["id"])

    def _cancel(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        job = self._managed(args["id"], peer, "cancel")
        token = self._queue.cancel(job["id"], peer.name)
        pool = self._claimer.pools.get(job["type"])
        if token and pool:
            pool.cancel(token)
        log.info("(%s:%d) cancelled by %s", job["type"], job["id"], peer.name)
        return {"id": job["id"], "state": RUNNING if token else CANCELLED}

    def _retry(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        job = self._managed(args["id"], peer, "retry")
        self._queue.retry(job["id"], peer.name)
        log.info("(%s:%d) queued again by %s", job["type"], job["id"], peer.name)
        return {"id": job["id"], "state": QUEUED}

    def _wait(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._readable(args["id"], peer)
        if self._ends.wait(args["id"], args.get("timeout"), alive) is None:
            raise TimedOut(f"job {args['id']} has not ended in time")
        return {"job": self._views.job(args["id"])}

    def _check(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        request = protocol.parse(args["line"].encode())
        if request is None or request.kind != protocol.SUBMIT:
            raise BadParams("check: a line that submits a job belongs here")
        prepared = self._prepare(request, peer)
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
        lane = self._queue.known_lane(queue, new.type)
        return {
            "accepted": True,
            "type": new.type,
            "queue": queue,
            "params": mask(new.params, self._types.secret),
            "priority": new.priority,
            "run_at": when.iso(new.run_at) if new.run_at is not None else None,
            "message": message,
            "ahead": self._views.counts().get(lane.id, {}).get(QUEUED, 0) if lane else 0,
            "reason": self._types.hold(lane) if lane else "",
        }

    def _why(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        job = self._readable(args["id"], peer)
        return {"id": job["id"], "state": job["state"], "why": self._reason(job)}

    def _reason(self, job: dict[str, Any]) -> str:
        id, state = job["id"], job["state"]
        if state in FINAL:
            return f"it is {state} since {job['ended_at']}" + (
                f": {job['message']}" if job["message"] else ""
            )
        if state == RUNNING:
            since = f"it runs since {job['started_at']}"
            return f"{since} and {job['reason']}" if job["reason"] else since
        if job["reason"] and state == BLOCKED:
            awaited = [f"{other} ({is_})" for other, is_ in self._views.awaited(id)]
            return f"{job['reason']}" + (f"; it needs {', '.join(awaited)}" if awaited else "")
        if self._queue.writer.trouble:
            return self._queue.writer.trouble
        if self._claimer.drained:
            return "the daemon is drained; `resume` lets it start jobs again"
        if job["run_at"] is not None and when.instant(job["run_at"]) > when.now():
            cause = f" ({job['reason']}: {job['message']})" if job["reason"] else ""
            return f"it is not to start before {job['run_at']}{cause}"
        lane = self._queue.lane(job["queue"], job["type"])
        pool = self._claimer.pools.get(job["type"])
        ahead = self._views.ahead(id, lane.id)
        busy = ", ".join(str(j.id) for j, _ in pool.running()[:8]) if pool else ""
        places = pool.sizes() if pool else {"running": 0, "places": 0}
        return (
            f"{places['running']} of {places['places']} places of {job['type']} are busy"
            f"{f' (jobs {busy})' if busy else ''}, {ahead} jobs are ahead of it"
        )

    def _nodes(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._must_read(peer)
        return {"nodes": self._views.nodes()}

    def _pause(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._must_admin(peer, "pause")
        self._queue.pause(args["queue"], True)
        log.info("queue %s paused by %s", args["queue"], peer.name)
        return {"queue": args["queue"], "paused": True}

    def _resume(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._must_admin(peer, "resume")
        queue = args.get("queue")
        if queue is None:
            self._claimer.drained = False
        else:
            self._queue.pause(queue, False)
        self._claimer.heat()
        log.info("%s resumed by %s", f"queue {queue}" if queue else "the daemon", peer.name)
        return {"queue": queue, "paused": False}

    def _drain(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._must_admin(peer, "drain")
        self._claimer.drain()
        log.info("drained by %s: no more jobs are started", peer.name)
        return {"drained": True}

    def _reload(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self._must_admin(peer, "reload")
        return {"reloaded": True, "warnings": self.reload()}

    # Rights

    def _must_read(self, peer: Peer, submitter: str = "") -> None:
        if not self.access.may_read(peer, submitter):
            raise Denied(f"{peer.name} may not read ([access] read)")

    def _readable(self, id: int, peer: Peer) -> dict[str, Any]:
        job = self._views.job(id)
        self._must_read(peer, job["submitter"])
        return job

    def _managed(self, id: int, peer: Peer, verb: str) -> dict[str, Any]:
        job = self._views.job(id)
        if not self.access.may_manage(peer, job["submitter"]):
            raise Denied(f"{peer.name} may not {verb} a job of {job['submitter'] or 'upq'}")
        return job

    def _must_admin(self, peer: Peer, verb: str) -> None:
        if not self.access.is_admin(peer):
            raise Denied(f"{peer.name} may not {verb} ([access] admin)")
