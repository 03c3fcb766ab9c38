from __future__ import annotations

import pytest

from tests import test_cli
from tests.line_server import LineServer, job, whole_of
from tests.test_cli import Cli, answers

server, run = test_cli.server, test_cli.run


def test_lists_are_columns_between_tabs_in_a_pipe(server: LineServer, run: Cli) -> None:
    answers(server, {"jobs": [job(5, params={"msg": "two words", "n": 1}), job(4, message="a\tb")]})
    times = "2026-11-22T00:05:11.123456Z\t2026-11-22T00:05:12.123456Z"
    assert run("jobs").stdout == (
        f'5\thash\thash\tdone\t{times}\t"msg:two words" n:1\tall is well\n'
        f"4\thash\thash\tdone\t{times}\t\ta\\tb\n"
    )


def test_lists_are_tables_on_a_terminal(server: LineServer, run: Cli) -> None:
    answers(server, {"jobs": [job(5, params={"fid": 5}), job(4, params={"fail": "1"})]})
    run.env["NO_COLOR"] = "1"
    assert run.on_terminal("jobs") == (
        "ID  TYPE  QUEUE  STATE   CREATED              ENDED                PARAMS  INFO\n"
        "5   hash  hash   done    2026-11-22 02:05:11  2026-11-22 02:05:12  fid:5   all is well\n"
        "4   hash  hash   failed  2026-11-22 02:05:11  2026-11-22 02:05:12  fail:1  it broke\n"
    )
    answers(server, {"jobs": []})
    assert run.on_terminal("jobs") == "none\n"


def test_a_wait_for_the_whole_says_what_holds_up_a_join(server: LineServer, run: Cli) -> None:
    held = job(5, state="blocked", reason="job 4 is failed", message="", result=None)
    answers(server, {"job": held, "whole": whole_of(held, state="failed")})
    done = run("wait", "5", "whole:yes")
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == "job 5 blocked: job 4 is failed"


def test_a_list_says_of_what_has_ended_why(server: LineServer, run: Cli) -> None:
    told = {"reason": "timeout", "progress": {"done": 1, "total": 5}, "message": "too slow"}
    answers(server, {"jobs": [job(5, **told, state="failed"), job(4, **told, state="running")]})
    assert [line.split("\t")[7] for line in run("jobs").stdout.splitlines()] == [
        "too slow",
        "timeout",
    ]


@pytest.mark.parametrize("columns", [64, 79, 100])
def test_a_table_fits_the_terminal(server: LineServer, run: Cli, columns: int) -> None:
    answers(server, {"jobs": [job(5, params={"path": "/x" * 200}, message="word " * 100_000)]})
    run.env["COLUMNS"] = str(columns)
    run.env["NO_COLOR"] = "1"
    lines = run.on_terminal("jobs").splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) == columns
    assert "…" in lines[1]


def test_a_terminal_without_a_size_has_80_columns(server: LineServer, run: Cli) -> None:
    answers(server, {"jobs": [job(5, params={"path": "/x" * 200})]})
    del run.env["COLUMNS"]
    run.env["NO_COLOR"] = "1"
    assert max(map(len, run.on_terminal("jobs").splitlines())) == 80


def test_colour_is_for_terminals_that_want_it(server: LineServer, run: Cli) -> None:
    answers(server, {"jobs": [job(5)]})
    painted = "\x1b[32mdone"
    assert painted in run.on_terminal("jobs")
    assert painted not in run("jobs").stdout
    assert painted not in run.on_terminal("--color=never", "jobs")
    run.env["NO_COLOR"] = "1"
    assert painted not in run.on_terminal("jobs")
    assert painted in run.on_terminal("--color=always", "jobs")


def test_show_is_a_block_and_a_time_line(server: LineServer, run: Cli) -> None:
    history = [
        {"at": "2026-11-22T00:05:11.123456Z", "state": "queued", "reason": "", "message": "",
         "attempt": 0, "node": "n1", "who": "root"},
        {"at": "2026-11-22T00:05:12.5Z", "state": "done", "reason": "", "message": "a\x1b[2Jb",
         "attempt": 1, "node": "n1", "who": ""},
    ]  # fmt: skip
    below = {"depth": 1, **job(6, "copy", parent=5)}
    log = [{"job": 6, "type": "copy", **history[1]}]
    whole = whole_of(job(5), total=2, expected=3, counts={"done": 2}, progress=0.6667)
    tree = [below, {**below, "id": 7, "depth": 2}]
    shown = {"job": job(5, params={"fid": 50}), "history": history, "children": [job(6)]}
    answers(server, {**shown, "tree": tree, "whole": whole, "log": log})
    run.env["NO_COLOR"] = "1"
    text = run.on_terminal("show", "5")
    assert text.startswith("id          5\ntype        hash\n")
    assert "params      fid:50\n" in text
    assert "jobdata" not in text
    assert "progress" not in text
    assert "\ntimeline\n2026-11-22 02:05:11.123  queued     by root\n" in text
    assert "\n2026-11-22 02:05:12.500  done       a\\x1b[2Jb\n" in text
    assert "\nthe whole: done, 67%: 2 done, 1 to come\nID  TYPE    STATE  STARTED  " in text
    assert "\n6   copy    done   2026-11-22 02:05:11  0.9s  all is well\n7     copy  done" in text
    assert "\nlog\n2026-11-22 02:05:12.500  done       (copy:6)  a\\x1b[2Jb\n" in text
    assert "id\t5\ntype\thash\n" in run("show", "5").stdout
    assert "2026-11-22T00:05:12.5Z\tdone\t1\tn1\t\t\ta\\x1b[2Jb\n" in run("show", "5").stdout


