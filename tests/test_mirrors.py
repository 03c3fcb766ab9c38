"""upload: files on mirrors, by real FTP servers, good and bad."""

from __future__ import annotations

import functools
import importlib
import os
import pwd
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests import jobkit
from tests.conftest import unavailable
from tests.daemons import until
from tests.ftpd import PASSWORD, USER, FtpServer, make_certificate
from tests.jobkit import Ended, Jobs, perform
from tests.servers import Missing, free_port, program

BODY = os.urandom(3_000_000)
NAME = "maps/a b.sd7"

jobs = jobkit.jobs


@pytest.fixture
def file(jobs: Jobs, tmp_path: Path) -> Path:
    """File 1 of the catalogue, with hashes."""
    path = tmp_path / "files" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)
    register(jobs, path)
    return path


def register(jobs: Jobs, path: Path) -> int:
    added = jobs.run("new_file", {"file": str(path)})
    assert jobs.run("hash", added.data).state == "done"
    return int(added.data["fid"])


def catalogue(jobs: Jobs) -> Any:
    jobs.loader.load("hash")
    return importlib.import_module("upq_jobs.catalogue").Catalogue(jobs.desk.db)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls") / "mirror.pem")


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """What the server has."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    return folder


@pytest.fixture
def ftp(mirror: Path) -> Iterator[FtpServer]:
    with FtpServer(mirror) as server:
        yield server


@pytest.fixture
def ftps(mirror: Path, certificate: Path) -> Iterator[FtpServer]:
    with FtpServer(mirror, certificate) as server:
        yield server


def at(server: FtpServer, file: Path, **more: str) -> dict[str, str]:
    """The section: one mirror, and the files in the folder above the file's."""
    return {
        "mirrors": "eu",
        "eu_url": server.url,
        "eu_password": PASSWORD,
        "eu_tls": "no",
        "files": str(file.parents[1]),
        "ftp_timeout": "5s",
        **more,
    }


Upload = Callable[..., Ended]


@pytest.fixture
def upload(jobs: Jobs, ftp: FtpServer, file: Path) -> Upload:
    """Uploads file 1 to the server without TLS: `upload(**settings)`, as job 7."""

    def run(jobid: int = 7, **more: str) -> Ended:
        return jobs.run("upload", {"fid": 1}, jobid, **at(ftp, file, **more))

    return run


def parts(mirror: Path) -> list[Path]:
    return [path for path in mirror.rglob("*") if path.name.endswith(".part")]


def has_all(mirror: Path) -> bool:
    return (mirror / NAME).read_bytes() == BODY and not parts(mirror)


# What it does


def test_a_file_comes_to_a_mirror_and_the_catalogue_knows(
    jobs: Jobs, upload: Upload, mirror: Path
) -> None:
    ended = upload(eu_web="https://eu.example/pub")
    assert (ended.state, ended.message) == ("done", f"eu has {NAME}, 3000000 bytes")
    assert ended.result == {"mfid": 1, "fid": 1, "mirror": "eu", "remote": NAME}
    assert ended.data == {"fid": 1, "mfid": 1}
    assert has_all(mirror)
    copy = catalogue(jobs).mirror_file(1)
    assert (copy.fid, copy.path, copy.status) == (1, NAME, "new")
    assert (copy.name, copy.url) == ("eu", "https://eu.example/pub")


def test_it_comes_by_tls_just_so(
    jobs: Jobs, ftps: FtpServer, file: Path, mirror: Path, certificate: Path
) -> None:
    tls = at(ftps, file, eu_tls=f"verify {certificate}", eu_verify="content")
    assert jobs.run("upload", {"fid": 1}, **tls).state == "done"
    assert has_all(mirror)
    # Neither the password nor a byte of the file goes in the clear.
    assert ftps.said[:5] == ["AUTH TLS", f"USER {USER}", f"PASS {PASSWORD}", "PBSZ 0", "PROT P"]


def test_it_shows_how_far_it_is(jobs: Jobs, upload: Upload) -> None:
    jobs.desk.progressed.clear()
    upload()
    assert jobs.desk.progressed[0] == {"done": 1 << 16, "total": 3_000_000, "text": ""}


def test_what_a_mirror_has_is_not_brought_again(jobs: Jobs, ftp: FtpServer, upload: Upload) -> None:
    upload()
    again = upload()
    assert (again.state, again.message) == ("done", f"eu has {NAME} already")
    assert again.data["mfid"] == 1
    assert ftp.did("STOR") == 1


