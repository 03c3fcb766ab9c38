"""Chains: steps, branches side by side and the job that joins them, on a store of each kind."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import sqlalchemy as sa

from tests import stores
from tests.stores import Store
from upq import config, schema, when
from upq.job import (
    BLOCKED,
    CANCELLED,
    DONE,
    EXPIRED,
    FAILED,
    QUEUED,
    Job,
    NewJob,
    Outcome,
)
from upq.jobtypes import JobTypes
from upq.runner import Runner
from upq.vault import Vault, add_key, read_keys
from upq.workflow import following, handed_on, names, parse

database, url, store = stores.database, stores.url, stores.store

HOUR = 3_600_000_000


# What a text spells


def test_names_are_steps_and_brackets_hold_what_runs_side_by_side() -> None:
    assert parse("a b (c d) e") == ("a", "b", ("c", "d"), "e")
    assert parse("(c,d)e") == (("c", "d"), "e")
    assert parse("a, b") == ("a", "b")
    assert parse("( a )") == (("a",),)
    assert parse("") == ()
    assert names(parse("a (b a) c")) == ["a", "b", "c"]


def made(name: str, *, options: dict[str, Any]) -> NewJob:
    return NewJob(name, {}, options=options)


def test_a_step_carries_what_is_left_and_who_waits_for_it() -> None:
    (step,) = following(["a", ["b", "c"], "d"], None, made)
    assert (step.type, step.options, step.joins) == ("a", {"chain": [["b", "c"], "d"]}, ())
    (step,) = following(["a"], 7, made)
    assert step.options == {"chain": [], "join": 7}
    assert following([], 7, made) == []


def test_a_group_comes_with_the_job_that_joins_it() -> None:
    b, c, d = following([["b", "c"], "d", "e"], None, made)
    assert [one.options for one in (b, c, d)] == [{"chain": []}, {"chain": []}, {"chain": ["e"]}]
    assert d.joins == (b, c)
    assert [one.type for one in following([["b", "c"]], None, made)] == ["b", "c"]


def test_the_keys_of_a_result_join_the_data_and_win() -> None:
    assert handed_on({"a": 1, "b": 1}, {"b": 2, 3: 4}) == {"a": 1, "b": 2, "3": 4}
    for result in None, 5, "text", ["list"]:
        assert handed_on({"a": 1}, result) == {"a": 1}


# On a store


class Plant:
    """Job types, and a runner for them that is told which job to run."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store
        (folder / "jobs").mkdir()
        self.sections: dict[str, str] = {}
        self.opened: Runner | None = None

    def offer(self, names: str, run: str = "pass", **settings: str) -> None:
        """Job types with this body of run()."""
        for name in names.split():
            head = (
                f"from upq import UpqJob\n\n\nclass {name.title()}(UpqJob):\n    def run(self):\n"
            )
            (self.folder / f"jobs/{name}.py").write_text(head + indent(run, " " * 8) + "\n")
            values = "".join(f"{key} = {value}\n" for key, value in settings.items())
            self.sections[name] = f"[job {name}]\n{values}"

    def configure(self) -> None:
        text = f"[paths]\njobs_dir = jobs\n{''.join(self.sections.values())}"
        (self.folder / "upq.cfg").write_text(text)
        self.types = JobTypes(config.load(self.folder / "upq.cfg"))
        self.opened = Runner(self.store.queue, self.types)

    def run(self, job: Job) -> Job:
        """One attempt of a claimed job, and its end."""
        if self.opened is None:
            self.configure()
        assert self.opened is not None
        self.opened.run(job, lambda plugin: None)
        return job

    def next(self, type: str) -> Job:
        """The next job of a type, run to its end."""
        job = self.run(self.store.claim_one(type))
        self.store.flush()
        return job

    def start(self, type: str = "first", **fields: Any) -> int:
        """Submit a job and run it to its end."""
        self.store.submit(type, **fields)
        return self.next(type).id

    def seen(self, type: str) -> list[Any]:
        """The rows of a type."""
        query = sa.select(schema.job).where(schema.job.c.type == type).order_by(schema.job.c.id)
        return self.store.fetch(query)

    def one(self, type: str) -> dict[str, Any]:
        (row,) = self.seen(type)
        return self.store.views.job(row.id)

    def state(self, type: str) -> str:
        return str(self.one(type)["state"])


