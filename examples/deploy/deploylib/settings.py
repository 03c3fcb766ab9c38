"""Where things are: `deploy.ini`, which every machine of the platform has."""

from __future__ import annotations

import configparser
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

APP = re.compile(r"[a-z][a-z0-9_]{0,30}")


class TaskError(Exception):
    """What a task was to do cannot be done; the text says why, for the user to read."""


@dataclass(frozen=True)
class Settings:
    #: Builds, sites and what else the tasks keep.
    work: Path
    #: Of repositories, as git has them: `https:ssh`.
    protocols: str
    #: The Python that sites run with; their users must be able to run it.
    python: str
    #: What pip is told besides the requirements.
    pip: list[str]
    #: The requirement that is the web server of all sites.
    server: str
    #: The first of the uids that sites run as; 0: they run as whoever runs this.
    first_uid: int
    #: Releases of a site of which builds and folders on appservers are kept.
    keep: int
    database_admin: str
    database_host: str
    database_port: int
    store_url: str
    proxy_sites: Path
    proxy_listen: str
    #: The command that is nginx, with the options that say which one.
    nginx: list[str]
    #: The address of each appserver, by its number.
    appservers: dict[int, str]

    @classmethod
    def read(cls, file: Path) -> Settings:
        """Raises TaskError. Relative paths start at the folder of the file."""
        ini = configparser.ConfigParser(interpolation=None)
        here = file.resolve().parent
        try:
            ini.read_string(file.read_text(), str(file))
            appservers = {
                int(name.removeprefix("appserver ")): ini[name]["address"]
                for name in ini.sections()
                if name.startswith("appserver ")
            }
            return cls(
                work=here / ini["work"]["folder"],
                protocols=ini["build"].get("protocols", "https:ssh"),
                python=ini["build"]["python"],
                pip=shlex.split(ini["build"].get("pip", "")),
                server=ini["build"]["server"],
                first_uid=ini["sites"].getint("first_uid", 0),
                keep=ini["sites"].getint("keep", 2),
                database_admin=ini["database"]["admin"],
                database_host=ini["database"]["host"],
                database_port=ini["database"].getint("port", 5432),
                store_url=ini["store"]["url"].rstrip("/"),
                proxy_sites=here / ini["proxy"]["sites"],
                proxy_listen=ini["proxy"]["listen"],
                nginx=shlex.split(ini["proxy"]["nginx"]),
                appservers=appservers,
            )
        except (OSError, KeyError, ValueError, configparser.Error) as error:
            raise TaskError(f"{file}: {error}") from error

    def folder(self, *parts: str | int) -> Path:
        """A folder below `work`, made when missing; every user may pass through it."""
        folder = self.work
        for part in ("", *map(str, parts)):
            folder = folder / part
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o711)
        return folder


def valid_app(app: str) -> str:
    """The name of an application; it is part of paths, of the database's names and of nginx's."""
    if not APP.fullmatch(app):
        raise TaskError(f"{app!r} is no name for an application: a-z, 0-9 and _, at most 31")
    return app
