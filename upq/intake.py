"""What is asked for becomes jobs: each request is checked, made a job and stored before its ACK."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from upq import log as logs
from upq import protocol, when
from upq.access import Access, Peer
from upq.errors import BadParams, Busy, Denied, Refused, RequestError, Stopping, TooLong
from upq.job import BATCH, BLOCKED, QUEUED, RESULT_LIMIT_BYTES, Accepted, Gather, NewJob, encode
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
from upq.params import queue_name
from upq.plugins import Desk
from upq.protocol import Options, Request
from upq.queue import Queue
from upq.secret import scrub
from upq.settings import ScheduleSettings, Settings
from upq.views import Views
from upq.wire import Ack, Batch
from upq.workflow import DELAY

log = logging.getLogger(__name__)

#: Options of a submit that later versions read.
NOT_YET = {"node": "@node:"}
#: Queues and types in them that there may be: each costs a few rows for ever.
LANES_LIMIT = 20_000
#: Jobs that one submit_many may hold.
MANY_LIMIT = 10_000
#: Seconds that the length of the queues is remembered for `max_queue`.
LENGTH_AGE_S = 0.2


class Intake:
    """One for the daemon; any thread may ask. Errors are RequestErrors."""

    def __init__(self, settings: Settings, types: JobTypes, queue: Queue, views: Views) -> None:
        #: What jobs that are asked may ask back; set before the first submit.
        self.desk: Desk | None = None
        #: Set when the daemon begins to stop: submits are refused.
        self.stopping = False
        self._types = types
        self._queue = queue
        self._views = views
        self._length = (0.0, 0)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over a configuration, at the start or on reload."""
        access = settings.access
        #: Who may do what; on reload another one takes its place.
        self.access = Access(access.read, access.submit, access.admin)
        self._notify_allowed = access.notify
        self._max_queue = settings.listen.max_queue

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
                prepared = self.prepare(request, peer)
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
            owner = self._views.job(asked.batch.id)["submitter"]
            self.access.must_manage(peer, owner, "add to")
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

    def refuse_if_stopping(self) -> None:
        if self.stopping:
            raise Stopping("the daemon is stopping; ask again when it is back")

    def _gather(self, asked: protocol.Batch, members: list[NewJob], peer: Peer) -> Gather:
        """What a batch is asked to be. Members get keys where the request as a whole has one."""
        self.refuse_if_stopping()
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
            prepared = self.prepare(request, peer)
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

    def prepare(self, request: Request, peer: Peer) -> tuple[NewJob, str] | Ack:
        """A request as the job it asks for, with the words of its check(); or its answer."""
        self.refuse_if_stopping()
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
