"""A machine on which upq was installed as docs/install.md says, word for word."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.machine import CERTIFICATES, ROOT, Lacking, Machine, folder, machine

#: `make vm` sets this: elsewhere the tests of this folder are not even looked at.
if "UPQ_VM_DIR" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

#: Job types for all tests here, beside those that upq comes with.
JOBS = """
[job napper]
params = s:float
command = sleep {s}
concurrent = 2

[job quick]
params = n:int
command = true
concurrent = 4

[job closed]
command = true
submit = alice
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            # The first one installs upq, too, and where QEMU plays the processor all is slow.
            item.add_marker(pytest.mark.timeout(3600))


def installation() -> list[str]:
    """The commands of the page's part on systemd, in its order."""
    page = (ROOT / "docs/install.md").read_text()
    part = page.partition("## With systemd")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.+?)^```", part, re.M | re.S)


@pytest.fixture(scope="session")
def vm() -> Iterator[Machine]:
    run_dir = folder() / f"run-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True)
        with machine(run_dir) as one:
            one.put_source()
            pip = f"export PIP_CERT={CERTIFICATES};" if CERTIFICATES.exists() else ""
            for block in installation():
                one.run(f"{pip} cd /root/upq; set -e; {block}", timeout_s=600)
            one.run("mkdir -p /etc/upq/upq.d; cat >/etc/upq/upq.d/vm.cfg", JOBS.encode())
            one.run("useradd -M -G upq alice; useradd -M -G upq bob; useradd -M mallory")
            one.run("systemctl reload upq")
            yield one
    except Lacking as error:
        pytest.skip(f"*** no virtual machine: {error}")
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


@pytest.fixture(autouse=True)
def journal(vm: Machine, request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test finds upq running, and its journal is shown when it fails."""
    vm.run("systemctl start upq")
    vm.run("journalctl --rotate -q; journalctl --vacuum-time=1s -q")
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        print(vm.try_("journalctl -u upq -n 60 --no-pager -o short-precise").stdout)
