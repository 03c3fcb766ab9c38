"""A machine for examples/deploy: git repositories, PostgreSQL, nginx, wheels, and the daemon.

All of it works in one folder and is gone with the process that made it, however that one ends.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from zipfile import ZipFile

import pytest
from aiosmtpd.controller import Controller
from sqlalchemy import create_engine, make_url, text

from tests.conftest import unavailable
from tests.daemons import ROOT, Daemon, until
from tests.servers import UNDERTAKER, Missing, Postgres, free_port, program, send, short_folder
from upq.job import FINAL

#: Building and starting sites takes its time on a machine that does other things, too.
PATIENCE_S = 110.0
EXAMPLE = ROOT / "examples/deploy"
#: Of requirements/dev.txt, what sites need; psycopg comes with its binary.
WHEELS = ("asgiref", "django", "gunicorn", "packaging", "psycopg", "psycopg-binary", "sqlparse",
          "typing_extensions")  # fmt: skip
FIRST_UID = 61000
#: Stands for `python3` in the daemon's PATH: notes when a task begins and ends, and holds it up
#: while there is a file of that name.
PYTHON3 = """#!/bin/sh
note() {{ echo "$*" >>{folder}/ledger; }}
note begin $3 $4 $5
while [ -e {folder}/before-$3 ]; do sleep 0.02; done
{python} "$@"
status=$?
note end $3 $4 $5 $status
while [ -e {folder}/after-$3 ]; do sleep 0.02; done
exit $status
"""
#: A site without Django, for what is about tasks and not about sites.
PLAIN = {
    "app.py": """
import os

def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"Version 1, user %d." % os.getuid()]
""",
    "manage.py": """
import os, sys
from urllib.parse import urlsplit

with open(os.path.expanduser("~/hooks"), "a") as hooks:
    print(sys.argv[1:], os.getuid(), urlsplit(os.environ["DATABASE_URL"]).username, file=hooks)
