"""archive_file and move_file_to_archive: real files on real disks, killed at each step."""

from __future__ import annotations

import bz2
import contextlib
import errno
import functools
import gzip
import hashlib
import importlib
import io
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests import jobkit
from tests.conftest import unavailable
from tests.jobkit import Ended, Jobs, perform

BODY = (b"a line that compresses well\n" * 50_000) + os.urandom(300_000)
DAMAGED = BODY[:-1] + bytes([BODY[-1] ^ 1])
NAME = "maps/a.sdz"

jobs = jobkit.jobs


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.fixture
def file(jobs: Jobs, files: Path) -> Path:
    """File 1 of the catalogue, with hashes."""
    return register(jobs, files / NAME, BODY)


def register(jobs: Jobs, path: Path, body: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    path.chmod(0o640)
    os.utime(path, (1_600_000_000, 1_600_000_000.25))
    added = jobs.run("new_file", {"file": str(path)})
    assert jobs.run("hash", added.data).state == "done"
    return path


@pytest.fixture(params=["same disk", "another disk"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The folder of the archive."""
    if request.param == "same disk":
        folder = tmp_path / "archive"
        folder.mkdir()
        yield folder
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        if os.stat(name).st_dev == os.stat(tmp_path).st_dev:
            unavailable("/dev/shm is no file system of its own")
        yield Path(name)


def catalogue(jobs: Jobs) -> Any:
    jobs.loader.load("hash")
    return importlib.import_module("upq_jobs.catalogue").Catalogue(jobs.desk.db)


def module(jobs: Jobs, name: str) -> Any:
    jobs.loader.load("move_file_to_archive")
    return importlib.import_module(f"upq_jobs.{name}")


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


Run = Callable[..., Ended]


@pytest.fixture
def move(jobs: Jobs, files: Path, archive: Path) -> Run:
    """move_file_to_archive of file 1: `move(**settings)`."""
    cfg = {"files": str(files), "archive": str(archive)}
    return functools.partial(jobs.run, "move_file_to_archive", {"fid": 1}, **cfg)


@pytest.fixture
def compress(jobs: Jobs, files: Path) -> Run:
    """archive_file of file 1: `compress(**settings)`."""
    return functools.partial(jobs.run, "archive_file", {"fid": 1}, files=str(files))


class Killed(BaseException):
    """In place of kill -9: nothing of the job runs any more."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> bool:
    """Run it and kill it before its n-th call that changes a disk; whether there is an n-th."""
    calls = 0
    with monkeypatch.context() as patch:

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls >= step:
                    raise Killed
                return real(*args, **named)

            return call

        for name in ("mkdir", "link", "unlink", "rename", "fsync", "fchmod", "utime"):
            patch.setattr(os, name, counted(getattr(os, name)))
        engine = importlib.import_module("sqlalchemy.engine.base").Transaction
        patch.setattr(engine, "commit", counted(engine.commit))
        with contextlib.suppress(Killed):
            act()
    return calls >= step


# move_file_to_archive


def test_a_file_moves_and_the_catalogue_knows(
    jobs: Jobs, move: Run, file: Path, files: Path, archive: Path
) -> None:
    ended = move()
    target = archive / NAME
    assert (ended.state, ended.message) == ("done", f"{file} is now {target}")
    assert ended.result == {"fid": 1, "file": str(target)}
    assert ended.data == {"fid": 1, "file": str(target)}
    assert (left(files), left(archive)) == ([], [NAME])
    assert target.read_bytes() == BODY
    info = target.stat()
    assert (info.st_mode & 0o777, info.st_mtime) == (0o640, 1_600_000_000.25)
    assert catalogue(jobs).file(1).path == str(target)
    assert jobs.run("verify_local_file", {"fid": 1}).state == "done"
    assert catalogue(jobs).leftover(1) is None


def test_what_is_in_the_archive_stays_there(move: Run, file: Path, archive: Path) -> None:
    move()
    again = move()
    assert (again.state, again.message) == ("done", f"{archive / NAME} is in the archive")
    assert again.data["file"] == str(archive / NAME)


def test_a_move_that_is_killed_anywhere_is_ended_by_the_next_run(
    jobs: Jobs, file: Path, files: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, step = 1, 1
    while True:
        path = file if number == 1 else register(jobs, files / f"maps/{number}", BODY)
        run = functools.partial(
            jobs.run, "move_file_to_archive", {"fid": number}, number,
            files=str(files), archive=str(archive),
        )  # fmt: skip
        was_killed = killed_at(step, monkeypatch, run)
        # Whatever happened, the catalogue names a whole file.
        assert Path(catalogue(jobs).file(number).path).read_bytes() == BODY
        assert run().state == "done"
        target = archive / path.relative_to(files)
        assert catalogue(jobs).file(number).path == str(target)
        assert target.read_bytes() == BODY
        assert left(files) == []
        assert left(archive) == sorted(["maps/a.sdz", *[f"maps/{n}" for n in range(2, number + 1)]])
        if not was_killed:
            break
        number, step = number + 1, step + 1
    assert step > 8


def test_a_damaged_file_is_not_moved(move: Run, file: Path, files: Path, archive: Path) -> None:
    file.write_bytes(DAMAGED)
    ended = move()
    assert ended.state == "abort"
    assert ended.message.startswith(f"Hashes of file (1) {file} do not match those in DB: ")
    assert (left(files), left(archive)) == ([NAME], [])


def test_a_file_that_changed_after_a_killed_move_is_not_lost(
    move: Run, file: Path, archive: Path
) -> None:
    (archive / "maps").mkdir()
    (archive / NAME).write_bytes(BODY)  # as far as the earlier run came
    file.write_bytes(b"what somebody did since")
    assert move().state == "abort"
    assert file.read_bytes() == b"what somebody did since"


def test_a_file_that_changes_meanwhile_is_not_lost(
    jobs: Jobs, move: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written() -> None:
        with file.open("r+b") as more:
            more.write(b"changed")

    for name in ("link", "posix_fadvise"):  # what comes right after it was read
        real = getattr(os, name)

        def call(*args: Any, real: Any = real, **named: Any) -> Any:
            written()
            return real(*args, **named)

        monkeypatch.setattr(os, name, call)
    ended = move()
    assert (ended.state, ended.message) == ("retry", f"{file} has changed meanwhile")
    assert file.read_bytes() == b"changed" + BODY[7:]
    assert catalogue(jobs).file(1).path == str(file)


def test_nothing_in_the_archive_is_overwritten(move: Run, file: Path, archive: Path) -> None:
    (archive / "maps").mkdir()
    (archive / NAME).write_bytes(b"another")
    ended = move()
    assert ended.state == "abort"
    assert ended.message == f"{archive / NAME} exists already, and is another file"
    assert (file.read_bytes(), (archive / NAME).read_bytes()) == (BODY, b"another")


def test_a_file_that_has_come_to_the_old_place_since_is_not_removed(
    jobs: Jobs, move: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.unlink

    def kill(name: Any, **named: Any) -> None:
        if name == file.name:
            raise Killed
        real(name, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", kill)
        with pytest.raises(Killed):
            move()
    file.unlink()
    file.write_bytes(b"a new one")
    ended = move()
    assert (ended.state, file.read_bytes()) == ("done", b"a new one")
    assert ended.message.startswith(f"{file} is another file by now and stays. ")
    assert move().message == ended.message.partition("stays. ")[2]


def test_a_full_archive_leaves_all_as_it_was(
    move: Run, file: Path, files: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.stat(archive).st_dev == os.stat(files).st_dev:
        monkeypatch.setattr(os, "link", no_link)  # so that it has to copy

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            move()
    assert (left(files), left(archive)) == ([NAME], [])
    assert move().state == "done"


def no_link(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_file_system_without_links_will_do(
    move: Run, compress: Run, file: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_link)
    assert compress().state == "done"
    assert move().state == "done"
    assert (left(file.parents[1]), left(archive)) == ([], [f"{NAME}.gz"])


def test_a_move_ends_when_it_is_cancelled(
    jobs: Jobs, file: Path, files: Path, archive: Path
) -> None:
    cfg = {"files": str(files), "archive": str(archive)}
    job = jobs.make("move_file_to_archive", {"fid": 1}, 1, **cfg)
    job.cancel_event.set()
    assert perform(job)[:2] == ("abort", "cancelled")
    assert (left(files), left(archive)) == ([NAME], [])


def test_a_copy_that_reads_differently_is_not_trusted(
    jobs: Jobs, move: Run, file: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = file.parents[1]
    if os.stat(archive).st_dev == os.stat(files).st_dev:
        monkeypatch.setattr(os, "link", no_link)
    places = module(jobs, "places")
    real = places.Draft.settle

    def bad_disk(draft: Any, like: os.stat_result) -> None:
        draft.file.seek(0)
        draft.file.write(b"X")
        real(draft, like)

    with monkeypatch.context() as patch:
        patch.setattr(places.Draft, "settle", bad_disk)
        ended = move()
    assert ended.state == "retry"
    assert ended.message == f"{archive} gives back other data than was written"
    assert (left(files), left(archive)) == ([NAME], [])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"archive": ""}, "[job move_file_to_archive] archive has to be an absolute path"),
        ({"files": "x"}, "[job move_file_to_archive] path has to be an absolute path"),
        ({"files": "/srv"}, "is not below /srv"),
    ],
)
def test_move_refuses_what_it_cannot_do(
    jobs: Jobs, file: Path, files: Path, more: dict[str, str], why: str
) -> None:
    cfg = {"files": str(files), "archive": "/archive", **more}
    assert why in jobs.submit("move_file_to_archive", {"fid": 1}, **cfg)


def test_files_that_are_in_the_archive_themselves_are_refused(
    jobs: Jobs, file: Path, files: Path
) -> None:
    for archive in (files, files.parent):
        why = jobs.submit(
            "move_file_to_archive", {"fid": 1}, files=str(files), archive=str(archive)
        )
        assert why == f"[job move_file_to_archive] {files} is in the archive itself"


# archive_file


def opened_by_zstd(path: Path) -> Any:
    """What the program makes of it."""
    done = subprocess.run(["zstd", "-q", "-d", "-c", path], capture_output=True, check=True)
    return io.BytesIO(done.stdout)


OPENERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "gzip": (".gz", gzip.open), "bzip2": (".bz2", bz2.open), "xz": (".xz", lzma.open),
    "zstd": (".zst", opened_by_zstd),
}  # fmt: skip
ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


@pytest.fixture(params=OPENERS)
def form(request: pytest.FixtureRequest) -> str:
    """Each format there is."""
    if request.param == "zstd":
        if not shutil.which("zstd"):
            unavailable("no program zstd (Debian: apt-get install zstd)")
        try:
            importlib.import_module(ZSTD)
        except ImportError:
            unavailable(f"no {ZSTD}: pip install --group dev")
    return str(request.param)


def test_a_file_is_compressed_and_the_catalogue_knows(
    jobs: Jobs, compress: Run, file: Path, files: Path, form: str
) -> None:
    ended = compress(format=form)
    suffix, opener = OPENERS[form]
    path = Path(f"{file}{suffix}")
    assert ended.state == "done"
    assert ended.message == f"{path} {path.stat().st_size} bytes, from {len(BODY)}"
    assert ended.result == {"file": str(path), "size": path.stat().st_size}
    assert ended.data == {"fid": 1, "file": str(path)}
    assert left(files) == [NAME + suffix]
    with opener(path) as archive:
        assert archive.read() == BODY
    assert path.stat().st_size < len(BODY) / 2
    info = path.stat()
    assert (info.st_mode & 0o777, info.st_mtime) == (0o640, 1_600_000_000.25)
    row = catalogue(jobs).file(1)
    assert (row.path, row.size) == (str(path), path.stat().st_size)
    assert catalogue(jobs).hashes(1)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert jobs.run("verify_local_file", {"fid": 1}).state == "done"


def test_the_same_content_makes_the_same_archive(
    jobs: Jobs, compress: Run, file: Path, files: Path, form: str
) -> None:
    other = register(jobs, files / "other", BODY)
    os.utime(other, (1, 1))
    compress(format=form)
    jobs.run("archive_file", {"fid": 2}, files=str(files), format=form)
    suffix = OPENERS[form][0]
    assert Path(f"{file}{suffix}").read_bytes() == Path(f"{other}{suffix}").read_bytes()


def test_copies_on_mirrors_are_of_the_past_then(jobs: Jobs, compress: Run, file: Path) -> None:
    ours = catalogue(jobs)
    mfid = ours.add_mirror_file(ours.add_mirror("eu", "http://eu.example"), 1, NAME)
    compress()
    assert ours.mirror_file(mfid).status == "outdated"
    assert ours.unchecked(1 << 62, 10) == [("verify_local_file", {"fid": 1})]


def test_what_is_compressed_is_not_compressed_again(compress: Run, file: Path) -> None:
    compress()
    again = compress(format="xz")
    assert (again.state, again.message) == ("done", f"{file}.gz is compressed")


def test_the_original_can_stay(jobs: Jobs, compress: Run, file: Path, files: Path) -> None:
    ended = compress(original="keep")
    assert left(files) == [NAME, f"{NAME}.gz"]
    assert ended.data == {"file": f"{file}.gz"}
    assert catalogue(jobs).file(1).path == str(file)
    assert compress(original="keep").state == "done"


def test_an_archiving_that_is_killed_anywhere_is_ended_by_the_next_run(
    jobs: Jobs, file: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, step = 1, 1
    while True:
        path = file if number == 1 else register(jobs, files / f"maps/{number}", BODY)
        run = functools.partial(
            jobs.run, "archive_file", {"fid": number}, number, files=str(files), level="1"
        )
        was_killed = killed_at(step, monkeypatch, run)
        named = Path(catalogue(jobs).file(number).path)
        assert (
            gzip.decompress(named.read_bytes()) if named != path else named.read_bytes()
        ) == BODY
        assert run().state == "done"
        assert gzip.decompress(Path(f"{path}.gz").read_bytes()) == BODY
        assert catalogue(jobs).file(number).path == f"{path}.gz"
        assert jobs.run("verify_local_file", {"fid": number}).state == "done"
        everything = ["maps/a.sdz.gz", *[f"maps/{n}.gz" for n in range(2, number + 1)]]
        assert left(files) == sorted(everything)
        if not was_killed:
            break
        number, step = number + 1, step + 1
    assert step > 8


def test_a_damaged_file_is_not_compressed(compress: Run, file: Path, files: Path) -> None:
    file.write_bytes(DAMAGED)
    assert compress().state == "abort"
    assert left(files) == [NAME]


@pytest.mark.parametrize(
    "there",
    [b"another", gzip.compress(b"x"), gzip.compress(BODY)[:-9]],
    ids=["no archive", "of another file", "half of it"],
)
def test_no_file_is_overwritten_by_an_archive(
    compress: Run, file: Path, files: Path, there: bytes
) -> None:
    Path(f"{file}.gz").write_bytes(there)
    ended = compress()
    assert ended.state == "abort"
    assert ended.message == f"{file}.gz exists already, and holds something else"
    assert file.read_bytes() == BODY
    assert Path(f"{file}.gz").read_bytes() == there


def test_an_archive_that_is_spoilt_is_known_in_each_format(
    compress: Run, file: Path, form: str
) -> None:
    compress(format=form, original="keep")
    archive = Path(f"{file}{OPENERS[form][0]}")
    whole = archive.read_bytes()
    for spoilt in (b"another", b"", whole[:-5], whole[:9] + b"spoilt" + whole[15:]):
        archive.write_bytes(spoilt)
        ended = compress(format=form)
        assert ended.message == f"{archive} exists already, and holds something else"
        assert file.read_bytes() == BODY


def test_zstd_says_what_it_needs(
    jobs: Jobs, file: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("backports", "compression"):
        monkeypatch.setitem(sys.modules, package, None)
    said = jobs.submit("archive_file", {"fid": 1}, files=str(files), format="zstd")
    assert "[job archive_file] format zstd needs the extra `zstd`: pip install 'upq[zstd]'" in said


def test_a_file_that_changed_after_a_killed_archiving_is_not_lost(
    compress: Run, file: Path
) -> None:
    Path(f"{file}.gz").write_bytes(gzip.compress(BODY))
    file.write_bytes(b"what somebody did since")
    assert compress().state == "abort"
    assert file.read_bytes() == b"what somebody did since"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"format": "zip"}, "[job archive_file] format is one of gzip, bzip2, xz, zstd"),
        ({"level": "10"}, "[job archive_file] level of gzip is 1 to 9"),
        ({"format": "xz", "level": "x"}, "[job archive_file] level of xz is 0 to 9"),
        ({"original": "burn"}, "[job archive_file] original is remove or keep"),
        ({"files": ""}, "[job archive_file] path has to be an absolute path"),
        ({"path": "/srv"}, "is not below /srv"),
    ],
)
def test_archive_refuses_what_it_cannot_do(
    jobs: Jobs, file: Path, files: Path, more: dict[str, str], why: str
) -> None:
    assert why in jobs.submit("archive_file", {"fid": 1}, **{"files": str(files), **more})


def test_without_hashes_nothing_is_touched(
    jobs: Jobs, move: Run, compress: Run, file: Path, files: Path
) -> None:
    with jobs.desk.db.begin() as connection:
        connection.execute(text("DELETE FROM upq_file_hash"))
    for ended in (move(), compress()):
        assert ended.state == "failed"
        assert ended.message == "No hashes of file (1) in DB: hash fid:1 makes them"
    assert left(files) == [NAME]


# Both stay where they may be


def test_no_link_leads_out_of_the_folders(
    jobs: Jobs, files: Path, archive: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    secret = elsewhere / "secret"
    secret.parent.mkdir()
    secret.write_bytes(BODY)
    (files / "link").symlink_to(elsewhere)
    (files / "secret").symlink_to(secret)
    for number, name in enumerate(("link/secret", "secret"), 1):
        added = jobs.run("new_file", {"file": str(files / name)}, number)
        jobs.run("hash", added.data)
        for job in ("move_file_to_archive", "archive_file"):
            with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
                jobs.run(job, {"fid": number}, files=str(files), archive=str(archive))
    assert left(elsewhere) == ["secret"]
    assert left(archive) == []


def test_no_link_in_the_archive_leads_out_of_it(
    move: Run, file: Path, archive: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (archive / "maps").symlink_to(elsewhere)
    with pytest.raises(OSError, match="Not a directory"):
        move()
    assert (left(elsewhere), file.read_bytes()) == ([], BODY)
