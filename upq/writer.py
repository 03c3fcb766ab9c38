"""Group commit: every change of every thread goes through one writer.

It puts all that wait into one transaction. What a change does is said by the `apply` it is given;
the statements are in `statements`, what they mean in `batch`.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import sqlalchemy as sa

from upq.db import STATEMENT_S, Database, one_line
from upq.errors import RequestError, Unavailable, Uncertain, UpqError
from upq.sql import Sql, Tx

log = logging.getLogger(__name__)

#: Changes in one transaction, and the bytes of text after which no more are added.
BATCH_CHANGES, BATCH_BYTES = 256, 2 << 20
#: Codes for a fault of the statement, not of the database: SQLite's ERROR, TOOBIG, MISMATCH and
#: RANGE, MariaDB's packet too large and broken JSON.
OWN_CODES = (1, 18, 20, 25, 1153, 4035)
#: Connections lost in a row over the same changes before they are tried one by one.
SUSPICIOUS = 3
#: How often a transaction is repeated because of a deadlock, and for how many seconds at the most:
#: one that waits for a lock in vain takes 5 s. Between two tries it rests so long, and no longer.
DEADLOCKS, DEADLOCKS_S, DEADLOCK_REST_S = 10, 25.0, 0.3
#: Seconds between two tries to reach a database that is away.
PROBE_S = 1.0


class Replay(UpqError):
    """Raised by `apply` when a batch as a whole does not fit; each change is then run alone."""


class Change(Protocol):
    """What a writer's `apply` understands."""

    @property
    def size_bytes(self) -> int:
        """About how much text it carries."""

    def instead(self, error: Exception) -> Change | None:
        """What to store in its place when the database refuses it for good."""


class Applied(Protocol):
    """What `apply` returns: a result for each change, and what to do when it is over."""

    results: list[Any]

    def proof(self) -> tuple[Sql, dict[str, Any]] | None:
        """A question that has an answer only once the batch is committed."""

    def committed(self) -> None:
        """Take note; before the next batch begins."""

    def tell(self) -> None:
        """Tell those who asked for it; after all who wait were woken."""

    def failed(self) -> None:
        """It was rolled back, or nobody knows."""


Apply = Callable[[Tx, Sequence[Any]], Applied]


class Ticket:
    """Changes that one caller wants committed together, and the lock it sleeps on."""

    __slots__ = ("changes", "done", "error", "lasting", "results", "wake")

    def __init__(self, changes: Sequence[Any], lasting: bool = False) -> None:
        self.changes = changes
        #: Kept and tried again for ever: nobody waits for it.
        self.lasting = lasting
        self.results: list[Any] = []
        self.error: RequestError | None = None
        self.done = False
        self.wake: threading.Lock | None = None


