from upq_jobs import stages

from upq import UpqJob


class Container(UpqJob):
    """container cid:501 hname:web1: a container from its creation to its end.

    A request may be nested, as a page has it; the stages get it flat.
    """

    def check(self):
        try:
            self.request = stages.checked(self.jobdata)
        except ValueError as fault:
            self.msg(fault)
            return False

    def run(self):
        self.jobdata.clear()
        self.jobdata.update(self.request)
