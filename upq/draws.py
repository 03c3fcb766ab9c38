"""What a claim takes for the places of a pool: which of its lanes go first, and how many of each.

Only the choice is made here; rows are fetched and limits are kept by whoever asks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from upq import when
from upq.rates import Rate

#: What one step of a priority is worth when a job has waited too long: from low to default.
STEP = 10
#: Different priorities of one lane that are looked through for jobs that have waited too long.
RANKS = 20

#: Where a claimed row (CLAIMED of `clauses`) has what the order is made of.
_ID, _LANE, _TYPE, _RANK, _RUN_AT, _ROOT, _CREATED_AT = 0, 1, 2, 7, 8, 13, 15

Row = Any
#: The first rows of a lane, at most so many, of ranks above one if that is given.
Fetch = Callable[[int, int, int | None], Sequence[Row]]


@dataclass(slots=True, eq=False)
class Draw:
    """Places that were booked in a pool, for whatever goes first there when they are filled."""

    pool: str
    room: int
    #: The lanes that were looked at for it.
    lanes: frozenset[int] = frozenset()


class Token(NamedTuple):
    """Something of which there are only so many for all job types of the database."""

    name: str
    #: What it is called in the table of limits.
    key: str
    total: int
    #: How many a job of each type needs that needs any.
    users: Mapping[str, int]


class Bounds(NamedTuple):
    """What bounds the starts of one type in the whole database."""

    rate: Rate | None = None
    #: What the rate is called in the table of limits.
    rate_key: str = ""
    tokens: tuple[Token, ...] = ()


class Level(NamedTuple):
    """Lanes of which the one with the first job goes first; (lane, type)."""

    name: str
    lanes: tuple[tuple[int, str], ...]
    weight: int = 1


class Spent(NamedTuple):
    """Why a type can start nothing more, and when that may change; 0 when a job has ended."""

    reason: str
    until: int


@dataclass(slots=True)
class Plan:
    """In which order the lanes of a pool are to be drawn from."""

    levels: Sequence[Level]
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    #: Places that are left for types that have only so many of the pool's.
    most: Mapping[str, int] = field(default_factory=dict)
    #: A job that has waited so long goes one level, or one step of priority, higher; 0: never.
    ageing_us: int = 0
    #: Whether levels get shares by their weights, and not all that they have in order.
    by_weight: bool = False
    #: By level: what each has to its credit of its share.
    credit: dict[str, int] = field(default_factory=dict)

    def bounded(self) -> dict[str, Bounds]:
        """The limits of the types that are drawn from."""
        types = {type for level in self.levels for _, type in level.lanes}
        return {type: self.bounds[type] for type in types if type in self.bounds}


class Allowance:
    """How many jobs of each type may be taken, kept while they are."""

    def __init__(
        self, plan: Plan, rates: Mapping[str, int], tokens_in_use: Mapping[str, int]
    ) -> None:
        self._most = dict(plan.most)
        self._rates = dict(rates)
        self._bounds = plan.bounds
        self._free = {
            token.name: token.total - tokens_in_use[token.name]
            for bounds in plan.bounds.values()
            for token in bounds.tokens
            if token.name in tokens_in_use
        }

    def left(self, type: str, room: int) -> int:
        """How many more of a type there may be, at most `room`."""
        left = min(room, self._most.get(type, room), self._rates.get(type, room))
        if type in self._bounds:
            for token in self._bounds[type].tokens:
                left = min(left, self._free[token.name] // token.users[type])
        return max(left, 0)

    def take(self, type: str) -> None:
        for left in (self._most, self._rates):
            if type in left:
                left[type] -= 1
        if type in self._bounds:
            for token in self._bounds[type].tokens:
                self._free[token.name] -= token.users[type]

    def spent(self, type: str, at: int) -> Spent | None:
        """What keeps one more of the type from starting; `at` is what its rate has come to."""
        bounds = self._bounds[type]
        for token in bounds.tokens:
            free, need = self._free[token.name], token.users[type]
            if free < need:
                return Spent(f"it needs {token.name}:{need}, {free} of {token.total} are free", 0)
        if bounds.rate and not self._rates[type]:
            until = bounds.rate.free_at(at)
            return Spent(f"rate {bounds.rate.text} is used up until {when.iso(until)}", until)
        return None


def key(row: Row) -> tuple[int, int, int]:
    """The order within a level."""
    return row[_RANK], row[_ROOT], row[_ID]


def choose(plan: Plan, room: int, allowance: Allowance, fetch: Fetch, now: int) -> list[Row]:
    """The rows to start, in order. What is not allowed is passed over."""
    if plan.by_weight:
        return _by_weight(plan, room, allowance, fetch)
    if plan.ageing_us:
        return _by_age(plan, room, allowance, fetch, now)
    taken: list[Row] = []
    for level in plan.levels:
        if len(taken) == room:
            break
        taken += _take(_merged(level, room - len(taken), allowance, fetch), allowance, room, taken)
    return taken


def _merged(level: Level, room: int, allowance: Allowance, fetch: Fetch) -> Iterator[Row]:
    """The first rows of a level's lanes, as they come."""
    heads = [
        fetch(lane, left, None)
        for lane, type in level.lanes
        if (left := allowance.left(type, room))
    ]
    return iter(heads[0]) if len(heads) == 1 else heapq.merge(*heads, key=key)


