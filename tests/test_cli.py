from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.line_server import Desk, LineServer, job, whole_of
from upq import cli, wire
from upq.errors import Refused, TimedOut
from upq.protocol import Request

ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(short_tmp: Path) -> Iterator[LineServer]:
    with LineServer(short_tmp / "upq.sock") as server:
        yield server


class Cli:
    """Runs the program as a user does, with the server's socket in the environment."""

    def __init__(self, server: LineServer, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "UPQ_SOCKET": server.address, "TZ": "UTC-2", "COLUMNS": "100"}
        for name in "NO_COLOR", "UPQ_CONFIG":
            self.env.pop(name, None)
        self.env["TERM"] = "xterm"
        self.program = [sys.executable, str(ROOT / "upq-cli")]

    def __call__(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.program, *words],
            env=self.env,
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def on_terminal(self, *words: str) -> str:
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [*self.program, *words], env=self.env, cwd=self.folder, stdout=theirs
        ) as process:
            os.close(theirs)
            text = b""
            while data := _read(ours):
                text += data
            process.wait(30)
        os.close(ours)
        return text.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


@pytest.fixture
def run(server: LineServer, tmp_path: Path) -> Cli:
    return Cli(server, tmp_path)


def answers(server: LineServer, data: Any) -> None:
    server.answer = lambda request: wire.ok(data, json=request.json)


# Submits


def test_a_quoted_line_and_unquoted_words_are_the_same(server: LineServer, run: Cli) -> None:
    done = run("verify_local_file fid:50")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ACK 1 queued\n", "")
    assert run("verify_local_file", "fid:50").stdout == "ACK 2 queued\n"
    assert server.lines == [b"verify_local_file fid:50\n"] * 2


@pytest.mark.parametrize("name", ["upq-cli", "upq-cli.py"])
def test_both_names_start_from_the_source_tree(run: Cli, name: str) -> None:
    run.program = [str(ROOT / name)]
    run.env["PATH"] = f"{Path(sys.executable).parent}:{run.env['PATH']}"
    assert run("test").stdout == "ACK 1 queued\n"


def test_of_several_arguments_each_is_one_word(server: LineServer, run: Cli) -> None:
    desk = Desk()
    server.answer = desk.answer
    run("test", "msg:two words", "it's", "a:'x", "b:1\n2", "", "@key:k 1")
    assert desk.jobs[0]["params"] == {
        "msg": "two words",
        "it's": "",
        "a": "'x",
        "b": "1\n2",
        "": "",
    }
    assert desk.keys == {"k 1": 1}
    run("hash", '{"fid": [50]}', "--wait", "@key:2")
    assert desk.jobs[1]["params"] == {"fid": [50]}


def test_words_that_begin_with_a_dash_are_sent_after_two_dashes(
    server: LineServer, run: Cli
) -> None:
    assert run("-v", "--", "test", "-x", "--json").stderr.endswith("Sent: 'test -x --json'\n")
    assert run("test", "-5", "--wait").returncode == 0
    assert server.lines[-2:] == [b"test -5\n", b'{"verb":"wait","id":2,"whole":true}\n']


