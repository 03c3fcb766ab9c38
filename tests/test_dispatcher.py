from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.stores import Store
from upq import config, protocol, schema
from upq.access import Peer
from upq.batch import Batch
from upq.census import Census
from upq.claimer import Claimer
from upq.desk import Ends
from upq.dispatcher import Dispatcher
from upq.errors import Unavailable
from upq.intake import Intake
from upq.job import DONE, FAILED, QUEUED, Outcome, Output
from upq.jobtypes import JobTypes
from upq.runner import Runner

ME = Peer(0, 0, 1, "root", frozenset())


class Front:
    """A front desk over a store; nobody claims but the test, and no lane is made by itself."""

    def __init__(self, folder: Path, store: Store, sections: str) -> None:
        (folder / "upq.cfg").write_text(sections)
        settings = config.load(folder / "upq.cfg")
        types = JobTypes(settings)
        runner = Runner(store.queue, types)
        claimer = Claimer(store.queue, runner, types.hold)
        ends = Ends(store.views)
        self.store = store
        self.intake = Intake(settings, types, store.queue, store.views)
        census = Census(types, store.queue, store.views, store.lists, claimer)
        self.desk = Dispatcher(
            types, store.queue, store.views, store.lists, ends, claimer, self.intake, census, "0"
        )

    def ask(self, line: str) -> Any:
        request = protocol.parse(line.encode())
        assert request is not None
        return self.desk.answer(request, ME, lambda: True)

    @property
    def counters(self) -> dict[str, Any]:
        return dict(self.ask("status")["counters"])

    def rows(self) -> dict[str, int]:
        """How many rows each table has."""
        return {
            name: self.store.fetch(sa.select(sa.func.count()).select_from(table))[0][0]
            for name, table in schema.meta.tables.items()
        }


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    with Store(f"sqlite:///{tmp_path}/upq.db") as store:
        yield Front(
            tmp_path, store, "[job hash]\ncommand = echo {fid}\n[job notify]\ncommand = true\n"
        )


def test_check_writes_nothing_not_even_the_lane_of_a_new_queue(front: Front) -> None:
    before, commits = front.rows(), front.store.queue.writer.commits
    told = front.ask("check hash fid:1")
    assert (told["accepted"], told["queue"], told["ahead"], told["reason"]) == (True, "hash", 0, "")
    assert front.rows() == before
    assert front.store.queue.writer.commits == commits


def test_check_tells_how_many_are_ahead_and_that_a_queue_is_paused(front: Front) -> None:
    front.store.submit("hash")
    front.ask("pause hash")
    told = front.ask("check hash fid:1")
    assert (told["ahead"], told["reason"]) == (1, "queue hash is paused")


def test_each_start_is_counted_with_what_it_was_for(front: Front) -> None:
    store = front.store

    def end(state: str, **fields: Any) -> None:
        store.queue.finish(store.claim_one(), Outcome(state, **fields))
        store.flush()

    id = store.submit()
    end(QUEUED, reason="retry 1 of 2")
    end(QUEUED, reason="interrupted", counts=False)
    end(FAILED)
    front.ask(f"retry {id}")
    end(DONE)
    store.submit()
    end(DONE)
    told = front.counters
    assert (told["started"], told["started_again"]) == (5, 3)
    assert (told["retried"], told["interrupted"], told["asked_again"]) == (1, 1, 1)
    assert (told["rescued"], told["released"], told["fenced"]) == (0, 0, 0)


def test_a_claim_in_doubt_is_counted_when_it_is_released(front: Front) -> None:
    front.store.submit()
    claimed = front.store.claim_one()
    front.store.queue._held.discard(claimed.token)
    front.store.queue.release_strays()
    front.store.claim_one()
    told = front.counters
    assert (told["released"], told["started"], told["started_again"]) == (1, 2, 1)


def test_a_transaction_that_is_rolled_back_counts_nothing(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.store.submit()
    before = front.counters

    def fail(batch: Batch) -> None:
        raise Unavailable("not today")

    monkeypatch.setattr(Batch, "_settle", fail)
    with pytest.raises(Unavailable):
        front.store.claim_one()
    assert front.counters == before


def test_the_manual_has_every_counter(front: Front) -> None:
    manual = (Path(__file__).parent.parent / "docs/protocol.md").read_text()
    table = manual.partition("under `counters`:")[2].partition("\nA job always has")[0]
    named = {name for name in front.counters if f"`{name}`" in table}
    assert named == front.counters.keys()
    assert "`outbox`" in table and "`outbox_lag_s`" in table and "`oldest_queued_s`" in table


def test_output_is_the_stored_one_once_the_end_is_stored(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.store.submit("hash")
    claimed = front.store.claim_one()
    front.store.queue.finish(claimed, Outcome(DONE, output=Output("all of it", 9, False)))
    front.store.flush()
    # Its thread has not come back yet.
    monkeypatch.setattr(front.desk._claimer, "running", lambda: [(claimed, None)])
    told = front.ask(f"output {claimed.id}")
    assert (told["text"], told["running"]) == ("all of it", False)