def _take(
    rows: Iterator[Row], allowance: Allowance, room: int, taken: Sequence[Row] = ()
) -> list[Row]:
    found: list[Row] = []
    for row in rows:
        if len(taken) + len(found) == room:
            break
        if allowance.left(row[_TYPE], 1):
            allowance.take(row[_TYPE])
            found.append(row)
    return found


def _by_weight(plan: Plan, room: int, allowance: Allowance, fetch: Fetch) -> list[Row]:
    """Smooth weighted turns: of the levels that have jobs, each gets its share, well mixed."""
    credit = plan.credit
    rows = {level.name: _merged(level, room, allowance, fetch) for level in plan.levels}
    heads = {name: found for name in rows if (found := _next(rows[name], allowance))}
    weights = {level.name: level.weight for level in plan.levels}
    for name in credit.keys() - heads.keys():
        # Who has nothing to do saves nothing up.
        del credit[name]
    taken: list[Row] = []
    while heads and len(taken) < room:
        for name in heads:
            credit[name] = credit.get(name, 0) + weights[name]
        name = max(heads, key=lambda name: credit[name])
        credit[name] -= sum(weights[other] for other in heads)
        row = heads.pop(name)
        # Another level may have taken the last that was allowed.
        if allowance.left(row[_TYPE], 1):
            allowance.take(row[_TYPE])
            taken.append(row)
        following = _next(rows[name], allowance)
        if following is not None:
            heads[name] = following
    return taken


def _next(rows: Iterator[Row], allowance: Allowance) -> Row | None:
    return next((row for row in rows if allowance.left(row[_TYPE], 1)), None)


def _by_age(plan: Plan, room: int, allowance: Allowance, fetch: Fetch, now: int) -> list[Row]:
    """As with strict levels, but who has waited long stands higher."""
    found = [
        (place(row, depth, plan.ageing_us, now), row)
        for depth, level in enumerate(plan.levels)
        for lane, type in level.lanes
        if allowance.left(type, room)
        for row in _of_each_rank(lane, allowance.left(type, room), fetch)
    ]
    found.sort(key=lambda pair: pair[0])
    return _take((row for _, row in found), allowance, room)


def _of_each_rank(lane: int, room: int, fetch: Fetch) -> Iterator[Row]:
    """The first rows of every rank: within one, who has waited longest comes first."""
    above: int | None = None
    for _ in range(RANKS):
        rows = fetch(lane, room, above)
        yield from rows
        if len(rows) < room:
            return
        above = rows[-1][_RANK]


def place(row: Row, depth: int, ageing_us: int, now: int) -> tuple[int, int, int, int]:
    """Where a job stands in a pool: its level, then its rank; each age is worth one step."""
    waited_us = now - max(row[_CREATED_AT], row[_RUN_AT] or 0)
    steps = max(waited_us, 0) // ageing_us
    up = min(steps, depth)
    return depth - up, row[_RANK] - STEP * (steps - up), row[_ROOT], row[_ID]
