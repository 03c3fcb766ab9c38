"""One job from its claim to its end: a straight pipeline. Whether it may run now is the pool's."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import DBAPIError

from upq import log as logs
from upq import notify, when
from upq.command import CommandJob
from upq.db import one_line
from upq.errors import Abort, BadParams, RequestError, Retry, Unavailable, Uncertain
from upq.health import Wish
from upq.job import (
    CANCELLED,
    DONE,
    EXPIRED,
    FAILED,
    QUEUED,
    RESULT_LIMIT_BYTES,
    Job,
    NewJob,
    Outcome,
)
from upq.jobtypes import JobType, JobTypes
from upq.plugins import MESSAGE_LIMIT, Desk, UpqJob, blame, follow_up
from upq.queue import Queue
from upq.record import encode

log = logging.getLogger(__name__)

#: Before a job that could not reach the database is tried again.
AWAY_WAIT_US = 5_000_000
#: Seconds between two tries to store an end.
AWAY_RETRY_S = 0.5
CRASHED = Outcome(FAILED, "the daemon died each time while it ran", reason="crashed")


class Runner:
    """Runs claimed jobs, each in the calling thread."""

    def __init__(self, queue: Queue, types: JobTypes) -> None:
        self._queue = queue
        self._types = types
        #: What jobs may ask of the daemon; set before the first job runs.
        self.desk: Desk | None = None

    def run(self, job: Job, begun: Callable[[UpqJob], None]) -> None:
        """Run one claimed job and have its end stored. Never raises.

        `begun` is given the job's object before its own code runs.
        """
        started_s = time.monotonic()
        with logs.job(job.type, job.id):
            log.debug("starting")
            outcome, then = self._guarded(job, begun)
            self._end(job, outcome, then, started_s)

    def give_back(self, job: Job, reason: str) -> None:
        """Put a claimed job back to the queue; its attempt does not count."""
        self._end(job, Outcome(QUEUED, reason=reason, counts=False), [], time.monotonic())

    # One attempt

    def _guarded(self, job: Job, begun: Callable[[UpqJob], None]) -> tuple[Outcome, list[NewJob]]:
        """The attempt and what follows it; whatever a job class does, there is an end."""
        kind = self._types.by_name.get(job.type)
        if kind is None or kind.cls is None:
            why = str(kind.fault) if kind else f"no job type {job.type}"
            return Outcome(QUEUED, why, counts=False), []
        try:
            plugin, outcome = self._attempt(job, kind, begun)
            return outcome, self._then(job, kind, plugin, outcome)
        except BaseException as error:
            log.warning("the job's class failed", exc_info=error)
            outcome = Outcome(FAILED, blame(error, kind.file))
            return outcome, self._then(job, kind, None, outcome)

    def _attempt(
        self, job: Job, kind: JobType, begun: Callable[[UpqJob], None]
    ) -> tuple[UpqJob | None, Outcome]:
        try:
            data = kind.at_run(own_copy(job.data))
        except BadParams as error:
            return None, Outcome(FAILED, str(error), reason="bad params")
        chain = job.options.get("chain", kind.cfg.subjobs)
        plugin = kind.make(data, self.desk, jobid=job.id, chain=chain, attempt=job.attempt)
        plugin.token = job.token
        if job.cancel_asked:
            plugin.cancel()
        timeout_s = job.options.get("timeout_s")
        if timeout_s and isinstance(plugin, CommandJob):
            plugin.timeout_s = timeout_s
        begun(plugin)
        outcome = self._perform(job, kind, plugin)
        outcome.output = plugin.captured()
        outcome.progress = plugin.last_progress
        if plugin.interrupted and outcome.state != DONE:
            outcome = Outcome(QUEUED, reason="interrupted", counts=False)
        elif outcome.state == FAILED and plugin.cancelled:
            outcome.state, outcome.reason = CANCELLED, "asked"
        plugin.finished.set()
        return plugin, outcome

    def _perform(self, job: Job, kind: JobType, plugin: UpqJob) -> Outcome:
        """check() and run(), and what they mean."""
        if kind.checks:
            refusal = kind.refusal(plugin)
            if refusal is not None:
                return Outcome(FAILED, str(refusal), data=left(plugin, job)[0], reason="refused")
            plugin.msgstr = ""
        if plugin.cancelled:
            return Outcome(CANCELLED, "cancelled before it began", reason="asked")
        try:
            returned = plugin.run()
        except Retry as error:
            text = join(said(plugin), str(error))
            return self._failed(job, kind, plugin, text, after_s=error.after_s)
        except Abort as error:
            text = join(said(plugin), str(error))
            return Outcome(FAILED, text, data=left(plugin, job)[0], reason="aborted")
        except (Unavailable, Uncertain) as error:
            return self._away(error)
        except RequestError as error:
            return self._failed(job, kind, plugin, join(said(plugin), f"{error.code} {error}"))
        except BaseException as error:  # a job's sys.exit() ends the job, not the thread
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                return self._away(error)
            log.warning("run() raised", exc_info=error)
            text = join(said(plugin), blame(error, kind.file))
            return self._failed(job, kind, plugin, text)
        if returned is False:
            return self._failed(job, kind, plugin, said(plugin))
        result = plugin.result
        if result is None and returned is not True:
            result = returned
        data, data_fault = left(plugin, job)
        fault = join(result_fault(result), data_fault)
        if fault:
            return Outcome(FAILED, join(said(plugin), fault), data=data)
        return Outcome(DONE, said(plugin), result, data)

    def _away(self, error: Exception) -> Outcome:
        """The database was away under the job, which is nothing that the job has done."""
        run_at = when.now() + AWAY_WAIT_US
        return Outcome(QUEUED, one_line(error), run_at=run_at, reason="interrupted", counts=False)

    def _failed(
        self,
        job: Job,
        kind: JobType,
        plugin: UpqJob,
        message: str,
        after_s: float | None = None,
    ) -> Outcome:
        """A failed attempt: the next one if any is left, else the end."""
        result = None if result_fault(plugin.result) else plugin.result
        data, fault = left(plugin, job)
        message = join(message, fault)
        allowed = job.options.get("retries", kind.cfg.retries)
        if job.attempt > allowed or plugin.cancelled:
            return Outcome(FAILED, message, result, data)
        wait_s = kind.retry_wait_s(job.attempt) if after_s is None else after_s
        return Outcome(
            QUEUED,
            message,
            result,
            data,
            run_at=when.now() + round(wait_s * 1e6),
            reason=f"retry {job.attempt} of {allowed}",
        )

    # What follows

    def _then(
        self, job: Job, kind: JobType, plugin: UpqJob | None, outcome: Outcome
    ) -> list[NewJob]:
        """The jobs that this end calls for: the next step of the chain, and notifications."""
        if outcome.state == QUEUED:
            return []
        chain, asked = follow_up(plugin) if plugin else ([], [])
        success, fail = kind.cfg.notify_success, kind.cfg.notify_fail
        if more := job.options.get("notify"):
            success, fail = (*success, *more["success"]), (*fail, *more["fail"])
        in_groups = kind.rules is not None and kind.rules.in_groups
        targets = notify.choose(outcome.state, success, fail, asked, in_groups=in_groups)
        if in_groups and more and outcome.state in (FAILED, EXPIRED):
            targets = list(dict.fromkeys((*targets, *more["fail"])))
        then = notify.follow(
            job,
            outcome,
            targets,
            self._types.secret,
            ended_at=when.now(),
            jobcfg=kind.cfg.variables,
        )
        if outcome.state == DONE and chain:
            data = job.data if outcome.data is None else outcome.data
            options = {"chain": list(chain[1:])}
            then.append(NewJob(chain[0], data, options=options, submitter=job.submitter,
                               priority=self._types.priority(chain[0]), parent=job.id,
                               root=job.root))  # fmt: skip
        return then

    def crashed(self, job: Job) -> list[NewJob]:
        """What the end of a job that has killed its daemon too often calls for."""
        kind = self._types.by_name.get(job.type)
        return self._then(job, kind, None, CRASHED) if kind else []

    def wish_of_crashed(self, job: Job) -> Wish | None:
        return self.wish(job, CRASHED)

    def wish(self, job: Job, outcome: Outcome) -> Wish | None:
        """What the type's health is to note of an end; None when nobody asks for it."""
        kind = self._types.by_name.get(job.type)
        rules = kind.rules if kind else None
        good = outcome.state == DONE
        if rules is None or outcome.state not in (DONE, FAILED, EXPIRED) or not rules.wants(good):
            return None
        self._queue.lane(notify.NOTIFY, notify.NOTIFY)  # made before the transaction that needs it
        told = notify.describe(job, outcome, self._types.secret, ended_at=when.now(),
                               jobcfg=kind.cfg.variables if kind else None)  # fmt: skip
        return Wish(rules, good, told)

    def _end(self, job: Job, outcome: Outcome, then: list[NewJob], started_s: float) -> None:
        took_s = time.monotonic() - started_s
        outcome.message = outcome.message[:MESSAGE_LIMIT]

        def told(ours: bool) -> None:
            if ours:
                self._say_end(job, outcome, took_s)

        while True:
            try:
                wish = self.wish(job, outcome)
                self._queue.finish(job, outcome, then, told, wish)
                return
            except RequestError as error:
                # What follows needs ids from the database: the end waits in this thread for it.
                log.warning("its end cannot be stored yet: %s", error)
                time.sleep(AWAY_RETRY_S)
            except Exception as error:
                log.exception("its end cannot be stored")
                outcome = Outcome(FAILED, f"its end cannot be stored: {one_line(error)}")
                then = []

    def _say_end(self, job: Job, outcome: Outcome, took_s: float) -> None:
        """The one log line of an end, once it is on disk; in any thread."""
        with logs.job(job.type, job.id):
            if outcome.state == QUEUED and not outcome.counts:
                log.info("given back: %s", outcome.reason or outcome.message)
                return
            result = outcome.reason if outcome.state == QUEUED else outcome.state
            hidden = notify.secret_texts((job.data, outcome.data or {}), self._types.secret)
            message = notify.scrub(outcome.message, hidden)
            log.info("finished: %s in %.3f s, %s", result, took_s, message)


