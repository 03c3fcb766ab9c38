"""rollback app:shop : publish the release before the last one again, as a new release."""

from upq_jobs.live import Publisher
from upq_jobs.tables import published, tables

from upq import Abort


class Rollback(Publisher):
    def run(self):
        before = self.step("find", self.find)
        database = self.submit("create_database", app=self.app).wait()
        return self.publish(before["zoombuild"], before, database)

    def find(self):
        """The release before the one that visitors see."""
        with tables(self.db) as db:
            known = published(db, self.app)
        if len(known) < 2:
            raise Abort(f"{self.app} has no release before the last one")
        return known[1]
