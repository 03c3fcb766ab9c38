"""create_database app:shop : a database and a user for an application, if it has none."""

from pathlib import Path

from deploylib import database
from deploylib.settings import Settings

from upq import UpqJob


class Create_database(UpqJob):
    def run(self):
        settings = Settings.read(Path(self.jobcfg["platform"], "deploy.ini"))
        made = database.create_database(settings, self.jobdata["app"])
        self.msg(f"{made['name']} {'created' if made['created'] else 'was there'}")
        return made
