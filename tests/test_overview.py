"""A job with all below it, through real daemons: shown, waited for, cancelled, queued again."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import cancels, killed_cancels, stores, tree_cancels
from tests.conftest import note_database
from tests.daemons import ROOT, Daemon, acting_as, until
from tests.servers import Postgres, short_folder
from tests.stores import Store
from tests.test_trip import url_of
from upq.desk import LOOK_S, Ends
from upq.errors import NotFound
from upq.job import DONE, FAILED, RUNNING, NewJob, Outcome
from upq.overview import COUNTED, LOGGED, SHOWN, Overview

database, url, store = stores.database, stores.url, stores.store

#: A gate of each job's own name lets it end; `bad` in its params lets it fail.
STEP = """
def run(self):
    note("start", self.jobname, self.jobid)
    if "held" in self.jobdata:
        gate(self.jobdata["held"] + self.jobname, lambda: self.cancelled)
    if self.cancelled:
        return False
    if self.jobdata.get("bad") == self.jobname and not (FOLDER / "mended").exists():
        raise ValueError("bad luck")
    self.logger.info("here")
    return self.jobid
"""
PARENT = """
def run(self):
    note("start", self.jobname, self.jobid)
    names = self.jobdata["children"].split("+")
    jobs = [self.submit(name, **self.jobdata, n=str(n)) for n, name in enumerate(names)]
    return self.gather(jobs)
"""
CONFIG = """
[paths]
socket_chmod = 666
[job a]
subjobs = b c
[job b]
[job c]
[job split]
subjobs = (left right) joined c
on_fail = sorry
[job left]
on_fail = sorry
[job right]
[job joined]
[job sorry]
[job doomed]
command = false
on_fail = stubborn
[job stubborn]
command = false
retries = 20
retry_delay = 12h
[job work]
concurrent = 4
[job apart]
executor = process
[job program]
command = sleep {s}
params = s children? held? n?
[job parent]
params = children held? bad? n? s?
concurrent = 4
[job grand]
params = children held? bad? n?
"""
GRAND = """
def run(self):
    note("start", self.jobname, self.jobid)
    return self.gather([self.submit("parent", **{**self.jobdata, "children": "work+work"})])
