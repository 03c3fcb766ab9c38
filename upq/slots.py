"""Which slots of schedules are taken: each once, in the transaction that queues its job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from upq.batch import Batch
from upq.errors import RequestError
from upq.job import Accepted, NewJob
from upq.queue import Queue
from upq.statements import slots as st


class Due(NamedTuple):
    """Slots of a schedule whose time has come, in order, each with its job or None to pass it."""

    schedule: str
    #: The last slot that was known before.
    after: int
    slots: list[tuple[int, NewJob | None]]


class Fired(NamedTuple):
    """What has become of them."""

    #: The last slot now; None when another daemon has the schedule in hand.
    last: int | None
    #: The slots with the jobs that are queued now, or why they are not.
    jobs: list[tuple[int, Accepted | RequestError]]


class Slots:
    """The slots that the database knows, of all schedules and all daemons on it."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def enter(self, digests: Mapping[str, int], now: int, until: int) -> dict[str, int]:
        """Make schedules known, each with a digest of its times; returns the last slot of each.

        One that is new or has changed begins now: what was before is not made up for.
        """
        names = sorted((name,) for name in digests)

        def run(batch: Batch) -> dict[str, int]:
            batch.tx.run_rows(st.ADD_SLOTS, [(name, 0, None) for (name,) in names])
            known = dict(batch.tx.fetch_rows(st.SCHEDULE_HEADS, names))
            changed = [name for name, digest in known.items() if digest != digests[name]]
            for name in changed:
                batch.tx.run(st.SET_HEAD, schedule=name, digest=digests[name])
            lasts = dict(batch.tx.fetch_rows(st.LAST_SLOTS, names, until=until))
            if begin := [(name, now, None) for name in lasts if name in changed or not lasts[name]]:
                batch.tx.run_rows(st.ADD_SLOTS, begin)
                lasts = dict(batch.tx.fetch_rows(st.LAST_SLOTS, names, until=until))
            return lasts

        found: dict[str, int] = self._queue.act(run)
        return found

    def fire(self, due: Sequence[Due], until: int) -> list[Fired]:
        """Queue the jobs of these slots and take the slots, in one transaction; none twice.

        A schedule that another daemon has in hand is left alone.
        """
        change = self._queue.change
        changes = [[change([job]) if job else None for _, job in one.slots] for one in due]
        names = sorted((one.schedule,) for one in due)

        def run(batch: Batch) -> list[Fired]:
            free = {row[0] for row in batch.tx.fetch_rows(st.HEADS_FREE, names)}
            last = dict(batch.tx.fetch_rows(st.LAST_SLOTS, names, until=until))
            mine = [one.schedule in free and last[one.schedule] == one.after for one in due]
            submits = [
                new
                for ours, news in zip(mine, changes, strict=True) if ours
                for new in news if new
            ]  # fmt: skip
            stored = iter(batch.insert(submits))
            fired: list[Fired] = []
            rows: list[tuple[str, int, int | None]] = []
            for one, ours in zip(due, mine, strict=True):
                if not ours:
                    fired.append(Fired(last[one.schedule] if one.schedule in free else None, []))
                    continue
                jobs = [(at, next(stored)) for at, job in one.slots if job]
                told = [(at, r if isinstance(r, RequestError) else r[0]) for at, r in jobs]
                ids = {at: r.id for at, r in told if isinstance(r, Accepted)}
                rows += [(one.schedule, at, ids.get(at)) for at, _ in one.slots]
                fired.append(Fired(one.slots[-1][0], told))
            if rows:
                batch.tx.run_rows(st.INSERT_SLOTS, rows)
            return fired

        found: list[Fired] = self._queue.act(run)
        return found

    def purge(self, before: int) -> int:
        """Delete old slots, but the last of each schedule and the last that fired."""

        def run(batch: Batch) -> int:
            count, names = 0, batch.tx.fetch(st.NEXT_SCHEDULE, after="")
            while names:
                name = names[0][0]
                ends = batch.tx.fetch_rows(st.LAST_SLOTS, [(name,)], until=before)
                ends += batch.tx.fetch(st.LAST_FIRED, schedule=name)
                upto = min([before, *(row[-1] for row in ends)])
                old = batch.tx.fetch(st.OLD_SLOTS, schedule=name, before=upto)
                if old:
                    batch.tx.run(st.DELETE_SLOTS, schedule=name, upto=old[-1][0])
                count += len(old)
                names = batch.tx.fetch(st.NEXT_SCHEDULE, after=name)
            return count

        return int(self._queue.act(run))