@pytest.fixture
def plant(tmp_path: Path, store: Store) -> Plant:
    return Plant(tmp_path, store)


def fork(plant: Plant, **join: str) -> None:
    """first, then left and right side by side, then join and last."""
    plant.offer("first", "return {'seed': 1}", subjobs="(left right) join last")
    plant.offer("left right", "return {'made': self.jobname}")
    plant.offer("join", "return {'joined': sorted(self.jobdata)}", **join)
    plant.offer("last", "return self.jobdata")


def test_the_end_of_a_job_brings_its_branches_and_the_blocked_join(plant: Plant) -> None:
    fork(plant)
    first = plant.start(params={"x": 0}, submitter="alice")
    (left,), (right,), (join,) = plant.seen("left"), plant.seen("right"), plant.seen("join")
    assert first < left.id < right.id < join.id
    assert [row.state for row in (left, right, join)] == [QUEUED, QUEUED, BLOCKED]
    assert join.reason == f"waits for {left.id}, {right.id}"
    for row in left, right, join:
        shown = plant.store.views.job(row.id)
        assert (row.parent, row.root, row.submitter) == (first, first, "alice")
        assert shown["params"] == {"x": 0, "seed": 1}
    assert plant.seen("last") == []


def test_a_join_gets_the_results_of_its_branches_by_their_types(plant: Plant) -> None:
    fork(plant)
    plant.start(params={"x": 0})
    plant.next("right")
    join = plant.one("join")
    assert join["state"] == BLOCKED
    assert join["jobdata"] == {"x": 0, "seed": 1, "right": {"made": "right"}}
    plant.next("left")
    join = plant.one("join")
    assert (join["state"], join["reason"]) == (QUEUED, "")
    data = {"x": 0, "seed": 1, "left": {"made": "left"}, "right": {"made": "right"}}
    assert (join["params"], join["jobdata"]) == ({"x": 0, "seed": 1}, data)
    plant.next("join")
    plant.next("last")
    assert plant.one("last")["result"] == {**data, "joined": ["left", "right", "seed", "x"]}
    assert plant.store.fetch(sa.select(schema.edge)) == []


def test_branches_that_end_in_one_transaction_both_hand_on_what_they_have(plant: Plant) -> None:
    fork(plant)
    plant.start()
    for type in "left", "right":
        plant.run(plant.store.claim_one(type))
    plant.store.flush()
    assert plant.one("join")["jobdata"].keys() == {"seed", "left", "right"}
    assert plant.state("join") == QUEUED


def test_a_branch_without_a_result_hands_on_null_which_is_not_given(plant: Plant) -> None:
    plant.offer("first", subjobs="(left right) join")
    plant.offer("left", "return 3")
    plant.offer("right")
    plant.offer("join", "return self.jobdata", params="left:int right=none")
    plant.start()
    plant.next("left"), plant.next("right"), plant.next("join")
    assert plant.one("join")["result"] == {"left": 3, "right": "none"}


def test_a_join_whose_branches_left_what_it_does_not_take_fails(plant: Plant) -> None:
    fork(plant, params="left:int right:json")
    plant.start()
    plant.next("left"), plant.next("right"), plant.next("join")
    join = plant.one("join")
    assert (join["state"], join["reason"]) == (FAILED, "bad params")
    assert "left: {'made': 'left'} is not a whole number" in join["message"]


def test_a_group_at_the_end_of_a_chain_has_no_join(plant: Plant) -> None:
    plant.offer("first", subjobs="second (left right)")
    plant.offer("second left right")
    plant.start(), plant.next("second"), plant.next("left"), plant.next("right")
    assert plant.state("left") == plant.state("right") == DONE


