"""One job from its claim to its end: a straight pipeline. Whether it may run now is the pool's."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from upq import log as logs
from upq import notify, when, workflow
from upq.attempt import (
    AWAY,
    BROKEN,
    CHANGED,
    CRASHED,
    RETRY,
    UNFIT,
    Report,
    join,
    left,
    with_fault,
)
from upq.db import one_line
from upq.errors import BadParams, RequestError
from upq.executor import Executor, Threads
from upq.health import Wish
from upq.interrupt import Abandoned
from upq.job import (
    CANCELLED,
    DONE,
    EXPIRED,
    FAILED,
    QUEUED,
    TIMEOUT,
    UNSTORABLE,
    Chain,
    Job,
    NewJob,
    Outcome,
)
from upq.jobtypes import JobType, JobTypes
from upq.keeper import Keeper
from upq.loader import blame
from upq.nodes import CRASH_LIMIT, DEATHS
from upq.plugins import MESSAGE_LIMIT, Desk, UpqJob, follow_up
from upq.process import Processes
from upq.queue import Queue
from upq.record import LOCKED, crashes_of
from upq.secret import scrub
from upq.trees import Lifeline
from upq.workflow import CHAIN

log = logging.getLogger(__name__)

#: Before a job that could not reach the database is tried again.
AWAY_WAIT_US = 5_000_000
#: Before a job whose secrets cannot be decrypted is looked at again.
LOCKED_WAIT_US = 60_000_000
#: Seconds between two tries to store an end.
AWAY_RETRY_S = 0.5
#: Characters at the end of a message that are kept when it is cut.
MESSAGE_TAIL = 1000
#: Children left behind that are named.
LEFT_SHOWN = 8
DIED = Outcome(FAILED, DEATHS, reason="crashed")
LATE = Outcome(EXPIRED, "it has not started in time")


class Runner:
    """Runs claimed jobs, each in the calling thread."""

    def __init__(self, queue: Queue, types: JobTypes, lifeline: Lifeline | None = None) -> None:
        self._queue = queue
        self._types = types
        self.keeper = Keeper()
        self.threads = Threads(self.keeper)
        #: By the words of `executor =`.
        self.executors: dict[str, Executor] = {
            "thread": self.threads,
            "process": Processes(lifeline),
        }
        #: What jobs may ask of the daemon; set before the first job runs.
        self.desk: Desk | None = None

    def run(self, job: Job, begun: Callable[[UpqJob], None]) -> None:
        """Run one claimed job and have its end stored. Never raises.

        `begun` is given the job's object before its own code runs.
        """
        started_s = time.monotonic()
        with logs.job(job.type, job.id, job.root):
            kind = self._types.by_name.get(job.type)
            try:
                if kind is not None and kind.hides:
                    self._run_hiding(job, kind, begun, started_s)
                    return
                log.debug("starting")
                outcome, then = self._guarded(job, begun)
            except Abandoned:
                took_s = time.monotonic() - started_s
                log.warning("it came back after %.1f s, too late: nothing of it is kept", took_s)
                return
            self._end(job, outcome, then, started_s)

    def give_back(self, job: Job, reason: str) -> None:
        """Put a claimed job back to the queue; its attempt does not count."""
        self._end(job, Outcome(QUEUED, reason=reason, counts=False), [], time.monotonic())

    def _run_hiding(
        self, job: Job, kind: JobType, begun: Callable[[UpqJob], None], started_s: float
    ) -> None:
        """The same where there are secrets: what is told of the attempt does not hold them."""
        with logs.hiding(kind.hidden_in(job.params, job.data)):
            log.debug("starting")
            outcome, then = self._guarded(job, begun)
            hidden = kind.hidden_in(job.params, job.data, outcome.data)
            outcome.message = scrub(outcome.message, hidden)
            if outcome.output is not None:
                text = scrub(outcome.output.text, hidden)
                outcome.output = outcome.output._replace(text=text)
            self._end(job, outcome, then, started_s)

    # The executors

    def renew(self) -> None:
        """The configuration was read again."""
        for one in self.executors.values():
            one.renew()

    def tidy(self) -> None:
        for one in self.executors.values():
            one.tidy()

    def close(self) -> None:
        for one in self.executors.values():
            one.close()

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
        except Abandoned:
            raise
        except BaseException as error:
            log.warning("the job's class failed", exc_info=error)
            outcome = Outcome(FAILED, blame(error, kind.file))
            return outcome, self._then(job, kind, None, outcome)

    def _attempt(
        self, job: Job, kind: JobType, begun: Callable[[UpqJob], None]
    ) -> tuple[UpqJob | None, Outcome]:
        if locked := job.options.get("locked"):
            run_at = when.now() + LOCKED_WAIT_US
            return None, Outcome(QUEUED, locked, run_at=run_at, reason=LOCKED, counts=False)
        try:
            data = kind.at_run(own_copy(job.data))
            kind.turn_of(job.params)
            kind.time_of(job)
        except BadParams as error:
            return None, Outcome(FAILED, str(error), reason="bad params")
        executor = self.executors[kind.cfg.executor]
        chain = job.options.get(CHAIN, kind.cfg.subjobs)
        facts = {"jobid": job.id, "chain": chain, "attempt": job.attempt}
        plugin = executor.make(kind, data, self.desk, facts)
        plugin.token = job.token
        plugin.jobqueue = job.queue
        timeout_s = job.options.get("timeout_s") or kind.cfg.timeout_s
        if timeout_s:
            plugin.timeout_s = timeout_s
        if kind.hides:
            plugin.hidden = kind.hidden_in(job.params, job.data)
        if job.cancel_asked:
            plugin.cancel()
        begun(plugin)
        report = executor.perform(kind, plugin)
        if job.starts > 1 and report.end == DONE:
            report = self._minding_change(kind, plugin, report)
        plugin.finished.set()
        return plugin, self._outcome(job, kind, plugin, report)

    def _minding_change(self, kind: JobType, plugin: UpqJob, report: Report) -> Report:
        """The report, with what it means that a child of an earlier run was left behind."""
        while True:
            try:
                found = self.desk.left_behind(plugin) if self.desk is not None else []
                break
            except RequestError as error:
                log.warning("looking for children left behind failed: %s", error)
                time.sleep(AWAY_RETRY_S)
        if not found:
            return report
        shown = ", ".join(f"{type} {id} ({state})" for id, type, state in found[:LEFT_SHOWN])
        more = f" and {len(found) - LEFT_SHOWN} more" if len(found) > LEFT_SHOWN else ""
        text = f"an earlier run has queued {shown}{more}, and this one has not asked again for it"
        message = join(report.message, text)
        if kind.cfg.on_change == "continue":
            log.warning("%s", text)
            return report._replace(message=message)
        return Report(CHANGED, f"{message} (on_change = fail)", report.result)

    def _outcome(self, job: Job, kind: JobType, plugin: UpqJob, report: Report) -> Outcome:
        """What an attempt's end means for the job."""
        outcome = self._meaning(job, kind, plugin, report)
        outcome.output = plugin.captured()
        outcome.progress = plugin.last_progress
        asked = plugin.cancelled and plugin.ended_by != "timeout"
        if plugin.interrupted and outcome.state != DONE:
            outcome = Outcome(QUEUED, reason="interrupted", counts=False)
        elif outcome.state != DONE and asked:
            outcome = replace(outcome, state=CANCELLED, reason="asked", run_at=None, crashed=False)
        return outcome

    def _meaning(self, job: Job, kind: JobType, plugin: UpqJob, report: Report) -> Outcome:
        if report.end == AWAY:
            run_at = when.now() + AWAY_WAIT_US
            return Outcome(QUEUED, report.message, run_at=run_at, reason="interrupted",
                           counts=False)  # fmt: skip
        if report.end == CRASHED:
            return self._crashed(job, report.message)
        if report.end == BROKEN:
            return Outcome(FAILED, report.message)
        data, fault = left(plugin, job.data)
        report = with_fault(report, fault)
        end, message = report.end, report.message
        if end in (FAILED, RETRY, TIMEOUT):
            return self._failed(job, kind, report, data)
        if end in (DONE, CANCELLED):
            reason = "" if end == DONE else "asked"
            return Outcome(end, message, report.result, data, reason=reason)
        return Outcome(FAILED, message, report.result, data, reason="" if end == UNFIT else end)

    def _failed(
        self, job: Job, kind: JobType, report: Report, data: dict[str, Any] | None
    ) -> Outcome:
        """A failed attempt: the next one if any is left, else the end."""
        allowed = job.options.get("retries", kind.cfg.retries)
        if job.attempt > allowed:
            reason = report.end if report.end == TIMEOUT else ""
            return Outcome(FAILED, report.message, report.result, data, reason=reason)
        wait_s = kind.retry_wait_s(job.attempt) if report.after_s is None else report.after_s
        return Outcome(
            QUEUED,
            report.message,
            report.result,
            data,
            run_at=when.now() + round(wait_s * 1e6),
            reason=f"retry {job.attempt} of {allowed}",
        )

    def _crashed(self, job: Job, message: str) -> Outcome:
        """Its process died: again at once, as after the death of the daemon, and as often."""
        if crashes_of(job) < CRASH_LIMIT:
            return Outcome(QUEUED, message, reason="crashed", counts=False, crashed=True)
        text = f"{message}, as each time of {CRASH_LIMIT}"
        return Outcome(FAILED, text, reason="crashed", crashed=True)

    def declare(self, job: Job, plugin: UpqJob) -> None:
        """Tell the end of a job whose thread does not come back. It is not tried again: what still
        runs there could meet itself.
        """
        with logs.job(job.type, job.id, job.root):
            if plugin.ended_by == "timeout":
                text = f"timed out after {plugin.timeout_s:g} s and could not be stopped"
                outcome = Outcome(FAILED, text, reason="timeout")
            else:
                text = "cancelled, but it could not be stopped"
                outcome = Outcome(CANCELLED, text, reason="asked")
            outcome.output, outcome.progress = plugin.captured(), plugin.last_progress
            log.warning("its thread does not come back: another takes its place")
            then = self._after(job, outcome)
            ran_s = (when.now() - (job.started_at or when.now())) / 1e6
            self._end(job, outcome, then, time.monotonic() - ran_s)

    # What follows

    def _then(
        self, job: Job, kind: JobType, plugin: UpqJob | None, outcome: Outcome
    ) -> list[NewJob]:
        """The jobs that this end calls for: notifications, and those that follow."""
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
        then += self._follow(job, kind, chain, outcome)
        self._types.limit(then)
        return then

    def _follow(self, job: Job, kind: JobType, chain: Chain, outcome: Outcome) -> list[NewJob]:
        """What `subjobs`, `on_done` and `on_fail` say."""
        if outcome.state == DONE and (chain or kind.cfg.on_done):
            data = job.data if outcome.data is None else outcome.data
            handed = workflow.handed_on(data, outcome.result)
            make = partial(self._types.step, job, params=handed)
            found = workflow.following(chain, job.options.get(workflow.JOIN), make)
            return found + [make(name, options={}) for name in kind.cfg.on_done]
        if outcome.state in (FAILED, EXPIRED) and kind.cfg.on_fail:
            told = workflow.failure(job, outcome, self._types.secret, kind.cfg.variables)
            return [self._types.step(job, name, told, {}) for name in kind.cfg.on_fail]
        return []

    def crashed(self, job: Job) -> tuple[list[NewJob], Wish | None]:
        """What the end of a job that has killed its daemon too often calls for."""
        return self._after_bad_end(job, DIED)

    def expired(self, job: Job) -> tuple[list[NewJob], Wish | None]:
        """What the end of a job that has not started in time calls for."""
        return self._after_bad_end(job, LATE)

    def _after_bad_end(self, job: Job, outcome: Outcome) -> tuple[list[NewJob], Wish | None]:
        return self._after(job, outcome), self.wish(job, outcome)

    def _after(self, job: Job, outcome: Outcome) -> list[NewJob]:
        """The jobs that an end calls for which the job's own code has not made."""
        kind = self._types.by_name.get(job.type)
        return self._then(job, kind, None, outcome) if kind else []

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
        if len(outcome.message) > MESSAGE_LIMIT:  # why it has failed stands at the end
            end = outcome.message[-MESSAGE_TAIL:]
            outcome.message = f"{outcome.message[: MESSAGE_LIMIT - MESSAGE_TAIL - 5]} ... {end}"

        def told(ours: bool) -> None:
            if ours:
                self._say_end(job, outcome, took_s)

        def refused(error: Exception) -> None:
            # This is the writer's thread, which is needed for what follows.
            args = (job, error, started_s)
            threading.Thread(target=self._end_badly, args=args, name="end", daemon=True).start()

        while True:
            try:
                wish = self.wish(job, outcome)
                another = refused if outcome.reason != UNSTORABLE else None
                self._queue.finish(job, outcome, then, told, wish=wish, refused=another)
                return
            except RequestError as error:
                # What follows needs ids from the database: the end waits in this thread for it.
                log.warning("its end cannot be stored yet: %s", error)
                time.sleep(AWAY_RETRY_S)
            except Exception as error:
                log.exception("its end cannot be stored")
                outcome = Outcome(FAILED, f"its end cannot be stored: {one_line(error)}")
                then = []

    def _end_badly(self, job: Job, error: Exception, started_s: float) -> None:
        """Fail a job whose end the database does not take, and tell that."""
        with logs.job(job.type, job.id, job.root):
            text = f"its end cannot be stored: {one_line(error)}"
            outcome = Outcome(FAILED, text, reason=UNSTORABLE)
            self._end(job, outcome, self._after(job, outcome), started_s)

    def _say_end(self, job: Job, outcome: Outcome, took_s: float) -> None:
        """The one log line of an end, once it is on disk; in any thread."""
        with logs.job(job.type, job.id, job.root):
            if outcome.state == QUEUED and outcome.crashed:
                log.warning("%s, it will run again", outcome.message)
                return
            if outcome.state == QUEUED and not outcome.counts:
                log.info("given back: %s", outcome.reason or outcome.message)
                return
            result = outcome.reason if outcome.state == QUEUED else outcome.state
            said = f", {outcome.message}" if outcome.message else ""
            log.info("finished: %s in %.3f s%s", result, took_s, said)


def own_copy(data: dict[str, Any]) -> dict[str, Any]:
    """A copy that the job may change at will."""
    if any(isinstance(value, dict | list) for value in data.values()):
        return copy.deepcopy(data)
    return dict(data)
