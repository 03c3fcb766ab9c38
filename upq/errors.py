"""The error tree, drawn once; each error knows the code a client sees and the daemon's exit status.

UpqError
├── RequestError            answered as `ERR <code> <text>`, the connection stays open
│   ├── UnknownCommand      unknown_command   no such job type or verb
│   ├── Disabled            disabled          the type's section says enabled = no, or has no file
│   ├── Broken              broken            the type's module cannot be loaded (file:line)
│   ├── BadParams           bad_params        the arguments do not fit
│   ├── Refused             refused           the job's own check() said no
│   ├── KeyConflict         key_conflict      the same @key: with other params
│   ├── NotFound            not_found         no job, queue or output of that name
│   ├── WrongState          wrong_state       the job's state does not allow it
│   │   ├── KeyTaken        wrong_state       another job has its `unique` key
│   │   └── IsCancelled     wrong_state       the job that it would be a child of is cancelled
│   ├── Busy                busy              a limit is reached, come back later
│   ├── Denied              denied            the peer has no right to it
│   ├── TooLong             too_long          a line, value or result over its limit
│   ├── BadText             bad_text          not UTF-8, or control characters
│   ├── Stopping            stopping          the daemon is on its way out
│   ├── TimedOut            timeout           a wait ended before the job did
│   ├── Unavailable         unavailable       the database is away; nothing was changed
│   └── Uncertain           uncertain         the database went away in the commit
├── StartError              the daemon cannot start; exit status says why (sysexits.h)
│   ├── DatabaseUnusable    69
│   ├── CannotCreate        73  socket, lock or pid file
│   ├── AlreadyRunning      75
│   ├── NotAllowed          77
│   └── ConfigError         78  every fault of the configuration, with file and line
├── ChildFailed             a job that another waited for has not ended well
├── Retry                   raised by a job: try again after so many seconds
└── Abort                   raised by a job: fail for good, whatever `retries` says
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

#: Characters of a child's message that stand in the text of a ChildFailed.
CHILD_CHARS = 1000
#: Seconds that a job may ask to wait for its next attempt: a hundred years.
RETRY_LIMIT_S = 36525 * 86400


class UpqError(Exception):
    """Base of every error of upq. `code` is the one word a client sees."""

    code = "internal"


class RequestError(UpqError):
    """A request that is answered with `ERR <code> <text>`."""


class UnknownCommand(RequestError):
    code = "unknown_command"


class Disabled(RequestError):
    code = "disabled"


class Broken(RequestError):
    code = "broken"


class BadParams(RequestError):
    code = "bad_params"


class Refused(RequestError):
    code = "refused"


class KeyConflict(RequestError):
    code = "key_conflict"


class NotFound(RequestError):
    code = "not_found"


class WrongState(RequestError):
    code = "wrong_state"


class KeyTaken(WrongState):
    """Another job has the `unique` key."""

    def __init__(self, id: int, holder: int) -> None:
        super().__init__(f"job {id} cannot be queued again: job {holder} has its unique key now")
        self.holder = holder


class IsCancelled(WrongState):
    """The job below which something is to begin is cancelled, or is asked to end."""


class Busy(RequestError):
    code = "busy"


class Denied(RequestError):
    code = "denied"


class TooLong(RequestError):
    code = "too_long"


class BadText(RequestError):
    code = "bad_text"


class Stopping(RequestError):
    code = "stopping"


class TimedOut(RequestError):
    code = "timeout"


class Unavailable(RequestError):
    code = "unavailable"


class Uncertain(RequestError):
    code = "uncertain"


class StartError(UpqError):
    """The daemon cannot start. `exit_status` follows sysexits.h."""

    exit_status = 70


class DatabaseUnusable(StartError):
    exit_status = 69


class CannotCreate(StartError):
    exit_status = 73


class AlreadyRunning(StartError):
    exit_status = 75


class NotAllowed(StartError):
    exit_status = 77


class ConfigError(StartError):
    """Every fault found in one pass over the configuration, each as `file:line: text`."""

    exit_status = 78

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


class ChildFailed(UpqError):
    """Raised by `wait()` of a child and by `gather()`: it has ended, and is not done.

    Of several it is the first; `others` has the rest.
    """

    code = "child_failed"

    def __init__(
        self, id: int, type: str, state: str, message: str = "", others: Sequence[ChildFailed] = ()
    ) -> None:
        self.id = id
        self.type = type
        self.state = state
        #: What the child has said, whole; else the reason of its end: "crashed".
        self.message = message
        self.others = tuple(others)
        own = f"{type} {id} is {state}" + (f": {message[:CHILD_CHARS]}" if message else "")
        super().__init__("; ".join((own, *map(str, others))))


class Retry(UpqError):
    """Raise in `run()` to fail this attempt and try again, if any retries are left.

    after: seconds to wait, up to a hundred years; None leaves it to the type's retry_delay and
    retry_backoff. Raises ValueError when it is neither.
    """

    def __init__(self, message: str = "", after: float | None = None) -> None:
        self.after_s = None if after is None else _wait_s(after)
        super().__init__(message)


class Abort(UpqError):
    """Raise in `run()` to fail the job for good, without further attempts."""


def _wait_s(after: float) -> float:
    try:
        seconds = float(after)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not seconds <= RETRY_LIMIT_S:
        raise ValueError(
            f"after: {after!r} is not a number of seconds, a hundred years at the most"
        )
    return max(seconds, 0.0)