@pytest.mark.parametrize("status", ["damaged", "missing"])
def test_a_bad_copy_is_brought_again(
    jobs: Jobs, ftp: FtpServer, upload: Upload, mirror: Path, status: str
) -> None:
    upload()
    catalogue(jobs).checked_mirror_file(1, status)
    (mirror / NAME).write_bytes(b"")
    assert upload().data["mfid"] == 1
    assert has_all(mirror)
    assert catalogue(jobs).mirror_file(1).status == "new"


def test_a_newer_version_of_the_file_is_brought_again(
    jobs: Jobs, upload: Upload, mirror: Path, file: Path
) -> None:
    upload(eu_web="https://eu.example/pub")
    file.write_bytes(b"new")
    jobs.run("new_file", {"fid": 1})
    assert catalogue(jobs).mirror_file(1).status == "outdated"
    assert "has an older version" in jobs.submit("verify_remote_file", {"mfid": 1})
    jobs.run("hash", {"fid": 1})
    assert upload().state == "done"
    assert (mirror / NAME).read_bytes() == b"new"


def test_an_empty_file_is_a_file(jobs: Jobs, ftp: FtpServer, file: Path, mirror: Path) -> None:
    empty = file.with_name("empty")
    empty.touch()
    fid = register(jobs, empty)
    assert jobs.run("upload", {"fid": fid}, **at(ftp, file)).state == "done"
    assert (mirror / "maps/empty").read_bytes() == b""


@pytest.mark.parametrize("name", ["ä ö\N{PILE OF POO}.x", "-x", "50%20", "a;b&c", '"q"', "~", "*"])
def test_names_come_as_they_are(
    jobs: Jobs, ftp: FtpServer, file: Path, mirror: Path, name: str
) -> None:
    path = file.parents[1] / name / name
    path.parent.mkdir()
    path.write_bytes(b"x")
    fid = register(jobs, path)
    assert jobs.run("upload", {"fid": fid}, **at(ftp, file)).state == "done"
    assert (mirror / name / name).read_bytes() == b"x"
    # No server takes one for somebody's home.
    assert not any(word in line for line in ftp.said for word in (" ~", " -x"))


def test_files_go_below_the_folder_of_the_address(
    upload: Upload, ftp: FtpServer, mirror: Path
) -> None:
    missing = upload(eu_url=f"{ftp.url}/pub%20lic/files")
    assert missing.state == "abort"  # whoever made a typo does not want that folder
    assert missing.message.endswith("(the folder pub lic/files of its url)")
    (mirror / "pub lic/files").mkdir(parents=True)
    assert upload(eu_url=f"{ftp.url}/pub%20lic/files").state == "done"
    assert has_all(mirror / "pub lic/files")


# Lines that are cut


def test_it_goes_on_where_the_line_was_cut(ftp: FtpServer, upload: Upload, mirror: Path) -> None:
    ftp.faults.cut_after = 2_000_000
    first = upload()
    assert first.state == "retry"
    (part,) = parts(mirror)
    there = part.stat().st_size
    assert 2_000_000 <= there < 3_000_000
    assert not (mirror / NAME).exists()
    ftp.faults.cut_after = None
    assert upload().state == "done"
    assert has_all(mirror)
    assert ftp.said[-10:].count(f"REST {there}") == 1


def test_an_older_version_stays_until_the_new_one_is_whole(
    ftp: FtpServer, upload: Upload, mirror: Path
) -> None:
    (mirror / "maps").mkdir()
    (mirror / NAME).write_bytes(b"older")
    ftp.faults.cut_after = 1_000_000
    upload()
    assert (mirror / NAME).read_bytes() == b"older"
    ftp.faults.cut_after = None
    upload()
    assert has_all(mirror)


def test_what_is_not_ours_is_not_gone_on_with(ftp: FtpServer, upload: Upload, mirror: Path) -> None:
    ftp.faults.cut_after = 1_000_000
    upload()
    (part,) = parts(mirror)
    # As a server leaves it that lost its power: the size is there and the bytes are not.
    with part.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(bytes(5))
    ftp.faults.cut_after = None
    assert upload().state == "done"
    assert has_all(mirror)


