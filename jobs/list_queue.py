"""list_queue [name]: what waits and runs in each queue, or in one; answered at once."""

from __future__ import annotations

import json
from typing import Any

from upq import UpqJob


class List_queue(UpqJob):
    queued = False

    def check(self) -> bool:
        desk = self._need_desk()
        wanted = set(self.args)
        queues = [q for q in desk.list_queues() if not wanted or q["queue"] in wanted]
        try:
            limit = int(self.getcfg("limit", "100"))
            lines = [self.line(q, desk.list_jobs(q["queue"], limit)) for q in queues]
        except (ValueError, KeyError, TypeError) as error:
            self.msg(f"[job {self.jobname}] {type(error).__name__}: {error}")
            return False
        self.msg(" ".join(lines) or "No queues.")
        return True

    def line(self, queue: dict[str, Any], jobs: list[dict[str, Any]]) -> str:
        count = sum(queue.get(state, 0) for state in ("queued", "blocked", "running"))
        line = f"Queue '{queue['queue']}' contains {count} jobs: "
        if not count:
            return line + "Queue is empty."
        order = self.getcfg("sort", "jobid")
        rows = sorted(map(columns, jobs), key=lambda row: row[order])
        form = self.getcfg("format", "'%(jobname)s' : '%(jobdata)s'")
        more = ", ..." if count > len(rows) else ""
        return line + ", ".join(form % row for row in rows) + more


def columns(job: dict[str, Any]) -> dict[str, Any]:
    """A job under the names that `format` and `sort` know."""
    return {
        "jobid": job["id"],
        "jobname": job["type"],
        "jobdata": json.dumps(job["params"], ensure_ascii=False),
        "status": job["state"],
        "queue": job["queue"],
        "ctime": job["created_at"],
        "starttime": job["started_at"] or "-",
    }
