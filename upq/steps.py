"""`self.step()`: pieces of a job's own work that are done once, however often the job runs.

Beside `attempt` this is the only code of upq that calls a job's own, so that it can be interrupted
below it. What is kept, and where, is said by `plugins` and `desk`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec

P = ParamSpec("P")


class Steps:
    """The part of a job that takes steps."""

    #: The name of the step that is being done; "" outside.
    in_step = ""

    def step(
        self, name: str, function: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> Any:
        """function(*args, **kwargs), done once: what it returns is kept as JSON, and returned.

        When the job runs again the n-th step of a name returns what the n-th has returned before.
        An exception is not kept. Only the job's own thread takes steps, and queues no jobs in them.
        """
        nth, kept = self.find_step(name)
        if kept is not None:
            return kept[0]
        self.in_step = name
        try:
            result = function(*args, **kwargs)
        finally:
            self.in_step = ""
        return self.keep_step(name, nth, result)

    def find_step(self, name: str) -> tuple[int, list[Any] | None]:
        """Which step of this name it is now, and what that has returned, if it was done before."""
        raise NotImplementedError

    def keep_step(self, name: str, nth: int, result: Any) -> Any:
        """Store what it has returned; returns it as it will be found again."""
        raise NotImplementedError