def test_a_failed_branch_holds_the_join_until_it_is_retried(plant: Plant) -> None:
    fork(plant)
    plant.offer("right", "return 'ok' in self.jobcfg and 5")
    plant.start()
    right = plant.next("right").id
    plant.next("left")
    join = plant.one("join")
    assert (join["state"], join["reason"]) == (
        BLOCKED, f"job {right} is failed; `retry {right}` lets it go on",
    )  # fmt: skip
    plant.store.queue.retry(right, "root")
    assert plant.one("join")["reason"] == f"waits for {right}"
    plant.offer("right", "return 'ok' in self.jobcfg and 5", ok="1")
    plant.configure()
    plant.next("right")
    plant.next("join")
    assert plant.one("join")["jobdata"]["right"] == 5
    assert plant.one("join")["jobdata"]["left"] == {"made": "left"}


def test_a_cancelled_branch_holds_the_join(plant: Plant) -> None:
    fork(plant)
    plant.start()
    (right,) = plant.seen("right")
    plant.store.queue.cancel(right.id, "root")
    plant.next("left")
    assert plant.one("join")["reason"].startswith(f"job {right.id} is cancelled")
    plant.store.queue.retry(right.id, "root")
    plant.next("right")
    assert plant.state("join") == QUEUED


def test_a_join_waits_for_what_a_branch_has_appended_and_gets_its_result(plant: Plant) -> None:
    fork(plant)
    plant.offer("left", "self.append_job('more', {'b': 2})\nself.append_job('extra', {'a': 1})")
    plant.offer("extra more", "return self.jobname")
    plant.start()
    plant.next("right")
    left = plant.next("left")
    assert plant.seen("more") == []
    (extra,) = plant.seen("extra")
    assert (extra.parent, plant.one("extra")["params"]) == (left.id, {"seed": 1, "a": 1, "b": 2})
    assert plant.one("join")["reason"] == f"waits for {extra.id}"
    plant.next("extra")
    assert plant.state("join") == BLOCKED
    plant.next("more")
    join = plant.one("join")
    assert (join["state"], join["jobdata"]["left"]) == (QUEUED, "more")
    assert join["jobdata"]["right"] == {"made": "right"}
    assert set(join["jobdata"]) == {"seed", "left", "right"}


@pytest.mark.parametrize("repeated", ["join", "other"])
def test_a_join_does_not_wait_for_a_repeated_step_that_waits_for_it(
    plant: Plant, repeated: str
) -> None:
    plant.offer("first", subjobs="(left right) join")
    plant.offer("left", f"self.append_job('{repeated}')\nreturn 1")
    plant.offer("right", "return 2")
    plant.offer("join other", unique="true")
    plant.start()
    join = plant.one("join")["id"]
    limits = plant.types.get("other").limits({}, None)
    plant.store.submit("other", after=(join,), limits=limits)
    plant.next("right"), plant.next("left")
    assert plant.one("join")["jobdata"] == {"left": 1, "right": 2}
    plant.next("join"), plant.next("other")
    assert plant.state("join") == plant.state("other") == DONE


def test_what_a_branch_appends_hides_no_branch_that_has_failed(plant: Plant) -> None:
    fork(plant)
    plant.offer("left", "return False")
    plant.offer("right", "self.append_job('more')")
    plant.offer("more")
    plant.start()
    left = plant.next("left").id
    plant.next("right")
    reason = f"job {left} is failed; `retry {left}` lets it go on"
    assert plant.one("join")["reason"] == reason
    plant.next("more")
    assert plant.one("join")["reason"] == reason
    assert plant.store.views.awaited(plant.one("join")["id"]) == ([(left, FAILED)], 1)


