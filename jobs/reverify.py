"""reverify: queue verify jobs for files and copies on mirrors that were not checked for long."""

from __future__ import annotations

from collections import Counter

from upq_jobs.catalogue import CatalogueJob

from upq.errors import Refused
from upq.when import duration, now


class Reverify(CatalogueJob):
    def check(self) -> bool:
        try:
            self.age_s = duration(self.getcfg("age", "30d"))
            self.pause_s = duration(self.getcfg("pause", "0"))
            self.limit = int(self.getcfg("limit", "1000"))
        except ValueError as error:
            return self.refuse(f"[job {self.jobname}] {error}")
        return True

    def run(self) -> bool:
        due = self.catalogue.unchecked(now() - int(self.age_s * 1_000_000), self.limit)
        queued: Counter[str] = Counter()
        refused = []
        for number, (jobname, params) in enumerate(due):
            if number and self.cancel_event.wait(self.pause_s):
                break
            try:
                self.enqueue_newjob(jobname, params)
                queued[jobname] += 1
            except Refused as error:
                refused.append(f"{jobname}: {error}")
                if "fid" in params:  # told below; next time it is others' turn
                    self.catalogue.checked(params["fid"])
            self.progress(number + 1, len(due))
        what = ", ".join(f"{count} {jobname}" for jobname, count in sorted(queued.items()))
        self.msg("; ".join([f"Queued {what or 'nothing'} of {len(due)} due", *refused]))
        return queued.total() == len(due)
