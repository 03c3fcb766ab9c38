"""examples/deploy as several nodes, here daemons of one machine that share a PostgreSQL.

Several machines come with part D of the plan; what is shown here is who runs what.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import unavailable
from tests.deploy_world import Platform
from tests.servers import Postgres, short_folder


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
