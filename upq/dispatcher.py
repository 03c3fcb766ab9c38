"""The front desk: what can be asked of upq, by whom. All doors call it, none decides for itself."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from upq import log as logs
from upq import protocol, when
from upq.access import Access, Peer
from upq.claimer import Claimer
from upq.config import ScheduleSettings, Settings
from upq.desk import Ends
from upq.errors import (
    BadParams,
    Busy,
    Denied,
    NotFound,
    Refused,
    RequestError,
    Stopping,
    TimedOut,
    TooLong,
    UnknownCommand,
)
from upq.job import (
    BATCH,
    BLOCKED,
    DONE,
    FAILED,
    FINAL,
    QUEUED,
    RESULT_LIMIT_BYTES,
    RUNNING,
    STATES,
    Accepted,
    Gather,
    NewJob,
    encode,
)
from upq.jobtypes import JobType, JobTypes
from upq.notify import (
    NOTIFY,
    Service,
    is_allowed,
    parse_target,
    service_fault,
    shown_target,
    split_targets,
)
from upq.overview import Overview
from upq.params import queue_name
from upq.plugins import Desk, Piece, stored_piece
from upq.protocol import Options, Request
from upq.queue import Lane, Queue
from upq.secret import mask, scrub
from upq.statements import CHUNK
from upq.views import AHEAD_LIMIT, Filter, Found, Pace, Views
from upq.whole import count_steps
from upq.wire import Ack, Batch
from upq.workflow import DELAY

log = logging.getLogger(__name__)

#: Options of a submit that later versions read.
NOT_YET = {"node": "@node:"}
#: Queues and types in them that there may be: each costs a few rows for ever.
LANES_LIMIT = 20_000
#: Jobs that one submit_many may hold.
MANY_LIMIT = 10_000
#: Ids that the answer to a `cancel` or `retry` of many has.
MANY_SHOWN = 100
#: Of the jobs that one waits for, those that `why` names.
AWAITED_SHOWN = 8
#: Seconds that the length of the queues is remembered for `max_queue`.
LENGTH_AGE_S = 0.2
#: What `queues` has of a queue that no job has gone to.
NEVER_USED: dict[str, Any] = {
    "queue": "", "type": "", "paused": False, "reason": "", **dict.fromkeys(STATES, 0),
    "concurrent": 0, "threads": 0, "pool": "", "oldest_queued_s": None,
}  # fmt: skip

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
        self._types = types
        self._overview = Overview(views, ends, self._steps)
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

    @property
    def is_idle(self) -> bool:
        """Whether no job runs here, that would want Python's lock."""
        return not self._queue.holds_claims

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

    def submit_many(self, asked: Request, peer: Peer) -> tuple[list[Ack], Batch | None]:
        """Queue jobs in one transaction: all of them, or none and the first error."""
        many, n = asked.many, len(asked.many)
        if n > MANY_LIMIT:
            raise BadParams(f"submit_many: {n} jobs, at most {MANY_LIMIT}")
        if asked.batch is not None and asked.batch.then is None:
            self._managed(asked.batch.id, peer, "add to")
        prepared = [
            self._prepare_part(request, peer, f"job {at} of {n}")
            for at, request in enumerate(many, 1)
        ]
        new = [one for one, _ in prepared]
        batch = None
        if asked.batch is None:
            stored = self._store([new])[0]
            if isinstance(stored, RequestError):
                raise stored
        else:
            gathered = self._queue.fill(new, self._gather(asked.batch, new, peer))
            stored = gathered.jobs
            batch = Batch(gathered.id, gathered.duplicate, gathered.open, gathered.members)
        return [
            Ack(job.id, said, job.duplicate)
            for job, (_, said) in zip(stored, prepared, strict=True)
        ], batch

    def _gather(self, asked: protocol.Batch, members: list[NewJob], peer: Peer) -> Gather:
        """What a batch is asked to be. Members get keys where the request as a whole has one."""
        if self.stopping:
            raise Stopping("the daemon is stopping; ask again when it is back")
        then, key = None, asked.key and f"{asked.id} {asked.key}"
        if asked.then is not None:
            then, _ = self._prepare_part(asked.then, peer, "then")
            if then.after:
                raise BadParams("then: it comes after its members, and @after has no place there")
            if BATCH in then.params:
                raise BadParams(f"then: {BATCH} is what upq tells it of its members, no parameter")
            key = then.key and f"{then.type} {then.key}"
        if key:
            for n, one in enumerate(members):
                # No submit can have such a key: control characters are refused.
                one.key = one.key or f"\0{key} {n}"
        return Gather(then, asked.id, asked.when, asked.open)

    def _prepare_part(self, request: Request, peer: Peer, which: str) -> tuple[NewJob, str]:
        """One job of several. Raises RequestError that says which."""
        try:
            prepared = self._prepare(request, peer)
        except RequestError as error:
            raise type(error)(f"{which}: {error}") from error
        if isinstance(prepared, Ack):
            raise BadParams(f"{which}: {request.verb} is answered, it queues nothing")
        return prepared

    def submit_child(self, new: NewJob) -> Accepted:
        """Queue what a running job asks for: checked as any submit, without limits and roles."""
        kind = self._types.get(new.type)
        kind.runnable()
        new.params = kind.accept(new.params)
        size = len(encode(new.params))
        if size > RESULT_LIMIT_BYTES:
            raise TooLong(f"the params have {size} bytes, more than {RESULT_LIMIT_BYTES}")
        new.priority = kind.cfg.priority
        if kind.cfg.queue or new.queue:
            self._set_queue(new, kind, new.queue)
        if kind.cfg.delay:
            kind.put_off(new)
        if kind.limited:
            new.limits = kind.limits(new.params, new.run_at)
        if kind.checks:
            self._ask(kind, new.params)
        stored = self._queue.submit([[new]])[0]
        if isinstance(stored, RequestError):
            raise stored
        return stored[0]

    def scheduled(self, schedule: ScheduleSettings, at: int) -> NewJob:
        """The job of a schedule for one of its slots. Nothing refuses it: it waits while its type
        cannot run, and what it has wrong fails it when it runs, which is told as any failure.
        """
        request = schedule.request
        who = f"schedule {schedule.name}"
        new = NewJob(request.verb, dict(request.params), submitter=who)
        try:
            kind = self._types.get(request.verb)
            new.priority = kind.cfg.priority
            new.params = kind.accept(request.params)
            self._set_options(new, kind, request.options)
            if kind.cfg.queue or request.options.queue:
                self._set_queue(new, kind, request.options.queue)
            if kind.cfg.delay and request.options.in_s is None:
                kind.put_off(new)
        except RequestError as error:
            log.warning("%s: %s", who, error)
        in_us = round((request.options.in_s or 0) * 1e6)
        new.run_at = at + int(new.options.get(DELAY, in_us))
        self._types.limit([new], request.options.expires_s)
        return new

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
            self.access.must_read(peer)
        params = kind.accept(request.params)
        options = request.options
        message = ""
        if kind.checks or not cls.queued:
            message = self._ask(kind, params)
        if not cls.queued:
            return Ack(0, message)
        new = NewJob(kind.name, params, priority=kind.cfg.priority, submitter=peer.name)
        if kind.cfg.queue or options.queue:
            self._set_queue(new, kind, options.queue)
        if options is not protocol.NO_OPTIONS:
            self._set_options(new, kind, options)
        if kind.cfg.delay and new.run_at is None:
            kind.put_off(new)
        if kind.limited or options.expires_s is not None:
            new.limits = kind.limits(params, new.run_at, options.expires_s)
        if self._max_queue:
            self._refuse_when_full()
        return new, message

    def _ask(self, kind: JobType, params: dict[str, Any]) -> str:
        """What its check() says. Raises Refused."""
        hidden = kind.hidden_in(params)
        with logs.hiding(hidden):
            plugin = kind.make(dict(params), self.desk)
            refusal = kind.refusal(plugin)
        if refusal is not None:
            raise Refused(scrub(str(refusal), hidden))
        return scrub(plugin.msgstr, hidden)

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

    def _set_queue(self, new: NewJob, kind: JobType, asked: str | None) -> None:
        new.queue = asked or kind.queue_for(new.params)
        if self._queue.known_lane(new.queue, new.type) is None:
            try:
                queue_name(new.queue)
            except ValueError as error:
                raise BadParams(f"@queue: {error}") from None
            if len(self._queue.lanes) >= LANES_LIMIT:
                raise Busy(f"there are {LANES_LIMIT} queues already, no room for {new.queue}")

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
        self.access.must_read(peer)
        counts = dict.fromkeys(STATES, 0)
        trouble = self._queue.writer.trouble
        by_lane = {} if trouble else self._views.counts()
        for lane_id, lane in by_lane.items():
            known = self._queue.lanes.get(lane_id)
            held = self._claimer.reason(known) if known else ""
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
            "oldest_queued_s": max(self._ages_s(by_lane).values(), default=0),
            **self._outbox(by_lane),
        }

    def _queues(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self.access.must_read(peer)
        return {"queues": self.list_queues()}

    def list_queues(self) -> list[dict[str, Any]]:
        counts = self._views.counts()
        lanes = sorted(self._queue.lanes.values(), key=lambda lane: (lane.queue, lane.type))
        ages_s = self._ages_s(counts)
        used = [
            {
                **NEVER_USED,
                "queue": lane.queue,
                "type": lane.type,
                "paused": lane.paused,
                "reason": self._claimer.reason(lane),
                **counts.get(lane.id, {}),
                "concurrent": pool.concurrent if (pool := self._claimer.pool_of(lane)) else 0,
                "threads": pool.sizes()["threads"] if pool else 0,
                "pool": self._types.rules.pool_name(lane),
                "oldest_queued_s": ages_s.get(lane.id),
            }
            for lane in lanes
        ]
        known = {lane.queue for lane in lanes}
        unused = [
            {
                **NEVER_USED,
                "queue": name,
                "concurrent": pool.concurrent,
                "pool": pool.name,
            }
            for name, pool in sorted(self._types.rules.named().items())
            if name not in known
        ]
        return used + unused

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
        """What runs and waits in a queue: first what can start next, in its order."""
        lanes = self._lanes_of(queue)
        running, *waiting = (
            self._views.page(self._queue.lanes, Filter(state, None, frozenset(lanes)), limit).jobs
            for state in (RUNNING, QUEUED, BLOCKED)
        )
        found = running + [job for lane in lanes for job in self._views.next_jobs(lane, limit)]
        # Those that have a time to come, and those that need other jobs.
        known = {job["id"] for job in found}
        found += [job for jobs in waiting for job in reversed(jobs) if job["id"] not in known]
        return found[:limit]

    def _jobs(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self.access.must_read(peer, args.get("submitter", ""))
        limit, before = args.pop("limit", 20), args.pop("before", None)
        page = self._views.page(self._queue.lanes, self._filter(args), limit, before)
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

    def _lanes_of(self, queue: str) -> list[int]:
        return [lane.id for lane in self._queue.lanes.values() if lane.queue == queue]

    def _show(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        id = args["id"]
        job = self._readable(id, peer)
        attempts = self._views.attempts(id)
        if attempts and job["state"] == RUNNING and (live := self._live(id, 0)):
            attempts[-1]["output_bytes"] = live[1].size_bytes
        return {
            "job": job,
            "why": self._reason(job, self._ahead(job)),
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
        live = self._live(id, start)
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
            for chunk in self._views.chunks(wanted, since_at, now):
                mine = [one for one in chunk if self.access.may_manage(peer, one.submitter)]
                denied += len(chunk) - len(mine)
                if limit is not None:
                    mine = mine[: limit - n]
                changed = self._change(verb, mine, peer)
                n += len(changed)
                ids += changed[: MANY_SHOWN - len(ids)]
                if n == limit or self.stopping:
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
        ahead = self._ahead(job)
        return {
            "id": job["id"],
            "state": job["state"],
            "why": self._reason(job, ahead),
            "since": self._views.since(job["id"]),
            "ahead": ahead,
            "progress": job["progress"],
        }

    def _reason(self, job: dict[str, Any], ahead: int | None) -> str:
        """One sentence: why the job does not run, with what goes before it and since when."""
        since = self._views.since(job["id"]) or job["created_at"]
        if job["state"] in FINAL:
            message = f": {job['message']}" if job["message"] else ""
            return f"it is {job['state']} since {job['ended_at']}{message}"
        if job["state"] == RUNNING:
            causes = [job["reason"], told_progress(job["progress"])]
            return " and ".join([f"it runs since {job['started_at']}", *filter(None, causes)])
        causes = [cause for cause in self._causes(job) if cause]
        if not causes:
            causes = [self._places(job)]
        count = f"{AHEAD_LIMIT} jobs or more" if ahead == AHEAD_LIMIT else f"{ahead} jobs"
        jobs = "1 job is" if ahead == 1 else f"{count} are"
        return f"it waits since {since}: {'; '.join(causes)}; {jobs} ahead of it"

    def _causes(self, job: dict[str, Any]) -> Iterator[str]:
        """What keeps a waiting job from being started, apart from others that use the places."""
        yield self._queue.writer.trouble
        if self.stopping:
            yield "the daemon is stopping"
        if self._claimer.drained:
            yield "the daemon is drained; `resume` lets it start jobs again"
        awaited, n = self._views.awaited(job["id"], AWAITED_SHOWN)
        # What is shown is that of its lane, where that holds it.
        own = self._views.own_reason(job["id"])
        if job["run_at"] is not None and when.instant(job["run_at"]) > when.now():
            told = ": ".join(filter(None, (own, job["message"]))) if own else ""
            yield f"it is not to start before {job['run_at']}{f' ({told})' if told else ''}"
        elif (turn := self._views.turn(job["id"])) is not None:
            if isinstance(turn, Pace):
                yield f"{turn.rate}: not before {when.iso(turn.not_before)}"
            else:
                yield f"its turn comes after that of job {turn.holder} (key {turn.key})"
        else:
            yield own
        if awaited:
            some = ", ".join(f"{other} ({is_})" for other, is_ in awaited)
            yield f"it needs {some}{f' and {n - len(awaited)} more' if n > len(awaited) else ''}"
        yield self._claimer.reason(self._lane_of(job))
        if job["expires_at"] is not None:
            yield f"it expires at {job['expires_at']}"

    def _lane_of(self, job: dict[str, Any]) -> Lane:
        return self._queue.lane(job["queue"], job["type"])

    def _places(self, job: dict[str, Any]) -> str:
        lane = self._lane_of(job)
        pool = self._claimer.pool_of(lane)
        name = self._types.rules.pool_name(lane)
        places = pool.sizes() if pool else {"running": 0, "places": 0}
        busy = ", ".join(
            f"{one.id}{f' {told}' if plugin and (told := percent(plugin.last_progress)) else ''}"
            for one, plugin in (pool.running()[:8] if pool else ())
        )
        of = f"pool {name}" if name else job["type"]
        return (
            f"{places['running']} of {places['places']} places of {of} are busy"
            f"{f' (jobs {busy})' if busy else ''}"
        )

    def _ahead(self, job: dict[str, Any]) -> int | None:
        """How many jobs go before one that waits, as far as their order is known."""
        if job["state"] not in (QUEUED, BLOCKED):
            return None
        lane = self._lane_of(job)
        first, same = self._types.rules.ahead_of(lane, self._queue.lanes.values())
        return self._views.ahead(job["id"], lane.id, same, first)

    def _nodes(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self.access.must_read(peer)
        return {"nodes": self._views.nodes()}

    def _schedules(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self.access.must_read(peer)
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
        self.access.must_admin(peer, "pause")
        self._queue.pause(args["queue"], True)
        log.info("queue %s paused by %s", args["queue"], peer.name)
        return {"queue": args["queue"], "paused": True}

    def _resume(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self.access.must_admin(peer, "resume")
        queue = args.get("queue")
        if queue is None:
            self._claimer.drained = False
        else:
            self._queue.pause(queue, False)
        self._claimer.heat()
        log.info("%s resumed by %s", f"queue {queue}" if queue else "the daemon", peer.name)
        return {"queue": queue, "paused": False}

    def _drain(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self.access.must_admin(peer, "drain")
        self._claimer.drain()
        log.info("drained by %s: no more jobs are started", peer.name)
        return {"drained": True}

    def _reload(self, args: dict[str, Any], peer: Peer, alive: Alive) -> Any:
        self.access.must_admin(peer, "reload")
        return {"reloaded": True, **self.reload()}

    # Jobs that a peer may see, or change

    def _readable(self, id: int, peer: Peer) -> dict[str, Any]:
        job = self._views.job(id)
        self.access.must_read(peer, job["submitter"])
        return job

    def _managed(self, id: int, peer: Peer, verb: str) -> dict[str, Any]:
        job = self._views.job(id)
        self.access.must_manage(peer, job["submitter"], verb)
        return job


def percent(progress: dict[str, Any] | None) -> str:
    """How far a job is, as one word; "" when it has not said so."""
    if not progress or progress.get("done") is None:
        return ""
    done, total = progress["done"], progress.get("total")
    return f"{done / total:.0%}" if total else f"{done:g}"


def told_progress(progress: dict[str, Any] | None) -> str:
    """The same with its text, as part of a sentence."""
    said = " ".join(filter(None, (percent(progress), (progress or {}).get("text"))))
    return f"is at {said}" if said else ""
