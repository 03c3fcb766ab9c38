"""download, new_file, hash, upload, verify_remote_file, in a real daemon that is killed."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from tests.daemons import Daemon, until
from tests.ftpd import PASSWORD, FtpServer, make_certificate
from tests.jobkit import JOBS_DIR

CHAIN = ["download", "new_file", "hash", "upload", "verify_remote_file"]
NAME = "a b.sd7"


class Site(ThreadingHTTPServer):
    """Serves a folder by HTTP; can hold an answer up."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Answer, directory=str(folder)))
        #: Keep whoever asks waiting after so many bytes, until `go_on` is set.
        self.hold_after: int | None = None
        self.held, self.go_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=functools.partial(self.serve_forever, 0.01))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed is no news."""


class Answer(SimpleHTTPRequestHandler):
    server: Site

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self.server.hold_after is not None:
            outputfile.write(source.read(self.server.hold_after))
            self.server.held.set()
            self.server.go_on.wait()
        super().copyfile(source, outputfile)

    def log_message(self, *_: object) -> None:
        """Silent."""


class World:
    """Where files come from, a daemon, and a mirror with its FTP and its web server."""

    def __init__(self, folder: Path) -> None:
        for name in ("origin", "mirror", "daemon"):
            (folder / name).mkdir()
        self.origin, self.mirror = folder / "origin", folder / "mirror"
        certificate = make_certificate(folder / "tls.pem")
        self.ftp = FtpServer(self.mirror, certificate)
        self.source, self.web = Site(self.origin), Site(self.mirror)
        self.daemon = Daemon(folder / "daemon")
        self.files = self.daemon.folder / "files"
        for path in JOBS_DIR.glob("*.py"):
            shutil.copy(path, self.daemon.folder / "jobs")
        (self.daemon.folder / "secret").write_text(f"{PASSWORD}\n")
        self.upload = {
            "mirrors": "eu",
            "eu_url": self.ftp.url,
            "eu_password_file": "secret",
            "eu_tls": f"verify {certificate}",
            "eu_web": self.web.url,
        }

    def configure(self, **upload: str) -> None:
        patient = "retries = 20\nretry_delay = 100ms\nretry_backoff = 1\n"
        settings = "".join(f"{key} = {value}\n" for key, value in (self.upload | upload).items())
        self.daemon.configure(
            f"[paths]\nfiles = files\n"
            f"[job download]\nsubjobs = {' '.join(CHAIN[1:])}\n{patient}"
            f"[job new_file]\n[job hash]\n"
            f"[job upload]\n{settings}{patient}"
            f"[job verify_remote_file]\n{patient}"
        )

    def publish(self, name: str, size: int) -> bytes:
        body = os.urandom(size)
        (self.origin / name).write_bytes(body)
        return body

    def download(self, name: str) -> int:
        return self.daemon.submit(f'download url:"{self.source.url}/{name}"')

    def chain(self, id: int) -> list[dict[str, Any]]:
        """A job and all that followed it, one after the other."""
        shown = self.daemon.ask(f"show {id}")
        found = [shown["job"]]
        while children := [c for c in shown["children"] if c["type"] != shown["job"]["type"]]:
            (child,) = children  # and a job of each mirror, where there are several
            shown = self.daemon.ask(f"show {child['id']}")
            found.append(shown["job"])
        return found

    def until_done(self, id: int) -> None:
        """Wait for the chain; each step was there once, and was done."""
        until(lambda: self.has_failed(id) or len(self.chain(id)) == len(CHAIN))
        last = self.daemon.wait(self.chain(id)[-1]["id"])
        assert last["type"] == CHAIN[-1], last["message"]
        jobs = self.chain(id)
        ended = [(job["type"], job["state"]) for job in jobs]
        assert ended == [(name, "done") for name in CHAIN], last["message"]

    def has_failed(self, id: int) -> bool:
        """Whether a step has; one over which the daemon was killed too often is tried again."""
        last = self.chain(id)[-1]
        if last["reason"] == "crashed":
            self.daemon.ask(f"retry {last['id']}")
            return False
        return bool(last["state"] == "failed")

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(f"file:{self.daemon.folder}/state/jobs.db?mode=ro", uri=True) as db:
            return db.execute(query).fetchall()

    def is_right(self, bodies: dict[str, bytes]) -> None:
        """Every file is there, here and on the mirror, and nothing else; so says the catalogue."""
        names = sorted(bodies)
        assert sorted(os.listdir(self.files)) == sorted(os.listdir(self.mirror)) == names
        for name, body in bodies.items():
            assert (self.files / name).read_bytes() == (self.mirror / name).read_bytes() == body
        known = self.rows(
            "SELECT f.path, h.digest, m.path, m.status FROM upq_file f"
            " JOIN upq_file_hash h ON h.fid = f.fid AND h.algorithm = 'sha256'"
            " JOIN upq_mirror_file m ON m.fid = f.fid ORDER BY f.path"
        )
        assert known == [
            (str(self.files / name), hashlib.sha256(bodies[name]).hexdigest(), name, "ok")
            for name in names
        ]


@pytest.fixture
def world(short_tmp: Path) -> Iterator[World]:
    made = World(short_tmp)
    made.configure()
    with made.ftp, made.source, made.web, made.daemon:
        yield made


def test_what_is_downloaded_comes_to_the_mirror_and_is_verified(world: World) -> None:
    body = world.publish(NAME, 3_000_000)
    for _ in range(2):  # the second time nothing is new, and all is well
        world.until_done(world.download(NAME.replace(" ", "%20")))
        world.is_right({NAME: body})
    assert world.ftp.did("STOR") == 1
    newer = world.publish(NAME, 2_000_000)
    os.utime(world.origin / NAME, (2_000_000_000, 2_000_000_000))
    world.until_done(world.download(NAME.replace(" ", "%20")))
    world.is_right({NAME: newer})


def test_a_child_process_brings_it_just_so(world: World) -> None:
    world.configure(executor="process")
    world.daemon.restart()
    body = world.publish("x", 1_000_000)
    world.until_done(world.download("x"))
    world.is_right({"x": body})


@pytest.mark.parametrize("step", ["download", "upload", "verify_remote_file"])
def test_a_daemon_that_is_killed_in_the_middle_of_a_step_ends_the_chain(
    world: World, step: str
) -> None:
    body = world.publish("x", 5_000_000)
    faults = world.ftp.faults
    held = {"download": world.source, "verify_remote_file": world.web}.get(step)
    if held is not None:
        held.hold_after = 2_000_000
    else:
        faults.stall_after = 2_000_000
    job = world.download("x")
    assert (held.held if held is not None else faults.stalled).wait(30)
    world.daemon.kill9()
    assert list(world.mirror.iterdir()) == [] or step != "download"
    if step == "upload":
        (part,) = world.mirror.iterdir()
        until(lambda: part.stat().st_size >= 2_000_000)
    faults.stall_after = None
    for site in (world.source, world.web):
        site.hold_after = None
        site.go_on.set()
    world.daemon.start()
    world.until_done(job)
    world.is_right({"x": body})
    assert world.ftp.did("REST") == 2 * (step == "upload")  # to look at its end, and to go on


@pytest.mark.slow
def test_chains_survive_kills_at_any_moment(world: World) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    bodies = {f"{n}.sd7": world.publish(f"{n}.sd7", 8_000_000) for n in range(6)}
    jobs = [world.download(name) for name in bodies]
    kills = 0
    while kills < 10:
        time.sleep(rng.uniform(0, 0.25))  # the moment is what is tried out
        world.daemon.restart()
        kills += 1
    for job in jobs:
        world.until_done(job)
    world.is_right(bodies)
    starts = [job["starts"] for first in jobs for job in world.chain(first)]
    print(f"seed {seed}: {kills} kills, {sum(starts) - len(starts)} further starts")


def test_a_mirror_that_refuses_holds_up_no_other_and_is_retried_alone(
    world: World, short_tmp: Path
) -> None:
    (short_tmp / "us").mkdir()
    with FtpServer(short_tmp / "us") as us, Site(short_tmp / "us") as us_web:
        us.faults.answers = {"PASS": f"530 {PASSWORD} is wrong"}
        world.configure(
            mirrors="eu, us", us_url=us.url, us_password=PASSWORD, us_tls="no", us_web=us_web.url
        )
        world.daemon.restart()
        body = world.publish("x", 1_000_000)
        first = world.download("x")
        upload = until(lambda: next((j for j in world.chain(first) if j["type"] == "upload"), None))
        failed = world.daemon.wait(upload["id"])
        assert failed["state"] == "failed"
        assert failed["message"].endswith("us: 530 *** is wrong")
        assert PASSWORD not in world.daemon.log
        assert (world.mirror / "x").read_bytes() == body
        us.faults.answers = {}
        world.daemon.ask(f"retry {upload['id']}")
        done = world.daemon.wait(upload["id"])
        assert [each["mirror"] for each in done["result"]] == ["eu", "us"]
        assert (short_tmp / "us/x").read_bytes() == body
        assert world.ftp.did("STOR") == us.did("STOR") == 1
        until(lambda: len(world.chain(first)) == len(CHAIN))
        verified = world.daemon.wait(world.chain(first)[-1]["id"])
        assert (verified["state"], verified["message"]) == ("done", "all 2 copies are ok")
        assert world.rows("SELECT status FROM upq_mirror_file") == [("ok",), ("ok",)]
