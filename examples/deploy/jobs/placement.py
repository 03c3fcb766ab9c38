"""placement: the number of the appserver that a site should go to."""

from deploylib.placement import Seen, choose
from upq_jobs.tables import servers, tables

from upq import UpqJob


class Placement(UpqJob):
    app: str

    def run(self):
        with tables(self.db) as db:
            seen = [Seen(*row) for row in servers(db)]
        server = choose(seen)
        self.msg(f"appserver {server} of {len(seen)}")
        return {"server": server}