def test_a_join_that_is_cancelled_has_its_branches_go_on_all_the_same(plant: Plant) -> None:
    fork(plant)
    plant.offer("left", "self.append_job('more')")
    plant.offer("more", "return 'more'")
    plant.start()
    join = plant.one("join")["id"]
    plant.store.queue.cancel(join, "root")
    plant.next("left"), plant.next("right"), plant.next("more")
    assert plant.one("join")["state"] == CANCELLED
    assert plant.one("join")["reason"] == ""
    plant.store.queue.retry(join, "root")
    plant.next("join"), plant.next("last")
    assert plant.one("last")["params"]["left"] == "more"


def test_a_join_that_has_failed_is_retried_with_what_it_was_given(plant: Plant) -> None:
    fork(plant)
    plant.offer("join", "self.jobdata['tried'] = 1\nreturn 'ok' in self.jobcfg and self.jobdata")
    plant.start()
    plant.next("left"), plant.next("right")
    join = plant.next("join").id
    assert plant.seen("last") == []
    plant.offer("join", "return self.jobdata", ok="1")
    plant.configure()
    plant.store.queue.retry(join, "root")
    plant.next("join")
    result = {"seed": 1, "left": {"made": "left"}, "right": {"made": "right"}, "tried": 1}
    assert plant.one("join")["result"] == result
    assert len(plant.seen("left")) == 1


def test_groups_may_come_one_after_another_with_a_job_between(plant: Plant) -> None:
    plant.offer("first", subjobs="(a b) c (d) e")
    plant.offer("a b c d e", "return self.jobname")
    plant.start()
    for type in "abcde":
        plant.next(type)
    assert plant.one("c")["jobdata"] == {"a": "a", "b": "b"}
    assert plant.one("e")["jobdata"] == {"a": "a", "b": "b", "d": "d"}
    assert plant.one("e")["parent"] == plant.one("c")["id"]


def test_a_job_with_a_time_of_its_own_is_retried_without_the_delay_of_its_type(
    plant: Plant,
) -> None:
    plant.offer("late", "return False", delay="{wait}")
    id = plant.start("late", run_at=when.now() - 1)
    plant.store.queue.retry(id, "root")
    plant.next("late")
    assert (plant.state("late"), plant.one("late")["reason"]) == (FAILED, "")