@pytest.mark.parametrize(
    "answers",
    [{"REST": "502 Not implemented"}, {"RETR": "550 Write only"}, {"SIZE": "500 What?"}],
    ids=["no REST", "no RETR", "no SIZE"],
)
def test_a_server_that_cannot_go_on_starts_over(
    ftp: FtpServer, upload: Upload, mirror: Path, answers: dict[str, str]
) -> None:
    ftp.faults.cut_after = 1_000_000
    upload()
    ftp.faults.cut_after, ftp.faults.answers = None, answers
    assert upload().state == "done"
    assert has_all(mirror)


def test_a_server_that_takes_rest_for_reading_only_starts_over(
    ftp: FtpServer, upload: Upload, mirror: Path
) -> None:
    ftp.faults.cut_after = 1_000_000
    upload()
    ftp.faults.cut_after, ftp.faults.appends = None, False
    assert upload().state == "done"
    assert has_all(mirror)


def test_a_server_that_keeps_quiet_is_tried_again(ftp: FtpServer, upload: Upload) -> None:
    ftp.faults.stall_after = 1
    ended = upload(ftp_timeout="300ms")
    assert (ended.state, ended.message) == ("retry", "eu: timed out")


def test_a_copy_that_is_there_and_not_in_the_catalogue_is_brought_again(
    jobs: Jobs, ftp: FtpServer, upload: Upload, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(catalogue(jobs)), "keep_copy", kill)
        with pytest.raises(Killed):
            upload()
    assert upload().state == "done"
    assert has_all(mirror)
    assert len(catalogue(jobs).copies(1)) == 1


def test_another_job_has_a_part_of_its_own(ftp: FtpServer, upload: Upload, mirror: Path) -> None:
    ftp.faults.cut_after = 1_000_000
    upload(jobid=7)
    upload(jobid=8)
    assert len(parts(mirror)) == 2


def test_a_server_that_renames_nothing_over_a_file_is_helped(
    ftp: FtpServer, upload: Upload, mirror: Path
) -> None:
    (mirror / "maps").mkdir()
    (mirror / NAME).write_bytes(b"older")
    ftp.faults.keeps_names = True
    assert upload().state == "done"
    assert has_all(mirror)


# What is looked at afterwards


def test_a_spoilt_copy_is_found_where_it_is_read_back(
    ftp: FtpServer, upload: Upload, mirror: Path
) -> None:
    ftp.faults.spoils = True
    ended = upload(eu_verify="content")
    assert ended.state == "retry"
    assert ended.message == "eu: not what was sent: md5, sha1, sha256"
    assert list(mirror.rglob("*.*")) == []
    ftp.faults.spoils = False
    assert upload(eu_verify="content").state == "done"


def test_a_server_that_tells_no_sizes_is_read_back(
    ftp: FtpServer, upload: Upload, mirror: Path
) -> None:
    ftp.faults.spoils, ftp.faults.answers = True, {"SIZE": "502 Not implemented"}
    assert upload().state == "retry"
    assert ftp.did("RETR") == 1


def test_a_copy_that_came_short_is_found_by_its_size(
    ftp: FtpServer, upload: Upload, mirror: Path
) -> None:
    ftp.faults.answers = {"SIZE": "213 2999999"}
    ended = upload()
    assert (ended.state, ended.message) == ("retry", "eu: not what was sent: it has 2999999 bytes")
    assert not (mirror / NAME).exists()


def test_a_file_that_was_damaged_here_comes_to_no_mirror(
    upload: Upload, mirror: Path, file: Path
) -> None:
    file.write_bytes(BODY[:-1] + bytes([BODY[-1] ^ 1]))
    ended = upload()
    assert ended.state == "abort"
    assert ended.message == (
        f"Hashes of file (1) {file} do not match those in DB: md5, sha1, sha256"
    )
    assert list(mirror.rglob("*.*")) == []


def test_a_file_that_grows_is_not_sent_for_ever(upload: Upload, mirror: Path, file: Path) -> None:
    with file.open("ab") as more:
        more.truncate(1 << 40)
    assert upload().state == "abort"


# Servers that refuse


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        ({"USER": "421 Too busy"}, "retry"),
        ({"PASS": "530 Login incorrect"}, "abort"),
        ({"PASS": "530 Sorry, the maximum number of allowed clients are connected"}, "retry"),
        ({"MKD": "550 Permission denied"}, "abort"),
        ({"STOR": "552 Maximum quota exceeded"}, "abort"),
        ({"STOR": "452 Disk full"}, "retry"),
        ({"STOR": "425 No data connection"}, "retry"),
        ({"PASV": "500 What?"}, "abort"),
        ({"PASV": "227 Entering the void"}, "retry"),
        ({"RNTO": "553 Not allowed"}, "abort"),
        ({"TYPE": "200 Fine\r\n666 Evil"}, "retry"),
    ],
)
def test_it_knows_what_may_pass(
    jobs: Jobs, ftp: FtpServer, upload: Upload, answers: dict[str, str], state: str
) -> None:
    ftp.faults.answers = answers
    ended = upload()
    assert ended.state == state
    assert ended.message.startswith("eu: ")
    assert PASSWORD not in ended.message
    assert not (ftp.folder / NAME).exists()
    assert state == "retry" or parts(ftp.folder) == []
    assert catalogue(jobs).copies(1) == []


