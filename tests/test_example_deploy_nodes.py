"""examples/deploy as several nodes, here daemons of one machine that share a PostgreSQL.

Several machines come with part D of the plan; what is shown here is who runs what, that tasks of
several nodes make one job, and that a node may die in the middle of its task.
"""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from tests import deploy_world
from tests.conftest import unavailable
from tests.daemons import until
from tests.deploy_world import PATIENCE_S, PLAIN, Platform, World, working_in
from tests.servers import Postgres, short_folder
from tests.test_example_deploy import HANGING, TASKS

wheels = deploy_world.wheels


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    with postgres.database() as fresh:
        yield fresh


@pytest.fixture
def folder() -> Iterator[Path]:
    made = short_folder()
    yield made
    shutil.rmtree(made)


def node(folder: Path, url: str, name: str, pools: str) -> Platform:
    """One that is not started yet, with the example's own configuration."""
    (folder / name).mkdir()
    made = Platform(folder / name)
    ini = made.folder / "deploy.ini"
    ini.write_text(ini.read_text().replace("protocols = https:ssh", "protocols = file"))
    (made.folder / "bin").mkdir()
    (made.folder / "bin/python3").symlink_to(sys.executable)
    made.env |= {"UPQ_DB__URL": url, "UPQ_NODE__NAME": name, "UPQ_NODE__POOLS": pools}
    return made


def nodes_of(asked: Platform, *ids: int) -> set[str]:
    """Where attempts of these jobs were made."""
    return {str(each["node"]) for id in ids for each in asked.ask(f"show {id}")["attempts"]}


def test_djz_02_03_04_each_node_looks_at_its_own_queues_only(folder: Path, url: str) -> None:
    git = shutil.which("git") or unavailable("no program git")
    subprocess.run([git, "init", "-q", folder / "repo"], check=True)
    who = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    commit = [git, *who, "commit", "-q", "--allow-empty", "-m", "Site"]
    subprocess.run(commit, cwd=folder / "repo", check=True)
    web = node(folder, url, "usercontrol", "usercontrol")
    build = node(folder, url, "build", "build placement")
    seven = node(folder, url, "seven", "appserver")
    seven.env["UPQ_POOL_APPSERVER__QUEUES"] = "appserver_7 all_appservers"
    with ExitStack() as running:
        # DJZ-02: it takes jobs and has no place for any.
        running.enter_context(web)
        check = web.submit(f"check_repo repo:file://{folder}/repo")
        on_seven, on_three = web.submit("measure server:7"), web.submit("measure server:3")
        on_any = web.submit("measure server:7 @queue:all_appservers")
        for id in check, on_seven, on_three, on_any:
            assert web.job(id)["state"] == "blocked", web.why(id)
        # DJZ-03: the build node does what is in its queues, and what it has queued there.
        running.enter_context(build)
        assert web.ended(check)["state"] == "done"
        tasks = [task["id"] for task in web.children(check)]
        assert nodes_of(web, check, *tasks) == {"build"}
        assert {web.job(id)["state"] for id in (on_seven, on_any)} == {"blocked"}
        # DJZ-04: appserver 7 does what is for it, and what is for any.
        running.enter_context(seven)
        assert {web.ended(id)["state"] for id in (on_seven, on_any)} == {"done"}
        assert nodes_of(web, on_seven, on_any) == {"seven"}
        assert web.job(on_three)["state"] == "blocked"
        assert nodes_of(web, on_three) == set()


