"""`make demo` in small: the real daemon, really killed, and a ledger that can tell a loss."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import until

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tools/demo.py"
LOAD = 150


def command(*args: str) -> list[str]:
    return [sys.executable, str(DEMO), "--jobs", str(LOAD), *args]


def environment(folder: Path) -> dict[str, str]:
    """As of somebody who has another upq in use."""
    foreign = {
        "UPQ_CONFIG": "/nonexistent/upq.cfg",
        "UPQ_SOCKET": "/nonexistent/upq.sock",
        "UPQ_DB__URL": "postgresql://nobody@/nothing?host=/nonexistent",
        "NOTIFY_SOCKET": "/nonexistent/notify",
    }
    return {**os.environ, **foreign, "TMPDIR": str(folder)}


def ledger(output: str) -> dict[str, int]:
    rows = re.findall(r"^  ([a-z ]+?) +([0-9,]+)(?:   .*)?$", output.split("The ledger.")[1], re.M)
    return {name: int(count.replace(",", "")) for name, count in rows}


def uses(folder: Path) -> list[str]:
    """Commands of processes that have something of a folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{folder}/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_the_demo_loses_nothing_and_leaves_nothing(short_tmp: Path) -> None:
    done = subprocess.run(
        command(), env=environment(short_tmp), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=110, check=False,
    )  # fmt: skip
    said = done.stdout
    assert done.returncode == 0, said
    assert re.search(r'^\$ ./upq-cli "verify_local_file fid:50"\n  ACK [0-9]+$', said, re.M)
    assert re.search(r"^  job \d+ done: Hashes of file \(50\) .* match those in DB.$", said, re.M)
    assert re.search(r"^  job \d+ failed: Hashes of file \(17\) .* do not match .*$", said, re.M)
    assert re.search(r"^\$ kill -9 \d+\n  \(with [1-9]\d* jobs still to be done\)$", said, re.M)
    assert re.search(r"Starting [1-9]\d* unfinished jobs found in DB.$", said, re.M)
    found = ledger(said)
    accepted, damaged = 60 + 1 + 60 + LOAD + 5, 1 + 3
    assert found.pop("started twice") > 0
    assert found == {
        "accepted": accepted,
        "followed": 60,
        "done": accepted + 60 - damaged,
        "failed on purpose": damaged,
        "failed otherwise": 0,
        "refused": 0,
        "lost": 0,
    }
    assert list(short_tmp.iterdir()) == []
    assert uses(short_tmp) == []


def test_a_demo_that_is_ended_leaves_nothing(short_tmp: Path) -> None:
    with subprocess.Popen(
        command(), env=environment(short_tmp), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        text=True,
    ) as demo:  # fmt: skip
        assert demo.stdout
        for line in demo.stdout:
            if " ready in " in line:
                demo.send_signal(signal.SIGTERM)
        assert demo.wait(30) == 128 + signal.SIGTERM
    assert list(short_tmp.iterdir()) == []
    until(lambda: uses(short_tmp) == [])  # an upq-cli that was just born ends by itself


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FILES", 1)
    made = module.Demo(tmp_path)
    made.accepted = {1, 2}
    return made


def job(state: str, fid: str = "1", *children: dict[str, Any]) -> dict[str, Any]:
    job = {"state": state, "params": {"fid": fid}, "starts": 1}
    return {"job": job, "children": [child["job"] for child in children]}


DAMAGED = job("failed", "17")
NEW = job("done", "1", job("done"))


@pytest.mark.parametrize(
    ("shown", "fault"),
    [
        ([DAMAGED, {}], "lost"),
        ([DAMAGED, job("queued", "1", job("done"))], "lost"),
        ([DAMAGED, job("done")], "lost"),
        ([DAMAGED, job("failed", "1", job("done"))], "failed otherwise"),
        ([NEW, job("done", "17")], "failed on purpose"),
    ],
    ids=["gone", "never ended", "nothing followed", "failed", "damage unnoticed"],
)
def test_the_ledger_tells_what_is_wrong(
    demo: Any, shown: list[Any], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.ask_all = lambda _: shown
    assert demo.balance() is False
    found = ledger(capsys.readouterr().out)
    good = {"lost": 0, "failed otherwise": 0, "failed on purpose": 1}
    assert [name for name, count in good.items() if found[name] != count] == [fault]


def test_a_refused_line_fails_the_demo(demo: Any) -> None:
    demo.ask_all = lambda _: [DAMAGED, NEW]
    assert demo.balance() is True
    demo.refused = 1
    assert demo.balance() is False
