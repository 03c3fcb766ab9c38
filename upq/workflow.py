"""What follows a job: chains with branches side by side, and what is handed on to them.

A chain is a list of steps: the name of a type, or several names for jobs that run side by side.
Such a group is followed by the one job that joins it, or it ends the chain. The jobs are made by
the runner, and inserted by the queue.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from upq.job import Chain, Job, NewJob, Outcome
from upq.notify import describe, fitting, secret_settings
from upq.secret import mask, secret_texts

#: What follows a job, in its `options`: steps as `parse` returns them, lists in JSON.
CHAIN = "chain"
#: The options of the last step.
LAST: dict[str, Any] = {CHAIN: []}
#: In the options of a branch: the id of the job that joins it.
JOIN = "join"
#: In the options of a join: the ids of its branches by their types.
JOINS = "joins"
#: In the options of a job whose type has a `delay`: microseconds.
DELAY = "delay_us"


class Make(Protocol):
    def __call__(self, name: str, *, options: dict[str, Any]) -> NewJob:
        """A job of a type that follows."""


_TOKEN = re.compile(r"[()]|[^\s,()]+")


def parse(text: str) -> tuple[str | tuple[str, ...], ...]:
    """The chain that a text such as `a b (c d) e` spells. Raises ValueError."""
    steps: list[str | tuple[str, ...]] = []
    group: list[str] | None = None
    for word in _TOKEN.findall(text):
        if word == "(":
            if group is not None:
                raise ValueError("( stands inside another group")
            if steps and isinstance(steps[-1], tuple):
                raise ValueError(f"after ({' '.join(steps[-1])}) comes the one job that joins it")
            group = []
        elif word == ")":
            if group is None:
                raise ValueError(") without (")
            if not group:
                raise ValueError("() is empty")
            steps.append(tuple(group))
            group = None
        elif group is None:
            steps.append(word)
        elif word in group:
            raise ValueError(f"{word} stands twice in one group")
        else:
            group.append(word)
    if group is not None:
        raise ValueError("( without )")
    return tuple(steps)


def names(chain: Chain) -> list[str]:
    """The types of a chain, each once, in order."""
    steps = [[step] if isinstance(step, str) else step for step in chain]
    return list(dict.fromkeys(name for step in steps for name in step))


def following(chain: Chain, join: int | None, make: Make) -> list[NewJob]:
    """The jobs that go on with a chain: its next step, or branches with the job that joins them.

    join: the job that waits for this chain, when it is that of a branch.
    """
    if not chain:
        return []
    step, rest = chain[0], list(chain[1:])
    if isinstance(step, str):
        options = {CHAIN: rest} if join is None else {CHAIN: rest, JOIN: join}
        return [make(step, options=options)]
    branches = [make(name, options=LAST) for name in step]
    if not rest:
        return branches
    (name, *rest) = rest
    assert isinstance(name, str)
    joint = make(name, options={CHAIN: rest})
    joint.joins = tuple(branches)
    return [*branches, joint]


def tie(jobs: Sequence[NewJob], first: int) -> None:
    """Have joins and their branches know each other by the ids they get, from `first` on."""
    ids = {id(one): n for n, one in enumerate(jobs, first)}
    for one in jobs:
        if one.joins:
            branches = {branch.type: ids[id(branch)] for branch in one.joins}
            one.after = tuple(branches.values())
            one.options = {**one.options, JOINS: branches}
            for branch in one.joins:
                branch.options = {**branch.options, JOIN: ids[id(one)]}


def option(options: str | None, name: str) -> Any:
    """One of the options of a job as they are stored; None for most jobs."""
    return json.loads(options).get(name) if options and f'"{name}":' in options else None


def handed_on(data: dict[str, Any], result: Any) -> dict[str, Any]:
    """The params of a follow-up: the data, with the keys of a result that is an object."""
    if not isinstance(result, dict):
        return data
    if not all(isinstance(name, str) for name in result):
        result = json.loads(json.dumps(result))
    return {**data, **result}


def failure(
    job: Job, outcome: Outcome, secret: frozenset[str], jobcfg: Mapping[str, str]
) -> dict[str, Any]:
    """The params of a job that is to see to a failed one; secrets are masked."""
    told = describe(job, outcome, secret, jobcfg=jobcfg)
    hidden = [*secret_texts((job.params, job.data), secret), *secret_settings(jobcfg)]
    return {
        "type": job.type,
        "id": job.id,
        "root": job.root,
        "queue": job.queue,
        "state": outcome.state,
        "reason": outcome.reason,
        "params": fitting(mask(job.params, secret, hidden)),
        "message": told["msgstr"],
        "output": told["output"],
    }
