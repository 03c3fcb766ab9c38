"""survey: ask each appserver how it is; one that does not answer is not healthy."""

import time
from pathlib import Path

from deploylib.settings import Settings
from upq_jobs.tables import appserver, put, tables

from upq import UpqJob

PATIENCE_S = 20


class Survey(UpqJob):
    def run(self):
        settings = Settings.read(Path(self.jobcfg["platform"], "deploy.ini"))
        asked = {n: self.submit("measure", server=n) for n in settings.appservers}
        over_s = time.monotonic() + PATIENCE_S
        told = []
        for server, job in asked.items():
            answered = job.finished.wait(max(over_s - time.monotonic(), 0))
            seen = job.result if answered and job.state == "done" else None
            row = seen or {"server": server, "load": 0.0, "healthy": False}
            with tables(self.db) as db:
                put(db, appserver, **row, seen_s=time.time())
            told.append(f"{server}: {'load ' + str(row['load']) if row['healthy'] else 'down'}")
        self.msg(", ".join(told))
