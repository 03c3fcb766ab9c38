"""feedback: tell a user that a task is done, or has failed; queued by what it tells of."""

from __future__ import annotations

from pathlib import Path

from upq_jobs.feed import news, tell, user_of

from upq import Abort, UpqJob


class Feedback(UpqJob):
    def run(self) -> None:
        try:
            user = user_of(self.jobdata)
        except ValueError as error:
            raise Abort(f"nobody is told: {error}") from None
        if user:
            tell(Path(self.getcfg("feeds")), user, news(self.jobdata))
