"""Why a job does not run: every cause in one sentence, and how many jobs go before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from upq import when
from upq.claimer import Claimer
from upq.intake import Intake
from upq.job import BLOCKED, FINAL, QUEUED, RUNNING, Lane
from upq.jobtypes import JobTypes
from upq.queue import Queue
from upq.views import AHEAD_LIMIT, Pace, Views

#: Of the jobs that one waits for, those that are named.
AWAITED_SHOWN = 8


class Reasons:
    """One for the daemon; any thread may ask. Jobs are as `Views.job` shows them."""

    def __init__(
        self, types: JobTypes, queue: Queue, views: Views, claimer: Claimer, intake: Intake
    ) -> None:
        self._types = types
        self._queue = queue
        self._views = views
        self._claimer = claimer
        self._intake = intake

    def why(self, job: dict[str, Any]) -> dict[str, Any]:
        """One sentence; and by itself `since` when that is, and how many are `ahead`."""
        since, ahead = self._views.since(job["id"]), self._ahead(job)
        told = self._told(job, since or job["created_at"], ahead)
        return {"why": told, "since": since, "ahead": ahead}

    def _told(self, job: dict[str, Any], since: str, ahead: int | None) -> str:
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

    def _ahead(self, job: dict[str, Any]) -> int | None:
        """How many jobs go before one that waits, as far as their order is known."""
        if job["state"] not in (QUEUED, BLOCKED):
            return None
        lane = self._lane_of(job)
        first, same = self._types.rules.ahead_of(lane, self._queue.lanes.values())
        return self._views.ahead(job["id"], lane.id, same, first)

    def _causes(self, job: dict[str, Any]) -> Iterator[str]:
        """What keeps a waiting job from being started, apart from others that use the places."""
        yield self._queue.writer.trouble
        if self._intake.stopping:
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