def test_a_refusal_goes_to_stderr_and_is_1(server: LineServer, run: Cli) -> None:
    done = run("show", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ERR bad_params ")


@pytest.mark.parametrize(
    "words",
    [("",), (" ",), ("a\nb",), ("--nonsense", "x"), ("--timeout", "soon", "x"), ("a\nb", "c")],
)
def test_wrong_usage_is_2(run: Cli, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: upq-cli ")
    assert '"<jobname>( param:value)*"' in done.stderr


def test_a_wrong_timeout_is_told_as_what_it_is(run: Cli) -> None:
    assert "--timeout: 'soon' is not a duration such as 30s" in run("--timeout", "soon", "x").stderr


def test_without_arguments_there_is_the_usage_and_1(run: Cli) -> None:
    done = run()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("usage: upq-cli ")
    assert '"<jobname>( param:value)*"' in done.stderr


def test_when_without_then_is_wrong_usage(run: Cli) -> None:
    done = run("--when", "ended", "-")
    assert done.returncode == 2
    assert "--when needs --then" in done.stderr


def test_no_connection_is_2(run: Cli) -> None:
    done = run("-s", "/nowhere/upq.sock", "test")
    assert done.returncode == 2
    assert done.stderr == "upq-cli: /nowhere/upq.sock: No such file or directory; is upq running?\n"
    done = run("-s", "/nowhere/upq.sock", "--json", "test")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "no_connection"
    done = run("-c", "/nowhere/upq.cfg", "test")
    assert done.returncode == 2
    assert done.stderr == "upq-cli: /nowhere/upq.cfg: No such file or directory\n"


def test_a_connection_that_breaks_is_2(server: LineServer, run: Cli) -> None:
    server.answer = lambda request: None
    done = run("test")
    assert done.returncode == 2
    assert "closed the connection" in done.stderr


def test_the_socket_comes_from_options_before_the_environment(
    server: LineServer, run: Cli, tmp_path: Path
) -> None:
    address = run.env.pop("UPQ_SOCKET")
    (tmp_path / "upq.cfg").write_text(f"[paths]\nsocket = {address}\n")
    (tmp_path / "other.cfg").write_text("[paths]\nsocket = /nowhere/other\n")
    assert run("test").returncode == 0
    run.env["UPQ_CONFIG"] = "other.cfg"
    assert "/nowhere/other" in run("test").stderr
    assert run("-c", "upq.cfg", "test").returncode == 0
    assert run("-s", address, "test").returncode == 0


def test_verbose_tells_what_is_sent_where(server: LineServer, run: Cli) -> None:
    done = run("-v", "test", "fid:50")
    assert done.stderr == f"Connected to '{server.address}'.\nSent: 'test fid:50'\n"
    assert done.stdout == "ACK 1 queued\n"


def test_quiet_prints_ids_only(server: LineServer, run: Cli) -> None:
    assert run("-q", "test").stdout == "1\n"
    many = '{"submit_many": [{"submit": "a"}, {"submit": "b"}]}'
    assert run("-q", many).stdout == "2\n3\n"
    answers(server, {"jobs": [job(5), job(4)]})
    assert run("-q", "jobs").stdout == "5\n4\n"
    answers(server, {"job": job(5), "history": [{"state": "done"}], "children": [job(6)]})
    assert run("-q", "show", "5").stdout == "5\n"
    answers(server, {"queues": [{"queue": "hash", "type": "hash"}]})
    assert run("-q", "queues").stdout == "hash\n"


def test_json_is_one_document(server: LineServer, run: Cli) -> None:
    ack = {"ok": True, "id": 1, "message": "queued", "duplicate": False}
    assert json.loads(run("--json", "test").stdout) == ack
    done = run("--json", "show", "x")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "bad_params"
    data = {"jobs": [job(5)], "text": "\x1b"}
    answers(server, data)
    assert json.loads(run("--json", "jobs").stdout) == data


# Waiting


def test_wait_follows_the_job_and_returns_its_outcome(server: LineServer, run: Cli) -> None:
    done = run("--wait", "hash", "fid:50")
    assert done.returncode == 0
    assert done.stdout == 'ACK 1 queued\njob 1 done: all is well\n{"n":1}\n'
    done = run("hash", "fail:1", "--wait")
    assert (done.returncode, done.stdout) == (1, "ACK 2 queued\njob 2 failed: it broke\n")
    done = run("--wait", "--json", "hash", "fail:1")
    assert (done.returncode, json.loads(done.stdout)["job"]["state"]) == (1, "failed")
    assert run("--wait", "--quiet", "hash").stdout == "4\n"


def test_wait_returns_the_outcome_of_the_whole(server: LineServer, run: Cli) -> None:
    whole = whole_of(job(1), state="failed", total=3, expected=4, progress=0.5,
                     counts={"done": 2, "failed": 1})  # fmt: skip
    server.answer = lambda request: (
        wire.ok({"job": job(1), "whole": whole}, json=True)
        if request.verb == "wait"
        else wire.ack(1)
    )
    done = run("--wait", "hash")
    assert done.returncode == 1
    assert done.stdout.endswith("\nthe whole: failed, 50%: 2 done, 1 failed, 1 to come\n")
    told = json.loads(run("--wait", "--json", "hash").stdout)
    assert (told["whole"], told["job"]["state"]) == (whole, "done")


def test_what_is_answered_at_once_is_not_waited_for(server: LineServer, run: Cli) -> None:
    server.answer = lambda request: wire.ack(0, "No queues.")
    done = run("--wait", "list_queue")
    assert (done.returncode, done.stdout) == (0, "ACK 0 No queues.\n")
    assert json.loads(run("--wait", "--json", "list_queue").stdout)["id"] == 0


def test_wait_gives_up_after_its_timeout(server: LineServer, run: Cli) -> None:
    def answer(request: Request) -> bytes:
        if request.verb == "wait":
            assert request.params["timeout"] == 90
            raise TimedOut("not yet")
        return wire.ack(1)

    server.answer = answer
    done = run("--wait", "--timeout", "1m30s", "test")
    assert (done.returncode, done.stdout, done.stderr) == (1, "ACK 1\n", "ERR timeout not yet\n")


def test_the_verb_wait_returns_the_outcome_too(server: LineServer, run: Cli) -> None:
    answers(server, {"job": job(17)})
    assert run("wait 17").returncode == 0
    answers(server, {"job": job(17, params={"fail": "1"})})
    assert run("wait", "17", "timeout:30s").returncode == 1
    assert run('{"verb": "wait", "id": 17}').returncode == 1


# Many lines


def test_lines_from_stdin_get_one_reply_each(server: LineServer, run: Cli) -> None:
    done = run("-", stdin="test a:1\n\n  \nshow x\r\nping\ntest b:2")
    assert done.returncode == 1
    replies = done.stdout.splitlines()
    assert [reply.split()[0] for reply in replies] == ["ACK", "ERR", "OK", "ACK"]
    assert run("-", stdin="test\ntest\n").returncode == 0
    assert run("-", stdin="").returncode == 0


def test_many_lines_in_other_forms(server: LineServer, run: Cli) -> None:
    done = run("-", "-q", stdin="test\nshow x\ntest\n")
    assert (done.stdout, done.stderr[:14]) == ("1\n2\n", "ERR bad_params")
    documents = run("-", "--json", stdin="test\nshow x\nping\n").stdout.splitlines()
    assert [json.loads(document).get("ok") for document in documents] == [True, False, None]
    done = run("-", "--wait", stdin="test\ntest fail:1\n")
    assert done.returncode == 1
    assert done.stdout.count("job ") == 2
    assert "job 5 failed: it broke" in done.stdout


def test_twenty_thousand_lines_are_pipelined(server: LineServer, run: Cli) -> None:
    done = run("-", stdin="".join(f"test n:{n} {'x' * 100}\n" for n in range(20_000)))
    assert done.stdout.splitlines() == [f"ACK {n} queued" for n in range(1, 20_001)]


def test_lines_cut_short_by_the_daemon_are_2(server: LineServer, run: Cli) -> None:
    server.answer = lambda request: None if "last" in request.params else wire.ack(1)
    done = run("-", stdin="test\ntest last\ntest\n")
    assert (done.returncode, done.stdout) == (2, "ACK 1\n")


def test_json_lines_get_the_daemons_json(server: LineServer, run: Cli) -> None:
    done = run('{"verb": "ping"}')
    assert json.loads(done.stdout)["data"]["pong"]
    assert json.loads(run('{"submit": "test"}').stdout)["id"] == 1


# As a program


def test_a_reader_that_leaves_is_no_traceback(server: LineServer, run: Cli) -> None:
    answers(server, {"jobs": [job(n) for n in range(5000)]})
    shell = '"$@" jobs | head -n 1; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *run.program],
        env=run.env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["1"]


def test_an_interrupt_is_no_traceback(server: LineServer, run: Cli) -> None:
    asked = threading.Event()
    over = threading.Event()

    def answer(request: Request) -> bytes:
        asked.set()
        over.wait(30)
        raise Refused("over")

    server.answer = answer
    # Whoever starts the tests in the background of a shell has them ignore it.
    heeding = ["env", "--default-signal=INT", *run.program]
    with subprocess.Popen([*heeding, "wait 1"], env=run.env, stderr=subprocess.PIPE) as process:
        assert asked.wait(30)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    over.set()
    assert (process.returncode, stderr) == (130, b"")


def test_help_tells_the_exit_status_and_where_the_daemon_is_found(run: Cli) -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in "exit status", "UPQ_CONFIG", "UPQ_SOCKET", "--wait", "wrong usage":
        assert word in done.stdout


def test_main_can_be_called(server: LineServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-s", server.address, "test"]) == 0
    assert capsys.readouterr().out == "ACK 1 queued\n"


def test_a_call_imports_nothing_heavy(server: LineServer, run: Cli) -> None:
    code = "import sys; from upq import cli; cli.main(['test', 'a:b c']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=run.env, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    heavy = {"asyncio", "dataclasses", "logging", "sqlalchemy", "upq.plugins", "upq.protocol"}
    assert heavy & set(done.stdout.split()) == set()
