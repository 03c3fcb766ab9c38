"""A job and all that is below it, read as one: shown, waited for, looked through for a retry."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from upq import whole
from upq.desk import LOOK_S, Ends
from upq.errors import NotFound
from upq.job import BLOCKED, QUEUED, RUNNING
from upq.views import Views
from upq.whole import Member

#: Jobs of a tree that are counted at the most when it is shown, and when it is waited for or queued
#: again; jobs that are shown, and changes of state.
COUNTED, WALKED, SHOWN, LOGGED = 20_000, 1_000_000, 500, 500
#: What is shown of a job below another.
FIELDS = ("id", "parent", "type", "queue", "state", "reason", "message", "progress", "attempt",
          "created_at", "started_at", "ended_at")  # fmt: skip
#: Characters of its message.
MESSAGE_CHARS = 400


class Overview:
    """One for the daemon. `steps`: how many jobs follow one of a type, if nothing else is said."""

    def __init__(self, views: Views, ends: Ends, steps: Callable[[str], int]) -> None:
        self._views = views
        self._ends = ends
        self._steps = steps

    def show(self, id: int) -> dict[str, Any]:
        """`tree`: what is below the job. `whole`: how all of it is. `log`: what has happened to it.

        Raises NotFound.
        """
        members, more = self._views.members(id, COUNTED)
        picked = whole.picked(members, SHOWN)
        jobs = self._views.listed([id, *(one.id for one, _ in picked)])
        log, cut = self._views.timeline(list(jobs), LOGGED)
        types = {one: job["type"] for one, job in jobs.items()}
        return {
            "tree": [
                {"depth": depth, **_shown(jobs[one.id])} for one, depth in picked if one.id in jobs
            ],
            "whole": {
                **self._told(members, more=more),
                "left_out": len(members) - 1 - len(picked),
                "log_cut": cut,
            },
            "log": [{"type": types.get(change["job"], ""), **change} for change in log],
        }

    def told(self, id: int) -> dict[str, Any]:
        """How a job and all below it are."""
        members, more = self._views.members(id, COUNTED)
        return self._told(members, more=more)

    def _told(self, members: list[Member], *, more: bool) -> dict[str, Any]:
        return whole.told(members, self._stuck(members), self._steps, more=more)

    def _stuck(self, members: list[Member]) -> set[int]:
        """Blocked jobs that nothing in the tree will ever free, unless something is retried.

        They are looked for only when nothing else is left to happen.
        """
        if any(one.state in (QUEUED, RUNNING) for one in members):
            return set()
        blocked = [one.id for one in members if one.state == BLOCKED]
        return whole.held(members, self._views.needs(blocked)) if blocked else set()

    def wait(self, id: int, timeout_s: float | None, alive: Callable[[], bool]) -> bool:
        """Wait until nothing of it will go on by itself; False when the time is over, or `alive`
        says False, before. Raises NotFound, Unavailable.
        """
        over_s = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        while True:
            members, _ = self._views.members(id, WALKED)
            open_ = whole.open_jobs(members, self._stuck(members))
            if not open_:
                return True
            busy = [one for one in open_ if one.state in (QUEUED, RUNNING)]
            # What is blocked may wait for others than these, and may get stuck without a word.
            most_s = float("inf") if busy else LOOK_S
            for one in busy or open_[:1]:
                left_s = max(over_s - time.monotonic(), 0)
                if not self._wait_for(one.id, min(left_s, most_s), alive) and (
                    left_s <= most_s or not alive()
                ):
                    return False

    def _wait_for(self, id: int, timeout_s: float, alive: Callable[[], bool]) -> bool:
        try:
            return self._ends.wait(id, timeout_s, alive) is not None
        except NotFound:  # deleted meanwhile, so it had ended
            return True

    def again(self, id: int) -> list[int]:
        """The jobs below that a retry of the whole queues again, and the job itself. As they come
        back by themselves, left out are children of parents that run again.
        """
        return whole.again(self._views.members(id, WALKED)[0])


def _shown(job: dict[str, Any]) -> dict[str, Any]:
    return {name: job[name] for name in FIELDS} | {"message": job["message"][:MESSAGE_CHARS]}