def own_copy(data: dict[str, Any]) -> dict[str, Any]:
    """A copy that the job may change at will."""
    if any(isinstance(value, dict | list) for value in data.values()):
        return copy.deepcopy(data)
    return dict(data)


def left(plugin: UpqJob, job: Job) -> tuple[dict[str, Any] | None, str]:
    """The job's data as the attempt left it; None when that is not kept.

    What is no JSON any more is a warning; what is over its limit is a fault, the second value.
    """
    if plugin.jobdata == job.data:
        return job.data, ""
    try:
        if isinstance(plugin.jobdata, dict):
            size = len(encode(plugin.jobdata))
            if size <= RESULT_LIMIT_BYTES:
                return plugin.jobdata, ""
            return None, f"jobdata has {size} bytes, more than {RESULT_LIMIT_BYTES}"
    except (TypeError, ValueError, RecursionError):
        pass
    log.warning("jobdata is no JSON object any more: what this attempt changed in it is not kept")
    return None, ""


def said(plugin: UpqJob) -> str:
    """The job's message, whatever it has made of it."""
    return plugin.msgstr if isinstance(plugin.msgstr, str) else str(plugin.msgstr or "")


def result_fault(result: Any) -> str:
    """Why a result cannot be stored; "" when it can."""
    if result is None:
        return ""
    try:
        size = len(encode(result))
    except (TypeError, ValueError, RecursionError) as error:
        return f"the result is no JSON: {error}"
    if size > RESULT_LIMIT_BYTES:
        return f"the result has {size} bytes, more than {RESULT_LIMIT_BYTES}"
    return ""


def join(*texts: str) -> str:
    return " ".join(text for text in texts if text)