@pytest.fixture
def fleet(url: str, wheels: Path) -> Iterator[tuple[World, dict[str, Platform]]]:
    """A node for each kind of work, two of them appservers, and one that has only users."""
    pools = {
        "usercontrol": "usercontrol", "build": "build placement", "database": "database",
        "proxy": "proxy", "one": "appserver", "two": "appserver",
    }  # fmt: skip
    with World(wheels) as world, ExitStack() as running:
        world.daemon.end()
        ini = configparser.ConfigParser(interpolation=None)
        ini.read(world.folder / "deploy.ini")
        ini["proxy"]["sites"] = str(world.folder / "var/nginx/sites")
        (world.folder / "nodes").mkdir()
        nodes = {}
        for name, served in pools.items():
            made = nodes[name] = node(world.folder / "nodes", url, name, served)
            made.env |= {"PATH": world.daemon.env["PATH"], "UPQ_JOB_SURVEY__SCHEDULE": "@yearly"}
            with (made.folder / "deploy.ini").open("w") as out:
                ini.write(out)
        for number, name in enumerate(("one", "two"), 1):
            nodes[name].env["UPQ_POOL_APPSERVER__QUEUES"] = f"appserver_{number} all_appservers"
        for made in nodes.values():
            running.enter_context(made)
        yield world, nodes


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_djz_11_23_24_a_job_is_made_by_several_nodes_and_each_of_them_may_die(
    fleet: tuple[World, dict[str, Platform]],
) -> None:
    world, nodes = fleet
    web = nodes["usercontrol"]
    assert web.ended(web.submit("survey"))["state"] == "done"

    def asked_for(app: str, **files: str) -> int:
        repo = world.repository(app, {**PLAIN, **files})
        return web.give("build_and_deploy", app=app, repo=repo, zoombuild=world.plan(app))

    def killed(name: str) -> None:
        nodes[name].kill9()
        nodes[name].start()

    # DJZ-11: the database and the upload, each on its own node at the same time.
    for gate in ("before bundle_upload", "before deploy", "before proxy_update"):
        world.gate(gate).touch()
    with psycopg.connect(world.postgres.conninfo) as other:
        other.execute("CREATE ROLE dz_far")  # not committed: create_database has to wait for it
        id = asked_for("far")
        until(lambda: web.children(id, "bundle_upload"), PATIENCE_S)
        upload, database = web.child(id, "bundle_upload"), web.child(id, "create_database")
        for task in upload, database:
            web.until_state(task["id"], "running")
        assert {web.job(task["id"])["state"] for task in (upload, database)} == {"running"}
        # DJZ-23: the node that has the job and one of its tasks dies, and the other one.
        killed("build")
        killed("database")
        world.gate("before bundle_upload").unlink()
        other.rollback()
    server = until(lambda: web.child(id, "placement")["result"], PATIENCE_S)["server"]
    appserver = ("one", "two")[server - 1]
    for task, name in ("deploy", appserver), ("proxy_update", "proxy"):
        web.until_state(web.child(id, task)["id"], "running")
        killed(name)
        world.gate(f"before {task}").unlink()
    job = web.ended(id)
    assert job["state"] == "done", job["message"]
    assert world.page("far.example.org")[0] == 200
    tasks = {task["type"]: task for task in web.children(id)}
    assert Counter(task["type"] for task in web.children(id)) == TASKS
    starts = {type: task["starts"] for type, task in tasks.items() if task["starts"] > 1}
    assert starts == {"bundle_upload": 2, "create_database": 2, "deploy": 2, "proxy_update": 2}
    ran = {type: nodes_of(web, task["id"]) for type, task in tasks.items()}
    assert ran == {
        "build_bundle": {"build"}, "bundle_upload": {"build"}, "placement": {"build"},
        "create_database": {"database"}, "proxy_update": {"proxy"},
        "deploy": {appserver}, "manage": {appserver}, "retire": {appserver},
    }  # fmt: skip

    # DJZ-24: a cancel that one node is told of ends what runs on another one.
    id = asked_for("near", **HANGING)
    until(lambda: web.children(id, "deploy"), PATIENCE_S)
    deploy = web.child(id, "deploy")
    web.until_state(deploy["id"], "running")
    (appserver,) = nodes_of(web, deploy["id"])
    folder = nodes[appserver].folder / "work"
    at_work = f"appserver/{deploy['params']['server']}/near"
    until(lambda: working_in(folder / at_work), PATIENCE_S)
    web.ask(f"cancel {id}")
    assert web.ask(f"wait {id} timeout:29s whole:yes")["whole"]["state"] == "cancelled"
    assert web.job(deploy["id"])["state"] == "cancelled"
    until(lambda: not working_in(folder / at_work))
