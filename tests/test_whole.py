"""What is told of a job with all below it: pure answers, no store."""

from __future__ import annotations

import json
from typing import Any

import pytest

from upq import whole
from upq.job import BLOCKED, CANCELLED, DONE, EXPIRED, FAILED, FINAL, QUEUED, RUNNING
from upq.whole import Member


def member(id: int, parent: int | None, state: str, **fields: Any) -> Member:
    """One that was made and has ended at the time of its id, if nothing else is said."""
    ended = id if state in FINAL else None
    started = None if state in (QUEUED, BLOCKED) else id
    if "steps" in fields:
        fields["options"] = json.dumps({"chain": ["step"] * fields.pop("steps")})
    facts = {"type": "work", "started_at": started, "ended_at": ended, "options": '{"chain":[]}'}
    return Member(id, parent, state, **{**facts, **fields})


def told(*members: Member, stuck: frozenset[int] = frozenset()) -> dict[str, Any]:
    return whole.told(members, stuck, lambda type: 2, more=False)


def chain(*states: str) -> list[Member]:
    """Each follows the one before."""
    return [member(n, n - 1 if n > 1 else None, state) for n, state in enumerate(states, 1)]


# State


@pytest.mark.parametrize(
    ("states", "state"),
    [
        ([QUEUED], QUEUED),
        ([BLOCKED], BLOCKED),
        ([RUNNING], RUNNING),
        ([DONE], DONE),
        ([EXPIRED], EXPIRED),
        ([DONE, QUEUED], RUNNING),
        ([DONE, DONE, DONE], DONE),
        ([DONE, DONE, FAILED], FAILED),
        ([DONE, DONE, EXPIRED], FAILED),
        ([DONE, CANCELLED], CANCELLED),
        ([CANCELLED, FAILED], CANCELLED),
        ([FAILED, DONE], FAILED),
    ],
)
def test_the_whole_of_a_chain_is_as_its_steps_are(states: list[str], state: str) -> None:
    assert told(*chain(*states))["state"] == state


def test_a_bad_end_that_the_job_above_has_seen_and_coped_with_is_none_of_the_whole() -> None:
    root = member(1, None, DONE, ended_at=9)
    seen = member(2, 1, FAILED, child_key="k", ended_at=5)
    assert told(root, seen)["state"] == DONE
    assert told(root, seen)["progress"] == 1.0
    unseen = seen._replace(ended_at=9)
    assert told(root, unseen)["state"] == FAILED
    assert told(root._replace(state=RUNNING, ended_at=None), seen)["state"] == RUNNING


def test_a_join_that_a_failed_branch_holds_up_lets_the_whole_come_to_its_end() -> None:
    parts = [member(1, None, DONE), member(2, 1, FAILED), member(3, 1, DONE), member(4, 1, BLOCKED)]
    stuck = whole.held(parts, [(4, 2, FAILED), (4, 99, RUNNING)])
    assert stuck == {4}
    assert told(*parts, stuck=frozenset(stuck))["state"] == FAILED
    assert told(*parts)["state"] == RUNNING
    assert whole.open_jobs(parts, stuck) == []


def test_what_waits_for_a_held_job_is_held_too() -> None:
    parts = [member(1, None, FAILED), *(member(n, 1, BLOCKED) for n in (2, 3, 4))]
    needs = [(2, 1, FAILED), (3, 2, BLOCKED), (4, 99, QUEUED)]
    assert whole.held(parts, needs) == {2, 3}
    assert whole.held(parts, [(4, 99, CANCELLED)]) == {4}, "one that is elsewhere"


def test_a_job_that_waits_for_one_that_has_failed_is_all_that_it_will_be() -> None:
    assert told(member(1, None, BLOCKED), stuck=frozenset({1}))["state"] == BLOCKED


# Progress


def test_progress_counts_the_steps_that_are_to_come() -> None:
    first = member(1, None, QUEUED, steps=3)
    assert (told(first)["expected"], told(first)["progress"]) == (4, 0.0)
    second = member(2, 1, RUNNING, steps=2, progress='{"done":5,"total":10}')
    found = told(first._replace(state=DONE), second)
    assert (found["total"], found["expected"], found["progress"]) == (2, 4, 0.375)
    assert told(member(1, None, RUNNING, options=None))["expected"] == 3, "those of its type"


