"""feedback: tell a user that a task is done, or has failed; queued by what it tells of."""

from __future__ import annotations

from pathlib import Path

from upq_jobs.feed import news, tell, user_of

from upq import UpqJob


class Feedback(UpqJob):
    def run(self) -> None:
        user = user_of(self.jobdata)
        if user:
            tell(Path(self.getcfg("feeds")), user, news(self.jobdata))
