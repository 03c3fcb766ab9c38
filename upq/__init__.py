"""upq: a job dispatcher for people who run their own servers. Job modules import from here."""

from typing import TYPE_CHECKING, Any

from upq.errors import Abort, ChildFailed, Retry, TimedOut

if TYPE_CHECKING:
    from upq.plugins import UpqJob

__version__ = "1.0.0.dev0"
__all__ = ["Abort", "ChildFailed", "Retry", "TimedOut", "UpqJob", "__version__"]


def __getattr__(name: str) -> Any:
    # Late: every call of the command line imports this package, and needs no jobs.
    if name == "UpqJob":
        from upq.plugins import UpqJob  # noqa: PLC0415

        return UpqJob
    raise AttributeError(f"module 'upq' has no attribute {name!r}")