"""
STEPS = ("a", "b", "c", "split", "left", "right", "joined", "sorry", "work", "apart")
JOBS = {**dict.fromkeys(STEPS, STEP), "parent": PARENT, "grand": GRAND}


@pytest.fixture(scope="module", params=["sqlite", "mariadb", "postgres"])
def shared(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    folder = short_folder()
    made = contextlib.contextmanager(url_of)(request.param, folder, request)
    with made as url, Daemon(folder, CONFIG, url, **JOBS) as daemon:
        yield daemon
    shutil.rmtree(folder)


@pytest.fixture
def daemon(shared: Daemon, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    note_database(request, shared.ask("status")["database"])
    for leftover in ("ledger", "mended", *(f"go{name}" for name in JOBS)):
        (shared.folder / leftover).unlink(missing_ok=True)
    yield shared
    for state in ("queued", "running"):
        shared.ask(f"cancel state:{state}")
    until(lambda: not any(q["queued"] + q["running"] for q in shared.ask("queues")["queues"]))


def tree(daemon: Daemon, id: int) -> list[tuple[int, str, str]]:
    return [(one["depth"], one["type"], one["state"]) for one in daemon.ask(f"show {id}")["tree"]]


def whole(daemon: Daemon, id: int) -> dict[str, Any]:
    """How it is at its end."""
    return dict(daemon.ask(f"wait {id} timeout:29s whole:yes")["whole"])


def starts(daemon: Daemon) -> list[str]:
    return [line.split()[1] for line in daemon.ledger if line.startswith("start ")]


# Shown


def test_a_chain_is_shown_as_one_with_the_steps_to_come(daemon: Daemon) -> None:
    id = daemon.submit("a held:go")
    daemon.open_gate("goa")
    until(lambda: starts(daemon) == ["a", "b"])
    shown = daemon.ask(f"show {id}")
    assert (shown["whole"]["state"], shown["whole"]["expected"]) == (RUNNING, 3)
    assert shown["whole"]["progress"] == 0.3333
    assert tree(daemon, id) == [(1, "b", RUNNING)]
    daemon.open_gate("gob")
    daemon.open_gate("goc")
    assert whole(daemon, id)["progress"] == 1.0
    shown = daemon.ask(f"show {id}")
    b, c = shown["tree"]
    assert (b["parent"], c["parent"], c["depth"]) == (id, b["id"], 2)
    assert all(one["started_at"] and one["ended_at"] for one in (b, c))
    assert [(e["type"], e["job"], e["state"]) for e in shown["log"]] == [
        (name, one, state)
        for name, one in (("a", id), ("b", b["id"]), ("c", c["id"]))
        for state in ("queued", RUNNING, DONE)
    ]


def test_log_lines_of_what_is_below_a_job_name_it(daemon: Daemon) -> None:
    id = daemon.submit("grand children:x")
    assert whole(daemon, id)["counts"] == {DONE: 4}
    works = [one["id"] for one in daemon.ask(f"show {id}")["tree"] if one["type"] == "work"]
    for one in works:
        assert f"(work:{one}<{id}) here" in daemon.log
    until(lambda: all(f"(work:{one}<{id}) finished: done" in daemon.log for one in works))
    until(lambda: f"(grand:{id}) finished: done" in daemon.log)


def test_the_whole_is_printed_and_followed(daemon: Daemon) -> None:
    done = cli(daemon, "--wait", "a", "bad:c")
    assert done.returncode == 1
    assert done.stdout.endswith("the whole: failed, 67%: 2 done, 1 failed\n")
    assert cli(daemon, "--wait", "a").returncode == 0
    id = daemon.wait(daemon.submit("a bad:b"))["id"]
    told = json.loads(cli(daemon, "--json", "show", str(id)).stdout)
    assert told["whole"]["state"] in (RUNNING, FAILED)
    assert cli(daemon, "wait", str(id)).returncode == 0, "the job itself is done"
    assert cli(daemon, "wait", str(id), "whole:yes").returncode == 1
    lines = cli(daemon, "show", str(id)).stdout
    assert "whole.state\tfailed\n" in lines
    assert f"\n1\t{id + 1}\tb\tb\tfailed\t" in lines


def test_a_follow_up_that_is_tried_for_long_is_waited_for_with_the_whole_only(
    daemon: Daemon,
) -> None:
    done = cli(daemon, "--wait-job", "doomed")
    assert done.returncode == 1
    assert re.fullmatch(r"ACK (\d+)\njob \1 failed: .*\n\{.*\}\n", done.stdout), done.stdout
    id = int(done.stdout.split()[1])
    told = json.loads(cli(daemon, "--json", "--wait-job", "doomed").stdout)
    assert (told.keys(), told["job"]["state"]) == ({"job"}, FAILED)
    assert daemon.say(f"wait {id} timeout:100ms").startswith("OK ")
    assert daemon.say(f"wait {id} timeout:100ms whole:yes").startswith("ERR timeout ")
    ours, theirs = pty.openpty()
    words = [sys.executable, str(ROOT / "upq-cli"), "-s", str(daemon.folder / "s")]
    env = daemon.environment() | {"COLUMNS": "120"}
    with subprocess.Popen([*words, "--wait", "doomed"], env=env, stdout=subprocess.PIPE,
                          stderr=theirs, text=True) as seen:  # fmt: skip
        os.close(theirs)
        text = b""
        while b"retry 1 of 20" not in text:
            text += os.read(ours, 4096)
        ((last, after),) = re.findall(rb"job (\d+) failed  waits for stubborn (\d+) \(q", text)[-1:]
        assert b"(queued, retry 1 of 20); the whole: running, " in text
        assert int(after) > int(last)
        assert daemon.ask(f"cancel {int(last)}")["below"] == 1
        assert seen.stdout and "the whole: failed, " in seen.stdout.read()
        assert seen.wait(30) == 1
    os.close(ours)


def cli(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "upq-cli"), "-s", str(daemon.folder / "s"), *words],
        env=daemon.environment(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_a_wait_for_the_whole_is_over_when_its_time_is(daemon: Daemon) -> None:
    id = daemon.submit("a held:go")
    daemon.open_gate("goa")
    until(lambda: starts(daemon) == ["a", "b"])
    assert daemon.say(f"wait {id} timeout:10ms whole:yes").startswith("ERR timeout ")
    assert daemon.ask(f"wait {id} whole:no")["job"]["state"] == DONE
    assert daemon.say(f"wait {id} whole:perhaps").startswith("ERR bad_params whole: yes or no")


# Cancelled


@pytest.mark.parametrize("kind", ["work", "apart", "program"])
def test_a_parent_is_cancelled_with_all_its_children(daemon: Daemon, kind: str) -> None:
    id = daemon.submit(f"parent children:{kind}+{kind} held:never s:1000")
    until(lambda: len(found := tree(daemon, id)) == 2 and RUNNING in [one[2] for one in found])
    told = daemon.ask(f"cancel {id}")
    assert (told["state"], told["below"]) == (RUNNING, 2)
    assert whole(daemon, id)["state"] == "cancelled"
    assert {state for *_, state in tree(daemon, id)} == {"cancelled"}
    assert f"(parent:{id}) cancelled by " in daemon.log


def test_a_chain_whose_first_job_is_done_is_cancelled_by_its_id(daemon: Daemon) -> None:
    id = daemon.submit("a held:go")
    daemon.open_gate("goa")
    until(lambda: starts(daemon) == ["a", "b"])
    daemon.wait(id)
    assert daemon.ask(f"cancel {id}") == {"id": id, "state": DONE, "below": 1}
    assert whole(daemon, id)["state"] == "cancelled"
    assert starts(daemon) == ["a", "b"]
    assert daemon.say(f"cancel {id}") == f"ERR wrong_state job {id} is done already"


def test_who_may_cancel_a_job_may_cancel_all_below_it_and_nobody_else(daemon: Daemon) -> None:
    id = daemon.submit("parent children:work held:never")
    until(lambda: tree(daemon, id) == [(1, "work", RUNNING)])
    with acting_as("nobody"):
        for verb in ("cancel", "retry"):
            assert daemon.say(f"{verb} {id}").startswith("ERR denied ")
    daemon.ask(f"cancel {id}")
    assert whole(daemon, id)["state"] == "cancelled"


def test_a_job_that_is_to_end_can_queue_nothing_more(daemon: Daemon) -> None:
    body = """
    def run(self):
        gate("go", lambda: self.cancelled)
        for n in range(3):
            try:
                self.submit("work", n=n)
            except Exception as error:
                note("refused", type(error).__name__)
    """
    daemon.add_job("late", "\n".join(line[4:] for line in body.splitlines()))
    daemon.config.write_text(daemon.config.read_text() + "[job late]\n")
    daemon.ask("reload")
    id = daemon.submit("late")
    daemon.until_state(id, RUNNING)
    daemon.ask(f"cancel {id}")
    daemon.wait(id)
    assert daemon.ledger == ["refused IsCancelled"] * 3
    assert tree(daemon, id) == []


def test_a_tree_in_two_daemons_is_cancelled_by_way_of_either(
    short_tmp: Path, postgres: Postgres
) -> None:
    config = "[node]\nname = {}\n[job parent]\nparams = children held\n[job work]\n"
    folders = [short_tmp / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    with (
        postgres.database() as url,
        Daemon(folders[0], config.format("a"), url, parent=PARENT, work=STEP) as one,
        Daemon(folders[1], config.format("b"), url, parent=PARENT, work=STEP) as two,
    ):
        for asked in (one, two):
            id = one.submit("parent children:work+work+work held:never")
            until(lambda id=id: [s for *_, s in tree(one, id)].count(RUNNING) == 2)
            asked.ask(f"cancel {id}")
            assert whole(one, id)["state"] == "cancelled"
            nodes = {e["node"] for e in one.ask(f"show {id}")["log"] if e["state"] == RUNNING}
            assert nodes == {"a", "b"}


def test_branches_that_run_are_cancelled_with_their_join_and_nobody_is_told_of_a_failure(
    daemon: Daemon,
) -> None:
    id = daemon.submit("split held:go")
    daemon.open_gate("gosplit")
    until(lambda: sorted(starts(daemon)) == ["left", "right", "split"])
    assert daemon.ask(f"cancel {id}")["below"] == 3
    assert whole(daemon, id)["counts"] == {DONE: 1, "cancelled": 3}
    assert sorted(starts(daemon)) == ["left", "right", "split"]
    for name in STEPS:
        daemon.open_gate(f"go{name}")
    assert daemon.ask(f"retry {id}")["below"] == 3
    found = whole(daemon, id)
    assert (found["state"], found["counts"]) == (DONE, {DONE: 5})


@pytest.mark.parametrize("shared", [False, True])
def test_trees_that_are_cancelled_while_they_grow_leave_nothing_behind(
    short_tmp: Path, shared: bool
) -> None:
    """The short form of `python -m tests.cancels --trees`."""
    found = tree_cancels.run(short_tmp, 15, seed=17, shared=shared)
    assert (found.bad, found.trees) == ([], 15)
    assert found.states["cancelled"] > 5
    # What ends in another daemon is seen by a look, the second one if the first just misses it.
    assert found.slowest_s < (2 * LOOK_S + 2 if shared else cancels.END_S + 3)


@pytest.mark.parametrize(("name", "beside"), [("sqlite", False), ("mariadb", False),
                                              ("postgres", True)])  # fmt: skip
def test_a_cancel_that_kill_9_cuts_off_is_finished_by_whoever_comes_next(
    short_tmp: Path, name: str, beside: bool
) -> None:
    """The short form of `python -m tests.cancels --kills`."""
    found = killed_cancels.run(short_tmp, name, 6000, 1, beside=beside)
    assert (found.survived, found.started) == (0, 0)
    assert len(found.cancelled) == 1, "it was cut off in the middle"


# Queued again


def test_a_failed_parent_goes_on_at_the_child_that_has_failed(daemon: Daemon) -> None:
    id = daemon.submit("grand children:x bad:work")
    assert whole(daemon, id)["state"] == FAILED
    before = starts(daemon)
    good = daemon.submit("work")
    daemon.wait(good)
    daemon.open_gate("mended")
    assert daemon.ask(f"retry {id}") == {"id": id, "state": "queued", "below": 0}
    found = whole(daemon, id)
    assert (found["state"], found["counts"]) == (DONE, {DONE: 4})
    assert sorted(starts(daemon)[len(before) + 1 :]) == ["grand", "parent", "work", "work"]


def test_children_that_are_done_are_not_run_again(daemon: Daemon) -> None:
    id = daemon.submit("parent children:work+b+work bad:b")
    assert whole(daemon, id)["counts"] == {DONE: 2, FAILED: 2}
    daemon.open_gate("mended")
    daemon.ask(f"retry {id}")
    assert whole(daemon, id)["state"] == DONE
    assert sorted(starts(daemon)) == ["b", "b", "parent", "parent", "work", "work"]


def test_a_chain_goes_on_at_the_step_that_has_failed(daemon: Daemon) -> None:
    id = daemon.submit("a bad:b")
    assert whole(daemon, id)["state"] == FAILED
    daemon.open_gate("mended")
    assert daemon.ask(f"retry {id}") == {"id": id, "state": DONE, "below": 1}
    assert whole(daemon, id)["counts"] == {DONE: 3}
    assert starts(daemon) == ["a", "b", "b", "c"]
    assert daemon.say(f"retry {id}").startswith(f"ERR wrong_state job {id} is done: only what ")


def test_a_join_whose_branch_has_failed_goes_on_after_a_retry_of_the_whole(daemon: Daemon) -> None:
    id = daemon.submit("split bad:left")
    found = whole(daemon, id)
    assert (found["state"], found["expected"]) == (FAILED, 6)
    assert found["counts"] == {DONE: 3, FAILED: 1, "blocked": 1}, "sorry is one of those done"
    daemon.open_gate("mended")
    assert daemon.ask(f"retry {id}") == {"id": id, "state": DONE, "below": 1}
    found = whole(daemon, id)
    assert (found["state"], found["progress"], found["counts"]) == (DONE, 1.0, {DONE: 6})
    assert sorted(starts(daemon)) == ["c", "joined", "left", "left", "right", "sorry", "split"]


def test_a_wait_for_the_whole_does_not_wait_for_what_a_failure_elsewhere_holds_up(
    daemon: Daemon,
) -> None:
    failed = daemon.submit("work bad:work")
    daemon.wait(failed)
    id = daemon.submit(f"work @after:{failed}")
    assert whole(daemon, id)["state"] == "blocked"


def test_a_cancelled_tree_is_queued_again_and_comes_to_its_end(daemon: Daemon) -> None:
    parent = daemon.submit("grand children:x held:go")
    chain = daemon.submit("a held:go")
    daemon.open_gate("goa")
    until(lambda: "b" in starts(daemon) and starts(daemon).count("work") == 2)
    for id in (parent, chain):
        daemon.ask(f"cancel {id}")
        assert whole(daemon, id)["state"] == "cancelled"
    for name in ("b", "c", "work"):
        daemon.open_gate(f"go{name}")
    for id in (parent, chain):
        daemon.ask(f"retry {id}")
        assert whole(daemon, id)["state"] == DONE
    assert starts(daemon).count("a") == 1


def test_a_step_that_was_done_when_the_cancel_came_is_followed_after_a_retry(store: Store) -> None:
    root = store.submit("first")
    job = store.claim_one("first")
    store.queue.cancel(root, "alice")
    follow_up = NewJob("second", {}, parent=root, root=root)
    store.queue.finish(job, Outcome(DONE), [follow_up])
    store.flush()
    (again,) = overview(store).again(root)
    assert store.queue.retry_many([again], "alice") == [again]
    second = store.claim_one("second")
    store.queue.finish(second, Outcome(DONE), [NewJob("third", {}, parent=second.id, root=root)])
    store.flush()
    assert store.claim_one("third")


# Many


def overview(store: Store) -> Overview:
    return Overview(store.views, Ends(store.views), lambda type: 0)


def family_of(store: Store, n: int, state: str = DONE) -> int:
    """A parent that runs, with n children that have ended."""
    root = store.submit("parent")
    store.claim_one("parent")
    first = store.accepted(NewJob("hash", {"n": 1}, parent=root, root=root))[0].id
    store.queue.finish(store.claim_one(), Outcome(state, "so it is"))
    store.flush()
    if n > 1:
        store.copy(first, n - 1)
    return root


def test_what_a_show_tells_of_very_many_is_capped(store: Store) -> None:
    root = family_of(store, SHOWN + 20)
    shown = overview(store).show(root)
    assert len(shown["tree"]) == SHOWN
    assert shown["whole"]["left_out"] == 20
    assert shown["whole"]["counts"] == {RUNNING: 1, DONE: SHOWN + 20}
    assert (len(shown["log"]) <= LOGGED, shown["whole"]["more"]) == (True, False)
    assert store.views.members(root, 7) == (store.views.members(root, SHOWN * 2)[0][:7], True)
    with pytest.raises(NotFound):
        overview(store).show(10**15)


def test_the_log_of_very_many_is_that_of_the_latest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upq.overview.LOGGED", 3)
    root = family_of(store, 1)
    shown = overview(store).show(root)
    assert shown["whole"]["log_cut"]
    assert [e["state"] for e in shown["log"]] == ["queued", RUNNING, DONE]
    assert len({e["job"] for e in shown["log"]} - {root}) == 1


def test_a_wait_for_the_whole_hears_of_what_comes_later(store: Store) -> None:
    """A wait that begins with the first job ends with the last."""
    root = store.submit("first")
    ends = Ends(store.views)
    store.queue._bus.subscribe(ends.hear)
    waited = Overview(store.views, ends, lambda type: 0)
    over = threading.Event()
    thread = threading.Thread(
        target=lambda: waited.wait(root, 20, lambda: True) and over.set(), daemon=True
    )
    thread.start()
    parent = root
    for type in ("first", "second", "third"):
        assert not over.is_set()
        then = [NewJob("second" if type == "first" else "third", {}, parent=parent, root=root)]
        store.queue.finish(store.claim_one(type), Outcome(DONE), then if type != "third" else [])
        store.flush()
        parent = store.views.children(parent)[0]["id"] if type != "third" else 0
    thread.join(20)
    assert over.is_set()


@pytest.mark.alone
def test_a_show_of_a_tree_of_ten_thousand_is_quick(store: Store) -> None:
    root = family_of(store, 10_000)
    seen = overview(store)
    wall, own = [], []
    for _ in range(5):
        began_s, own_s = time.perf_counter(), time.thread_time()
        shown = seen.show(root)
        wall.append(time.perf_counter() - began_s)
        own.append(time.thread_time() - own_s)
    print(f"show of 10,000 on {store.database.kind}: {min(wall) * 1000:.0f} ms,"
          f" {min(own) * 1000:.0f} ms of them our own")  # fmt: skip
    assert shown["whole"]["total"] == 10_001 < COUNTED
    assert min(own) < 0.1  # with SQLite that is all
    assert min(wall) < 0.5


@pytest.mark.alone
def test_a_tree_of_thirty_thousand_is_cancelled_in_short_transactions(store: Store) -> None:
    root = family_of(store, 1)
    first = store.accepted(NewJob("hash", {}, parent=root, root=root))[0].id
    store.copy(first, 29_999)
    longest_s, over = 0.0, threading.Event()

    def others() -> None:
        nonlocal longest_s
        while not over.is_set():
            began_s = time.perf_counter()
            store.submit("other")
            longest_s = max(longest_s, time.perf_counter() - began_s)

    thread = threading.Thread(target=others)
    thread.start()
    began_s = time.perf_counter()
    assert store.queue.cancel(root, "alice").below == 30_000
    took_s = time.perf_counter() - began_s
    over.set()
    thread.join()
    print(f"cancel of 30,000 on {store.database.kind}: {took_s:.2f} s, the longest submit"
          f" beside it {longest_s * 1000:.0f} ms")  # fmt: skip
    assert longest_s < 2