def test_what_upq_says_has_local_times_on_a_terminal(server: LineServer, run: Cli) -> None:
    run.env["NO_COLOR"] = "1"
    why = (
        "it waits since 2026-11-22T00:05:11.123456Z: a window is closed until 2026-11-22T06:00:00Z"
    )
    local = "it waits since 2026-11-22 02:05:11: a window is closed until 2026-11-22 08:00:00"
    answers(server, {"id": 5, "state": "queued", "why": why})
    assert run("why", "5").stdout == f"{why}\n"
    assert run.on_terminal("why", "5") == f"{local}\n"
    waiting = job(
        5, state="queued", message="made 2026-11-22T00:05:11Z", reason="until 2026-11-22T06:00:00Z"
    )
    answers(server, {"job": waiting, "why": why, "history": []})
    assert f"\nwhy         {local}\n" in run.on_terminal("show", "5")
    done = {**waiting, "id": 6, "state": "done"}
    answers(server, {"jobs": [waiting, done]})
    run.env["COLUMNS"] = "200"
    listed = run.on_terminal("jobs")
    assert "until 2026-11-22 08:00:00\n" in listed
    assert "made 2026-11-22T00:05:11Z\n" in listed


def test_status_is_a_block_with_its_counts(server: LineServer, run: Cli) -> None:
    answers(server, {"state": "running", "jobs": {"queued": 3, "done": 0}, "broken": {}})
    assert run("status").stdout == "state\trunning\njobs.queued\t3\njobs.done\t0\n"
    run.env["NO_COLOR"] = "1"
    assert run.on_terminal("status") == "state   running\n\njobs\nqueued  3\ndone    0\n"


def test_queues_show_why_they_stand_still(server: LineServer, run: Cli) -> None:
    queue = {"queue": "hash", "type": "hash", "queued": 3, "oldest_queued_s": 12, "paused": True}
    answers(server, {"queues": [queue | {"reason": "queue hash is paused"}]})
    assert run("queues").stdout == "hash\thash\t3\t\t\t\t\t\t\t\t12\tqueue hash is paused\n"


def test_a_duration_has_units_on_a_terminal_and_is_seconds_in_a_pipe(
    server: LineServer, run: Cli
) -> None:
    run.env["NO_COLOR"] = "1"
    answers(server, {"state": "running", "uptime_s": 5400, "jobs": {"queued": 3}})
    assert "uptime  1h30m\n" in run.on_terminal("status")
    assert "uptime_s\t5400\n" in run("status").stdout
    answers(server, {"queues": [{"queue": "hash", "type": "hash", "oldest_queued_s": 90}]})
    assert run.on_terminal("queues").split() == ["QUEUE", "TYPE", "OLDEST_QUEUED",
                                                 "hash", "hash", "1m30s"]  # fmt: skip
    assert "\t90\t" in run("queues").stdout


def test_output_is_printed_as_it_is_but_not_to_a_terminal(server: LineServer, run: Cli) -> None:
    answers(server, {"id": 5, "text": "\x1b[2J\tb\n", "size_bytes": 10**9, "truncated": True})
    done = run("output", "5")
    assert done.stdout == "\x1b[2J\tb\n"
    assert "1000000000 bytes" in done.stderr
    assert run.on_terminal("output", "5").startswith("\\x1b[2J\tb\n")


def test_why_is_a_sentence(server: LineServer, run: Cli) -> None:
    answers(server, {"id": 5, "state": "blocked", "why": "no such job type: x"})
    assert run("why", "5").stdout == "no such job type: x\n"


def test_other_answers_are_told_field_by_field(server: LineServer, run: Cli) -> None:
    answers(server, {"accepted": True, "params": {"fid": 50}, "priority": 0, "run_at": None})
    assert run("check", "hash fid:50").stdout == "accepted\tyes\nparams\tfid:50\npriority\t0\n"
    assert server.lines[-1] == b'check "hash fid:50"\n'
    answers(server, {"nodes": [{"name": "n1", "pid": 7}]})
    assert run("nodes").stdout == "n1\t7\n"
    answers(server, [1, 2])
    assert run("ping").stdout == "OK [1,2]\n"
