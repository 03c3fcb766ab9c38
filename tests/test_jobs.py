"""The shipped jobs and their catalogue: real files, real databases, a real web server."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from tests import jobkit
from tests.jobkit import JOBS_DIR, SHARED, Jobs, perform
from upq.db import Database
from upq.errors import Disabled
from upq.loader import Loader
from upq.when import now

MONTH = 30 * 86_400 * 1_000_000

jobs = jobkit.jobs


@pytest.fixture
def any_jobs(url: str, tmp_path: Path) -> Iterator[Jobs]:
    """The same over each database."""
    database = Database(url, jobs_file=tmp_path / "jobs.db")
    yield Jobs(database.jobs)
    database.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.sd7"
    path.write_bytes(os.urandom(3_000_000))
    return path


def catalogue(jobs: Jobs, engine: Engine | None = None) -> Any:
    jobs.loader.load("hash")
    module = importlib.import_module("upq_jobs.catalogue")
    return module.Catalogue(engine or jobs.desk.db)


def register(jobs: Jobs, path: Path, jobid: int = 1) -> int:
    """The chain new_file, hash; returns the fid."""
    added = jobs.run("new_file", {"file": str(path)}, jobid)
    assert added.state == "done"
    assert jobs.run("hash", added.data, jobid + 1).state == "done"
    return int(added.data["fid"])


def damage(path: Path) -> None:
    """One byte is wrong; size and time say nothing of it."""
    info = path.stat()
    with path.open("r+b") as file:
        file.seek(1_000)
        byte = file.read(1)
        file.seek(1_000)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def digests(data: bytes) -> dict[str, str]:
    return {name: hashlib.new(name, data).hexdigest() for name in ("md5", "sha1", "sha256")}


# The catalogue


def test_tables_make_themselves_however_many_come_first(any_jobs: Jobs, tmp_path: Path) -> None:
    url = any_jobs.desk.db.url.render_as_string(hide_password=False)
    others = [Database(url, jobs_file=tmp_path / "jobs.db") for _ in range(4)]
    catalogue(any_jobs).find("/x")
    with any_jobs.desk.db.begin() as connection:
        for name in ("file_leftover", "mirror_file", "mirror", "file_hash", "file"):
            connection.execute(text(f"DROP TABLE upq_{name}"))
    start = threading.Barrier(8)
    failures: list[BaseException] = []

    def first_use(engine: Engine) -> None:
        start.wait()
        try:
            assert catalogue(any_jobs, engine).find("/x") is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=first_use, args=(database.jobs,)) for database in others * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for database in others:
        database.close()
    assert failures == []


def test_paths_that_differ_in_case_blanks_or_accents_are_different_files(
    any_jobs: Jobs, tmp_path: Path
) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 8)
    deep.mkdir(parents=True)
    names = ["a", "A", "a ", "ä", "Ä", "a\u0308", "\N{PILE OF POO}", "ß", "ss", f"{deep}/long"]
    paths = [tmp_path / name for name in names]
    fids = set()
    for jobid, path in enumerate(paths):
        path.write_bytes(b"x")
        fids.add(jobs_fid(any_jobs, path, jobid))
    assert len(fids) == len(names)
    assert [catalogue(any_jobs).find(str(path)).path for path in paths] == list(map(str, paths))


def jobs_fid(jobs: Jobs, path: Path, jobid: int) -> int:
    return int(jobs.run("new_file", {"file": str(path)}, jobid).data["fid"])


def test_a_file_goes_through_its_chain_and_is_verified(any_jobs: Jobs, file: Path) -> None:
    fid = register(any_jobs, file)
    assert catalogue(any_jobs).hashes(fid) == digests(file.read_bytes())
    verified = any_jobs.run("verify_local_file", {"fid": str(fid)})
    assert verified.message == f"Hashes of file ({fid}) {file} match those in DB."
    assert verified.result == {"fid": fid, "path": str(file), "match": True, "differing": ""}
    assert catalogue(any_jobs).file(fid).lastcheck > now() - 60_000_000


def test_of_two_jobs_that_add_one_path_at_once_one_is_refused(any_jobs: Jobs, file: Path) -> None:
    made = [any_jobs.make("new_file", {"file": str(file)}, jobid) for jobid in (1, 2)]
    assert [job.check() for job in made] == [True, True]
    assert sorted([job.run() for job in made]) == [False, True]
    assert "already exists: fid: " in made[1].msgstr


def test_what_was_not_checked_for_longest_comes_first(any_jobs: Jobs, tmp_path: Path) -> None:
    fids = []
    for number in range(4):
        path = tmp_path / str(number)
        path.write_bytes(b"x")
        fids.append(register(any_jobs, path, number * 10))
    ours = catalogue(any_jobs)
    mirrors = [ours.add_mirror(name, f"http://{name}.example") for name in ("up", "down")]
    mfids = [ours.add_mirror_file(mid, fids[0], "0") for mid in mirrors]
    with any_jobs.desk.db.begin() as connection:
        connection.execute(text("UPDATE upq_mirror SET status = 'off' WHERE name = 'down'"))
        for fid, lastcheck in zip(fids, (30, 10, 20, 1000), strict=True):
            connection.execute(
                text("UPDATE upq_file SET lastcheck = :at WHERE fid = :fid"),
                {"at": lastcheck, "fid": fid},
            )
    local = [("verify_local_file", {"fid": fids[n]}) for n in (1, 2, 0)]
    remote = [("verify_remote_file", {"mfid": mfids[0]})]
    assert ours.unchecked(1000, 10) == remote + local
    assert ours.unchecked(1000, 2) == remote + local[:1]


def test_a_mirror_has_one_row_and_one_of_each_copy_whoever_comes_first(
    any_jobs: Jobs, file: Path
) -> None:
    fid, ours = register(any_jobs, file), catalogue(any_jobs)
    start = threading.Barrier(6)
    found: list[tuple[int, int]] = []

    def first_use() -> None:
        start.wait()
        mid = ours.mirror("eu", "http://eu.example").mid
        found.append((mid, ours.keep_copy(mid, fid, "maps/a")))

    threads = [threading.Thread(target=first_use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    mid = found[0][0]
    assert ours.mirror("eu", "").url == "http://eu.example"  # nothing said, nothing changed
    assert ours.mirror("eu", "http://other.example").url == "http://other.example"
    assert (ours.at_path(mid, "maps/a"), ours.at_path(mid, "maps/A")) == (fid, None)
    assert [copy.path for copy in ours.copies(fid)] == ["maps/a"]


def test_a_file_that_moves_leaves_its_old_place_to_be_removed(any_jobs: Jobs, file: Path) -> None:
    fid, ours = register(any_jobs, file), catalogue(any_jobs)
    mfid = ours.keep_copy(ours.mirror("eu", "http://eu.example").mid, fid, "a")
    row, state = ours.file(fid), {"size": 1, "mtime": 2}
    was = {"size": row.size, "mtime": row.mtime}
    assert ours.move(row, "/new", was, state, digests(b"x")) is True
    assert ours.move(row, "/other", was, state) is False  # it is not where it was any more
    moved, left = ours.file(fid), ours.leftover(fid)
    assert (moved.path, moved.size, moved.mtime) == ("/new", 1, 2)
    assert (ours.find("/new").fid, ours.find(str(file))) == (fid, None)
    assert (left.path, left.size, left.mtime) == (str(file), row.size, row.mtime)
    assert ours.hashes(fid) == digests(b"x")
    assert ours.mirror_file(mfid).status == "outdated"
    ours.nothing_is_left(fid)
    assert ours.leftover(fid) is None


# new_file


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({}, "Either file or fid has to be set!"),
        ({"file": ""}, "Either file or fid has to be set!"),
        ({"file": "/nowhere/x"}, "File is not readable: "),
        ({"file": "relative"}, "relative is not an absolute path"),
        ({"file": "/tmp"}, "/tmp is not a file"),
        ({"file": "/dev/zero"}, "/dev/zero is not a file"),
        ({"file": "/tmp/\x00"}, "File is not readable: "),
        ({"file": "/tmp/\udc80"}, "File is not readable: "),
        ({"fid": "abc"}, "fid has to be a number, not 'abc'"),
        ({"fid": 1.5}, "fid has to be a number, not '1.5'"),
        ({"fid": "-1"}, "fid has to be a number, not '-1'"),
        ({"fid": "9" * 18}, f"File with fid {'9' * 18} is not in the catalogue."),
        ({"fid": "9" * 19}, f"fid has to be a number, not '{'9' * 19}'"),
    ],
)
def test_new_file_says_what_is_wrong_with_its_params(
    jobs: Jobs, params: dict[str, Any], why: str
) -> None:
    assert jobs.submit("new_file", params).startswith(why)


def test_new_file_refuses_a_path_it_knows(jobs: Jobs, file: Path) -> None:
    fid = jobs_fid(jobs, file, 7)
    assert jobs.submit("new_file", {"file": str(file)}) == f"File {file} already exists: fid: {fid}"


def test_new_file_that_was_killed_after_it_added_the_file_ends_well(jobs: Jobs, file: Path) -> None:
    params = {"file": str(file)}
    first = jobs.run("new_file", params, jobid=7)
    again = jobs.run("new_file", params, jobid=7)
    assert again == first
    assert again.state == "done"
    assert again.message == f"Filename: {file} Size: 3000000"


def test_new_file_of_a_known_fid_takes_a_changed_file_over(jobs: Jobs, file: Path) -> None:
    fid = register(jobs, file)
    same = jobs.run("new_file", {"fid": fid})
    assert same.message == f"File already known, Filename: {file} Size: 3000000"
    assert catalogue(jobs).hashes(fid)
    file.write_bytes(b"new")
    changed = jobs.run("new_file", {"fid": fid})
    assert changed.message == f"File changed, Filename: {file} Size: 3"
    assert catalogue(jobs).hashes(fid) == {}


# hash


def test_hash_of_a_path_is_only_a_result(jobs: Jobs, file: Path) -> None:
    assert jobs.run("hash", {"file": str(file)}).result == digests(file.read_bytes())
    assert catalogue(jobs).find(str(file)) is None


def test_hash_of_an_empty_file(jobs: Jobs, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert jobs.run("hash", {"file": str(path)}).result == digests(b"")


def test_hash_shows_how_far_it_is(jobs: Jobs, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upq.plugins.PROGRESS_S", 60)
    jobs.run("hash", {"file": str(file)})
    assert jobs.desk.progressed == [{"done": 1 << 20, "total": 3_000_000, "text": ""}]


def test_hash_ends_when_it_is_cancelled(jobs: Jobs, file: Path) -> None:
    job = jobs.make("hash", {"file": str(file)}, 1)
    job.cancel_event.set()
    assert perform(job)[:2] == ("abort", "cancelled")


def test_hashing_a_damaged_file_again_does_not_make_it_good(jobs: Jobs, file: Path) -> None:
    fid = register(jobs, file)
    good = catalogue(jobs).hashes(fid)
    damage(file)
    again = jobs.run("hash", {"fid": fid})
    assert again.state == "failed"
    assert "has other hashes in DB: md5, sha1, sha256" in again.message
    assert catalogue(jobs).hashes(fid) == good


def test_hash_without_params_is_refused(jobs: Jobs) -> None:
    assert jobs.submit("hash") == "fid is missing"


# verify_local_file


def test_verify_takes_the_fid_as_a_plain_word(jobs: Jobs, file: Path) -> None:
    fid = register(jobs, file)
    assert jobs.run("verify_local_file", {str(fid): ""}).state == "done"


def test_verify_names_the_hashes_of_a_damaged_file(jobs: Jobs, file: Path) -> None:
    fid = register(jobs, file)
    damage(file)
    ended = jobs.run("verify_local_file", {"fid": fid})
    assert ended.state == "failed"
    assert ended.message == (
        f"Hashes of file ({fid}) {file} do not match those in DB: md5, sha1, sha256"
    )
    assert ended.result["match"] is False


def test_verify_names_the_one_hash_that_differs(jobs: Jobs, file: Path) -> None:
    fid = register(jobs, file)
    with jobs.desk.db.begin() as connection:
        connection.execute(text("UPDATE upq_file_hash SET digest = 'x' WHERE algorithm = 'sha1'"))
    assert jobs.run("verify_local_file", {"fid": fid}).message.endswith("in DB: sha1")


def test_verify_without_stored_hashes_fails(jobs: Jobs, file: Path) -> None:
    fid = jobs_fid(jobs, file, 1)
    ended = jobs.run("verify_local_file", {"fid": fid})
    assert ended.state == "failed"
    assert ended.message.startswith(f"No hashes of file ({fid}) {file} in DB")


def test_verify_refuses_what_it_cannot_read(jobs: Jobs, file: Path) -> None:
    fid = register(jobs, file)
    file.unlink()
    assert jobs.submit("verify_local_file", {"fid": fid}).startswith("File is not readable: ")
    assert jobs.submit("verify_local_file", {"fid": "x"}) == "fid has to be a number, not 'x'"
    assert "is not in the catalogue" in jobs.submit("verify_local_file", {"fid": fid + 1})


# reverify


def test_reverify_queues_what_is_due_with_pauses(jobs: Jobs, tmp_path: Path) -> None:
    fids = []
    for number in range(3):
        path = tmp_path / str(number)
        path.write_bytes(b"x")
        fids.append(register(jobs, path, number * 10))
    catalogue(jobs).checked(fids[0])
    began = time.monotonic()
    ended = jobs.run("reverify", pause="50ms")
    assert time.monotonic() - began >= 0.05
    assert jobs.desk.enqueued == [("verify_local_file", {"fid": fid}) for fid in fids[1:]]
    assert ended.message == "Queued 2 verify_local_file of 2 due"


def test_reverify_keeps_to_its_limit_and_age(jobs: Jobs, file: Path) -> None:
    register(jobs, file)
    assert jobs.run("reverify", limit="0").message == "Queued nothing of 0 due"
    catalogue(jobs).checked(1)
    assert jobs.run("reverify", age="1h").message == "Queued nothing of 0 due"
    assert jobs.run("reverify", age="0").message == "Queued 1 verify_local_file of 1 due"
    assert jobs.submit("reverify", age="soon").startswith("[job reverify] 'soon' is not a duration")


def test_reverify_tells_of_a_lost_file_and_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    for number in range(2):
        path = tmp_path / str(number)
        path.write_bytes(b"x")
        register(jobs, path, number * 10)
    jobs.desk.judge = lambda jobname, params: "it is gone" if params == {"fid": 1} else ""
    ended = jobs.run("reverify")
    assert ended.state == "failed"
    assert ended.message == "Queued 1 verify_local_file of 2 due; verify_local_file: it is gone"
    assert jobs.desk.enqueued == [("verify_local_file", {"fid": 2})]
    # It was told: next time it does not stand in the way of others.
    assert catalogue(jobs).unchecked(now() - MONTH, 1) == [("verify_local_file", {"fid": 2})]


def test_reverify_takes_nothing_for_checked_when_its_jobs_cannot_be_queued(
    jobs: Jobs, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disabled(*_: object) -> None:
        raise Disabled("verify_local_file is disabled")

    monkeypatch.setattr(jobs.desk, "enqueue", disabled)
    fid = register(jobs, file)
    with pytest.raises(Disabled):
        jobs.run("reverify")
    assert catalogue(jobs).file(fid).lastcheck == 0


def test_reverify_tells_of_a_copy_that_cannot_be_verified(jobs: Jobs, copy: int) -> None:
    jobs.desk.judge = lambda jobname, params: "Mirror is off" if "mfid" in params else ""
    ended = jobs.run("reverify")
    assert ended.message == "Queued 1 verify_local_file of 2 due; verify_remote_file: Mirror is off"


def test_reverify_stops_when_it_is_cancelled(jobs: Jobs, tmp_path: Path) -> None:
    for number in range(2):
        path = tmp_path / str(number)
        path.write_bytes(b"x")
        register(jobs, path, number * 10)
    job = jobs.make("reverify", {}, 1, pause="1h")
    job.cancel_event.set()
    assert perform(job).message == "Queued 1 verify_local_file of 2 due"


# The web


class Web(ThreadingHTTPServer):
    """Serves one file; knows ranges, If-Range and 304, and misbehaves as it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.body = os.urandom(3_000_000)
        #: Seconds since 1970, or None for no Last-Modified.
        self.modified: int | None = 1_600_000_000
        #: Hang up after so many bytes of each body.
        self.cut_after: int | None = None
        self.status: int | None = None
        self.more_headers: dict[str, str] = {}
        self.tells_length = True
        self.ranges = True
        #: The headers of each request.
        self.asked: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves is no news."""


class Answer(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        web, asked = self.server, dict(self.headers)
        web.asked.append(asked)
        dated = {"Last-Modified": formatdate(web.modified, usegmt=True)} if web.modified else {}
        if web.status:
            self.head(web.status, web.more_headers)
            return
        if dated and asked.get("If-Modified-Since") == dated["Last-Modified"]:
            self.head(304, dated)
            return
        start, total = 0, len(web.body)
        if "Range" in asked and web.ranges and asked["If-Range"] == dated.get("Last-Modified"):
            start = int(asked["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                self.head(416, {"Content-Range": f"bytes */{total}"})
                return
            dated["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        length = {"Content-Length": str(total - start)} if web.tells_length else {}
        self.head(206 if start else 200, {**dated, **length, **web.more_headers})
        end = total if web.cut_after is None else min(start + web.cut_after, total)
        self.wfile.write(web.body[start:end])

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


Download = Callable[..., Any]


@pytest.fixture
def download(jobs: Jobs, web: Web, tmp_path: Path) -> Download:
    """Downloads the file of the web server: `download(**jobcfg)`."""
    params = {"url": f"{web.url}/maps/a%20b.sd7"}
    return functools.partial(jobs.run, "download", params, path=str(tmp_path / "files"))


def left(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "files"))


def test_download_keeps_name_content_and_time(download: Download, web: Web, tmp_path: Path) -> None:
    ended = download()
    path = tmp_path / "files" / "a b.sd7"
    assert ended.state == "done"
    assert ended.data["file"] == str(path)
    assert path.read_bytes() == web.body
    assert path.stat().st_mtime == web.modified
    assert left(tmp_path) == ["a b.sd7"]


def test_download_asks_only_for_what_is_newer(download: Download, web: Web, tmp_path: Path) -> None:
    download()
    web.body = b"not to be fetched"
    ended = download()
    assert ended.state == "done"
    assert ended.message == f"{tmp_path}/files/a b.sd7 not modified"
    assert left(tmp_path) == ["a b.sd7"]
    assert web.asked[-1]["If-Modified-Since"] == formatdate(web.modified, usegmt=True)
    web.modified = 1_700_000_000
    assert download().state == "done"
    assert Path(ended.data["file"]).read_bytes() == web.body
    assert left(tmp_path) == ["a b.sd7"]


def test_download_goes_on_where_it_was_cut(download: Download, web: Web, tmp_path: Path) -> None:
    web.cut_after = 1_000_000
    first = download()
    assert first.state == "retry"
    assert first.message.endswith("cut off after 1000000 of 3000000 bytes")
    assert download().state == "retry"
    ended = download()
    assert ended.state == "done"
    assert [headers.get("Range") for headers in web.asked] == [
        None,
        "bytes=1000000-",
        "bytes=2000000-",
    ]
    path = Path(ended.data["file"])
    assert path.read_bytes() == web.body
    assert path.stat().st_mtime == web.modified


def test_download_starts_over_when_the_file_changed_meanwhile(download: Download, web: Web) -> None:
    web.cut_after = 1_000_000
    download()
    web.cut_after, web.body, web.modified = None, os.urandom(2_000_000), 1_700_000_000
    ended = download()
    assert Path(ended.data["file"]).read_bytes() == web.body
    assert len(web.asked) == 2


def test_download_never_joins_two_versions_whatever_the_server_says(
    download: Download, web: Web
) -> None:
    web.cut_after = 1_000_000
    download()
    # A server that takes no notice of If-Range: another version, yet the rest of it.
    web.cut_after, web.body = None, os.urandom(3_000_000)
    web.more_headers = {"Last-Modified": formatdate(1_700_000_000, usegmt=True)}
    ended = download()
    assert ended.state == "done"
    assert Path(ended.data["file"]).read_bytes() == web.body


def test_download_that_was_killed_before_the_last_step_ends_well(
    download: Download, web: Web, tmp_path: Path
) -> None:
    web.cut_after = len(web.body) - 1
    download()
    (part,) = (tmp_path / "files").iterdir()
    part.write_bytes(web.body)
    os.utime(part, (web.modified, web.modified))
    web.cut_after = None
    ended = download()
    assert [headers.get("Range") for headers in web.asked[1:]] == ["bytes=3000000-", None]
    assert Path(ended.data["file"]).read_bytes() == web.body
    assert left(tmp_path) == ["a b.sd7"]


def test_download_without_a_date_starts_over(download: Download, web: Web) -> None:
    web.modified, web.cut_after = None, 1_000_000
    assert download().state == "retry"
    web.cut_after = None
    ended = download()
    assert "Range" not in web.asked[1]
    assert Path(ended.data["file"]).read_bytes() == web.body
    assert Path(ended.data["file"]).stat().st_mtime > time.time() - 60


def test_download_takes_a_body_of_unknown_length(download: Download, web: Web) -> None:
    web.tells_length = False
    assert Path(download().data["file"]).read_bytes() == web.body


def test_download_of_a_server_without_ranges_starts_over(download: Download, web: Web) -> None:
    web.cut_after, web.ranges = 1_000_000, False
    download()
    web.cut_after = None
    assert Path(download().data["file"]).read_bytes() == web.body


@pytest.mark.parametrize(
    ("status", "state"),
    [(404, "abort"), (403, "abort"), (503, "retry"), (429, "retry"), (204, "abort")],
)
def test_download_knows_what_may_pass(
    download: Download, web: Web, tmp_path: Path, status: int, state: str
) -> None:
    web.status = status
    ended = download()
    assert ended.state == state
    assert str(status) in ended.message
    assert left(tmp_path) == []


def test_download_of_a_server_that_is_down_is_tried_again(jobs: Jobs, tmp_path: Path) -> None:
    ended = jobs.run("download", {"url": "http://127.0.0.1:1/x"}, path=str(tmp_path / "files"))
    assert ended.state == "retry"
    assert "Connection refused" in ended.message


def test_how_long_a_server_may_take_is_not_how_long_the_job_may(jobs: Jobs, copy: int) -> None:
    for name, params in (
        ("download", {"url": "http://host/x"}),
        ("verify_remote_file", {"mfid": copy}),
    ):
        job = jobs.make(name, params, path="/files", http_timeout="7s")
        assert job.check()
        assert job.timeout_s == 0


def test_download_follows_no_redirect_out_of_the_web(download: Download, web: Web) -> None:
    web.status, web.more_headers = 302, {"Location": "file:///etc/passwd"}
    assert download().state in ("abort", "retry")
    web.more_headers = {"Location": "ftp://127.0.0.1/x"}
    assert "unknown url type: ftp" in download().message


@pytest.mark.parametrize("tells_length", [True, False])
def test_download_stops_at_max_size(
    jobs: Jobs, download: Download, web: Web, tmp_path: Path, tells_length: bool
) -> None:
    web.tells_length = tells_length
    ended = download(max_size="1M")
    assert ended.state == "abort"
    assert "more than 1048576 bytes" in ended.message
    assert left(tmp_path) == []
    # What is told beforehand is not fetched at all.
    assert bool(jobs.desk.progressed) is not tells_length


def test_two_downloads_of_one_address_do_not_mix(
    download: Download, web: Web, tmp_path: Path
) -> None:
    web.cut_after = 1_000_000
    download()
    (part,) = (tmp_path / "files").iterdir()
    with part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ended = download()
    assert ended.state == "retry"
    assert ended.message.endswith("another job is fetching it")
    assert len(web.asked) == 1


def test_download_ends_when_it_is_cancelled(
    jobs: Jobs, web: Web, download: Download, tmp_path: Path
) -> None:
    job = jobs.make("download", {"url": f"{web.url}/x"}, 1, path=str(tmp_path / "files"))
    job.cancel_event.set()
    assert perform(job)[:2] == ("abort", "cancelled")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "url has to be set!"),
        ("ftp://host/x", "'ftp://host/x' is not an http or https address"),
        ("file:///etc/passwd", "'file:///etc/passwd' is not an http or https address"),
        ("http:///x", "'http:///x' is not an http or https address"),
        ("http://host:99999/x", "http://host:99999/x: Port out of range 0-65535"),
        ("http://me:pw@host/x", "an address with user and password in it is not supported"),
        ("http://host/", "http://host/ does not end in a file name"),
        ("http://host/a/..", "http://host/a/.. does not end in a file name"),
        ("http://host/%2e%2e", "http://host/%2e%2e does not end in a file name"),
        ("http://host/.x", "http://host/.x does not end in a file name"),
        ("http://host/x%00", "http://host/x%00 does not end in a file name"),
        ("http://host/" + "x" * 201, "does not end in a file name"),
    ],
)
def test_download_refuses_an_address_it_cannot_use(jobs: Jobs, url: str, why: str) -> None:
    assert why in jobs.submit("download", {"url": url}, path="/files")


def test_download_stays_in_its_folder(jobs: Jobs, web: Web, tmp_path: Path) -> None:
    params = {"url": f"{web.url}/%2e%2e%2fup"}
    ended = jobs.run("download", params, path=str(tmp_path / "files"))
    assert ended.data["file"] == str(tmp_path / "files" / "up")


def test_download_refuses_settings_it_cannot_use(jobs: Jobs) -> None:
    params = {"url": "http://host/x"}
    assert jobs.submit("download", params) == "[job download] path has to be an absolute path"
    assert jobs.submit("download", params, path="/files", max_size="big").startswith(
        "[job download] 'big' is not a size"
    )


def test_download_new_file_hash_ends_well_each_time(
    jobs: Jobs, download: Download, web: Web
) -> None:
    def chain(jobid: int) -> list[str]:
        """One run of `subjobs = new_file hash`: a job for each step, which share their data."""
        states, ended = [], download(jobid=jobid)
        for step, name in enumerate(("new_file", "hash"), 1):
            states.append(ended.state)
            ended = jobs.run(name, ended.data, jobid + step)
        return [*states, ended.state]

    assert chain(1) == ["done"] * 3
    assert chain(11) == ["done"] * 3  # 304, and the path is known
    assert catalogue(jobs).hashes(1) == digests(web.body)
    web.body, web.modified = b"another version", 1_700_000_000
    assert chain(21) == ["done"] * 3
    assert catalogue(jobs).hashes(1) == digests(web.body)


# verify_remote_file


@pytest.fixture
def copy(jobs: Jobs, web: Web, file: Path) -> int:
    """The mfid of a copy on the web server."""
    web.body = file.read_bytes()
    ours = catalogue(jobs)
    mid = ours.add_mirror("mirror", f"{web.url}/pub/")
    return int(ours.add_mirror_file(mid, register(jobs, file), "maps/a b.sd7"))


def status(jobs: Jobs, mfid: int) -> str:
    return str(catalogue(jobs).mirror_file(mfid).status)


def test_a_good_copy_is_ok(jobs: Jobs, web: Web, copy: int) -> None:
    ended = jobs.run("verify_remote_file", {"mfid": copy})
    assert ended.state == "done"
    assert ended.result == {
        "mfid": copy,
        "fid": 1,
        "url": f"{web.url}/pub/maps/a%20b.sd7",
        "status": "ok",
        "why": "md5, sha1, sha256 match those in DB",
    }
    assert status(jobs, copy) == "ok"
    assert catalogue(jobs).mirror_file(copy).lastcheck > now() - 60_000_000


def spoil(web: Web) -> None:
    web.body = bytes([web.body[0] ^ 1]) + web.body[1:]


def shorten(web: Web) -> None:
    web.body = web.body[:-1]


def lengthen(web: Web) -> None:
    web.body += b"x" * 2_000_000


@pytest.mark.parametrize("tells_length", [True, False])
@pytest.mark.parametrize("fault", [spoil, shorten, lengthen])
def test_a_bad_copy_is_damaged(
    jobs: Jobs, web: Web, copy: int, fault: Callable[[Web], None], tells_length: bool
) -> None:
    fault(web)
    web.tells_length = tells_length
    ended = jobs.run("verify_remote_file", {"mfid": copy})
    assert ended.state == "failed"
    assert ended.result["status"] == status(jobs, copy) == "damaged"


def test_a_lost_copy_is_missing(jobs: Jobs, web: Web, copy: int) -> None:
    web.status = 404
    ended = jobs.run("verify_remote_file", {"mfid": copy})
    assert ended.state == "failed"
    assert ended.result["why"] == "404 Not Found"
    assert status(jobs, copy) == "missing"


def test_all_copies_of_a_file_are_verified_side_by_side(jobs: Jobs, copy: int) -> None:
    """One by a job of its own kind each, where there are several."""
    assert jobs.run("verify_remote_file", {"fid": 1}).result["mfid"] == copy
    ours = catalogue(jobs)
    other = ours.add_mirror_file(ours.add_mirror("other", "http://other.example"), 1, "x")
    nowhere = ours.add_mirror_file(ours.add_mirror("ftp only", ""), 1, "x")
    job = jobs.make("verify_remote_file", {"fid": 1}, 1)
    assert job.check()
    assert job.mfids == [copy, other]
    assert jobs.submit("verify_remote_file", {"mfid": nowhere}) == (
        "Mirror ftp only has no web address."
    )
    assert jobs.submit("verify_remote_file", {"fid": 2}) == (
        "No active mirror has a copy of file (2)."
    )


def test_a_mirror_in_trouble_says_nothing_about_its_copies(jobs: Jobs, web: Web, copy: int) -> None:
    web.cut_after = 1_000
    assert jobs.run("verify_remote_file", {"mfid": copy}).state == "retry"
    web.status = 500
    assert jobs.run("verify_remote_file", {"mfid": copy}).state == "retry"
    assert status(jobs, copy) == "new"


def test_verify_remote_file_refuses_what_it_cannot_check(jobs: Jobs, copy: int) -> None:
    assert jobs.submit("verify_remote_file", {"mfid": copy + 1}) == (
        f"No file on a mirror has mfid {copy + 1}."
    )
    assert jobs.submit("verify_remote_file") == "mfid is missing"
    with jobs.desk.db.begin() as connection:
        connection.execute(text("UPDATE upq_mirror SET status = 'off'"))
    assert jobs.submit("verify_remote_file", {"mfid": copy}) == "Mirror mirror is off."


# test and list_queue


def test_test_fails_as_often_as_told_and_counts_down(jobs: Jobs) -> None:
    data: dict[str, Any] = {"fail": "2"}
    states = []
    for _ in range(3):
        ended = jobs.run("test", data)
        states.append(ended.state)
        data = ended.data
    assert states == ["failed", "failed", "done"]


def test_test_says_and_returns_what_it_is_told(jobs: Jobs) -> None:
    ended = jobs.run("test", {"msg": "hello", "result": "42", "sleep": "0.01"})
    assert (ended.state, ended.message, ended.result) == ("done", "hello", "42")


def test_test_wakes_up_when_it_is_cancelled(jobs: Jobs) -> None:
    job = jobs.make("test", {"sleep": "3600"}, 1)
    job.cancel_event.set()
    assert perform(job)[:2] == ("abort", "cancelled")


@pytest.mark.parametrize(
    ("name", "value"), [("sleep", "long"), ("sleep", "nan"), ("sleep", "9" * 40), ("fail", "-1")]
)
def test_test_refuses_what_is_no_number(jobs: Jobs, name: str, value: str) -> None:
    assert jobs.submit("test", {name: value}) == f"{name} has to be a number, not '{value}'"


def listed(number: int, **more: Any) -> dict[str, Any]:
    job = {
        "id": number,
        "type": "hash",
        "queue": "hash",
        "state": "queued",
        "started_at": None,
        "created_at": "2026-01-01",
    }
    return job | {"params": {"fid": str(number)}} | more


def answer(jobs: Jobs, params: dict[str, Any] | None = None, **jobcfg: str) -> tuple[bool, str]:
    job = jobs.make("list_queue", params or {}, **jobcfg)
    return job.check(), job.msgstr


def test_list_queue_is_answered_at_once(jobs: Jobs) -> None:
    assert jobs.loader.load("list_queue").queued is False
    assert answer(jobs) == (True, "No queues.")
    jobs.desk.queues = [
        {"queue": "test", "queued": 0, "running": 0},
        {"queue": "hash", "queued": 2},
    ]
    jobs.desk.jobs = [listed(2), listed(1)]
    assert answer(jobs) == (
        True,
        "Queue 'test' contains 0 jobs: Queue is empty. Queue 'hash' contains 2 jobs: "
        """'hash' : '{"fid": "1"}', 'hash' : '{"fid": "2"}'""",
    )
    assert answer(jobs, {"test": ""}) == (True, "Queue 'test' contains 0 jobs: Queue is empty.")


def test_list_queue_honours_format_sort_and_limit(jobs: Jobs) -> None:
    jobs.desk.queues = [{"queue": "hash", "queued": 9, "running": 1}]
    jobs.desk.jobs = [listed(1), listed(2, state="running", started_at="2026-02-02"), listed(3)]
    form = "%(jobid)s %(jobname)s %(starttime)s %(status)s"
    assert answer(jobs, format=form, sort="starttime", limit="2") == (
        True,
        "Queue 'hash' contains 10 jobs: 1 hash - queued, 2 hash 2026-02-02 running, ...",
    )


@pytest.mark.parametrize(
    "jobcfg", [{"format": "%(nosuch)s"}, {"format": "%(jobid)"}, {"sort": "x"}]
)
def test_list_queue_says_what_is_wrong_with_its_settings(
    jobs: Jobs, jobcfg: dict[str, str]
) -> None:
    jobs.desk.queues = [{"queue": "hash", "queued": 1}]
    jobs.desk.jobs = [listed(1)]
    good, message = answer(jobs, **jobcfg)
    assert not good
    assert message.startswith("[job list_queue] ")


# All of them


def test_every_job_in_the_folder_has_its_class(jobs: Jobs) -> None:
    names = {path.stem for path in JOBS_DIR.glob("*.py")} - SHARED
    for name in names:
        assert jobs.loader.load(name).__name__ == name.capitalize()
    assert names >= {"new_file", "hash", "verify_local_file", "reverify", "download", "notify"}


def test_the_tutorial_job_works_as_it_stands(tmp_path: Path) -> None:
    page = (JOBS_DIR.parent / "docs" / "jobs.md").read_text()
    source = page.split("```python\n")[1].split("```")[0]
    assert len(source.splitlines()) <= 10
    (tmp_path / "count_lines.py").write_text(source)
    (tmp_path / "poem").write_text("one\ntwo\n")
    job = Loader(tmp_path).load("count_lines")("count_lines", {"file": str(tmp_path / "poem")})
    assert (job.run(), job.msgstr) == (2, "2 lines")
