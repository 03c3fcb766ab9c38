"""Where log lines go and how they read: one record, one line, with the job it belongs to.

The daemon calls `setup()`; whoever runs a job wraps it in `job(...)`, and every line logged in that
thread then begins with `(type:id)`, or `(type:id<root)` for one that belongs to another.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path

#: The `logformat` that writes one JSON object a line.
JSON = "json"
PLAIN = "%(asctime)s %(levelname)-7s %(message)s"
#: The journal has its own time and level.
JOURNAL = "%(message)s"

#: Hears each SQL statement; off until `setup` is told to log them.
_statements = logging.getLogger("upq.sql")
_STDERR_FD = 2
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
#: logging's levels and syslog's, the worst first.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class _Here(threading.local):
    job: tuple[str, int, int] | None = None
    #: What `together` holds back, each with its handler.
    lines: list[tuple[LineHandler, bytes]] | None = None


_here = _Here()

#: Texts that no line may hold, the longest first, replaced as a whole; and who asked how often.
_hidden: tuple[str, ...] = ()
_hidden_counts: Counter[str] = Counter()
_hiding = threading.Lock()


@contextlib.contextmanager
def hiding(texts: Sequence[str]) -> Iterator[None]:
    """Inside the block these texts are *** in every line, whichever thread logs it."""
    if not texts:
        yield
        return
    _hide(texts, 1)
    try:
        yield
    finally:
        _hide(texts, -1)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Lines that this thread logs inside the block are written at its end, with one write().

    At each write another thread may take Python's lock, and keep it for a while.
    """
    _here.lines = []
    try:
        yield
    finally:
        lines, _here.lines = _here.lines, None
        for handler, group in itertools.groupby(lines, itemgetter(0)):
            handler.write([line for _, line in group])


def _hide(texts: Sequence[str], by: int) -> None:
    global _hidden  # noqa: PLW0603, one log for the process
    with _hiding:
        _hidden_counts.update(dict.fromkeys(texts, by))
        for text in texts:
            if not _hidden_counts[text]:
                del _hidden_counts[text]
        _hidden = tuple(sorted(_hidden_counts, key=len, reverse=True))


def _masked(line: str) -> str:
    for text in _hidden:
        line = line.replace(text, "***")
    return line


def thread_failed(args: threading.ExceptHookArgs) -> None:
    """What `threading.excepthook` is in the daemon: a job's own thread ends in the log as well."""
    if args.exc_value is not None and args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "?"
        logging.getLogger("upq").warning("thread %s failed", name, exc_info=args.exc_value)


class job:
    """`with log.job("test", 17):` lines logged in this thread belong to that job.

    root: the job at the top of its tree, if that is another.
    """

    __slots__ = ("_before", "_job")

    def __init__(self, jobname: str, jobid: int, root: int | None = None) -> None:
        self._job = (jobname, jobid, jobid if root is None else root)

    def __enter__(self) -> None:
        self._before = _here.job
        _here.job = self._job

    def __exit__(self, *_: object) -> None:
        _here.job = self._before


def statement(text: str) -> None:
    """Log a statement of SQL. What is given to it is left out: secrets may be among it."""
    if _statements.isEnabledFor(logging.DEBUG):
        _statements.debug("%s", " ".join(text.split()))


def one_line(text: str) -> str:
    """The text with control characters (line ends among them) written as escapes."""
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda char: char[0].encode("unicode_escape").decode(), text)


class PlainFormat(logging.Formatter):
    """A line from a `logformat` text; a traceback follows indented, so that it forges no line."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._second = 0
        self._second_text = ""

    def format(self, record: logging.LogRecord) -> str:
        message = _message(record)
        if _here.job is not None:
            name, id, root = _here.job
            plain = f"({name}:{id}) "
            message = message.removeprefix(plain)
            message = (plain if root == id else f"({name}:{id}<{root}) ") + message
        record.message = one_line(message)
        record.asctime = self._time(record)
        line = self.formatMessage(record)
        trace = _trace(record)
        if trace:
            line = "\n    ".join((line, *map(one_line, trace.splitlines())))
        return _masked(line) if _hidden else line

    def _time(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second_text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._second = second
        return f"{self._second_text},{int(record.msecs):03d}"


class JsonFormat(logging.Formatter):
    """One JSON object a line; `job`, `type`, `root` where there is a job, `trace` of a failure."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": moment, "level": record.levelname.lower()}
        if _here.job is not None:
            line["type"], line["job"], root = _here.job
            if root != line["job"]:
                line["root"] = root
        line |= {"logger": record.name, "message": _message(record)}
        if trace := _trace(record):
            line["trace"] = trace
        return _masked(json.dumps(line))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # a job's mistake in a log call: its text still gets out
        return f"{record.msg!s} [not formatted: {error!r}]"


