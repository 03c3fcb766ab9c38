"""What is in the queues now: how many jobs in which state, for how long, and which come next."""

from __future__ import annotations

from typing import Any

from upq import when
from upq.claimer import Claimer
from upq.job import BLOCKED, QUEUED, RUNNING, STATES
from upq.jobtypes import JobTypes
from upq.lists import Filter, Lists
from upq.notify import NOTIFY
from upq.queue import Queue
from upq.views import Views

#: What `queues` has of a queue that no job has gone to.
NEVER_USED: dict[str, Any] = {
    "queue": "", "type": "", "paused": False, "reason": "", **dict.fromkeys(STATES, 0),
    "concurrent": 0, "threads": 0, "pool": "", "oldest_queued_s": None,
}  # fmt: skip


class Census:
    """One for the daemon; any thread may ask. `by_lane` are the counts of `Views.counts`."""

    def __init__(
        self, types: JobTypes, queue: Queue, views: Views, lists: Lists, claimer: Claimer
    ) -> None:
        self._types = types
        self._queue = queue
        self._views = views
        self._lists = lists
        self._claimer = claimer

    def list_queues(self) -> list[dict[str, Any]]:
        """Every queue, those of the configuration that no job has gone to yet at the end."""
        counts = self._views.counts()
        lanes = sorted(self._queue.lanes.values(), key=lambda lane: (lane.queue, lane.type))
        ages_s = self.ages_s(counts)
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

    def list_jobs(self, queue: str, limit: int) -> list[dict[str, Any]]:
        """What runs and waits in a queue: first what can start next, in its order."""
        lanes = [lane.id for lane in self._queue.lanes.values() if lane.queue == queue]
        running, *waiting = (
            self._lists.page(self._queue.lanes, Filter(state, None, frozenset(lanes)), limit).jobs
            for state in (RUNNING, QUEUED, BLOCKED)
        )
        found = running + [job for lane in lanes for job in self._lists.next_jobs(lane, limit)]
        # Those that have a time to come, and those that need other jobs.
        known = {job["id"] for job in found}
        found += [job for jobs in waiting for job in reversed(jobs) if job["id"] not in known]
        return found[:limit]

    def totals(self, by_lane: dict[int, dict[str, int]]) -> dict[str, int]:
        """How many jobs are in each state, as it is shown: what is held is blocked."""
        totals = dict.fromkeys(STATES, 0)
        for lane_id, lane in by_lane.items():
            known = self._queue.lanes.get(lane_id)
            held = self._claimer.reason(known) if known else ""
            for state, n in lane.items():
                totals[BLOCKED if held and state == QUEUED else state] += n
        return totals

    def ages_s(self, by_lane: dict[int, dict[str, int]]) -> dict[int, int]:
        """For each lane where jobs can be claimed, how long the next one has waited."""
        waiting = [lane for lane in by_lane if by_lane[lane].get(QUEUED)]
        oldest = self._views.oldest(waiting) if waiting else {}
        now = when.now()
        return {lane: (now - at) // 1_000_000 for lane, at in oldest.items()}

    def outbox(self, by_lane: dict[int, dict[str, int]]) -> dict[str, int]:
        """How many notifications are not delivered yet, and for how long the oldest is not."""
        lane = self._queue.known_lane(NOTIFY, NOTIFY)
        counts = by_lane.get(lane.id, {}) if lane else {}
        lag_s = 0
        if lane and counts.get(QUEUED):
            lag_s = self.ages_s({lane.id: counts}).get(lane.id, 0)
            delayed = self._views.oldest_delayed(lane.id)
            if delayed is not None:
                lag_s = max(lag_s, (when.now() - delayed) // 1_000_000)
        return {"outbox": counts.get(QUEUED, 0) + counts.get(RUNNING, 0), "outbox_lag_s": lag_s}
