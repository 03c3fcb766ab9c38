"""examples/deploy for real: git, PostgreSQL, gunicorn, nginx, and the daemon with its own upq.cfg.

Each DJZ line of the features has a test with its number. What is about tasks uses a site without
Django, which is built faster; the page of the Django project is fetched in a test of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from tests import deploy_world
from tests.daemons import ROOT, until
from tests.deploy_world import EXAMPLE, FIRST_UID, PATIENCE_S, PLAIN, World
from tests.test_docs import commands, fits

#: Whichever test comes first makes the world, too.
pytestmark = pytest.mark.timeout(300)

BUILD = ["check out", "virtualenv", "install", "verify", "archive"]
DEPLOY = ["download", "create user", "extract", "run"]
#: The tasks of one build_and_deploy with both hooks.
TASKS = {
    "build_bundle": 1, "create_database": 1, "bundle_upload": 1, "placement": 1, "deploy": 1,
    "manage": 2, "proxy_update": 1, "retire": 1,
}  # fmt: skip
BROKEN = {"app.py": "import nosuch\n\napplication = nosuch.site\n"}

wheels = deploy_world.wheels


@pytest.fixture(scope="module")
def world(wheels: Path) -> Iterator[World]:
    with World(wheels) as made:
        yield made


class Site(NamedTuple):
    """A site that was built and deployed, and what upq tells of it."""

    job: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    zoombuild: str


@pytest.fixture(scope="module")
def site(world: World) -> Site:
    repo = world.repository("shop", PLAIN)
    zoombuild = (
        "; Grüße: \t'tabs', \"quotes\", {braces} and $HOME\r\n\n"
        + world.plan("shop")
        + "\n\n# no line end at the end"
    )
    id = world.daemon.give("build_and_deploy", app="shop", repo=repo, zoombuild=zoombuild)
    job = world.daemon.ended(id)
    assert job["state"] == "done", job["message"]
    return Site(job, {task["type"]: task for task in world.daemon.children(id)}, zoombuild)


# The whole way


def typed(world: World, *command: str) -> str:
    """What a command prints that is typed in the folder of the example."""
    who = {f"GIT_{role}_{what}": "ann@example.org" for role in ("AUTHOR", "COMMITTER")
           for what in ("NAME", "EMAIL")}  # fmt: skip
    return subprocess.run(
        command, cwd=world.folder, env={**world.daemon.environment(), **who}, check=False,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_what_the_page_tells_brings_a_django_project_behind_nginx(world: World) -> None:
    """Typed as it stands there, but for the servers, which run."""
    page = (EXAMPLE / "README.md").read_text()
    for there, here in {
        "../../upq-cli": f"{sys.executable} {ROOT}/upq-cli",
        "/tmp/hello": f"{world.folder}/hello",
        "load 0.12": "load 0.12, 2: load 0.12",
        '"hosts = hello.example.org"': '"hosts = hello.example.org www.hello.org"',
    }.items():
        assert there in page
        page = page.replace(there, here)
    shown, fetched = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    (client,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for command, told in commands(shown):
        if not command.startswith(("mkdir ", "nginx ", "PYTHONPATH=. ")):
            printed = typed(world, "sh", "-c", command)
            assert fits(told, printed), f"{command}: {printed}"
    message = typed(world, sys.executable, "-c", client)
    (job,) = world.daemon.ask("jobs type:build_and_deploy limit:1")["jobs"]
    assert message == f"hello is at http://hello.example.org/, release {job['id']}\n"
    status, text = world.page("hello.example.org")
    ((_, told),) = commands(fetched)
    assert status == 200 and fits(told, text)
    visitor, uid = map(int, re.findall("[0-9]+", text))
    assert f"visitor {visitor}." in told
    assert uid == (world.daemon.job(job["id"])["result"]["uid"] or os.getuid())
    assert world.page("www.hello.org")[0] == 200
    assert world.page("nobody.example.org")[0] == 404
    # What the visitors have left is in the site's own database, made by its migrations.
    database = world.postgres.conninfo.replace("/postgres?", "/dz_hello?")
    with psycopg.connect(database) as connection:
        names = connection.execute("SELECT name FROM django_migrations").fetchall()
        (visits,) = connection.execute("SELECT count(*) FROM guestbook_visit").fetchone() or (0,)
    assert names == [("0001_initial",)] and visits >= 2


def test_djz_03_each_task_is_in_the_queue_of_its_kind_of_machine(site: Site) -> None:
    assert {type: task["queue"] for type, task in site.tasks.items()} == {
        "build_bundle": "build", "bundle_upload": "build", "create_database": "database",
        "placement": "placement", "deploy": "appserver_1", "manage": "appserver_1",
        "retire": "appserver_1", "proxy_update": "proxy",
    }  # fmt: skip


def test_djz_04_all_appservers_are_one_shared_queue_or_each_asked(world: World) -> None:
    shared = world.daemon.run("measure server:1 @queue:all_appservers")
    assert (shared["state"], shared["attempt"]) == ("done", 1)
    survey = world.daemon.run("survey")
    asked = {task["queue"]: task["state"] for task in world.daemon.children(survey["id"])}
    assert asked == {"appserver_1": "done", "appserver_2": "done"}


def test_djz_05_the_user_has_one_job_and_its_tasks_belong_to_it(world: World, site: Site) -> None:
    shown = world.daemon.ask(f"show {site.job['id']}")
    assert Counter(task["type"] for task in shown["tree"]) == TASKS
    assert shown["job"]["progress"] == {"done": 6, "total": 6, "text": "published"}
    assert (shown["whole"]["state"], shown["whole"]["progress"]) == ("done", 1.0)
    # One log of all: the job is the first to begin and the last to end.
    log = [(line["type"], line["state"]) for line in shown["log"]]
    assert (log[0][0], log[-1]) == ("build_and_deploy", ("build_and_deploy", "done"))
    assert Counter(type for type, state in log[:-1] if state == "done") == TASKS


def test_djz_06_check_repo_answers_with_guesses_and_keeps_them(world: World) -> None:
    repo = world.repository("guess", {"main.py": "app = None\n", "requirements.txt": "six\n"})
    with world.held("inspect_repo"), world.daemon.talk() as web:
        id = world.daemon.submit(f"check_repo repo:{repo}")
        web.send(f"wait {id} timeout:60s\n")
        world.daemon.child(id, "inspect_repo")
        world.gate("before inspect_repo").unlink()
        told = json.loads(web.read().removeprefix("OK "))["job"]
    assert told["state"] == "done"
    guesses = told["result"]
    assert (guesses["wsgi"], guesses["requirements"]) == ("main:app", "requirements.txt")
    ((kept,),) = world.rows(f"SELECT guesses FROM dz_guess WHERE job = {id}")
    assert json.loads(kept) == guesses


def test_djz_07_the_attached_zoombuild_cfg_arrives_unchanged(world: World, site: Site) -> None:
    assert site.job["queue"] == "build"
    for job in site.job, site.tasks["build_bundle"], site.tasks["deploy"]:
        assert job["params"]["zoombuild"] == site.zoombuild
    refused = world.daemon.refusal("build_and_deploy", app="a", repo="x", zoombuild="[site]\n")
    assert refused == "zoombuild.cfg: no wsgi"


def test_djz_08_tasks_are_subtasks(site: Site) -> None:
    assert {task["parent"] for task in site.tasks.values()} == {site.job["id"]}


def test_djz_09_the_build_tells_each_of_its_steps(world: World, site: Site) -> None:
    build = site.tasks["build_bundle"]
    told = world.daemon.ask(f"output {build['id']}")["text"].splitlines()
    assert [line for line in told if line.startswith("progress: ")] == [
        f"progress: {number}/5 {name}" for number, name in enumerate(BUILD, 1)
    ]
    assert build["progress"] == {"done": 5, "total": 5, "text": "archive"}
    steps = [step for step in world.steps(site.job["id"]) if step["step"] in BUILD]
    assert [(step["step"], "ended" in step) for step in steps] == [
        (name, has_ended) for name in BUILD for has_ended in (False, True)
    ]


def test_djz_10_a_failing_import_ends_the_job_with_the_reason(world: World) -> None:
    id = world.ask_for("broken", BROKEN)
    job = world.daemon.ended(id)
    assert job["state"] == "failed"
    assert "verify: ModuleNotFoundError: No module named 'nosuch'" in job["message"]
    assert [task["type"] for task in world.daemon.children(id)] == ["build_bundle"]
    assert [step["step"] for step in world.steps(id) if "began" in step] == BUILD[:4]
    assert world.page("broken.example.org")[0] == 404


def test_djz_11_14_database_and_upload_run_side_by_side_and_both_are_waited_for(
    world: World,
) -> None:
    daemon = world.daemon
    with psycopg.connect(world.postgres.conninfo) as other, world.held("bundle_upload"):
        other.execute("CREATE ROLE dz_par")  # not committed: create_database has to wait for it
        id = world.ask_for("par")
        upload, database = daemon.child(id, "bundle_upload"), daemon.child(id, "create_database")
        for task in upload, database:
            daemon.until_state(task["id"], "running")
        assert {daemon.job(task["id"])["state"] for task in (upload, database)} == {"running"}
        world.gate("before bundle_upload").unlink()
        daemon.until_state(upload["id"], "done")
        assert daemon.children(id, "placement") == []
        other.rollback()
    assert daemon.ended(id)["state"] == "done"
    ends = [daemon.job(task["id"])["ended_at"] for task in (upload, database)]
    assert daemon.child(id, "placement")["created_at"] >= max(ends)


def test_djz_14_when_one_branch_fails_the_job_fails_after_the_other_has_ended(
    world: World,
) -> None:
    daemon = world.daemon
    (world.folder / "work/passwords/orphan").mkdir(parents=True)  # no file: nothing to read
    with world.held("bundle_upload"):
        id = world.ask_for("orphan")
        daemon.until_state(daemon.child(id, "create_database")["id"], "failed")
        assert daemon.job(id)["state"] == "running"
    job = daemon.ended(id)
    tasks = {task["type"]: task["state"] for task in daemon.children(id)}
    assert (job["state"], "create_database" in job["message"]) == ("failed", True)
    assert tasks == {"build_bundle": "done", "create_database": "failed", "bundle_upload": "done"}


def test_djz_12_a_database_is_made_once(world: World, site: Site) -> None:
    assert site.tasks["create_database"]["result"]["created"] is True
    again = world.daemon.run("create_database app:shop")
    assert again["result"] == {**site.tasks["create_database"]["result"], "created": False}
    named = "SELECT count(*) FROM pg_database WHERE datname = 'dz_shop'"
    assert world.postgres.execute(named) == [(1,)]


def test_djz_12_what_a_killed_task_left_in_the_server_does_not_harm_the_next(world: World) -> None:
    daemon = world.daemon
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with psycopg.connect(world.postgres.conninfo) as other:
        other.execute("CREATE ROLE dz_twin")  # not committed: create_database has to wait for it
        id = daemon.submit("create_database app:twin")
        until(lambda: world.postgres.execute(waiting) == [(1,)])
        daemon.kill9()
        daemon.start()
        until(lambda: world.postgres.execute(waiting) == [(2,)])
        other.rollback()
    assert daemon.ended(id)["state"] == "done", daemon.job(id)["message"]


def test_djz_13_the_password_reaches_the_site_and_nobody_else(world: World, site: Site) -> None:
    password = (world.folder / "work/passwords/shop").read_text()
    assert len(password) >= 32
    made = site.tasks["create_database"]["result"]
    shown = {"name": "dz_shop", "user": "dz_shop", "host": "127.0.0.1", "password": "***"}
    assert shown.items() <= made.items()
    with psycopg.connect(
        host=made["host"], port=made["port"], user=made["user"], password=password, dbname="dz_shop"
    ) as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("dz_shop",)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(host=made["host"], port=made["port"], user="dz_shop", password="wrong")
    # A deploy that fails tells so by mail, with its params.
    failed = world.daemon.ended(world.daemon.give("deploy", **{
        "app": "shop", "release": 999999, "server": 1, "sha256": "0" * 64, "database": {},
        "zoombuild": site.zoombuild, "password": password,
    }))  # fmt: skip
    assert failed["state"] == "failed"
    until(lambda: world.mails)
    ids = [site.job["id"], failed["id"], *(task["id"] for task in site.tasks.values())]
    told = [world.daemon.say(f"{verb} {id}") for id in ids for verb in ("show", "output", "why")]
    told += [world.daemon.say("jobs limit:500"), world.daemon.log, *world.ledger]
    told += [mail.decode(errors="replace") for mail in world.mails]
    assert "***" in world.daemon.say(f"show {failed['id']}")
    assert [text for text in told if password in text] == []


def test_djz_15_16_the_least_loaded_server_is_chosen_and_its_queue_gets_the_deploy(
    world: World,
) -> None:
    world.set_load(s1=0.9, s2=0.1)
    try:
        job = world.deployed("two")
    finally:
        world.set_load(s1=0.1, s2=0.9)
    tasks = {task["type"]: task for task in world.daemon.children(job["id"])}
    assert tasks["placement"]["result"] == {"server": 2}
    assert tasks["placement"]["ended_at"] <= tasks["deploy"]["created_at"]
    assert (tasks["deploy"]["queue"], tasks["retire"]["queue"]) == ("appserver_2", "appserver_2")
    assert (world.folder / f"work/appserver/2/two/{job['id']}/site/app.py").exists()
    assert world.daemon.run("placement app:any")["result"] == {"server": 1}


def test_djz_17_deploy_runs_its_steps_and_says_where_the_site_is(world: World, site: Site) -> None:
    deploy = site.tasks["deploy"]
    steps = [step["step"] for step in world.steps(site.job["id"]) if "ended" in step]
    assert steps == BUILD + DEPLOY
    where = deploy["result"]
    assert (where["instance"], where["address"]) == (f"shop.{site.job['id']}@1", "127.0.0.1")
    shown = site.tasks["proxy_update"]["params"]
    assert (shown["address"], shown["port"]) == (where["address"], where["port"])
    (pid,) = world.servers_of("shop")
    uid = os.stat(f"/proc/{pid}").st_uid
    assert uid == (where["uid"] or os.getuid())
    if world.first_uid:
        assert uid > FIRST_UID
    ((server, port, sha256),) = world.rows(
        f"SELECT server, port, sha256 FROM dz_release WHERE release = {site.job['id']}"
    )
    assert (server, port) == (1, where["port"])
    assert sha256 == site.tasks["build_bundle"]["result"]["sha256"]


def test_djz_18_the_hooks_run_on_the_appserver_after_the_deployment(
    world: World, site: Site
) -> None:
    hooks = world.daemon.children(site.job["id"], "manage")
    assert [hook["params"]["hook"] for hook in hooks] == ["syncdb", "migrate"]
    assert {hook["queue"] for hook in hooks} == {site.tasks["deploy"]["queue"]}
    starts = [site.tasks["deploy"]["ended_at"], *(hook["started_at"] for hook in hooks)]
    assert starts == sorted(starts)
    uid = site.tasks["deploy"]["result"]["uid"] or os.getuid()
    done = (world.folder / "work/appserver/1/shop/home/hooks").read_text().splitlines()
    assert done == [
        f"['migrate', '--run-syncdb', '--noinput'] {uid} dz_shop",
        f"['migrate', '--noinput'] {uid} dz_shop",
    ]


def test_djz_19_the_entry_of_nginx_is_the_same_however_often_it_is_made(
    world: World, site: Site
) -> None:
    file = world.folder / "var/nginx/sites/shop.conf"
    before = file.read_bytes()
    assert b"server_name shop.example.org;" in before
    again = world.daemon.ended(
        world.daemon.give("proxy_update", **site.tasks["proxy_update"]["params"])
    )
    assert (again["state"], file.read_bytes()) == ("done", before)
    assert list(file.parent.glob(".*")) == []
    assert world.page("shop.example.org")[0] == 200


@pytest.mark.slow
def test_djz_20_old_versions_are_retired_and_come_back_by_a_rollback(world: World) -> None:
    first = world.deployed("versions")
    newer = {"app.py": PLAIN["app.py"].replace("Version 1", "Version 2")}
    second = world.deployed("versions", newer)
    assert "Version 2" in world.page("versions.example.org")[1]
    assert len(world.servers_of("versions")) == 1
    # A release whose page is an error is not shown; what was there before is.
    worse = {"app.py": "def application(environ, start_response):\n    raise ValueError\n"}
    failed = world.daemon.ended(world.ask_for("versions", worse))
    assert (failed["state"], "is an error 500" in failed["message"]) == ("failed", True)
    assert "Version 2" in world.page("versions.example.org")[1]
    back = world.daemon.ended(world.daemon.give("rollback", app="versions"))
    assert back["state"] == "done", back["message"]
    assert "Version 1" in world.page("versions.example.org")[1]
    assert len(world.servers_of("versions")) == 1
    folder = world.folder / "work/appserver/1/versions"
    kept = {int(path.name) for path in folder.iterdir() if path.name.isdecimal()}
    assert kept == {failed["id"], back["id"]} and first["id"] < second["id"]


def test_releases_of_one_site_take_turns(world: World) -> None:
    with world.held("build_bundle"):
        first, second = world.ask_for("turns"), world.ask_for("turns")
        other = world.daemon.child(first, "build_bundle")
        assert other["params"]["app"] == "turns"
        assert "site:turns" in world.daemon.why(second)
        for id in second, first:
            world.daemon.ask(f"cancel {id}")
        world.daemon.ended(first)


def test_djz_21_the_job_ends_with_the_address_of_the_site(world: World, site: Site) -> None:
    told = f"shop is at http://shop.example.org/, release {site.job['id']}"
    assert site.job["message"] == told
    assert site.job["result"]["url"] == "http://shop.example.org/"
    assert world.page("shop.example.org")[0] == 200


@pytest.mark.slow
def test_djz_22_three_jobs_interleave_on_one_build_slot(world: World) -> None:
    with world.held("deploy"):
        ids = [world.ask_for(f"slot{n}") for n in range(3)]
        # All three have built, uploaded and wait, though one place is all there is.
        until(lambda: all(world.daemon.children(id, "deploy") for id in ids), PATIENCE_S)
        assert {world.daemon.job(id)["state"] for id in ids} == {"running"}
    assert [world.daemon.ended(id)["state"] for id in ids] == ["done"] * 3
    assert [world.page(f"slot{n}.example.org")[0] for n in range(3)] == [200] * 3


# DJZ-23: killed at each step


def has_come_to(world: World, id: int, point: str) -> bool:
    """Whether a deployment has begun a step or a task, or waits before or after one's work."""
    kind, _, name = point.partition(" ")
    if kind == "step":
        return any(step["step"] == name for step in world.steps(id))
    if kind == "task":
        return bool(world.daemon.children(id, name))
    word = "begin" if kind == "before" else "end"
    return any(re.match(rf"{word} {name} .*\b{id}\b", line) for line in world.ledger)


