import json
from pathlib import Path

from upq_jobs import failures

from upq import Retry, UpqJob


class Error(UpqJob):
    """What the error queue does with a failure: it keeps a record, and mails."""

    def run(self):
        failure = {
            "queue": self.jobdata["queue"],
            "type": self.jobdata["type"],
            "id": self.jobdata["id"],
            "request": json.dumps(self.jobdata["params"]),
            "message": self.jobdata["message"],
            "output": self.jobdata["output"],
        }
        self.step("record", lambda: str(failures.record(Path(self.getcfg("failures")), failure)))
        to = self.getcfg("mail_to")
        try:
            failures.mail(
                self.getcfg("mail_server"), self.getcfg("mail_from"), to, failure, self.jobid
            )
        except OSError as error:
            raise Retry(f"mail server: {error}") from error
        self.msg(f"told {to}")
