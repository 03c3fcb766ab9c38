"""The work of examples/deploy without upq, and without any server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.deploy_world import EXAMPLE

sys.path.insert(0, str(EXAMPLE))

from deploylib.bundle import extract, sha256_of
from deploylib.placement import STALE_S, Seen, choose
from deploylib.plan import Plan
from deploylib.repo import guess
from deploylib.settings import Settings, TaskError, valid_app
from deploylib.steps import Steps, forget, run, write_whole

PLAN = """\
[site]
hosts = shop.example.org
wsgi = shop.wsgi:application
"""


def silent(number: int, total: int, name: str) -> None:
    pass


def test_djz_01_the_work_is_imported_and_called_without_upq() -> None:
    code = (
        "import sys; sys.modules['upq'] = None; import deploylib.__main__, deploylib.database;"
        "from deploylib.plan import Plan; print(Plan.parse(sys.stdin.read()).hosts[0])"
    )
    command = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(EXAMPLE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, input=PLAN, env=env, text=True, capture_output=True, check=True)
    assert done.stdout == "shop.example.org\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "tasks: "),
        (["mesure"], "tasks: "),
        (["measure"], "measure: missing a required argument"),
    ],
)
def test_a_task_that_is_typed_wrong_is_told_how(words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploylib", *words],
        cwd=EXAMPLE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 64
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_djz_01_a_task_runs_from_a_shell(tmp_path: Path) -> None:
    (tmp_path / "deploy.ini").write_text((EXAMPLE / "deploy.ini").read_text())
    command = [sys.executable, "-m", "deploylib", "measure", "server=1"]
    env = {**os.environ, "PYTHONPATH": str(EXAMPLE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, env=env, cwd=tmp_path, text=True, capture_output=True, check=True
    )
    first, last = done.stdout.splitlines()
    assert first == "progress: 1/1 measured"
    assert json.loads(last).keys() == {"server", "load", "healthy"}


def test_the_example_s_settings_are_read() -> None:
    settings = Settings.read(EXAMPLE / "deploy.ini")
    assert settings.appservers == {1: "127.0.0.1"}
    assert settings.work == EXAMPLE / "work"


def test_what_is_missing_in_the_settings_is_named(tmp_path: Path) -> None:
    (tmp_path / "deploy.ini").write_text("[work]\nfolder = work\n")
    with pytest.raises(TaskError, match="build"):
        Settings.read(tmp_path / "deploy.ini")


def test_a_django_project_is_guessed() -> None:
    found = guess(EXAMPLE / "sample")
    draft = found.pop("zoombuild")
    assert found == {
        "kind": "django",
        "settings": "hello.settings",
        "wsgi": "hello.wsgi:application",
        "requirements": "requirements.txt",
        "apps": ["guestbook"],
        "hooks": ["syncdb", "migrate"],
    }
    assert Plan.parse(draft.replace("hosts = ", "hosts = a.example.org")).hooks == found["hooks"]


def test_any_wsgi_site_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("import bottle\n\napp = bottle.default_app()\n")
    found = guess(tmp_path)
    assert (found["kind"], found["wsgi"], found["hooks"]) == ("wsgi", "main:app", [])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no site"),
        ("[site]\nhosts = a.org\n", "no wsgi"),
        ("wsgi = a:b\n", "no section headers"),
        (PLAN.replace("shop.wsgi:application", "os.system"), "is not like"),
        (PLAN.replace("shop.example.org", "a.org;}"), "is no name of a host"),
        (PLAN.replace("shop.example.org", ""), "hosts: is empty"),
        (PLAN + "hooks = flush\n", "'flush' is none of syncdb, migrate"),
        (PLAN + "requirements = ../../etc/shadow\n", "is not in the repository"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(text: str, fault: str) -> None:
    with pytest.raises(TaskError, match=fault):
        Plan.parse(text)


@pytest.mark.parametrize("app", ["", "Shop", "../shop", "shop;", "s" * 32, "1shop"])
def test_a_name_that_could_be_a_path_is_refused(app: str) -> None:
    with pytest.raises(TaskError, match="is no name"):
        valid_app(app)


def test_djz_15_the_healthy_server_with_the_least_load_is_chosen() -> None:
    busy, calm = Seen(1, 0.9, True, 5.0), Seen(2, 0.2, True, 5.0)
    ill, silent = Seen(3, 0.0, False, 5.0), Seen(4, 0.0, True, STALE_S + 1)
    assert choose([busy]) == 1
    assert choose([ill, busy, calm, silent]) == 2
    assert choose([Seen(9, 0.5, True, 1.0), Seen(7, 0.5, True, 1.0)]) == 7
    with pytest.raises(TaskError, match="none of 2 appservers is healthy"):
        choose([ill, silent])


def test_a_step_that_has_ended_is_not_done_again(tmp_path: Path) -> None:
    done: list[str] = []
    told: list[tuple[int, int, str]] = []

    def work(name: str) -> str:
        if len(done) == 1:
            done.append("broken")
            raise TaskError("no room")
        done.append(name)
        return name.upper()

    steps = Steps(tmp_path, ["one", "two"], lambda *words: told.append(words))
    assert steps.do("one", work, "one") == "ONE"
    with pytest.raises(TaskError, match=r"^two: no room$"):
        steps.do("two", work, "two")
    again = Steps(tmp_path, ["one", "two"], silent)
    assert [again.do(name, work, name) for name in ("one", "two")] == ["ONE", "TWO"]
    assert done == ["one", "broken", "two"]
    assert told == [(1, 2, "one"), (2, 2, "two")]


def test_steps_of_before_the_machine_started_anew_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Steps(tmp_path, ["one"], silent).do("one", lambda: 1) == 1
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr("deploylib.steps.BOOT_ID", tmp_path / "boot")
    assert Steps(tmp_path, ["one"], silent).do("one", lambda: 2) == 2


def test_the_oldest_releases_are_forgotten_and_none_that_is_newer(tmp_path: Path) -> None:
    for name in "9", "10", "12", "15", "home":
        (tmp_path / name).mkdir()
    assert forget(tmp_path, 12, keep=2) == [9]
    assert forget(tmp_path, 12, keep=2) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "12", "15", "home"]


def test_a_program_that_fails_is_told_by_its_last_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TaskError, match=r"^the reason$"):
        run(["sh", "-c", "echo first; echo the reason >&2; exit 3"])
    assert capfd.readouterr().err == "first\nthe reason\n"
    with pytest.raises(TaskError, match="sh ended with 4"):
        run(["sh", "-c", "exit 4"])
    with pytest.raises(TaskError, match=r"fatal: .*/none' does not appear to be a git repository"):
        run(["git", "clone", "file:///none"])


def test_a_file_is_written_whole_with_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_whole(file, "first")
    write_whole(file, "second", 0o600)
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("second", 0o600)
    assert list(tmp_path.iterdir()) == [file]


def bundle_of(folder: Path, *members: Any) -> Path:
    file = folder / "bundle.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
    return file


def test_a_bundle_may_link_to_the_system_s_python_and_to_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "release"
    target.mkdir()
    good = bundle_of(tmp_path, ("env/bin/python3", "/usr/bin/python3"), ("env/lib64", "lib"))
    extract(good, sha256_of(good), target)
    assert (target / "env/bin/python3").readlink() == Path("/usr/bin/python3")
    for name, leads_to in (("site/secrets", "/etc"), ("site/up", "../../x"), ("../x", "y")):
        bad = bundle_of(tmp_path, (name, leads_to))
        with pytest.raises(TaskError, match="leads out of its folder"):
            extract(bad, sha256_of(bad), target)
    with pytest.raises(TaskError, match="is not the bundle"):
        extract(bad, "0" * 64, target)
