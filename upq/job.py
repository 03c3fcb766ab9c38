"""The words: states, the job row, what is submitted and how a job ends. Imports nothing of upq.

Times are integers, microseconds since 1970 UTC, in fields that end in `_at`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

#: Waits for its turn; with `run_at`, not before that time.
QUEUED = "queued"
#: Waits for earlier jobs (`@after:`); also shown for jobs whose type or queue cannot run now.
BLOCKED = "blocked"
#: Claimed by a daemon; a parent that waits for a child stays running.
RUNNING = "running"
#: Ended well.
DONE = "done"
#: Ended badly, with no attempt left.
FAILED = "failed"
#: Ended on request.
CANCELLED = "cancelled"
#: Was not started before its `expires_at`.
EXPIRED = "expired"

STATES = (QUEUED, BLOCKED, RUNNING, DONE, FAILED, CANCELLED, EXPIRED)
FINAL = frozenset((DONE, FAILED, CANCELLED, EXPIRED))
#: Ends that somebody may `retry`.
BAD = FINAL - {DONE}

#: JSON in ASCII: what it holds, NUL and lone surrogates too, every database stores.
encode: Callable[[Any], str] = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode

#: What a type does with a submit while jobs of it, or of the same `serial` key, are unfinished:
#: wait behind them, be refused, or take the place of those that have not started.
QUEUE, REJECT, REPLACE = WHEN_BUSY = ("queue", "reject", "replace")

#: What follows a job: types one after another, and lists of types that run side by side.
Chain = Sequence[str | Sequence[str]]

#: Names for `@priority:`; larger goes first.
PRIORITIES = {"high": 10, "default": 0, "low": -10}

#: The reason of what has failed because it took too long.
TIMEOUT = "timeout"
#: The reason of a job whose end the database has refused.
UNSTORABLE = "cannot be stored"

#: Bytes of JSON that a stored result, jobdata that a job has changed, or a child's params may have.
RESULT_LIMIT_BYTES = 1 << 20


class Lane(NamedTuple):
    """One queue and type: what is paused, and what a claim is about."""

    id: int
    queue: str
    type: str
    paused: bool


class Job(NamedTuple):
    """A row of the job table, as it was read. Frozen: only `queue` changes a job."""

    id: int
    lane: int
    type: str
    queue: str
    state: str
    #: Why it is in this state, where the state alone does not say it; "" otherwise.
    reason: str
    #: As submitted, never changed.
    params: dict[str, Any]
    #: The job's data as the last attempt left it.
    data: dict[str, Any]
    #: What else the submit or the type asked for: chain, timeout_s, retries, ...
    options: dict[str, Any]
    #: Lower goes first: minus the priority.
    rank: int
    run_at: int | None
    #: Runs as users count them; an interrupted one is given back.
    attempt: int
    #: Raised by each claim.
    starts: int
    #: Starts that ended with the death of the daemon.
    crashes: int
    #: Random 63 bits of the current claim: the fence; 0 when not running.
    token: int
    cancel_asked: bool
    parent: int | None
    root: int
    submitter: str
    result: Any
    message: str
    progress: dict[str, Any] | None
    created_at: int
    started_at: int | None
    ended_at: int | None


class Limits(NamedTuple):
    """What a job is held to by its type's section or by its submit."""

    #: No two jobs of a type have the same text here; "" for none.
    unique: str = ""
    #: The text is free again when the job starts, and not only when it has ended,
    until_start: bool = False
    #: but at the earliest so many microseconds after the submit.
    unique_us: int = 0
    #: Jobs with the same text, of whatever type, run one after another; "" for none.
    serial: str = ""
    #: Jobs of the type with the same text start no more often than every so many microseconds;
    #: "" for none.
    paced: str = ""
    every_us: int = 0
    #: That rate in words.
    pace: str = ""
    expires_at: int | None = None
    #: Jobs of the type that may wait; 0 for any number.
    max_queue: int = 0
    #: What becomes of a submit while others are unfinished: see WHEN_BUSY.
    when_busy: str = QUEUE


@dataclass(slots=True)
class NewJob:
    """A job to be queued."""

    type: str
    params: dict[str, Any]
    #: Defaults to the type's own queue.
    queue: str = ""
    #: Larger goes first.
    priority: int = 0
    run_at: int | None = None
    #: Key of `@key:`; "" for none.
    key: str = ""
    #: Ids that have to be done before.
    after: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    submitter: str = ""
    parent: int | None = None
    root: int | None = None
    child_key: str | None = None
    limits: Limits | None = None
    #: Jobs queued together with it whose results it waits for.
    joins: tuple[NewJob, ...] = ()


class Gather(NamedTuple):
    """What becomes of a batch whose members are queued: all or none, with what it says here."""

    #: The job that follows a new batch; None where the batch is there already.
    then: NewJob | None
    #: The batch that is there: the id of its follow-up.
    id: int = 0
    #: DONE: it follows when all members are done; ENDED: when all have ended, however.
    when: str = DONE
    #: Whether more members may be added afterwards.
    open: bool = False


#: The other value of `when`.
ENDED = "ended"
#: The name in a follow-up's data under which it finds how its members have ended, and in its
#: options under which its batch is kept.
BATCH = "batch"


class Accepted(NamedTuple):
    """The answer to a submit that is on disk."""

    id: int
    #: True when an earlier submit with the same key or child key had queued it.
    duplicate: bool = False


class Gathered(NamedTuple):
    """A batch after members were queued for it, with their answers."""

    id: int
    jobs: list[Accepted]
    #: An earlier request with the same key had made it.
    duplicate: bool
    open: bool
    #: How many jobs it has.
    members: int


@dataclass(slots=True)
class Outcome:
    """How one attempt ended."""

    #: DONE, FAILED, CANCELLED, or QUEUED for another attempt.
    state: str
    message: str = ""
    result: Any = None
    #: jobdata as the attempt left it.
    data: dict[str, Any] | None = None
    #: For QUEUED: the time before which the next attempt does not start.
    run_at: int | None = None
    reason: str = ""
    #: The last that was reported; None when nothing was.
    progress: dict[str, Any] | None = None
    #: Captured output, or None when there was none.
    output: Output | None = None
    #: False for an attempt that an interruption took away and that does not count.
    counts: bool = True
    #: True when the death of its process ended it.
    crashed: bool = False

    @property
    def is_retry(self) -> bool:
        """Whether a failed attempt is followed by another."""
        return self.state == QUEUED and self.counts


class Output(NamedTuple):
    """Captured output of one attempt, head and tail, with what was left out between."""

    text: str
    size_bytes: int
    truncated: bool
