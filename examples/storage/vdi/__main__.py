"""python3 -m vdi TASK key=value...: run a task and print its result, one line of JSON.

Exit codes: 65 for what must not be done, 1 for what has failed and may be tried again.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from vdi import domains, doors, images, shelf
from vdi.site import Failed, Refused, Site

Task = Callable[..., dict[str, Any]]

ON_DISKS: tuple[Task, ...] = (
    images.create_disk, images.create_snapshot, images.resize, images.convert, images.commit,
    images.rebase, images.sparsify, shelf.archive_disk, shelf.unarchive_disk, shelf.delete_disk,
    shelf.delete_media, doors.upload, doors.receive, doors.download,
)  # fmt: skip
ON_DOMAINS: tuple[Task, ...] = (
    domains.check_domain, domains.start_domain, domains.stop_domain, domains.create_snapshot,
    domains.revert_snapshot,
)  # fmt: skip


def sweep(site: Site) -> dict[str, Any]:
    """What the clock asks for: expired addresses and old trash."""
    return doors.sweep(site) | shelf.sweep(site)


def tasks(site: Site, queue: str) -> dict[str, Task]:
    """By name. A name that means two things is what the queue is of."""
    of_disks = {task.__name__: partial(task, site) for task in (*ON_DISKS, sweep)}
    of_domains = {task.__name__: task for task in ON_DOMAINS}
    return of_disks | of_domains if queue.startswith("hypervisor.") else of_domains | of_disks


def main(name: str = "", *words: str) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    known = tasks(Site.read(), os.environ.get("UPQ_JOB_QUEUE", ""))
    if name not in known:
        print(__doc__, "Tasks:", *sorted(known), file=sys.stderr)
        return 64
    task = known[name]
    given = {key: text for key, _, text in (word.partition("=") for word in words) if text}
    try:
        inspect.signature(task).bind(**given)
        result = task(**given)
    except TypeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 64
    except Refused as error:
        print(error, file=sys.stderr)
        return 65
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"task": name, "job": int(os.environ.get("UPQ_JOB_ID", "-1")), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