""",
}
#: A second appserver on the same machine, and a mail server: what the tests need besides.
MORE_CFG = """[mail]
server = 127.0.0.1:{port}
from = upq@example.org
[job notify]
"""
MORE_INI = "\n[appserver 2]\naddress = 127.0.0.1\n"


class TcpPostgres(Postgres):
    """It listens to TCP, too, and asks for passwords there."""

    #: Drawn at the first start.
    port = 0

    def __init__(self) -> None:
        super().__init__(listen_addresses="127.0.0.1", fsync="off")
        hba = self.folder / "hba"
        hba.write_text("local all postgres trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        self.settings["hba_file"] = str(hba)

    def start(self) -> None:
        if not self.port:
            self.port = free_port()
            self.settings["port"] = str(self.port)
            self._url = make_url(self._own_url())
        super().start()

    def _own_url(self) -> str:
        return f"{super()._own_url()}&port={self.port}"

    @property
    def conninfo(self) -> str:
        return self._own_url().replace("+psycopg", "")


def site_python() -> tuple[str, int]:
    """A Python that sites can run as users of their own, and the first uid; else ours, and 0."""
    if os.geteuid() == 0:
        for python in (sys.executable, "/usr/bin/python3"):
            command = [python, "-c", "import venv"]
            with contextlib.suppress(OSError):
                if not subprocess.run(command, check=False, cwd="/", capture_output=True, env={},
                                      user=FIRST_UID, group=FIRST_UID).returncode:  # fmt: skip
                    return python, FIRST_UID
    return sys.executable, 0


def working_in(folder: Path) -> list[int]:
    """The processes whose current folder is this one or below it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append(int(process.name))
    return found


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `fetch_wheels` has fetched, once for all workers of a run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, part = shared / "wheels", shared / "wheels.part"
    with (shared / "wheels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            fetch_wheels(part, site_python()[0])
            part.rename(folder)
    return folder


def fetch_wheels(folder: Path, python: str) -> None:
    """The wheels of what sites need, as pinned: builds need no index then."""
    folder.mkdir(exist_ok=True)
    pins = (ROOT / "requirements/dev.txt").read_text().splitlines()
    wanted = [pin for pin in pins if pin.partition("==")[0].lower() in WHEELS]
    assert len(wanted) == len(WHEELS)
    pip = [sys.executable, "-m", "pip", "--python", python, "download", "-q"]
    where = ["--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    command = [*pip, "--disable-pip-version-check", *where, *wanted]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        unavailable(f"no wheels to build sites with: {done.stderr.strip().splitlines()[-1:]}")
    (django,) = folder.glob("django-*.whl")
    _slim(django)


def _slim(wheel: Path) -> None:
    """Leave out what the site has no use for: four fifths of Django's files are translations."""
    part = wheel.with_suffix(".part")
    with ZipFile(wheel) as whole, ZipFile(part, "w") as slim:
        for name in whole.namelist():
            if not re.search(r"/locale/(?!en/)\w+/|/contrib/(gis|admin|admindocs)/", name):
                slim.writestr(name, whole.read(name))
    part.replace(wheel)


class Platform(Daemon):
    """The daemon with the example's own configuration, in a copy of it."""

    SOCKET, LOG = "var/upq.sock", "var/upq.log"

    def __init__(self, folder: Path) -> None:
        shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__", "var", "work"))  # fmt: skip
        super().__init__(folder)
        self.env = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{folder}",
            # The appservers are asked when a test wants it.
            "UPQ_JOB_SURVEY__SCHEDULE": "@yearly",
            "UPQ_POOL_BUILD__CONCURRENT": "1",
            "UPQ_JOB_DEPLOY__NOTIFY_FAIL": "mail:ops@example.org",
        }

    def configure(self, config: str) -> None:
        """It has its own."""

    def give(self, name: str, **params: Any) -> int:
        """Submit a job as a program does; returns its id."""
        with self.talk() as talk:
            reply = json.loads(talk.say(json.dumps({"submit": name, "params": params})))
        assert reply["ok"], reply
        return int(reply["id"])

    def ended(self, id: int) -> dict[str, Any]:
        """The job, once it has ended, however long that takes."""
        until(lambda: self.job(id)["state"] in FINAL, timeout_s=PATIENCE_S)
        return self.job(id)

    def refusal(self, name: str, **params: Any) -> str:
        with self.talk() as talk:
            reply = json.loads(talk.say(json.dumps({"submit": name, "params": params})))
        assert not reply["ok"], reply
        return str(reply["message"])

    def children(self, id: int, type: str = "") -> list[dict[str, Any]]:
        """All jobs that a job has queued, in that order, as `show` has each."""
        found = [dict(child) for child in self.ask(f"show {id}")["children"]]
        jobs = sorted((self.job(child["id"]) for child in found), key=lambda job: int(job["id"]))
        return [job for job in jobs if type in ("", job["type"])]

    def child(self, id: int, type: str) -> dict[str, Any]:
        """The only one of that type, once it is there."""
        until(lambda: self.children(id, type), timeout_s=PATIENCE_S)
        (job,) = self.children(id, type)
        return job


class World:
    """One machine with everything on it. Its sites are built of these wheels."""

    def __init__(self, wheels: Path) -> None:
        self.folder = short_folder()
        self.undertaker = subprocess.Popen(
            ["sh", "-c", UNDERTAKER, "undertaker", str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            self.nginx = program("nginx", "nginx-light")
            self.git = program("git", "git")
            self.postgres = TcpPostgres()
        except Missing as missing:
            unavailable(str(missing))
        self.daemon = Platform(self.folder)
        self.python, self.first_uid = site_python()
        self._set_up(wheels)

    def _set_up(self, wheels: Path) -> None:
        bin_ = self.folder / "bin"
        bin_.mkdir()
        (bin_ / "python3").write_text(PYTHON3.format(folder=self.folder, python=sys.executable))
        (bin_ / "python3").chmod(0o755)
        shutil.copytree(wheels, self.folder / "wheels")
        self.postgres.start()
        self.http, self.store = free_port(), free_port()
        nginx = self.folder / "var/nginx"
        for made in (nginx / "sites", nginx / "store"):
            made.mkdir(parents=True)
        conf = self.folder / "nginx.conf"
        said = conf.read_text().replace(":8080", f":{self.http}").replace(":8081", f":{self.store}")
        conf.write_text(said)
        if os.geteuid() == 0:
            user = re.search("^user ([^;]+);", said, re.M)
            assert user
            shutil.chown(nginx / "store", user[1])
        command = [self.nginx, "-p", f"{nginx}/", "-c", str(conf)]
        self._write_ini(command)
        self.mails: list[bytes] = []
        self.post = Controller(self, hostname="127.0.0.1", port=free_port())
        self.post.start()
        (self.folder / "upq.d").mkdir()
        (self.folder / "upq.d/mail.cfg").write_text(MORE_CFG.format(port=self.post.port))
        shutil.copy(ROOT / "jobs/notify.py", self.folder / "jobs")
        self.proxy = subprocess.Popen(
            [*command, "-g", "daemon off;"], cwd=self.folder, stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _write_ini(self, nginx: list[str]) -> None:
        """The example's deploy.ini, with what differs here."""
        ini = configparser.ConfigParser(interpolation=None)
        ini.read_string((self.folder / "deploy.ini").read_text() + MORE_INI)
        here = {
            "build": {
                "python": self.python,
                "pip": f"--no-index --find-links {self.folder}/wheels",
                "protocols": "file",
            },
            "database": {"admin": self.postgres.conninfo, "port": str(self.postgres.port)},
            "store": {"url": f"http://127.0.0.1:{self.store}"},
            "proxy": {"listen": f"127.0.0.1:{self.http}", "nginx": shlex.join(nginx)},
            "sites": {"first_uid": str(self.first_uid)},
        }
        ini.read_dict(here)
        with (self.folder / "deploy.ini").open("w") as out:
            ini.write(out)

    def __enter__(self) -> Self:
        try:
            self.daemon.start()
            until(lambda: self.page("nobody.example")[0] == 404)
            self.daemon.run("survey")
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.mails.append(envelope.content)
        return "250 OK"

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        self.daemon.kill9()
        self.post.stop()
        self.postgres.close()
        self.proxy.terminate()  # by itself: of workers that are killed it makes new ones
        self.proxy.wait(30)
        while left := working_in(self.folder):
            send(left, signal.SIGKILL)
        if error is None:
            self.daemon.has_behaved()
        shutil.rmtree(self.folder)
        self.undertaker.kill()  # there is nothing left for it
        self.undertaker.wait()

    # What users have and see

    def repository(self, name: str, files: dict[str, str] | Path) -> str:
        """The address of a new git repository, or of one with a further commit."""
        folder = self.folder / "git" / name
        if isinstance(files, Path):
            shutil.copytree(files, folder, dirs_exist_ok=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in files.items():
                (folder / file).write_text(text)
        who = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
        for words in (
            ["init", "-q"],
            ["add", "."],
            ["commit", "-q", "--allow-empty", "-m", "Site"],
        ):
            subprocess.run([self.git, *who, *words], cwd=folder, check=True)
        return f"file://{folder}"

    def plan(self, app: str, hooks: str = "syncdb migrate") -> str:
        """A zoombuild.cfg for PLAIN."""
        host = app.replace("_", "-")
        return f"[site]\nhosts = {host}.example.org\nwsgi = app:application\nhooks = {hooks}\n"

    def ask_for(self, app: str, files: dict[str, str] | None = None, hooks: str = "") -> int:
        """Submit a build_and_deploy of PLAIN with these files; returns its id."""
        repo = self.repository(app, {**PLAIN, **(files or {})})
        return self.daemon.give(
            "build_and_deploy", app=app, repo=repo, zoombuild=self.plan(app, hooks)
        )

    def deployed(self, app: str, files: dict[str, str] | None = None, hooks: str = "") -> Any:
        """The job, once the site is up."""
        job = self.daemon.ended(self.ask_for(app, files, hooks))
        assert job["state"] == "done", job["message"]
        return job

    def tear_down(self, app: str) -> None:
        """End the servers of an application, so that dozens of them do not fill the machine."""
        for pid in self.servers_of(app):
            os.killpg(pid, signal.SIGKILL)

    def page(self, host: str, path: str = "/") -> tuple[int, str]:
        """Status and text of a page, through nginx."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=30)
        try:
            connection.request("GET", path, headers={"Host": host})
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    @property
    def ledger(self) -> list[str]:
        """What began and ended, by task: `begin build_bundle app=shop release=17`."""
        return self.daemon.ledger

    def steps(self, release: int) -> list[dict[str, Any]]:
        """All that the steps.log of a release's tasks say, in the order of the tasks."""
        work = self.folder / "work"
        builds = work.glob(f"build/*/{release}/steps.log")
        files = [*builds, *work.glob(f"appserver/*/*/{release}/steps.log")]
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def servers_of(self, app: str) -> list[int]:
        """The processes of an application's web servers that live, on all appservers."""
        found = []
        for file in (self.folder / "work/appserver").glob(f"*/{app}/*/pid"):
            pid = int(file.read_text().split()[0])
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text()
                found += [pid] if stat.rpartition(")")[2].split()[0] not in "ZX" else []
        return found

    def working_for(self, app: str) -> list[int]:
        """The processes that work in the folders of an application."""
        work = self.folder / "work"
        folders = [*work.glob(f"build/{app}"), *work.glob(f"appserver/*/{app}")]
        return [pid for folder in folders for pid in working_in(folder)]

    def rows(self, query: str) -> list[Any]:
        """What is in the tables that the jobs have made."""
        engine = create_engine(f"sqlite:///{self.folder}/var/jobs.db")
        with engine.connect() as connection:
            return list(connection.execute(text(query)))

    def set_load(self, **loads: float) -> None:
        """How the appservers were last seen: `s1=0.5`."""
        engine = create_engine(f"sqlite:///{self.folder}/var/jobs.db")
        update = "UPDATE dz_appserver SET load = :load, seen_s = :now WHERE server = :server"
        with engine.begin() as connection:
            for name, load in loads.items():
                row = {"load": load, "now": time.time(), "server": int(name[1:])}
                connection.execute(text(update), row)

    def gate(self, point: str) -> Path:
        """While there is this file a task stops at `before deploy` or `after deploy`."""
        when, _, task = point.partition(" ")
        return self.folder / f"{when}-{task}"

    @contextlib.contextmanager
    def held(self, task: str) -> Iterator[None]:
        """Tasks of this name do not begin inside the block."""
        self.gate(f"before {task}").touch()
        try:
            yield
        finally:
            self.gate(f"before {task}").unlink(missing_ok=True)
