"""Ending a thread's work from outside: an exception raised in it, when that does no harm."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

#: Packages whose code is never interrupted: it may hold locks that the whole daemon needs.
SPARED = frozenset(("importlib", "logging", "sqlalchemy", "upq"))
#: Of these, the code that runs a job's own: nothing is held there.
PASSED_BY = frozenset(("upq.attempt", "upq.steps"))


class Interrupted(BaseException):
    """Raised inside a job that is over its time or cancelled.

    No Exception: a job's `except Exception` lets it through.
    """


class Abandoned(BaseException):
    """Raised in a thread that comes back from a job after that was given up."""


class Door:
    """What a thread goes through to run a job's own code. Only inside can it be interrupted, and
    nothing is raised any more once it is out.
    """

    __slots__ = ("_ident", "_inside", "_lock", "_raised", "given_up", "has_left", "wanted")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ident = 0
        self._inside = False
        self._raised = False
        #: Somebody wants to interrupt: what can, comes back by itself.
        self.wanted = False
        #: The job was given up; its thread is still inside, or has come back since.
        self.given_up = False
        self.has_left = False

    # For the thread

    def run(self, act: Callable[..., T], *args: Any) -> T:
        """act(*args). Raises Interrupted when somebody wants it; Abandoned when it is too late."""
        self._ident = threading.get_ident()
        self._inside = True
        try:
            return act(*args)
        finally:
            try:
                self._leave()
            except Interrupted:
                # At the last moment. It is raised only once, so this time nothing comes between.
                self._leave()
                raise

    def come_out(self) -> NoReturn:
        """Interrupt the calling thread itself, which is inside, at a place that it has chosen."""
        with self._lock:
            self._raised = True
        raise Interrupted

    def _leave(self) -> None:
        # `with` on a lock cannot be interrupted between taking it and its block.
        with self._lock:
            self._inside = False
            self.has_left = True
            if self._raised:
                _raise_in(self._ident, None)
        if self.given_up:
            raise Abandoned

    # For others

    def interrupt(self) -> bool:
        """Raise Interrupted inside, once. False when this is no moment for it: ask again."""
        self.wanted = True
        # With a fresh turn at the interpreter's lock nothing runs between the look and the raise.
        time.sleep(0)
        with self._lock:
            if self._inside and not self._raised and _is_safe(self._ident, Door.run.__code__):
                self._raised = True
                _raise_in(self._ident, Interrupted)
                # The machine may have taken our turn away between the look and the raise.
                if not _is_safe(self._ident, Door.run.__code__):
                    _raise_in(self._ident, None)
                    self._raised = False
            return self._raised or self.has_left

    def give_up(self) -> bool:
        """What the thread brings is not wanted any more; False when it has come out before."""
        with self._lock:
            if self._inside:
                self.given_up = True
            return self.given_up


def _raise_in(ident: int, error: type[BaseException] | None) -> None:
    what = ctypes.py_object(error) if error is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), what)


def _is_safe(ident: int, outermost: CodeType) -> bool:
    """Whether the thread is in a job's own code, or in a library that this has called."""
    frame = sys._current_frames().get(ident)
    while frame is not None and frame.f_code is not outermost:
        name = frame.f_globals.get("__name__") or ""
        if name.partition(".")[0] in SPARED and name not in PASSED_BY:
            return False
        frame = frame.f_back
    return frame is not None