def kill_at(world: World, id: int, point: str) -> dict[int, int]:
    """Kill the daemon when a deployment has come to a point, and start it again.

    Returns how often each of the tasks had started that were done before.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while not has_come_to(world, id, point):
        assert time.monotonic() < deadline_s, f"never got to {point}"
        time.sleep(0.001)
    tasks = world.daemon.children(id)
    world.daemon.kill9()
    world.gate(point).unlink(missing_ok=True)
    world.daemon.start()
    return {task["id"]: task["starts"] for task in tasks if task["state"] == "done"}


POINTS = [
    *(f"step {name}" for name in BUILD), "task create_database", "before bundle_upload",
    "after bundle_upload", "task placement", *(f"step {name}" for name in DEPLOY),
    "after deploy", "before manage", "before proxy_update", "after proxy_update", "before retire",
]  # fmt: skip


#: An early and a late one for each deployment.
PAIRS = [POINTS[n::9] for n in range(9)]


# Twice each: a job during which the daemon dies for the third time has failed, reason crashed.
@pytest.mark.slow
@pytest.mark.parametrize("points", PAIRS, ids=", ".join)
def test_djz_23_killed_at_a_step_the_site_is_up_and_nothing_finished_is_repeated(
    world: World, points: list[str]
) -> None:
    app = "kill_" + re.sub("[ ,]", "_", points[0])
    for point in points:
        if not point.startswith(("step", "task")):
            world.gate(point).touch()
    id = world.ask_for(app, hooks="syncdb migrate")
    ended_before = [kill_at(world, id, point) for point in points]
    job = world.daemon.ended(id)
    assert job["state"] == "done", job["message"]
    assert job["starts"] == 1 + len(points)
    status, page = world.page(f"{app}.example.org".replace("_", "-"))
    assert (status, page[:9]) == (200, "Version 1")
    tasks = world.daemon.children(id)
    assert Counter(task["type"] for task in tasks) == TASKS
    assert {task["state"] for task in tasks} == {"done"}
    starts = {task["id"]: task["starts"] for task in tasks}
    for before in ended_before:
        assert before == {id: starts[id] for id in before}
    # Besides its parent only what ran when the daemon died was started again.
    assert sum(task["starts"] - 1 for task in tasks) <= 2 * len(points)
    if "after bundle_upload" in points:  # its work was done and its end not on disk
        (upload,) = world.daemon.children(id, "bundle_upload")
        assert (upload["starts"], upload["result"]["sent"]) == (2, False)
    ended: set[str] = set()
    for step in world.steps(id):
        assert step["step"] not in ended, f"{step['step']} again"
        if "ended" in step:
            ended.add(step["step"])
    assert ended == {*BUILD, *DEPLOY}
    world.tear_down(app)


# DJZ-24: cancelled


#: It is imported by the import that verifies it, and never by its web server.
HANGING = {
    "app.py": """