def test_progress_of_what_has_failed_stays_where_it_is() -> None:
    found = told(member(1, None, DONE), member(2, 1, FAILED, steps=2))
    assert (found["progress"], found["counts"]) == (0.25, {DONE: 1, FAILED: 1})
    assert found["ended_at"] == "1970-01-01T00:00:00.000002Z"


def test_a_chain_has_the_jobs_side_by_side_among_its_steps() -> None:
    assert whole.count_steps(["a", ["b", "c"], "d"]) == 4
    assert whole.count_steps(()) == 0


# Retry


def test_of_a_chain_the_step_that_has_failed_is_queued_again() -> None:
    assert whole.again(chain(DONE, DONE, FAILED)) == [3]
    assert whole.again(chain(FAILED)) == [1]
    assert whole.again(chain(DONE, DONE)) == []


def test_children_of_a_parent_that_runs_again_are_left_to_it() -> None:
    parts = [member(1, None, FAILED, ended_at=9), member(2, 1, FAILED, child_key="k")]
    assert whole.again(parts) == [1]
    cancelled = [one._replace(state=CANCELLED, ended_at=9) for one in parts]
    assert whole.again(cancelled) == [1]


def test_what_follows_a_child_of_a_parent_that_runs_again_is_queued_again() -> None:
    child = member(2, 1, DONE, child_key="k")
    parts = [member(1, None, CANCELLED, ended_at=9), child, member(3, 2, CANCELLED)]
    assert whole.again(parts) == [1, 3]


def test_a_child_that_has_outlived_its_parent_is_queued_again() -> None:
    parent = member(1, None, DONE, ended_at=5)
    assert whole.again([parent, member(2, 1, CANCELLED, child_key="k", ended_at=6)]) == [2]
    assert whole.again([parent, member(2, 1, FAILED, child_key="k", ended_at=4)]) == []


def test_with_a_child_that_was_coped_with_all_below_it_is_left_alone() -> None:
    parts = [
        member(1, None, DONE, ended_at=9),
        member(2, 1, FAILED, child_key="k", ended_at=5),
        member(3, 2, DONE, child_key="k", ended_at=3),
        member(4, 3, FAILED, ended_at=4),
    ]
    assert whole.again(parts) == []


def test_members_of_a_batch_are_queued_again_but_not_once_what_follows_them_has_run() -> None:
    follow_up = member(1, None, BLOCKED)
    parts = [follow_up, member(2, 1, DONE), member(3, 1, FAILED), member(4, 1, CANCELLED)]
    assert whole.again(parts) == [3, 4]
    parts[0] = follow_up._replace(state=CANCELLED, ended_at=4)
    assert whole.again(parts) == [1, 3, 4]
    parts[0] = follow_up._replace(state=FAILED, started_at=5, ended_at=6)
    assert whole.again(parts) == [1]
    parts[0] = follow_up._replace(state=DONE, started_at=5, ended_at=6)
    assert whole.again(parts) == []
    parts[0] = follow_up._replace(state=EXPIRED, ended_at=6)
    assert whole.again([*parts, member(7, 1, FAILED)]) == [1, 3, 4], "7 has told of its end"


def test_what_a_bad_end_has_brought_about_is_no_part_of_the_next_run() -> None:
    for state in (FAILED, CANCELLED, EXPIRED):
        assert whole.again([member(1, None, state), member(2, 1, FAILED)]) == [1]


# What is shown


def test_each_job_stands_below_the_one_it_came_from() -> None:
    parts = [member(1, None, DONE), member(2, 1, DONE), member(5, 1, DONE), member(3, 2, DONE)]
    parts += [member(6, 2, DONE), member(4, 3, DONE)]
    found = [(one.id, depth) for one, depth in whole.picked(parts, 10)]
    assert found == [(2, 1), (3, 2), (4, 3), (6, 2), (5, 1)]


def test_of_very_many_those_that_failed_or_run_are_shown_with_those_above_them() -> None:
    parts = [member(1, None, DONE), *(member(n, 1, DONE) for n in range(2, 100))]
    parts += [member(200, 98, FAILED), member(201, 99, RUNNING)]
    found = [(one.id, depth) for one, depth in whole.picked(parts, 6)]
    assert found == [(2, 1), (3, 1), (98, 1), (200, 2), (99, 1), (201, 2)]
    assert len(whole.picked(parts, 100)) == 100
