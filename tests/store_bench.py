"""What the store costs with many rows in it.

python -m tests.store_bench URL
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import sqlalchemy as sa

from tests.stores import Store
from upq import schema
from upq.batch import Act
from upq.job import DONE, FAILED, Job, NewJob, Outcome

event, job = schema.event, schema.job


class Crowd(NamedTuple):
    """Ids of one job of each kind that there are many of."""

    done: int
    failed: int
    later: int
    paused: int
    blocked: int


def crowd(store: Store, rows: int = 200_000) -> Crowd:
    """Fill a store with so many jobs of each kind together, each with a line of history."""
    ids = []
    for state in (DONE, FAILED):
        ids.append(store.submit())
        store.queue.finish(store.claim_one(), Outcome(state))
        store.flush()
    ids.append(store.submit(run_at=2**52))
    ids.append(store.submit("paused"))
    ids.append(store.submit(after=(ids[2],)))
    for id in ids:
        store.copy(id, rows // len(ids))
    many = Crowd(*ids)
    new = {c.name: c for c in event.c} | {"n": job.c.id + 2**40, "job": job.c.id}
    line = sa.select(*new.values()).where(event.c.n == 1)
    store.change(sa.insert(event).from_select(list(new), line, include_defaults=False))
    if store.database.kind == "postgresql":
        store.queue.writer.run([Act(lambda batch: batch.tx.cursor.execute("ANALYZE"))])
    return many


def each_ms(times: int, act: Callable[[], object]) -> list[float]:
    spent: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        spent.append((time.perf_counter() - began) * 1000)
    return spent


def claims_past(url: str, rows: int = 200_000) -> list[float]:
    """Milliseconds of each of 20 claims of ten jobs, past so many that are not due."""
    with Store(url) as store:
        later = store.submit(priority=10, run_at=2**52)
        store.copy(later, rows)
        store.accepted(*[NewJob("hash", {"fid": str(n)}) for n in range(200)])
        claimed: list[Job] = []
        spent_ms = each_ms(20, lambda: claimed.extend(store.claim(10)))
        assert len(claimed) == 200, len(claimed)
        return spent_ms


def main(arguments: Sequence[str]) -> None:
    for url in arguments:
        median_ms = statistics.median(claims_past(url))
        print(f"claim of 10 past 200,000 that are not due: {median_ms:.2f} ms")


if __name__ == "__main__":
    main(sys.argv[1:])