def test_a_server_that_is_down_is_tried_again(upload: Upload) -> None:
    ended = upload(eu_url="ftp://127.0.0.1:1")
    assert (ended.state, "Connection refused" in ended.message) == ("retry", True)


def test_a_server_that_speaks_no_utf8_is_not_guessed_at(
    ftp: FtpServer, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = ftp.handler
    monkeypatch.setattr(handler, "encoding", "latin-1")
    monkeypatch.setattr(handler, "banner", "Grüße")
    ended = upload()
    assert (ended.state, ended.message) == ("abort", "eu: the server does not speak UTF-8")


def test_behind_a_gateway_the_address_of_the_control_connection_counts(
    mirror: Path, jobs: Jobs, file: Path
) -> None:
    with FtpServer(mirror, masquerade_address="192.0.2.1") as server:
        assert jobs.run("upload", {"fid": 1}, **at(server, file)).state == "done"


def test_it_can_have_the_server_connect(ftp: FtpServer, upload: Upload, mirror: Path) -> None:
    assert upload(passive="no").state == "done"
    assert ftp.did("PORT") == 1
    assert has_all(mirror)


# TLS


def test_an_unknown_certificate_gets_no_password(jobs: Jobs, ftps: FtpServer, file: Path) -> None:
    ended = jobs.run("upload", {"fid": 1}, **at(ftps, file, eu_tls="yes"))
    assert ended.state == "abort"
    assert ended.message == "eu: its certificate is not trusted: self-signed certificate"
    assert ftps.said == ["AUTH TLS"]


def test_tls_is_what_there_is_when_nothing_is_said(jobs: Jobs, ftp: FtpServer, file: Path) -> None:
    cfg = at(ftp, file)
    del cfg["eu_tls"]
    ended = jobs.run("upload", {"fid": 1}, **cfg)
    assert ended.state == "abort"
    assert ftp.said == ["AUTH TLS"]


def test_a_certificate_for_another_name_gets_no_password(
    jobs: Jobs, mirror: Path, file: Path, tmp_path: Path
) -> None:
    other = make_certificate(tmp_path / "other.pem", "192.0.2.1")
    with FtpServer(mirror, other) as server:
        ended = jobs.run("upload", {"fid": 1}, **at(server, file, eu_tls=f"verify {other}"))
        assert ended.state == "abort"
        assert "IP address mismatch" in ended.message
        assert server.said == ["AUTH TLS"]
        # Only who asks for it speaks to anybody.
        assert jobs.run(
            "upload", {"fid": 1}, **at(server, file, tls="unverified", eu_tls="")
        ).state == ("done")


def test_data_never_goes_in_the_clear_where_tls_is_asked_for(
    jobs: Jobs, ftps: FtpServer, file: Path, certificate: Path
) -> None:
    ftps.faults.answers = {"PROT": "534 Not here"}
    ended = jobs.run("upload", {"fid": 1}, **at(ftps, file, eu_tls=f"verify {certificate}"))
    assert ended.state == "abort"
    assert ftps.did("STOR") == 0


@pytest.fixture
def vsftpd(mirror: Path, certificate: Path, tmp_path: Path) -> Iterator[int]:
    """The port of a server of the kind that many mirrors have, strict as it comes."""
    try:
        server = program("vsftpd", "vsftpd")
    except Missing as missing:
        unavailable(str(missing))
    (mirror / "pub").mkdir()
    port = free_port()
    me = pwd.getpwuid(os.getuid()).pw_name
    settings = tmp_path / "vsftpd.conf"
    settings.write_text(
        "listen=YES\nlisten_address=127.0.0.1\nbackground=NO\nrun_as_launching_user=YES\n"
        "anonymous_enable=YES\nwrite_enable=YES\nanon_upload_enable=YES\nanon_umask=022\n"
        "anon_mkdir_write_enable=YES\nanon_other_write_enable=YES\nseccomp_sandbox=NO\n"
        "ssl_enable=YES\nallow_anon_ssl=YES\nrequire_ssl_reuse=YES\nssl_ciphers=HIGH\n"
        f"listen_port={port}\nanon_root={mirror}\nrsa_cert_file={certificate}\n"
        f"ftp_username={me}\nnopriv_user={me}\n"
    )

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with subprocess.Popen([server, settings]) as process:
        until(listens)
        yield port
        process.terminate()


def test_data_comes_in_the_tls_session_that_has_logged_in(
    jobs: Jobs, vsftpd: int, file: Path, mirror: Path, certificate: Path
) -> None:
    cfg = {
        "mirrors": "eu",
        "eu_url": f"ftp://127.0.0.1:{vsftpd}/pub",
        "files": str(file.parents[1]),
        "tls": f"verify {certificate}",
        "verify": "content",
    }
    job = jobs.make("upload", {"fid": 1}, 7, **cfg)

    def stop(done: float, *_: object) -> None:
        if done > 2_000_000:
            job.interrupted = True
            job.cancel_event.set()

    job.progress = stop
    assert perform(job).state == "abort"
    (part,) = parts(mirror)
    assert 0 < part.stat().st_size < 3_000_000
    ended = jobs.run("upload", {"fid": 1}, 7, **cfg)
    assert (ended.state, ended.message) == ("done", f"eu has {NAME}, 3000000 bytes")
    assert has_all(mirror / "pub")


# Cancelled


@pytest.mark.parametrize(
    ("stop", "left"),
    [({}, 0), ({"interrupted": True}, 1), ({"ended_by": "timeout"}, 1)],
    ids=["cancelled", "daemon stops", "timeout"],
)
def test_it_ends_in_the_middle_and_keeps_what_a_next_run_goes_on_with(
    jobs: Jobs,
    ftp: FtpServer,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    stop: dict[str, Any],
    left: int,
) -> None:
    monkeypatch.setattr("upq_jobs.ftp.GRACE_S", 30)
    job = jobs.make("upload", {"fid": 1}, 7, **at(ftp, file))

    def progress(*_: object) -> None:
        vars(job).update(stop)
        job.cancel_event.set()

    job.progress = progress
    assert perform(job)[:2] == ("abort", "cancelled")
    assert len(parts(ftp.folder)) == left


def test_a_server_that_takes_nothing_more_does_not_keep_it(
    jobs: Jobs, ftp: FtpServer, tmp_path: Path, file: Path
) -> None:
    with file.open("ab") as more:  # more than all buffers on the way hold
        more.truncate(100_000_000)
    jobs.run("new_file", {"fid": 1})
    jobs.run("hash", {"fid": 1})
    ftp.faults.stall_after = 1
    job = jobs.make("upload", {"fid": 1}, 7, **at(ftp, file, ftp_timeout="1h"))
    ended: list[Ended] = []
    thread = threading.Thread(target=lambda: ended.append(perform(job)))
    thread.start()
    assert ftp.faults.stalled.wait(10)
    began_s = time.monotonic()
    job.cancel_event.set()
    thread.join(20)
    assert ended[0][:2] == ("abort", "cancelled")
    assert time.monotonic() - began_s < 10


# What is refused


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"mirrors": ""}, "mirrors has to be set"),
        ({"mirrors": "eu ../us"}, "mirrors: '../us' is not a-z, 0-9 and _"),
        ({"mirrors": "eu us"}, ""),
        ({"eu_url": ""}, "eu_url has to be set, as ftp://user@host/folder"),
        ({"eu_url": "http://host/"}, "eu_url has to be set, as ftp://user@host/folder"),
        ({"eu_url": "ftp://"}, "eu_url has to be set, as ftp://user@host/folder"),
        ({"eu_url": "ftp://u@h/%0aDELE%20x"}, "eu_url has to be set, as ftp://user@host/folder"),
        ({"eu_url": "ftp://u%0a@h/"}, "eu_url has to be set, as ftp://user@host/folder"),
        ({"eu_url": "ftp://h:99999/"}, "eu_url: Port out of range 0-65535"),
        ({"eu_url": "ftp://u:pw@h/"}, "eu_url: the password belongs into eu_password_file"),
        ({"eu_web": "ftp://h/"}, "eu_web: 'ftp://h/' is not an http or https address"),
        ({"eu_verify": "no"}, "eu_verify: 'no' is not size or content"),
        ({"eu_tls": "perhaps"}, "mirror eu: tls: 'perhaps' is not yes, no, unverified or verify"),
        (
            {"eu_tls": "verify ca.pem"},
            "mirror eu: tls: 'ca.pem' is not the absolute path of a file",
        ),
        ({"eu_passive": "1"}, ""),
        ({"passive": "maybe"}, "mirror eu: 'maybe' is not yes or no"),
        ({"ftp_timeout": "soon"}, "mirror eu: 'soon' is not a duration"),
        ({"files": "files"}, "path has to be an absolute path"),
    ],
)
def test_settings_are_refused_with_their_name(
    jobs: Jobs, ftp: FtpServer, file: Path, more: dict[str, str], why: str
) -> None:
    cfg = at(ftp, file, us_url="ftp://us.example") | more
    said = jobs.submit("upload", {"fid": 1}, **cfg)
    assert said.startswith(f"[job upload] {why}" if why else "")
    assert bool(said) is bool(why)


