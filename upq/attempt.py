"""One attempt's own code, check() and run(), and what came of it: the same wherever it runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from upq.errors import (
    Abort,
    ChildFailed,
    Refused,
    RequestError,
    Retry,
    Unavailable,
    Uncertain,
)
from upq.interrupt import Interrupted
from upq.job import CANCELLED, DONE, FAILED, RESULT_LIMIT_BYTES, encode
from upq.loader import blame, raised_at
from upq.plugins import UpqJob

log = logging.getLogger(__name__)

# How an attempt may end, besides DONE, FAILED, CANCELLED and TIMEOUT.

#: By `raise Retry`.
RETRY = "retry"
#: Failed for good: by `raise Abort`, by its check(), or with a result that cannot be stored.
ABORTED, REFUSED, UNFIT = "aborted", "refused", "unfit"
#: It is done, and has not asked again for a child that an earlier run has left unfinished.
CHANGED = "changed"
#: Ended by `Interrupted`.
INTERRUPTED = "interrupted"
#: The database was away under it, or it could not even begin: nothing that the job has done.
AWAY = "away"
#: Its process died.
CRASHED = "crashed"
#: Its class cannot be loaded or made.
BROKEN = "broken"


class Report(NamedTuple):
    """What came of one attempt."""

    end: str
    message: str = ""
    result: Any = None
    #: For RETRY: the seconds to wait, if the job has chosen them.
    after_s: float | None = None


def perform(plugin: UpqJob, file: Path, checks: bool) -> Report:
    """check(), if the class has one of its own, and run(). Raises nothing but Interrupted.

    file: where faults of the job's own code are looked for.
    """
    if checks:
        refusal = refused(plugin, file)
        if refusal is not None:
            return Report(REFUSED, str(refusal))
        plugin.msgstr = ""
    if plugin.cancelled:
        return Report(CANCELLED, "cancelled before it began")
    try:
        returned = plugin.run()
    except Interrupted:
        raise
    except Retry as error:
        return Report(RETRY, join(said(plugin), str(error)), sound_result(plugin), error.after_s)
    except Abort as error:
        return Report(ABORTED, join(said(plugin), str(error)), sound_result(plugin))
    except (Unavailable, Uncertain) as error:
        return Report(AWAY, one_line(error))
    except RequestError as error:
        where = raised_at(error, file)
        text = f"{where}: {error.code} {error}" if where else f"{error.code} {error}"
        return Report(FAILED, join(said(plugin), text), sound_result(plugin))
    except ChildFailed as error:
        return Report(FAILED, join(said(plugin), str(error)), sound_result(plugin))
    except BaseException as error:  # a job's sys.exit() ends the job, not the thread
        if getattr(error, "connection_invalidated", False):  # of SQLAlchemy's DBAPIError
            return Report(AWAY, one_line(error))
        log.warning("run() raised", exc_info=error)
        return Report(FAILED, join(said(plugin), blame(error, file)), sound_result(plugin))
    if returned is False:
        return Report(FAILED, said(plugin), sound_result(plugin))
    result = plugin.result
    if result is None and returned is not True:
        result = returned
    fault = result_fault(result)
    if fault:
        return Report(UNFIT, join(said(plugin), fault))
    return Report(DONE, said(plugin), result)


def refused(plugin: UpqJob, file: Path) -> Refused | None:
    """Ask check(); an exception in it refuses, too."""
    try:
        verdict = plugin.check()
    except Interrupted:
        raise
    except RequestError as error:
        return Refused(str(error))
    except BaseException as error:  # even a sys.exit()
        log.warning("check() raised", exc_info=error)
        return Refused(f"check() failed: {blame(error, file)}")
    return Refused(str(plugin.msgstr or "refused by check()")) if verdict is False else None


def left(plugin: UpqJob, before: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The job's data as the attempt left it; None when that is not kept.

    What is no JSON any more is a warning; what is over its limit is a fault, the second value.
    """
    if plugin.jobdata == before:
        return before, ""
    try:
        if isinstance(plugin.jobdata, dict):
            size = len(encode(plugin.jobdata))
            if size <= RESULT_LIMIT_BYTES:
                return plugin.jobdata, ""
            return None, f"jobdata has {size} bytes, more than {RESULT_LIMIT_BYTES}"
    except (TypeError, ValueError, RecursionError):
        pass
    log.warning("jobdata is no JSON object any more: what this attempt changed in it is not kept")
    return None, ""


def with_fault(report: Report, fault: str) -> Report:
    """The report of an attempt that has left what cannot be stored; no fault changes nothing."""
    if not fault:
        return report
    end = UNFIT if report.end == DONE else report.end
    return report._replace(end=end, message=join(report.message, fault))


def sound_result(plugin: UpqJob) -> Any:
    """What a job that fails has put into `self.result`, if it can be stored."""
    return None if result_fault(plugin.result) else plugin.result


def said(plugin: UpqJob) -> str:
    """The job's message, whatever it has made of it."""
    return plugin.msgstr if isinstance(plugin.msgstr, str) else str(plugin.msgstr or "")


def result_fault(result: Any) -> str:
    """Why a result cannot be stored; "" when it can."""
    if result is None:
        return ""
    try:
        size = len(encode(result))
    except (TypeError, ValueError, RecursionError) as error:
        return f"the result is no JSON: {error}"
    if size > RESULT_LIMIT_BYTES:
        return f"the result has {size} bytes, more than {RESULT_LIMIT_BYTES}"
    return ""


def join(*texts: str) -> str:
    return " ".join(text for text in texts if text)


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