import os, time

while "nobody" not in os.environ["DATABASE_URL"]:
    time.sleep(0.1)
application = print
"""
}


def test_djz_24_a_cancelled_job_takes_its_tasks_with_it(world: World) -> None:
    id = world.ask_for("stuck", HANGING)
    until(lambda: has_come_to(world, id, "step run") and world.working_for("stuck"), PATIENCE_S)
    assert world.page("stuck.example.org")[0] == 404
    world.daemon.ask(f"cancel {id}")
    whole = world.daemon.ask(f"wait {id} timeout:29s whole:yes")["whole"]
    assert whole["state"] == "cancelled"
    tasks = {task["type"]: task["state"] for task in world.daemon.children(id)}
    assert tasks.pop("deploy") == "cancelled"
    assert set(tasks.values()) == {"done"}
    until(lambda: not world.working_for("stuck"))


def test_djz_24_of_tasks_side_by_side_both_are_cancelled_and_none_follows(world: World) -> None:
    daemon = world.daemon
    daemon.ask("pause database")
    try:
        with world.held("bundle_upload"):
            id = world.ask_for("gone")
            upload = daemon.child(id, "bundle_upload")
            daemon.until_state(upload["id"], "running")
            assert daemon.child(id, "create_database")["state"] == "blocked"
            daemon.ask(f"cancel {id}")
            assert daemon.ask(f"wait {id} timeout:29s whole:yes")["whole"]["state"] == "cancelled"
    finally:
        daemon.ask("resume database")
    assert {task["type"]: task["state"] for task in daemon.children(id)} == {
        "build_bundle": "done", "create_database": "cancelled", "bundle_upload": "cancelled",
    }  # fmt: skip
    assert daemon.job(id)["state"] == "cancelled"
    assert not [line for line in world.ledger if re.match(r"end bundle_upload .*/gone/", line)]


def test_a_retry_goes_on_at_the_task_that_failed(world: World) -> None:
    nginx = world.folder / "nginx.conf"
    whole = nginx.read_text()
    nginx.write_text(whole + "nonsense\n")
    id = world.ask_for("again")
    job = world.daemon.ended(id)
    nginx.write_text(whole)
    assert job["state"] == "failed"
    assert 'unexpected end of file, expecting ";" or "}"' in job["message"]
    assert not (world.folder / "var/nginx/sites/again.conf").exists()
    world.daemon.ask(f"retry {id}")
    assert world.daemon.ended(id)["state"] == "done"
    assert world.page("again.example.org")[0] == 200
    starts = {task["type"]: task["starts"] for task in world.daemon.children(id)}
    assert {type: n for type, n in starts.items() if n > 1} == {"proxy_update": 2}