def test_upload_refuses_what_it_cannot_do(jobs: Jobs, ftp: FtpServer, file: Path) -> None:
    cfg = at(ftp, file)
    submit = functools.partial(jobs.submit, "upload")
    assert submit({}, **cfg) == "fid is missing"
    assert submit({"fid": 2}, **cfg) == "File with fid 2 is not in the catalogue."
    assert submit({"fid": 1, "mirror": "us"}, **cfg) == "no mirror 'us' in [job upload]"
    assert submit({"fid": 1, "mirror": ["eu"]}, **cfg).startswith("no mirror ")
    catalogue(jobs).add_mirror("eu", "")
    with jobs.desk.db.begin() as connection:
        connection.execute(text("UPDATE upq_mirror SET status = 'off'"))
    assert submit({"fid": 1}, **cfg) == "All mirrors are off."
    assert submit({"fid": 1, "mirror": "eu"}, **cfg) == "Mirror eu is off."


def test_a_file_without_hashes_is_not_uploaded(jobs: Jobs, ftp: FtpServer, file: Path) -> None:
    with jobs.desk.db.begin() as connection:
        connection.execute(text("DELETE FROM upq_file_hash"))
    ended = jobs.run("upload", {"fid": 1}, **at(ftp, file))
    assert (ended.state, ended.message) == (
        "failed", "No hashes of file (1) in DB: hash fid:1 makes them",
    )  # fmt: skip
    assert ftp.said == []


