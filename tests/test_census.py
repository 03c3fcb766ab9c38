from __future__ import annotations

import sqlalchemy as sa

from tests import test_dispatcher
from tests.test_dispatcher import Front
from upq import schema, when
from upq.job import DONE, QUEUED, Outcome

front = test_dispatcher.front


def test_the_outbox_is_what_is_not_delivered_since_when(front: Front) -> None:
    store = front.store
    assert (front.ask("status")["outbox"], front.ask("status")["outbox_lag_s"]) == (0, 0)
    ids = [store.submit("notify") for _ in range(3)]
    hour_ago = sa.update(schema.job).values(created_at=schema.job.c.created_at - 3_600_000_000)
    store.change(hour_ago.where(schema.job.c.id == ids[0]))
    assert front.ask("status")["outbox"] == 3
    assert 3600 <= front.ask("status")["outbox_lag_s"] < 3660, "it is next"
    claimed = store.claim_one("notify")
    assert front.ask("status")["outbox_lag_s"] < 60 and front.ask("status")["outbox"] == 3
    later = when.now() + 3_600_000_000
    store.queue.finish(claimed, Outcome(QUEUED, run_at=later, reason="retry 1 of 100"))
    store.flush()
    assert 3600 <= front.ask("status")["outbox_lag_s"] < 3660, "its server is down"
    for claimed in store.claim(3, "notify"):
        store.queue.finish(claimed, Outcome(DONE))
    store.flush()
    assert (front.ask("status")["outbox"], front.ask("status")["outbox_lag_s"] >= 3600) == (1, True)
