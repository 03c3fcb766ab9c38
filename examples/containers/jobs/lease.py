from upq_jobs import stages

from upq import UpqJob


class Lease(UpqJob):
    """lease owner:ann instances:4: containers for a user, who has one such request at a time.

    last: the stage after which to stop.
    """

    def check(self):
        try:
            self.requests = stages.several(self.jobdata, self.jobdata["instances"])
        except ValueError as fault:
            self.msg(fault)
            return False

    def run(self):
        ids = {}
        todo = stages.until(self.jobdata["last"])
        for done, stage in enumerate(todo):
            parts = [stages.part(stage, request) for request in self.requests]
            jobs = [self.enqueue_newjob(stage, part) for part in parts]
            ids[stage] = [job.jobid for job in jobs]
            self.progress(done, len(todo), stages.STAGES[stage].text)
            self.gather(jobs)
        self.progress(len(todo), len(todo))
        return {"owner": self.jobdata["owner"], "jobs": ids}
