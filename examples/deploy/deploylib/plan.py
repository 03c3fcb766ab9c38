"""`zoombuild.cfg`: what its owner says of a site, checked before anything is done with it."""

from __future__ import annotations

import configparser
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from deploylib.settings import TaskError

WSGI = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
#: What can follow a deployment, each with the arguments of manage.py.
HOOKS = {
    "syncdb": ["migrate", "--run-syncdb", "--noinput"],
    "migrate": ["migrate", "--noinput"],
}


@dataclass(frozen=True)
class Plan:
    #: The module of the site and the callable in it, `shop.wsgi:application`.
    wsgi: str
    hosts: list[str]
    #: The file of requirements in the repository; "" for none.
    requirements: str
    hooks: list[str]

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Raises TaskError, which names what is wrong."""
        ini = configparser.ConfigParser(interpolation=None)
        try:
            ini.read_string(text, "zoombuild.cfg")
            site = ini["site"]
            plan = cls(
                wsgi=site["wsgi"],
                hosts=site["hosts"].split(),
                requirements=site.get("requirements", ""),
                hooks=site.get("hooks", "").split(),
            )
        except KeyError as error:
            raise TaskError(f"zoombuild.cfg: no {error.args[0]}") from None
        except configparser.Error as error:
            raise TaskError(" ".join(str(error).split())) from None
        plan._check()
        return plan

    def _check(self) -> None:
        if not WSGI.fullmatch(self.wsgi):
            raise TaskError(f"zoombuild.cfg: wsgi: {self.wsgi!r} is not like shop.wsgi:application")
        if not self.hosts:
            raise TaskError("zoombuild.cfg: hosts: is empty")
        for host in self.hosts:
            if not HOST.fullmatch(host):
                raise TaskError(f"zoombuild.cfg: hosts: {host!r} is no name of a host")
        path = PurePosixPath(self.requirements)
        if path.is_absolute() or ".." in path.parts:
            raise TaskError(
                f"zoombuild.cfg: requirements: {self.requirements} is not in the repository"
            )
        for hook in self.hooks:
            if hook not in HOOKS:
                raise TaskError(f"zoombuild.cfg: hooks: {hook!r} is none of {', '.join(HOOKS)}")
