"""check_repo repo:https://... : guess how the site in a repository is run."""

from upq_jobs.tables import guess, put, tables

from upq import UpqJob


class Check_repo(UpqJob):
    repo: str

    def run(self):
        guesses = self.submit("inspect_repo", repo=self.repo).wait()
        with tables(self.db) as db:
            put(db, guess, job=self.jobid, repo=self.repo, guesses=guesses)
        self.msg(f"{guesses['kind']}, {guesses['wsgi'] or 'nothing that could be run'}")
        return guesses