@pytest.mark.parametrize("appends", [False, True])
def test_branches_that_end_at_once_on_two_daemons_both_come_through(
    plant: Plant, appends: bool
) -> None:
    n = 25
    fork(plant)
    plant.offer("left right", "self.append_job('more')" if appends else "return self.jobid")
    plant.offer("more", "return self.jobid")
    for _ in range(n):
        plant.start()
    with plant.store.beside() as other:
        mine, theirs = plant.store.claim(n, "left"), other.claim(n, "right")
        there = Runner(other.queue, plant.types)

        def work(runner: Runner, store: Store, jobs: list[Job]) -> None:
            for job in jobs:
                runner.run(job, lambda plugin: None)
                store.flush()

        def both(mine: list[Job], theirs: list[Job]) -> None:
            assert plant.opened is not None
            threads = [
                threading.Thread(target=work, args=(plant.opened, plant.store, mine)),
                threading.Thread(target=work, args=(there, other, theirs)),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        both(mine, theirs)
        if appends:
            assert {row.state for row in plant.seen("join")} == {BLOCKED}
            both(plant.store.claim(n, "more"), other.claim(n, "more"))
    joins = plant.seen("join")
    assert [(row.state, row.waits) for row in joins] == [(QUEUED, 0)] * n
    for row in joins:
        data = plant.store.views.job(row.id)["jobdata"]
        assert data.keys() == {"seed", "left", "right"}
        assert data["left"] != data["right"]
    assert plant.store.fetch(sa.select(schema.edge)) == []


def test_follow_ups_of_a_job_that_is_done_are_each_for_themselves(plant: Plant) -> None:
    plant.offer("first", "return {'n': 1}", on_done="other more", subjobs="last")
    plant.offer("last")
    plant.offer("other", subjobs="more")
    plant.offer("more")
    first = plant.start(params={"x": 0})
    for type in "other", "more", "last":
        assert plant.one(type)["params"] == {"x": 0, "n": 1}
        assert plant.one(type)["parent"] == first
    plant.next("other")
    assert len(plant.seen("more")) == 2, "what follows a follow-up is what its section says"


def test_a_failure_calls_for_neither_chain_nor_on_done(plant: Plant) -> None:
    plant.offer("first", "return False", on_done="other", subjobs="other", on_fail="report")
    plant.offer("other report")
    plant.start()
    assert plant.seen("other") == []
    assert plant.state("report") == QUEUED


def test_a_job_that_fails_for_good_calls_for_on_fail(plant: Plant) -> None:
    plant.offer(
        "first", "self.output.write('words')\nself.jobdata['x'] = 1\nraise ValueError('bad')",
        on_fail="report more", retries="1", retry_delay="0",
    )  # fmt: skip
    plant.offer("report more")
    first = plant.start(params={"x": 0}, submitter="alice")
    assert plant.seen("report") == []
    plant.store.queue.stage()
    plant.next("first")
    shown = plant.one("report")
    told = shown["params"]
    message = plant.one("first")["message"]
    assert message.endswith("ValueError: bad")
    assert told == {
        "type": "first", "id": first, "root": first, "queue": "first",
        "state": FAILED, "reason": "", "params": {"x": 0}, "message": message, "output": "words",
    }  # fmt: skip
    assert (shown["parent"], shown["root"], shown["submitter"]) == (first, first, "alice")
    assert plant.one("more")["params"] == told


def test_a_step_waits_as_the_default_of_its_delay_says(plant: Plant) -> None:
    plant.offer("first", subjobs="later")
    plant.offer("later", params="up=2h", delay="{up}")
    plant.start()
    later = plant.one("later")
    wait = datetime.fromisoformat(later["run_at"]) - datetime.fromisoformat(later["created_at"])
    assert wait == pytest.approx(timedelta(hours=2), abs=timedelta(seconds=1))


def test_on_fail_comes_for_what_has_expired_or_killed_its_daemon(plant: Plant) -> None:
    plant.offer("first", on_fail="report", expires="1ms")
    plant.offer("report")
    plant.configure()
    runner = plant.opened
    assert runner is not None
    (new,) = [NewJob("first", {})]
    plant.types.limit([new])
    (late,) = plant.store.accepted(new)
    while plant.state("first") == QUEUED:
        plant.store.queue.expire(runner.expired)
    told = plant.one("report")["params"]
    assert (told["id"], told["state"]) == (late.id, EXPIRED)
    plant.store.submit("first")
    dead = plant.store.claim_one("first")._replace(crashes=99)
    plant.store.queue.rescue([dead], runner.crashed)
    told = plant.store.views.job(plant.seen("report")[-1].id)["params"]
    assert (told["id"], told["state"], told["reason"]) == (dead.id, FAILED, "crashed")


def test_nobody_sees_to_what_somebody_has_cancelled(plant: Plant) -> None:
    plant.offer("first", "self.cancel()\nreturn False", on_fail="report")
    plant.offer("report")
    plant.start()
    assert plant.state("first") == CANCELLED
    assert plant.seen("report") == []


def test_what_sees_to_failures_may_fail_itself_and_ends_there(plant: Plant) -> None:
    plant.offer("first report last", "return False")
    plant.sections["first"] += "on_fail = report\n"
    plant.sections["report"] += "on_fail = last\n"
    first = plant.start()
    report = plant.next("report").id
    plant.next("last")
    assert plant.one("last")["params"]["id"] == report
    assert plant.one("last")["root"] == first
    assert len(plant.store.fetch(sa.select(schema.job.c.id))) == 3


# Limits


def test_a_join_waits_for_the_job_that_a_branch_repeats(plant: Plant) -> None:
    fork(plant)
    plant.offer("left", "return {'made': 'long ago'}", unique="x")
    plant.configure()
    limits = plant.types.get("left").limits({"x": 0})
    there = plant.store.submit("left", params={"x": 0}, limits=limits)
    plant.start(params={"x": 0})
    plant.next("right")
    assert len(plant.seen("left")) == 1
    assert plant.one("join")["reason"] == f"waits for {there}, {plant.seen('right')[0].id}"
    plant.next("left")
    join = plant.one("join")
    assert (join["state"], join["jobdata"]["left"]) == (QUEUED, {"made": "long ago"})


@pytest.mark.parametrize("end", [DONE, FAILED])
def test_a_branch_may_repeat_a_job_that_has_ended(plant: Plant, end: str) -> None:
    fork(plant)
    plant.offer("left", f"return {end == DONE} and 'ready'", unique="x for 1h")
    plant.configure()
    limits = plant.types.get("left").limits({"x": 0})
    plant.store.submit("left", params={"x": 0}, limits=limits)
    there = plant.next("left").id
    plant.start(params={"x": 0})
    if end == FAILED:
        assert plant.one("join")["reason"].startswith(f"job {there} is failed; `retry {there}`")
        plant.offer("left", "return 'ready'", unique="x for 1h")
        plant.configure()
        plant.store.queue.retry(there, "root")
        plant.next("left")
    assert plant.one("join")["jobdata"]["left"] == "ready"
    assert plant.state("join") == BLOCKED
    plant.next("right")
    assert plant.state("join") == QUEUED


def test_a_join_whose_branches_are_all_done_long_since_is_queued_at_once(plant: Plant) -> None:
    fork(plant)
    plant.offer("left right", "return self.jobname", unique="x for 1h")
    plant.configure()
    for type in "left", "right":
        limits = plant.types.get(type).limits({"x": 0})
        plant.store.submit(type, params={"x": 0}, limits=limits)
        plant.next(type)
    plant.start(params={"x": 0})
    join = plant.one("join")
    data = {"x": 0, "seed": 1, "left": "left", "right": "right"}
    assert (join["state"], join["jobdata"]) == (QUEUED, data)


def test_a_branch_may_repeat_a_job_of_the_same_transaction(plant: Plant) -> None:
    fork(plant)
    plant.offer("left", "return self.jobid", unique="x")
    for _ in range(2):
        plant.store.submit("first", params={"x": 0})
    for job in plant.store.claim(2, "first"):
        plant.run(job)
    plant.store.flush()
    (left,) = plant.seen("left")
    plant.next("left")
    plant.next("right"), plant.next("right")
    assert [row.state for row in plant.seen("join")] == [QUEUED, QUEUED]
    for row in plant.seen("join"):
        assert plant.store.views.job(row.id)["jobdata"]["left"] == left.id


def test_a_step_that_a_branch_appends_may_be_another_branch(plant: Plant) -> None:
    fork(plant)
    plant.offer("left", "self.append_job('right')")
    plant.offer("right", "return 'of both'", unique="seed")
    plant.start()
    plant.next("left")
    assert len(plant.seen("right")) == 1
    assert plant.state("join") == BLOCKED
    plant.next("right")
    join = plant.one("join")
    assert (join["state"], join["jobdata"]) == (
        QUEUED, {"seed": 1, "left": "of both", "right": "of both"},
    )  # fmt: skip


def test_a_step_that_a_branch_appends_may_be_done_already(plant: Plant) -> None:
    fork(plant)
    plant.offer("left", "self.append_job('more')")
    plant.offer("more", "return 'before'", unique="seed for 1h")
    plant.configure()
    limits = plant.types.get("more").limits({"seed": 1})
    plant.store.submit("more", params={"seed": 1}, limits=limits)
    plant.next("more")
    plant.start()
    plant.next("right")
    plant.next("left")
    join = plant.one("join")
    assert (join["state"], join["jobdata"]["left"]) == (QUEUED, "before")


def test_a_join_that_is_a_duplicate_ends_the_chain(plant: Plant) -> None:
    fork(plant, unique="seed")
    plant.offer("left", "self.append_job('more')")
    plant.offer("more")
    plant.configure()
    plant.store.submit("join", params={}, limits=plant.types.get("join").limits({"seed": 1}))
    plant.start()
    for type in "left", "right", "more":
        plant.next(type)
    assert plant.state("more") == DONE
    assert plant.state("join") == QUEUED


def test_branches_and_their_join_may_take_turns_with_each_other(plant: Plant) -> None:
    """All of one line: the join, which is older than what its branch appends, is not in the way."""
    turn = {"serial": "vm:{x}"}
    plant.offer("first", subjobs="(left right) join", **turn)
    plant.offer("left", "self.append_job('more')", **turn)
    plant.offer("right more join other", **turn)
    plant.configure()
    plant.start(params={"x": 1})
    plant.next("left")
    limits = plant.types.get("other").limits({"x": 1})
    plant.store.submit("other", params={"x": 1}, limits=limits)
    plant.next("right")
    assert plant.store.claim(1, "other") == []
    plant.next("more")
    # The oldest of the line goes first.
    assert plant.store.claim(1, "other") == []
    plant.next("join")
    plant.next("other")


def test_a_blocked_join_that_is_cancelled_and_retried_is_in_nobodys_way(plant: Plant) -> None:
    turn = {"serial": "vm:{x}"}
    plant.offer("first", subjobs="(left right) join", **turn)
    plant.offer("left", "self.append_job('more')", **turn)
    plant.offer("right more join", **turn)
    plant.start(params={"x": 1})
    (join,) = plant.seen("join")
    plant.store.queue.cancel(join.id, "root")
    plant.next("left")
    plant.store.queue.retry(join.id, "root")
    assert plant.state("join") == BLOCKED
    for type in "right", "more", "join":
        plant.next(type)
    assert plant.state("join") == DONE
    assert plant.one("join")["jobdata"] == {"x": 1, "left": None, "right": None}


def test_results_outlive_the_jobs_that_had_them(plant: Plant) -> None:
    fork(plant)
    plant.start()
    plant.next("left")
    assert plant.store.purge(DONE, when.now() + 1) == 2
    plant.next("right")
    assert plant.one("join")["jobdata"]["left"] == {"made": "left"}


def test_a_step_of_a_type_that_is_disabled_waits(plant: Plant) -> None:
    fork(plant, enabled="no")
    plant.start()
    plant.next("left"), plant.next("right")
    join = plant.seen("join")[0]
    assert join.state == QUEUED
    assert plant.types.hold(plant.store.queue.lanes[join.lane]).startswith("join is disabled")
    plant.offer("join", "return self.jobdata")
    plant.configure()
    plant.next("join")
    assert plant.one("join")["result"]["left"] == {"made": "left"}


# Secrets


def test_secrets_in_results_are_encrypted_and_masked_wherever_they_come(
    plant: Plant, tmp_path: Path
) -> None:
    fork(plant, secret="token")
    plant.offer("left", "return {'token': 'hunter2', 'url': 'http://hunter2@x'}", on_fail="report")
    plant.offer("right", "self.output.write('hunter2')\nself.msg('hunter2')\nreturn False",
                on_fail="report")  # fmt: skip
    plant.offer("report")
    plant.configure()
    add_key(str(tmp_path / "keys"))
    keys = read_keys(str(tmp_path / "keys"))
    queue, secret = plant.store.queue, lambda: plant.types.secret
    queue.vault = Vault(keys, secret)
    plant.start(params={"token": "hunter2"})
    plant.next("left"), plant.next("right")
    assert plant.one("report")["params"]["params"] == {"token": "***", "seed": 1}
    assert plant.one("report")["params"]["message"] == "***"
    assert plant.one("report")["params"]["output"] == "***"
    plant.offer("right", "return 'said hunter2'")
    plant.configure()
    # The branch is done, and its join released, by a daemon that has lost the key.
    queue.retry(plant.seen("right")[0].id, "root")
    (right,) = plant.store.claim(1, "right")
    queue.vault = Vault((), secret)
    queue.finish(right, Outcome(DONE, result={"n": 1}))
    plant.store.flush()
    stored = plant.seen("join")[0]
    assert stored.state == QUEUED
    for text in stored.params, stored.data:
        assert "hunter2" not in text
    (join,) = plant.store.claim(1, "join")
    assert "is not in [db] key_file" in join.options["locked"]
    queue.vault = Vault(keys, secret)
    data = queue.vault.decode(stored.data)
    left = {"token": "hunter2", "url": "http://hunter2@x"}
    assert data == {"token": "hunter2", "seed": 1, "left": left, "right": {"n": 1}}


# Delays


def test_a_step_with_a_delay_is_due_that_much_later(plant: Plant) -> None:
    plant.offer("first", subjobs="(left right) join")
    plant.offer("left", delay="{up}")
    plant.offer("right")
    plant.offer("join", delay="{up}m")
    before = when.now()
    plant.start(params={"up": 3600})
    (left,) = plant.seen("left")
    assert before + HOUR <= left.run_at <= when.now() + HOUR
    assert plant.store.claim(1, "left") == []
    plant.next("right")
    plant.store.queue.cancel(left.id, "root")
    plant.store.queue.retry(left.id, "root")
    before = when.now()
    plant.next("left")
    (join,) = plant.seen("join")
    assert join.state == QUEUED
    assert before + 60 * HOUR <= join.run_at <= when.now() + 60 * HOUR
    assert plant.store.claim(1, "join") == []


def test_a_blocked_join_shows_no_time_yet(plant: Plant) -> None:
    fork(plant, delay="1h")
    plant.start()
    assert plant.one("join")["run_at"] is None


def test_a_step_whose_delay_cannot_be_read_fails_when_it_runs(plant: Plant) -> None:
    plant.offer("first", subjobs="(left right)")
    plant.offer("left right", delay="{up}")
    plant.start(params={"up": "soon"})
    plant.next("left")
    left = plant.one("left")
    assert (left["state"], left["reason"]) == (FAILED, "bad params")
    assert left["message"] == (
        "delay = {up}: 'soon' is not a duration such as 30s, 10m, 1h30m or 2d"
    )
    (right,) = plant.seen("right")
    plant.store.change(sa.update(schema.job).values(params="{}").where(schema.job.c.id == right.id))
    plant.next("right")
    assert plant.one("right")["message"] == "up: is missing, delay = {up} asks for it"


def test_a_step_has_the_defaults_of_its_type_as_a_submit_has(plant: Plant) -> None:
    plant.offer("first", subjobs="second third")
    plant.offer("second", params="pool=fast vm:int=5", queue="storage.{pool}", serial="vm:{vm}")
    plant.offer("third", params="vm:int")
    plant.start(params={"vm": "7"})
    (row,) = plant.seen("second")
    assert row.queue == "storage.fast"
    assert plant.one("second")["params"] == {"pool": "fast", "vm": 7}
    (job,) = plant.store.claim(1, "second", "storage.fast")
    assert job.options["limits"]["serial"] == "vm:7"
    plant.run(job)
    plant.store.flush()
    plant.next("third")
    assert plant.state("third") == DONE


def test_a_step_that_does_not_fit_its_type_says_so_when_it_runs(plant: Plant) -> None:
    plant.offer("first", subjobs="second")
    plant.offer("second", params="pool=fast vm:int")
    plant.start(params={"vm": "seven"})
    assert plant.one("second")["params"] == {"vm": "seven"}
    plant.next("second")
    assert plant.one("second")["message"] == "vm: 'seven' is not a whole number"
