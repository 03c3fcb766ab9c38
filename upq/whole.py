"""A job with all that is below it, told as one: its state, how far it is, what a retry means.

Pure answers about what others have read. Below a job are its children, what follows its end, and
so on. A bad end counts for the whole, unless the job above it is done and has ended later: that one
has seen it and has coped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from upq import when
from upq.job import BAD, BLOCKED, CANCELLED, DONE, EXPIRED, FAILED, FINAL, RUNNING


class Member(NamedTuple):
    """What is known of one job of a tree; the first of several is the root.

    What comes after `ended_at` is asked of jobs that are not done.
    """

    id: int
    parent: int | None
    state: str
    ended_at: int | None
    type: str | None = None
    #: Not None: the job above has queued it itself, and asks for it again when it runs again.
    child_key: str | None = None
    started_at: int | None = None
    #: As JSON: how far it has said it is.
    progress: str | None = None
    #: As JSON: what it was asked for beside its params.
    options: str | None = None

    @property
    def part(self) -> float:
        """How much of it is done, from 0 to 1."""
        said = json.loads(self.progress) if self.progress and self.state == RUNNING else {}
        return min(max(said["done"] / said["total"], 0.0), 1.0) if said.get("total") else 0.0

    def steps(self, of_type: Callable[[str], int]) -> int:
        """How many jobs are to follow it. of_type: the same for a type that is not told more."""
        if self.options and '"chain"' in self.options:
            return count_steps(json.loads(self.options).get("chain", ()))
        return of_type(self.type) if self.type else 0


def count_steps(chain: Iterable[Any]) -> int:
    """How many jobs a chain has, those side by side among them."""
    return sum(count_steps(one) if isinstance(one, list | tuple) else 1 for one in chain)


def held(members: Sequence[Member], needs: Iterable[tuple[int, int, str]]) -> set[int]:
    """Blocked jobs that wait for what has ended badly, or for others of their kind.

    needs: of these jobs each with one that has to be done before, and its state.
    """
    waiting: dict[int, list[int]] = {}
    latest = {one.id for one in members if one.state in BAD}
    for id, other, state in needs:
        waiting.setdefault(other, []).append(id)
        if state in BAD:
            latest.add(other)
    found = set[int]()
    while latest:
        latest = {id for other in latest for id in waiting.get(other, ())} - found
        found |= latest
    return found & {one.id for one in members if one.state == BLOCKED}


def open_jobs(members: Sequence[Member], stuck: Collection[int]) -> list[Member]:
    """Those that have not ended and may still do so by themselves."""
    return [one for one in members if one.state not in FINAL and one.id not in stuck]


def told(
    members: Sequence[Member], stuck: Collection[int], steps: Callable[[str], int], *, more: bool
) -> dict[str, Any]:
    """State, counts and progress of the whole. steps: how many follow a job of a type.

    more: there are further members, which nobody has read.
    """
    by_id = {one.id: one for one in members}
    open_, ends = open_jobs(members, stuck), [one.ended_at for one in members if one.ended_at]
    total, done = len(members), 0.0
    for one in members:
        if one.state == DONE or (one.state in BAD and not counts(one, by_id)):
            done += 1
        else:
            total += one.steps(steps)
            done += one.part
    return {
        "state": _state(members, open_, stuck, by_id),
        "total": len(members),
        "expected": total,
        "counts": dict(Counter(one.state for one in members)),
        "progress": round(done / total, 4),
        "ended_at": when.iso(max(ends)) if ends and not open_ else None,
        "more": more,
    }


def _state(
    members: Sequence[Member],
    open_: Sequence[Member],
    stuck: Collection[int],
    by_id: Mapping[int, Member],
) -> str:
    root = members[0]
    if open_:
        has_begun = any(one.state == RUNNING or one.state in FINAL for one in members)
        return RUNNING if has_begun else root.state
    if root.state in BAD:
        return root.state
    bad = {one.state for one in members if one.state in BAD and counts(one, by_id)}
    if bad:
        return CANCELLED if bad == {CANCELLED} else FAILED
    return BLOCKED if stuck else DONE


def counts(one: Member, by_id: Mapping[int, Member]) -> bool:
    """Whether the bad end of a job is one of the whole."""
    above = by_id.get(one.parent) if one.parent is not None else None
    return above is None or above.state != DONE or later(one.ended_at, above.ended_at)


def later(at: int | None, than: int | None) -> bool:
    """Whether the one was not seen by the other. What has no time has not been."""
    return at is not None and (than is None or at >= than)


# Retry


def again(members: Sequence[Member]) -> list[int]:
    """The jobs that a retry of the whole queues again; parents that run again ask for the rest."""
    by_id = {one.id: one for one in members}
    found: list[int] = []
    settled = set[int]()
    for at, one in enumerate(members):
        above = by_id.get(one.parent) if at and one.parent is not None else None
        if above is not None and above.id in settled:
            settled.add(one.id)
        elif one.state in BAD:
            if above is None or _comes_back(one, above):
                found.append(one.id)
            elif not counts(one, by_id):
                settled.add(one.id)  # with all that was below it
    return found


def _comes_back(one: Member, above: Member) -> bool:
    if above.state == DONE:
        return later(one.ended_at, above.ended_at)
    # A child is asked for again. What is no child was there before the job above ever ran, and is
    # what that waits for; or its bad end has brought it about, and the next one will do so again.
    if one.child_key is not None or above.started_at is not None:
        return False
    return (
        above.state != EXPIRED or one.state == CANCELLED or not later(one.ended_at, above.ended_at)
    )


# What is shown


def picked(members: Sequence[Member], most: int) -> list[tuple[Member, int]]:
    """At most so many of the members below the root, each with its depth, above its children.

    What has ended badly or runs comes first where not all can be shown.
    """
    by_id = {one.id: one for one in members}
    below = members[1:]
    if len(below) > most:
        below = _most_telling(below, by_id, most)
    children: dict[int | None, list[Member]] = {}
    for one in sorted(below, reverse=True):
        children.setdefault(one.parent, []).append(one)
    found: list[tuple[Member, int]] = []
    left = [(one, 1) for one in children.get(members[0].id, ())]
    while left:
        one, depth = left.pop()
        found.append((one, depth))
        left += [(child, depth + 1) for child in children.get(one.id, ())]
    return found


def _most_telling(below: Sequence[Member], by_id: Mapping[int, Member], most: int) -> list[Member]:
    """Each comes with those above it."""
    chosen: dict[int, Member] = {}
    for one in sorted(below, key=lambda one: (one.state not in BAD, one.state != RUNNING)):
        path = [one]
        while (above := by_id.get(path[-1].parent or 0)) and above.id not in chosen:
            path.append(above)
        path = [each for each in path if each.parent in by_id and each.id not in chosen]
        if len(chosen) + len(path) > most:
            break
        chosen |= {each.id: each for each in path}
    return list(chosen.values())
