"""What a draw takes, in one transaction of the writer: within the limits of the whole database.

Their rows are locked in one order by all transactions. What goes first is chosen in `draws`.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, Protocol

from upq.draws import Allowance, Bounds, Draw, Plan, Spent, choose
from upq.sql import Tx
from upq.statements import jobs as st


class Changes(Protocol):
    """The batch, as far as draws need it."""

    tx: Tx
    now: int
    #: Lanes that were drawn from, and all that were claimed from and may have more.
    drawn: set[int]
    again: set[int]
    #: By type, of those with limits: what keeps the next one from starting.
    spent: dict[str, Spent | None]

    def change_tally(self) -> None: ...


def rows_for(batch: Changes, draw: Draw, plan: Plan) -> list[Any]:
    """The rows for the places of a pool, within the limits of the whole database."""
    batch.drawn |= draw.lanes
    bounded = plan.bounded()
    at = {key: _lock_limit(batch.tx, key) for key in limit_keys(bounded)}
    rates = {
        type: limits.rate.allowed(at[limits.rate_key], batch.now)
        for type, limits in bounded.items()
        if limits.rate
    }
    allowance = Allowance(plan, rates, _tokens_in_use(batch, bounded))
    rows = choose(plan, draw.room, allowance, partial(_fetch, batch.tx), batch.now)
    started = Counter(row[2] for row in rows)
    for type, limits in bounded.items():
        key = limits.rate_key
        if limits.rate and started[type]:
            at[key] = limits.rate.after(at[key], batch.now, started[type])
            batch.tx.run(st.SET_LIMIT, name=key, at=at[key])
        batch.spent[type] = allowance.spent(type, at.get(key, 0))
    full = len(rows) == draw.room
    batch.again |= {
        lane_id
        for level in plan.levels
        for lane_id, type in level.lanes
        if full or not allowance.left(type, 1)
    }
    return rows


def _fetch(tx: Tx, lane_id: int, free: int, above: int | None) -> list[Any]:
    if above is None:
        return tx.fetch(st.PICK_CLAIMABLE, lane=lane_id, free=free)
    return tx.fetch(st.PICK_ABOVE, lane=lane_id, free=free, above=above)


def _lock_limit(tx: Tx, key: str) -> int:
    """What a limit has come to; no other transaction decides by it before this one ends."""
    found = tx.fetch(st.LOCK_LIMIT, name=key)
    if not found:
        tx.run(st.ADD_LIMIT, name=key, at=0)
    return int(found[0][0]) if found else 0


def _tokens_in_use(batch: Changes, bounded: dict[str, Bounds]) -> dict[str, int]:
    """By token: those of all that runs, also elsewhere; their limits are locked."""
    tokens = {token.name: token for limits in bounded.values() for token in limits.tokens}
    if not tokens:
        return {}
    batch.change_tally()
    types = sorted({(type,) for token in tokens.values() for type in token.users})
    running = dict(batch.tx.fetch_rows(st.RUNNING_OF_TYPES, types))
    return {
        name: sum(int(running.get(type, 0)) * need for type, need in token.users.items())
        for name, token in tokens.items()
    }


def limit_keys(bounded: dict[str, Bounds]) -> list[str]:
    """In the order in which all transactions lock them."""
    keys = {token.key for limits in bounded.values() for token in limits.tokens}
    return sorted(keys | {limits.rate_key for limits in bounded.values() if limits.rate})
