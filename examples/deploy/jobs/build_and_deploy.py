"""build_and_deploy: from the address of a repository to a site that visitors see."""

from deploylib.plan import Plan
from deploylib.settings import TaskError, valid_app
from upq_jobs.live import TOTAL, Publisher


class Build_and_deploy(Publisher):
    repo: str
    #: The text of zoombuild.cfg.
    zoombuild: str

    def check(self):
        try:
            Plan.parse(self.zoombuild)
            valid_app(self.app)
        except TaskError as error:
            self.msg(error)
            return False

    def run(self):
        self.progress(0, TOTAL, "build")
        bundle = self.submit(
            "build_bundle", app=self.app, release=self.jobid, repo=self.repo,
            zoombuild=self.zoombuild,
        ).wait()  # fmt: skip
        self.progress(1, TOTAL, "database and upload")
        database, _ = self.gather([
            self.submit("create_database", app=self.app),
            self.submit("bundle_upload", file=bundle["file"], sha256=bundle["sha256"]),
        ])  # fmt: skip
        return self.publish(self.zoombuild, bundle, database)
