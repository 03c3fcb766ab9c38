"""Workflows in Python survive kills; and the audit of `tests.replay` sees what it should."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import Step, Store
from tests.replay import Audit, Facts, Kept, Mark, Row, Trial
from upq.job import DONE, FAILED, QUEUED, RUNNING
from upq.nodes import DEATHS


@pytest.mark.alone
def test_kill_9_repeats_nothing_that_had_ended(url: str, short_tmp: Path) -> None:
    with Trial(Store(short_tmp, url)) as trial:
        trial.kill(12 if url.startswith("sqlite") else 6)
        facts = trial.settle()
    assert Audit(facts).text == ""
    assert facts.submitted >= 6
    assert any(row.starts > 1 for row in facts.rows.values() if row.type == "whole")


# The audit


def story() -> Facts:
    """One workflow that went well."""
    types = {1: "whole", 2: "a", 3: "b", 4: "b", 5: "b", 6: "leaf", 7: "leaf", 8: "leaf", 9: "c"}
    parents = {1: None, 2: 1, 3: 1, 4: 1, 5: 1, 6: 3, 7: 4, 8: 5, 9: 1}
    a, c = {"place": 0, "drawn": 0.2}, {"place": 1, "drawn": 0.9}
    results = {2: a, 3: [0.3, 6], 4: [0.4, 7], 5: [0.5, 8], 6: 6, 7: 7, 8: 8, 9: c}
    b = [results[n] for n in (3, 4, 5)]
    results[1] = {"plan": 0.1, "fee": 0.11, "a": a, "b": b, "c": c}
    rows = {
        id: Row(id, type, DONE, 1, parents[id], json.dumps(results[id]))
        for id, type in types.items()
    }
    changes = [Step(id, 1_000_000 * n, state, "")
               for id in rows for n, state in ((0, QUEUED), (1, RUNNING), (2, DONE))]  # fmt: skip
    drawn = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5, 9: 0.9}
    kept = [Kept(id, "plan", json.dumps(n), 1_500_000) for id, n in drawn.items()]
    kept.append(Kept(1, "fee", "0.11", 1_500_000))
    facts = Facts(rows, changes, kept, submitted=1)
    facts.marks = [Mark("start", id, "-", 1.1) for id in rows]
    facts.marks += [Mark("step", one.job, one.name, 1.2) for one in kept]
    facts.told[1] = 1
    return facts


def test_the_audit_accepts_what_went_well() -> None:
    assert Audit(story()).text == ""


def test_the_audit_accepts_that_three_deaths_were_retried() -> None:
    facts = story()
    facts.retried += [DEATHS, f"c 9 is failed: {DEATHS}"]
    assert Audit(facts).text == ""


def edit(id: int, **fields: object) -> Callable[[Facts], None]:
    return lambda facts: facts.rows.update({id: facts.rows[id]._replace(**fields)})


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        ("workflows that are not complete", edit(1, state=FAILED)),
        ("submits that became several workflows", lambda f: setattr(f, "submitted", 2)),
        ("missing or doubled children", lambda f: f.rows.pop(4)),
        ("missing or doubled children", edit(6, parent=4)),
        (
            "children whose end was committed, run again",
            lambda f: f.changes.append(Step(6, 3_000_000, RUNNING, "")),
        ),
        (
            "children whose end was committed, run again",
            lambda f: f.marks.append(Mark("start", 6, "-", 2.1)),
        ),
        (
            "steps whose end was committed, run again",
            lambda f: f.marks.append(Mark("step", 1, "fee", 1.6)),
        ),
        ("results unlike those of children and steps", edit(2, result="{}")),
        ("results unlike those of children and steps", lambda f: f.kept.pop()),
        ("workflows without a mail", lambda f: f.told.clear()),
        (
            "workflows failed for another reason than three deaths",
            lambda f: f.retried.append("b 3 is failed: no such thing"),
        ),
    ],
)
def test_the_audit_sees_what_went_wrong(rule: str, spoil: Callable[[Facts], None]) -> None:
    facts = copy.deepcopy(story())
    spoil(facts)
    assert rule in Audit(facts).found


def test_each_rule_of_the_audit_is_tried() -> None:
    mark = next(m for m in test_the_audit_sees_what_went_wrong.pytestmark if m.args)  # type: ignore[attr-defined]
    assert {rule for rule, _ in mark.args[1]} == {*Audit.RULES}
