"""test [sleep:0.1] [msg:text] [result:text] [fail:2]: does what it is told, to try things out."""

from __future__ import annotations

import re
import threading

from upq import Abort, UpqJob


class Test(UpqJob):
    def check(self) -> bool:
        for name, form in (("sleep", r"[0-9]+(\.[0-9]+)?"), ("fail", "[0-9]{1,9}")):
            value = str(self.jobdata.get(name, 0))
            if not re.fullmatch(form, value) or float(value) > threading.TIMEOUT_MAX:
                self.msg(f"{name} has to be a number, not {value!r}")
                return False
        return True

    def run(self) -> bool:
        if self.cancel_event.wait(float(self.jobdata.get("sleep", 0))):
            raise Abort("cancelled")
        self.msg(self.jobdata.get("msg", ""))
        self.result = self.jobdata.get("result")
        left = int(self.jobdata.get("fail", 0))
        if left:
            self.jobdata["fail"] = str(left - 1)
            self.msg(f"failing, {left - 1} times more to come")
        return not left
