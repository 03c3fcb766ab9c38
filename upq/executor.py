"""Where the attempts of a type run: in a thread of the daemon, or elsewhere by the same seam."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from upq.attempt import INTERRUPTED, Report, join, perform, said
from upq.command import CommandJob
from upq.interrupt import Abandoned, Door, Interrupted
from upq.job import CANCELLED, DONE, TIMEOUT
from upq.jobtypes import JobType
from upq.keeper import Keeper
from upq.plugins import Desk, UpqJob


class Executor(Protocol):
    """Runs attempts. One for each word that `executor =` may have.

    A thread of the type's pool carries each attempt, as its place, wherever the work is done.
    """

    def make(
        self, kind: JobType, data: dict[str, Any], desk: Desk | None, facts: dict[str, Any]
    ) -> UpqJob:
        """What stands for one attempt. Its `cancel()`, called anywhere, brings about its end."""

    def perform(self, kind: JobType, plugin: UpqJob) -> Report:
        """Run the attempt; returns when it has ended, and sees to its `timeout_s`.

        The plugin then has jobdata, output, progress, and what the job has asked to follow.
        Raises Abandoned when the job was given up meanwhile, and its end told by another.
        """

    def renew(self) -> None:
        """The configuration was read again: what begins from now on runs today's code."""

    def tidy(self) -> None:
        """A chore: give back what has not been used for a while."""

    def close(self) -> None:
        """Nothing runs any more."""


class Threads:
    """Runs attempts in the calling thread. Commands, which are programs anyway, too."""

    def __init__(self, keeper: Keeper) -> None:
        #: Threads that have not come back from jobs that were given up.
        self.abandoned = 0
        self._keeper = keeper
        self._counting = threading.Lock()

    def make(
        self, kind: JobType, data: dict[str, Any], desk: Desk | None, facts: dict[str, Any]
    ) -> UpqJob:
        plugin = kind.make(data, desk, **facts)
        if not isinstance(plugin, CommandJob):  # which ends itself
            plugin.door = Door()
            plugin.ender = self._keeper.cancel
        return plugin

    def perform(self, kind: JobType, plugin: UpqJob) -> Report:
        door = plugin.door
        if door is None:
            report = perform(plugin, kind.file, kind.checks)
            return report._replace(end=TIMEOUT) if plugin.ended_by == "timeout" else report
        if plugin.timeout_s:
            self._keeper.limit(plugin)
        try:
            report = door.run(perform, plugin, kind.file, kind.checks)
        except Interrupted:
            report = Report(INTERRUPTED)
        except Abandoned:
            with self._counting:
                self.abandoned -= 1
            raise
        finally:
            if plugin.timeout_s:
                self._keeper.forget(plugin)
        return judged(plugin, report)

    def abandon(self) -> int:
        """Count one more thread that does not come back; says how many there are."""
        with self._counting:
            self.abandoned += 1
            return self.abandoned

    def renew(self) -> None:
        return

    def tidy(self) -> None:
        return

    def close(self) -> None:
        return


def judged(plugin: UpqJob, report: Report) -> Report:
    """The report, with what it means that upq has ended the attempt."""
    if plugin.ended_by == "timeout":
        # What comes after the time is over is no success: most jobs that obey just return.
        text = f"timed out after {plugin.timeout_s:g} s"
        result = None if report.end == DONE else report.result
        begun = "" if report.end == CANCELLED else report.message or said(plugin)
        return Report(TIMEOUT, join(begun, text), result)
    if report.end == INTERRUPTED:
        return Report(CANCELLED, join(report.message or said(plugin), "cancelled"))
    return report