class Writer:
    """Group commit. Whoever finds the writer idle commits for itself and for all who wait.

    `run` may be called from any thread. It holds no lock while the database works.
    """

    def __init__(self, database: Database, apply: Apply) -> None:
        self._database = database
        self._apply = apply
        self._mutex = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._led = False
        self._raw: Any = None
        #: Called, in any thread, when a change was posted that no caller will commit.
        self.on_post: Callable[[], None] = lambda: None
        #: Why the database cannot be written to, "" while it can.
        self.trouble = ""
        self._tried_s = 0.0
        # When the latest transaction has begun.
        self._began_s = 0.0
        # Transactions in a row that lost a connection which had just answered.
        self._broken = 0
        #: Raised each time the database has come back.
        self.recoveries = 0
        #: When the outcome of a commit was last not known, by time.monotonic.
        self.doubted_s = float("-inf")
        self.commits = 0
        self.retried = 0

    def run(self, changes: Sequence[Any]) -> list[Any]:
        """Commit the changes and return their results; with none, commit what was posted.

        Raises Unavailable (nothing was changed) or Uncertain (the outcome is not known).
        """
        ticket = Ticket(changes)
        with self._mutex:
            self._waiting.append(ticket)
            leads = not self._led
            if leads:
                self._led = True
            else:
                ticket.wake = threading.Lock()
                ticket.wake.acquire()
        if not leads:
            assert ticket.wake is not None
            ticket.wake.acquire()
        if not ticket.done:
            self._lead(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket.results

    def post(self, change: Any) -> None:
        """Have a change committed soon; it is kept until it is, through any outage."""
        with self._mutex:
            self._waiting.append(Ticket((change,), lasting=True))
        self.on_post()

    @property
    def pending(self) -> int:
        return len(self._waiting)

    def _lead(self, own: Ticket) -> None:
        try:
            while not own.done:
                batch = self._take()
                try:
                    applied = self._commit(batch)
                except RequestError as error:
                    self._fail(batch, error)
                except BaseException as error:
                    self._fail(batch, Unavailable(f"a fault of upq: {one_line(error)}"))
                    raise
                else:
                    self._wake(batch, own)
                    self._tell(applied)
        finally:
            self._hand_over()

    def _take(self) -> list[Ticket]:
        batch: list[Ticket] = []
        # What has repeatedly broken the connection is looked for one by one.
        limit = 1 if self._broken >= SUSPICIOUS else BATCH_CHANGES
        count = size = 0
        with self._mutex:
            while self._waiting and count < limit and size < BATCH_BYTES:
                ticket = self._waiting.popleft()
                batch.append(ticket)
                count += len(ticket.changes) or 1
                size += sum(change.size_bytes for change in ticket.changes)
        return batch

    def _fail(self, batch: list[Ticket], error: RequestError) -> None:
        """Refuse what a caller waits for, and keep the rest for later.

        While the database is away that goes for all who wait: kept changes may fill whole batches.
        """
        with self._mutex:
            self._waiting.extendleft(reversed([one for one in batch if one.lasting]))
            if self.trouble:
                batch = batch + list(self._waiting)
                self._waiting = deque(one for one in self._waiting if one.lasting)
        for ticket in batch:
            if not ticket.lasting:
                ticket.error, ticket.done = error, True
                if ticket.wake is not None:
                    ticket.wake.release()

    def _wake(self, batch: list[Ticket], own: Ticket) -> None:
        for ticket in batch:
            if ticket is not own and ticket.wake is not None:
                ticket.wake.release()

    def _tell(self, applied: list[Applied]) -> None:
        for one in applied:
            try:
                one.tell()
            except Exception:
                log.exception("what follows a commit failed")

    def _hand_over(self) -> None:
        """Make the first caller that still sleeps the leader; posted changes wait for one."""
        with self._mutex:
            for ticket in self._waiting:
                if ticket.wake is not None:
                    ticket.wake.release()
                    return
            self._led = False
        if self._waiting and not self.trouble:
            self.on_post()

    # One batch

    def _commit(self, batch: list[Ticket]) -> list[Applied]:
        """Commit the changes of these tickets. Raises Unavailable, Uncertain for all of them."""
        self._must_not_wait()
        changes = [change for ticket in batch for change in ticket.changes]
        applied: list[Applied] = []
        try:
            if changes:
                applied.append(self._transaction(changes, alone=len(changes) == 1))
            given = iter(applied[0].results if applied else ())
            for ticket in batch:
                ticket.results = [next(given) for _ in ticket.changes]
        except Replay:
            for ticket in batch:
                ticket.results = [self._alone(c, ticket.lasting, applied) for c in ticket.changes]
        for ticket in batch:
            ticket.done = True
        return applied

    def _alone(self, change: Any, lasting: bool, applied: list[Applied]) -> Any:
        """One change by itself, so that a bad one never fails its neighbours."""
        try:
            self._must_not_wait()
            applied.append(self._transaction([change], alone=True))
            return applied[-1].results[0]
        except Replay as error:
            self._broken = 0
            log.error("a change cannot be stored: %s", one_line(error))
            if lasting:
                self._post_instead(change, error)
            return Unavailable(f"cannot be stored: {one_line(error)}")
        except RequestError as error:
            if lasting:
                self.post(change)
            return error

    def _must_not_wait(self) -> None:
        """Raise Unavailable while it is too early to ask again for a database that was away."""
        if self.trouble and time.monotonic() - self._tried_s < PROBE_S:
            raise Unavailable(self.trouble)

    def _post_instead(self, change: Any, error: Exception) -> None:
        instead = change.instead(error)
        if instead is not None:
            self.post(instead)

    def _transaction(self, changes: Sequence[Any], alone: bool) -> Applied:
        """One transaction, repeated on a deadlock. Raises Replay, Unavailable, Uncertain."""
        attempt = 0
        over_s = time.monotonic() + DEADLOCKS_S
        while True:
            try:
                applied = self._once(changes, alone)
                break
            except self._errors as error:
                is_over = attempt == DEADLOCKS or time.monotonic() > over_s
                if is_over or not self._is_passing(error, alone):
                    self._judge(error, alone)
                self._rollback()
            except (Replay, RequestError):
                self._rollback()
                raise
            except Exception as error:
                log.exception("a change has a fault of upq's own")
                self._rollback()
                raise Replay(f"a fault of upq: {one_line(error)}") from error
            attempt += 1
            self.retried += 1
            rest_s = min(0.01 * 2**attempt, DEADLOCK_REST_S)
            time.sleep(rest_s * random.uniform(0.5, 1.5))
        self.commits += 1
        self._broken = 0
        if self.trouble:
            log.warning("the database is back")
            self.trouble = ""
            self.recoveries += 1
        try:
            applied.committed()
        except Exception:
            log.exception("what follows a commit failed")
        return applied

    def _once(self, changes: Sequence[Any], alone: bool) -> Applied:
        self._began_s = time.monotonic()
        raw = self._connect()
        tx = Tx(self._database.dialect, raw.cursor(), alone)
        if self._database.kind == "sqlite":
            tx.cursor.execute("BEGIN IMMEDIATE")
        applied = self._apply(tx, changes)
        try:
            raw.commit()
        except self._errors as error:
            if not self._was_committed(applied):
                applied.failed()
                self._down(error)
                self.doubted_s = time.monotonic()
                raise Uncertain(
                    "the database went away in the commit; ask again with the same @key:"
                ) from error
        return applied

    @property
    def _errors(self) -> tuple[type[BaseException], ...]:
        return (self._database.dialect.loaded_dbapi.Error, sa.exc.SQLAlchemyError, OSError)

    def _connect(self) -> Any:
        if self._raw is None:
            self._tried_s = time.monotonic()
            self._raw = self._database.raw()
        return self._raw

    def _rollback(self) -> None:
        if self._raw is not None:
            try:
                self._raw.rollback()
            except self._errors as error:
                self._drop(error)

    def _drop(self, error: BaseException) -> None:
        """Close the connection for good: what a failed fsync left in it must not be used."""
        raw, self._raw = self._raw, None
        if raw is not None:
            try:
                raw.invalidate(error)
            except self._errors:
                log.debug("closing the writer's connection failed", exc_info=True)

    def _down(self, error: BaseException) -> None:
        self._drop(error)
        if not self.trouble:
            log.error("the database cannot be written to: %s", one_line(error))
        self.trouble = f"the database is away: {one_line(error)}"
        self._tried_s = time.monotonic()
        # The claimer goes on asking until the database is back.
        self.on_post()

    def _is_passing(self, error: BaseException, alone: bool) -> bool:
        """A deadlock or a lock timeout: the same transaction may go through next time.

        So may one that has met a key which another daemon was just storing: it finds it now.
        """
        passing = ("40001", "40P01", "55P03", 1205, 1213, 1020)
        return code_of(error) in passing or (alone and code_of(error) in ("23505", 1062))

    def _is_gone(self, error: Any) -> bool:
        if self._raw is None:
            return True
        return self._database.dialect.is_disconnect(error, self._raw.dbapi_connection, None)

    def _judge(self, error: BaseException, alone: bool) -> NoReturn:
        """An error before the commit: the whole database's, or of one change's own making."""
        dbapi = self._database.dialect.loaded_dbapi
        own = (dbapi.DataError, dbapi.IntegrityError, dbapi.ProgrammingError)
        gone = self._is_gone(error)
        if (code_of(error) in OWN_CODES or isinstance(error, own)) and not gone:
            self._rollback()
            raise Replay(one_line(error)) from error
        answered = self._raw is not None
        self._down(error)
        if gone and answered and self._may_ask() and self._answers():
            self._broken += 1
            if alone and self._broken > SUSPICIOUS:
                raise Replay(one_line(error)) from error
        raise Unavailable(self.trouble) from error

    def _may_ask(self) -> bool:
        """After a hang nobody asks: those who wait have waited long enough."""
        return time.monotonic() - self._began_s < STATEMENT_S

    def _answers(self) -> bool:
        """Whether the database is there all the same: then it was a change that broke it."""
        try:
            self._connect().rollback()
        except self._errors as error:
            self._drop(error)
            return False
        return True

    def _was_committed(self, applied: Applied | None) -> bool:
        """After a commit that raised: look on a new connection whether it went through.

        SQLite is never believed here: after a failed fsync what can be read may not be on disk.
        """
        proof = applied.proof() if applied is not None else None
        self._drop(UpqError("commit failed"))
        if proof is None or self._database.kind == "sqlite" or not self._may_ask():
            return False
        sql, params = proof
        try:
            raw = self._connect()
            found = Tx(self._database.dialect, raw.cursor(), True).fetch(sql, **params)
            raw.rollback()
        except self._errors:
            return False
        return bool(found)

    def close(self) -> None:
        """Give the connection back. The caller has stopped all that writes."""
        if self._raw is not None:
            self._raw.close()
            self._raw = None


def code_of(error: BaseException) -> Any:
    """What the driver calls the error: pymysql's number, psycopg's sqlstate, sqlite3's number.

    pymysql's own sqlstate, which it has since 1.2, is one for many errors: 1062 is 23000 there, and
    1205 is HY000.
    """
    first = error.args[0] if error.args else None
    if isinstance(first, int):
        return first
    return getattr(error, "sqlstate", None) or getattr(error, "sqlite_errorcode", None) or first
