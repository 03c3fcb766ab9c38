"""How a batch gets its members, in one transaction of the writer. How it is freed is in `members`.

The follow-up is locked last, as where members end: after the jobs that it is to wait for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from upq.batch import Batch
from upq.changes import Submit
from upq.dependents import lower_waits
from upq.errors import KeyConflict, NotFound, WrongState
from upq.job import BAD, BATCH, BLOCKED, DONE, Accepted, Gathered, encode
from upq.joins import block
from upq.limits import is_paced
from upq.members import is_over, kept_batch, reason_of
from upq.statements import members as st
from upq.statements.jobs import AT, PLAIN
from upq.vault import Vault


@dataclass(slots=True)
class Filling:
    """Members to queue for a batch. The row of a new follow-up is the last of the submit's."""

    submit: Submit
    #: The id of the follow-up.
    id: int
    is_new: bool
    when: str
    #: Whether more may be added afterwards.
    open: bool
    vault: Vault


def fill(batch: Batch, one: Filling) -> Gathered:
    """Queue members, all or none. Raises RequestError before anything is changed."""
    known = batch.known_keys([one.submit])
    if one.is_new and (found := known.get(one.submit.rows[-1][AT["idem_key"]])):
        return _repeat(batch, one, known, found)
    known = batch.hold([one.submit], known)
    return _begin(batch, one, known) if one.is_new else _add(batch, one, known)


def _begin(batch: Batch, one: Filling, known: dict[str, tuple[int, str]]) -> Gathered:
    submit = one.submit
    jobs, fresh, edges = batch.accept(submit, known)
    if (followup := jobs.pop()).duplicate:
        raise WrongState(f"job {followup.id} is what `then` repeats (unique)")
    # A copy: should this be rolled back, it starts again from what was asked for.
    row = list(fresh.pop())
    others = _others(jobs, fresh)
    states = batch.lock_states(others)
    n = len(fresh) + len(others)
    kept = {"open": one.open, "when": one.when, "n": n}
    waits = one.open + len(fresh) + _left(states, one.when)
    row[AT["options"]] = _with_batch(row[AT["options"]], kept)
    if waits:
        bad = [(id, state) for id, state in sorted(states.items()) if state in BAD]
        block(row, waits, reason_of(kept, bad))
        if len(row) > PLAIN:
            row[AT["serial_key"]] = None  # members may stand in the same line, behind it
    fresh.append(row)
    batch.note_new(fresh, submit.who)
    batch.store(fresh, edges + _edges(one.id, fresh[:-1], states))
    _keep(batch, one.id, states)
    if submit.replaces:
        batch.replace(submit, fresh, others)
    if not waits:
        batch.members.release([(one.id, kept)])
    return Gathered(one.id, jobs, duplicate=False, open=one.open, members=n)


def _add(batch: Batch, one: Filling, known: dict[str, tuple[int, str]]) -> Gathered:
    submit = one.submit
    jobs, fresh, edges = batch.accept(submit, known)
    others = _others(jobs, fresh)
    states = batch.lock_states(others)
    state, options, kept = _lock_batch(batch, one.id)
    if others:
        keys = sorted((id, _key(id)) for id in others)
        there = {row[0] for row in batch.tx.fetch_rows(st.AMONG_MEMBERS, keys, batch=one.id)}
        states = {id: state for id, state in states.items() if id not in there}
    if state == BLOCKED and kept["open"]:
        _refuse_circles(batch, one, fresh, states)
    elif kept["open"]:
        raise WrongState(f"batch {one.id} is {state}")
    elif fresh or states:
        raise WrongState(f"batch {one.id} is closed")
    else:
        return Gathered(one.id, jobs, duplicate=True, open=False, members=kept["n"])
    kept |= {"open": one.open, "n": kept["n"] + len(fresh) + len(states)}
    batch.note_new(fresh, submit.who)
    batch.store(fresh, edges + _edges(one.id, fresh, states))
    _keep(batch, one.id, states)
    batch.tx.run(
        st.FILL, batch=one.id, more=len(fresh) + _left(states, kept["when"]),
        text=_with_batch(options, kept), why=batch.members.told(one.id, kept),
    )  # fmt: skip
    if submit.replaces:
        batch.replace(submit, fresh, others)
    if not one.open:
        lower_waits(batch, {one.id: 1})
    return Gathered(one.id, jobs, duplicate=False, open=one.open, members=kept["n"])


def _repeat(
    batch: Batch, one: Filling, known: dict[str, tuple[int, str]], first: tuple[int, str]
) -> Gathered:
    """Answer as the first time. Nothing is queued: what is gone meanwhile has the id 0."""
    state, _, kept = _lock_batch(batch, first[0])
    jobs = []
    for row in one.submit.rows:
        found = known.get(row[AT["idem_key"]])
        if found and not one.vault.same(found[1], row[AT["params"]]):
            raise KeyConflict(f"job {found[0]} has this key, with other params")
        jobs.append(Accepted(found[0] if found else 0, duplicate=True))
    is_open = kept["open"] and state == BLOCKED
    return Gathered(jobs.pop().id, jobs, duplicate=True, open=is_open, members=kept["n"])


def _lock_batch(batch: Batch, id: int) -> tuple[str, str, dict[str, Any]]:
    """State and options of a follow-up, with what is kept of its batch."""
    found = batch.tx.fetch(st.LOCK_BATCH, batch=id)
    if not found:
        raise NotFound(f"no job {id}")
    state, options = found[0]
    kept = kept_batch(options)
    if not kept:
        raise WrongState(f"job {id} is no batch: it follows no submit_many")
    return state, options, kept


def _others(jobs: Iterable[Accepted], fresh: Iterable[list[Any]]) -> set[int]:
    """What members were found to be that are not new."""
    return {job.id for job in jobs} - {row[0] for row in fresh}


def _left(states: dict[int, str], when: str) -> int:
    """For how many of these jobs a follow-up has to wait."""
    return sum(not is_over(state, when) for state in states.values())


def _edges(id: int, fresh: Iterable[list[Any]], states: dict[int, str]) -> list[tuple[int, int]]:
    """Those of a follow-up to members that are new, and to others that are not done."""
    needed = [row[0] for row in fresh] + [other for other, is_ in states.items() if is_ != DONE]
    return [(id, needs) for needs in sorted(needed)]


def _key(id: int) -> str:
    """That of a member which is another job, among the steps of its batch."""
    return f"member {id}"


def _keep(batch: Batch, id: int, others: Iterable[int]) -> None:
    """Keep which other jobs are members: their edges go when they are done."""
    keys = [(_key(other),) for other in sorted(others)]
    if keys:
        batch.tx.run_rows(st.KEEP_MEMBERS, keys, batch=id, now=batch.now)


def _with_batch(options: str | None, kept: dict[str, Any]) -> str:
    return encode({**json.loads(options or "{}"), BATCH: kept})


def _refuse_circles(
    batch: Batch, one: Filling, fresh: Iterable[list[Any]], states: dict[int, str]
) -> None:
    """Nothing that waits for the follow-up may be a member, nor go before one."""
    ids = {row[0] for row in fresh}
    after = zip(one.submit.rows, one.submit.after, strict=True)
    needed = {id for row, ids_after in after if row[0] in ids for id in ids_after} | states.keys()
    lines = {row[AT["serial_key"]] for row in fresh if len(row) > PLAIN}
    lines = {line for line in lines if line is not None and not is_paced(line)}
    if needed or lines:
        batch.limiter.check_members(one.id, needed, lines)