def _trace(record: logging.LogRecord) -> str:
    trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
    return trace + (record.stack_info or "")


class LineHandler(logging.Handler):
    """Writes each record with one write() to a file that may be rotated, or to a descriptor.

    A record that cannot be written (full disk) is counted in `lost`, and the first of a row is
    reported on stderr. Nothing is ever raised into the code that logs.
    """

    def __init__(self, logfile: Path | None = None, fd: int = _STDERR_FD) -> None:
        super().__init__()
        self.lost = 0
        #: What fails at present and has been reported.
        self._told: set[str] = set()
        self._logfile = logfile
        self._fd = fd if logfile is None else _open(logfile)
        self._opened = _inode(self._fd)
        self._looked_at = 0
        #: True when lines go to the journal, each with its level in front.
        self.to_journal = logfile is None and self._opened == os.environ.get("JOURNAL_STREAM")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if self.to_journal:
                text = _for_journal(record.levelno, text)
            self._follow_rotation(int(record.created))
            line = f"{text}\n".encode("utf-8", "backslashreplace")
        except Exception as error:
            self.lost += 1
            self._complain("write to", error)
            return
        if _here.lines is None:
            self.write([line])
        else:
            _here.lines.append((self, line))

    def write(self, lines: Sequence[bytes]) -> None:
        """Write lines with one write()."""
        with self.lock or contextlib.nullcontext():
            try:
                self._write(b"".join(lines))
                self._told.discard("write to")
            except Exception as error:
                self.lost += len(lines)
                self._complain("write to", error)

    def reopen(self) -> None:
        """Open the file anew by its name, as after SIGHUP; the old one is kept if that fails."""
        if self._logfile is None:
            return
        try:
            fd = _open(self._logfile)
        except OSError as error:
            self._complain("open", error)
            return
        self._told.discard("open")
        # Under the same number, which other threads may be writing to.
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        self._opened = _inode(self._fd)

    def close(self) -> None:
        super().close()
        self.acquire()
        if self._logfile is not None and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.release()

    def _follow_rotation(self, second: int) -> None:
        """Look once a second whether the name still leads to the file that is open."""
        if self._logfile is None or second == self._looked_at:
            return
        self._looked_at = second
        if _inode(self._logfile) != self._opened:
            self.reopen()

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def _complain(self, what: str, error: Exception) -> None:
        if what in self._told:
            return
        self._told.add(what)
        target = self._logfile or f"descriptor {self._fd}"
        with contextlib.suppress(OSError):
            os.write(_STDERR_FD, f"upq: cannot {what} {target}: {error}\n".encode())


def _open(logfile: Path) -> int:
    return os.open(logfile, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


def _inode(file: Path | int) -> str:
    """Which file it is, as JOURNAL_STREAM spells it; "" when there is none."""
    try:
        info = os.stat(file)
    except OSError:
        return ""
    return f"{info.st_dev}:{info.st_ino}"


def _for_journal(levelno: int, text: str) -> str:
    priority = next((priority for level, priority in _PRIORITIES if levelno >= level), 7)
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


def check_format(text: str) -> str | None:
    """What is wrong with a `logformat`, or None. Empty means the default."""
    if text in ("", JSON):
        return None
    record = logging.LogRecord("upq", logging.INFO, "", 0, "a message", None, None)
    record.asctime = "now"
    record.message = record.getMessage()
    try:
        line = logging.Formatter(text).formatMessage(record)
    except (TypeError, ValueError) as error:
        return f"not a log format: {error}"
    return None if record.message in line else "%(message)s is missing"


def setup(
    level: str = "info",
    logformat: str = "",
    logfile: Path | None = None,
    fd: int = _STDERR_FD,
    statements: bool = False,
) -> LineHandler:
    """Send every logger's lines from this level on to one place; again replaces the former place.

    Without a file lines go to stderr, or with their levels to the journal behind it. OSError when
    the file cannot be opened. With `statements` those of SQL are logged, too, whatever the level.
    """
    handler = LineHandler(logfile, fd)
    if logformat == JSON:
        handler.setFormatter(JsonFormat())
    else:
        handler.setFormatter(PlainFormat(logformat or (JOURNAL if handler.to_journal else PLAIN)))
    root = logging.getLogger()
    formers = [former for former in root.handlers if isinstance(former, LineHandler)]
    root.addHandler(handler)
    root.setLevel(level.upper())
    _statements.setLevel(logging.DEBUG if statements else logging.INFO)
    for former in formers:
        root.removeHandler(former)
        former.close()
    # A line that cannot be written is the handler's matter, never printed with a traceback.
    logging.raiseExceptions = False
    return handler