def test_two_files_cannot_have_one_name_on_a_mirror(
    jobs: Jobs, ftp: FtpServer, file: Path, upload: Upload
) -> None:
    upload()
    other = file.with_name("other")
    other.write_bytes(b"x")
    fid = register(jobs, other)
    with jobs.desk.db.begin() as connection:
        connection.execute(text("UPDATE upq_mirror_file SET path = 'maps/other'"))
    ended = jobs.run("upload", {"fid": fid}, **at(ftp, file))
    assert (ended.state, ended.message) == ("abort", "eu has file (1) as maps/other")
    assert ftp.did("STOR") == 1


# Only what lies where it may be taken from


@pytest.mark.parametrize("path", ["../secret", "maps/../../secret"])
def test_a_file_from_elsewhere_is_not_uploaded(
    jobs: Jobs, ftp: FtpServer, file: Path, path: str
) -> None:
    secret = file.parents[2] / "secret"
    secret.write_bytes(b"x")
    fid = register(jobs, Path(f"{file.parents[1]}/{path}"))
    why = jobs.submit("upload", {"fid": fid}, **at(ftp, file))
    assert why.endswith(f"is not below {file.parents[1]}: only files there are uploaded")


def test_no_link_leads_out_of_the_folder(
    jobs: Jobs, ftp: FtpServer, file: Path, mirror: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_bytes(b"x")
    (file.parent / "link").symlink_to(elsewhere)
    (file.parent / "secret").symlink_to(elsewhere / "secret")
    for name in ("link/secret", "secret"):
        fid = register(jobs, file.parent / name)
        with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
            jobs.run("upload", {"fid": fid}, **at(ftp, file))
    assert list(mirror.rglob("secret")) == []


def test_a_name_with_a_line_end_is_no_second_command(
    jobs: Jobs, ftp: FtpServer, file: Path
) -> None:
    path = file.parent / "x\r\nDELE y"
    path.write_bytes(b"x")
    fid = register(jobs, path)
    assert "FTP has no way for" in jobs.submit("upload", {"fid": fid}, **at(ftp, file))
