"""What is asked of one transaction: jobs to insert, to claim, to end. What it means is in `batch`.

A change says how big it is, and what is to be done in its place should the database refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from upq.draws import Draw
from upq.health import Wish
from upq.job import FAILED, REPLACE, UNSTORABLE, Job, Limits, Outcome
from upq.statements.jobs import AT, PLAIN

#: So many jobs of a lane, or whatever goes first in a pool.
Want = tuple[int, int] | Draw

IDEM_KEY, CHILD_KEY, OPTIONS = AT["idem_key"], AT["child_key"], AT["options"]


@dataclass(slots=True)
class Submit:
    """Jobs to insert, all or none; `rows` are in the order of SUBMITTED."""

    rows: list[list[Any]]
    after: list[tuple[int, ...]]
    who: str
    #: Of each job, its limits; None when none has any. The rows of those that have some go on with
    #: LIMITED.
    limits: list[Limits | None] | None = None

    @property
    def size_bytes(self) -> int:
        return sum(len(row[AT["params"]]) + len(row[AT["options"]] or "") for row in self.rows)

    @property
    def keys(self) -> Iterator[str]:
        """By which a job that is there may stand in for one of these."""
        for row in self.rows:
            unique = row[AT["uniq_key"]] if len(row) > PLAIN else None
            yield from filter(None, (row[IDEM_KEY], row[CHILD_KEY], unique))

    @property
    def binds(self) -> bool:
        """Whether a parent or a join is to wait for what its jobs are found to be."""
        return any(row[CHILD_KEY] or '"join' in (row[OPTIONS] or "") for row in self.rows)

    @property
    def replaces(self) -> bool:
        """Whether any of the jobs takes the place of others."""
        if self.limits is None:
            return False
        return any(one is not None and one.when_busy == REPLACE for one in self.limits)

    def instead(self, error: Exception) -> None:
        return None


@dataclass(slots=True)
class Claim:
    """What to claim, in the order of preference."""

    wants: list[Want]
    size_bytes: int = 0

    def instead(self, error: Exception) -> None:
        return None


@dataclass(slots=True)
class Finish:
    """The end of one attempt, with the jobs that follow it."""

    job: Job
    outcome: Outcome
    result: str | None
    data: str | None
    progress: str | None
    then: Submit | None
    #: Told whether the end was ours to make, after the commit.
    told: Callable[[bool], None] | None = None
    #: For a type that is told of by its health.
    wish: Wish | None = None
    #: Hears in place of `told` that the database refuses it for good: another end has to come.
    refused: Callable[[Exception], None] | None = None

    @property
    def size_bytes(self) -> int:
        outcome = self.outcome
        text = len(outcome.message) + (len(outcome.output.text) if outcome.output else 0)
        then = self.then.size_bytes if self.then else 0
        # Text outside ASCII takes up to four bytes a character.
        return len(self.result or "") + len(self.data or "") + 4 * text + then

    def instead(self, error: Exception) -> Finish | None:
        if self.refused is not None:
            self.refused(error)
            return None
        if self.outcome.reason == UNSTORABLE:
            # Maybe it is for what follows.
            return replace(self, then=None) if self.then is not None else None
        outcome = Outcome(FAILED, f"its end cannot be stored: {error}", reason=UNSTORABLE)
        return Finish(self.job, outcome, None, None, None, None, self.told)
