"""create_database app:shop : a database and a user for an application, if it has none."""

from deploylib import database
from deploylib.settings import Settings

from upq import UpqJob


class Create_database(UpqJob):
    def run(self):
        made = database.create_database(Settings.find(), self.jobdata["app"])
        self.msg(f"{made['name']} {'created' if made['created'] else 'was there'}")
        return made
